//! The way between the memory of the process and that of a device.
//!
//! A device copies at full speed, and beside other work, only from and to pages that cannot be
//! moved. Making such pages takes longer than the copies, so a [`Staging`] keeps its own and reuses
//! them. What comes from many places (the rows of a frame) is gathered there once.
//!
//! Invariant: nobody on this side looks at staging memory while the device does. Each copy ends with
//! an event, and whoever wants the memory next waits for it.

use std::ffi::c_void;
use std::ptr::NonNull;
use std::sync::Arc;

use cudarc::driver::sys::{self, CUresult};

use super::buffer::{Value, View, ViewMut};
use super::device::Device;
use super::stream::{Event, Stream};
use crate::kernels::DeviceError;

/// Memory of the process that a device copies from or to, one copy at a time. It grows to what the
/// largest copy takes.
pub struct Staging {
    device: Arc<Device>,
    /// `bytes` bytes, all of them initialised; aligned to a page, so to any value.
    memory: Option<NonNull<u8>>,
    bytes: usize,
    /// The end of the copy that began last.
    copied: Event,
}

// SAFETY: the memory belongs to this value alone and is reached through `&mut`.
unsafe impl Send for Staging {}

impl Staging {
    /// Nothing yet; the first copy makes room.
    ///
    /// # Errors
    /// The device is lost.
    pub fn new(device: &Arc<Device>) -> Result<Self, DeviceError> {
        let copied = Event::new(device)?;
        Ok(Self { device: Arc::clone(device), memory: None, bytes: 0, copied })
    }

    /// Makes room for copies of so many bytes, so that none of them has to. To grow waits for the whole
    /// device.
    ///
    /// # Errors
    /// The device is lost, or the process may not have that much memory pinned.
    pub fn reserve(&mut self, bytes: usize) -> Result<(), DeviceError> {
        self.free(bytes).map(drop)
    }

    /// Has `fill` write values, which hold what they held before, and copies them to `to` in
    /// `stream`. Waits for the copy before this one, not for this one.
    ///
    /// # Errors
    /// The device is lost, or the process may not have that much memory pinned.
    pub fn upload<T: Value>(
        &mut self,
        stream: &Stream,
        to: ViewMut<'_, T>,
        fill: impl FnOnce(&mut [T]),
    ) -> Result<(), DeviceError> {
        let bytes = to.len() * size_of::<T>();
        if bytes == 0 {
            fill(&mut []);
            return Ok(());
        }
        let memory = self.free(bytes)?;
        // SAFETY: the memory is at least as long, initialised, aligned, and nobody else's: `free`
        // has waited for the device.
        fill(unsafe { std::slice::from_raw_parts_mut(memory.cast(), to.len()) });
        // SAFETY: both sides have so many bytes; this one is left alone until the event.
        self.device.call("cuMemcpyHtoDAsync", || unsafe {
            sys::cuMemcpyHtoDAsync_v2(to.address(), memory.cast(), bytes, stream.handle())
        })?;
        self.mark(stream)
    }

    /// Copies `from` once `stream` comes to it, waits for that, and has `read` look at the values.
    ///
    /// # Errors
    /// As for [`Staging::upload`]; also whatever failed earlier in the stream.
    pub fn download<T: Value, R>(
        &mut self,
        stream: &Stream,
        from: View<'_, T>,
        read: impl FnOnce(&[T]) -> R,
    ) -> Result<R, DeviceError> {
        let bytes = from.len() * size_of::<T>();
        if bytes == 0 {
            stream.synchronize()?;
            return Ok(read(&[]));
        }
        let memory = self.free(bytes)?;
        // SAFETY: both sides have so many bytes; this one is left alone until the event.
        self.device.call("cuMemcpyDtoHAsync", || unsafe {
            sys::cuMemcpyDtoHAsync_v2(memory.cast(), from.address(), bytes, stream.handle())
        })?;
        self.mark(stream)?;
        self.copied.synchronize()?;
        // SAFETY: the memory is at least as long, initialised, aligned, and the copy is done.
        Ok(read(unsafe { std::slice::from_raw_parts(memory.cast_const().cast(), from.len()) }))
    }

    /// Notes that a copy ends where `stream` ends now.
    fn mark(&self, stream: &Stream) -> Result<(), DeviceError> {
        self.copied.record(stream).inspect_err(|_| {
            // A copy without its event: wait for it here. If that fails too the device is lost, and
            // nobody touches the memory again.
            let _ = self.device.synchronize();
        })
    }

    /// At least so many bytes that the device does not use.
    fn free(&mut self, bytes: usize) -> Result<*mut u8, DeviceError> {
        self.copied.synchronize()?;
        if self.bytes < bytes {
            self.release();
            let bytes = bytes.next_multiple_of(PAGE);
            self.memory = Some(pin(&self.device, bytes)?);
            self.bytes = bytes;
        }
        Ok(self.memory.map_or(std::ptr::null_mut(), NonNull::as_ptr))
    }

    fn release(&mut self) {
        let Some(memory) = self.memory.take() else { return };
        self.bytes = 0;
        // SAFETY: allocated in `pin`, and the device has done its last copy.
        let _ = self
            .device
            .call("cuMemFreeHost", || unsafe { sys::cuMemFreeHost(memory.as_ptr().cast()) });
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // A device that is lost might still be copying: its memory is then left to the process's end.
        if self.copied.synchronize().is_ok() {
            self.release();
        }
    }
}

/// Staging memory grows by so much at least.
const PAGE: usize = 1 << 16;

/// Memory of the process that cannot be moved, filled with zeros.
fn pin(device: &Device, bytes: usize) -> Result<NonNull<u8>, DeviceError> {
    let (mut memory, mut code) = (std::ptr::null_mut::<c_void>(), CUresult::CUDA_SUCCESS);
    device.call("cuMemHostAlloc", || {
        // SAFETY: the pointer is to a local of its type; no flags.
        code = unsafe { sys::cuMemHostAlloc(&raw mut memory, bytes, 0) };
        if code == CUresult::CUDA_ERROR_OUT_OF_MEMORY { CUresult::CUDA_SUCCESS } else { code }
    })?;
    match NonNull::new(memory.cast::<u8>()) {
        Some(memory) if code == CUresult::CUDA_SUCCESS => {
            // SAFETY: so many bytes have been allocated.
            unsafe { memory.write_bytes(0, bytes) };
            Ok(memory)
        }
        _ => Err(DeviceError::Unavailable(format!(
            "the process may not have {bytes} bytes of memory pinned for copies"
        ))),
    }
}

/// Bytes of weights that travel in one piece: long enough for full speed, short enough that making
/// the first and copying the last, which nothing overlaps, take little time.
pub(super) const PIECE_BYTES: usize = 8 << 20;

/// Copies weights to a device and back, beside what the device computes. While one piece is being
/// copied the next is being made.
pub(super) struct Uploader {
    stream: Stream,
    stagings: [Staging; 2],
}

impl Uploader {
    pub fn new(device: &Arc<Device>) -> Result<Self, DeviceError> {
        let stagings = [Staging::new(device)?, Staging::new(device)?];
        Ok(Self { stream: Stream::new(device)?, stagings })
    }

    /// Has `make` write the bytes at an offset, piece by piece, into `to`. Returns when all of them
    /// are there. A piece is `piece_bytes` long, but for the last.
    ///
    /// # Errors
    /// The device is lost, or no memory can be pinned.
    pub fn upload(
        &mut self,
        mut to: ViewMut<'_, u8>,
        piece_bytes: usize,
        mut make: impl FnMut(usize, &mut [u8]),
    ) -> Result<(), DeviceError> {
        let bytes = to.len();
        for (at, i) in (0..bytes).step_by(piece_bytes).zip((0..2).cycle()) {
            let piece = to.reborrow().slice(at..bytes.min(at + piece_bytes));
            self.stagings[i].upload(&self.stream, piece, |bytes| make(at, bytes))?;
        }
        self.stream.synchronize()
    }

    /// Copies device memory back, piece by piece.
    ///
    /// # Errors
    /// The device is lost, or no memory can be pinned.
    pub fn download(&mut self, from: View<'_, u8>, to: &mut [u8]) -> Result<(), DeviceError> {
        for (i, to) in to.chunks_mut(PIECE_BYTES).enumerate() {
            let piece = from.slice(i * PIECE_BYTES..i * PIECE_BYTES + to.len());
            self.stagings[0].download(&self.stream, piece, |bytes| to.copy_from_slice(bytes))?;
        }
        Ok(())
    }
}
