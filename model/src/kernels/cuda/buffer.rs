//! Memory of a device, as arrays of plain values.
//!
//! Invariant: device memory outlives the work that was asked of it, since whatever frees some waits
//! for the device first. That is rare: buffers are made at the start, or grow to what the largest
//! step takes.

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;

use cudarc::driver::sys::{self, CUresult};

use super::device::Device;
use super::stream::Stream;
use crate::kernels::DeviceError;

/// What arrays on a device are made of: plain values, of which every bit pattern is one.
///
/// # Safety
/// The type has no padding, no bit pattern that is none of its values, and no pointer.
pub unsafe trait Value: Copy + Send + Sync + 'static {}

// SAFETY: plain numbers.
unsafe impl Value for u8 {}
// SAFETY: plain numbers.
unsafe impl Value for u16 {}
// SAFETY: plain numbers.
unsafe impl Value for u32 {}
// SAFETY: plain numbers.
unsafe impl Value for u64 {}
// SAFETY: plain numbers.
unsafe impl Value for f32 {}
// SAFETY: as their elements.
unsafe impl<T: Value, const N: usize> Value for [T; N] {}

/// Memory of a device. Its contents are whatever it held before until something is written.
pub struct Buffer<T> {
    device: Arc<Device>,
    /// Zero for no values.
    address: sys::CUdeviceptr,
    len: usize,
    values: PhantomData<T>,
}

impl<T: Value> Buffer<T> {
    /// Memory for `len` values.
    ///
    /// # Errors
    /// The device has no room, or is lost.
    pub fn new(device: &Arc<Device>, len: usize) -> Result<Self, DeviceError> {
        let address = allocate(device, len.checked_mul(size_of::<T>()))?;
        Ok(Self { device: Arc::clone(device), address, len, values: PhantomData })
    }

    /// Memory for `len` values that are zero for whatever follows in `stream`.
    ///
    /// # Errors
    /// As for [`Buffer::new`].
    pub fn zeroed(stream: &Stream, len: usize) -> Result<Self, DeviceError> {
        let mut buffer = Self::new(stream.device(), len)?;
        stream.zero(buffer.view_mut())?;
        Ok(buffer)
    }

    /// Makes room for at least `len` values. If that takes new memory, what the old one held is
    /// gone.
    ///
    /// # Errors
    /// As for [`Buffer::new`]; the buffer is then empty.
    pub fn reserve(&mut self, len: usize) -> Result<(), DeviceError> {
        if len <= self.len {
            return Ok(());
        }
        // Somewhat more than asked for, so that steps that grow by a row do not free and take memory
        // each time; freed first, so that both need not fit.
        let len = len.checked_add(len / 4).unwrap_or(len);
        let device = Arc::clone(&self.device);
        *self = Self::new(&device, 0)?;
        *self = Self::new(&device, len)?;
        Ok(())
    }

    /// Values that fit.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether none fits.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// All of it, to be read.
    pub fn view(&self) -> View<'_, T> {
        View { address: self.address, len: self.len, values: PhantomData }
    }

    /// All of it, to be written.
    pub fn view_mut(&mut self) -> ViewMut<'_, T> {
        ViewMut { address: self.address, len: self.len, values: PhantomData }
    }

    /// A part of it, to be read.
    ///
    /// # Panics
    /// It has no such part.
    pub fn slice(&self, range: Range<usize>) -> View<'_, T> {
        self.view().slice(range)
    }

    /// A part of it, to be written.
    ///
    /// # Panics
    /// It has no such part.
    pub fn slice_mut(&mut self, range: Range<usize>) -> ViewMut<'_, T> {
        self.view_mut().slice(range)
    }
}

fn allocate(device: &Device, bytes: Option<usize>) -> Result<sys::CUdeviceptr, DeviceError> {
    if bytes == Some(0) {
        return Ok(0);
    }
    let (mut address, mut code) = (0, CUresult::CUDA_ERROR_OUT_OF_MEMORY);
    if let Some(bytes) = bytes {
        device.call("cuMemAlloc", || {
            // SAFETY: the pointer is to a local integer.
            code = unsafe { sys::cuMemAlloc_v2(&raw mut address, bytes) };
            // No room is told below, with figures.
            if code == CUresult::CUDA_ERROR_OUT_OF_MEMORY { CUresult::CUDA_SUCCESS } else { code }
        })?;
    }
    if code == CUresult::CUDA_SUCCESS {
        return Ok(address);
    }
    let free_bytes = device.memory_free_bytes()?;
    Err(DeviceError::OutOfMemory { wanted_bytes: bytes.map_or(u64::MAX, |n| n as u64), free_bytes })
}

impl<T> Drop for Buffer<T> {
    fn drop(&mut self) {
        // On a lost device nothing can be freed, and nothing needs to be: the context goes.
        if self.address == 0 || self.device.synchronize().is_err() {
            return;
        }
        // SAFETY: allocated in `new`, and nothing runs that reads or writes it.
        let _ = self.device.call("cuMemFree", || unsafe { sys::cuMemFree_v2(self.address) });
    }
}

/// Device memory that is read.
pub struct View<'a, T> {
    address: sys::CUdeviceptr,
    len: usize,
    values: PhantomData<&'a [T]>,
}

impl<T> Clone for View<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for View<'_, T> {}

impl<T: Value> View<'_, T> {
    /// Values there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(super) fn address(&self) -> sys::CUdeviceptr {
        self.address
    }

    /// A part of it.
    ///
    /// # Panics
    /// It has no such part.
    pub fn slice(self, range: Range<usize>) -> Self {
        let (address, len) = part::<T>(self.address, self.len, range);
        Self { address, len, values: PhantomData }
    }
}

/// Device memory that is written.
pub struct ViewMut<'a, T> {
    address: sys::CUdeviceptr,
    len: usize,
    values: PhantomData<&'a mut [T]>,
}

impl<T: Value> ViewMut<'_, T> {
    /// Values there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(super) fn address(&self) -> sys::CUdeviceptr {
        self.address
    }

    /// The same memory, lent for less long.
    pub fn reborrow(&mut self) -> ViewMut<'_, T> {
        ViewMut { address: self.address, len: self.len, values: PhantomData }
    }

    /// The same memory, to be read.
    pub fn as_view(&self) -> View<'_, T> {
        View { address: self.address, len: self.len, values: PhantomData }
    }

    /// A part of it.
    ///
    /// # Panics
    /// It has no such part.
    pub fn slice(self, range: Range<usize>) -> Self {
        let (address, len) = part::<T>(self.address, self.len, range);
        Self { address, len, values: PhantomData }
    }
}

fn part<T>(
    address: sys::CUdeviceptr,
    len: usize,
    range: Range<usize>,
) -> (sys::CUdeviceptr, usize) {
    assert!(range.start <= range.end && range.end <= len, "{range:?} of {len} values");
    (address + (range.start * size_of::<T>()) as u64, range.len())
}

impl Stream {
    /// Sets all bits to zero.
    ///
    /// # Errors
    /// The device is lost.
    pub fn zero<T: Value>(&self, to: ViewMut<'_, T>) -> Result<(), DeviceError> {
        let bytes = to.len * size_of::<T>();
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: so many bytes are there, and are lent to be written.
        self.device().call("cuMemsetD8Async", || unsafe {
            sys::cuMemsetD8Async(to.address, 0, bytes, self.handle())
        })
    }

    /// Copies within the device.
    ///
    /// # Errors
    /// The device is lost.
    ///
    /// # Panics
    /// The lengths differ.
    pub fn copy<T: Value>(&self, from: View<'_, T>, to: ViewMut<'_, T>) -> Result<(), DeviceError> {
        assert_eq!(from.len, to.len, "a value for each value");
        let bytes = to.len * size_of::<T>();
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: so many bytes are there on both sides, lent to be read and to be written.
        self.device().call("cuMemcpyDtoDAsync", || unsafe {
            sys::cuMemcpyDtoDAsync_v2(to.address, from.address, bytes, self.handle())
        })
    }
}
