//! Weight matrices as checkpoints store them, and how their values are read.
//!
//! Values come out as f32, exactly but for e4m3 with scales, whose product is rounded once. This
//! knows no files: lengths have been checked by whoever made a [`MatrixSource`].

use half::f16;

use super::cpu::isa::LANES;
use super::fp8;
use super::quantise::{BLOCK, Lanes};

/// Element type of a tensor in a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SourceDtype {
    /// binary32.
    F32,
    /// binary16.
    F16,
    /// bfloat16.
    Bf16,
    /// OCP e4m3, whose values are multiplied by [`Scales`].
    E4m3,
}

impl SourceDtype {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::E4m3 => 1,
        }
    }
}

/// A row-major matrix `[out, in]` as the checkpoint stores it, little-endian, any alignment.
#[derive(Debug, Clone, Copy)]
pub struct MatrixSource<'a> {
    /// Output features (rows of the stored matrix).
    pub out_features: usize,
    /// Input features (columns of the stored matrix).
    pub in_features: usize,
    /// Element type.
    pub dtype: SourceDtype,
    /// `out_features x in_features` elements.
    pub bytes: &'a [u8],
    /// What the elements are multiplied by; absent where they are the values.
    pub scales: Option<Scales<'a>>,
}

/// One number for each block of outputs and inputs, by which its elements are multiplied.
#[derive(Debug, Clone, Copy)]
pub struct Scales<'a> {
    /// Element type of the numbers, one that needs no scales.
    pub dtype: SourceDtype,
    /// Row-major, `[blocks of outputs, blocks of inputs]`.
    pub bytes: &'a [u8],
    /// Outputs and inputs of a block. The inputs are a multiple of 128, or more than there are.
    pub block: [usize; 2],
    /// Blocks of inputs.
    pub columns: usize,
    /// Outputs that come before the first of the matrix: it may be part of a larger one.
    pub outputs_before: usize,
}

impl Scales<'_> {
    /// That of an element.
    fn of(&self, out: usize, input: usize) -> f32 {
        let row = (self.outputs_before + out) / self.block[0];
        let (index, size) = (row * self.columns + input / self.block[1], self.dtype.size());
        let mut scale = 0.0;
        read(self.dtype, &self.bytes[index * size..][..size], |_, value| scale = value);
        scale
    }
}

impl<'a> MatrixSource<'a> {
    /// Outputs `first..first + count` alone.
    pub fn rows(&self, first: usize, count: usize) -> Self {
        let len = self.in_features * self.dtype.size();
        let bytes = &self.bytes[first * len..][..count * len];
        let after =
            |scales: Scales<'a>| Scales { outputs_before: scales.outputs_before + first, ..scales };
        Self { out_features: count, bytes, scales: self.scales.map(after), ..*self }
    }

    /// Row `out` of the stored matrix.
    pub(super) fn row(&self, out: usize) -> &'a [u8] {
        let len = self.in_features * self.dtype.size();
        &self.bytes[out * len..(out + 1) * len]
    }

    /// What multiplies the elements of block `b` of [`fp8::BLOCK`] inputs.
    pub(super) fn scale(&self, out: usize, b: usize) -> f32 {
        self.scales.map_or(1.0, |scales| scales.of(out, b * fp8::BLOCK))
    }

    /// Calls `put` with the values of some inputs of an output and their numbers, counted from
    /// `start`, at which a block of [`BLOCK`] begins. The inputs are those of a row, or of a block of
    /// [`BLOCK`] or of [`fp8::BLOCK`].
    #[inline(always)]
    pub(super) fn each(
        &self,
        out: usize,
        start: usize,
        end: usize,
        mut put: impl FnMut(usize, f32),
    ) {
        let size = self.dtype.size();
        let stored = &self.row(out)[start * size..end * size];
        if self.scales.is_none() {
            return read(self.dtype, stored, put);
        }
        for (chunk, stored) in stored.chunks(fp8::BLOCK * size).enumerate() {
            let first = chunk * fp8::BLOCK;
            let scale = self.scale(out, (start + first) / fp8::BLOCK);
            read(self.dtype, stored, |i, value| put(first + i, scale * value));
        }
    }

    /// Block `b` of the inputs of 16 outputs from `first`, side by side; zeros beyond the last
    /// input and output.
    #[inline(always)]
    pub(super) fn blocks(&self, first: usize, b: usize) -> [Lanes<f32>; BLOCK] {
        let in_range = |i: usize| i.min(self.in_features);
        let (start, end) = (in_range(b * BLOCK), in_range((b + 1) * BLOCK));
        let mut blocks = [[0.0; LANES]; BLOCK];
        for (lane, out) in (first..self.out_features.min(first + LANES)).enumerate() {
            self.each(out, start, end, |i, value| blocks[i][lane] = value);
        }
        blocks
    }
}

/// Calls `put` with the number of each element and its value, exact, since binary32 holds all types.
#[inline(always)]
pub(crate) fn read(dtype: SourceDtype, stored: &[u8], mut put: impl FnMut(usize, f32)) {
    match dtype {
        SourceDtype::F32 => elements(stored).for_each(|(i, b)| put(i, f32::from_le_bytes(b))),
        SourceDtype::F16 => {
            elements(stored).for_each(|(i, b)| put(i, f16::from_le_bytes(b).to_f32()));
        }
        SourceDtype::Bf16 => {
            // Without a look at NaN, so that it becomes vector instructions.
            let widen = |b| f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16);
            elements(stored).for_each(|(i, b)| put(i, widen(b)));
        }
        SourceDtype::E4m3 => elements(stored).for_each(|(i, [code])| put(i, fp8::value(code))),
    }
}

/// The elements of a stored row with their numbers.
#[inline(always)]
pub(super) fn elements<const N: usize>(row: &[u8]) -> impl Iterator<Item = (usize, [u8; N])> + '_ {
    row.as_chunks::<N>().0.iter().copied().enumerate()
}
