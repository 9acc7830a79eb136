//! What the kernels ask of a processor: 16 lanes of f32 and a handful of operations on them.
//!
//! Each kernel is written once over [`Isa`] and compiled for every instruction set. A value of a
//! type that implements it is proof that the processor has the instructions, so the operations
//! themselves are safe to call. They only become single instructions where everything is inlined
//! into [`Isa::enter`]; hence `#[inline(always)]` on every function between the two.
//!
//! Results may differ between instruction sets (fused or separate multiply and add), which is why
//! the kernel class names the instruction set. They never differ between machines of one class:
//! every operation is one that IEEE 754 or the instruction's definition fixes to the bit.

use std::ops::Range;

use super::super::fp8;
use super::super::memory::Line;
use super::super::quantise::{self, GROUP, GROUP_WORDS};
use super::tile::round_to_bf16;

/// Lanes of a vector.
pub const LANES: usize = 16;

/// An instruction set, present on this processor.
pub trait Isa: Copy + Send + Sync + 'static {
    /// 16 f32 values.
    type V: Copy;
    /// 16 pairs of bf16 values, ready for [`Isa::dot`].
    type Pairs: Copy;
    /// 16 i32 values.
    type Ints: Copy;
    /// 16 times 4 unsigned bytes, ready for [`Isa::dot_bytes`].
    type Bytes: Copy;

    /// Name within the kernel class.
    const NAME: &'static str;
    /// Name within the kernel class where bf16 is multiplied.
    const NAME_BF16: &'static str;
    /// Name within the kernel class where bytes are multiplied.
    const NAME_INT8: &'static str;
    /// Rows that one pass over a panel serves: as many as leave accumulators in registers.
    const TILE_ROWS: usize;
    /// The same where bytes are multiplied, which takes more registers for each row.
    const TILE_ROWS_INT8: usize;

    /// Calls `f` where the compiler may use the instruction set.
    fn enter<R>(self, f: impl FnOnce() -> R) -> R;

    /// The same value in every lane.
    fn splat(self, x: f32) -> Self::V;
    /// Reads 16 values.
    fn load(self, x: &[f32; LANES]) -> Self::V;
    /// Writes 16 values.
    fn store(self, v: Self::V, out: &mut [f32; LANES]);
    /// Reads a line as f32 values.
    fn load_line(self, line: &Line) -> Self::V;
    /// `a + b`
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a - b`
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b`
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a / b`
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`, rounded once or twice depending on the instruction set.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// `a * b + c`, rounded once on every instruction set.
    fn fused(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// `a > b ? a : b`, so `b` where either is not a number.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a < b ? a : b`, so `b` where either is not a number.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// Bits of each lane shifted left by 23, plus the bits of 1.0, wrapping: 2^n when the low bits
    /// of the lane hold the integer n in -127..=127 (0 for -127).
    fn exponent(self, v: Self::V) -> Self::V;
    /// `v` in the lanes of `lanes`, `other` elsewhere.
    fn keep(self, lanes: Range<usize>, v: Self::V, other: Self::V) -> Self::V;
    /// Widens pairs of bf16 to the first and the second values, exactly.
    fn widen(self, line: &Line) -> [Self::V; 2];
    /// Reads a line of bf16 pairs.
    fn load_pairs(self, line: &Line) -> Self::Pairs;
    /// Adds, in each lane, the products of two bf16 pairs; `x` is the pair for all lanes.
    fn dot(self, acc: Self::V, pairs: Self::Pairs, x: u32) -> Self::V;
    /// Reads a line of pairs of e4m3, see [`fp8`], as bf16 pairs: 16 outputs, then the other 16.
    #[inline(always)]
    fn load_e4m3(self, line: &Line) -> [Self::Pairs; 2] {
        let [left, right] = self.widen_e4m3(line);
        [self.load_pairs(&left), self.load_pairs(&right)]
    }
    /// [`Isa::load_e4m3`], to be written to memory.
    #[inline(always)]
    fn widen_e4m3(self, line: &Line) -> [Line; 2] {
        let (mut left, mut right) = (Line::default(), Line::default());
        let (words, _) = line.0.as_chunks::<{ LANES / 2 }>();
        for (wide, words) in [&mut left, &mut right].into_iter().zip(words) {
            for (wide, word) in wide.0.as_chunks_mut::<2>().0.iter_mut().zip(words) {
                *wide = [fp8::widened_pair(word & 0xffff), fp8::widened_pair(word >> 16)];
            }
        }
        [left, right]
    }
    /// The same integer in every lane.
    fn splat_int(self, x: i32) -> Self::Ints;
    /// The nearest f32 values; exact for all sums of a block.
    fn to_floats(self, v: Self::Ints) -> Self::V;
    /// Reads a line of bytes, four to a lane.
    fn load_bytes(self, line: &Line) -> Self::Bytes;
    /// Writes a line of bytes.
    fn store_bytes(self, bytes: Self::Bytes, line: &mut Line);
    /// Looks the lower and the upper four bits of each byte of a line up in a table.
    fn look_up(self, table: &[u8; 16], line: &Line) -> [Self::Bytes; 2];
    /// Adds, in each lane, the products of four unsigned bytes with the four signed ones of `x`.
    fn dot_bytes(self, acc: Self::Ints, bytes: Self::Bytes, x: u32) -> Self::Ints;
    /// Writes [`quantise::group_words`], to the bit. It is here for instruction sets in whose
    /// instructions the compiler cannot say it well.
    #[inline(always)]
    fn group_words(self, values: &[f32; GROUP], out: &mut [u32; GROUP_WORDS]) {
        *out = quantise::group_words(values);
    }
    /// Rounds values to pairs of bf16, as [`round_to_bf16`] does.
    #[inline(always)]
    fn round_pairs(self, values: &[f32; 2 * LANES]) -> [u32; LANES] {
        let mut words = [0; LANES];
        for (word, [first, second]) in words.iter_mut().zip(values.as_chunks().0) {
            *word = round_to_bf16(*first) >> 16 | round_to_bf16(*second) & 0xffff_0000;
        }
        words
    }
    /// Writes `R` rows of 16 words word by word: the first of each row, then the second of each.
    #[inline(always)]
    fn interleave<const R: usize>(self, rows: &[[u32; LANES]; R], out: &mut [[u32; R]; LANES]) {
        for (k, out) in out.iter_mut().enumerate() {
            for r in 0..R {
                out[r] = rows[r][k];
            }
        }
    }
    /// Asks for a line that is read soon. Any address will do.
    fn prefetch(self, line: *const Line);
}

/// Sum of the lanes in a fixed order: halves onto halves.
#[inline(always)]
pub fn sum<I: Isa>(isa: I, v: I::V) -> f32 {
    reduce(isa, v, |a, b| a + b)
}

/// Greatest lane; NaN may be passed over.
#[inline(always)]
pub fn greatest<I: Isa>(isa: I, v: I::V) -> f32 {
    reduce(isa, v, |a, b| if a > b { a } else { b })
}

#[inline(always)]
fn reduce<I: Isa>(isa: I, v: I::V, join: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [0.0; LANES];
    isa.store(v, &mut lanes);
    // Written out, each step is one vector instruction; as a loop over the lengths it is scalars.
    let (mut eight, mut four) = ([0.0; 8], [0.0; 4]);
    for i in 0..8 {
        eight[i] = join(lanes[i], lanes[i + 8]);
    }
    for i in 0..4 {
        four[i] = join(eight[i], eight[i + 4]);
    }
    join(join(four[0], four[2]), join(four[1], four[3]))
}

/// Reads up to 16 values, zeros beyond them.
#[inline(always)]
pub fn load_part<I: Isa>(isa: I, x: &[f32]) -> I::V {
    let mut lanes = [0.0; LANES];
    lanes[..x.len()].copy_from_slice(x);
    isa.load(&lanes)
}

/// Writes the first values of `v` to fill `out`, at most 16.
#[inline(always)]
pub fn store_part<I: Isa>(isa: I, v: I::V, out: &mut [f32]) {
    let mut lanes = [0.0; LANES];
    isa.store(v, &mut lanes);
    out.copy_from_slice(&lanes[..out.len()]);
}
