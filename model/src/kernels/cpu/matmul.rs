//! Rows times a packed matrix.
//!
//! A task is one panel, multiplied with all tiles while its weights are in cache; with few rows it
//! is as many neighbouring panels as a thread takes at a time. The weights that the thread reads
//! next are asked for meanwhile, see [`Upcoming`].

use std::ops::Range;

use super::super::fp8;
use super::super::matrix::{Layout, Matrix, Q4_LINES, Q8_LINES};
use super::super::memory::Line;
use super::super::pool::Scatter;
use super::super::quantise::CODEBOOK_UNSIGNED;
use super::isa::Isa;
use super::microkernel::{self, Destination, Form, Panels};
use super::prefetch::{Prefetch, Upcoming};
use super::tile::{Tiles, pack_tile, tile_rows};
use super::{Cpu, parts_of};

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

    let tasks = parts_of(products.iter().map(|(w, _)| w.panels()));
    let products: Vec<(&Matrix, Scatter<'_, f32>)> =
        products.iter_mut().map(|(w, y)| (*w, Scatter::new(y))).collect();
    cpu.run_neighbours(parallel, light, &tasks, |i, panels, next| {
        let (w, y) = &products[i];
        let next = tasks.get(next).map(|&(i, p)| products[i].0.panel_lines(p..p + 1));
        let to = Destination::columns(y, w, &panels);
        // SAFETY: no two tasks have a column in common.
        unsafe { multiply(cpu, w, panels, Upcoming::new(light, next), &tiles, &packed, &to) };
    });
}

/// From this many tiles on, expanding weights once costs less than doing it for each.
const EXPAND_TILES_MIN: usize = 3;

/// Multiplies all tiles with some neighbouring panels of `w`.
///
/// # Safety
/// No one else may use the columns of `to` meanwhile.
pub unsafe fn multiply<I: Isa>(
    cpu: &Cpu<I>,
    w: &Matrix,
    panels: Range<usize>,
    upcoming: Upcoming<'_>,
    tiles: &Tiles,
    packed: &[u32],
    to: &Destination<'_>,
) {
    let (layout, lines) = (w.layout(), w.panel_lines(panels.clone()));
    let panel_lines = lines.len() / panels.len();
    let many = tiles.count() >= EXPAND_TILES_MIN;
    let form = Form::Stored(layout);
    let expanded_form = expanded_form(layout, w.in_features()).filter(|_| many);
    if tiles.runs(packed).count() == 1 && expanded_form.is_none() {
        let panels = Panels { form, lines, panel_lines };
        // SAFETY: the caller promises it.
        return unsafe { multiply_runs(cpu.isa, panels, upcoming, tiles, packed, to) };
    }
    // All runs go through a panel, expanded once for all of them, while it is in cache.
    let mut expanded = cpu.lines.take(expanded_form.map_or(0, |(_, lines)| lines));
    for (p, lines) in lines.chunks_exact(panel_lines).enumerate() {
        let panel = match expanded_form {
            Some((form, panel_lines)) => {
                expand(cpu.isa, form, lines, &mut expanded);
                Panels { form, lines: &expanded, panel_lines }
            }
            None => Panels { form, lines, panel_lines },
        };
        let upcoming = upcoming.of_panel(p, panels.len());
        // SAFETY: the caller promises it.
        unsafe { multiply_runs(cpu.isa, panel, upcoming, tiles, packed, &to.at_panel(p)) };
    }
}

/// Multiplies the tiles of each size with `panels`.
///
/// # Safety
/// See [`multiply`].
unsafe fn multiply_runs<I: Isa>(
    isa: I,
    panels: Panels<'_>,
    upcoming: Upcoming<'_>,
    tiles: &Tiles,
    packed: &[u32],
    to: &Destination<'_>,
) {
    let prefetch = Prefetch::new(panels, tiles.count(), upcoming);
    for run in tiles.runs(packed) {
        // SAFETY: the caller promises it.
        unsafe { microkernel::multiply(isa, panels, run, &prefetch, to) };
    }
}

/// What a panel of `inputs` inputs expands to, and in how many lines; nothing for one that is best
/// multiplied as it is stored.
fn expanded_form(layout: Layout, inputs: usize) -> Option<(Form, usize)> {
    match layout {
        Layout::Q4 => Some((Form::Stored(Layout::Q8), Layout::Q8.panel_lines(inputs))),
        Layout::Fp8 => {
            let lines = Layout::Bf16.panel_lines(inputs) + fp8::scale_lines(inputs);
            Some((Form::Fp8Widened, lines))
        }
        Layout::F32 | Layout::Bf16Widened | Layout::Bf16 | Layout::Q8 => None,
    }
}

/// Writes a stored panel as one of `form`, which multiplies to the same bits.
fn expand<I: Isa>(isa: I, form: Form, stored: &[Line], expanded: &mut [Line]) {
    isa.enter(
        #[inline(always)]
        || match form {
            Form::Fp8Widened => widen_fp8(isa, stored, expanded),
            Form::Stored(_) => expand_q4(isa, stored, expanded),
        },
    );
}

#[inline(always)]
fn expand_q4<I: Isa>(isa: I, stored: &[Line], expanded: &mut [Line]) {
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
}

#[inline(always)]
fn widen_fp8<I: Isa>(isa: I, stored: &[Line], expanded: &mut [Line]) {
    // Each line of codes becomes two, and those of scales stay as they are.
    let (codes, scales) = stored.split_at(expanded.len() - stored.len());
    let (wide, to_scales) = expanded.split_at_mut(2 * codes.len());
    for (from, to) in codes.iter().zip(wide.as_chunks_mut::<2>().0) {
        *to = isa.widen_e4m3(from);
    }
    to_scales.copy_from_slice(scales);
}
