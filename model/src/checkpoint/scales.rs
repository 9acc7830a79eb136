//! What the tensors of a checkpoint in FP8 are multiplied by.
//!
//! A matrix in `F8_E4M3` has a tensor of scales beside it, called like the matrix with an ending, and a
//! weight is its code times a scale. Two ways of cutting are found in released checkpoints: blocks of
//! 128 by 128, the last ones smaller (DeepSeek-V3, `README_WEIGHTS.md`: `weight_scale_inv`, which
//! multiplies in spite of its name), and one scale for a whole matrix. Fused experts have either for
//! each expert.

use super::header::Entry;
use crate::kernels::{Scales, SourceDtype};

/// What is added to the name of a tensor for that of its scales.
const ENDINGS: [&str; 2] = ["_scale_inv", "_scale"];
/// Outputs and inputs of a block.
const BLOCK: usize = 128;

/// The names that the scales of a tensor may have.
pub(super) fn names(tensor: &str) -> [String; 2] {
    ENDINGS.map(|ending| format!("{tensor}{ending}"))
}

/// The tensor whose scales may have this name.
pub(super) fn owner(name: &str) -> Option<&str> {
    ENDINGS.iter().find_map(|ending| name.strip_suffix(ending))
}

/// The scales of a tensor of this `shape`, `[.., out, in]`, stored as `entry` says in `bytes`; or
/// the reason why they cannot be.
pub(super) fn of<'a>(
    shape: &[usize],
    entry: &Entry,
    dtype: SourceDtype,
    bytes: &'a [u8],
) -> Result<Scales<'a>, String> {
    let [matrices @ .., outputs, inputs] = shape else {
        return Err("scales something that is no matrix".to_owned());
    };
    let blocks = [outputs.div_ceil(BLOCK), inputs.div_ceil(BLOCK)];
    if entry.shape == [matrices, &blocks].concat() {
        let block = [BLOCK, BLOCK];
        return Ok(Scales { dtype, bytes, block, columns: blocks[1], outputs_before: 0 });
    }
    // Extents of 1 may be there or not.
    let extents = |shape: &[usize]| shape.iter().copied().filter(|n| *n != 1).collect::<Vec<_>>();
    if extents(&entry.shape) == extents(matrices) {
        let block = [usize::MAX, usize::MAX];
        return Ok(Scales { dtype, bytes, block, columns: 1, outputs_before: 0 });
    }
    let (have, want) = (&entry.shape, [matrices, &blocks].concat());
    Err(format!("shape {have:?}, expected one for each matrix or, in blocks of {BLOCK}, {want:?}"))
}
