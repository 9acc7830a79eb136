//! The engine: one thread that owns the scheduler, the KV cache and the links, and runs one step
//! after the other.
//!
//! A step is: forget requests whose client left, take new ones, plan, compute, sample, tell the
//! clients. A step whose experts are not there is *held*: nothing of it is kept, its requests keep
//! their place, and it is planned anew when the cluster has changed. A request that has waited for
//! as long as it may is told what is missing. [`EngineHandle`] is the cloneable outside; nothing else reaches in. Requests tell the
//! engine that they are gone by closing their event channel, so a client that disconnects frees
//! its slot and its cache before the next step. However a request ends, what was done for it is told
//! once to whoever keeps the records, before its client hears of the end.
//!
//! The pure parts are [`scheduler`], [`speculation`], [`sampler`], [`output`] and `hold`; [`trunk`],
//! [`exchanger`] and [`cluster`] do the arithmetic and the talking, in the order of [`forward`].

pub mod blocks;
pub mod cluster;
pub mod exchanger;
pub mod forward;
mod generation;
mod handle;
mod hold;
pub mod logits;
pub mod origin;
pub mod output;
pub mod sampler;
pub mod scheduler;
pub mod speculation;
pub mod tally;
pub mod trunk;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, TryRecvError};
use entente_model::kernels::{DeviceError, Kernels};
use entente_model::{Detokenizer, Tokenizer};
use entente_proto::ids::Region;
use entente_router::exchange::Failure;
use tokio::sync::watch;

pub use self::cluster::Readiness;
use self::exchanger::Exchanger;
use self::forward::{Forward, StepError, StepRows};
use self::generation::{Generation, Reading};
pub use self::handle::EngineHandle;
use self::handle::{Ringer, Submission};
use self::hold::Hold;
use self::origin::Origin;
use self::output::{Finish, StopConditions, TextStream};
use self::sampler::{Sampling, ScoredToken};
use self::scheduler::{Chunk, NewSequence, Refused, Scheduler, SchedulerConfig, SequenceId};
use self::speculation::{Candidate, Speculator};
use self::tally::{Closed, How, Tally};
use self::trunk::{Answers, Wanted};
use crate::metrics::Metrics;

/// Events beyond one a token: prompt scores, the end, and one to spare.
const EXTRA_EVENTS: usize = 4;

/// How often an engine that holds a step looks whether clients have left: that wakes nobody.
const GONE_CHECK: Duration = Duration::from_millis(250);

/// One generation that the engine is asked for.
pub struct Request {
    /// Whose it is and where its rows may go.
    pub origin: Arc<Origin>,
    /// Token ids, not empty.
    pub prompt: Vec<u32>,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// When to stop.
    pub stop: StopConditions,
    /// Likeliest tokens to report beside each generated one, with log-probabilities; none at all
    /// when absent.
    pub logprobs: Option<usize>,
    /// The same for each token of the prompt.
    pub prompt_logprobs: Option<usize>,
}

/// What a request hears while it runs.
#[derive(Debug)]
pub enum Event {
    /// Scores of the prompt's tokens; the first has none. Sent once, when asked for.
    Prompt(Vec<Option<ScoredToken>>),
    /// A token was drawn. The text is what became certain with it, often empty.
    Token {
        /// The token.
        id: u32,
        /// Text that is certain now.
        text: String,
        /// Its score, when asked for.
        score: Option<ScoredToken>,
    },
    /// The generation is complete.
    Finished {
        /// Why.
        finish: Finish,
        /// Text that was held back until the end.
        text: String,
    },
    /// The generation cannot go on.
    Failed(EngineError),
}

/// Why a generation was not taken or cannot go on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EngineError {
    /// Too much waits already.
    #[error("the server is busy: {0}")]
    Busy(String),
    /// Too much of this tenant waits already.
    #[error("{0}")]
    TenantBusy(String),
    /// It does not fit, not even alone.
    #[error("{0}")]
    TooLong(String),
    /// Experts are missing and did not come back in time.
    #[error("the model is not available: {0}")]
    Unavailable(String),
    /// Its rows may not be where this coordinator's experts are.
    #[error("the request is not allowed in {0}, the only region whose experts are used here")]
    NotPermitted(Region),
    /// The tokenizer cannot write the prompt.
    #[error("the prompt's tokens have no text: {0}")]
    Unreadable(String),
    /// The engine has ended.
    #[error("the server is shutting down")]
    Stopped,
    /// The device that computes has failed.
    #[error("the server cannot go on: {0}")]
    Device(DeviceError),
}

impl From<Refused> for EngineError {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::QueueFull { .. } => Self::Busy(refused.to_string()),
            Refused::TenantQueueFull { .. } => Self::TenantBusy(refused.to_string()),
            Refused::TooLong { .. } => Self::TooLong(refused.to_string()),
        }
    }
}

/// The owner of everything; runs on its own thread.
pub struct Engine {
    scheduler: Scheduler,
    speculator: Speculator,
    forward: Forward,
    exchanger: Exchanger,
    kernels: Arc<dyn Kernels>,
    tokenizer: Arc<Tokenizer>,
    generations: BTreeMap<SequenceId, Generation>,
    next_id: u64,
    request_wait_max: Duration,
    /// Why the last step came to nothing; absent once one was computed.
    hold: Option<Hold>,
    submissions: Receiver<Submission>,
    closings: Option<Sender<Closed>>,
    metrics: Arc<Metrics>,
}

/// What an engine is built from.
pub struct Parts {
    /// Bounds.
    pub scheduler: SchedulerConfig,
    /// Tokens that are guessed at once for one sequence at most; 0 for none.
    pub draft_tokens_max: usize,
    /// The model's part.
    pub forward: Forward,
    /// The way to the experts.
    pub exchanger: Exchanger,
    /// The processor's, on whose threads logits are read.
    pub kernels: Arc<dyn Kernels>,
    /// For text and stop strings.
    pub tokenizer: Arc<Tokenizer>,
    /// How long a request may wait for experts that are missing.
    pub request_wait_max: Duration,
    /// Who is told of each generation that has ended, in a bounded channel: the engine waits while
    /// it is full, so that no record is dropped.
    pub closings: Option<Sender<Closed>>,
    /// What is measured.
    pub metrics: Arc<Metrics>,
}

impl Engine {
    /// Starts the engine's thread. It ends when the last handle is gone and nothing runs. Once the
    /// device has failed that it computes on, it computes nothing and says so to everybody.
    pub fn start(parts: Parts) -> std::io::Result<EngineHandle> {
        let (sender, submissions) = crossbeam_channel::bounded(parts.scheduler.waiting_max);
        let readiness = parts.exchanger.readiness();
        let ringer = Ringer(parts.exchanger.bell());
        parts.metrics.kv_blocks_total.set(parts.scheduler.blocks as i64);
        let mut engine = Self {
            scheduler: Scheduler::new(parts.scheduler),
            speculator: Speculator::new(parts.draft_tokens_max),
            forward: parts.forward,
            exchanger: parts.exchanger,
            kernels: parts.kernels,
            tokenizer: parts.tokenizer,
            generations: BTreeMap::new(),
            next_id: 0,
            request_wait_max: parts.request_wait_max,
            hold: None,
            submissions,
            closings: parts.closings,
            metrics: parts.metrics,
        };
        let (failed, failure) = watch::channel(None);
        std::thread::Builder::new().name("engine".into()).spawn(move || {
            if let Err(error) = engine.run() {
                engine.end_with(error, &failed);
            }
        })?;
        Ok(EngineHandle { submissions: sender, ringer, readiness, failure })
    }

    fn run(&mut self) -> Result<(), DeviceError> {
        loop {
            self.forget_gone();
            self.give_up_late();
            self.publish_gauges();
            if !self.take_input() {
                return Ok(());
            }
            match &self.hold {
                Some(hold) if !hold.is_over(self.exchanger.changes()) => self.wait(),
                _ => self.step()?,
            }
        }
    }

    /// Tells everybody that there will be no further step, until nobody can ask any more. Whoever
    /// asks elsewhere is served there.
    fn end_with(&mut self, error: DeviceError, failed: &watch::Sender<Option<DeviceError>>) {
        tracing::error!(%error, requests = self.generations.len(), "no step can be computed");
        self.exchanger.withdraw(error.to_string());
        for id in self.generations.keys().copied().collect::<Vec<_>>() {
            self.fail(id, EngineError::Device(error.clone()));
        }
        failed.send_replace(Some(error.clone()));
        while let Ok(submission) = self.submissions.recv() {
            self.refuse(submission, EngineError::Device(error.clone()));
        }
    }

    /// Takes what has arrived; waits for something when there is nothing to do. False at the end.
    fn take_input(&mut self) -> bool {
        self.exchanger.absorb();
        loop {
            match self.submissions.try_recv() {
                Ok(submission) => self.accept(submission),
                Err(TryRecvError::Disconnected) if self.generations.is_empty() => return false,
                Err(_) if !self.generations.is_empty() => return true,
                // Whoever submits, or drops the last handle, rings after that.
                Err(_) => self.exchanger.idle(None),
            }
        }
    }

    fn accept(&mut self, (request, events, arrived): Submission) {
        let id = SequenceId(self.next_id);
        self.next_id += 1;
        let text = match self.admit(id, &request) {
            Ok(text) => text,
            Err(error) => return self.refuse((request, events, arrived), error),
        };
        let generation = Generation {
            text,
            events,
            arrived,
            position: request.prompt.len(),
            generated: 0,
            prompt_scores: request.prompt_logprobs.map(|_| vec![None]),
            hit_rate: self.speculator.prior(),
            guesses: Vec::new(),
            tally: Tally::default(),
            request,
        };
        self.generations.insert(id, generation);
    }

    fn refuse(&self, (request, events, arrived): Submission, error: EngineError) {
        let how = How::Failed(error.to_string());
        let prompt_tokens = request.prompt.len() as u64;
        let tally = Tally { prompt_tokens, ..Tally::default() };
        self.close(Closed { origin: request.origin, tally, how, took: arrived.elapsed() });
        // A client that is gone already has nobody to tell.
        let _ = events.try_send(Event::Failed(error));
    }

    /// Queues a request's rows; gives what turns its tokens into text.
    fn admit(&mut self, id: SequenceId, request: &Request) -> Result<TextStream, EngineError> {
        let (home, origin) = (self.exchanger.home(), &request.origin);
        // Whoever submits should have asked before; here it is made sure of.
        if !origin.allowed.contains(&home) {
            return Err(EngineError::NotPermitted(home));
        }
        let tokenizer = Arc::clone(&self.tokenizer);
        let detokenizer = Detokenizer::new(tokenizer, &request.prompt, true)
            .map_err(|error| EngineError::Unreadable(error.to_string()))?;
        let positions_max = request.prompt.len() + request.stop.max_tokens;
        self.scheduler.submit(NewSequence {
            id,
            tenant: request.origin.tenant.clone(),
            tokens: request.prompt.clone(),
            positions_max,
            reuses: request.prompt_logprobs.is_none(),
            salt: origin.prefix_salt(),
        })?;
        Ok(TextStream::new(detokenizer, request.stop.strings.clone()))
    }

    /// Frees slot and cache of every request whose client left.
    fn forget_gone(&mut self) {
        let gone: Vec<SequenceId> = self
            .generations
            .iter()
            .filter(|(_, generation)| generation.events.is_closed())
            .map(|(id, _)| *id)
            .collect();
        for id in gone {
            self.remove(id, "disconnect", How::Disconnected);
        }
    }

    /// Tells the requests that have waited for experts as long as they may.
    fn give_up_late(&mut self) {
        let Some(hold) = &self.hold else { return };
        let (now, wait_max) = (Instant::now(), self.request_wait_max);
        let is_late =
            |generation: &Generation| hold.gives_up_at(generation.arrived, wait_max) <= now;
        let error = hold.error(wait_max);
        let late: Vec<SequenceId> =
            self.generations.iter().filter(|(_, g)| is_late(g)).map(|(id, _)| *id).collect();
        for id in late {
            self.fail(id, error.clone());
        }
        if self.generations.is_empty() {
            self.hold = None;
        }
    }

    /// Waits for what may end a hold, or for the moment at which a request has waited for too long.
    fn wait(&mut self) {
        let Some(hold) = &self.hold else { return };
        let gives_up_at = |g: &Generation| hold.gives_up_at(g.arrived, self.request_wait_max);
        let Some(first) = self.generations.values().map(gives_up_at).min() else { return };
        let timeout = first.saturating_duration_since(Instant::now());
        self.exchanger.idle(Some(timeout.min(GONE_CHECK)));
    }

    fn fail(&mut self, id: SequenceId, error: EngineError) {
        if let Some(generation) = self.remove(id, "unavailable", How::Failed(error.to_string())) {
            // A client that is gone already has nobody to tell.
            let _ = generation.events.try_send(Event::Failed(error));
        }
    }

    /// Every generation that was taken ends here.
    fn remove(&mut self, id: SequenceId, reason: &str, how: How) -> Option<Generation> {
        self.scheduler.remove(id);
        self.metrics.finished.with_label_values(&[reason]).inc();
        let mut generation = self.generations.remove(&id)?;
        let tally = Tally {
            prompt_tokens: generation.request.prompt.len() as u64,
            completion_tokens: generation.generated as u64,
            ..std::mem::take(&mut generation.tally)
        };
        let origin = generation.request.origin.clone();
        self.close(Closed { origin, tally, how, took: generation.arrived.elapsed() });
        Some(generation)
    }

    fn close(&self, closed: Closed) {
        if self.closings.as_ref().is_some_and(|closings| closings.send(closed).is_err()) {
            tracing::error!("nobody keeps records any more; one is lost");
        }
    }

    fn step(&mut self) -> Result<(), DeviceError> {
        let mut chunks = self.scheduler.plan();
        if chunks.is_empty() {
            return Ok(());
        }
        // What changes while the step is computed may come too late for it.
        let (began, changes) = (Instant::now(), self.exchanger.changes());
        // A step that computes prompts is not made longer, since somebody waits for its end.
        let decodes = chunks.iter().all(Chunk::decodes);
        if decodes && self.speculator.draft_tokens_max() > 0 {
            self.draft(&mut chunks);
        }
        let wanted = self.wanted(&chunks);
        let step = StepRows { chunks: &chunks, wanted: &wanted };
        match self.compute(&step) {
            Ok(answers) => {
                let kernels = self.kernels.as_ref();
                let readings = generation::read(kernels, &self.generations, &step, &answers);
                self.deliver(&chunks, &wanted, readings);
                self.forward.reuse(answers);
            }
            Err(StepError::Experts(failure)) => {
                self.hold(failure, &chunks, (began, changes));
                return Ok(());
            }
            Err(StepError::Device(error)) => return Err(error),
        }
        if let Some(hold) = self.hold.take() {
            tracing::info!(waited = ?hold.since().elapsed(), "steps are computed again");
        }
        let seconds = began.elapsed().as_secs_f64();
        self.metrics.step_seconds.observe(seconds);
        if decodes {
            self.speculator.observe_step(chunks.iter().map(|c| c.tokens.len()).sum(), seconds);
        }
        Ok(())
    }

    /// Computes a step, and counts where its rows went, whatever came of it.
    fn compute(&mut self, step: &StepRows<'_>) -> Result<Answers, StepError> {
        let (owners, owner_of_row) = generation::owners(step.chunks, &self.generations);
        let epochs = self.exchanger.epochs();
        self.exchanger.begin_step(owners, owner_of_row);
        let computed = self.forward.run(step, &mut self.exchanger);
        let tally = self.exchanger.end_step();
        for (number, chunk) in step.chunks.iter().enumerate() {
            if let Some(generation) = self.generations.get_mut(&chunk.id) {
                generation.tally.add(&tally, number as u16, epochs);
            }
        }
        computed
    }

    /// Holds a step that failed, or fails its requests if waiting cannot mend it. When it began, and
    /// what the counter of changes showed then, say how long it is held.
    fn hold(&mut self, failure: Failure, chunks: &[Chunk], (began, changes): (Instant, u64)) {
        let since = self.hold.as_ref().map_or(began, Hold::since);
        if self.hold.is_none() {
            tracing::warn!(%failure, requests = chunks.len(), "a step has to wait");
        }
        self.metrics.steps_held.inc();
        match Hold::of(failure, since, changes) {
            Ok(hold) => self.hold = Some(hold),
            Err(failure) => {
                for chunk in chunks {
                    self.fail(chunk.id, EngineError::Unavailable(failure.to_string()));
                }
            }
        }
    }

    /// Looks up what each sequence may say next, and adds it to its chunk where that pays.
    fn draft(&mut self, chunks: &mut [Chunk]) {
        let len_max = self.speculator.draft_tokens_max();
        let mut candidates = Vec::with_capacity(chunks.len());
        for chunk in &*chunks {
            let guesses = speculation::lookup(self.scheduler.tokens(chunk.id), len_max);
            let len = guesses.len();
            let generation = self.generations.get_mut(&chunk.id);
            let generation = generation.expect("what is scheduled is being generated");
            generation.guesses = guesses;
            candidates.push(Candidate { hit_rate: generation.hit_rate, len });
        }
        let rows_free = self.scheduler.step_rows_max() - chunks.len();
        let lens = self.speculator.choose(&candidates, chunks.len(), rows_free);
        for (chunk, len) in chunks.iter_mut().zip(lens) {
            self.scheduler.extend(chunk, &self.generations[&chunk.id].guesses[..len]);
            self.metrics.draft_tokens.inc_by(chunk.draft_len as u64);
        }
    }

    /// Rows of the step, counted over all chunks, whose logits somebody needs, and what for.
    fn wanted(&self, chunks: &[Chunk]) -> Vec<Wanted> {
        let mut wanted = Vec::new();
        let mut first_row = 0;
        for chunk in chunks {
            let generation = &self.generations[&chunk.id];
            let need = |offset: usize| {
                let need = generation.need(chunk, chunk.start + offset)?;
                Some(Wanted { row: first_row + offset, need })
            };
            wanted.extend((0..chunk.tokens.len()).filter_map(need));
            first_row += chunk.tokens.len();
        }
        wanted
    }

    /// Hands what each row of logits says to the generation that wanted it.
    fn deliver(&mut self, chunks: &[Chunk], wanted: &[Wanted], readings: Vec<Reading>) {
        let rows = wanted.iter().map(|wanted| wanted.row);
        let mut wanted = rows.zip(readings).peekable();
        let mut first_row = 0;
        for chunk in chunks {
            self.scheduler.computed(chunk.id, chunk.known_len());
            let end_row = first_row + chunk.tokens.len();
            let mut is_known = true;
            while let Some((row, reading)) = wanted.next_if(|(row, _)| *row < end_row) {
                // Behind a wrong guess no row means anything.
                is_known = is_known && self.deliver_row(chunk, row - first_row, reading);
            }
            first_row = end_row;
            self.finish_prompt(chunk);
        }
    }

    /// Uses what row `at` of a chunk says, whose token is known. Returns whether that of the next
    /// row is.
    fn deliver_row(&mut self, chunk: &Chunk, at: usize, mut reading: Reading) -> bool {
        let Some(generation) = self.generations.get_mut(&chunk.id) else { return false };
        generation.keep_prompt_score(&mut reading);
        let Some((token, score)) = reading.drawn else { return true };
        let draft_at = at + 1 - chunk.known_len();
        let hit = generation.guesses.get(draft_at).map(|guess| *guess == token);
        if let Some(hit) = hit {
            self.speculator.observe_token(&mut generation.hit_rate, hit);
        }
        self.advance(chunk.id, token, score);
        let accepted = draft_at < chunk.draft_len && hit == Some(true);
        if accepted {
            self.scheduler.computed(chunk.id, 1);
            self.metrics.accepted_tokens.inc();
        }
        accepted
    }

    /// Sends prompt scores once they are complete, and ends requests that wanted nothing else.
    fn finish_prompt(&mut self, chunk: &Chunk) {
        let prompt_rows = |generation: &Generation| {
            let len = generation.request.prompt.len();
            chunk.tokens.len().min(len.saturating_sub(chunk.start))
        };
        let Some(generation) = self.generations.get_mut(&chunk.id) else { return };
        self.metrics.prompt_tokens.inc_by(prompt_rows(generation) as u64);
        if chunk.reaches_end && generation.request.stop.max_tokens == 0 {
            generation.send_prompt_scores();
            self.finish(chunk.id, Finish::Length, String::new());
        }
    }

    /// Takes the token that follows the known ones, and tells the client of it.
    fn advance(&mut self, id: SequenceId, token: u32, score: Option<ScoredToken>) {
        let Some(generation) = self.generations.get_mut(&id) else { return };
        generation.send_prompt_scores();
        let ends = generation.request.stop.token_ids.contains(&token);
        if generation.generated == 0 {
            self.metrics.ttft_seconds.observe(generation.arrived.elapsed().as_secs_f64());
        }
        generation.position += 1;
        generation.generated += 1;
        let full = generation.generated >= generation.request.stop.max_tokens;
        self.metrics.generation_tokens.inc();
        self.scheduler.append(id, token);
        // The end-of-sequence token has no text of its own.
        let (text, stop) = if ends { (String::new(), None) } else { generation.text.push(token) };
        let _ = generation.events.try_send(Event::Token { id: token, text, score });
        let finish = match stop {
            Some(stop) => Finish::StopString(stop),
            None if ends => Finish::EndOfSequence,
            None if full => Finish::Length,
            None => return,
        };
        let (text, late_stop) = match finish {
            Finish::StopString(_) => (String::new(), None),
            _ => generation.text.finish(),
        };
        self.finish(id, late_stop.map_or(finish, Finish::StopString), text);
    }

    fn finish(&mut self, id: SequenceId, finish: Finish, text: String) {
        let reason = if finish == Finish::Length { "length" } else { "stop" };
        if let Some(generation) = self.remove(id, reason, How::Finished(finish.clone())) {
            let _ = generation.events.try_send(Event::Finished { finish, text });
        }
    }

    fn publish_gauges(&self) {
        self.metrics.step_waiting.set(self.hold.is_some().into());
        self.metrics.requests_running.set(self.scheduler.running_len() as i64);
        self.metrics.requests_waiting.set(self.scheduler.waiting_len() as i64);
        self.metrics.kv_blocks_used.set(self.scheduler.blocks_used() as i64);
        let preempted = self.scheduler.preemptions() - self.metrics.preemptions.get();
        self.metrics.preemptions.inc_by(preempted);
        let reused = self.scheduler.rows_reused() - self.metrics.prefix_rows_reused.get();
        self.metrics.prefix_rows_reused.inc_by(reused);
    }
}

#[cfg(test)]
mod tests;
