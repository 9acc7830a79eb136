//! The queue of admitted frames, and whoever computes them.
//!
//! One thread computes at a time, the one that holds the [`Worker`]; the kernels spread each call
//! over the cores. Usually that is a thread of its own. A caller that has nothing better to do,
//! because it waits for the answer anyway, computes on its own thread if nobody else does: a frame
//! then changes threads nowhere between the socket and the kernels.
//!
//! Whatever waits is taken together: all frames of one layer, of whichever coordinators, become one
//! call of the kernels, which reads each expert's weights once for all of them. Kernels are
//! batch-invariant, so company changes no value.
//!
//! Invariant: a frame that is queued is computed. Whoever computes looks at the queue again after
//! letting go of the worker, so a frame that came while it was held is not forgotten.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread;
use std::time::Instant;

use bytes::Bytes;
use entente_model::kernels::{DeviceError, ExpertKernels, FfnGroup};
use entente_proto::frame::{Answer, Dispatch, Refusal};
use entente_proto::ids::ExpertId;
use tokio::sync::watch;

use crate::account::Account;
use crate::health::Health;
use crate::limits::{BATCH_BYTES_MAX, QUEUE_BYTES_MAX, QUEUE_LEN_MAX};
use crate::node::Reply;
use crate::store::{Expert, Layer};

/// An admitted frame, and whom to tell.
pub(crate) struct Work {
    pub(crate) frame: Dispatch,
    /// What was held of the frame's layer when it was admitted.
    pub(crate) experts: Arc<Layer>,
    pub(crate) due: Instant,
    pub(crate) reply: Reply,
}

impl Work {
    fn bytes(&self) -> usize {
        self.frame.rows.len() + self.frame.answer_len()
    }

    fn answer(self, result: Result<Bytes, Refusal>) {
        let (exchange, fence) = (self.frame.exchange, Some(self.frame.fence));
        (self.reply)(Answer { exchange, fence, result });
    }
}

/// What is queued or being computed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Load {
    frames: usize,
    bytes: usize,
}

/// The queue. Its thread ends when the queue is dropped.
pub(crate) struct Queue(Arc<Shared>);

struct Shared {
    waiting: Mutex<Waiting>,
    /// Tells the thread that something waits, or that the queue is closed.
    changed: Condvar,
    /// Held by whoever computes.
    worker: Mutex<Worker>,
    load: watch::Sender<Load>,
}

#[derive(Default)]
struct Waiting {
    works: VecDeque<Work>,
    closed: bool,
}

/// A thread that panicked while it held a lock has left nothing half done: kernels' panics are
/// caught, and queues are changed in single steps.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Queue {
    /// Starts the compute thread.
    pub(crate) fn start(
        kernels: Arc<dyn ExpertKernels>,
        account: Arc<Account>,
        health: Arc<Health>,
    ) -> io::Result<Self> {
        let load = watch::Sender::new(Load::default());
        let answers = Bytes::new();
        let worker = Worker { kernels, account, health, load: load.clone(), answers };
        let shared = Arc::new(Shared {
            waiting: Mutex::default(),
            changed: Condvar::new(),
            worker: Mutex::new(worker),
            load,
        });
        let of_thread = shared.clone();
        thread::Builder::new().name("experts".to_owned()).spawn(move || of_thread.run())?;
        Ok(Self(shared))
    }

    /// Queues without waiting; gives back whom to tell when there is no room.
    pub(crate) fn push(&self, work: Work) -> Result<(), Reply> {
        self.0.admit(work)?;
        self.0.changed.notify_one();
        Ok(())
    }

    /// The same, and computes what waits on this thread unless somebody does so already.
    pub(crate) fn push_and_compute(&self, work: Work) -> Result<(), Reply> {
        self.0.admit(work)?;
        self.0.compute_if_idle();
        Ok(())
    }

    /// Resolves once nothing is queued or computed.
    pub(crate) async fn idle(&self) {
        // The sender lives as long as the queue, so this ends with an idle queue only.
        let _ = self.0.load.subscribe().wait_for(|load| load.frames == 0).await;
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        lock(&self.0.waiting).closed = true;
        self.0.changed.notify_one();
    }
}

impl Shared {
    fn admit(&self, work: Work) -> Result<(), Reply> {
        let bytes = work.bytes();
        let room = self.load.send_if_modified(|load| {
            let fits = load.frames < QUEUE_LEN_MAX
                && (load.frames == 0 || load.bytes.saturating_add(bytes) <= QUEUE_BYTES_MAX);
            if fits {
                load.frames += 1;
                load.bytes += bytes;
            }
            fits
        });
        if !room {
            return Err(work.reply);
        }
        lock(&self.waiting).works.push_back(work);
        Ok(())
    }

    /// The compute thread.
    fn run(&self) {
        loop {
            let mut waiting = lock(&self.waiting);
            while waiting.works.is_empty() {
                if waiting.closed {
                    return;
                }
                waiting = self.changed.wait(waiting).unwrap_or_else(PoisonError::into_inner);
            }
            drop(waiting);
            self.drain(&mut lock(&self.worker));
        }
    }

    fn compute_if_idle(&self) {
        while !lock(&self.waiting).works.is_empty() {
            match self.worker.try_lock() {
                Ok(mut worker) => self.drain(&mut worker),
                Err(TryLockError::Poisoned(worker)) => self.drain(&mut worker.into_inner()),
                // Whoever holds it looks again after letting go.
                Err(TryLockError::WouldBlock) => return,
            }
        }
    }

    fn drain(&self, worker: &mut Worker) {
        loop {
            let batch = take_batch(&mut lock(&self.waiting).works);
            if batch.is_empty() {
                return;
            }
            worker.compute_live(batch);
        }
    }
}

fn release(load: &watch::Sender<Load>, bytes: usize) {
    load.send_modify(|load| {
        load.frames -= 1;
        load.bytes -= bytes;
    });
}

/// For each row of a group, where it comes from and where its answer goes.
type SourcesAndOutputs = Vec<(u32, u32)>;

struct Worker {
    kernels: Arc<dyn ExpertKernels>,
    account: Arc<Account>,
    health: Arc<Health>,
    load: watch::Sender<Load>,
    /// What the answers of the last batch are part of. It is used again once all of them have left:
    /// to get megabytes from the system, or to fill them with zeros, costs more than to fill them
    /// with answers.
    answers: Bytes,
}

impl Worker {
    fn compute_live(&mut self, batch: Vec<Work>) {
        let batch = self.without_expired(batch);
        if self.health.has_failed() {
            self.refuse(batch, &Refusal::Draining);
        } else if !batch.is_empty() {
            self.compute(batch);
        }
    }

    fn without_expired(&self, batch: Vec<Work>) -> Vec<Work> {
        let now = Instant::now();
        let (expired, live) = batch.into_iter().partition(|work| work.due <= now);
        for work in expired {
            self.finish(work, Err(Refusal::Expired));
        }
        live
    }

    /// Computes frames of one layer and answers them. If the kernels panic, each frame is tried
    /// alone, so that only the one to blame is refused.
    fn compute(&mut self, batch: Vec<Work>) {
        let computed = catch_unwind(AssertUnwindSafe(|| self.run_experts(&batch)));
        match computed {
            Ok(Ok(rows)) => {
                for (work, rows) in batch.into_iter().zip(rows) {
                    self.finish(work, Ok(rows));
                }
            }
            Ok(Err(error)) => {
                // No frame is to blame, and the next one would fare no better. Before anybody is
                // answered, so that whoever asks again finds it known.
                self.health.fail(error);
                self.refuse(batch, &Refusal::Draining);
            }
            Err(_) if batch.len() > 1 => {
                batch.into_iter().for_each(|work| self.compute(vec![work]));
            }
            Err(_) => {
                tracing::error!("computing a frame panicked; the frame is refused");
                self.refuse(batch, &Refusal::Invalid("computing it failed".to_owned()));
            }
        }
    }

    fn refuse(&self, batch: Vec<Work>, refusal: &Refusal) {
        batch.into_iter().for_each(|work| self.finish(work, Err(refusal.clone())));
    }

    /// Answers first: who waits for the queue to be idle closes connections after that.
    fn finish(&self, work: Work, result: Result<Bytes, Refusal>) {
        let bytes = work.bytes();
        // Before it is answered, so that whoever has an answer finds it in the account.
        match &result {
            Ok(_) => self.account.computed(&work.frame),
            Err(refusal) => self.account.refused(refusal),
        }
        work.answer(result);
        release(&self.load, bytes);
    }

    /// Runs all rows of frames of one layer through their experts in one call. Returns the rows of
    /// each frame's answer, one for each assignment, in order; or why the device could not.
    fn run_experts(&mut self, batch: &[Work]) -> Result<Vec<Bytes>, DeviceError> {
        let Some(first) = batch.first() else { return Ok(Vec::new()) };
        let row_len = first.frame.hidden * first.frame.dtype.size();
        let mut x: Vec<&[u8]> = Vec::with_capacity(batch.iter().map(|w| w.frame.row_count()).sum());
        let mut rows_of: BTreeMap<ExpertId, (&Expert, SourcesAndOutputs)> = BTreeMap::new();
        let mut outputs = 0;
        for Work { frame, experts, .. } in batch {
            for assignment in &frame.assignments {
                let source = (x.len() + usize::from(assignment.row)) as u32;
                // Frames that were admitted before and after a reload hold two copies of the same
                // weights; either will do.
                let (_, rows) = rows_of.entry(assignment.expert).or_insert_with(|| {
                    let expert = experts.get(&assignment.expert);
                    (expert.expect("only held experts are admitted"), Vec::new())
                });
                rows.push((source, outputs));
                outputs += 1;
            }
            x.extend(frame.rows.chunks_exact(row_len));
        }
        let groups: Vec<FfnGroup<'_>> =
            rows_of.values().map(|(expert, rows)| FfnGroup { ffn: &expert.ffn, rows }).collect();
        let answers_bytes = outputs as usize * row_len;
        let mut answers = std::mem::take(&mut self.answers).try_into_mut().unwrap_or_default();
        if answers.len() < answers_bytes {
            answers.resize(answers_bytes, 0);
        }
        self.kernels.gated_ffn_encoded(&x, &groups, &mut answers[..answers_bytes])?;
        rows_of.values().for_each(|(expert, rows)| expert.count(rows.len()));
        self.answers = answers.freeze();
        let mut end = 0;
        let answer = |work: &Work| {
            let start = end;
            end += work.frame.answer_len();
            self.answers.slice(start..end)
        };
        Ok(batch.iter().map(answer).collect())
    }
}

/// Takes the first frame that waits and all others of its layer that fit beside it. What stays
/// keeps its order.
fn take_batch(waiting: &mut VecDeque<Work>) -> Vec<Work> {
    let Some(first) = waiting.pop_front() else { return Vec::new() };
    let (layer, mut bytes) = (first.frame.layer, first.frame.answer_len());
    let mut batch = vec![first];
    for work in std::mem::take(waiting) {
        let together = bytes + work.frame.answer_len();
        if work.frame.layer == layer && together <= BATCH_BYTES_MAX {
            bytes = together;
            batch.push(work);
        } else {
            waiting.push_back(work);
        }
    }
    batch
}
