//! One request as the engine knows it beyond its rows: what it wants of them, and what it was told.

use std::collections::BTreeMap;
use std::sync::OnceLock;
use std::time::Instant;

use entente_model::kernels::Kernels;
use entente_router::exchange::Owners;
use tokio::sync::mpsc;

use super::forward::StepRows;
use super::output::TextStream;
use super::sampler::{self, ScoredToken};
use super::scheduler::{Chunk, SequenceId};
use super::speculation::HitRate;
use super::tally::Tally;
use super::trunk::{Answer, Answers, Need};
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

/// What a row of logits says.
pub(super) struct Reading {
    /// How likely the prompt's next token was, if that is asked for and not known yet.
    prompt_score: Option<ScoredToken>,
    /// The token that follows, with its score if that is asked for, unless the next is known.
    pub(super) drawn: Option<(u32, Option<ScoredToken>)>,
}

impl Generation {
    /// What the row at `position` is needed for, if it predicts something that is asked for; every
    /// guess's does.
    pub(super) fn need(&self, chunk: &Chunk, position: usize) -> Option<Need> {
        let Request { sampling, logprobs, stop, .. } = &self.request;
        let drawn = self.draws_at(chunk, position - chunk.start).filter(|_| stop.max_tokens > 0);
        let scored = self.wants_prompt_score(position) || (drawn.is_some() && logprobs.is_some());
        match (scored, drawn) {
            (true, _) => Some(Need::Logits),
            (false, None) => None,
            (false, Some(at)) => Some(sampling.choice(at).map_or(Need::Logits, Need::Token)),
        }
    }

    /// The position of the token that row `at` of a chunk draws, if it draws one.
    fn draws_at(&self, chunk: &Chunk, at: usize) -> Option<usize> {
        let draft_at = (at + 1).checked_sub(chunk.known_len()).filter(|_| chunk.reaches_end);
        draft_at.map(|draft_at| self.position + draft_at)
    }

    /// Whether the row at `position` scores the prompt token after it, for the first time: a
    /// preempted request computes rows again whose scores it has already.
    fn wants_prompt_score(&self, position: usize) -> bool {
        let predicted = position + 1;
        predicted < self.request.prompt.len()
            && self.prompt_scores.as_ref().is_some_and(|scores| scores.len() <= predicted)
    }

    /// Reads what is said of row `at` of a chunk. If the row's token is a guess, what it says counts
    /// only if that and all guesses before it are right.
    pub(super) fn read(&self, chunk: &Chunk, at: usize, answer: Answer<'_>) -> Reading {
        Reading {
            prompt_score: self.prompt_score(chunk.start + at, answer),
            drawn: self.draws_at(chunk, at).map(|position| self.draw(position, answer)),
        }
    }

    /// Draws the token at `position`, with its score if that is asked for.
    fn draw(&self, position: usize, answer: Answer<'_>) -> (u32, Option<ScoredToken>) {
        let Request { sampling, logprobs, .. } = &self.request;
        let logits = match answer {
            Answer::Token(token) => return (token, None),
            Answer::Logits(logits) => logits,
        };
        let token = sampler::sample(logits, sampling, position);
        (token, logprobs.map(|top_len| sampler::score(logits, token, top_len)))
    }

    fn prompt_score(&self, position: usize, answer: Answer<'_>) -> Option<ScoredToken> {
        let (top_len, Answer::Logits(logits)) = (self.request.prompt_logprobs?, answer) else {
            return None;
        };
        let token = || self.request.prompt[position + 1];
        self.wants_prompt_score(position).then(|| sampler::score(logits, token(), top_len))
    }

    /// Keeps the score of the prompt's next token, if there is one: rows come in their order.
    pub(super) fn keep_prompt_score(&mut self, reading: &mut Reading) {
        if let (Some(scores), Some(score)) = (&mut self.prompt_scores, reading.prompt_score.take())
        {
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

/// What each of the wanted rows says to whoever wanted it. With a large vocabulary that is as much work
/// as a kernel's, so it is spread over the same threads; who reads a row does not matter.
pub(super) fn read(
    kernels: &dyn Kernels,
    generations: &BTreeMap<SequenceId, Generation>,
    step: &StepRows<'_>,
    answers: &Answers,
) -> Vec<Reading> {
    let mut places: Vec<(&Chunk, usize)> = Vec::new();
    for chunk in step.chunks {
        places.extend((0..chunk.tokens.len()).map(|at| (chunk, at)));
    }
    let readings: Vec<OnceLock<Reading>> = step.wanted.iter().map(|_| OnceLock::new()).collect();
    kernels.for_each(step.wanted.len(), &|i| {
        let (chunk, at) = places[step.wanted[i].row];
        readings[i].get_or_init(|| generations[&chunk.id].read(chunk, at, answers.get(i)));
    });
    let readings = readings.into_iter().map(OnceLock::into_inner);
    readings.map(|reading| reading.expect("every task has run")).collect()
}
