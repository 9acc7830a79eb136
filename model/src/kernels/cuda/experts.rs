//! Experts on a device: the rows of a frame go there in one copy, through two launches for all
//! experts together, and come back in one.
//!
//! Invariant: what cuts rows into tiles and passes decides where they are computed, never how.

use std::sync::{Arc, Mutex, PoisonError};

use entente_proto::frame::Dtype;
use entente_proto::ids::KernelClass;

use super::buffer::Buffer;
use super::device::Device;
use super::gemm::{Gemm, Gemms};
use super::geometry::PREFILL_ROWS;
use super::kernel::Launch;
use super::loader::Loader;
use super::ops::{address, row_pairs};
use super::staging::Staging;
use super::stream::Stream;
use crate::kernels::matrix::Layout;
use crate::kernels::{
    DeviceError, DeviceFacts, ExpertKernels, FfnGroup, GatedFfn, Matrix, MatrixSource, SourceDtype,
    WeightFormat,
};

/// Raised whenever a change gives other bits.
const VERSION: u32 = 1;

/// Device memory for what is between the rows of a call and its result. A call that wants more is
/// computed in several passes.
const SCRATCH_BYTES_MAX: usize = 256 << 20;

/// The most tiles of a launch, a dimension of its grid.
const TILES_MAX: usize = 65_535;

/// Kernels for experts on device `ordinal`, which is opened.
///
/// # Errors
/// The device cannot be opened, or not multiply in `format`.
pub fn select(ordinal: u32, format: WeightFormat) -> Result<Arc<dyn ExpertKernels>, DeviceError> {
    // Before a device is opened that would not do.
    supported(format)?;
    experts(&Device::open(ordinal)?, format)
}

/// Kernels for experts on a device that is open.
///
/// # Errors
/// The device has no kernels for `format`, or is lost.
pub fn experts(
    device: &Arc<Device>,
    format: WeightFormat,
) -> Result<Arc<dyn ExpertKernels>, DeviceError> {
    supported(format)?;
    let (name, architecture) = (format.name(), device.architecture());
    // Not by what the checkpoint has: only exact products depend on that.
    let layout = Layout::of(format, SourceDtype::Bf16);
    Ok(Arc::new(Experts {
        class: KernelClass(format!("{name}/cuda-{architecture}/{VERSION}").replace("sm_", "sm")),
        format,
        gemms: Gemms::of(device, layout).ok_or_else(|| unsupported(format))?,
        loader: Loader::new(device, format)?,
        work: Mutex::new(Work::new(device)?),
        device: Arc::clone(device),
    }))
}

fn supported(format: WeightFormat) -> Result<(), DeviceError> {
    match format {
        WeightFormat::Bf16 | WeightFormat::Fp8 => Ok(()),
        format => Err(unsupported(format)),
    }
}

fn unsupported(format: WeightFormat) -> DeviceError {
    let name = format.name();
    DeviceError::Unsupported(format!("weights as {name}; CUDA devices multiply bf16 and fp8"))
}

/// The kernels of one device. One call at a time: the device would do a second one after it anyway.
struct Experts {
    class: KernelClass,
    format: WeightFormat,
    gemms: Gemms,
    device: Arc<Device>,
    loader: Loader,
    work: Mutex<Work>,
}

impl ExpertKernels for Experts {
    fn class(&self) -> &KernelClass {
        &self.class
    }

    fn format(&self) -> WeightFormat {
        self.format
    }

    fn row_dtype(&self) -> Dtype {
        Dtype::Bf16
    }

    fn device(&self) -> Option<&DeviceFacts> {
        Some(self.device.facts())
    }

    fn cuda_device(&self) -> Option<&Arc<Device>> {
        Some(&self.device)
    }

    fn pack(&self, source: MatrixSource<'_>) -> Result<Matrix, DeviceError> {
        self.loader.pack(source)
    }

    fn place(&self, matrix: Matrix) -> Result<Matrix, DeviceError> {
        self.loader.place(matrix)
    }

    fn gated_ffn_encoded(
        &self,
        x: &[&[u8]],
        groups: &[FfnGroup<'_>],
        y: &mut [u8],
    ) -> Result<(), DeviceError> {
        let Some(group) = groups.first() else { return Ok(()) };
        let hidden = group.ffn.gate.in_features();
        // What a panic has left is as good as before: each call writes all of what it reads.
        let mut work = self.work.lock().unwrap_or_else(PoisonError::into_inner);
        work.upload_rows(x, hidden)?;
        for pass in passes(groups, hidden, &self.gemms) {
            work.prepare(&pass, x.len(), hidden)?;
            work.launch(&pass, hidden, &self.gemms)?;
            work.download(&pass, hidden, y)?;
        }
        Ok(())
    }
}

/// Two `u32` or `int` that lie one after the other.
fn two(first: u32, second: u32) -> u64 {
    u64::from(first) | u64::from(second) << 32
}

/// Some rows of one expert, `FfnTile` in `ffn.cu`: addresses of gate, up and down, then the first of
/// its assignments and their number.
type Tile = [u64; 4];

/// A row given to an expert, `Assignment` in `ffn.cu`: row of the input and row of the result.
type Assignment = u64;

/// What one round of launches computes.
pub(super) struct Pass {
    inner: usize,
    /// Of few rows, and of many.
    tiles: [Vec<Tile>; 2],
    /// Their rows of the result are numbered as they are.
    assignments: Vec<Assignment>,
    /// For each row of the result where it goes.
    destinations: Vec<u32>,
}

impl Pass {
    fn new(inner: usize) -> Self {
        Self {
            inner,
            tiles: [Vec::new(), Vec::new()],
            assignments: Vec::new(),
            destinations: Vec::new(),
        }
    }

    /// Adds rows of one expert.
    fn push(&mut self, ffn: &GatedFfn, rows: &[(u32, u32)], gemms: &Gemms) {
        let [gate, up, down] = [&ffn.gate, &ffn.up, &ffn.down].map(address);
        let many = !gemms.are_few(rows.len());
        for rows in rows.chunks(gemms.for_rows(rows.len()).rows) {
            let first = self.assignments.len() as u32;
            let tile = [gate, up, down, two(first, rows.len() as u32)];
            self.tiles[usize::from(many)].push(tile);
            for (&(from, to), number) in rows.iter().zip(first..) {
                self.assignments.push(two(from, number));
                self.destinations.push(to);
            }
        }
    }
}

/// Most rows of a pass: what lies between gate, up and down, and the result, fits the scratch memory,
/// and the tiles of any distribution over experts fit a launch.
fn rows_max(hidden: usize, inner: usize) -> usize {
    let row_bytes = 4 * (row_pairs(hidden) + row_pairs(inner));
    (SCRATCH_BYTES_MAX / row_bytes.max(1)).clamp(PREFILL_ROWS, TILES_MAX)
}

/// Cuts the rows of a call into passes, and those into tiles.
pub(super) fn passes(groups: &[FfnGroup<'_>], hidden: usize, gemms: &Gemms) -> Vec<Pass> {
    let mut passes: Vec<Pass> = Vec::new();
    for FfnGroup { ffn, rows } in groups {
        let inner = ffn.gate.out_features();
        for (matrix, shape) in
            [(&ffn.gate, [inner, hidden]), (&ffn.up, [inner, hidden]), (&ffn.down, [hidden, inner])]
        {
            assert_eq!(
                [matrix.out_features(), matrix.in_features()],
                shape,
                "experts of one layer"
            );
            assert_eq!(matrix.layout(), gemms.layout, "weights of these kernels");
        }
        let rows_max = rows_max(hidden, inner);
        let mut rows = *rows;
        while !rows.is_empty() {
            let last = passes.last().filter(|pass| pass.inner == inner);
            let room = last.map_or(0, |pass| rows_max - pass.destinations.len());
            if room == 0 {
                passes.push(Pass::new(inner));
                continue;
            }
            let (now, later) = rows.split_at(rows.len().min(room));
            passes.last_mut().expect("it has room").push(ffn, now, gemms);
            rows = later;
        }
    }
    passes
}

/// Memory of calls, which grows to what the largest takes.
pub(super) struct Work {
    stream: Arc<Stream>,
    /// For rows and results; for tiles and assignments.
    staging: [Staging; 2],
    x: Buffer<u8>,
    h: Buffer<u8>,
    y: Buffer<u8>,
    /// Tiles, then assignments.
    plan: Buffer<u64>,
}

impl Work {
    pub fn new(device: &Arc<Device>) -> Result<Self, DeviceError> {
        Ok(Self {
            stream: Arc::new(Stream::new(device)?),
            staging: [Staging::new(device)?, Staging::new(device)?],
            x: Buffer::new(device, 0)?,
            h: Buffer::new(device, 0)?,
            y: Buffer::new(device, 0)?,
            plan: Buffer::new(device, 0)?,
        })
    }

    /// Gathers the rows of a call and copies them, each padded with zeros.
    pub fn upload_rows(&mut self, x: &[&[u8]], hidden: usize) -> Result<(), DeviceError> {
        let (len, stride) = (hidden * Dtype::Bf16.size(), 4 * row_pairs(hidden));
        self.x.reserve(x.len() * stride)?;
        let to = self.x.slice_mut(0..x.len() * stride);
        self.staging[0].upload(&self.stream, to, |bytes| {
            for (row, to) in x.iter().zip(bytes.chunks_exact_mut(stride)) {
                to[..len].copy_from_slice(row);
                to[len..].fill(0);
            }
        })
    }

    /// Makes room for a pass and copies what says which rows go where.
    pub fn prepare(
        &mut self,
        pass: &Pass,
        x_rows: usize,
        hidden: usize,
    ) -> Result<(), DeviceError> {
        let in_call = |&assignment: &Assignment| (assignment as u32 as usize) < x_rows;
        assert!(pass.assignments.iter().all(in_call), "rows of the call");
        self.upload_plan(pass)?;
        let rows = pass.assignments.len();
        self.h.reserve(rows * 4 * row_pairs(pass.inner))?;
        self.y.reserve(rows * 4 * row_pairs(hidden))
    }

    /// Starts both halves of the feed-forward for all tiles of the pass that was prepared.
    pub fn launch(&mut self, pass: &Pass, hidden: usize, gemms: &Gemms) -> Result<(), DeviceError> {
        let (rows, inner) = (pass.assignments.len(), pass.inner);
        let [few, many] = pass.tiles.each_ref().map(|tiles| tiles.as_flattened().len());
        let tiles = [self.plan.slice(0..few), self.plan.slice(few..few + many)];
        let assignments = self.plan.slice(few + many..few + many + rows);
        for (tiles, gemm) in tiles.into_iter().zip([gemms.few, gemms.many]) {
            let Gemm { gate_up, down, .. } = gemm;
            let count = tiles.len() / Tile::default().len();
            let launch = Launch::new(gate_up).input(tiles).input(assignments);
            let launch = launch.input(self.x.view()).int(hidden).int(inner);
            let launch = launch.output(&self.h.view_mut());
            // SAFETY: the arguments of all these kernels in their order. Tiles name assignments that
            // there are, and those rows of `x` and `h` that there are; matrices have these shapes
            // and this form.
            unsafe { launch.start(&self.stream, [gate_up.blocks(inner), count, 1]) }?;
            let launch = Launch::new(down).input(tiles).input(assignments);
            let launch = launch.input(self.h.view()).int(inner).int(hidden);
            let launch = launch.output(&self.y.view_mut()).null();
            // SAFETY: the same, of `h` and `y`.
            unsafe { launch.start(&self.stream, [down.blocks(hidden), count, 1]) }?;
        }
        Ok(())
    }

    fn upload_plan(&mut self, pass: &Pass) -> Result<(), DeviceError> {
        let [few, many] = pass.tiles.each_ref().map(|tiles| tiles.as_flattened());
        let parts = [few, many, &pass.assignments];
        let len = parts.iter().map(|part| part.len()).sum();
        self.plan.reserve(len)?;
        self.staging[1].upload(&self.stream, self.plan.slice_mut(0..len), |mut to| {
            for part in parts {
                let (now, later) = to.split_at_mut(part.len());
                now.copy_from_slice(part);
                to = later;
            }
        })
    }

    /// The queue that everything goes through.
    pub fn stream(&self) -> &Arc<Stream> {
        &self.stream
    }

    /// Waits for a pass and puts its rows where they belong.
    fn download(&mut self, pass: &Pass, hidden: usize, y: &mut [u8]) -> Result<(), DeviceError> {
        let (len, stride) = (hidden * Dtype::Bf16.size(), 4 * row_pairs(hidden));
        let from = self.y.slice(0..pass.destinations.len() * stride);
        self.staging[0].download(&self.stream, from, |bytes| {
            for (row, &to) in bytes.chunks_exact(stride).zip(&pass.destinations) {
                y[to as usize * len..][..len].copy_from_slice(&row[..len]);
            }
        })
    }
}
