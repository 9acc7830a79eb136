//! Decides which rows the next step computes. Pure: events in, a plan out.
//!
//! A sequence is a list of known tokens, of which the first `computed` are in the KV cache. A step
//! computes a *chunk*: the next tokens that are not. Decoding is a chunk of one; a long prompt is
//! several chunks; a preempted sequence starts again from nothing. There is no other state, which
//! is why joining, leaving and recomputing need no special cases.
//!
//! Invariants:
//! - rows of sequences that decode come first, so a prefill never holds a decode back, and beside
//!   them a step has few rows of prompts, so that it does not make them wait for long;
//! - a step never has more than `step_rows_max` rows, and every chunk's positions have blocks;
//! - when blocks run out the youngest sequence gives its own back and goes on before anybody who has
//!   not begun: never an error, and never a different token, since rows do not depend on company;
//! - tenants take turns (`queue`), and one that fills its own queue leaves room in the others';
//! - a sequence that begins like an earlier one takes that one's full blocks as far as they go, but
//!   always computes its last token itself, whose logits somebody waits for;
//! - a draft, which is a guess at tokens to come, takes rows and blocks that nobody else wanted in
//!   this step, and gives the blocks back before the next is planned; blocks get names from known
//!   tokens only;
//! - a sequence that could not fit alone is refused when it is submitted.
//!
//! What it does not know: tokens' meaning, sampling, the model, time, who waits for the answer; of a
//! tenant it knows the name.

mod queue;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;

use entente_model::kernels::BLOCK_LEN;
use entente_proto::ids::TenantName;

use self::queue::Queue;
use super::blocks::{BlockName, Blocks};

/// Names a sequence for as long as the engine lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceId(pub u64);

/// Bounds on what runs at once.
#[derive(Debug, Clone, Copy)]
pub struct SchedulerConfig {
    /// Rows of one step.
    pub step_rows_max: usize,
    /// Rows of prompts in a step in which others decode.
    pub prefill_rows_beside_decode_max: usize,
    /// Sequences that have blocks at once.
    pub running_max: usize,
    /// Sequences that wait.
    pub waiting_max: usize,
    /// Sequences of one tenant that wait.
    pub tenant_waiting_max: usize,
    /// Blocks of the KV cache.
    pub blocks: usize,
}

/// Why a sequence was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Too many wait already; a later try may succeed.
    #[error("the queue is full ({waiting_max} requests wait)")]
    QueueFull {
        /// The bound.
        waiting_max: usize,
    },
    /// Too many of this tenant wait already; others may still come.
    #[error("too many requests of this tenant wait ({tenant_waiting_max})")]
    TenantQueueFull {
        /// The bound.
        tenant_waiting_max: usize,
    },
    /// It would not fit even alone.
    #[error("{positions} positions do not fit the KV cache of {positions_max}")]
    TooLong {
        /// Positions asked for.
        positions: usize,
        /// Positions that the cache holds.
        positions_max: usize,
    },
}

#[derive(Debug)]
struct Sequence {
    id: SequenceId,
    tenant: TenantName,
    tokens: Vec<u32>,
    /// Tokens that there may be one day.
    positions_max: usize,
    /// Tokens whose keys and values are in the cache.
    computed: usize,
    blocks: Vec<u32>,
    /// Names of the full blocks of known tokens, as far as they were needed; the root first.
    names: Vec<BlockName>,
    /// Whether blocks of other sequences will do.
    reuses: bool,
}

impl Sequence {
    fn remaining(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// The name of block `index`, whose tokens must all be known.
    fn block_name(&mut self, index: usize) -> BlockName {
        while self.names.len() <= index + 1 {
            let start = (self.names.len() - 1) * BLOCK_LEN;
            let parent = self.names[self.names.len() - 1];
            self.names.push(parent.next(&self.tokens[start..start + BLOCK_LEN]));
        }
        self.names[index + 1]
    }

    /// Takes over blocks that hold this sequence's beginning.
    fn reuse(&mut self, blocks: &mut Blocks) {
        debug_assert!(self.blocks.is_empty() && self.computed == 0);
        let reusable = if self.reuses { (self.tokens.len() - 1) / BLOCK_LEN } else { 0 };
        for index in 0..reusable {
            let Some(block) = blocks.reuse(&self.block_name(index)) else { break };
            self.blocks.push(block);
        }
        self.computed = self.blocks.len() * BLOCK_LEN;
    }

    /// Gives everything back and starts again from nothing.
    fn reset(&mut self, blocks: &mut Blocks) {
        blocks.release(&mut self.blocks);
        self.computed = 0;
    }
}

/// A sequence as it is submitted.
#[derive(Debug, Clone)]
pub struct NewSequence {
    /// Its name.
    pub id: SequenceId,
    /// Whose it is.
    pub tenant: TenantName,
    /// The prompt; not empty.
    pub tokens: Vec<u32>,
    /// Positions that it may grow to.
    pub positions_max: usize,
    /// Whether rows that others have computed will do. Not so when every row's logits are wanted.
    pub reuses: bool,
    /// Sequences of different salts never share a block.
    pub salt: Vec<u8>,
}

/// The next rows of one sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    /// Whose rows these are.
    pub id: SequenceId,
    /// Position of the first row.
    pub start: usize,
    /// The rows' tokens: known ones, then the draft.
    pub tokens: Vec<u32>,
    /// How many of the tokens, at the end, are guesses.
    pub draft_len: usize,
    /// Blocks of the sequence, covering the chunk.
    pub blocks: Vec<u32>,
    /// Whether the last known token is among the rows, so that the next one is to be sampled.
    pub reaches_end: bool,
}

impl Chunk {
    /// Rows whose tokens are known.
    pub fn known_len(&self) -> usize {
        self.tokens.len() - self.draft_len
    }

    /// Whether this is the one row of a sequence that decodes, but for its draft.
    pub fn decodes(&self) -> bool {
        self.reaches_end && self.known_len() == 1
    }
}

/// See the module.
#[derive(Debug)]
pub struct Scheduler {
    config: SchedulerConfig,
    /// Oldest first.
    running: Vec<Sequence>,
    /// Those that had to give their blocks back. They have had their turn, so they go first.
    set_back: VecDeque<Sequence>,
    waiting: Queue<Sequence>,
    blocks: Blocks,
    preemptions: u64,
    rows_reused: u64,
}

impl Scheduler {
    /// An idle scheduler.
    pub fn new(config: SchedulerConfig) -> Self {
        let blocks = Blocks::new(config.blocks);
        Self {
            config,
            running: Vec::new(),
            set_back: VecDeque::new(),
            waiting: Queue::default(),
            blocks,
            preemptions: 0,
            rows_reused: 0,
        }
    }

    /// Takes a sequence.
    pub fn submit(&mut self, new: NewSequence) -> Result<(), Refused> {
        let NewSequence { id, tenant, tokens, positions_max, reuses, salt } = new;
        debug_assert!(!tokens.is_empty() && tokens.len() <= positions_max);
        if Blocks::needed(positions_max) > self.blocks.total() {
            let have = self.blocks.total() * BLOCK_LEN;
            return Err(Refused::TooLong { positions: positions_max, positions_max: have });
        }
        let SchedulerConfig { waiting_max, tenant_waiting_max, .. } = self.config;
        if self.waiting.len_of(&tenant) >= tenant_waiting_max {
            return Err(Refused::TenantQueueFull { tenant_waiting_max });
        }
        if self.waiting_len() >= waiting_max {
            return Err(Refused::QueueFull { waiting_max });
        }
        if self.waiting_len() + self.running_len() == 0 {
            self.waiting.reset();
        }
        let (names, blocks) = (vec![BlockName::root(&salt)], Vec::new());
        let computed = 0;
        let lane = tenant.clone();
        let sequence =
            Sequence { id, tenant, tokens, positions_max, computed, blocks, names, reuses };
        self.waiting.push(&lane, sequence);
        Ok(())
    }

    /// Forgets a sequence and frees what it held. Unknown ids are fine: it may have finished.
    pub fn remove(&mut self, id: SequenceId) {
        if let Some(at) = self.running.iter().position(|sequence| sequence.id == id) {
            let mut sequence = self.running.remove(at);
            self.blocks.release(&mut sequence.blocks);
            return;
        }
        self.set_back.retain(|sequence| sequence.id != id);
        self.waiting.remove(|sequence| sequence.id == id);
    }

    /// Plans the next step: chunks, decoding sequences first. Empty when nothing is to be done.
    pub fn plan(&mut self) -> Vec<Chunk> {
        for sequence in &mut self.running {
            self.blocks.shrink(&mut sequence.blocks, sequence.tokens.len());
        }
        let preemptions = self.preemptions;
        let mut rows_left = self.config.step_rows_max;
        let mut chunks = Vec::new();
        for decoding in [true, false] {
            if !decoding && !chunks.is_empty() {
                rows_left = rows_left.min(self.config.prefill_rows_beside_decode_max);
            }
            // Oldest first; a preemption takes from the end and so never skips anybody.
            let mut at = 0;
            while at < self.running.len() && rows_left > 0 {
                if (self.running[at].remaining() == 1) == decoding
                    && let Some(chunk) = self.chunk_of(at, rows_left)
                {
                    rows_left -= chunk.tokens.len();
                    chunks.push(chunk);
                }
                at += 1;
            }
        }
        // A preemption may have taken blocks from a sequence after its chunk was planned.
        chunks.retain(|chunk| self.running.iter().any(|sequence| sequence.id == chunk.id));
        if self.preemptions == preemptions {
            self.admit(&mut rows_left, &mut chunks);
        }
        chunks
    }

    fn chunk_of(&mut self, at: usize, rows_left: usize) -> Option<Chunk> {
        let len = self.running[at].remaining().min(rows_left);
        let end = self.running[at].computed + len;
        loop {
            let sequence = &mut self.running[at];
            if self.blocks.grow(&mut sequence.blocks, end) {
                break;
            }
            let youngest = self.running.len() - 1;
            self.preempt_youngest();
            if youngest == at {
                return None;
            }
        }
        self.waiting.charge(&self.running[at].tenant, len);
        Some(chunk(&self.running[at], len))
    }

    fn preempt_youngest(&mut self) {
        let Some(mut sequence) = self.running.pop() else { return };
        sequence.reset(&mut self.blocks);
        self.preemptions += 1;
        self.set_back.push_front(sequence);
    }

    /// Starts waiting sequences while rows, slots and blocks last. Nobody is preempted for them.
    fn admit(&mut self, rows_left: &mut usize, chunks: &mut Vec<Chunk>) {
        while *rows_left > 0 && self.running.len() < self.config.running_max {
            let first = self.set_back.front_mut();
            let is_back = first.is_some();
            let Some(sequence) = first.or_else(|| self.waiting.front_mut()) else { return };
            sequence.reuse(&mut self.blocks);
            let len = sequence.remaining().min(*rows_left);
            if !self.blocks.grow(&mut sequence.blocks, sequence.computed + len) {
                sequence.reset(&mut self.blocks);
                return;
            }
            self.rows_reused += sequence.computed as u64;
            chunks.push(chunk(sequence, len));
            *rows_left -= len;
            let began = if is_back { self.set_back.pop_front() } else { self.waiting.pop() };
            let Some(sequence) = began else { return };
            self.waiting.charge(&sequence.tenant, len);
            self.running.push(sequence);
        }
    }

    /// All known tokens of a running sequence; none of another.
    pub fn tokens(&self, id: SequenceId) -> &[u32] {
        let sequence = self.running.iter().find(|sequence| sequence.id == id);
        sequence.map_or(&[], |sequence| &sequence.tokens)
    }

    /// Puts the beginning of `draft` behind the last known token, in `chunk`: as much as the
    /// sequence may still grow by beside the token that is drawn anyway, and as unused blocks
    /// allow. How many rows the step has room for is the caller's to know.
    pub fn extend(&mut self, chunk: &mut Chunk, draft: &[u32]) {
        let Some(sequence) = self.running.iter_mut().find(|s| s.id == chunk.id) else { return };
        let end = sequence.tokens.len();
        debug_assert!(chunk.decodes() && chunk.draft_len == 0 && chunk.start + 1 == end);
        let mut len = draft.len().min(sequence.positions_max.saturating_sub(end + 1));
        if !self.blocks.grow(&mut sequence.blocks, end + len) {
            len = len.min(sequence.blocks.len() * BLOCK_LEN - end);
        }
        chunk.tokens.extend(&draft[..len]);
        chunk.draft_len = len;
        chunk.blocks.clone_from(&sequence.blocks);
    }

    /// Records that the next `rows` rows of a sequence, whose tokens are known, are in the cache.
    pub fn computed(&mut self, id: SequenceId, rows: usize) {
        if let Some(sequence) = self.running.iter_mut().find(|s| s.id == id) {
            let full_before = sequence.computed / BLOCK_LEN;
            sequence.computed += rows;
            debug_assert!(sequence.computed <= sequence.tokens.len());
            for index in full_before..sequence.computed / BLOCK_LEN {
                let name = sequence.block_name(index);
                self.blocks.name(sequence.blocks[index], name);
            }
        }
    }

    /// Appends a sampled token to its sequence.
    pub fn append(&mut self, id: SequenceId, token: u32) {
        if let Some(sequence) = self.running.iter_mut().find(|s| s.id == id) {
            sequence.tokens.push(token);
        }
    }

    /// Sequences that hold blocks.
    pub fn running_len(&self) -> usize {
        self.running.len()
    }

    /// Sequences that wait for their first or next turn.
    pub fn waiting_len(&self) -> usize {
        self.set_back.len() + self.waiting.len()
    }

    /// Rows of one step at most.
    pub fn step_rows_max(&self) -> usize {
        self.config.step_rows_max
    }

    /// Blocks in use.
    pub fn blocks_used(&self) -> usize {
        self.blocks.used()
    }

    /// Rows that were not computed because a block already held them.
    pub fn rows_reused(&self) -> u64 {
        self.rows_reused
    }

    /// How often a sequence had to give its blocks back.
    pub fn preemptions(&self) -> u64 {
        self.preemptions
    }
}

fn chunk(sequence: &Sequence, len: usize) -> Chunk {
    let end = sequence.computed + len;
    Chunk {
        id: sequence.id,
        start: sequence.computed,
        tokens: sequence.tokens[sequence.computed..end].to_vec(),
        draft_len: 0,
        blocks: sequence.blocks.clone(),
        reaches_end: end == sequence.tokens.len(),
    }
}
