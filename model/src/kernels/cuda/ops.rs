//! One method of a [`Stream`] for each kernel. They put work into the stream and do not wait for it.
//!
//! Here is the border of what is safe: lengths are compared with what the kernels read and write,
//! and lengths that contradict each other are mistakes of the caller and panic. What lies in device
//! memory is not looked at: a number of a row or a slot that is none makes the kernel reach beyond
//! its memory, which loses the device and harms nobody else.

use super::buffer::{View, ViewMut};
use super::gemm::Gemms;
use super::geometry::{self, VOCAB_MAX};
use super::kernel::{Kernel, Launch};
use super::stream::Stream;
use crate::kernels::matrix::Layout;
use crate::kernels::{AttentionShape, DeviceError, Matrix};

impl Stream {
    /// `y = x * w^T` on tensor cores: `x` is `[rows, row_pairs(in)]` in bf16, padded with zeros,
    /// `y` is `[rows, out]`.
    ///
    /// # Errors
    /// The device is lost, as for all methods here.
    ///
    /// # Panics
    /// Lengths contradict each other, or `w` is not on the device in a form for tensor cores.
    pub fn matmul(
        &self,
        w: &Matrix,
        x: View<'_, u32>,
        rows: usize,
        y: ViewMut<'_, f32>,
    ) -> Result<(), DeviceError> {
        let (inputs, outputs) = (w.in_features(), w.out_features());
        let gemms = Gemms::of(self.device(), w.layout()).expect("a matrix for tensor cores");
        assert_eq!(x.len(), rows * row_pairs(inputs), "{rows} rows of {inputs} values in bf16");
        assert_eq!(y.len(), rows * outputs, "{rows} rows of {outputs} values");
        let gemm = gemms.for_rows(rows);
        let launch = Launch::new(gemm.matmul).address(address(w)).input(x);
        let launch = launch.int(rows).int(inputs).int(outputs).output(&y);
        let grid = [gemm.matmul.blocks(outputs), rows.div_ceil(gemm.rows), 1];
        // SAFETY: the arguments of all these kernels in their order; lengths are compared above, and
        // the form of the weights is the kernel's.
        unsafe { launch.start(self, grid) }
    }

    /// `y = x * w^T`, multiplied and added in f32 in one fixed order: `x` is `[rows, in]`, `y` is
    /// `[rows, out]`.
    ///
    /// # Errors
    /// The device is lost.
    ///
    /// # Panics
    /// Lengths contradict each other, or `w` is not on the device in a form that is exact.
    pub fn matmul_exact(
        &self,
        w: &Matrix,
        x: View<'_, f32>,
        rows: usize,
        y: ViewMut<'_, f32>,
    ) -> Result<(), DeviceError> {
        let (inputs, outputs) = (w.in_features(), w.out_features());
        assert_eq!(x.len(), rows * inputs, "{rows} rows of {inputs} values");
        assert_eq!(y.len(), rows * outputs, "{rows} rows of {outputs} values");
        let kernel = match w.layout() {
            Layout::Bf16Widened => Kernel::MatmulExactBf16,
            Layout::F32 => Kernel::MatmulExactF32,
            layout => panic!("{layout:?} is no form for exact products"),
        };
        let launch = Launch::new(kernel).address(address(w)).input(x);
        let launch = launch.int(rows).int(inputs).int(outputs).output(&y);
        let grid = [kernel.blocks(outputs), rows.div_ceil(geometry::EXACT_ROWS), 1];
        // SAFETY: the arguments of both kernels in their order; lengths are compared above.
        unsafe { launch.start(self, grid) }
    }

    /// Root mean square normalisation of each row, as [`crate::kernels::Kernels::rms_norm`]. `x` is
    /// `[rows, weight.len()]`; the result goes to `y32` in the same shape, to `y16` as rows of bf16
    /// for [`Stream::matmul`], or to both.
    ///
    /// # Errors
    /// The device is lost.
    ///
    /// # Panics
    /// Lengths contradict each other.
    pub fn rms_norm(
        &self,
        x: View<'_, f32>,
        weight: View<'_, f32>,
        eps: f32,
        y32: Option<ViewMut<'_, f32>>,
        y16: Option<ViewMut<'_, u32>>,
    ) -> Result<(), DeviceError> {
        let len = weight.len();
        let rows = rows_of(x.len(), len);
        assert!(y32.as_ref().is_none_or(|y| y.len() == x.len()), "a value for each value");
        let words = rows * row_pairs(len);
        assert!(y16.as_ref().is_none_or(|y| y.len() == words), "{words} words for {rows} rows");
        let launch = Launch::new(Kernel::RmsNorm).input(x).input(weight).float(eps);
        let launch = launch.int(len).int(rows).output_if(y32.as_ref()).output_if(y16.as_ref());
        // SAFETY: the arguments of the kernel in their order; lengths are compared above.
        unsafe { launch.start(self, [rows, 1, 1]) }
    }

    /// Rotates each head of each row in place, as [`crate::kernels::Kernels::rope`]. `x` is
    /// `[rows, heads * head_dim]`, `cos` and `sin` are `[rows, head_dim / 2]`.
    ///
    /// # Errors
    /// The device is lost.
    ///
    /// # Panics
    /// Lengths contradict each other.
    pub fn rope(
        &self,
        x: ViewMut<'_, f32>,
        [heads, head_dim]: [usize; 2],
        cos: View<'_, f32>,
        sin: View<'_, f32>,
    ) -> Result<(), DeviceError> {
        assert_eq!(head_dim % 2, 0, "heads of pairs");
        let rows = rows_of(x.len(), heads * head_dim);
        let angles = rows * (head_dim / 2);
        assert_eq!((cos.len(), sin.len()), (angles, angles), "angles of {rows} rows");
        let blocks = (x.len() / 2).div_ceil(geometry::FLAT_THREADS);
        let launch = Launch::new(Kernel::Rope).output(&x).int(rows).int(heads).int(head_dim);
        // SAFETY: the arguments of the kernel in their order; lengths are compared above.
        unsafe { launch.input(cos).input(sin).start(self, [blocks, 1, 1]) }
    }

    /// Writes keys and values, `[rows, kv_heads * head_dim]`, into a cache of blocks
    /// `[block][kv_head][BLOCK_LEN][head_dim]` in bf16. Row `r` goes to slot `slots[r]`, which is
    /// `block * BLOCK_LEN + offset` and less than the cache has.
    ///
    /// # Errors
    /// The device is lost.
    ///
    /// # Panics
    /// Lengths contradict each other.
    pub fn write_kv(
        &self,
        [keys, values]: [ViewMut<'_, u16>; 2],
        slots: View<'_, u32>,
        [kv_heads, head_dim]: [usize; 2],
        k: View<'_, f32>,
        v: View<'_, f32>,
    ) -> Result<(), DeviceError> {
        assert_eq!(head_dim % 2, 0, "heads of pairs");
        let rows = slots.len();
        let len = rows * kv_heads * head_dim;
        assert_eq!((k.len(), v.len()), (len, len), "keys and values of {rows} rows");
        let block_len = kv_heads * geometry::KV_BLOCK * head_dim;
        assert_eq!((keys.len(), keys.len() % block_len), (values.len(), 0), "whole blocks");
        let launch = Launch::new(Kernel::WriteKv).output(&keys).output(&values).input(slots);
        let launch = launch.int(rows).int(kv_heads).int(head_dim).input(k).input(v);
        // SAFETY: the arguments of the kernel in their order; lengths are compared above.
        unsafe { launch.start(self, [(len / 2).div_ceil(geometry::FLAT_THREADS), 1, 1]) }
    }

    /// Grouped-query attention of each row over its own keys, as
    /// [`crate::kernels::Kernels::attention`]. `q` and `out` are `[rows, heads * head_dim]`, each row
    /// in one run of `cache`. A split is a fixed range of positions, and `partial` takes what
    /// [`attention_partial_len`] says for them.
    ///
    /// # Errors
    /// The device is lost.
    ///
    /// # Panics
    /// Lengths contradict each other.
    pub fn attention(
        &self,
        shape: &AttentionShape,
        q: View<'_, f32>,
        cache: &KvView<'_>,
        splits: usize,
        partial: ViewMut<'_, f32>,
        out: ViewMut<'_, f32>,
    ) -> Result<(), DeviceError> {
        let AttentionShape { heads, kv_heads, head_dim, window, scale } = *shape;
        let rows = rows_of(q.len(), heads * head_dim);
        assert_eq!(check_attention(shape), Ok(()), "a shape that the model was refused for");
        assert_eq!(out.len(), q.len(), "{rows} rows of {heads} heads");
        assert_eq!(cache.keys.len(), cache.values.len(), "a value for each key");
        let partial_len = attention_partial_len(shape, rows, splits);
        assert!(partial.len() >= partial_len, "{partial_len} partial values");
        let launch = Launch::new(Kernel::AttentionSplit).input(q).input(cache.keys);
        let launch = launch.input(cache.values).input(cache.tables).input(cache.runs);
        let launch = launch.int(heads).int(kv_heads).int(head_dim).int(window.unwrap_or(0));
        let launch = launch.float(scale).int(splits).output(&partial);
        // SAFETY: the arguments of the kernel in their order; lengths are compared above.
        unsafe { launch.start(self, [cache.runs.len(), kv_heads, splits]) }?;
        let launch = Launch::new(Kernel::AttentionJoin).input(partial.as_view());
        let launch = launch.int(rows).int(heads).int(head_dim).int(splits).output(&out);
        // SAFETY: the same.
        unsafe { launch.start(self, [rows, heads, 1]) }
    }

    /// `x += delta`, value by value.
    ///
    /// # Errors
    /// The device is lost.
    ///
    /// # Panics
    /// The lengths differ.
    pub fn add(&self, x: ViewMut<'_, f32>, delta: View<'_, f32>) -> Result<(), DeviceError> {
        assert_eq!(x.len(), delta.len(), "a value for each value");
        let n = x.len();
        let launch = Launch::new(Kernel::Add).output(&x).input(delta).int(n);
        // SAFETY: the arguments of the kernel in their order; lengths are compared above.
        unsafe { launch.start(self, [n.div_ceil(geometry::FLAT_THREADS), 1, 1]) }
    }

    /// Rounds rows of `len` values to rows of bf16 for [`Stream::matmul`].
    ///
    /// # Errors
    /// The device is lost.
    ///
    /// # Panics
    /// Lengths contradict each other.
    pub fn round_rows(
        &self,
        x: View<'_, f32>,
        len: usize,
        y16: ViewMut<'_, u32>,
    ) -> Result<(), DeviceError> {
        let rows = rows_of(x.len(), len);
        assert_eq!(y16.len(), rows * row_pairs(len), "{rows} rows of {len} values in bf16");
        let blocks = y16.len().div_ceil(geometry::FLAT_THREADS);
        let launch = Launch::new(Kernel::RoundRows).input(x).int(rows).int(len).output(&y16);
        // SAFETY: the arguments of the kernel in their order; lengths are compared above.
        unsafe { launch.start(self, [blocks, 1, 1]) }
    }

    /// Chooses a token from each row of logits, `[rows, vocab]`, as its own one of `draws` says
    /// ([`Draw::words`]).
    ///
    /// # Errors
    /// The device is lost.
    ///
    /// # Panics
    /// Lengths contradict each other, or there are more tokens than [`VOCAB_MAX`].
    pub fn draw(
        &self,
        logits: View<'_, f32>,
        vocab: usize,
        draws: View<'_, [u64; 2]>,
        tokens: ViewMut<'_, u32>,
    ) -> Result<(), DeviceError> {
        let rows = rows_of(logits.len(), vocab);
        assert!(vocab <= VOCAB_MAX, "{vocab} tokens of at most {VOCAB_MAX}");
        assert_eq!((draws.len(), tokens.len()), (rows, rows), "a token for each row");
        let launch = Launch::new(Kernel::Draw).input(logits).int(vocab).input(draws);
        // SAFETY: the arguments of the kernel in their order; lengths are compared above.
        unsafe { launch.output(&tokens).start(self, [rows, 1, 1]) }
    }
}

/// How [`Stream::draw`] chooses a token from a row of logits. A NaN is no logit, and a row of nothing
/// else gives token 0.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Draw {
    /// The likeliest, the lowest among equals.
    Likeliest,
    /// Tokens lie side by side, each as wide as its weight, `exp((logit - greatest) * scale)`.
    Weighed {
        /// One over the temperature.
        scale: f32,
        /// Smaller weights count as none.
        weight_min: f32,
        /// Which part of the whole width is left of the token, in [0, 1).
        uniform: f64,
    },
}

impl Draw {
    /// As the kernel reads it.
    pub fn words(self) -> [u64; 2] {
        match self {
            Self::Likeliest => [0, (-1.0_f64).to_bits()],
            Self::Weighed { scale, weight_min, uniform } => {
                let pair = u64::from(scale.to_bits()) | u64::from(weight_min.to_bits()) << 32;
                [pair, uniform.to_bits()]
            }
        }
    }
}

/// A paged cache, and which rows attend to what in it.
#[derive(Clone, Copy)]
pub struct KvView<'a> {
    /// `[block][kv_head][BLOCK_LEN][head_dim]` in bf16.
    pub keys: View<'a, u16>,
    /// The same.
    pub values: View<'a, u16>,
    /// Numbers of blocks, those of a sequence one after the other in the order of positions.
    pub tables: View<'a, u32>,
    /// Rows that are neighbours in `q` and in their sequence: the index of the sequence's first block
    /// in `tables`, the position of the first row, its number in `q` and in the result, how many they
    /// are. Those of a run of [`attention_run_len`] share what is read; a row's bits are the same in
    /// any run. A run of no rows is nothing.
    pub runs: View<'a, [u32; 4]>,
}

/// Values to whose multiple rows of bf16 are padded with zeros: the inputs that a tensor core's
/// lanes take at a time.
const ROW_VALUES: usize = 32;

/// 32-bit words of a row of `values` values in bf16, padded as the kernels read it.
pub fn row_pairs(values: usize) -> usize {
    values.next_multiple_of(ROW_VALUES) / 2
}

/// Whether there are kernels for attention of this shape.
///
/// # Errors
/// There are none.
pub fn check_attention(shape: &AttentionShape) -> Result<(), DeviceError> {
    let AttentionShape { heads, kv_heads, head_dim, .. } = *shape;
    if kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
        let text = format!("attention of {heads} heads over {kv_heads}");
        return Err(DeviceError::Unsupported(text));
    }
    // A lane reads eight values of a key at once.
    if head_dim == 0 || !head_dim.is_multiple_of(8) || head_dim > geometry::HEAD_DIM_MAX {
        let text = format!(
            "attention with heads of {head_dim} values; multiples of 8 up to {} are",
            geometry::HEAD_DIM_MAX
        );
        return Err(DeviceError::Unsupported(text));
    }
    Ok(())
}

/// Rows of a run that are computed together.
pub fn attention_run_len(shape: &AttentionShape) -> usize {
    (geometry::ATTENTION_QUERIES / (shape.heads / shape.kv_heads)).max(1)
}

/// Splits that cover `positions` positions.
pub fn attention_splits(positions: usize) -> usize {
    positions.div_ceil(geometry::SPLIT_POSITIONS)
}

/// Values between the two kernels of [`Stream::attention`]: for each row, head and split the largest
/// score, the sum of weights, and the weighted sum of values.
pub fn attention_partial_len(shape: &AttentionShape, rows: usize, splits: usize) -> usize {
    rows * shape.heads * splits * (shape.head_dim + 2)
}

fn rows_of(values: usize, len: usize) -> usize {
    assert!(values.is_multiple_of(len) && len > 0, "{values} values are no rows of {len}");
    values / len
}

/// Where a matrix lies on its device.
pub(super) fn address(w: &Matrix) -> u64 {
    w.device_memory().expect("a matrix that was brought to the device").address()
}
