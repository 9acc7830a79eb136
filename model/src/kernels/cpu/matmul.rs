//! Rows times a packed matrix.
//!
//! The micro-kernel multiplies a tile of rows with a panel of weights, both read in one stream. It
//! keeps the 32 outputs of each row in registers from the first input to the last: an output is one
//! chain of additions in the order of the inputs, whatever the number of rows. The micro-kernels
//! for 1 row and for 12 are the same lines of source.
//!
//! A task is one panel, multiplied with all tiles while its weights are in cache.

use super::super::matrix::{Layout, Matrix};
use super::super::memory::Line;
use super::super::pool::Scatter;
use super::Cpu;
use super::isa::Isa;
use super::tile::{Block, Tiles, for_rows, pack_tile};

/// Up to this many rows, weights come from memory faster than they are used, and asking for them
/// early keeps it so across the pages, where the processor's own prefetching stops.
const PREFETCH_ROWS_MAX: usize = 4;

/// How far ahead weights are asked for, in lines.
const PREFETCH_LINES: usize = 48;

/// Multiplications below which waking a thread costs more than it brings.
const PARALLEL_MIN: usize = 1 << 17;

/// `y = x * w^T`, see [`super::super::Kernels::matmul`].
pub fn matmul<I: Isa>(cpu: &Cpu<I>, x: &[f32], w: &Matrix, y: &mut [f32]) {
    let (inputs, outputs) = (w.in_features(), w.out_features());
    let rows = x.len() / inputs;
    assert_eq!(x.len(), rows * inputs, "x of {inputs} inputs");
    assert_eq!(y.len(), rows * outputs, "y of {outputs} outputs");
    let parallel = rows * inputs * outputs >= PARALLEL_MIN;

    let layout = w.layout();
    let tiles = Tiles::new(rows, I::TILE_ROWS, layout.words(inputs));
    let mut packed = cpu.words.take(tiles.total());
    let out = Scatter::new(&mut packed);
    cpu.run(parallel, tiles.count(), |t| {
        let ((first, count), (at, len)) = (tiles.tile(t), tiles.span(t));
        // SAFETY: tiles do not overlap, and each is given to one task.
        let out = unsafe { out.slice(at, len) };
        pack_tile(cpu.isa, layout, count, |r| &x[(first + r) * inputs..][..inputs], out);
    });

    let packed = &*packed;
    let y = Scatter::new(y);
    cpu.run(parallel, w.panels(), |p| {
        let columns = w.panel_outputs(p);
        let mut block = Block::ZERO;
        for t in 0..tiles.count() {
            let ((first, count), (at, len)) = (tiles.tile(t), tiles.span(t));
            multiply(cpu.isa, layout, count, w.panel(p), &packed[at..at + len], &mut block);
            for (r, values) in block.0[..count].iter().enumerate() {
                let at = (first + r) * outputs + columns.start;
                // SAFETY: no two tasks have a column in common.
                unsafe { y.slice(at, columns.len()) }.copy_from_slice(&values[..columns.len()]);
            }
        }
    });
}

/// Multiplies a packed tile of `rows` rows with a panel.
pub fn multiply<I: Isa>(
    isa: I,
    layout: Layout,
    rows: usize,
    panel: &[Line],
    x: &[u32],
    out: &mut Block,
) {
    for_rows!(I, rows, R => tile::<I, R>(isa, layout, panel, x, out));
}

#[inline(never)]
fn tile<I: Isa, const R: usize>(
    isa: I,
    layout: Layout,
    panel: &[Line],
    x: &[u32],
    out: &mut Block,
) {
    isa.enter(
        #[inline(always)]
        || {
            let x = x.as_chunks::<R>().0;
            let sums = match layout {
                Layout::F32 => tile_f32(isa, panel, x),
                Layout::Bf16Widened => tile_widened(isa, panel, x),
                Layout::Bf16 => tile_bf16(isa, panel, x),
            };
            for (sums, out) in sums.iter().zip(&mut out.0) {
                let (halves, _) = out.as_chunks_mut::<16>();
                isa.store(sums[0], &mut halves[0]);
                isa.store(sums[1], &mut halves[1]);
            }
        },
    );
}

/// Sums of `R` rows: two registers of 16 outputs each.
type Sums<I, const R: usize> = [[<I as Isa>::V; 2]; R];

#[inline(always)]
fn tile_f32<I: Isa, const R: usize>(isa: I, panel: &[Line], x: &[[u32; R]]) -> Sums<I, R> {
    let mut sums = [[isa.splat(0.0); 2]; R];
    for (lines, x) in panel.as_chunks::<2>().0.iter().zip(x) {
        prefetch::<I, R, 2>(isa, lines);
        let w = [isa.load_line(&lines[0]), isa.load_line(&lines[1])];
        accumulate(isa, &mut sums, w, x);
    }
    sums
}

#[inline(always)]
fn tile_widened<I: Isa, const R: usize>(isa: I, panel: &[Line], x: &[[u32; R]]) -> Sums<I, R> {
    let mut sums = [[isa.splat(0.0); 2]; R];
    for (lines, x) in panel.as_chunks::<2>().0.iter().zip(x.as_chunks::<2>().0) {
        prefetch::<I, R, 2>(isa, lines);
        let [left, right] = [isa.widen(&lines[0]), isa.widen(&lines[1])];
        accumulate(isa, &mut sums, [left[0], right[0]], &x[0]);
        accumulate(isa, &mut sums, [left[1], right[1]], &x[1]);
    }
    sums
}

#[inline(always)]
fn tile_bf16<I: Isa, const R: usize>(isa: I, panel: &[Line], x: &[[u32; R]]) -> Sums<I, R> {
    let mut sums = [[isa.splat(0.0); 2]; R];
    for (lines, x) in panel.as_chunks::<2>().0.iter().zip(x) {
        prefetch::<I, R, 2>(isa, lines);
        let w = [isa.load_pairs(&lines[0]), isa.load_pairs(&lines[1])];
        for r in 0..R {
            sums[r][0] = isa.dot(sums[r][0], w[0], x[r]);
            sums[r][1] = isa.dot(sums[r][1], w[1], x[r]);
        }
    }
    sums
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

#[inline(always)]
fn prefetch<I: Isa, const R: usize, const N: usize>(isa: I, lines: &[Line; N]) {
    if R <= PREFETCH_ROWS_MAX {
        for line in lines {
            // Never read through: it may point past the panel, which is mostly the next one.
            isa.prefetch(std::ptr::from_ref(line).wrapping_add(PREFETCH_LINES));
        }
    }
}
