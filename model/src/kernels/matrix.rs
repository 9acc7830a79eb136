//! Weight matrices, packed for multiplication.
//!
//! A matrix `[out, in]` is cut into **panels** of 32 outputs. Within a panel the inputs follow one
//! another, and for each input all 32 outputs lie side by side: one activation is broadcast and
//! multiplied with whole registers of weights, and each output has its own lane from the first
//! input to the last. That is what makes the value of a row independent of its company. Outputs
//! and inputs that the matrix does not have are zeros.
//!
//! Two storage forms, in lines of 64 bytes, `pair` counting inputs two by two:
//! - f32: `[out/32][pair][input of the pair: 2][half of the panel: 2][16]`
//! - bf16: `[out/32][pair][half of the panel: 2][16][input of the pair: 2]`, the order in which
//!   `vdpbf16ps` multiplies, and which widens to f32 with one shift or one mask.

use half::{bf16, f16};

use super::memory::{Line, Lines};
use super::pool::Pool;
use super::{Activation, MatrixSource, SourceDtype};

/// Outputs of a panel: two AVX-512 registers of f32.
pub(super) const PANEL: usize = 32;

/// How a matrix is stored and multiplied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Layout {
    /// f32 weights, f32 activations.
    F32,
    /// bf16 weights, widened exactly, f32 activations.
    Bf16Widened,
    /// bf16 weights, activations rounded to bf16, products of pairs accumulated in f32.
    Bf16,
}

impl Layout {
    /// Lines of a panel for each pair of inputs.
    pub fn lines_per_pair(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16Widened | Self::Bf16 => 2,
        }
    }

    /// 32-bit words of an activation row of `values` values, whole pairs.
    pub fn words(self, values: usize) -> usize {
        match self {
            Self::F32 | Self::Bf16Widened => values.next_multiple_of(2),
            Self::Bf16 => values.div_ceil(2),
        }
    }
}

/// A weight matrix in the layout of the kernels that packed it.
pub struct Matrix {
    out_features: usize,
    in_features: usize,
    layout: Layout,
    lines: Lines,
}

impl Matrix {
    /// Packs `source`, each panel on a thread of `pool`.
    pub(super) fn pack(source: MatrixSource<'_>, layout: Layout, pool: &Pool) -> Self {
        let MatrixSource { out_features, in_features, .. } = source;
        let elements = out_features.checked_mul(in_features).expect("a shape that fits memory");
        assert_eq!(
            Some(source.bytes.len()),
            elements.checked_mul(source.dtype.size()),
            "bytes of a {out_features} x {in_features} matrix"
        );
        let panel_lines = in_features.div_ceil(2) * layout.lines_per_pair();
        let mut lines = Lines::zeroed(out_features.div_ceil(PANEL) * panel_lines);
        if panel_lines > 0 {
            pool.for_chunks(&mut lines, panel_lines, |panel, lines| {
                let first = panel * PANEL;
                for out in first..(first + PANEL).min(out_features) {
                    match layout {
                        Layout::F32 => pack_row_f32(&source, out, lines),
                        Layout::Bf16Widened | Layout::Bf16 => pack_row_bf16(&source, out, lines),
                    }
                }
            });
        }
        Self { out_features, in_features, layout, lines }
    }

    /// Values of a row of the product.
    pub fn out_features(&self) -> usize {
        self.out_features
    }

    /// Values of a row that is multiplied with it.
    pub fn in_features(&self) -> usize {
        self.in_features
    }

    /// Bytes of memory held, padding included.
    pub fn bytes(&self) -> usize {
        self.lines.bytes()
    }

    pub(super) fn layout(&self) -> Layout {
        self.layout
    }

    /// Number of panels; the last may hold fewer than [`PANEL`] outputs.
    pub(super) fn panels(&self) -> usize {
        self.out_features.div_ceil(PANEL)
    }

    /// The outputs of panel `i`.
    pub(super) fn panel_outputs(&self, i: usize) -> std::ops::Range<usize> {
        i * PANEL..((i + 1) * PANEL).min(self.out_features)
    }

    /// The weights of panel `i`.
    pub(super) fn panel(&self, i: usize) -> &[Line] {
        let len = self.in_features.div_ceil(2) * self.layout.lines_per_pair();
        &self.lines[i * len..(i + 1) * len]
    }
}

impl SourceDtype {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }
}

impl<'a> MatrixSource<'a> {
    /// Row `out` of the stored matrix.
    fn row(&self, out: usize) -> &'a [u8] {
        let len = self.in_features * self.dtype.size();
        &self.bytes[out * len..(out + 1) * len]
    }
}

fn pack_row_f32(source: &MatrixSource<'_>, out: usize, panel: &mut [Line]) {
    let (half, lane) = (out % PANEL / 16, out % 16);
    let mut put = |i: usize, value: f32| panel[2 * i + half].0[lane] = value.to_bits();
    let row = source.row(out);
    match source.dtype {
        SourceDtype::F32 => elements(row).for_each(|(i, b)| put(i, f32::from_le_bytes(b))),
        SourceDtype::F16 => elements(row).for_each(|(i, b)| put(i, f16::from_le_bytes(b).to_f32())),
        SourceDtype::Bf16 => {
            elements(row).for_each(|(i, b)| put(i, bf16::from_le_bytes(b).to_f32()));
        }
    }
}

fn pack_row_bf16(source: &MatrixSource<'_>, out: usize, panel: &mut [Line]) {
    let (half, lane) = (out % PANEL / 16, out % 16);
    // Panels begin as zeros, so setting bits is writing them.
    let mut put = |i: usize, value: bf16| {
        panel[i / 2 * 2 + half].0[lane] |= u32::from(value.to_bits()) << (i % 2 * 16);
    };
    let row = source.row(out);
    let round = bf16::from_f32;
    match source.dtype {
        SourceDtype::F32 => elements(row).for_each(|(i, b)| put(i, round(f32::from_le_bytes(b)))),
        SourceDtype::F16 => {
            elements(row).for_each(|(i, b)| put(i, round(f16::from_le_bytes(b).to_f32())));
        }
        SourceDtype::Bf16 => elements(row).for_each(|(i, b)| put(i, bf16::from_le_bytes(b))),
    }
}

/// The elements of a stored row with their numbers.
fn elements<const N: usize>(row: &[u8]) -> impl Iterator<Item = (usize, [u8; N])> + '_ {
    row.as_chunks::<N>().0.iter().copied().enumerate()
}

/// The three matrices of a gated feed-forward: `down(activation(gate(x), up(x)))`.
pub struct GatedFfn {
    /// `[inner, hidden]`, `w1` in Mixtral.
    pub gate: Matrix,
    /// `[inner, hidden]`, `w3` in Mixtral.
    pub up: Matrix,
    /// `[hidden, inner]`, `w2` in Mixtral.
    pub down: Matrix,
    /// How gate and up are joined.
    pub activation: Activation,
}

impl GatedFfn {
    /// Bytes of memory held.
    pub fn bytes(&self) -> usize {
        self.gate.bytes() + self.up.bytes() + self.down.bytes()
    }
}

/// The rows that go through one feed-forward in a call.
pub struct FfnGroup<'a> {
    /// The weights.
    pub ffn: &'a GatedFfn,
    /// For each row of the group its number in the input and in the output.
    pub rows: &'a [(u32, u32)],
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_weight_is_where_its_lane_reads_it() {
        let (out_features, in_features) = (35, 5);
        let values: Vec<f32> = (0..35 * 5).map(|i| i as f32).collect();
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let source =
            MatrixSource { out_features, in_features, dtype: SourceDtype::F32, bytes: &bytes };
        let f32s = Matrix::pack(source, Layout::F32, &Pool::new(1));
        let bf16s = Matrix::pack(source, Layout::Bf16, &Pool::new(2));
        for (index, value) in values.iter().enumerate() {
            let (out, i) = (index / in_features, index % in_features);
            let (panel, half, lane) = (out / 32, out % 32 / 16, out % 16);
            assert_eq!(f32s.panel(panel)[i * 2 + half].0[lane], value.to_bits());
            let pair = bf16s.panel(panel)[i / 2 * 2 + half].0[lane];
            let bits = bf16::from_f32(*value).to_bits();
            assert_eq!((pair >> (16 * (i % 2))) as u16, bits);
        }
        // What the matrix does not have is zero: outputs 35.. and input 5.
        assert_eq!(f32s.panel(1)[0].0[3..], [0; 13]);
        assert_eq!(f32s.panel(0)[10].0, [0; 16]);
        assert_eq!(bf16s.panel(0)[4].0[7] >> 16, 0);
    }
}
