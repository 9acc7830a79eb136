//! Which steps are alike, so that what was recorded of one serves another.
//!
//! What the launches of a step depend on is how many rows it has and how far the longest sequence
//! reaches; everything else lies in device memory at fixed places. Steps that decode come one after
//! the other, and for these both numbers are rounded up to one of few: with *filler*, rows of a
//! sequence that nobody has, in a block of the cache that is nobody's, and with splits of attention
//! of which no row sees anything. Neither changes a bit of another row.
//!
//! Pure: chunks in, numbers out.

use std::ops::Range;

use entente_model::kernels::BLOCK_LEN;
use entente_model::kernels::cuda::attention_splits;

use crate::engine::scheduler::Chunk;

/// Most rows of a step of which graphs are recorded. In larger ones kernels take longer than their
/// launches.
pub(super) const GRAPH_ROWS_MAX: usize = 64;

/// Beyond a few, rows are rounded up to a multiple of this: as many as a tensor core multiplies at
/// once, so that the filler costs products next to nothing.
const ROWS_GRAIN: usize = 8;

/// All that the launches of a step depend on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shape {
    /// Rows with filler.
    pub rows: usize,
    /// Splits of attention, for all rows.
    pub splits: usize,
}

impl Shape {
    /// That of a step which decodes and whose rows may attend in one launch: so many rows and splits
    /// must fit what is set aside for attention. Other steps have shapes of their own.
    pub fn of(
        chunks: &[Chunk],
        batches: &[Range<usize>],
        fits: impl Fn(usize, usize) -> bool,
    ) -> Option<Self> {
        let rows: usize = chunks.iter().map(|chunk| chunk.tokens.len()).sum();
        let regular = batches.len() == 1 && rows <= GRAPH_ROWS_MAX;
        if !regular || !chunks.iter().all(Chunk::decodes) {
            return None;
        }
        let longest = chunks.iter().map(|chunk| chunk.start + chunk.tokens.len()).max()?;
        let shape = Self { rows: padded(rows), splits: rounded(attention_splits(longest)) };
        fits(shape.rows, shape.splits).then_some(shape)
    }
}

/// Rows of a step with so many rows of its own.
pub(super) fn padded(rows: usize) -> usize {
    match rows {
        0..=4 => rows.next_power_of_two(),
        _ if rows <= GRAPH_ROWS_MAX => rows.next_multiple_of(ROWS_GRAIN),
        _ => rows,
    }
}

// The block that is nobody's has the filler.
const _: () = assert!(ROWS_GRAIN <= BLOCK_LEN && GRAPH_ROWS_MAX.is_multiple_of(ROWS_GRAIN));

/// At most a fourth more, and four numbers between one power of two and the next.
fn rounded(splits: usize) -> usize {
    splits.next_multiple_of((splits.next_power_of_two() / 8).max(1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::scheduler::SequenceId;

    fn decodes(start: usize, drafts: usize) -> Chunk {
        Chunk {
            id: SequenceId(1),
            start,
            tokens: vec![1; 1 + drafts],
            draft_len: drafts,
            blocks: vec![0; (start + drafts) / BLOCK_LEN + 1],
            reaches_end: true,
        }
    }

    fn shape(chunks: &[Chunk]) -> Option<Shape> {
        let rows = chunks.iter().map(|chunk| chunk.tokens.len()).sum();
        Shape::of(chunks, std::slice::from_ref(&(0..rows)), |_, _| true)
    }

    #[test]
    fn steps_that_decode_have_few_shapes_into_which_they_fit() {
        let mut shapes = Vec::new();
        for rows in 1..=GRAPH_ROWS_MAX {
            for position in [0, 255, 256, 3_000, 3_001, 130_000] {
                let mut chunks = vec![decodes(3, 0); rows - 1];
                chunks.push(decodes(position, 0));
                let shape = shape(&chunks).unwrap();
                assert!(shape.rows >= rows && shape.rows - rows < BLOCK_LEN, "{shape:?}");
                let splits = attention_splits(position + 1);
                assert!((splits..=splits + splits / 4).contains(&shape.splits), "{shape:?}");
                shapes.push((shape.rows, shape.splits));
            }
        }
        shapes.sort_unstable();
        shapes.dedup();
        // Eleven numbers of rows and four of splits.
        assert_eq!(shapes.len(), 44, "{shapes:?}");
    }

    #[test]
    fn drafts_are_rows_like_others_and_what_is_no_small_decode_has_no_shape() {
        assert_eq!(shape(&[decodes(9, 2), decodes(700, 1)]), Some(Shape { rows: 8, splits: 3 }));
        assert_eq!(shape(&[]), None);
        assert_eq!(shape(&vec![decodes(0, 0); GRAPH_ROWS_MAX + 1]), None);
        let prompt = Chunk { tokens: vec![1; 2], ..decodes(0, 0) };
        assert_eq!(shape(&[decodes(5, 0), prompt]), None);
        let halves = [0..1, 1..2];
        assert_eq!(Shape::of(&[decodes(1, 0), decodes(2, 0)], &halves, |_, _| true), None);
        let batch = std::slice::from_ref(&(0..1));
        assert_eq!(Shape::of(&[decodes(1, 0)], batch, |_, _| false), None);
    }
}
