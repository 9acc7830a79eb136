//! What a device must have set aside before the first step, so that no step is refused memory.
//!
//! Pure: shapes in, counts out.

use std::ops::Range;

use entente_model::Architecture;
use entente_model::config::FfnSpec;
use entente_model::kernels::cuda::{
    VOCAB_MAX, attention_partial_len, attention_run_len, attention_splits, check_attention,
    row_pairs,
};
use entente_model::kernels::{AttentionShape, BLOCK_LEN, DeviceError};

/// Rows whose logits are computed at once. A long prompt that wants the logits of each row would
/// otherwise take `rows x vocab` values, more than the rest together.
pub(super) const LOGIT_ROWS_MAX: usize = 64;

/// Values of attention's partial sums that are set aside, if no single row needs more: 64 MiB.
const PARTIAL_LEN: usize = 16 << 20;

/// Micro-batches of a step.
pub(super) const BATCHES_MAX: usize = 2;

/// Blocks beyond which more bring nothing: the host keeps a few words for each.
const BLOCKS_MAX: usize = 1 << 20;

/// Of the memory that is free once everything else is there, the cache takes so many tenths: the
/// driver takes some as it goes.
const CACHE_TENTHS: u64 = 9;

/// What steps are like at most.
#[derive(Debug, Clone, Copy)]
pub struct StepBounds {
    /// Rows of a step.
    pub rows_max: usize,
    /// Sequences of a step.
    pub sequences_max: usize,
}

/// Lengths of the buffers of a trunk, in values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Lengths {
    /// `[rows, hidden]`.
    pub hidden: usize,
    /// `[rows, half of the rotating values]`.
    pub rotations: usize,
    /// Rows.
    pub rows: usize,
    /// Words of rows as products take them, the widest of those there are.
    pub words: usize,
    /// `[rows, heads * head_dim]`.
    pub q: usize,
    /// `[rows, kv_heads * head_dim]`.
    pub kv: usize,
    /// `[rows, experts]` of the layer with the most.
    pub gate_logits: usize,
    /// Inner values of the widest dense layer.
    pub inner: usize,
    /// `[LOGIT_ROWS_MAX, vocab]`.
    pub logits: usize,
    /// Rows whose logits are computed at once.
    pub logit_rows: usize,
    /// Attention's partial sums.
    pub partial: usize,
}

impl Lengths {
    /// What steps of at most `rows` rows take.
    pub fn of(arch: &Architecture, rows: usize) -> Self {
        let (q, kv) = (arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim);
        let widest = |value: fn(&FfnSpec) -> usize| {
            arch.layers.iter().map(|layer| value(&layer.ffn)).max().unwrap_or(0)
        };
        let experts = widest(|ffn| match ffn {
            FfnSpec::Moe { experts, .. } => *experts,
            FfnSpec::Dense { .. } => 0,
        });
        let inner = widest(|ffn| match ffn {
            FfnSpec::Dense { inner } => *inner,
            FfnSpec::Moe { .. } => 0,
        });
        Self {
            hidden: rows * arch.hidden,
            rotations: rows * arch.rope.dim / 2,
            rows,
            words: rows * row_pairs(arch.hidden.max(q)),
            q: rows * q,
            kv: rows * kv,
            gate_logits: rows * experts,
            inner,
            logits: LOGIT_ROWS_MAX.min(rows) * arch.vocab,
            logit_rows: LOGIT_ROWS_MAX.min(rows),
            partial: PARTIAL_LEN.max(partial_len(arch, 1, attention_splits(arch.max_positions))),
        }
    }
}

/// Whether the device has kernels for the architecture.
pub(super) fn check(arch: &Architecture) -> Result<(), DeviceError> {
    if arch.vocab > VOCAB_MAX {
        let text = format!("a vocabulary of {} tokens; up to {VOCAB_MAX} are", arch.vocab);
        return Err(DeviceError::Unsupported(text));
    }
    check_attention(&shape(arch, None))
}

/// What the attention of a layer looks like.
pub(super) fn shape(arch: &Architecture, window: Option<usize>) -> AttentionShape {
    AttentionShape {
        heads: arch.heads,
        kv_heads: arch.kv_heads,
        head_dim: arch.head_dim,
        window,
        scale: (arch.head_dim as f32).powf(-0.5),
    }
}

/// Values of attention's partial sums.
pub(super) fn partial_len(arch: &Architecture, rows: usize, splits: usize) -> usize {
    attention_partial_len(&shape(arch, None), rows, splits)
}

/// Some neighbouring rows that attend in one launch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Piece {
    /// The rows.
    pub rows: Range<usize>,
    /// Splits of the longest of them.
    pub splits: usize,
}

/// Neighbours in a sequence, as the kernel takes them: where the blocks of the sequence begin among
/// all, the position of the first row, its number in its piece, how many rows.
pub(super) type Run = [u32; 4];

/// The runs of a piece whose rows stand at `places`, that is where the blocks begin and the position.
pub(super) fn runs(arch: &Architecture, places: impl Iterator<Item = (usize, usize)>) -> Vec<Run> {
    let len_max = attention_run_len(&shape(arch, None)) as u32;
    let mut runs: Vec<Run> = Vec::new();
    for (row, (first, position)) in places.enumerate() {
        let [first, position, row] = [first, position, row].map(|n| n as u32);
        match runs.last_mut() {
            Some([last_first, start, _, len])
                if *last_first == first && *start + *len == position && *len < len_max =>
            {
                *len += 1;
            }
            _ => runs.push([first, position, row, 1]),
        }
    }
    runs
}

/// Cuts rows so that the partial sums of each piece fit `partial` values. `positions` are those of
/// all rows of the step.
pub(super) fn pieces(
    arch: &Architecture,
    positions: &[usize],
    rows: Range<usize>,
    partial: usize,
) -> Vec<Piece> {
    let mut pieces: Vec<Piece> = Vec::new();
    for row in rows {
        let own = attention_splits(positions[row] + 1);
        if let Some(last) = pieces.last_mut() {
            let joint = last.splits.max(own);
            if partial_len(arch, last.rows.len() + 1, joint) <= partial {
                *last = Piece { rows: last.rows.start..row + 1, splits: joint };
                continue;
            }
        }
        pieces.push(Piece { rows: row..row + 1, splits: own });
    }
    pieces
}

/// Values that one block takes in the keys of one layer, and as many in its values.
pub(super) fn block_len(arch: &Architecture) -> usize {
    arch.kv_heads * BLOCK_LEN * arch.head_dim
}

/// Bytes that one block takes in all layers, keys and values of 2 bytes each.
pub(super) fn block_bytes(arch: &Architecture) -> usize {
    2 * size_of::<u16>() * arch.layers.len() * block_len(arch)
}

/// Blocks that go into most of the memory that is free.
pub(super) fn blocks(arch: &Architecture, free_bytes: u64) -> Result<usize, DeviceError> {
    let wanted_bytes = block_bytes(arch) as u64;
    match free_bytes / 10 * CACHE_TENTHS / wanted_bytes {
        0 => Err(DeviceError::OutOfMemory { wanted_bytes, free_bytes }),
        blocks => Ok(usize::try_from(blocks).unwrap_or(BLOCKS_MAX).min(BLOCKS_MAX)),
    }
}

#[cfg(test)]
mod tests {
    use entente_model::Checkpoint;

    use super::*;

    /// Mixtral's shape, but small: 2 layers, 4 heads of 8 values, 2 for keys and values.
    fn architecture() -> Architecture {
        let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/mixtral");
        Checkpoint::open(dir.as_ref()).unwrap().architecture().clone()
    }

    #[test]
    fn pieces_are_all_rows_in_their_order_and_fit_what_is_set_aside() {
        let arch = architecture();
        // Two long prompts' rows between many short ones, as mixed steps have them.
        let positions: Vec<usize> =
            (0..300).map(|row| if row % 100 < 40 { 90_000 + row } else { row }).collect();
        let partial = partial_len(&arch, 7, attention_splits(90_300));
        for rows in [0..300, 17..18, 150..300, 5..5] {
            let pieces = pieces(&arch, &positions, rows.clone(), partial);
            let covered: Vec<usize> = pieces.iter().flat_map(|piece| piece.rows.clone()).collect();
            assert_eq!(covered, Vec::from_iter(rows));
            for Piece { rows, splits } in pieces {
                assert!(partial_len(&arch, rows.len(), splits) <= partial, "{rows:?}");
                let reaches = |row: usize| attention_splits(positions[row] + 1) <= splits;
                assert!(rows.clone().all(reaches), "{rows:?} of {splits} splits");
            }
        }
    }

    #[test]
    fn rows_run_together_where_they_follow_one_another_in_a_sequence() {
        let arch = architecture();
        // Two heads share keys, so that eight rows fill a tile.
        let prompt = (5..15).map(|position| (0, position));
        let places = prompt.chain([(7, 15), (7, 17), (9, 18)]);
        let want = [[0, 5, 0, 8], [0, 13, 8, 2], [7, 15, 10, 1], [7, 17, 11, 1], [9, 18, 12, 1]];
        assert_eq!(runs(&arch, places), want);
        assert_eq!(runs(&arch, std::iter::empty()), [[0; 4]; 0]);
    }

    #[test]
    fn what_is_set_aside_holds_a_row_at_the_end_of_the_longest_context() {
        let arch = Architecture { heads: 64, max_positions: 1 << 24, ..architecture() };
        let Lengths { partial, .. } = Lengths::of(&arch, 1);
        let last = [arch.max_positions - 1];
        let pieces = pieces(&arch, &last, 0..1, partial);
        assert!(partial_len(&arch, 1, pieces[0].splits) <= partial);
        assert!(partial > PARTIAL_LEN, "this context is longer than the usual memory is for");
    }

    #[test]
    fn the_cache_takes_most_of_what_is_free_and_an_error_says_what_it_lacks() {
        let arch = architecture();
        let one = block_bytes(&arch) as u64;
        assert_eq!(blocks(&arch, 100 * one), Ok(90));
        assert_eq!(blocks(&arch, u64::MAX), Ok(BLOCKS_MAX));
        let lacks = DeviceError::OutOfMemory { wanted_bytes: one, free_bytes: one };
        assert_eq!(blocks(&arch, one), Err(lacks));
    }
}
