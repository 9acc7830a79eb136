//! Weights on a device: the same panels as in memory of the process, byte for byte.

use std::num::NonZero;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::buffer::Buffer;
use super::device::Device;
use super::staging::{PIECE_BYTES, Uploader};
use crate::kernels::cpu::portable::Portable;
use crate::kernels::matrix::{Layout, PANEL};
use crate::kernels::pool::Pool;
use crate::kernels::{DeviceError, DeviceMemory, Matrix, MatrixSource, SourceDtype, WeightFormat};

/// Brings weight matrices to a device, beside what it computes. One matrix at a time.
pub struct Loader {
    device: Arc<Device>,
    uploader: Arc<Mutex<Uploader>>,
    format: WeightFormat,
    /// Packs; as many threads as the machine has, asleep but for that.
    pool: Pool,
}

impl Loader {
    /// A loader for `device`, of weights in a format that it multiplies.
    ///
    /// # Errors
    /// The device is lost.
    pub fn new(device: &Arc<Device>, format: WeightFormat) -> Result<Self, DeviceError> {
        let uploader = Arc::new(Mutex::new(Uploader::new(device)?));
        let threads = std::thread::available_parallelism().map_or(1, NonZero::get);
        Ok(Self { device: Arc::clone(device), uploader, format, pool: Pool::new(threads) })
    }

    /// Packs a matrix for the tensor cores.
    ///
    /// # Errors
    /// The device has no room, or is lost.
    pub fn pack(&self, source: MatrixSource<'_>) -> Result<Matrix, DeviceError> {
        self.pack_as(source, Layout::of(self.format, source.dtype))
    }

    /// Packs a matrix whose products are wanted in f32, such as a gate.
    ///
    /// # Errors
    /// The same.
    pub fn pack_exact(&self, source: MatrixSource<'_>) -> Result<Matrix, DeviceError> {
        self.pack_as(source, Layout::of(WeightFormat::F32, source.dtype))
    }

    /// Packs whole panels, a piece of them while the one before is copied.
    fn pack_as(&self, source: MatrixSource<'_>, layout: Layout) -> Result<Matrix, DeviceError> {
        let MatrixSource { out_features, in_features, .. } = source;
        let panel_bytes = panel_bytes(layout, in_features);
        let piece_bytes = (PIECE_BYTES / panel_bytes).max(1) * panel_bytes;
        let memory =
            self.upload(out_features.div_ceil(PANEL) * panel_bytes, piece_bytes, |at, to| {
                let first = at / panel_bytes * PANEL;
                let rows = (to.len() / panel_bytes * PANEL).min(out_features - first);
                let packed = Matrix::pack(Portable, source.rows(first, rows), layout, &self.pool);
                to.copy_from_slice(packed.host_bytes().expect("packed in memory of the process"));
            })?;
        Ok(Matrix::on_device([out_features, in_features], layout, memory))
    }

    /// Copies a matrix that was packed before. One that is on a device already stays where it is.
    ///
    /// # Errors
    /// The device has no room, no kernels for this layout, or is lost.
    pub fn place(&self, matrix: Matrix) -> Result<Matrix, DeviceError> {
        let layout = matrix.layout();
        let own = Layout::of(self.format, SourceDtype::Bf16);
        if layout != own && !matches!(layout, Layout::Bf16Widened | Layout::F32) {
            let text = format!("weights packed as {layout:?}; these kernels multiply {own:?}");
            return Err(DeviceError::Unsupported(text));
        }
        let Some(bytes) = matrix.host_bytes() else { return Ok(matrix) };
        let memory = self.upload(bytes.len(), PIECE_BYTES, |at, to| {
            to.copy_from_slice(&bytes[at..][..to.len()]);
        })?;
        Ok(matrix.moved_to(memory))
    }

    fn upload(
        &self,
        bytes: usize,
        piece_bytes: usize,
        make: impl FnMut(usize, &mut [u8]),
    ) -> Result<Arc<dyn DeviceMemory>, DeviceError> {
        let mut buffer = Buffer::new(&self.device, bytes)?;
        lock(&self.uploader).upload(buffer.view_mut(), piece_bytes, make)?;
        Ok(Arc::new(Weights { buffer, uploader: Arc::clone(&self.uploader) }))
    }
}

/// Bytes of a panel with so many inputs; at least one, so that it can be divided by.
fn panel_bytes(layout: Layout, inputs: usize) -> usize {
    layout.matrix_bytes(PANEL, inputs).expect("a shape that fits memory").max(1)
}

/// What a panic has left is as good as before: each copy writes all of what it reads.
fn lock(uploader: &Mutex<Uploader>) -> MutexGuard<'_, Uploader> {
    uploader.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A matrix in device memory.
struct Weights {
    buffer: Buffer<u8>,
    uploader: Arc<Mutex<Uploader>>,
}

impl DeviceMemory for Weights {
    fn bytes(&self) -> usize {
        self.buffer.len()
    }

    fn address(&self) -> u64 {
        self.buffer.view().address()
    }

    fn read(&self, at: usize, to: &mut [u8]) -> Result<(), DeviceError> {
        lock(&self.uploader).download(self.buffer.slice(at..at + to.len()), to)
    }
}
