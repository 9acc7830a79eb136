//! One answer under way: its prompt, its events, and the whole of it once it has ended; and what
//! all objects that tell of the answers to one request have in common.

use std::sync::Arc;

use entente_proto::ids::RequestId;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::quota::Grant;
use super::receipts::Entry;
use super::request::Common;
use super::{Api, ApiError};
use crate::engine::output::Finish;
use crate::engine::sampler::ScoredToken;
use crate::engine::{Event, Request};

/// An answer that the engine works on.
pub struct Pending {
    /// The prompt.
    pub prompt: Vec<u32>,
    /// What the engine says of it. Dropping it ends the work.
    events: mpsc::Receiver<Event>,
    /// What the request may use, and has used.
    grant: Arc<Grant>,
}

/// A complete answer.
#[derive(Default)]
pub struct Answer {
    /// Scores of the prompt's tokens, when asked for; the first has none.
    pub prompt_scores: Vec<Option<ScoredToken>>,
    /// The text.
    pub text: String,
    /// Its tokens.
    pub token_ids: Vec<u32>,
    /// Their scores, when asked for.
    pub scores: Vec<ScoredToken>,
    /// How it ended.
    pub finish: Option<Finish>,
}

/// Why an answer ended, as clients know it: the reason, and the stop string if that was it.
pub fn finish_reason(finish: &Finish) -> (&'static str, Option<&str>) {
    match finish {
        Finish::EndOfSequence => ("stop", None),
        Finish::StopString(stop) => ("stop", Some(stop)),
        Finish::Length => ("length", None),
    }
}

impl Api {
    /// Hands `n` copies of a request to the engine, each with a seed of its own.
    pub fn submit(
        &self,
        entry: &Entry,
        n: u32,
        grant: &Arc<Grant>,
        request: impl Fn() -> Request,
    ) -> Result<Vec<Pending>, ApiError> {
        (0..n)
            .map(|copy| {
                let mut request = request();
                request.sampling.seed = request.sampling.seed.wrapping_add(copy.into());
                let (prompt, grant) = (request.prompt.clone(), grant.clone());
                let events = self.engine.submit(request).inspect_err(|_| grant.forgive())?;
                entry.submitted();
                Ok(Pending { prompt, events, grant })
            })
            .collect()
    }
}

impl Drop for Pending {
    /// Counts what was generated and never read, too.
    fn drop(&mut self) {
        self.events.close();
        while let Ok(event) = self.events.try_recv() {
            self.count(&event);
        }
    }
}

impl Pending {
    /// What happens next; nothing once the engine has gone away.
    pub async fn next(&mut self) -> Option<Event> {
        let event = self.events.recv().await?;
        self.count(&event);
        Some(event)
    }

    fn count(&self, event: &Event) {
        match event {
            Event::Token { .. } => self.grant.count(1),
            Event::Failed(_) => self.grant.forgive(),
            Event::Prompt(_) | Event::Finished { .. } => {}
        }
    }

    /// Waits for the whole answer.
    pub async fn collect(&mut self) -> Result<Answer, ApiError> {
        let mut answer = Answer::default();
        while answer.finish.is_none() {
            match self.next().await {
                Some(Event::Prompt(scores)) => answer.prompt_scores = scores,
                Some(Event::Token { id, text, score }) => {
                    answer.token_ids.push(id);
                    answer.text.push_str(&text);
                    answer.scores.extend(score);
                }
                Some(Event::Finished { finish, text }) => {
                    answer.text.push_str(&text);
                    answer.finish = Some(finish);
                }
                Some(Event::Failed(error)) => return Err(error.into()),
                None => return Err(crate::engine::EngineError::Stopped.into()),
            }
        }
        Ok(answer)
    }
}

/// Tokens in and out of all answers to one request.
#[derive(Debug, Clone, Copy, Default)]
pub struct Usage {
    /// Tokens of the prompts, each counted once however many answers it got.
    pub prompt_tokens: usize,
    /// Tokens generated.
    pub completion_tokens: usize,
}

impl Usage {
    /// OpenAI's object.
    pub fn json(self) -> Value {
        json!({
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        })
    }
}

/// What every object of one response has in common.
pub struct Envelope {
    /// For the model's name and the texts of tokens.
    pub api: Arc<Api>,
    id: String,
    created_s: u64,
    /// Whether choices carry token ids.
    pub return_token_ids: bool,
    include_usage: bool,
    /// Counted while the answers grow.
    pub usage: Usage,
}

impl Envelope {
    /// Begins a response to the request `id`; its own id is that after `prefix`.
    pub fn new(
        api: Arc<Api>,
        prefix: &str,
        id: RequestId,
        common: &Common,
        prompt_tokens: usize,
    ) -> Self {
        Self {
            api,
            id: format!("{prefix}-{id}"),
            created_s: super::now_s(),
            return_token_ids: common.return_token_ids,
            include_usage: common.include_usage(),
            usage: Usage { prompt_tokens, completion_tokens: 0 },
        }
    }

    /// One object of the response.
    pub fn object(&self, kind: &str, choices: Vec<Value>, usage: Option<Usage>) -> Value {
        let mut object = json!({
            "id": self.id,
            "object": kind,
            "created": self.created_s,
            "model": self.api.model_name,
            "choices": choices,
        });
        if let Some(usage) = usage {
            object["usage"] = usage.json();
        }
        object
    }

    /// Chunks of a stream, one for each choice.
    pub fn chunks(&self, kind: &str, choices: Vec<Value>) -> Vec<Value> {
        choices.into_iter().map(|choice| self.object(kind, vec![choice], None)).collect()
    }

    /// The last chunk of a stream, if the client wants to know the usage.
    pub fn last_chunk(&self, kind: &str) -> Vec<Value> {
        let usage = self.include_usage.then_some(self.usage);
        usage.map(|usage| self.object(kind, Vec::new(), Some(usage))).into_iter().collect()
    }

    /// The usage of complete answers.
    pub fn usage_of(&self, answers: &[Answer]) -> Usage {
        let completion_tokens = answers.iter().map(|answer| answer.token_ids.len()).sum();
        Usage { completion_tokens, ..self.usage }
    }
}
