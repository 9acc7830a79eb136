//! Gated feed-forward of several experts in one call.
//!
//! Three parallel loops, over all groups at once, so that experts with few rows still fill the
//! threads: gather rows into tiles; gate, up and activation panel by panel, each panel's result
//! going straight into the tile form that `down` reads; down, to the destination rows. In decoding
//! the intermediate values stay in the second-level cache, in prefill in the third.
//!
//! A task is one panel of one group (two panels where their outputs are quantised together),
//! whatever the number of threads and groups, so who computes a
//! value never shows in it.

use std::ops::Range;

use entente_proto::frame::Dtype;

use super::super::matrix::{GROUP_PANELS_MAX, PANEL};
use super::super::pool::Scatter;
use super::super::{Activation, FfnGroup, GatedFfn, Matrix};
use super::Cpu;
use super::elementwise::silu;
use super::isa::{Isa, LANES};
use super::matmul::{LIGHT_ROWS_MAX, Panel, Upcoming};
use super::rows::encode;
use super::tile::{Block, TILE_ROWS_MAX, Tiles, pack_encoded_tile, pack_tile, tile_rows};

/// Rows that go through together: bounds the intermediate values, which are rows times inner.
const PASS_ROWS: usize = 512;

/// Rows of one group.
type Part<'a> = (&'a GatedFfn, &'a [(u32, u32)]);

/// A part that is computed in the current pass.
struct Section<'a> {
    ffn: &'a GatedFfn,
    rows: &'a [(u32, u32)],
    input: Tiles,
    inner: Tiles,
    /// First word of the input tiles among those of the pass.
    input_at: usize,
    /// The same for the inner tiles.
    inner_at: usize,
}

/// What a thread reads after a group of panels.
#[derive(Clone, Copy)]
enum Next<'a> {
    /// What follows in memory.
    Neighbour,
    /// This group of a section.
    Group(&'a Section<'a>, usize),
    /// This panel of the first section's `down`, if it has so many.
    Down(&'a Matrix, usize),
}

impl<'a> Next<'a> {
    /// What is read after panel `i` of a group, of `gate` (the first of the two) or of `up`.
    fn after(self, gate: bool, i: usize) -> Upcoming<'a> {
        let panel = match self {
            Self::Neighbour => return Upcoming::Neighbour,
            Self::Group(section, g) => {
                let matrix = if gate { &section.ffn.gate } else { &section.ffn.up };
                section.group(g).nth(i).map(|p| matrix.panel(p))
            }
            Self::Down(down, p) if p < down.panels() => {
                let (left, right) = down.panel(p).split_at(down.panel(p).len() / 2);
                Some(if gate { left } else { right })
            }
            Self::Down(..) => None,
        };
        Upcoming::new(false, panel)
    }
}

/// See [`super::super::Kernels::gated_ffn`].
pub fn gated_ffn<I: Isa>(cpu: &Cpu<I>, x: Input<'_>, groups: &[FfnGroup<'_>], y: &Output<'_>) {
    check(&x, groups, y);
    let mut pass: Vec<Part<'_>> = Vec::with_capacity(groups.len());
    let mut room = PASS_ROWS;
    for group in groups {
        let mut rows = group.rows;
        while !rows.is_empty() {
            let (now, later) = rows.split_at(rows.len().min(room));
            pass.push((group.ffn, now));
            rows = later;
            room -= now.len();
            if room == 0 {
                run_pass(cpu, &x, &pass, y);
                pass.clear();
                room = PASS_ROWS;
            }
        }
    }
    run_pass(cpu, &x, &pass, y);
}

/// Shapes agree, rows exist, and no destination is named twice, which the threads rely on.
fn check(x: &Input<'_>, groups: &[FfnGroup<'_>], y: &Output<'_>) {
    let Some(first) = groups.first() else { return };
    let hidden = first.ffn.gate.in_features();
    let (x_rows, y_rows) = (x.rows(hidden), y.rows(hidden));
    let mut written = vec![false; y_rows];
    for FfnGroup { ffn, rows } in groups {
        let inner = ffn.down.in_features();
        let shape = |m: &Matrix| (m.out_features(), m.in_features());
        assert_eq!(shape(&ffn.gate), (inner, hidden), "gate");
        assert_eq!(shape(&ffn.up), (inner, hidden), "up");
        assert_eq!(shape(&ffn.down), (hidden, inner), "down");
        assert_eq!(ffn.gate.layout(), ffn.up.layout(), "gate and up are packed alike");
        for (from, to) in *rows {
            assert!((*from as usize) < x_rows, "source row {from} of {x_rows}");
            let written = &mut written[*to as usize];
            assert!(!std::mem::replace(written, true), "destination row {to} is named twice");
        }
    }
}

fn run_pass<I: Isa>(cpu: &Cpu<I>, x: &Input<'_>, parts: &[Part<'_>], y: &Output<'_>) {
    let (mut input_at, mut inner_at) = (0, 0);
    let mut sections = Vec::with_capacity(parts.len());
    for &(ffn, rows) in parts {
        let rows_max = tile_rows::<I>(ffn.gate.layout());
        let tiles =
            |m: &Matrix| Tiles::new(rows.len(), rows_max, m.layout().words(m.in_features()));
        let (input, inner) = (tiles(&ffn.gate), tiles(&ffn.down));
        sections.push(Section { ffn, rows, input, inner, input_at, inner_at });
        input_at += input.total();
        inner_at += inner.total();
    }
    let mut input = cpu.words.take(input_at);
    let mut inner = cpu.words.take(inner_at);

    let light = sections.iter().all(|section| section.rows.len() <= LIGHT_ROWS_MAX);
    let out = Scatter::new(&mut input);
    let tasks = tasks_of(&sections, |s| s.input.count());
    // A few rows are packed sooner than another thread is woken.
    cpu.run(!light, tasks.len(), |i| sections[tasks[i].0].gather(cpu.isa, x, tasks[i].1, &out));
    let out = Scatter::new(&mut inner);
    let tasks = tasks_of(&sections, |s| s.inner_groups());
    cpu.run_neighbours(true, light, tasks.len(), |i| {
        let next = match tasks.get(cpu.next_task(i)) {
            _ if light => Next::Neighbour,
            Some((s, g)) => Next::Group(&sections[*s], *g),
            None => Next::Down(&sections[0].ffn.down, cpu.next_task(i) - tasks.len()),
        };
        sections[tasks[i].0].expand(cpu, &input, tasks[i].1, next, &out);
    });
    let tasks = tasks_of(&sections, |s| s.ffn.down.panels());
    cpu.run_neighbours(true, light, tasks.len(), |i| {
        let next = tasks.get(cpu.next_task(i)).map(|(s, p)| sections[*s].ffn.down.panel(*p));
        let upcoming = Upcoming::new(light, next);
        sections[tasks[i].0].contract(cpu, &inner, tasks[i].1, upcoming, y);
    });
}

/// Every section with each of its `count` parts, neighbours beside each other.
fn tasks_of(
    sections: &[Section<'_>],
    count: impl Fn(&Section<'_>) -> usize,
) -> Vec<(usize, usize)> {
    let parts = |(s, section)| (0..count(section)).map(move |part| (s, part));
    sections.iter().enumerate().flat_map(parts).collect()
}

impl Section<'_> {
    /// Packs tile `t` of the source rows.
    fn gather<I: Isa>(&self, isa: I, x: &Input<'_>, t: usize, out: &Scatter<'_, u32>) {
        let ((first, count), (at, len)) = (self.input.tile(t), self.input.span(t));
        let (layout, hidden) = (self.ffn.gate.layout(), self.ffn.gate.in_features());
        let rows = &self.rows[first..first + count];
        // SAFETY: tiles do not overlap, and each is given to one task.
        let out = unsafe { out.slice(self.input_at + at, len) };
        let source = |r: usize| rows[r].0 as usize;
        match x {
            Input::Values(x) => {
                pack_tile(isa, layout, count, |r| &x[source(r) * hidden..][..hidden], out);
            }
            Input::Encoded(_, x) => pack_encoded_tile(isa, layout, count, |r| x[source(r)], out),
        }
    }

    /// Groups of panels of `gate` and `up` that become inputs of `down` together.
    fn inner_groups(&self) -> usize {
        self.ffn.gate.panels().div_ceil(self.ffn.down.layout().group_panels())
    }

    /// The panels of group `g` of `gate` and `up`.
    fn group(&self, g: usize) -> Range<usize> {
        let panels = self.ffn.down.layout().group_panels();
        g * panels..((g + 1) * panels).min(self.ffn.gate.panels())
    }

    /// Group `g` of `activation(gate(x), up(x))`, for all tiles, packed for `down`.
    fn expand<I: Isa>(
        &self,
        cpu: &Cpu<I>,
        input: &[u32],
        g: usize,
        next: Next<'_>,
        out: &Scatter<'_, u32>,
    ) {
        let GatedFfn { gate, up, down, activation } = self.ffn;
        let panels = self.group(g);
        let (start, end) = (panels.start * PANEL, gate.out_features().min(panels.end * PANEL));
        let ready = |m, p| Panel::new(cpu, m, p, &self.input);
        let weights: [Option<[Panel<'_>; 2]>; GROUP_PANELS_MAX] = std::array::from_fn(|i| {
            let p = panels.clone().nth(i)?;
            Some([ready(gate, p), ready(up, p)])
        });
        let (mut block, mut ups, mut joined) = (Block::ZERO, Block::ZERO, Joined::ZERO);
        for t in 0..self.input.count() {
            let ((_, count), (at, len)) = (self.input.tile(t), self.input.span(t));
            let x = &input[self.input_at + at..][..len];
            for (i, [gate, up]) in weights.iter().flatten().enumerate() {
                let ahead = next.after(true, i).ahead(gate, t, &self.input);
                gate.multiply(cpu.isa, ahead, x, &mut block.rows()[..count]);
                let ahead = next.after(false, i).ahead(up, t, &self.input);
                up.multiply(cpu.isa, ahead, x, &mut ups.rows()[..count]);
                join(cpu.isa, *activation, count, &block, &ups, i, &mut joined);
            }
            // A tile is stored input by input, so a group's part of it is contiguous.
            let at = self.inner_at + self.inner.span(t).0 + count * down.layout().words(start);
            let len = count * down.layout().words(end - start);
            // SAFETY: no two tasks have a tile and a group in common.
            let out = unsafe { out.slice(at, len) };
            pack_tile(cpu.isa, down.layout(), count, |r| &joined.0[r][..end - start], out);
        }
    }

    /// Panel `p` of `down(inner)`, for all tiles, to the destination rows.
    fn contract<I: Isa>(
        &self,
        cpu: &Cpu<I>,
        inner: &[u32],
        p: usize,
        upcoming: Upcoming<'_>,
        y: &Output<'_>,
    ) {
        let down = &self.ffn.down;
        let (panel, columns) = (Panel::new(cpu, down, p, &self.inner), down.panel_outputs(p));
        let mut block = Block::ZERO;
        for t in 0..self.inner.count() {
            let ((first, count), (at, len)) = (self.inner.tile(t), self.inner.span(t));
            let x = &inner[self.inner_at + at..][..len];
            let ahead = upcoming.ahead(&panel, t, &self.inner);
            let at =
                |r: usize| self.rows[first + r].1 as usize * down.out_features() + columns.start;
            match y {
                Output::Values(y) => {
                    // SAFETY: destination rows are distinct, and no two tasks of a section have a
                    // column in common.
                    let row = |r| unsafe { y.slice(at(r), columns.len()) };
                    panel.multiply_to(cpu.isa, count, ahead, x, &mut block, row);
                }
                Output::Encoded(dtype, y) => {
                    panel.multiply(cpu.isa, ahead, x, &mut block.rows()[..count]);
                    let size = dtype.size();
                    for (r, values) in block.0[..count].iter().enumerate() {
                        // SAFETY: as above; each value has its own bytes.
                        let out = unsafe { y.slice(at(r) * size, columns.len() * size) };
                        encode(cpu.isa, *dtype, &values[..columns.len()], out);
                    }
                }
            }
        }
    }
}

/// Rows to compute, as they are at hand.
pub enum Input<'a> {
    /// `[rows, hidden]`.
    Values(&'a [f32]),
    /// One slice a row.
    Encoded(Dtype, &'a [&'a [u8]]),
}

impl Input<'_> {
    fn rows(&self, hidden: usize) -> usize {
        match self {
            Self::Values(values) => {
                assert_eq!(values.len() % hidden, 0, "rows of {hidden} values");
                values.len() / hidden
            }
            Self::Encoded(dtype, rows) => {
                let len = hidden * dtype.size();
                assert!(rows.iter().all(|row| row.len() == len), "rows of {hidden} values");
                rows.len()
            }
        }
    }
}

/// Rows to write, in the same form as the input.
pub enum Output<'a> {
    /// `[assignments, hidden]`.
    Values(Scatter<'a, f32>),
    /// The same, rounded.
    Encoded(Dtype, Scatter<'a, u8>),
}

impl Output<'_> {
    fn rows(&self, hidden: usize) -> usize {
        let (len, value) = match self {
            Self::Values(values) => (values.len(), 1),
            Self::Encoded(dtype, bytes) => (bytes.len(), dtype.size()),
        };
        assert_eq!(len % (hidden * value), 0, "rows of {hidden} values");
        len / (hidden * value)
    }
}

/// The intermediate values of a tile in a group of panels.
#[repr(align(64))]
struct Joined([[f32; GROUP_PANELS_MAX * PANEL]; TILE_ROWS_MAX]);

impl Joined {
    const ZERO: Self = Self([[0.0; GROUP_PANELS_MAX * PANEL]; TILE_ROWS_MAX]);
}

/// `activation(gate, up)` of the first `rows` rows, as panel `i` of `joined`.
fn join<I: Isa>(
    isa: I,
    activation: Activation,
    rows: usize,
    gate: &Block,
    up: &Block,
    i: usize,
    joined: &mut Joined,
) {
    isa.enter(
        #[inline(always)]
        || {
            for ((gate, up), out) in gate.0.iter().zip(&up.0).zip(&mut joined.0).take(rows) {
                let out = &mut out.as_chunks_mut::<PANEL>().0[i];
                let lanes = gate.as_chunks::<LANES>().0.iter().zip(up.as_chunks().0);
                for ((gate, up), out) in lanes.zip(out.as_chunks_mut().0) {
                    let joined = match activation {
                        Activation::SwiGlu => isa.mul(silu(isa, isa.load(gate)), isa.load(up)),
                    };
                    isa.store(joined, out);
                }
            }
        },
    );
}
