//! One request as the engine knows it beyond its rows: what it wants of them, and what it was told.

use std::collections::BTreeMap;
use std::time::Instant;

use entente_router::exchange::Owners;
use tokio::sync::mpsc;

use super::output::TextStream;
use super::sampler::{self, ScoredToken};
use super::scheduler::{Chunk, SequenceId};
use super::speculation::HitRate;
use super::tally::Tally;
use super::{Event, Request};

/// What the engine knows of a request beyond its rows.
pub(super) struct Generation {
    pub(super) request: Request,
    pub(super) events: mpsc::Sender<Event>,
    pub(super) text: TextStream,
    pub(super) arrived: Instant,
    /// Tokens known: the prompt and what was generated.
    pub(super) position: usize,
    pub(super) generated: usize,
    /// Scores of prompt tokens so far; `None` when not wanted or already sent.
    pub(super) prompt_scores: Option<Vec<Option<ScoredToken>>>,
    /// How often the lookup was right about this one.
    pub(super) hit_rate: HitRate,
    /// What the lookup says comes next in this step, drafted or not.
    pub(super) guesses: Vec<u32>,
    /// Where its rows went.
    pub(super) tally: Tally,
}

impl Generation {
    /// Whether the row at `position` predicts something that is asked for; every guess's does.
    pub(super) fn wants_logits(&self, chunk: &Chunk, position: usize) -> bool {
        let samples = self.request.stop.max_tokens > 0
            && chunk.reaches_end
            && position + 1 >= chunk.start + chunk.known_len();
        samples || self.wants_prompt_score(position)
    }

    /// Whether the row at `position` scores the prompt token after it, for the first time: a
    /// preempted request computes rows again whose scores it has already.
    fn wants_prompt_score(&self, position: usize) -> bool {
        let predicted = position + 1;
        predicted < self.request.prompt.len()
            && self.prompt_scores.as_ref().is_some_and(|scores| scores.len() <= predicted)
    }

    /// Draws the token that follows the known ones, with its score if that is asked for.
    pub(super) fn draw(&self, logits: &[f32]) -> (u32, Option<ScoredToken>) {
        let Request { sampling, logprobs, .. } = &self.request;
        let token = sampler::sample(logits, sampling, self.position);
        (token, logprobs.map(|top_len| sampler::score(logits, token, top_len)))
    }

    pub(super) fn score_prompt(&mut self, position: usize, logits: &[f32]) {
        if !self.wants_prompt_score(position) {
            return;
        }
        let top_len = self.request.prompt_logprobs.unwrap_or(0);
        let token = self.request.prompt[position + 1];
        let score = sampler::score(logits, token, top_len);
        if let Some(scores) = &mut self.prompt_scores {
            scores.push(Some(score));
        }
    }

    pub(super) fn send_prompt_scores(&mut self) {
        if let Some(scores) = self.prompt_scores.take() {
            let _ = self.events.try_send(Event::Prompt(scores));
        }
    }
}

/// Whose the rows of a step are: those of its chunks, each of which is an owner, in their order.
pub(super) fn owners(
    chunks: &[Chunk],
    generations: &BTreeMap<SequenceId, Generation>,
) -> (Owners, Vec<u16>) {
    let (mut owners, mut owner_of_row) = (Owners::default(), Vec::new());
    for (number, chunk) in chunks.iter().enumerate() {
        let origin = &generations[&chunk.id].request.origin;
        let known = owners.policies.iter().position(|policy| *policy == origin.allowed);
        let policy = known.unwrap_or_else(|| {
            owners.policies.push(origin.allowed.clone());
            owners.policies.len() - 1
        });
        owners.owners.push((origin.id, policy as u16));
        owner_of_row.extend(std::iter::repeat_n(number as u16, chunk.tokens.len()));
    }
    (owners, owner_of_row)
}
