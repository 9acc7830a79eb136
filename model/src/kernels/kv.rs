//! The keys and values of one layer, in blocks of 16 positions that any sequence may own.
//!
//! Keys are stored with the 16 positions of a block side by side, so that one register holds one
//! score for each of them; values by position, so that a position's weight multiplies whole
//! registers. Both come in pairs of vectors, which is what one line of bf16 widens to:
//! - keys `[block][kv_head][head_dim / 2][16][2]` in bf16, `[..][head_dim / 2][2][16]` in f32;
//! - values `[block][kv_head][16][head_dim / 32][16][2]` in bf16, `[..][2][16]` in f32, where the
//!   two of a pair are 16 values apart. The head is padded to a multiple of 32 values.
//!
//! What it does not know: which sequence owns a block, and which slots hold something. A block that
//! is given to another sequence keeps its old contents until they are overwritten; attention adds
//! nothing from a slot that its row may not see.

use super::cpu::tile::round_to_bf16;
use super::memory::{LINE_WORDS, Line, Lines};
use super::pool::Scatter;
use super::{AttentionShape, BLOCK_LEN, WeightFormat};

// A score register and a key line are the same 16 positions.
const _: () = assert!(BLOCK_LEN == LINE_WORDS);

/// How keys and values are kept. It decides bits of the result like the kernel class does, but for
/// the one process that holds the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvDtype {
    /// As they were computed.
    F32,
    /// Rounded to the nearest bf16 when written, widened when read: half the memory.
    Bf16,
}

impl KvDtype {
    /// What goes with weights of a format: exact with exact ones, otherwise as precise as the
    /// activations that keys and values are made of.
    pub fn of(format: WeightFormat) -> Self {
        match format {
            WeightFormat::F32 => Self::F32,
            WeightFormat::Bf16 | WeightFormat::Fp8 | WeightFormat::Q8 | WeightFormat::Q4 => {
                Self::Bf16
            }
        }
    }

    /// Its name in configurations and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        }
    }

    /// Lines that hold a pair of vectors.
    fn pair_lines(self) -> usize {
        match self {
            Self::F32 => 2,
            Self::Bf16 => 1,
        }
    }
}

/// Keys and values of one layer.
pub struct KvLayer {
    kv_heads: usize,
    head_dim: usize,
    blocks: usize,
    dtype: KvDtype,
    keys: Lines,
    values: Lines,
}

impl KvLayer {
    /// An empty cache of `blocks` blocks. Memory is taken from the system as blocks are written.
    /// `head_dim` is even.
    pub fn new(kv_heads: usize, head_dim: usize, blocks: usize, dtype: KvDtype) -> Self {
        assert_eq!(head_dim % 2, 0, "heads are pairs of values");
        let heads = blocks.checked_mul(kv_heads).expect("a cache that fits memory");
        let lines = |per_head| Lines::zeroed(heads.checked_mul(per_head).expect("as above"));
        let keys = lines(key_lines(head_dim, dtype));
        let values = lines(value_lines(head_dim, dtype));
        Self { kv_heads, head_dim, blocks, dtype, keys, values }
    }

    /// Bytes that one block takes.
    pub fn block_bytes(kv_heads: usize, head_dim: usize, dtype: KvDtype) -> usize {
        kv_heads * (key_lines(head_dim, dtype) + value_lines(head_dim, dtype)) * size_of::<Line>()
    }

    /// Bytes of address space held; an upper bound of the memory used.
    pub fn bytes(&self) -> usize {
        self.keys.bytes() + self.values.bytes()
    }

    /// Number of blocks.
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// How keys and values are kept.
    pub fn dtype(&self) -> KvDtype {
        self.dtype
    }

    /// Whether queries of `shape` can be answered from this cache.
    pub(super) fn fits(&self, shape: &AttentionShape) -> bool {
        self.kv_heads == shape.kv_heads && self.head_dim == shape.head_dim
    }

    /// Pairs of vectors in one position's values.
    pub(super) fn value_pairs(&self) -> usize {
        value_pairs(self.head_dim)
    }

    /// Keys of a head in a block: values `2 i` and `2 i + 1` of each position are pair `i`.
    pub(super) fn keys(&self, block: u32, head: usize) -> &[Line] {
        let len = key_lines(self.head_dim, self.dtype);
        let at = self.index(block as usize, head) * len;
        &self.keys[at..at + len]
    }

    /// Values of a head in a block: [`Self::value_pairs`] pairs for each position.
    pub(super) fn values(&self, block: u32, head: usize) -> &[Line] {
        let len = value_lines(self.head_dim, self.dtype);
        let at = self.index(block as usize, head) * len;
        &self.values[at..at + len]
    }

    /// To be written by one thread for each head.
    pub(super) fn writer(&mut self) -> Writer<'_> {
        let Self { kv_heads, head_dim, blocks, dtype, .. } = *self;
        let (keys, values) = (Scatter::new(&mut self.keys), Scatter::new(&mut self.values));
        Writer { kv_heads, head_dim, blocks, dtype, keys, values }
    }

    fn index(&self, block: usize, head: usize) -> usize {
        assert!(block < self.blocks, "block {block} of a cache of {}", self.blocks);
        block * self.kv_heads + head
    }
}

fn value_pairs(head_dim: usize) -> usize {
    head_dim.div_ceil(2 * LINE_WORDS)
}

fn key_lines(head_dim: usize, dtype: KvDtype) -> usize {
    head_dim / 2 * dtype.pair_lines()
}

fn value_lines(head_dim: usize, dtype: KvDtype) -> usize {
    BLOCK_LEN * value_pairs(head_dim) * dtype.pair_lines()
}

/// A cache whose heads are written by different threads.
pub(super) struct Writer<'a> {
    kv_heads: usize,
    head_dim: usize,
    blocks: usize,
    dtype: KvDtype,
    keys: Scatter<'a, Line>,
    values: Scatter<'a, Line>,
}

impl Writer<'_> {
    /// Heads of a position.
    pub fn heads(&self) -> usize {
        self.kv_heads
    }

    /// Writes one head of each position: row `r` of `keys` and `values`, both
    /// `[rows, kv_heads * head_dim]`, goes to slot `slots[r]`.
    ///
    /// # Safety
    /// No other call may write the same head meanwhile.
    #[inline(always)]
    pub unsafe fn write(&self, head: usize, slots: &[usize], keys: &[f32], values: &[f32]) {
        let row_len = self.kv_heads * self.head_dim;
        assert_eq!((keys.len(), values.len()), (slots.len() * row_len, keys.len()), "rows");
        let rows = keys.chunks_exact(row_len).zip(values.chunks_exact(row_len));
        for (slot, (key, value)) in slots.iter().zip(rows) {
            let own = head * self.head_dim..(head + 1) * self.head_dim;
            // SAFETY: only this call touches the head.
            unsafe { self.write_slot(head, *slot, &key[own.clone()], &value[own]) };
        }
    }

    /// # Safety
    /// As for [`Self::write`].
    #[inline(always)]
    unsafe fn write_slot(&self, head: usize, slot: usize, key: &[f32], value: &[f32]) {
        let (block, offset) = (slot / BLOCK_LEN, slot % BLOCK_LEN);
        assert!(block < self.blocks, "block {block} of a cache of {}", self.blocks);
        let index = block * self.kv_heads + head;
        let len = key_lines(self.head_dim, self.dtype);
        // SAFETY: lines of different heads do not overlap, and this head is the caller's.
        let keys = unsafe { self.keys.slice(index * len, len) };
        let len = value_lines(self.head_dim, self.dtype) / BLOCK_LEN;
        // SAFETY: as above.
        let values = unsafe { self.values.slice((index * BLOCK_LEN + offset) * len, len) };
        match self.dtype {
            KvDtype::F32 => write_f32(keys, values, offset, key, value),
            KvDtype::Bf16 => write_bf16(keys, values, offset, key, value),
        }
    }
}

#[inline(always)]
fn write_f32(keys: &mut [Line], values: &mut [Line], offset: usize, key: &[f32], value: &[f32]) {
    for (line, x) in keys.iter_mut().zip(key) {
        line.0[offset] = x.to_bits();
    }
    for (line, chunk) in values.iter_mut().zip(value.chunks(LINE_WORDS)) {
        for (word, x) in line.0.iter_mut().zip(chunk) {
            *word = x.to_bits();
        }
    }
}

#[inline(always)]
fn write_bf16(keys: &mut [Line], values: &mut [Line], offset: usize, key: &[f32], value: &[f32]) {
    let word =
        |first: f32, second: f32| round_to_bf16(first) >> 16 | round_to_bf16(second) & 0xffff_0000;
    for (lines, key) in keys.chunks_mut(LINE_WORDS).zip(key.chunks(2 * LINE_WORDS)) {
        // Side by side first, by vector instructions; each then goes to a line of its own.
        let mut words = [0; LINE_WORDS];
        for (to, [first, second]) in words.iter_mut().zip(key.as_chunks().0) {
            *to = word(*first, *second);
        }
        for (line, word) in lines.iter_mut().zip(words) {
            line.0[offset] = word;
        }
    }
    for (line, value) in values.iter_mut().zip(value.chunks(2 * LINE_WORDS)) {
        let mut whole = [0.0; 2 * LINE_WORDS];
        whole[..value.len()].copy_from_slice(value);
        let (first, second) = whole.split_at(LINE_WORDS);
        for ((to, first), second) in line.0.iter_mut().zip(first).zip(second) {
            *to = word(*first, *second);
        }
    }
}
