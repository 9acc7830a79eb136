//! One answer under way: its prompt, its events, and the whole of it once it has ended.

use tokio::sync::mpsc;

use super::{Api, ApiError};
use crate::engine::output::Finish;
use crate::engine::sampler::ScoredToken;
use crate::engine::{Event, Request};

/// An answer that the engine works on.
pub struct Pending {
    /// The prompt.
    pub prompt: Vec<u32>,
    /// What the engine says of it. Dropping it ends the work.
    pub events: mpsc::Receiver<Event>,
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
    pub fn submit(&self, n: u32, request: impl Fn() -> Request) -> Result<Vec<Pending>, ApiError> {
        (0..n)
            .map(|copy| {
                let mut request = request();
                request.sampling.seed = request.sampling.seed.wrapping_add(copy.into());
                let prompt = request.prompt.clone();
                Ok(Pending { prompt, events: self.engine.submit(request)? })
            })
            .collect()
    }
}

impl Pending {
    /// Waits for the whole answer.
    pub async fn collect(&mut self) -> Result<Answer, ApiError> {
        let mut answer = Answer::default();
        while answer.finish.is_none() {
            match self.events.recv().await {
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
    pub fn json(self) -> serde_json::Value {
        serde_json::json!({
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        })
    }
}
