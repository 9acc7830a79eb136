//! The feed-forward of dense layers: each is one expert that takes every row, of rows that are on the
//! device already and whose result stays there.
//!
//! The kernels find rows and weights by tiles, which lie in device memory. Those of a whole step are
//! brought there before it, so that what follows is launches alone and can be captured ([`Graph`]).
//!
//! [`Graph`]: super::Graph

use super::buffer::{Buffer, View, ViewMut};
use super::device::Device;
use super::gemm::{Gemm, Gemms};
use super::geometry::DECODE_ROWS;
use super::kernel::Launch;
use super::ops::{address, row_pairs};
use super::staging::Staging;
use super::stream::Stream;
use crate::kernels::{DeviceError, GatedFfn, Matrix};

/// Values of `FfnTile` in `ffn.cu`, see [`super::experts`].
const TILE_LEN: usize = 4;

/// Memory for the dense layers of a model, set aside for as many rows as a step may have.
pub struct DenseFfn {
    rows_max: usize,
    /// The rows of each call cut into tiles, one call after the other.
    tiles: Buffer<u64>,
    calls: Vec<Call>,
    /// Row `r` to row `r`, for all of them.
    assignments: Buffer<u64>,
    /// The inner state, `[rows, row_pairs(inner)]`.
    h: Buffer<u32>,
    staging: Staging,
}

/// A feed-forward of so many rows, and where its tiles lie.
#[derive(Clone, Copy)]
struct Call {
    /// Where gate, up and down are.
    weights: [u64; 3],
    rows: usize,
    gemm: Gemm,
    first_tile: usize,
}

impl Call {
    fn tiles(&self) -> usize {
        self.rows.div_ceil(self.gemm.rows)
    }

    fn write_tiles(&self, tiles: &mut [[u64; TILE_LEN]]) {
        let [gate, up, down] = self.weights;
        for (tile, first) in tiles.iter_mut().zip((0..self.rows).step_by(self.gemm.rows)) {
            let count = self.gemm.rows.min(self.rows - first);
            *tile = [gate, up, down, first as u64 | (count as u64) << 32];
        }
    }
}

/// The kernels for a feed-forward.
fn gemms(device: &Device, ffn: &GatedFfn) -> Gemms {
    let layouts = [&ffn.gate, &ffn.up, &ffn.down].map(Matrix::layout);
    let gemms = Gemms::of(device, layouts[0]).expect("matrices for tensor cores");
    assert_eq!(layouts, [gemms.layout; 3], "one form of weights");
    gemms
}

fn weights(ffn: &GatedFfn) -> [u64; 3] {
    [&ffn.gate, &ffn.up, &ffn.down].map(address)
}

impl DenseFfn {
    /// For so many layers of at most `inner_max` values between gate, up and down, and steps of at
    /// most `rows_max` rows in at most `parts_max` parts.
    ///
    /// # Errors
    /// The device has no room, or is lost.
    pub fn new(
        stream: &Stream,
        layers: usize,
        [rows_max, parts_max]: [usize; 2],
        inner_max: usize,
    ) -> Result<Self, DeviceError> {
        let device = stream.device();
        let mut staging = Staging::new(device)?;
        let mut assignments = Buffer::new(device, rows_max)?;
        staging.upload(stream, assignments.view_mut(), |to| {
            to.iter_mut().zip(0..).for_each(|(to, row)| *to = row | row << 32);
        })?;
        // Each part may end with a tile that is not full.
        let tiles_max = layers * (rows_max.div_ceil(DECODE_ROWS) + parts_max);
        let mut tiles = Buffer::new(device, tiles_max * TILE_LEN)?;
        staging.upload(stream, tiles.view_mut(), |_| {})?;
        let h = Buffer::new(device, rows_max * row_pairs(inner_max))?;
        Ok(Self { rows_max, tiles, calls: Vec::new(), assignments, h, staging })
    }

    /// Makes ready for [`DenseFfn::run`] of each of `ffns` with each of these numbers of rows, and
    /// for no other call.
    ///
    /// # Errors
    /// The device is lost.
    ///
    /// # Panics
    /// They are more than was said, or not on the device in one form for tensor cores.
    pub fn cut<'a>(
        &mut self,
        stream: &Stream,
        ffns: impl Iterator<Item = &'a GatedFfn>,
        parts: &[usize],
    ) -> Result<(), DeviceError> {
        let device = stream.device();
        let mut first_tile = 0;
        self.calls.clear();
        for ffn in ffns {
            let gemms = gemms(device, ffn);
            for rows in parts.iter().copied() {
                let gemm = *gemms.for_rows(rows);
                let call = Call { weights: weights(ffn), rows, gemm, first_tile };
                first_tile += call.tiles();
                self.calls.push(call);
            }
        }
        let to = self.tiles.slice_mut(0..first_tile * TILE_LEN);
        self.staging.upload(stream, to, |to| {
            let tiles = to.as_chunks_mut::<TILE_LEN>().0;
            for call in &self.calls {
                call.write_tiles(&mut tiles[call.first_tile..]);
            }
        })
    }

    /// `y = down(silu(gate(x)) * up(x))`: `x` is `[rows, row_pairs(hidden)]` in bf16, padded with
    /// zeros, `y` is `[rows, hidden]`.
    ///
    /// # Errors
    /// The device is lost.
    ///
    /// # Panics
    /// Lengths contradict each other, this call was not made ready ([`DenseFfn::cut`]), or the inner
    /// state is wider than was said.
    pub fn run(
        &mut self,
        stream: &Stream,
        ffn: &GatedFfn,
        x: View<'_, u32>,
        rows: usize,
        y: ViewMut<'_, f32>,
    ) -> Result<(), DeviceError> {
        let (hidden, inner) = (ffn.gate.in_features(), ffn.gate.out_features());
        let shapes = [&ffn.gate, &ffn.up, &ffn.down].map(|m| (m.out_features(), m.in_features()));
        assert_eq!(shapes, [(inner, hidden), (inner, hidden), (hidden, inner)], "one feed-forward");
        assert_eq!(x.len(), rows * row_pairs(hidden), "{rows} rows of {hidden} values in bf16");
        assert_eq!(y.len(), rows * hidden, "{rows} rows of {hidden} values");
        assert!(rows <= self.rows_max, "{rows} rows of at most {}", self.rows_max);
        let own = (weights(ffn), rows);
        let call = self.calls.iter().find(|call| (call.weights, call.rows) == own);
        let call = call.expect("a call that was made ready");
        let Gemm { rows: tile_rows, gate_up, down, .. } = call.gemm;
        let count = rows.div_ceil(tile_rows);
        let tiles = call.first_tile * TILE_LEN..(call.first_tile + count) * TILE_LEN;
        let (tiles, h) = (self.tiles.slice(tiles), 0..rows * row_pairs(inner));
        let assignments = self.assignments.slice(0..rows);
        let launch = Launch::new(gate_up).input(tiles).input(assignments).input(x);
        let launch = launch.int(hidden).int(inner).output(&self.h.slice_mut(h.clone()));
        // SAFETY: the arguments of all these kernels in their order. Tiles name assignments that
        // there are, and those rows of `x` and `h` that there are; matrices have these shapes and
        // this form.
        unsafe { launch.start(stream, [gate_up.blocks(inner), count, 1]) }?;
        let launch = Launch::new(down).input(tiles).input(assignments).input(self.h.slice(h));
        let launch = launch.int(inner).int(hidden).null().output(&y);
        // SAFETY: the same, of `h` and `y`.
        unsafe { launch.start(stream, [down.blocks(hidden), count, 1]) }
    }
}
