//! The coordinator's part of a model: everything of a step but the experts.
//!
//! [`Trunk`] is the seam between a step's order and its arithmetic. Who drives it
//! ([`super::forward`]) knows layers, micro-batches, gates and exchanges, and no kernel; who
//! implements it knows weights, kernels and the KV cache, and nothing of experts or networks.
//! Between the two go numbers of rows, rows as they travel, gate logits, and what logits say.
//!
//! Invariant: a row's values depend on its own sequence alone, whatever else is in the step and
//! however the step is cut. What a trunk keeps from step to step is weights and the KV cache.
//!
//! **Errors** are those of a device, and a processor gives none. All that a step may need has been
//! set aside before the first one, so none is refused for what is in it: a [`DeviceError`] means
//! that the device cannot compute any more, and with it this process.

mod answers;
mod cpu;
mod cuda;
mod positions;

use std::ops::Range;

use entente_model::kernels::DeviceError;
use entente_proto::ids::KernelClass;

pub use self::answers::{Answer, Answers, Need, Wanted};
pub use self::cpu::{CacheShape, CpuTrunk};
pub use self::cuda::{CudaTrunk, StepBounds};
use super::scheduler::Chunk;

/// Computes a step on one device. A step is [`Trunk::begin`], then for each layer and micro-batch
/// [`Trunk::attend`] followed by [`Trunk::feed_forward`] for a dense layer, or for one with experts
/// by [`Trunk::route`] and, once its experts have answered, [`Trunk::add`]; then [`Trunk::logits`].
///
/// `rows` are those of one micro-batch, by the numbers that rows have in the step: those of its first
/// chunk come first.
/// Every method fails only with its device, for good.
pub trait Trunk: Send {
    /// Which bits it gives.
    fn class(&self) -> &KernelClass;

    /// Takes the rows of a step, whatever became of the step before, and embeds their tokens. They
    /// will come in these micro-batches, which are all the rows in their order.
    fn begin(&mut self, chunks: &[Chunk], batches: &[Range<usize>]) -> Result<(), DeviceError>;

    /// `x += o(attention(q, k, v))` of the normed rows; their keys and values are in the cache
    /// afterwards. Rows of a sequence attend in their order, layer by layer.
    fn attend(&mut self, layer: usize, rows: Range<usize>) -> Result<(), DeviceError>;

    /// `x += ffn(norm(x))` of a dense layer.
    fn feed_forward(&mut self, layer: usize, rows: Range<usize>) -> Result<(), DeviceError>;

    /// `norm(x)` before a layer with experts: into `encoded`, `[rows, hidden]`, as rows travel to
    /// experts (rounded here, once), and through the gate, whose logits, `[rows, experts]`, are
    /// computed from the rows before they are rounded.
    fn route(
        &mut self,
        layer: usize,
        rows: Range<usize>,
        encoded: &mut [u8],
    ) -> Result<&[f32], DeviceError>;

    /// `x += delta`, `[rows, hidden]`.
    fn add(&mut self, rows: Range<usize>, delta: &[f32]) -> Result<(), DeviceError>;

    /// Answers about each of the `wanted` rows, which ascend. Whole logits answer every need; where a
    /// token is all that is needed, it may be the answer.
    fn logits(&mut self, wanted: &[Wanted], answers: &mut Answers) -> Result<(), DeviceError>;
}
