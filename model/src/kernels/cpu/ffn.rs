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

use super::super::pool::Scatter;
use super::super::{Activation, FfnGroup, GatedFfn, Matrix};
use super::elementwise::silu;
use super::isa::{Isa, load_part, store_part};
use super::matmul::{LIGHT_ROWS_MAX, multiply};
use super::microkernel::Destination;
use super::prefetch::Upcoming;
use super::rows::encode;
use super::tile::{Tiles, pack_encoded_tile, pack_tile, tile_rows};
use super::{Cpu, parts_of};

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
    /// What is read after panels of `gate` (the first of the two) or of `up`.
    fn after(self, gate: bool) -> Upcoming<'a> {
        let lines = match self {
            Self::Neighbour => return Upcoming::Neighbour,
            Self::Group(section, g) => {
                let matrix = if gate { &section.ffn.gate } else { &section.ffn.up };
                Some(matrix.panel_lines(section.panels(&(g..g + 1))))
            }
            Self::Down(down, p) if p < down.panels() => {
                let lines = down.panel_lines(p..p + 1);
                let (left, right) = lines.split_at(lines.len() / 2);
                Some(if gate { left } else { right })
            }
            Self::Down(..) => None,
        };
        Upcoming::new(false, lines)
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
    let tasks = parts_of(sections.iter().map(|s| s.input.count()));
    // A few rows are packed sooner than another thread is woken.
    cpu.run(!light, tasks.len(), |i| sections[tasks[i].0].gather(cpu.isa, x, tasks[i].1, &out));
    let out = Scatter::new(&mut inner);
    let tasks = parts_of(sections.iter().map(Section::inner_groups));
    cpu.run_neighbours(true, light, &tasks, |s, groups, next| {
        let next = match tasks.get(next) {
            _ if light => Next::Neighbour,
            Some((s, g)) => Next::Group(&sections[*s], *g),
            None => Next::Down(&sections[0].ffn.down, next - tasks.len()),
        };
        sections[s].expand(cpu, &input, groups, next, &out);
    });
    let tasks = parts_of(sections.iter().map(|s| s.ffn.down.panels()));
    cpu.run_neighbours(true, light, &tasks, |s, panels, next| {
        let next = tasks.get(next).map(|&(s, p)| sections[s].ffn.down.panel_lines(p..p + 1));
        sections[s].contract(cpu, &inner, panels, Upcoming::new(light, next), y);
    });
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

    /// The panels of `gate` and `up` in some groups.
    fn panels(&self, groups: &Range<usize>) -> Range<usize> {
        let panels = self.ffn.down.layout().group_panels();
        groups.start * panels..(groups.end * panels).min(self.ffn.gate.panels())
    }

    /// Some groups of `activation(gate(x), up(x))`, for all tiles, packed for `down`.
    fn expand<I: Isa>(
        &self,
        cpu: &Cpu<I>,
        input: &[u32],
        groups: Range<usize>,
        next: Next<'_>,
        out: &Scatter<'_, u32>,
    ) {
        let GatedFfn { gate, up, down, activation } = self.ffn;
        let panels = self.panels(&groups);
        let outputs = gate.outputs(&panels);
        let x = &input[self.input_at..][..self.input.total()];
        let mut products = cpu.products.take(2 * self.rows.len() * outputs.len());
        let (joined, linear) = products.split_at_mut(self.rows.len() * outputs.len());
        let product = |w, upcoming, values: &mut [f32]| {
            let out = Scatter::new(values);
            let to = Destination::all(&out, outputs.len());
            // SAFETY: the values are this call's alone.
            unsafe { multiply(cpu, w, panels.clone(), upcoming, &self.input, x, &to) };
        };
        product(gate, next.after(true), joined);
        product(up, next.after(false), linear);
        join(cpu.isa, *activation, joined, linear);
        for t in 0..self.inner.count() {
            // A tile is stored input by input, so some groups' part of it is contiguous.
            let (first, count) = self.inner.tile(t);
            let words = |values| count * down.layout().words(values);
            let at = self.inner_at + self.inner.span(t).0 + words(outputs.start);
            // SAFETY: no two tasks have a tile and a group in common.
            let out = unsafe { out.slice(at, words(outputs.len())) };
            let row = |r| &joined[(first + r) * outputs.len()..][..outputs.len()];
            pack_tile(cpu.isa, down.layout(), count, row, out);
        }
    }

    /// Some panels of `down(inner)`, for all tiles, to the destination rows.
    fn contract<I: Isa>(
        &self,
        cpu: &Cpu<I>,
        inner: &[u32],
        panels: Range<usize>,
        upcoming: Upcoming<'_>,
        y: &Output<'_>,
    ) {
        let (down, rows) = (&self.ffn.down, self.rows);
        let x = &inner[self.inner_at..][..self.inner.total()];
        let outputs = down.outputs(&panels);
        match y {
            Output::Values(y) => {
                let to = Destination { rows: Some(rows), ..Destination::columns(y, down, &panels) };
                // SAFETY: destination rows are distinct, and no two tasks of a section have a
                // column in common.
                unsafe { multiply(cpu, down, panels, upcoming, &self.inner, x, &to) };
            }
            Output::Encoded(dtype, y) => {
                let mut values = cpu.products.take(rows.len() * outputs.len());
                let out = Scatter::new(&mut values);
                let to = Destination::all(&out, outputs.len());
                // SAFETY: the values are this call's alone.
                unsafe { multiply(cpu, down, panels, upcoming, &self.inner, x, &to) };
                for ((_, to), values) in rows.iter().zip(values.chunks_exact(outputs.len())) {
                    let at = *to as usize * down.out_features() + outputs.start;
                    let size = dtype.size();
                    // SAFETY: as above; each value has its own bytes.
                    let out = unsafe { y.slice(at * size, values.len() * size) };
                    encode(cpu.isa, *dtype, values, out);
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

/// `gate = activation(gate, up)`, value by value.
fn join<I: Isa>(isa: I, activation: Activation, gate: &mut [f32], up: &[f32]) {
    isa.enter(
        #[inline(always)]
        || {
            let joined = |gate, up| match activation {
                Activation::SwiGlu => isa.mul(silu(isa, gate), up),
            };
            let ((gate, gate_rest), (up, up_rest)) = (gate.as_chunks_mut(), up.as_chunks());
            for (gate, up) in gate.iter_mut().zip(up) {
                isa.store(joined(isa.load(gate), isa.load(up)), gate);
            }
            let rest = joined(load_part(isa, gate_rest), load_part(isa, up_rest));
            store_part(isa, rest, gate_rest);
        },
    );
}
