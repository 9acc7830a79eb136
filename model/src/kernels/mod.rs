//! The arithmetic: what a row goes through, written so that its value never depends on company.
//!
//! Invariant, above speed: every kernel is **batch-invariant**. The value of a row depends on that
//! row and the weights alone, not on how many other rows are in the call, how many threads run or
//! how the call was split. Each output is accumulated over the inner dimension in one fixed order,
//! and attention walks the cache in one fixed order of absolute positions. Two processes with the
//! same [`KernelClass`] give the same bits.
//!
//! There are two seams. [`ExpertKernels`] is what an expert node needs, of the processor or of a
//! device whose memory is its own and which can fail; [`Kernels`] is all that a coordinator needs
//! besides, on slices of the process, of processors only. `cpu` holds the packed, vectorised
//! implementation for what the processor offers; `reference` is the slow and obvious one that every
//! fast path is tested against.
//!
//! What this module does not know: checkpoints, families, tokens, networks.

// The one module of the workspace that may: vector instructions and slices shared by threads.
#![allow(unsafe_code)]

mod cpu;
pub mod cuda;
mod device;
mod fp8;
mod kv;
pub mod limits;
mod matrix;
mod memory;
mod pool;
mod quantise;
#[cfg(any(test, feature = "reference"))]
pub mod reference;
mod source;

#[cfg(test)]
mod tests;

use std::sync::Arc;

use entente_proto::frame::Dtype;
use entente_proto::ids::KernelClass;

pub use device::{DeviceError, DeviceFacts, DeviceId, DeviceMemory, NoDevice};
pub use kv::{KvDtype, KvLayer};
pub(crate) use matrix::Layout;
pub use matrix::{FfnGroup, GatedFfn, Matrix, PANELS_VERSION};
pub(crate) use memory::{Line, Lines};
pub(crate) use source::read;
pub use source::{MatrixSource, Scales, SourceDtype};

/// How weights are kept in memory and multiplied. Part of the kernel class.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum WeightFormat {
    /// Reference grade: weights as in the checkpoint (bf16 widened on the fly), f32 activations.
    F32,
    /// bf16 weights and activations, f32 accumulation.
    Bf16,
    /// Weights of 8 bits in blocks of 32 with a scale each, 8.5 bits in all; activations of 8 bits.
    Q8,
    /// Weights of 8 bits with a floating point, e4m3, in blocks of 128 with a scale each, 8.25 bits
    /// in all; bf16 activations, f32 accumulation.
    Fp8,
    /// Weights of 4 bits in blocks of 32 with a scale each, 4.5 bits in all; activations of 8 bits.
    Q4,
}

impl WeightFormat {
    /// All formats, the most exact first where the checkpoint is in bf16.
    pub const ALL: [Self; 5] = [Self::F32, Self::Bf16, Self::Q8, Self::Fp8, Self::Q4];

    /// Its name in configurations and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Q8 => "q8",
            Self::Fp8 => "fp8",
            Self::Q4 => "q4",
        }
    }
}

/// How the two halves of a gated feed-forward are joined.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `silu(gate) * up`, as Mistral, Mixtral, Qwen and DeepSeek do.
    SwiGlu,
}

/// Shape of the attention of one layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionShape {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Values of one head.
    pub head_dim: usize,
    /// Key `j` is visible to query `i` iff `0 <= i - j < window`; all earlier keys when absent.
    pub window: Option<usize>,
    /// Multiplies the scores, usually `head_dim^-0.5`.
    pub scale: f32,
}

/// Positions of one sequence that share a block of the cache. Equal to the width of an AVX-512
/// register in f32, so that one register holds one score for each slot of a block.
pub const BLOCK_LEN: usize = 16;

/// Where one row's keys are: the row is at `position`, and position `p` of its sequence is in slot
/// `p % BLOCK_LEN` of block `blocks[p / BLOCK_LEN]`.
#[derive(Debug, Clone, Copy)]
pub struct AttentionRow<'a> {
    /// Blocks of the row's sequence, in order of position; covers `position`.
    pub blocks: &'a [u32],
    /// The row's own position, whose key and value have been written.
    pub position: usize,
}

/// What an expert node needs of kernels of one class, wherever they run.
///
/// Lengths that contradict each other are mistakes of the caller and panic: what comes from files
/// and peers has been checked against the architecture long before. Errors are those of a device;
/// the processor gives none.
pub trait ExpertKernels: Send + Sync {
    /// Which bits these kernels give.
    fn class(&self) -> &KernelClass;

    /// How they keep weights.
    fn format(&self) -> WeightFormat;

    /// How rows are rounded at the source and written on the wire.
    fn row_dtype(&self) -> Dtype;

    /// The device that they run on; absent for the processor.
    fn device(&self) -> Option<&DeviceFacts> {
        None
    }

    /// The same device, for others who bring something there; absent for the processor.
    fn cuda_device(&self) -> Option<&Arc<cuda::Device>> {
        None
    }

    /// Brings a weight matrix into this class's layout and to where it is multiplied.
    /// `source.bytes` must have the length that the shape calls for, which the loader has checked.
    ///
    /// # Errors
    /// As for [`ExpertKernels::place`].
    fn pack(&self, source: MatrixSource<'_>) -> Result<Matrix, DeviceError>;

    /// Takes a matrix that was packed in the memory of the process to where these kernels multiply:
    /// nothing to do on the processor.
    ///
    /// # Errors
    /// The device has no room for it, has no kernels for its layout, or is lost.
    fn place(&self, matrix: Matrix) -> Result<Matrix, DeviceError>;

    /// Gated feed-forward, `down(activation(gate(x), up(x)))`, of several experts in one call, of
    /// rows as they travel: `x` are slices of `hidden` values written as
    /// [`ExpertKernels::row_dtype`], `y` is `[assignments, hidden]` in the same form. Each
    /// destination row may be named once, others keep their values. The experts are where
    /// [`ExpertKernels::pack`] or [`ExpertKernels::place`] brought them.
    ///
    /// # Errors
    /// The device is out of memory or lost; what `y` holds then means nothing.
    fn gated_ffn_encoded(
        &self,
        x: &[&[u8]],
        groups: &[FfnGroup<'_>],
        y: &mut [u8],
    ) -> Result<(), DeviceError>;
}

/// Kernels of one class on the processor, with the threads they run on. Activations are row-major
/// f32; a class that multiplies in fewer bits rounds its inputs itself, each row by itself; for bf16
/// that changes nothing in values that a frame has rounded already.
///
/// A call that comes while another one occupies the threads does its work on the calling thread. All
/// matrices are in the memory of the process.
pub trait Kernels: ExpertKernels {
    /// Like [`ExpertKernels::pack`] for a matrix whose products are wanted in f32 in every class. The
    /// gate is one: rounding its inputs must not decide which experts are chosen.
    fn pack_f32(&self, source: MatrixSource<'_>) -> Matrix;

    /// `y[r, o] = sum over i of x[r, i] * w[o, i]`, multiplied as `w` was packed for.
    /// `x` is `[rows, in]`, `y` is `[rows, out]`.
    fn matmul(&self, x: &[f32], w: &Matrix, y: &mut [f32]);

    /// [`Kernels::matmul`] of the same rows with several matrices of as many inputs, all packed by
    /// [`ExpertKernels::pack`] or all by [`Kernels::pack_f32`]: the rows are brought into their form
    /// once, and the threads are called once.
    fn matmul_many(&self, x: &[f32], products: &mut [(&Matrix, &mut [f32])]) {
        for (w, y) in products {
            self.matmul(x, w, y);
        }
    }

    /// Calls `task` once for every number in `0..tasks`, on all threads, and returns when all calls
    /// have returned: for work beside the kernels that is one task for each row.
    fn for_each(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        (0..tasks).for_each(task);
    }

    /// [`ExpertKernels::gated_ffn_encoded`] of values in f32: the same bits before rounding. A dense
    /// layer is one group with all rows. `x` is `[rows, hidden]`, `y` is `[assignments, hidden]`.
    fn gated_ffn(&self, x: &[f32], groups: &[FfnGroup<'_>], y: &mut [f32]);

    /// Writes values as [`ExpertKernels::row_dtype`], as [`Dtype::encode_into`] does. `y` has as many
    /// bytes as they take.
    fn encode_rows(&self, x: &[f32], y: &mut [u8]) {
        self.row_dtype().encode_into(x, y);
    }

    /// Adds to each row of `y`, `[rows, len]`, its parts in order, `y += weight * row` in f32, rounded
    /// after each multiplication and each addition. `parts` is `[rows, parts of a row]`, their rows
    /// written as [`ExpertKernels::row_dtype`].
    fn add_weighted(&self, parts: &[(f32, &[u8])], y: &mut [f32]);

    /// `x += delta`, value by value.
    fn add(&self, x: &mut [f32], delta: &[f32]) {
        for (x, delta) in x.iter_mut().zip(delta) {
            *x += delta;
        }
    }

    /// Root mean square normalisation of each row (Zhang and Sennrich 2019):
    /// `y = x / sqrt(mean(x^2) + eps) * weight`. `x` and `y` are `[rows, weight.len()]`.
    fn rms_norm(&self, x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]);

    /// Rotates each head of each row in place, half-split pairing: value `i` turns with value
    /// `i + head_dim / 2`. `x` is `[rows, heads * head_dim]`, `cos` and `sin` are
    /// `[rows, head_dim / 2]`.
    fn rope(&self, x: &mut [f32], heads: usize, head_dim: usize, cos: &[f32], sin: &[f32]);

    /// Writes keys and values, both `[rows, kv_heads * head_dim]`, into the cache. Row `r` goes to
    /// slot `slots[r]`, which is `block * BLOCK_LEN + offset`.
    fn write_kv(&self, cache: &mut KvLayer, slots: &[usize], k: &[f32], v: &[f32]);

    /// Grouped-query attention of each row over its own keys. `q` and `out` are
    /// `[rows, heads * head_dim]`. Blocks outside the window are not touched. Rows that follow one
    /// another in their sequence and share one table, the same slice, are computed together.
    fn attention(
        &self,
        shape: &AttentionShape,
        q: &[f32],
        rows: &[AttentionRow<'_>],
        cache: &KvLayer,
        out: &mut [f32],
    );
}

/// The processor lacks what a kernel class needs.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("kernel class {class} cannot run on this processor, which offers: {available}")]
pub struct UnsupportedCpu {
    /// The class asked for.
    pub class: KernelClass,
    /// Classes that can run here.
    pub available: String,
}

/// The fastest kernels for `format` on this processor, running on `threads` threads (at least 1;
/// the calling thread is one of them). A cluster that insists on one class compares
/// [`ExpertKernels::class`] or uses [`select_class`].
///
/// # Errors
/// When no class of the format runs here. The formats there are have portable kernels too.
pub fn select(format: WeightFormat, threads: usize) -> Result<Arc<dyn Kernels>, UnsupportedCpu> {
    cpu::best(format, threads)
}

/// The kernels of an expert node on a device: those of [`select`] on the processor, with `threads`.
///
/// # Errors
/// The device cannot be used: there is no driver, no such device, or no kernels for it or for the
/// format.
pub fn select_on(
    device: DeviceId,
    format: WeightFormat,
    threads: usize,
) -> Result<Arc<dyn ExpertKernels>, DeviceError> {
    match device {
        DeviceId::Cpu => match select(format, threads) {
            Ok(kernels) => Ok(kernels),
            Err(error) => Err(DeviceError::Unsupported(error.to_string())),
        },
        DeviceId::Cuda(ordinal) => cuda::select(ordinal, format),
    }
}

/// Kernels of exactly this class, for reproducing what another machine computes.
///
/// # Errors
/// When this build does not know the class or the processor lacks its instructions.
pub fn select_class(
    class: &KernelClass,
    threads: usize,
) -> Result<Arc<dyn Kernels>, UnsupportedCpu> {
    cpu::of_class(class, threads)
}
