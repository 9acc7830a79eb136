//! `POST /v1/chat/completions`.

use std::sync::Arc;

use axum::Extension;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::http::HeaderMap;
use axum::response::Response;
use entente_model::{ChatMessage, TemplateError};
use serde_json::{Value, json};

use super::choice::{Answer, Envelope, finish_reason};
use super::receipts::Entry;
use super::request::{Chat, Common};
use super::stream::{self, Format};
use super::{Api, ApiError, Caller};
use crate::engine::sampler::ScoredToken;
use crate::engine::{Event, Request};

/// Answers a chat request.
pub async fn create(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    entry: Entry,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    entry.of(&caller.tenant);
    let body = super::body::bytes(body)?;
    entry.body(&body);
    let common: Common = super::body::read(&body)?;
    let chat: Chat = super::body::read(&body)?;
    let origin = api.admit(&caller, &headers, &common)?;
    entry.admitted(&origin, Some(caller.policy()));
    let prompt = render(&api, &chat)?;
    let rest = api.check_prompt(&prompt)?;
    let max_tokens = chat.max_tokens(rest)?;
    api.check_fit(prompt.len(), max_tokens)?;
    let (logprobs, n) = (chat.top_logprobs()?, common.n()?);
    let (sampling, stop) =
        (common.sampling(&api.generation)?, common.stop(max_tokens, &api.generation)?);
    let grant = caller.quota.reserve(prompt.len(), max_tokens, n)?;
    let pending = api.submit(&entry, n, &Arc::new(grant), || Request {
        origin: origin.clone(),
        prompt: prompt.clone(),
        sampling: sampling.clone(),
        stop: stop.clone(),
        logprobs,
        prompt_logprobs: None,
    })?;
    let envelope = Envelope::new(api, "chatcmpl", origin.id, &common, prompt.len());
    let writer = Writer { envelope, begun: vec![false; pending.len()], prompt };
    stream::respond(pending, writer, common.stream).await
}

/// The conversation as tokens.
fn render(api: &Api, chat: &Chat) -> Result<Vec<u32>, ApiError> {
    if chat.messages.0.is_empty() {
        return Err(ApiError::invalid("messages", "there are no messages"));
    }
    let messages = chat
        .messages
        .0
        .iter()
        .map(|m| Ok(ChatMessage { role: m.role.clone(), content: m.content.text()? }))
        .collect::<Result<Vec<_>, ApiError>>()?;
    let conversation = entente_model::Chat {
        messages: &messages,
        add_generation_prompt: true,
        now_s: super::now_s(),
    };
    let prompt = api.template.render(&conversation, &api.tokenizer).map_err(refuse)?;
    prompt.encode(&api.tokenizer).map_err(|error| ApiError::invalid("messages", error.to_string()))
}

/// A conversation that the template does not take is the client's mistake, in the template's words.
fn refuse(error: TemplateError) -> ApiError {
    ApiError::invalid("messages", error.to_string())
}

/// What chunks of a stream call themselves.
const CHUNK: &str = "chat.completion.chunk";

struct Writer {
    envelope: Envelope,
    prompt: Vec<u32>,
    begun: Vec<bool>,
}

impl Writer {
    fn choice(&self, index: usize, answer: Answer) -> Value {
        let (reason, stop) = answer.finish.as_ref().map_or(("length", None), finish_reason);
        let scored = (!answer.scores.is_empty()).then(|| self.logprobs(&answer.scores));
        let mut choice = json!({
            "index": index,
            "message": { "role": "assistant", "content": answer.text },
            "logprobs": scored,
            "finish_reason": reason,
            "stop_reason": stop,
        });
        if self.envelope.return_token_ids {
            choice["prompt_token_ids"] = self.prompt.clone().into();
            choice["token_ids"] = answer.token_ids.into();
        }
        choice
    }

    fn logprobs(&self, scores: &[ScoredToken]) -> Value {
        let content: Vec<Value> =
            scores.iter().map(|score| scored_token(&self.envelope.api, score)).collect();
        json!({ "content": content })
    }

    fn chunk(&self, index: usize, delta: Value, finish: (Option<&str>, Option<&str>)) -> Value {
        json!({
            "index": index, "delta": delta, "logprobs": null, "finish_reason": finish.0,
            "stop_reason": finish.1,
        })
    }

    /// The chunk that says who speaks.
    fn begin(&mut self, index: usize) -> Value {
        self.begun[index] = true;
        let mut choice =
            self.chunk(index, json!({ "role": "assistant", "content": "" }), (None, None));
        if self.envelope.return_token_ids {
            choice["prompt_token_ids"] = self.prompt.clone().into();
        }
        choice
    }
}

fn scored_token(api: &Api, score: &ScoredToken) -> Value {
    let entry = |id: u32, logprob: f32| {
        let text = api.token_text(id);
        json!({ "token": text, "logprob": logprob, "bytes": text.as_bytes() })
    };
    let mut object = entry(score.token.id, score.token.logprob);
    object["top_logprobs"] = score.top.iter().map(|top| entry(top.id, top.logprob)).collect();
    object
}

impl Format for Writer {
    fn whole(self, answers: Vec<Answer>) -> Value {
        let usage = self.envelope.usage_of(&answers);
        let choices = answers.into_iter().enumerate().map(|(i, a)| self.choice(i, a)).collect();
        self.envelope.object("chat.completion", choices, Some(usage))
    }

    fn event(&mut self, index: usize, event: Event) -> Vec<Value> {
        let mut choices = Vec::new();
        if !self.begun[index] {
            choices.push(self.begin(index));
        }
        match event {
            Event::Token { id, text, score } => {
                self.envelope.usage.completion_tokens += 1;
                let silent = text.is_empty() && score.is_none() && !self.envelope.return_token_ids;
                let mut choice = self.chunk(index, json!({ "content": text }), (None, None));
                if let Some(score) = score {
                    choice["logprobs"] = self.logprobs(&[score]);
                }
                if self.envelope.return_token_ids {
                    choice["token_ids"] = json!([id]);
                }
                choices.extend((!silent).then_some(choice));
            }
            Event::Finished { finish, text } => {
                if !text.is_empty() {
                    choices.push(self.chunk(index, json!({ "content": text }), (None, None)));
                }
                let (reason, stop) = finish_reason(&finish);
                choices.push(self.chunk(index, json!({}), (Some(reason), stop)));
            }
            Event::Prompt(_) | Event::Failed(_) => {}
        }
        self.envelope.chunks(CHUNK, choices)
    }

    fn end(&mut self) -> Vec<Value> {
        self.envelope.last_chunk(CHUNK)
    }
}
