//! Rows times a packed matrix.
//!
//! The micro-kernel multiplies a tile of rows with a panel of weights, both read in one stream. It
//! keeps the 32 outputs of each row in registers from the first input to the last: an output is one
//! chain of additions in the order of the inputs, whatever the number of rows. The micro-kernels
//! for 1 row and for 12 are the same lines of source.
//!
//! A task is one panel, multiplied with all tiles while its weights are in cache. The micro-kernel
//! keeps the multipliers busy as long as weights come from a cache, so those of the thread's next
//! panel are asked for while this one is multiplied, see [`Ahead`].

use super::super::matrix::{Layout, Matrix, PANEL, Q4_LINES, Q8_LINES};
use super::super::memory::Line;
use super::super::pool::Scatter;
use super::super::quantise::{BLOCK_WORDS, CODEBOOK_UNSIGNED, GROUP_WORDS};
use super::Cpu;
use super::isa::Isa;
use super::scratch::Buffer;
use super::tile::{Block, Tiles, for_rows, pack_tile, tile_rows};

/// Most rows for which reading the weights takes longer than multiplying them.
pub const LIGHT_ROWS_MAX: usize = 4;

/// Multiplications below which waking a thread costs more than it brings.
const PARALLEL_MIN: usize = 1 << 17;

/// `y = x * w^T` for each matrix, see [`super::super::Kernels::matmul_many`].
pub fn matmul<I: Isa>(cpu: &Cpu<I>, x: &[f32], products: &mut [(&Matrix, &mut [f32])]) {
    let Some((first, _)) = products.first() else { return };
    let (inputs, layout) = (first.in_features(), first.layout());
    let rows = x.len() / inputs;
    assert_eq!(x.len(), rows * inputs, "x of {inputs} inputs");
    for (w, y) in products.iter() {
        assert_eq!(w.in_features(), inputs, "inputs");
        assert!(w.layout().packs_rows_as(layout), "matrices packed by one function");
        assert_eq!(y.len(), rows * w.out_features(), "y of {} outputs", w.out_features());
    }
    let outputs: usize = products.iter().map(|(w, _)| w.out_features()).sum();
    let parallel = rows * inputs * outputs >= PARALLEL_MIN;

    let tiles = Tiles::new(rows, tile_rows::<I>(layout), layout.words(inputs));
    let mut packed = cpu.words.take(tiles.total());
    let out = Scatter::new(&mut packed);
    let light = rows <= LIGHT_ROWS_MAX;
    cpu.run(parallel && !light, tiles.count(), |t| {
        let ((first, count), (at, len)) = (tiles.tile(t), tiles.span(t));
        // SAFETY: tiles do not overlap, and each is given to one task.
        let out = unsafe { out.slice(at, len) };
        pack_tile(cpu.isa, layout, count, |r| &x[(first + r) * inputs..][..inputs], out);
    });

    let panels = |i: usize, w: &Matrix| (0..w.panels()).map(move |p| (i, p));
    let tasks: Vec<(usize, usize)> =
        products.iter().enumerate().flat_map(|(i, (w, _))| panels(i, w)).collect();
    let products: Vec<(&Matrix, Scatter<'_, f32>)> =
        products.iter_mut().map(|(w, y)| (*w, Scatter::new(y))).collect();
    cpu.run_neighbours(parallel, light, tasks.len(), |task| {
        let (i, p) = tasks[task];
        let (w, y) = &products[i];
        let next = tasks.get(cpu.next_task(task)).map(|(i, p)| products[*i].0.panel(*p));
        multiply_panel(cpu, w, p, Upcoming::new(light, next), &tiles, &packed, y);
    });
}

/// Multiplies all tiles with panel `p` and writes its columns of `y`, which no one else touches.
fn multiply_panel<I: Isa>(
    cpu: &Cpu<I>,
    w: &Matrix,
    p: usize,
    upcoming: Upcoming<'_>,
    tiles: &Tiles,
    packed: &[u32],
    y: &Scatter<'_, f32>,
) {
    let (panel, columns) = (Panel::new(cpu, w, p, tiles), w.panel_outputs(p));
    let mut block = Block::ZERO;
    for t in 0..tiles.count() {
        let ((first, count), (at, len)) = (tiles.tile(t), tiles.span(t));
        let ahead = upcoming.ahead(&panel, t, tiles);
        // SAFETY: no two tasks have a column in common.
        let row =
            |r| unsafe { y.slice((first + r) * w.out_features() + columns.start, columns.len()) };
        panel.multiply_to(cpu.isa, count, ahead, &packed[at..at + len], &mut block, row);
    }
}

/// A panel in the form that it is multiplied in.
pub struct Panel<'a> {
    layout: Layout,
    stored: &'a [Line],
    /// Weights of 8 bits that were 4 bits, where many tiles would expand them again and again.
    expanded: Option<Buffer<'a, Line>>,
}

/// From this many tiles on, expanding weights once costs less than doing it for each.
const EXPAND_TILES_MIN: usize = 3;

impl<'a> Panel<'a> {
    /// Panel `p` of `w`, to be multiplied with all of `tiles`.
    pub fn new<I: Isa>(cpu: &'a Cpu<I>, w: &'a Matrix, p: usize, tiles: &Tiles) -> Self {
        let (layout, stored) = (w.layout(), w.panel(p));
        if layout != Layout::Q4 || tiles.count() < EXPAND_TILES_MIN {
            return Self { layout, stored, expanded: None };
        }
        let mut expanded = cpu.lines.take(stored.len() / Q4_LINES * Q8_LINES);
        expand(cpu.isa, stored, &mut expanded);
        Self { layout: Layout::Q8, stored, expanded: Some(expanded) }
    }

    fn lines(&self) -> &[Line] {
        self.expanded.as_deref().unwrap_or(self.stored)
    }

    /// Multiplies a packed tile with as many rows as `out`.
    pub fn multiply<I: Isa>(&self, isa: I, ahead: Ahead, x: &[u32], out: &mut [&mut [f32; PANEL]]) {
        let (layout, lines) = (self.layout, self.lines());
        for_rows!(I, out.len(), R => {
            let out = out.first_chunk_mut().expect("as many as were just counted");
            tile::<I, R>(isa, layout, lines, ahead, x, out);
        });
    }

    /// The same with the first outputs of row `r` written to `row(r)`: at once where that has room
    /// for all, as nearly always; else by way of `block`.
    #[inline]
    pub fn multiply_to<'y, I: Isa>(
        &self,
        isa: I,
        rows: usize,
        ahead: Ahead,
        x: &[u32],
        block: &mut Block,
        row: impl Fn(usize) -> &'y mut [f32],
    ) {
        let mut out = block.rows();
        let mut whole = true;
        for (r, out) in out[..rows].iter_mut().enumerate() {
            match row(r).try_into() {
                Ok(row) => *out = row,
                Err(_) => whole = false,
            }
        }
        self.multiply(isa, ahead, x, &mut out[..rows]);
        if !whole {
            for (r, values) in block.0[..rows].iter().enumerate() {
                let row = row(r);
                row.copy_from_slice(&values[..row.len()]);
            }
        }
    }
}

/// Writes q4 blocks as the q8 blocks that multiply to the same bits.
fn expand<I: Isa>(isa: I, stored: &[Line], expanded: &mut [Line]) {
    isa.enter(
        #[inline(always)]
        || {
            let blocks = stored.as_chunks::<Q4_LINES>().0.iter();
            for (from, to) in blocks.zip(expanded.as_chunks_mut::<Q8_LINES>().0) {
                let ([scales, from @ ..], [to_scales, to @ ..]) = (from, to);
                *to_scales = *scales;
                for (from, to) in from.iter().zip(to.as_chunks_mut::<2>().0) {
                    let halves = isa.look_up(&CODEBOOK_UNSIGNED, from);
                    isa.store_bytes(halves[0], &mut to[0]);
                    isa.store_bytes(halves[1], &mut to[1]);
                }
            }
        },
    );
}

#[inline(never)]
fn tile<I: Isa, const R: usize>(
    isa: I,
    layout: Layout,
    panel: &[Line],
    ahead: Ahead,
    x: &[u32],
    out: &mut [&mut [f32; PANEL]; R],
) {
    isa.enter(
        #[inline(always)]
        || {
            let x = x.as_chunks::<R>().0;
            let sums = match layout {
                Layout::F32 => tile_f32(isa, panel, ahead, x),
                Layout::Bf16Widened => tile_widened(isa, panel, ahead, x),
                Layout::Bf16 => tile_bf16(isa, panel, ahead, x),
                // Larger tiles are not made, see `tile_rows`; nor is code for them.
                Layout::Q8 | Layout::Q4 if R > I::TILE_ROWS_INT8 => unreachable!("{R} rows"),
                Layout::Q8 => tile_int8::<I, R, Q8_LINES>(isa, panel, ahead, x),
                Layout::Q4 => tile_int8::<I, R, Q4_LINES>(isa, panel, ahead, x),
            };
            for (sums, out) in sums.iter().zip(out) {
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
fn tile_f32<I: Isa, const R: usize>(
    isa: I,
    panel: &[Line],
    mut ahead: Ahead,
    x: &[[u32; R]],
) -> Sums<I, R> {
    let mut sums = [[isa.splat(0.0); 2]; R];
    for (lines, x) in panel.as_chunks::<2>().0.iter().zip(x) {
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
    x: &[[u32; R]],
) -> Sums<I, R> {
    let mut sums = [[isa.splat(0.0); 2]; R];
    for (lines, x) in panel.as_chunks::<2>().0.iter().zip(x.as_chunks::<2>().0) {
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
    x: &[[u32; R]],
) -> Sums<I, R> {
    let mut sums = [[isa.splat(0.0); 2]; R];
    for (lines, x) in panel.as_chunks::<2>().0.iter().zip(x) {
        ahead.ask::<I, 2>(isa);
        let w = [isa.load_pairs(&lines[0]), isa.load_pairs(&lines[1])];
        for r in 0..R {
            sums[r][0] = isa.dot(sums[r][0], w[0], x[r]);
            sums[r][1] = isa.dot(sums[r][1], w[1], x[r]);
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
    x: &[[u32; R]],
) -> Sums<I, R> {
    let mut sums = [[isa.splat(0.0); 2]; R];
    let blocks = panel.as_chunks::<LINES>().0;
    let groups = blocks.as_chunks::<2>().0.iter().zip(x.as_chunks::<GROUP_WORDS>().0);
    for (lines, [row_scales, x @ ..]) in groups {
        let x: &[[[u32; R]; BLOCK_WORDS]] = x.as_chunks().0;
        ahead.ask::<I, LINES>(isa);
        let first = block_sums::<I, R, LINES>(isa, &lines[0], &x[0]);
        let scales = isa.widen(&lines[0][0]);
        let mut group = [[isa.splat(0.0); 2]; R];
        for r in 0..R {
            for half in 0..2 {
                group[r][half] = isa.mul(isa.to_floats(first[r][half]), scales[half]);
            }
        }
        ahead.ask::<I, LINES>(isa);
        let second = block_sums::<I, R, LINES>(isa, &lines[1], &x[1]);
        let scales = isa.widen(&lines[1][0]);
        for r in 0..R {
            let row_scale = isa.splat(f32::from_bits(row_scales[r]));
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
    [corrections, x @ ..]: &[[u32; R]; BLOCK_WORDS],
) -> [[I::Ints; 2]; R] {
    let mut ints = [[isa.splat_int(0); 2]; R];
    for r in 0..R {
        ints[r] = [isa.splat_int(corrections[r].cast_signed()); 2];
    }
    for (k, x) in x.iter().enumerate() {
        let w = four_weights::<I, LINES>(isa, lines, k);
        for r in 0..R {
            ints[r][0] = isa.dot_bytes(ints[r][0], w[0], x[r]);
            ints[r][1] = isa.dot_bytes(ints[r][1], w[1], x[r]);
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

/// What a thread reads after a panel, as far as that is known.
#[derive(Clone, Copy)]
pub enum Upcoming<'a> {
    /// What follows in memory: light tasks are taken neighbour by neighbour.
    Neighbour,
    /// This panel, read after all tiles have gone through the current one.
    Panel(&'a [Line]),
    /// Nothing.
    End,
}

impl<'a> Upcoming<'a> {
    /// What follows a task that is `light`, or has all tiles go through it before `next`.
    pub fn new(light: bool, next: Option<&'a [Line]>) -> Self {
        match next {
            _ if light => Self::Neighbour,
            Some(next) => Self::Panel(next),
            None => Self::End,
        }
    }

    /// What to ask for while tile `t` is multiplied with `panel`.
    pub fn ahead(self, panel: &Panel<'_>, t: usize, tiles: &Tiles) -> Ahead {
        const LINE_BYTES: usize = size_of::<Line>();
        let lines_ahead = prefetch_lines(panel.layout);
        let panel = panel.lines();
        match self {
            Self::Neighbour => Ahead::new(panel.as_ptr().wrapping_add(lines_ahead), LINE_BYTES),
            Self::Panel(next) => {
                // Evenly, so that memory is as busy with the first tile as with the last.
                let shares = tiles.count().min(SHARES_MAX);
                let share = next.len() * LINE_BYTES / (shares * panel.len()).max(1);
                let at = next.as_ptr().wrapping_byte_add(t * share * panel.len());
                Ahead::new(at, if t < shares { share } else { 0 })
            }
            Self::End => Ahead::new(panel.as_ptr(), 0),
        }
    }
}

/// How far ahead weights that follow in memory are asked for, in lines. It bridges the ends of
/// pages, where the processor's own prefetching stops. What is asked for past the last panel of a
/// share is another thread's and in vain. Measured: with one row, 72 lines instead of 48 bring q4 and
/// bf16 about 2 %, and cost q8 1 %.
fn prefetch_lines(layout: Layout) -> usize {
    match layout {
        Layout::Bf16 | Layout::Q4 => 72,
        Layout::F32 | Layout::Bf16Widened | Layout::Q8 => 48,
    }
}

/// Most tiles over which asking for a panel is spread: a line is asked for once, and shares of less
/// than a few bytes a line would leave its end out.
const SHARES_MAX: usize = 16;

/// Weights to ask for while others are multiplied: for each line that is read, `share` bytes more.
/// Never read through: it may point past the weights.
#[derive(Clone, Copy)]
pub struct Ahead {
    /// The next line to ask for.
    at: *const Line,
    /// Up to where lines are due.
    due: *const Line,
    share: usize,
}

impl Ahead {
    fn new(at: *const Line, share: usize) -> Self {
        Self { at, due: at, share }
    }

    /// Asks for what is due when `N` lines are read.
    #[inline(always)]
    fn ask<I: Isa, const N: usize>(&mut self, isa: I) {
        self.due = self.due.wrapping_byte_add(N * self.share);
        if self.share == size_of::<Line>() {
            // The same as below, without a branch for each line where rows are few.
            for line in 0..N {
                isa.prefetch(self.at.wrapping_add(line));
            }
            self.at = self.due;
        }
        while self.at < self.due {
            isa.prefetch(self.at);
            self.at = self.at.wrapping_add(1);
        }
    }
}
