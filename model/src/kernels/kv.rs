//! The keys and values of one layer, in blocks of 16 positions that any sequence may own.
//!
//! Keys are stored with the 16 positions of a block side by side, so that one register holds one
//! score for each of them: `[block][kv_head][head_dim][16]`. Values are stored by position, so that
//! a position's weight multiplies whole registers: `[block][kv_head][16][head_dim]`, the head
//! padded to 16 values. Both in f32.
//!
//! What it does not know: which sequence owns a block, and which slots hold something. A block that
//! is given to another sequence keeps its old contents until they are overwritten; attention reads
//! no slot that its row may not see.

use super::memory::{LINE_WORDS, Line, Lines};
use super::{AttentionShape, BLOCK_LEN};

// A score register and a key line are the same 16 positions.
const _: () = assert!(BLOCK_LEN == LINE_WORDS);

/// Keys and values of one layer.
pub struct KvLayer {
    kv_heads: usize,
    head_dim: usize,
    blocks: usize,
    keys: Lines,
    values: Lines,
}

impl KvLayer {
    /// An empty cache of `blocks` blocks. Memory is taken from the system as blocks are written.
    pub fn new(kv_heads: usize, head_dim: usize, blocks: usize) -> Self {
        let heads = blocks.checked_mul(kv_heads).expect("a cache that fits memory");
        let lines = |per_head| Lines::zeroed(heads.checked_mul(per_head).expect("as above"));
        let keys = lines(head_dim);
        let values = lines(BLOCK_LEN * head_dim.div_ceil(LINE_WORDS));
        Self { kv_heads, head_dim, blocks, keys, values }
    }

    /// Bytes of address space held; an upper bound of the memory used.
    pub fn bytes(&self) -> usize {
        self.keys.bytes() + self.values.bytes()
    }

    /// Number of blocks.
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Whether queries of `shape` can be answered from this cache.
    pub(super) fn fits(&self, shape: &AttentionShape) -> bool {
        self.kv_heads == shape.kv_heads && self.head_dim == shape.head_dim
    }

    /// Lines of one position's values.
    pub(super) fn value_lines(&self) -> usize {
        self.head_dim.div_ceil(LINE_WORDS)
    }

    /// Keys of a head in a block: line `d` holds value `d` of each position.
    pub(super) fn keys(&self, block: u32, head: usize) -> &[Line] {
        let at = self.index(block as usize, head) * self.head_dim;
        &self.keys[at..at + self.head_dim]
    }

    /// Values of a head in a block: [`Self::value_lines`] lines for each position.
    pub(super) fn values(&self, block: u32, head: usize) -> &[Line] {
        let len = BLOCK_LEN * self.value_lines();
        let at = self.index(block as usize, head) * len;
        &self.values[at..at + len]
    }

    /// Writes one position. `key` and `value` are `[kv_heads * head_dim]`.
    pub(super) fn write(&mut self, slot: usize, key: &[f32], value: &[f32]) {
        assert_eq!((key.len(), value.len()), (self.kv_heads * self.head_dim, key.len()), "a row");
        let (block, offset) = (slot / BLOCK_LEN, slot % BLOCK_LEN);
        let value_lines = self.value_lines();
        let heads = key.chunks_exact(self.head_dim).zip(value.chunks_exact(self.head_dim));
        for (head, (key, value)) in heads.enumerate() {
            let index = self.index(block, head);
            let keys = &mut self.keys[index * self.head_dim..][..self.head_dim];
            for (line, x) in keys.iter_mut().zip(key) {
                line.0[offset] = x.to_bits();
            }
            let values = &mut self.values[(index * BLOCK_LEN + offset) * value_lines..];
            for (line, chunk) in values.iter_mut().zip(value.chunks(LINE_WORDS)) {
                for (word, x) in line.0.iter_mut().zip(chunk) {
                    *word = x.to_bits();
                }
            }
        }
    }

    fn index(&self, block: usize, head: usize) -> usize {
        assert!(block < self.blocks, "block {block} of a cache of {}", self.blocks);
        block * self.kv_heads + head
    }
}
