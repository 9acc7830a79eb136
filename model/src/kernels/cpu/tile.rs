//! Activations on their way into a multiplication.
//!
//! Rows are cut into **tiles** of up to [`Isa::TILE_ROWS`] rows, stored input by input,
//! `[in][rows of the tile]`, already in the form that is multiplied: f32 values, pairs of bf16
//! values, or groups of bytes with their scales, rounded here. What a word holds depends on its row
//! alone.

use super::super::matrix::Layout;
use super::super::quantise::{GROUP, GROUP_WORDS};
use super::isa::{Isa, LANES};

/// Evaluates an expression with the number of rows of a tile as a constant.
macro_rules! for_rows {
    ($isa:ty, $rows:expr, $R:ident => $body:expr) => {
        for_rows!(@ $isa, $rows, $R => $body; 1 2 3 4 5 6 7 8 9 10 11 12)
    };
    (@ $isa:ty, $rows:expr, $R:ident => $body:expr; $($n:literal)+) => {
        match $rows {
            $($n if $n <= <$isa>::TILE_ROWS => {
                const $R: usize = $n;
                $body
            })+
            rows => unreachable!("a tile of {rows} rows"),
        }
    };
}
pub(super) use for_rows;

/// Most rows of a tile that `layout` multiplies.
pub fn tile_rows<I: Isa>(layout: Layout) -> usize {
    match layout {
        Layout::F32 | Layout::Bf16Widened | Layout::Bf16 | Layout::Fp8 => I::TILE_ROWS,
        Layout::Q8 | Layout::Q4 => I::TILE_ROWS_INT8,
    }
}

/// How rows are cut into tiles, whose sizes differ by one at most, the larger ones first, and how
/// much room they take packed.
#[derive(Clone, Copy)]
pub struct Tiles {
    rows: usize,
    count: usize,
    words: usize,
}

/// Neighbouring tiles of one size.
#[derive(Clone, Copy)]
pub struct Run<'a> {
    /// Rows of each tile.
    pub rows: usize,
    pub first_tile: usize,
    pub first_row: usize,
    /// Words of a row.
    pub words: usize,
    /// The tiles, packed.
    pub packed: &'a [u32],
}

impl Tiles {
    /// `rows` rows of `words` words, at most `tile_rows_max` in a tile.
    pub fn new(rows: usize, tile_rows_max: usize, words: usize) -> Self {
        Self { rows, count: rows.div_ceil(tile_rows_max), words }
    }

    pub fn count(&self) -> usize {
        self.count
    }

    /// First row and number of rows of tile `i`.
    pub fn tile(&self, i: usize) -> (usize, usize) {
        let (rows, larger) = (self.rows / self.count, self.rows % self.count);
        (i * rows + i.min(larger), rows + usize::from(i < larger))
    }

    /// First word and number of words of tile `i`.
    pub fn span(&self, i: usize) -> (usize, usize) {
        let (first, rows) = self.tile(i);
        (first * self.words, rows * self.words)
    }

    /// Words of all tiles.
    pub fn total(&self) -> usize {
        self.rows * self.words
    }

    /// The tiles of each size, one or two of them, of all tiles that were `packed`.
    pub fn runs<'a>(&self, packed: &'a [u32]) -> impl Iterator<Item = Run<'a>> {
        let larger = self.rows % self.count.max(1);
        let (words, ends) = (self.words, [(0, larger), (larger, self.count)]);
        let tiles = *self;
        ends.into_iter().filter(|(start, end)| start < end).map(move |(first_tile, end)| {
            let ((at, _), (last, len)) = (tiles.span(first_tile), tiles.span(end - 1));
            let (first_row, rows) = tiles.tile(first_tile);
            Run { rows, first_tile, first_row, words, packed: &packed[at..last + len] }
        })
    }
}

/// Writes `rows` rows into `out` in the form that `layout` multiplies: word `k` of row `r` goes to
/// `k * rows + r`. The last pair or group of a row is filled up with zeros.
pub fn pack_tile<'a, I: Isa>(
    isa: I,
    layout: Layout,
    rows: usize,
    row: impl Fn(usize) -> &'a [f32],
    out: &mut [u32],
) {
    for_rows!(I, rows, R => isa.enter(
        #[inline(always)]
        || match layout {
            Layout::F32 | Layout::Bf16Widened => {
                pack::<_, _, R, LANES>(isa, row, f32_words, out);
            }
            Layout::Bf16 | Layout::Fp8 => pack::<_, _, R, { 2 * LANES }>(
                isa,
                row,
                #[inline(always)]
                |values| isa.round_pairs(values),
                out,
            ),
            Layout::Q8 | Layout::Q4 => pack_groups::<_, _, R>(
                isa,
                row,
                #[inline(always)]
                |values| *values,
                out,
            ),
        },
    ));
}

/// [`pack_tile`] of rows as they travel: f32 values where f32 is multiplied, else bf16, which is
/// already what a pair of words holds.
#[expect(clippy::redundant_closure, reason = "it is inlined, a function passed by name is not")]
pub fn pack_encoded_tile<'a, I: Isa>(
    isa: I,
    layout: Layout,
    rows: usize,
    row: impl Fn(usize) -> &'a [u8],
    out: &mut [u32],
) {
    for_rows!(I, rows, R => isa.enter(
        #[inline(always)]
        || match layout {
            Layout::F32 | Layout::Bf16Widened => pack::<_, _, R, LANES>(
                isa,
                |r| row(r).as_chunks().0,
                #[inline(always)]
                |values| stored_words(values),
                out,
            ),
            Layout::Bf16 | Layout::Fp8 => pack::<_, _, R, { 2 * LANES }>(
                isa,
                |r| row(r).as_chunks().0,
                #[inline(always)]
                |values| stored_pairs(values),
                out,
            ),
            Layout::Q8 | Layout::Q4 => pack_groups::<_, _, R>(
                isa,
                |r| row(r).as_chunks().0,
                #[inline(always)]
                |values| widened(values),
                out,
            ),
        },
    ));
}

/// Packs `R` rows, `N` values of each at a time, which make 16 words: they stay in registers.
#[inline(always)]
fn pack<'a, I: Isa, T: Copy + Default + 'a, const R: usize, const N: usize>(
    isa: I,
    row: impl Fn(usize) -> &'a [T],
    words_of: impl Fn(&[T; N]) -> [u32; LANES],
    out: &mut [u32],
) {
    let sources: [&[T]; R] = std::array::from_fn(row);
    let mut words = [[0; LANES]; R];
    let (chunks, last) = out.as_chunks_mut::<R>().0.as_chunks_mut::<LANES>();
    for (chunk, out) in chunks.iter_mut().enumerate() {
        for r in 0..R {
            words[r] = words_of(&first_values(&sources[r][chunk * N..]));
        }
        isa.interleave(&words, out);
    }
    if !last.is_empty() {
        for r in 0..R {
            words[r] = words_of(&first_values(&sources[r][chunks.len() * N..]));
        }
        let mut padded = [[0; R]; LANES];
        isa.interleave(&words, &mut padded);
        last.copy_from_slice(&padded[..last.len()]);
    }
}

/// The first values, zeros beyond the last.
#[inline(always)]
fn first_values<T: Copy + Default, const N: usize>(values: &[T]) -> [T; N] {
    match values.first_chunk() {
        Some(values) => *values,
        None => {
            let mut padded = [T::default(); N];
            padded[..values.len()].copy_from_slice(values);
            padded
        }
    }
}

/// Packs `R` rows in groups: the words of a group lie together, row by row, so that each is written
/// in one go.
#[inline(always)]
fn pack_groups<'a, I: Isa, T: Copy + Default + 'a, const R: usize>(
    isa: I,
    row: impl Fn(usize) -> &'a [T],
    widen: impl Fn(&[T; GROUP]) -> [f32; GROUP],
    out: &mut [u32],
) {
    let groups = out.as_chunks_mut::<GROUP_WORDS>().0.as_chunks_mut::<R>().0;
    for (group, out) in groups.iter_mut().enumerate() {
        for (r, out) in out.iter_mut().enumerate() {
            let values = &row(r)[group * GROUP..];
            match values.first_chunk() {
                Some(values) => isa.group_words(&widen(values), out),
                None => {
                    let mut padded = [T::default(); GROUP];
                    padded[..values.len()].copy_from_slice(values);
                    isa.group_words(&widen(&padded), out);
                }
            }
        }
    }
}

#[inline(always)]
fn f32_words(values: &[f32; LANES]) -> [u32; LANES] {
    let mut words = [0; LANES];
    for (word, value) in words.iter_mut().zip(values) {
        *word = value.to_bits();
    }
    words
}

#[inline(always)]
fn stored_words(values: &[[u8; 4]; LANES]) -> [u32; LANES] {
    let mut words = [0; LANES];
    for (word, value) in words.iter_mut().zip(values) {
        *word = u32::from_le_bytes(*value);
    }
    words
}

#[inline(always)]
fn stored_pairs(values: &[[u8; 2]; 2 * LANES]) -> [u32; LANES] {
    let mut words = [0; LANES];
    for (word, [first, second]) in words.iter_mut().zip(values.as_chunks().0) {
        *word = u32::from_le_bytes([first[0], first[1], second[0], second[1]]);
    }
    words
}

#[inline(always)]
fn widened(values: &[[u8; 2]; GROUP]) -> [f32; GROUP] {
    let mut wide = [0.0; GROUP];
    for (wide, value) in wide.iter_mut().zip(values) {
        *wide = f32::from_bits(u32::from(u16::from_le_bytes(*value)) << 16);
    }
    wide
}

/// Rounds to the nearest bf16, ties to even, in the upper half of the result. The same as
/// `half::bf16::from_f32`, in a form without branches that is compiled to vector instructions.
#[inline(always)]
pub fn round_to_bf16(x: f32) -> u32 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
    // Rounding could turn a NaN into an infinity; a quiet NaN stays one.
    if x.is_nan() { bits | 0x0040_0000 } else { rounded }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    #[test]
    fn rounding_equals_that_of_frames() {
        // Every exponent, and fractions around every kind of tie.
        for upper in 0..=u16::MAX {
            for lower in [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
                let x = f32::from_bits(u32::from(upper) << 16 | lower);
                let want = u32::from(bf16::from_f32(x).to_bits());
                assert_eq!(round_to_bf16(x) >> 16, want, "{:#x}", x.to_bits());
            }
        }
    }

    #[test]
    fn tiles_cover_the_rows_one_after_another() {
        for rows in 0..200 {
            let tiles = Tiles::new(rows, 12, Layout::Bf16.words(7));
            let mut next = 0;
            for t in 0..tiles.count() {
                let (first, count) = tiles.tile(t);
                assert!(first == next && (1..=12).contains(&count), "{rows} rows");
                assert_eq!(tiles.span(t), (first * 4, count * 4));
                next += count;
            }
            let packed = vec![0; tiles.total()];
            let runs: Vec<_> = tiles.runs(&packed).collect();
            let total: usize = runs.iter().map(|run| run.packed.len()).sum();
            assert!(total == packed.len() && runs.len() <= 2, "{rows} rows");
            let larger = runs.windows(2).all(|runs| runs[0].rows == runs[1].rows + 1);
            assert!(larger, "{rows} rows");
            assert_eq!((next, tiles.total()), (rows, rows * 4));
        }
    }
}
