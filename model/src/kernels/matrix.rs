//! Weight matrices, packed for multiplication.
//!
//! A matrix `[out, in]` is cut into **panels** of 32 outputs. Within a panel the inputs follow one
//! another, and for each input all 32 outputs lie side by side: one activation is broadcast and
//! multiplied with whole registers of weights, and each output has its own lane from the first
//! input to the last. That is what makes the value of a row independent of its company. Outputs
//! and inputs that the matrix does not have are zeros.
//!
//! Storage forms, in lines of 64 bytes, `pair` and `four` counting inputs by two and by four:
//! - f32: `[out/32][pair][input of the pair: 2][half of the panel: 2][16]`
//! - bf16: `[out/32][pair][half of the panel: 2][16][input of the pair: 2]`, the order in which
//!   `vdpbf16ps` multiplies, and which widens to f32 with one shift or one mask.
//! - fp8: `[out/32]` of `[pair][32][input of the pair: 2]` bytes, then `[in/128][32]` scales in f32,
//!   see [`fp8`](super::fp8).
//! - q8: `[out/32][in/32]` blocks of 17 lines, an even number of them: first the scales as bf16, `[16][half of the panel]`,
//!   then bytes, `[four: 8][half of the panel: 2][16][input of the four: 4]`, as `vpdpbusd`
//!   multiplies.
//! - q4: `[out/32][in/32]` blocks of 9 lines: the same, both halves of the panel sharing a line of
//!   bytes, the first in the lower four bits.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

use half::bf16;

use super::cpu::isa::{Isa, LANES};
use super::fp8;
use super::memory::{Line, Lines};
use super::pool::Pool;
use super::quantise::{BLOCK, Blocks, GROUP, GROUP_WORDS};
use super::source::elements;
use super::{
    Activation, DeviceError, DeviceMemory, ExpertKernels, MatrixSource, SourceDtype, WeightFormat,
};

/// Outputs of a panel: two AVX-512 registers of f32.
pub(super) const PANEL: usize = 32;

/// Raised whenever one of the forms changes in which weights are stored: packed files hold them, and
/// nodes send them to each other.
pub const PANELS_VERSION: u32 = 1;

/// How a matrix is stored and multiplied. The same for every instruction set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Layout {
    /// f32 weights, f32 activations.
    F32,
    /// bf16 weights, widened exactly, f32 activations.
    Bf16Widened,
    /// bf16 weights, activations rounded to bf16, products of pairs accumulated in f32.
    Bf16,
    /// Weights of 8 bits with a floating point in blocks, activations as for bf16.
    Fp8,
    /// Weights of 8 bits in blocks, activations of 8 bits in groups.
    Q8,
    /// Weights of 4 bits in blocks, activations of 8 bits in groups.
    Q4,
}

/// Lines of a q8 block of 32 outputs: scales and weights.
pub(super) const Q8_LINES: usize = 17;
/// Lines of a q4 block of 32 outputs.
pub(super) const Q4_LINES: usize = 9;

impl Layout {
    /// How kernels of `format` keep a matrix that the checkpoint stores as `dtype`.
    pub fn of(format: WeightFormat, dtype: SourceDtype) -> Self {
        match (format, dtype) {
            // bf16 weights stay as they are: widening them while multiplying is exact, and half
            // the bytes come from memory.
            (WeightFormat::F32, SourceDtype::Bf16) => Self::Bf16Widened,
            (WeightFormat::F32, _) => Self::F32,
            (WeightFormat::Bf16, _) => Self::Bf16,
            (WeightFormat::Fp8, _) => Self::Fp8,
            (WeightFormat::Q8, _) => Self::Q8,
            (WeightFormat::Q4, _) => Self::Q4,
        }
    }

    /// Lines of a panel of `inputs` inputs, which fill whole pairs or groups.
    pub(super) fn panel_lines(self, inputs: usize) -> usize {
        match self {
            Self::F32 => inputs.div_ceil(2) * 4,
            Self::Bf16Widened | Self::Bf16 => inputs.div_ceil(2) * 2,
            Self::Fp8 => fp8::code_lines(inputs) + fp8::scale_lines(inputs),
            Self::Q8 => inputs.div_ceil(GROUP) * 2 * Q8_LINES,
            Self::Q4 => inputs.div_ceil(GROUP) * 2 * Q4_LINES,
        }
    }

    /// Bytes of a matrix `[outputs, inputs]`; absent if no memory could hold them.
    pub fn matrix_bytes(self, outputs: usize, inputs: usize) -> Option<usize> {
        // The widest form takes less than 16 bytes a value, so this sum cannot wrap before it.
        inputs.checked_mul(16)?;
        let lines = outputs.div_ceil(PANEL).checked_mul(self.panel_lines(inputs))?;
        lines.checked_mul(size_of::<Line>())
    }

    /// 32-bit words of an activation row of `values` values, whole pairs or groups.
    pub fn words(self, values: usize) -> usize {
        match self {
            Self::F32 | Self::Bf16Widened => values.next_multiple_of(2),
            Self::Bf16 | Self::Fp8 => values.div_ceil(2),
            Self::Q8 | Self::Q4 => values.div_ceil(GROUP) * GROUP_WORDS,
        }
    }

    /// Whether activation rows are packed in the same form for both.
    pub fn packs_rows_as(self, other: Self) -> bool {
        let form = |layout| match layout {
            Self::F32 | Self::Bf16Widened => 0,
            Self::Bf16 | Self::Fp8 => 1,
            Self::Q8 | Self::Q4 => 2,
        };
        form(self) == form(other)
    }

    /// Values of a row that can be packed only together, in panels: what comes before any group of
    /// so many takes whole words.
    pub fn group_panels(self) -> usize {
        match self {
            Self::F32 | Self::Bf16Widened | Self::Bf16 | Self::Fp8 => 1,
            Self::Q8 | Self::Q4 => GROUP / PANEL,
        }
    }
}

impl WeightFormat {
    /// Bytes of memory that a matrix takes once packed, see [`Matrix::bytes`].
    pub fn packed_bytes(self, source: &MatrixSource<'_>) -> usize {
        let panel_lines = Layout::of(self, source.dtype).panel_lines(source.in_features);
        source.out_features.div_ceil(PANEL) * panel_lines * size_of::<Line>()
    }
}

/// A weight matrix in the layout of the kernels that packed it.
pub struct Matrix {
    out_features: usize,
    in_features: usize,
    layout: Layout,
    weights: Weights,
}

/// Where the panels are. The bytes are the same wherever that is.
enum Weights {
    /// In memory of the process, from line `first` on; shared with the other matrices of a part that
    /// was read as one.
    Host { lines: Arc<Lines>, first: usize },
    /// On a device, this matrix alone.
    Device(Arc<dyn DeviceMemory>),
}

impl Matrix {
    /// Packs `source`, each panel on a thread of `pool`.
    pub(super) fn pack<I: Isa>(
        isa: I,
        source: MatrixSource<'_>,
        layout: Layout,
        pool: &Pool,
    ) -> Self {
        let MatrixSource { out_features, in_features, .. } = source;
        let elements = out_features.checked_mul(in_features).expect("a shape that fits memory");
        assert_eq!(
            Some(source.bytes.len()),
            elements.checked_mul(source.dtype.size()),
            "bytes of a {out_features} x {in_features} matrix"
        );
        let panel_lines = layout.panel_lines(in_features);
        let mut lines = Lines::zeroed(out_features.div_ceil(PANEL) * panel_lines);
        if panel_lines > 0 {
            pool.for_chunks(&mut lines, panel_lines, |panel, lines| {
                let first = panel * PANEL;
                let outs = first..(first + PANEL).min(out_features);
                match layout {
                    Layout::F32 => outs.for_each(|out| pack_row_f32(&source, out, lines)),
                    Layout::Bf16Widened | Layout::Bf16 => {
                        outs.for_each(|out| pack_row_bf16(&source, out, lines));
                    }
                    Layout::Fp8 => fp8::pack(isa, &source, panel, lines),
                    Layout::Q8 => pack_q8(isa, &source, panel, lines),
                    Layout::Q4 => pack_q4(isa, &source, panel, lines),
                }
            });
        }
        Self::packed([out_features, in_features], layout, Arc::new(lines), 0)
    }

    /// A matrix that was packed before and begins at line `first` of `lines`, which hold all of it.
    pub(crate) fn packed(
        [out_features, in_features]: [usize; 2],
        layout: Layout,
        lines: Arc<Lines>,
        first: usize,
    ) -> Self {
        Self { out_features, in_features, layout, weights: Weights::Host { lines, first } }
    }

    /// The same matrix, whose bytes have been copied to `memory`.
    pub fn moved_to(self, memory: Arc<dyn DeviceMemory>) -> Self {
        assert_eq!(memory.bytes(), self.bytes(), "memory for the whole matrix and nothing else");
        Self { weights: Weights::Device(memory), ..self }
    }

    /// A matrix whose panels are in `memory`.
    pub(super) fn on_device(
        [out_features, in_features]: [usize; 2],
        layout: Layout,
        memory: Arc<dyn DeviceMemory>,
    ) -> Self {
        Self { out_features, in_features, layout, weights: Weights::Device(memory) }
    }

    /// What is multiplied with, if it lies in memory of the process.
    pub fn host_bytes(&self) -> Option<&[u8]> {
        let Weights::Host { lines, first } = &self.weights else { return None };
        Some(&lines.as_bytes()[first * size_of::<Line>()..][..self.bytes()])
    }

    /// Where it is on a device, if it is on one.
    pub fn device_memory(&self) -> Option<&Arc<dyn DeviceMemory>> {
        let Weights::Device(memory) = &self.weights else { return None };
        Some(memory)
    }

    /// What is multiplied with, wherever it lies, in pieces of at most `piece_bytes`, which are
    /// copied from a device one by one as they are asked for.
    fn pieces(
        &self,
        piece_bytes: usize,
    ) -> impl Iterator<Item = Result<Cow<'_, [u8]>, DeviceError>> {
        (0..self.bytes()).step_by(piece_bytes).map(move |at| {
            let range = at..self.bytes().min(at.saturating_add(piece_bytes));
            match &self.weights {
                Weights::Host { lines, first } => {
                    let bytes = &lines.as_bytes()[first * size_of::<Line>()..];
                    Ok(Cow::Borrowed(&bytes[range]))
                }
                Weights::Device(memory) => {
                    let mut piece = vec![0; range.len()];
                    memory.read(at, &mut piece)?;
                    Ok(Cow::Owned(piece))
                }
            }
        })
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
        self.panels() * self.layout.panel_lines(self.in_features) * size_of::<Line>()
    }

    pub(crate) fn layout(&self) -> Layout {
        self.layout
    }

    /// Number of panels; the last may hold fewer than [`PANEL`] outputs.
    pub(super) fn panels(&self) -> usize {
        self.out_features.div_ceil(PANEL)
    }

    /// The outputs of some neighbouring panels.
    pub(super) fn outputs(&self, panels: &Range<usize>) -> Range<usize> {
        panels.start * PANEL..(panels.end * PANEL).min(self.out_features)
    }

    /// The weights of some neighbouring panels.
    pub(super) fn panel_lines(&self, panels: Range<usize>) -> &[Line] {
        let Weights::Host { lines, first } = &self.weights else {
            unreachable!("processors are given matrices in memory of the process")
        };
        let len = self.layout.panel_lines(self.in_features);
        &lines[first + panels.start * len..][..panels.len() * len]
    }
}

fn pack_row_f32(source: &MatrixSource<'_>, out: usize, panel: &mut [Line]) {
    let (half, lane) = (out % PANEL / 16, out % 16);
    source.each(out, 0, source.in_features, |i, value| {
        panel[2 * i + half].0[lane] = value.to_bits();
    });
}

fn pack_row_bf16(source: &MatrixSource<'_>, out: usize, panel: &mut [Line]) {
    let (half, lane) = (out % PANEL / 16, out % 16);
    // Panels begin as zeros, so setting bits is writing them.
    let mut put = |i: usize, value: bf16| {
        panel[i / 2 * 2 + half].0[lane] |= u32::from(value.to_bits()) << (i % 2 * 16);
    };
    match source.dtype {
        SourceDtype::Bf16 => {
            elements(source.row(out)).for_each(|(i, b)| put(i, bf16::from_le_bytes(b)));
        }
        _ => source.each(out, 0, source.in_features, |i, value| put(i, bf16::from_f32(value))),
    }
}

/// Packs panel `p` block by block, so that what is written stays in the first-level cache.
fn pack_q8<I: Isa>(isa: I, source: &MatrixSource<'_>, p: usize, panel: &mut [Line]) {
    isa.enter(
        #[inline(always)]
        || {
            for (b, lines) in panel.as_chunks_mut::<Q8_LINES>().0.iter_mut().enumerate() {
                for half in 0..2 {
                    let blocks = Blocks::q8(&source.blocks(p * PANEL + half * LANES, b));
                    put_scales(&mut lines[0], &blocks, half);
                    for four in 0..BLOCK / 4 {
                        lines[1 + 2 * four + half] = Line(blocks.four(four));
                    }
                }
            }
        },
    );
}

/// The same in four bits: the second half of the panel goes into the upper ones.
fn pack_q4<I: Isa>(isa: I, source: &MatrixSource<'_>, p: usize, panel: &mut [Line]) {
    isa.enter(
        #[inline(always)]
        || {
            for (b, lines) in panel.as_chunks_mut::<Q4_LINES>().0.iter_mut().enumerate() {
                for half in 0..2 {
                    let blocks = Blocks::q4(&source.blocks(p * PANEL + half * LANES, b));
                    put_scales(&mut lines[0], &blocks, half);
                    for four in 0..BLOCK / 4 {
                        let words = blocks.four(four);
                        for (word, codes) in lines[1 + four].0.iter_mut().zip(words) {
                            *word |= codes << (4 * half);
                        }
                    }
                }
            }
        },
    );
}

/// Writes the scales of half a panel into a line that began as zeros.
#[inline(always)]
fn put_scales(line: &mut Line, blocks: &Blocks, half: usize) {
    for (word, scale) in line.0.iter_mut().zip(blocks.scales) {
        *word |= scale << (16 * half);
    }
}

#[cfg(test)]
impl Matrix {
    fn panel(&self, i: usize) -> &[Line] {
        self.panel_lines(i..i + 1)
    }

    /// The weight that a quantised matrix multiplies with.
    pub(super) fn quantised(&self, out: usize, i: usize) -> f32 {
        use super::quantise::CODEBOOK_UNSIGNED;

        let (half, lane, b) = (out % PANEL / 16, out % 16, i / BLOCK);
        let panel = self.panel(out / PANEL);
        let byte = |line: &Line| line.0[lane].to_le_bytes()[i % 4];
        let (scales, number) = match self.layout {
            Layout::Fp8 => {
                return fp8::weight(panel, self.in_features, out % PANEL, i);
            }
            Layout::Q8 => {
                let lines = &panel[b * Q8_LINES..];
                (&lines[0], byte(&lines[1 + i % BLOCK / 4 * 2 + half]))
            }
            Layout::Q4 => {
                let lines = &panel[b * Q4_LINES..];
                let code = byte(&lines[1 + i % BLOCK / 4]) >> (4 * half) & 15;
                (&lines[0], CODEBOOK_UNSIGNED[usize::from(code)])
            }
            layout => unreachable!("{layout:?} is not quantised"),
        };
        let scale = f32::from_bits(scales.0[lane] >> (16 * half) << 16);
        scale * (f32::from(number) - 128.0)
    }
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

    /// Gate, up and down one after the other, the bytes of an expert in a packed file, in pieces of
    /// at most `piece_bytes`. What lies on a device is copied back piece by piece, as they are asked
    /// for; what does not is not copied.
    ///
    /// # Errors
    /// The device is lost.
    pub fn pieces(
        &self,
        piece_bytes: usize,
    ) -> impl Iterator<Item = Result<Cow<'_, [u8]>, DeviceError>> {
        [&self.gate, &self.up, &self.down].into_iter().flat_map(move |m| m.pieces(piece_bytes))
    }

    /// Takes it to where `kernels` multiply, see [`ExpertKernels::place`].
    ///
    /// # Errors
    /// The same.
    pub fn place(self, kernels: &dyn ExpertKernels) -> Result<Self, DeviceError> {
        Ok(Self {
            gate: kernels.place(self.gate)?,
            up: kernels.place(self.up)?,
            down: kernels.place(self.down)?,
            activation: self.activation,
        })
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
    use super::super::cpu::portable::Portable;
    use super::*;

    #[test]
    fn every_weight_is_where_its_lane_reads_it() {
        let (out_features, in_features) = (35, 5);
        let values: Vec<f32> = (0..35 * 5).map(|i| i as f32).collect();
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let source = MatrixSource {
            out_features,
            in_features,
            dtype: SourceDtype::F32,
            bytes: &bytes,
            scales: None,
        };
        let f32s = Matrix::pack(Portable, source, Layout::F32, &Pool::new(1));
        let bf16s = Matrix::pack(Portable, source, Layout::Bf16, &Pool::new(2));
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

    #[test]
    fn stored_forms_change_only_with_their_version() {
        let values = (0..70 * 100).map(|i: u32| (i.wrapping_mul(2_654_435_761) as i32) as f32);
        let bytes: Vec<u8> = values.flat_map(|v| v.to_le_bytes()).collect();
        let source = MatrixSource {
            out_features: 70,
            in_features: 100,
            dtype: SourceDtype::F32,
            bytes: &bytes,
            scales: None,
        };
        // Files hold these bytes. Another form needs another PANELS_VERSION, then other sums here.
        let sums = [
            (Layout::F32, "eb4c9f9f"),
            (Layout::Bf16Widened, "1ecde9ab"),
            (Layout::Bf16, "1ecde9ab"),
            (Layout::Fp8, "19cf9737"),
            (Layout::Q8, "d408f6ff"),
            (Layout::Q4, "b2104d78"),
        ];
        let found = sums.map(|(layout, _)| {
            let matrix = Matrix::pack(Portable, source, layout, &Pool::new(1));
            assert_eq!(layout.matrix_bytes(70, 100), matrix.host_bytes().map(<[u8]>::len));
            (layout, blake3::hash(matrix.host_bytes().unwrap()).to_hex()[..8].to_owned())
        });
        assert_eq!((PANELS_VERSION, found), (1, sums.map(|(l, sum)| (l, sum.to_owned()))));
    }
}
