//! The feed-forward of a dense layer: one expert that takes every row, of rows that are on the
//! device already and whose result stays there.

use super::buffer::{Buffer, View, ViewMut};
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
    /// The rows cut into tiles, for the layer that is computed.
    tiles: Buffer<u64>,
    /// Row `r` to row `r`, for all of them.
    assignments: Buffer<u64>,
    /// The inner state, `[rows, row_pairs(inner)]`.
    h: Buffer<u32>,
    staging: Staging,
}

impl DenseFfn {
    /// For layers of at most `inner_max` values between gate, up and down.
    ///
    /// # Errors
    /// The device has no room, or is lost.
    pub fn new(stream: &Stream, rows_max: usize, inner_max: usize) -> Result<Self, DeviceError> {
        let device = stream.device();
        let mut staging = Staging::new(device)?;
        let mut assignments = Buffer::new(device, rows_max)?;
        staging.upload(stream, assignments.view_mut(), |to| {
            to.iter_mut().zip(0..).for_each(|(to, row)| *to = row | row << 32);
        })?;
        Ok(Self {
            rows_max,
            tiles: Buffer::new(device, rows_max.div_ceil(DECODE_ROWS) * TILE_LEN)?,
            assignments,
            h: Buffer::new(device, rows_max * row_pairs(inner_max))?,
            staging,
        })
    }

    /// `y = down(silu(gate(x)) * up(x))`: `x` is `[rows, row_pairs(hidden)]` in bf16, padded with
    /// zeros, `y` is `[rows, hidden]`.
    ///
    /// # Errors
    /// The device is lost.
    ///
    /// # Panics
    /// Lengths contradict each other, there are more rows than was said or a wider inner state, or
    /// `ffn` is not on the device in one form for tensor cores.
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
        let layouts = [&ffn.gate, &ffn.up, &ffn.down].map(Matrix::layout);
        let gemms = Gemms::of(stream.device(), layouts[0]).expect("matrices for tensor cores");
        assert_eq!(layouts, [gemms.layout; 3], "one form of weights");
        let Gemm { rows: tile_rows, gate_up, down, .. } = *gemms.for_rows(rows);
        let count = rows.div_ceil(tile_rows);
        self.upload_tiles(stream, ffn, rows, tile_rows)?;
        let (tiles, h) = (self.tiles.slice(0..count * TILE_LEN), 0..rows * row_pairs(inner));
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

    fn upload_tiles(
        &mut self,
        stream: &Stream,
        ffn: &GatedFfn,
        rows: usize,
        tile_rows: usize,
    ) -> Result<(), DeviceError> {
        let [gate, up, down] = [&ffn.gate, &ffn.up, &ffn.down].map(address);
        let to = self.tiles.slice_mut(0..rows.div_ceil(tile_rows) * TILE_LEN);
        self.staging.upload(stream, to, |to| {
            let tiles = to.as_chunks_mut::<TILE_LEN>().0.iter_mut();
            for (tile, first) in tiles.zip((0..rows).step_by(tile_rows)) {
                let count = tile_rows.min(rows - first);
                *tile = [gate, up, down, first as u64 | (count as u64) << 32];
            }
        })
    }
}
