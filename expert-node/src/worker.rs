//! The queue of admitted frames and the one thread that computes them.
//!
//! One thread owns all computing; the kernels spread each call over the cores. Whatever waits when
//! the thread comes back for more is taken together: all frames of one layer, of whichever
//! coordinators, become one call of the kernels, which reads each expert's weights once for all of
//! them. Kernels are batch-invariant, so company changes no value.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread;
use std::time::Instant;

use bytes::Bytes;
use entente_model::kernels::{FfnGroup, Kernels};
use entente_proto::frame::{Answer, Dispatch, Refusal};
use entente_proto::ids::ExpertId;
use tokio::sync::watch;

use crate::limits::{BATCH_BYTES_MAX, QUEUE_BYTES_MAX, QUEUE_LEN_MAX};
use crate::node::Reply;
use crate::store::ExpertStore;

/// An admitted frame, and whom to tell.
pub(crate) struct Work {
    pub(crate) frame: Dispatch,
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

/// The way to the compute thread. The thread ends when the last one is dropped.
pub(crate) struct Queue {
    works: SyncSender<Work>,
    load: watch::Sender<Load>,
}

impl Queue {
    /// Starts the compute thread.
    pub(crate) fn start(kernels: Arc<dyn Kernels>, store: ExpertStore) -> io::Result<Self> {
        let (works, received) = sync_channel(QUEUE_LEN_MAX);
        let load = watch::Sender::new(Load::default());
        let worker = Worker { kernels, store, works: received, load: load.clone() };
        thread::Builder::new().name("experts".to_owned()).spawn(move || worker.run())?;
        Ok(Self { works, load })
    }

    /// Queues without waiting; gives back whom to tell when there is no room.
    pub(crate) fn push(&self, work: Work) -> Result<(), Reply> {
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
        self.works.try_send(work).map_err(|error| {
            let (TrySendError::Full(work) | TrySendError::Disconnected(work)) = error;
            release(&self.load, &work);
            work.reply
        })
    }

    /// Resolves once nothing is queued or computed.
    pub(crate) async fn idle(&self) {
        // The sender lives as long as the queue, so this ends with an idle queue only.
        let _ = self.load.subscribe().wait_for(|load| load.frames == 0).await;
    }
}

fn release(load: &watch::Sender<Load>, work: &Work) {
    let bytes = work.bytes();
    load.send_modify(|load| {
        load.frames -= 1;
        load.bytes -= bytes;
    });
}

struct Worker {
    kernels: Arc<dyn Kernels>,
    store: ExpertStore,
    works: Receiver<Work>,
    load: watch::Sender<Load>,
}

impl Worker {
    fn run(self) {
        let mut waiting: VecDeque<Work> = VecDeque::new();
        loop {
            if waiting.is_empty() {
                let Ok(work) = self.works.recv() else { return };
                waiting.push_back(work);
            }
            // Bounded by the queue's load, which counts what waits here too.
            waiting.extend(self.works.try_iter());
            let batch = self.without_expired(take_batch(&mut waiting));
            if !batch.is_empty() {
                self.compute(batch);
            }
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
    fn compute(&self, batch: Vec<Work>) {
        let frames: Vec<&Dispatch> = batch.iter().map(|work| &work.frame).collect();
        let computed = catch_unwind(AssertUnwindSafe(|| self.run_experts(&frames)));
        match computed {
            Ok(rows) => {
                for (work, rows) in batch.into_iter().zip(rows) {
                    self.finish(work, Ok(rows));
                }
            }
            Err(_) if batch.len() > 1 => {
                batch.into_iter().for_each(|work| self.compute(vec![work]));
            }
            Err(_) => {
                tracing::error!("computing a frame panicked; the frame is refused");
                let refusal = Refusal::Invalid("computing it failed".to_owned());
                batch.into_iter().for_each(|work| self.finish(work, Err(refusal.clone())));
            }
        }
    }

    fn finish(&self, work: Work, result: Result<Bytes, Refusal>) {
        release(&self.load, &work);
        work.answer(result);
    }

    /// Runs all rows of frames of one layer through their experts in one call. Returns the rows of
    /// each frame's answer, one for each assignment, in order.
    fn run_experts(&self, frames: &[&Dispatch]) -> Vec<Bytes> {
        let Some(first) = frames.first() else { return Vec::new() };
        let (layer, hidden, dtype) = (first.layer, first.hidden, first.dtype);
        let mut x = vec![0.0; frames.iter().map(|f| f.row_count()).sum::<usize>() * hidden];
        let mut rows_of: BTreeMap<ExpertId, Vec<(u32, u32)>> = BTreeMap::new();
        let (mut row_base, mut outputs) = (0, 0);
        for frame in frames {
            let rows = frame.row_count();
            dtype.decode(&frame.rows, &mut x[row_base * hidden..][..rows * hidden]);
            for assignment in &frame.assignments {
                let source = (row_base + usize::from(assignment.row)) as u32;
                rows_of.entry(assignment.expert).or_default().push((source, outputs));
                outputs += 1;
            }
            row_base += rows;
        }
        let groups: Vec<FfnGroup<'_>> = rows_of
            .iter()
            .map(|(expert, rows)| FfnGroup {
                ffn: self.store.get((layer, *expert)).expect("only held experts are admitted"),
                rows,
            })
            .collect();
        let mut y = vec![0.0; outputs as usize * hidden];
        self.kernels.gated_ffn(&x, &groups, &mut y);
        encode_answers(frames, &y)
    }
}

/// Cuts outputs into the answers of the frames that they are for.
fn encode_answers(frames: &[&Dispatch], mut outputs: &[f32]) -> Vec<Bytes> {
    let mut answers = Vec::with_capacity(frames.len());
    for frame in frames {
        let (mine, rest) = outputs.split_at(frame.assignments.len() * frame.hidden);
        outputs = rest;
        let mut bytes = Vec::with_capacity(frame.answer_len());
        frame.dtype.encode(mine, &mut bytes);
        answers.push(bytes.into());
    }
    answers
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
