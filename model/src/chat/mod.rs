//! Conversations to prompts, by the template that came with the model.
//!
//! A template is a program in Jinja, written against transformers' environment: whitespace control
//! on, Python's methods on strings and dicts, `raise_exception`, `strftime_now`, a `tojson` that
//! writes as Python does. It is run with a bound on its steps and on its recursion, without files
//! and without a clock: the time is part of the request.
//!
//! What a template writes may become control tokens, what users write may not (see
//! [`crate::tokenizer`]); a [`ChatPrompt`] knows one from the other, and the text alone would not.

mod environment;
mod strftime;

use std::fmt;
use std::path::Path;

use minijinja::{Environment, Value, context};
use serde::Serialize;

use crate::ModelError;
use crate::json::{Fields, read_optional};
use crate::tokenizer::{Guarded, StandIns, Tokenizer, TokenizerError};

/// Longest template or tokenizer configuration, in bytes.
const TEMPLATE_BYTES_MAX: u64 = 16 << 20;
const NAME: &str = "chat_template";

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ChatMessage {
    /// Who speaks, such as `user`.
    pub role: String,
    /// What is said.
    pub content: String,
}

/// What a prompt is made from.
#[derive(Debug, Clone, Copy)]
pub struct Chat<'a> {
    /// The turns so far, in order.
    pub messages: &'a [ChatMessage],
    /// Whether the template should open the assistant's next turn.
    pub add_generation_prompt: bool,
    /// Seconds since 1970-01-01 UTC, for templates that write today's date.
    pub now_s: u64,
}

/// Why a conversation has no prompt.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// The template refuses the conversation, in its own words: the client's mistake.
    #[error("{0}")]
    Raised(String),
    /// The model came without a template.
    #[error("the model has no chat template")]
    Missing,
    /// The template does not work.
    #[error("chat template: {0}")]
    Failed(String),
    /// The prompt has no token ids.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
}

/// A rendered conversation, which still knows what users wrote.
pub struct ChatPrompt(Guarded);

impl ChatPrompt {
    /// Its token ids; the template has written all control tokens itself, also the first.
    pub fn encode(&self, tokenizer: &Tokenizer) -> Result<Vec<u32>, TokenizerError> {
        tokenizer.encode_guarded(&self.0, false)
    }
}

impl fmt::Display for ChatPrompt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.reveal())
    }
}

/// The chat template of a model. Never changes; share it behind an `Arc`.
pub struct ChatTemplate {
    /// Holds the one template, if there is one.
    environment: Environment<'static>,
    source: Option<String>,
    bos_token: String,
    eos_token: String,
}

impl ChatTemplate {
    /// Reads `chat_template.jinja`, or else `chat_template` in `tokenizer_config.json`. A folder
    /// with neither is fine; [`ChatTemplate::render`] then says so.
    pub fn open(dir: &Path) -> Result<Self, ModelError> {
        let config_file = dir.join("tokenizer_config.json");
        let config = match read_optional(&config_file, TEMPLATE_BYTES_MAX)? {
            Some(bytes) => Fields::parse(&config_file, &bytes)?,
            None => Fields::parse(&config_file, b"{}")?,
        };
        let own_file = dir.join("chat_template.jinja");
        let (file, source) = match read_optional(&own_file, TEMPLATE_BYTES_MAX)? {
            Some(bytes) => {
                let source = String::from_utf8(bytes)
                    .map_err(|_| ModelError::file(&own_file, "not valid UTF-8"))?;
                (own_file, Some(source))
            }
            None => (config_file, configured_template(&config)?),
        };
        let mut environment = environment::new();
        if let Some(source) = &source {
            environment.add_template_owned(NAME, source.clone()).map_err(|error| {
                ModelError::field(&file, NAME, format!("not a valid template: {error}"))
            })?;
        }
        let (bos_token, eos_token) = (token(&config, "bos_token")?, token(&config, "eos_token")?);
        Ok(Self { environment, source, bos_token, eos_token })
    }

    /// Whether the model came with a template.
    pub fn is_present(&self) -> bool {
        self.source.is_some()
    }

    /// Renders a conversation. `tokenizer` knows which spellings are control tokens.
    pub fn render(
        &self,
        chat: &Chat<'_>,
        tokenizer: &Tokenizer,
    ) -> Result<ChatPrompt, TemplateError> {
        let source = self.source.as_ref().ok_or(TemplateError::Missing)?;
        let texts = chat.messages.iter().flat_map(|m| [m.role.as_str(), m.content.as_str()]);
        let mut stand_ins = StandIns::avoiding(texts.chain([source.as_str()]));
        let mut messages = Vec::with_capacity(chat.messages.len());
        for ChatMessage { role, content } in chat.messages {
            messages.push(ChatMessage {
                role: tokenizer.guard().hide_whole(role, &mut stand_ins)?,
                content: tokenizer.guard().hide_joined(content, &mut stand_ins)?,
            });
        }
        let text = self.run(chat, &messages)?;
        Ok(ChatPrompt(Guarded { text, stand_ins }))
    }

    fn run(&self, chat: &Chat<'_>, messages: &[ChatMessage]) -> Result<String, TemplateError> {
        let template = self.environment.get_template(NAME).map_err(environment::error)?;
        let context = context! {
            messages => minijinja::value::Serde(messages),
            add_generation_prompt => chat.add_generation_prompt,
            bos_token => self.bos_token.as_str(),
            eos_token => self.eos_token.as_str(),
            tools => Value::from(()),
            strftime_now => environment::strftime_now(chat.now_s),
        };
        template.render(context).map_err(environment::error)
    }
}

/// `chat_template` in `tokenizer_config.json`: a text, or a list of named ones.
fn configured_template(config: &Fields) -> Result<Option<String>, ModelError> {
    let Some(value) = config.value(NAME) else { return Ok(None) };
    let named = |entry: &serde_json::Value| {
        let template = entry.get("template")?.as_str()?.to_owned();
        (entry.get("name")?.as_str()? == "default").then_some(template)
    };
    let template = match value {
        serde_json::Value::String(template) => Some(template.clone()),
        serde_json::Value::Array(entries) => entries.iter().find_map(named),
        _ => None,
    };
    let reason = "expected a template, or a list of named ones with one called \"default\"";
    template.map(Some).ok_or_else(|| config.error(NAME, reason))
}

/// A control token as a text or as an object with its `content`; empty where there is none.
fn token(config: &Fields, name: &str) -> Result<String, ModelError> {
    match config.value(name) {
        Some(serde_json::Value::Object(_)) => {
            let object = config.object(name)?;
            let content = object.as_ref().map(|token| token.text("content")).transpose()?;
            Ok(content.flatten().unwrap_or_default().to_owned())
        }
        _ => Ok(config.text(name)?.unwrap_or_default().to_owned()),
    }
}
