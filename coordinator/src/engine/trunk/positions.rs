//! Where the rows of a step stand: what attention needs to know of them.
//!
//! Pure: chunks in, numbers out. The block tables lie one after the other, which is how a device
//! takes them, and the rows of a chunk share one, by which kernels see that they belong together.

use std::ops::Range;

use entente_model::kernels::{AttentionRow, BLOCK_LEN};

use super::super::scheduler::Chunk;

/// A step's rows as attention sees them.
#[derive(Debug, Default)]
pub(super) struct Positions {
    /// Blocks of the first chunk's sequence, then those of the next.
    pub tables: Vec<u32>,
    /// For each row which of the tables' entries are its sequence's.
    table_of_row: Vec<Range<usize>>,
    /// The position that each row has in its sequence.
    pub positions: Vec<usize>,
    /// Where each row's key and value go: `block * BLOCK_LEN + offset`.
    pub slots: Vec<usize>,
}

impl Positions {
    /// Those of the rows of `chunks`, one chunk after the other.
    pub fn of(chunks: &[Chunk]) -> Self {
        let mut all = Self::default();
        for chunk in chunks {
            all.push(chunk.start..chunk.start + chunk.tokens.len(), &chunk.blocks);
        }
        all
    }

    /// Adds the rows at some positions of a sequence that has these blocks.
    pub fn push(&mut self, positions: Range<usize>, blocks: &[u32]) {
        let first = self.tables.len();
        self.tables.extend(blocks);
        for position in positions {
            let block = blocks[position / BLOCK_LEN] as usize;
            self.table_of_row.push(first..self.tables.len());
            self.positions.push(position);
            self.slots.push(block * BLOCK_LEN + position % BLOCK_LEN);
        }
    }

    /// Rows of the step.
    pub fn len(&self) -> usize {
        self.positions.len()
    }

    /// Where a row's blocks begin in the tables, and its position.
    pub fn place(&self, row: usize) -> (usize, usize) {
        (self.table_of_row[row].start, self.positions[row])
    }

    /// Some of the rows with their sequences' blocks.
    pub fn rows(&self, rows: Range<usize>) -> Vec<AttentionRow<'_>> {
        let row = |row: usize| AttentionRow {
            blocks: &self.tables[self.table_of_row[row].clone()],
            position: self.positions[row],
        };
        rows.map(row).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::scheduler::SequenceId;
    use super::*;

    #[test]
    fn a_row_is_where_its_sequence_has_its_position() {
        let chunk = |start, len: usize, blocks| Chunk {
            id: SequenceId(1),
            start,
            tokens: vec![1; len],
            blocks,
            reaches_end: true,
            draft_len: 0,
        };
        let chunks = [chunk(BLOCK_LEN - 1, 2, vec![5, 3]), chunk(0, 1, vec![9])];
        let all = Positions::of(&chunks);
        assert_eq!(all.positions, [15, 16, 0]);
        assert_eq!(all.slots, [5 * BLOCK_LEN + 15, 3 * BLOCK_LEN, 9 * BLOCK_LEN]);
        let rows = all.rows(0..all.len());
        assert!(std::ptr::eq(rows[0].blocks, rows[1].blocks), "rows of a chunk share their table");
        assert_eq!((rows[1].blocks, rows[2].blocks), (&[5, 3][..], &[9][..]));
    }
}
