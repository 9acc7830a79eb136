//! Hands out the blocks of the paged KV cache.
//!
//! A block holds the keys and values of [`BLOCK_LEN`] consecutive positions of one sequence, in
//! every layer. The allocator knows numbers only, not what is in them; a free block is on the
//! free list exactly once.

use entente_model::kernels::BLOCK_LEN;

/// The free list. Blocks are given out most recently freed first, since those are still in cache.
#[derive(Debug)]
pub struct Blocks {
    free: Vec<u32>,
    total: usize,
}

impl Blocks {
    /// All of `total` blocks free.
    pub fn new(total: usize) -> Self {
        let last = u32::try_from(total).expect("block numbers are 32 bits; the config bounds them");
        Self { free: (0..last).rev().collect(), total }
    }

    /// Blocks that `positions` positions need.
    pub fn needed(positions: usize) -> usize {
        positions.div_ceil(BLOCK_LEN)
    }

    /// Blocks in all.
    pub fn total(&self) -> usize {
        self.total
    }

    /// Blocks in use.
    pub fn used(&self) -> usize {
        self.total - self.free.len()
    }

    /// Makes `table` cover `positions` positions. Takes nothing when there is not enough.
    pub fn grow(&mut self, table: &mut Vec<u32>, positions: usize) -> bool {
        let missing = Self::needed(positions).saturating_sub(table.len());
        if missing > self.free.len() {
            return false;
        }
        table.extend(self.free.drain(self.free.len() - missing..).rev());
        true
    }

    /// Takes all blocks of `table` back.
    pub fn release(&mut self, table: &mut Vec<u32>) {
        self.free.extend(table.drain(..).rev());
        debug_assert!(self.free.len() <= self.total, "a block was freed twice");
    }
}
