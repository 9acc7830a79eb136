//! Requests as clients write them, and what they mean once checked.
//!
//! Unknown fields are accepted, as other servers do. Known fields that would change the answer and
//! that this server does not implement are refused by name rather than ignored.

use std::fmt;

use entente_model::GenerationConfig;
use entente_proto::frame::REGIONS_MAX;
use entente_proto::ids::Region;
use serde::Deserialize;
use serde::de::{Deserializer, Error, IgnoredAny, SeqAccess, Unexpected, Visitor};

use super::body::{Anything, AtMost, TextOr, extend};
use super::error::ApiError;
use crate::engine::output::StopConditions;
use crate::engine::sampler::Sampling;

/// Answers to one prompt at most.
pub const N_MAX: u32 = 4;
/// Prompts of one completion request at most.
pub const PROMPTS_MAX: usize = 16;
/// Stop strings at most.
pub const STOP_STRINGS_MAX: usize = 4;
/// Bytes of a stop string at most.
pub const STOP_STRING_LEN_MAX: usize = 64;
/// Likeliest tokens reported beside each token at most.
pub const TOP_LOGPROBS_MAX: usize = 20;
/// Messages of a conversation at most.
pub const MESSAGES_MAX: usize = 1_024;
/// Parts of a message at most.
pub const PARTS_MAX: usize = 256;

/// Fields that `/v1/completions` and `/v1/chat/completions` share.
#[derive(Debug, Deserialize)]
pub struct Common {
    /// Must be the served model when given.
    pub model: Option<String>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<i64>,
    min_p: Option<f32>,
    seed: Option<i64>,
    /// Mistral's name for `seed`.
    random_seed: Option<i64>,
    stop: Option<TextOr<String, STOP_STRINGS_MAX>>,
    ignore_eos: Option<bool>,
    n: Option<u32>,
    /// Whether the answer comes as server-sent events.
    #[serde(default)]
    pub stream: bool,
    stream_options: Option<StreamOptions>,
    /// Adds token ids to each choice.
    #[serde(default)]
    pub return_token_ids: bool,
    presence_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    repetition_penalty: Option<f32>,
    logit_bias: Option<Anything>,
    best_of: Option<u32>,
    suffix: Option<String>,
    min_tokens: Option<u32>,
    response_format: Option<ResponseFormat>,
    tools: Option<Anything>,
    structured_outputs: Option<IgnoredAny>,
    /// The only regions that may serve the request, of those that its tenant may use.
    pub residency: Option<AtMost<Region, REGIONS_MAX>>,
}

#[derive(Debug, Deserialize)]
struct ResponseFormat {
    #[serde(rename = "type")]
    kind: String,
}

#[derive(Debug, Clone, Copy, Default, Deserialize)]
struct StreamOptions {
    #[serde(default)]
    include_usage: bool,
}

/// `/v1/completions`, beside the fields of [`Common`].
#[derive(Debug, Deserialize)]
pub struct Completion {
    /// What to continue.
    pub prompt: Prompt,
    /// Tokens to generate; 16 when absent, as in OpenAI's API.
    pub max_tokens: Option<u32>,
    /// Whether the answer starts with the prompt.
    #[serde(default)]
    pub echo: bool,
    /// Likeliest tokens to report beside each token.
    pub logprobs: Option<u32>,
}

/// One or several prompts, as text or token ids.
#[derive(Debug)]
pub enum Prompt {
    /// Text.
    Text(String),
    /// Token ids.
    Ids(Vec<u32>),
    /// Several texts.
    Texts(Vec<String>),
    /// Several lists of token ids.
    IdLists(Vec<Vec<u32>>),
}

impl<'de> Deserialize<'de> for Prompt {
    fn deserialize<D: Deserializer<'de>>(value: D) -> Result<Self, D::Error> {
        value.deserialize_any(PromptVisitor)
    }
}

/// The first value of a list says what the list is of, so that none is kept in a form that could be
/// all of it.
struct PromptVisitor;

/// The first value of a list.
enum First {
    Id(u32),
    Text(String),
    Ids(Vec<u32>),
}

impl<'de> Deserialize<'de> for First {
    fn deserialize<D: Deserializer<'de>>(value: D) -> Result<Self, D::Error> {
        value.deserialize_any(FirstVisitor)
    }
}

struct FirstVisitor;

impl<'de> Visitor<'de> for FirstVisitor {
    type Value = First;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a text, a token id, or a list of token ids")
    }

    fn visit_u64<E: Error>(self, id: u64) -> Result<First, E> {
        let unfit = || E::invalid_value(Unexpected::Unsigned(id), &"a token id");
        u32::try_from(id).map(First::Id).map_err(|_| unfit())
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<First, E> {
        Ok(First::Text(text.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, ids: A) -> Result<First, A::Error> {
        extend(Vec::new(), ids, usize::MAX).map(First::Ids)
    }
}

impl<'de> Visitor<'de> for PromptVisitor {
    type Value = Prompt;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("text, a list of texts, token ids, or lists of token ids")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Prompt, E> {
        Ok(Prompt::Text(text.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Prompt, A::Error> {
        Ok(match list.next_element()? {
            None => Prompt::Texts(Vec::new()),
            Some(First::Id(id)) => Prompt::Ids(extend(vec![id], list, usize::MAX)?),
            Some(First::Text(text)) => Prompt::Texts(extend(vec![text], list, PROMPTS_MAX)?),
            Some(First::Ids(ids)) => Prompt::IdLists(extend(vec![ids], list, PROMPTS_MAX)?),
        })
    }
}

/// `/v1/chat/completions`, beside the fields of [`Common`].
#[derive(Debug, Deserialize)]
pub struct Chat {
    /// The conversation.
    pub messages: AtMost<Message, MESSAGES_MAX>,
    max_tokens: Option<u32>,
    max_completion_tokens: Option<u32>,
    #[serde(default)]
    logprobs: bool,
    top_logprobs: Option<u32>,
}

/// One turn.
#[derive(Debug, Deserialize)]
pub struct Message {
    /// Who speaks.
    pub role: String,
    /// What is said.
    pub content: Content,
}

/// Text, or a list of parts of which only text is supported.
pub type Content = TextOr<Part, PARTS_MAX>;

/// One part of a turn.
#[derive(Debug, Deserialize)]
pub struct Part {
    #[serde(rename = "type")]
    kind: String,
    text: Option<String>,
}

impl Content {
    /// The text; parts are joined by newlines.
    pub fn text(&self) -> Result<String, ApiError> {
        let parts = match self {
            Self::Text(text) => return Ok(text.clone()),
            Self::List(parts) => parts,
        };
        let text = |part: &Part| match (part.kind.as_str(), &part.text) {
            ("text", Some(text)) => Ok(text.clone()),
            ("text", None) => Err(ApiError::invalid("messages", "a text part has no text")),
            (kind, _) => {
                let message = format!("content parts of type {kind:?} are not supported");
                Err(ApiError::invalid("messages", message))
            }
        };
        Ok(parts.iter().map(text).collect::<Result<Vec<_>, _>>()?.join("\n"))
    }
}

/// A number with the bounds that it must keep.
fn within(param: &str, value: f32, min: f32, max: f32) -> Result<f32, ApiError> {
    if value >= min && value <= max {
        return Ok(value);
    }
    Err(ApiError::invalid(param, format!("{param} is {value}, allowed is {min} to {max}")))
}

impl Common {
    /// Refuses what is not implemented rather than answering something else.
    fn check_supported(&self) -> Result<(), ApiError> {
        let text_format = |format: &ResponseFormat| format.kind == "text";
        let unsupported = [
            ("presence_penalty", self.presence_penalty.is_some_and(|p| p != 0.0)),
            ("frequency_penalty", self.frequency_penalty.is_some_and(|p| p != 0.0)),
            ("repetition_penalty", self.repetition_penalty.is_some_and(|p| p != 1.0)),
            ("logit_bias", self.logit_bias.is_some_and(|bias| bias.0)),
            ("best_of", self.best_of.is_some_and(|best| best != self.n.unwrap_or(1))),
            ("suffix", self.suffix.as_ref().is_some_and(|suffix| !suffix.is_empty())),
            ("min_tokens", self.min_tokens.is_some_and(|min| min > 0)),
            ("response_format", self.response_format.as_ref().is_some_and(|f| !text_format(f))),
            ("tools", self.tools.is_some_and(|tools| tools.0)),
            ("structured_outputs", self.structured_outputs.is_some()),
        ];
        match unsupported.into_iter().find(|(_, set)| *set) {
            Some((param, _)) => {
                Err(ApiError::invalid(param, format!("{param} is not supported by this server")))
            }
            None => Ok(()),
        }
    }

    /// Whether the last chunk of a stream carries the usage.
    pub fn include_usage(&self) -> bool {
        self.stream_options.is_some_and(|options| options.include_usage)
    }

    /// Answers wanted for each prompt.
    pub fn n(&self) -> Result<u32, ApiError> {
        match self.n.unwrap_or(1) {
            n @ 1..=N_MAX => Ok(n),
            n => Err(ApiError::invalid("n", format!("n is {n}, allowed is 1 to {N_MAX}"))),
        }
    }

    /// How tokens are chosen. What the request leaves open comes from the model's
    /// `generation_config.json`, and from OpenAI's defaults after that.
    pub fn sampling(&self, defaults: &GenerationConfig) -> Result<Sampling, ApiError> {
        self.check_supported()?;
        let greedy_model = defaults.do_sample == Some(false);
        let default_temperature =
            if greedy_model { 0.0 } else { defaults.temperature.unwrap_or(1.0) };
        let top_k = match self.top_k.or(defaults.top_k.map(i64::from)).unwrap_or(0) {
            -1 => 0,
            k => usize::try_from(k).map_err(|_| {
                ApiError::invalid("top_k", format!("top_k is {k}, allowed is -1 (all) or more"))
            })?,
        };
        let top_p = self.top_p.or(defaults.top_p).unwrap_or(1.0);
        if top_p <= 0.0 {
            let message = format!("top_p is {top_p}, allowed is above 0 up to 1");
            return Err(ApiError::invalid("top_p", message));
        }
        let seed = match self.seed.or(self.random_seed) {
            Some(seed) => seed as u64,
            None => random_seed()?,
        };
        Ok(Sampling {
            temperature: within(
                "temperature",
                self.temperature.unwrap_or(default_temperature),
                0.0,
                2.0,
            )?,
            top_p: within("top_p", top_p, 0.0, 1.0)?,
            top_k,
            min_p: within("min_p", self.min_p.or(defaults.min_p).unwrap_or(0.0), 0.0, 1.0)?,
            seed,
        })
    }

    /// When to stop, at `max_tokens` at the latest.
    pub fn stop(
        &self,
        max_tokens: usize,
        defaults: &GenerationConfig,
    ) -> Result<StopConditions, ApiError> {
        let strings = match self.stop.clone() {
            None => Vec::new(),
            Some(TextOr::Text(one)) => vec![one],
            Some(TextOr::List(many)) => many,
        };
        if let Some(bad) = strings.iter().find(|s| !(1..=STOP_STRING_LEN_MAX).contains(&s.len())) {
            let message = format!(
                "a stop string has {} bytes, allowed is 1 to {STOP_STRING_LEN_MAX}",
                bad.len()
            );
            return Err(ApiError::invalid("stop", message));
        }
        let ignore_eos = self.ignore_eos.unwrap_or(false);
        let token_ids = if ignore_eos { Vec::new() } else { defaults.eos.clone() };
        Ok(StopConditions { max_tokens, strings, token_ids })
    }
}

fn random_seed() -> Result<u64, ApiError> {
    getrandom::u64().map_err(|error| {
        tracing::error!(%error, "the system has no random numbers");
        let status = axum::http::StatusCode::INTERNAL_SERVER_ERROR;
        ApiError::new(status, "internal_error", "no seed could be drawn".into(), None)
    })
}

fn top_len(param: &str, top: u32) -> Result<usize, ApiError> {
    let top = top as usize;
    if top > TOP_LOGPROBS_MAX {
        let message = format!("{param} is {top}, at most {TOP_LOGPROBS_MAX}");
        return Err(ApiError::invalid(param, message));
    }
    Ok(top)
}

impl Completion {
    /// Likeliest tokens wanted beside each token.
    pub fn top_logprobs(&self) -> Result<Option<usize>, ApiError> {
        self.logprobs.map(|top| top_len("logprobs", top)).transpose()
    }

    /// Tokens to generate. None at all makes sense only to score a prompt.
    pub fn max_tokens(&self) -> Result<usize, ApiError> {
        match self.max_tokens.unwrap_or(16) as usize {
            0 if !self.echo => {
                Err(ApiError::invalid("max_tokens", "max_tokens is 0, which needs echo"))
            }
            max_tokens => Ok(max_tokens),
        }
    }
}

impl Chat {
    /// Likeliest tokens wanted beside each token.
    pub fn top_logprobs(&self) -> Result<Option<usize>, ApiError> {
        match (self.logprobs, self.top_logprobs) {
            (true, top) => top_len("top_logprobs", top.unwrap_or(0)).map(Some),
            (false, Some(top)) if top > 0 => {
                Err(ApiError::invalid("top_logprobs", "top_logprobs needs logprobs: true"))
            }
            (false, _) => Ok(None),
        }
    }

    /// Tokens to generate, the rest of the context when absent.
    pub fn max_tokens(&self, rest_of_context: usize) -> Result<usize, ApiError> {
        let (param, wanted) = match self.max_completion_tokens {
            Some(wanted) => ("max_completion_tokens", Some(wanted)),
            None => ("max_tokens", self.max_tokens),
        };
        match wanted {
            Some(0) => Err(ApiError::invalid(param, format!("{param} is 0, at least 1"))),
            Some(wanted) => Ok(wanted as usize),
            None => Ok(rest_of_context),
        }
    }
}
