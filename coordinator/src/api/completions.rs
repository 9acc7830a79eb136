//! `POST /v1/completions`.

use std::sync::Arc;

use axum::Extension;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::http::HeaderMap;
use axum::response::Response;
use serde_json::{Map, Value, json};

use super::choice::{Answer, Envelope, finish_reason};
use super::receipts::Entry;
use super::request::{Common, Completion, Prompt};
use super::stream::{self, Format};
use super::{Api, ApiError, Caller};
use crate::engine::sampler::ScoredToken;
use crate::engine::{Event, Request};

/// Answers a completion request.
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
    let completion: Completion = super::body::read(&body)?;
    let origin = api.admit(&caller, &headers, &common)?;
    entry.admitted(&origin, Some(caller.policy()));
    let prompts = prompts(&api, &completion.prompt)?;
    let (max_tokens, logprobs, n) =
        (completion.max_tokens()?, completion.top_logprobs()?, common.n()?);
    let (sampling, stop) =
        (common.sampling(&api.generation)?, common.stop(max_tokens, &api.generation)?);
    let mut pending = Vec::new();
    for prompt in &prompts {
        api.check_prompt(prompt)?;
        api.check_fit(prompt.len(), max_tokens)?;
    }
    let prompt_tokens = prompts.iter().map(Vec::len).sum();
    let answers = n * prompts.len() as u32;
    let grant = Arc::new(caller.quota.reserve(prompt_tokens, max_tokens, answers)?);
    for prompt in &prompts {
        pending.extend(api.submit(&entry, n, &grant, || Request {
            origin: origin.clone(),
            prompt: prompt.clone(),
            sampling: sampling.clone(),
            stop: stop.clone(),
            logprobs,
            prompt_logprobs: logprobs.filter(|_| completion.echo),
        })?);
    }
    let writer = Writer {
        envelope: Envelope::new(api, "cmpl", origin.id, &common, prompt_tokens),
        echo: completion.echo,
        wants_logprobs: logprobs.is_some(),
        states: pending.iter().map(|p| ChoiceState::new(p.prompt.clone())).collect(),
    };
    stream::respond(pending, writer, common.stream).await
}

fn prompts(api: &Api, prompt: &Prompt) -> Result<Vec<Vec<u32>>, ApiError> {
    let encode = |text: &String| {
        api.tokenizer
            .encode(text, true)
            .map_err(|error| ApiError::invalid("prompt", format!("cannot be tokenized: {error}")))
    };
    let prompts = match prompt {
        Prompt::Text(text) => vec![encode(text)?],
        Prompt::Texts(texts) => texts.iter().map(encode).collect::<Result<_, _>>()?,
        Prompt::Ids(ids) => vec![ids.clone()],
        Prompt::IdLists(lists) => lists.clone(),
    };
    if prompts.is_empty() {
        return Err(ApiError::invalid("prompt", "there is no prompt in the list"));
    }
    Ok(prompts)
}

/// Where one answer stands while it is streamed.
struct ChoiceState {
    prompt: Vec<u32>,
    /// The prompt, as text or ids, has been written.
    begun: bool,
    text_offset: usize,
}

impl ChoiceState {
    fn new(prompt: Vec<u32>) -> Self {
        Self { prompt, begun: false, text_offset: 0 }
    }
}

/// What objects of this endpoint call themselves.
const KIND: &str = "text_completion";

struct Writer {
    envelope: Envelope,
    echo: bool,
    wants_logprobs: bool,
    states: Vec<ChoiceState>,
}

impl Writer {
    fn choice(&mut self, index: usize, answer: Answer) -> Value {
        let mut choice = self.begin(index, &answer.prompt_scores);
        let logprobs = self.logprobs(index, answer.scores.into_iter().map(Some));
        let (reason, stop) = answer.finish.as_ref().map_or(("length", None), finish_reason);
        let prompt_text = choice["text"].as_str().unwrap_or_default();
        choice["text"] = Value::String(format!("{prompt_text}{}", answer.text));
        choice["finish_reason"] = reason.into();
        choice["stop_reason"] = stop.into();
        if self.wants_logprobs {
            merge(&mut choice["logprobs"], logprobs);
        }
        if self.envelope.return_token_ids {
            choice["token_ids"] = answer.token_ids.into();
        }
        choice
    }

    /// A choice that holds what comes before the first generated token.
    fn begin(&mut self, index: usize, prompt_scores: &[Option<ScoredToken>]) -> Value {
        let prompt = std::mem::take(&mut self.states[index].prompt);
        let text = if self.echo { self.envelope.api.text(&prompt) } else { String::new() };
        let mut choice = json!({
            "index": index, "text": text, "logprobs": null, "finish_reason": null,
            "stop_reason": null,
        });
        if self.wants_logprobs {
            let mut logprobs = Logprobs::new(&self.envelope.api, self.states[index].text_offset);
            for (id, score) in prompt.iter().zip(prompt_scores) {
                logprobs.push(*id, score.as_ref());
            }
            self.states[index].text_offset = logprobs.offset;
            choice["logprobs"] = logprobs.json();
        }
        if self.envelope.return_token_ids {
            choice["prompt_token_ids"] = prompt.into();
        }
        self.states[index].begun = true;
        choice
    }

    fn logprobs(
        &mut self,
        index: usize,
        scores: impl Iterator<Item = Option<ScoredToken>>,
    ) -> Value {
        let mut logprobs = Logprobs::new(&self.envelope.api, self.states[index].text_offset);
        for score in scores.flatten() {
            logprobs.push(score.token.id, Some(&score));
        }
        self.states[index].text_offset = logprobs.offset;
        logprobs.json()
    }

    fn delta(&mut self, index: usize, text: String, finish: (Option<&str>, Option<&str>)) -> Value {
        json!({
            "index": index, "text": text, "logprobs": null, "finish_reason": finish.0,
            "stop_reason": finish.1,
        })
    }
}

impl Format for Writer {
    fn whole(mut self, answers: Vec<Answer>) -> Value {
        let usage = self.envelope.usage_of(&answers);
        let choices = answers.into_iter().enumerate().map(|(i, a)| self.choice(i, a)).collect();
        self.envelope.object(KIND, choices, Some(usage))
    }

    fn event(&mut self, index: usize, event: Event) -> Vec<Value> {
        let mut choices = Vec::new();
        // The prompt's own event begins a choice; whatever else comes first must do so itself.
        let begins = !self.states[index].begun && !matches!(event, Event::Prompt(_));
        if begins && (self.echo || self.envelope.return_token_ids) {
            choices.push(self.begin(index, &[]));
        }
        match event {
            Event::Prompt(scores) => choices.push(self.begin(index, &scores)),
            Event::Token { id, text, score } => {
                self.envelope.usage.completion_tokens += 1;
                let silent = text.is_empty() && score.is_none() && !self.envelope.return_token_ids;
                let mut choice = self.delta(index, text, (None, None));
                if self.wants_logprobs {
                    choice["logprobs"] = self.logprobs(index, std::iter::once(score));
                }
                if self.envelope.return_token_ids {
                    choice["token_ids"] = json!([id]);
                }
                choices.extend((!silent).then_some(choice));
            }
            Event::Finished { finish, text } => {
                let (reason, stop) = finish_reason(&finish);
                choices.push(self.delta(index, text, (Some(reason), stop)));
            }
            Event::Failed(_) => {}
        }
        self.envelope.chunks(KIND, choices)
    }

    fn end(&mut self) -> Vec<Value> {
        self.envelope.last_chunk(KIND)
    }
}

/// The legacy form of log-probabilities: four parallel lists.
struct Logprobs<'a> {
    api: &'a Api,
    tokens: Vec<Value>,
    token_logprobs: Vec<Value>,
    top_logprobs: Vec<Value>,
    text_offsets: Vec<Value>,
    /// Characters of text so far.
    offset: usize,
}

impl<'a> Logprobs<'a> {
    fn new(api: &'a Api, offset: usize) -> Self {
        let (tokens, token_logprobs) = (Vec::new(), Vec::new());
        let (top_logprobs, text_offsets) = (Vec::new(), Vec::new());
        Self { api, tokens, token_logprobs, top_logprobs, text_offsets, offset }
    }

    fn push(&mut self, id: u32, score: Option<&ScoredToken>) {
        let text = self.api.token_text(id);
        self.text_offsets.push(self.offset.into());
        self.offset += text.chars().count();
        self.tokens.push(text.into());
        self.token_logprobs.push(score.map(|score| score.token.logprob).into());
        self.top_logprobs.push(score.map(|score| self.top(score)).into());
    }

    /// Texts may collide (parts of characters); the likelier token keeps the name.
    fn top(&self, score: &ScoredToken) -> Map<String, Value> {
        let mut top = Map::new();
        for token in &score.top {
            top.entry(self.api.token_text(token.id)).or_insert(token.logprob.into());
        }
        top
    }

    fn json(self) -> Value {
        json!({
            "tokens": self.tokens,
            "token_logprobs": self.token_logprobs,
            "top_logprobs": self.top_logprobs,
            "text_offset": self.text_offsets,
        })
    }
}

/// Appends the lists of one log-probabilities object to those of another.
fn merge(into: &mut Value, from: Value) {
    let (Value::Object(into), Value::Object(from)) = (into, from) else { return };
    for (key, list) in from {
        if let (Some(Value::Array(a)), Value::Array(b)) = (into.get_mut(&key), list) {
            a.extend(b);
        }
    }
}
