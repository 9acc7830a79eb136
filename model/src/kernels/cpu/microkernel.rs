//! The micro-kernel: tiles of rows times panels of weights, both read in one stream.
//!
//! It keeps the 32 outputs of each row in registers from the first input to the last: an output is
//! one chain of additions in the order of the inputs, whatever the number of rows. The
//! micro-kernels for 1 row and for 12 are the same lines of source.
//!
//! One call does all tiles of a size for any number of neighbouring panels, so that what it takes
//! to get into a loop is paid once, and the end of one tile overlaps with the start of the next.
//! It does not know which matrix or thread it works for.

use std::ops::Range;

use super::super::fp8;
use super::super::matrix::{Layout, Matrix, PANEL, Q4_LINES, Q8_LINES};
use super::super::memory::Line;
use super::super::pool::Scatter;
use super::super::quantise::{BLOCK_WORDS, CODEBOOK_UNSIGNED, GROUP_WORDS};
use super::isa::Isa;
use super::prefetch::{Ahead, Prefetch};
use super::tile::{Run, for_rows};

/// What the lines of a panel are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Weights as they are stored.
    Stored(Layout),
    /// Weights of fp8, their codes as pairs of bf16 numbers, two lines for each of one.
    Fp8Widened,
}

/// Neighbouring panels, one after another.
#[derive(Clone, Copy)]
pub struct Panels<'a> {
    pub form: Form,
    pub lines: &'a [Line],
    /// Lines of each panel.
    pub panel_lines: usize,
}

/// Where products go: a part of the columns of an array of rows.
pub struct Destination<'a> {
    pub out: &'a Scatter<'a, f32>,
    /// Which row of `out` each row goes to, as the second of a pair; without it, its own number.
    pub rows: Option<&'a [(u32, u32)]>,
    /// Values of a row of `out`.
    pub stride: usize,
    /// The column of the first output of the first panel.
    pub first_column: usize,
    /// Columns from there on; the last panel may have more outputs than are wanted.
    pub columns: usize,
}

impl<'a> Destination<'a> {
    /// The columns of `panels` of `w` in `out`, which has all columns of `w`.
    pub fn columns(out: &'a Scatter<'a, f32>, w: &Matrix, panels: &Range<usize>) -> Self {
        let outputs = w.outputs(panels);
        let (stride, first_column) = (w.out_features(), outputs.start);
        Self { out, rows: None, stride, first_column, columns: outputs.len() }
    }

    /// All columns of `out`, which has `columns`.
    pub fn all(out: &'a Scatter<'a, f32>, columns: usize) -> Self {
        Self { out, rows: None, stride: columns, first_column: 0, columns }
    }

    /// The columns of panel `p` and those after it.
    pub fn at_panel(&self, p: usize) -> Self {
        let skipped = p * PANEL;
        let (first_column, columns) = (self.first_column + skipped, self.columns - skipped);
        Self { first_column, columns, ..*self }
    }

    /// Writes the outputs of panel `p` of row `r`.
    ///
    /// # Safety
    /// No one else may use these columns of `out` meanwhile.
    #[inline(always)]
    unsafe fn write<I: Isa>(&self, isa: I, r: usize, p: usize, sums: [I::V; 2]) {
        let row = self.rows.map_or(r, |rows| rows[r].1 as usize);
        let (at, len) = (p * PANEL, PANEL.min(self.columns - p * PANEL));
        // SAFETY: the caller promises it.
        let out = unsafe { self.out.slice(row * self.stride + self.first_column + at, len) };
        match out.first_chunk_mut() {
            Some(out) => store(isa, sums, out),
            None => {
                let mut part = [0.0; PANEL];
                store(isa, sums, &mut part);
                out.copy_from_slice(&part[..len]);
            }
        }
    }
}

#[inline(always)]
fn store<I: Isa>(isa: I, sums: [I::V; 2], out: &mut [f32; PANEL]) {
    let (halves, _) = out.as_chunks_mut();
    isa.store(sums[0], &mut halves[0]);
    isa.store(sums[1], &mut halves[1]);
}

/// Multiplies the packed tiles of `run` with `panels`.
///
/// # Safety
/// No one else may use the columns of `to` meanwhile.
pub unsafe fn multiply<I: Isa>(
    isa: I,
    panels: Panels<'_>,
    run: Run<'_>,
    prefetch: &Prefetch,
    to: &Destination<'_>,
) {
    // SAFETY: the caller promises it.
    for_rows!(I, run.rows, R => unsafe { multiply_tiles::<I, R>(isa, panels, run, prefetch, to) });
}

#[inline(never)]
unsafe fn multiply_tiles<I: Isa, const R: usize>(
    isa: I,
    panels: Panels<'_>,
    run: Run<'_>,
    prefetch: &Prefetch,
    to: &Destination<'_>,
) {
    isa.enter(
        #[inline(always)]
        || {
            let work = Work { isa, panels, run, prefetch, to };
            // SAFETY: the caller promises it.
            unsafe {
                match panels.form {
                    Form::Stored(Layout::F32) => {
                        work.each::<R>(|panel, ahead, x| tile_f32(isa, panel, ahead, x));
                    }
                    Form::Stored(Layout::Bf16Widened) => {
                        work.each::<R>(|panel, ahead, x| tile_widened(isa, panel, ahead, x));
                    }
                    Form::Stored(Layout::Bf16) => {
                        work.each::<R>(|panel, ahead, x| tile_bf16(isa, panel, ahead, x));
                    }
                    Form::Stored(Layout::Fp8) => work.each::<R>(|panel, ahead, x| {
                        tile_fp8::<I, R, FP8_LINES>(isa, panel, ahead, x)
                    }),
                    Form::Fp8Widened => work.each::<R>(|panel, ahead, x| {
                        tile_fp8::<I, R, FP8_WIDENED_LINES>(isa, panel, ahead, x)
                    }),
                    // Larger tiles are not made, see `tile_rows`; nor is code for them.
                    Form::Stored(Layout::Q8 | Layout::Q4) if R > I::TILE_ROWS_INT8 => {
                        unreachable!("{R} rows")
                    }
                    Form::Stored(Layout::Q8) => work.each::<R>(|panel, ahead, x| {
                        tile_int8::<I, R, Q8_LINES>(isa, panel, ahead, x)
                    }),
                    Form::Stored(Layout::Q4) => work.each::<R>(|panel, ahead, x| {
                        tile_int8::<I, R, Q4_LINES>(isa, panel, ahead, x)
                    }),
                }
            }
        },
    );
}

/// What one call multiplies.
struct Work<'a, I> {
    isa: I,
    panels: Panels<'a>,
    run: Run<'a>,
    prefetch: &'a Prefetch,
    to: &'a Destination<'a>,
}

impl<I: Isa> Work<'_, I> {
    /// Writes what `tile` makes of each panel and tile.
    ///
    /// # Safety
    /// See [`multiply`].
    #[inline(always)]
    unsafe fn each<const R: usize>(&self, tile: impl Fn(&[Line], Ahead, &[u32]) -> Sums<I, R>) {
        let Self { isa, panels, run, prefetch, to } = self;
        for (p, panel) in panels.lines.chunks_exact(panels.panel_lines).enumerate() {
            for (t, x) in run.packed.chunks_exact(R * run.words).enumerate() {
                let sums = tile(panel, prefetch.ahead(p, run.first_tile + t), x);
                for (r, sums) in sums.into_iter().enumerate() {
                    // SAFETY: the caller promises it.
                    unsafe { to.write(*isa, run.first_row + t * R + r, p, sums) };
                }
            }
        }
    }
}

/// Sums of `R` rows: two registers of 16 outputs each.
type Sums<I, const R: usize> = [[<I as Isa>::V; 2]; R];

#[inline(always)]
fn tile_f32<I: Isa, const R: usize>(
    isa: I,
    panel: &[Line],
    mut ahead: Ahead,
    x: &[u32],
) -> Sums<I, R> {
    let mut sums = [[isa.splat(0.0); 2]; R];
    for (lines, x) in panel.as_chunks::<2>().0.iter().zip(x.as_chunks::<R>().0) {
        ahead.ask::<I, 2>(isa);
        let w = [isa.load_line(&lines[0]), isa.load_line(&lines[1])];
        accumulate(isa, &mut sums, w, x);
    }
    sums
}

#[inline(always)]
fn tile_widened<I: Isa, const R: usize>(
    isa: I,
    panel: &[Line],
    mut ahead: Ahead,
    x: &[u32],
) -> Sums<I, R> {
    let mut sums = [[isa.splat(0.0); 2]; R];
    for (lines, x) in panel.as_chunks::<2>().0.iter().zip(x.as_chunks::<R>().0.as_chunks::<2>().0) {
        ahead.ask::<I, 2>(isa);
        let [left, right] = [isa.widen(&lines[0]), isa.widen(&lines[1])];
        accumulate(isa, &mut sums, [left[0], right[0]], &x[0]);
        accumulate(isa, &mut sums, [left[1], right[1]], &x[1]);
    }
    sums
}

#[inline(always)]
fn tile_bf16<I: Isa, const R: usize>(
    isa: I,
    panel: &[Line],
    mut ahead: Ahead,
    x: &[u32],
) -> Sums<I, R> {
    let mut sums = [[isa.splat(0.0); 2]; R];
    for (lines, x) in panel.as_chunks::<2>().0.iter().zip(x.as_chunks::<R>().0) {
        ahead.ask::<I, 2>(isa);
        let w = [isa.load_pairs(&lines[0]), isa.load_pairs(&lines[1])];
        for r in 0..R {
            sums[r][0] = isa.dot(sums[r][0], w[0], x[r]);
            sums[r][1] = isa.dot(sums[r][1], w[1], x[r]);
        }
    }
    sums
}

/// Lines of a pair of inputs in fp8.
const FP8_LINES: usize = 1;
/// The same, widened.
const FP8_WIDENED_LINES: usize = 2;

/// Sums as for bf16, block by block from zero, each scaled and added to those before in one rounding.
#[inline(always)]
fn tile_fp8<I: Isa, const R: usize, const LINES: usize>(
    isa: I,
    panel: &[Line],
    mut ahead: Ahead,
    x: &[u32],
) -> Sums<I, R> {
    const BLOCK_PAIRS: usize = fp8::BLOCK / 2;
    let mut sums = [[isa.splat(0.0); 2]; R];
    let x = x.as_chunks::<R>().0;
    let (codes, scales) = panel.split_at(x.len() * LINES);
    let blocks = codes.as_chunks::<LINES>().0.chunks(BLOCK_PAIRS).zip(x.chunks(BLOCK_PAIRS));
    for ((codes, x), scales) in blocks.zip(scales.as_chunks::<2>().0) {
        let mut block = [[isa.splat(0.0); 2]; R];
        for (lines, x) in codes.iter().zip(x) {
            ahead.ask::<I, LINES>(isa);
            let w = if LINES == FP8_LINES {
                isa.load_e4m3(&lines[0])
            } else {
                [isa.load_pairs(&lines[0]), isa.load_pairs(&lines[LINES - 1])]
            };
            for r in 0..R {
                block[r][0] = isa.dot(block[r][0], w[0], x[r]);
                block[r][1] = isa.dot(block[r][1], w[1], x[r]);
            }
        }
        ahead.ask::<I, 2>(isa);
        let scales = [isa.load_line(&scales[0]), isa.load_line(&scales[1])];
        for r in 0..R {
            sums[r][0] = isa.fused(block[r][0], scales[0], sums[r][0]);
            sums[r][1] = isa.fused(block[r][1], scales[1], sums[r][1]);
        }
    }
    sums
}

/// Integer sums block by block, scaled by the weights' scales, and group by group by those of the
/// rows. Scaled and added in one rounding, in one order: the same bits on every processor. It is
/// the number of operations beside the integer products that limits the pace, more than what each
/// of them is, so a multiplication and an addition apart would cost a tenth of it.
#[inline(always)]
fn tile_int8<I: Isa, const R: usize, const LINES: usize>(
    isa: I,
    panel: &[Line],
    mut ahead: Ahead,
    x: &[u32],
) -> Sums<I, R> {
    let mut sums = [[isa.splat(0.0); 2]; R];
    let blocks = panel.as_chunks::<LINES>().0;
    let groups = x.as_chunks::<GROUP_WORDS>().0.as_chunks::<R>().0;
    for (lines, x) in blocks.as_chunks::<2>().0.iter().zip(groups) {
        ahead.ask::<I, LINES>(isa);
        let first = block_sums::<I, R, LINES>(isa, &lines[0], x, 0);
        let scales = isa.widen(&lines[0][0]);
        let mut group = [[isa.splat(0.0); 2]; R];
        for r in 0..R {
            for half in 0..2 {
                group[r][half] = isa.mul(isa.to_floats(first[r][half]), scales[half]);
            }
        }
        ahead.ask::<I, LINES>(isa);
        let second = block_sums::<I, R, LINES>(isa, &lines[1], x, 1);
        let scales = isa.widen(&lines[1][0]);
        for r in 0..R {
            let row_scale = isa.splat(f32::from_bits(x[r][0]));
            for half in 0..2 {
                let second = isa.to_floats(second[r][half]);
                group[r][half] = isa.fused(second, scales[half], group[r][half]);
                sums[r][half] = isa.fused(group[r][half], row_scale, sums[r][half]);
            }
        }
    }
    sums
}

/// The exact integer sums of a block.
#[inline(always)]
fn block_sums<I: Isa, const R: usize, const LINES: usize>(
    isa: I,
    lines: &[Line; LINES],
    groups: &[[u32; GROUP_WORDS]; R],
    block: usize,
) -> [[I::Ints; 2]; R] {
    let at = 1 + block * BLOCK_WORDS;
    let mut ints = [[isa.splat_int(0); 2]; R];
    for r in 0..R {
        ints[r] = [isa.splat_int(groups[r][at].cast_signed()); 2];
    }
    for four in 0..BLOCK_WORDS - 1 {
        let w = four_weights::<I, LINES>(isa, lines, four);
        for r in 0..R {
            let x = groups[r][at + 1 + four];
            ints[r][0] = isa.dot_bytes(ints[r][0], w[0], x);
            ints[r][1] = isa.dot_bytes(ints[r][1], w[1], x);
        }
    }
    ints
}

/// The weights of four inputs, those with number `four` of a block whose lines say what it is.
#[inline(always)]
fn four_weights<I: Isa, const LINES: usize>(
    isa: I,
    lines: &[Line; LINES],
    four: usize,
) -> [I::Bytes; 2] {
    if LINES == Q4_LINES {
        isa.look_up(&CODEBOOK_UNSIGNED, &lines[1 + four])
    } else {
        [isa.load_bytes(&lines[1 + 2 * four]), isa.load_bytes(&lines[2 + 2 * four])]
    }
}

/// Adds the products of one input: `w` holds its 32 weights, `x` its value in each row.
#[inline(always)]
fn accumulate<I: Isa, const R: usize>(isa: I, sums: &mut Sums<I, R>, w: [I::V; 2], x: &[u32; R]) {
    for r in 0..R {
        let x = isa.splat(f32::from_bits(x[r]));
        sums[r][0] = isa.fma(w[0], x, sums[r][0]);
        sums[r][1] = isa.fma(w[1], x, sums[r][1]);
    }
}
