//! Queues of work for a device.
//!
//! What is put into one [`Stream`] happens in its order; what is in different ones happens at the
//! same time unless an [`Event`] orders it. Nothing waits for the device but what says so.

use std::ptr::null_mut;
use std::sync::Arc;
use std::time::Duration;

use cudarc::driver::sys::{self, CUevent, CUevent_flags, CUresult, CUstream_flags};

use super::device::Device;
use crate::kernels::DeviceError;

/// A queue of work. The kernels are its methods (`ops`).
pub struct Stream {
    device: Arc<Device>,
    handle: sys::CUstream,
}

// SAFETY: the driver takes calls for a stream from any thread and orders them itself.
unsafe impl Send for Stream {}
// SAFETY: the same.
unsafe impl Sync for Stream {}

impl Stream {
    /// A new, empty queue.
    ///
    /// # Errors
    /// The device is lost or out of memory.
    pub fn new(device: &Arc<Device>) -> Result<Self, DeviceError> {
        let mut handle = null_mut();
        // Not blocking: it must not wait for work of others on the stream that libraries use.
        let flags = CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: the pointer is to a local of its type.
        device.call("cuStreamCreate", || unsafe { sys::cuStreamCreate(&raw mut handle, flags) })?;
        Ok(Self { device: Arc::clone(device), handle })
    }

    /// The device that does the work.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    pub(super) fn handle(&self) -> sys::CUstream {
        self.handle
    }

    /// Waits until all that was put in is done.
    ///
    /// # Errors
    /// Something of it failed, and the device is lost.
    pub fn synchronize(&self) -> Result<(), DeviceError> {
        // SAFETY: the stream lives.
        self.device.call("cuStreamSynchronize", || unsafe { sys::cuStreamSynchronize(self.handle) })
    }

    /// What is put in from now on begins after `event`.
    ///
    /// # Errors
    /// The device is lost.
    pub fn wait(&self, event: &Event) -> Result<(), DeviceError> {
        // SAFETY: stream and event live.
        self.device.call("cuStreamWaitEvent", || unsafe {
            sys::cuStreamWaitEvent(self.handle, event.handle, 0)
        })
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // The driver finishes what is in it first; buffers wait for that before they go.
        // SAFETY: the stream lives, and nobody has it any more.
        let _ =
            self.device.call("cuStreamDestroy", || unsafe { sys::cuStreamDestroy_v2(self.handle) });
    }
}

/// A point in a stream.
pub struct Event {
    device: Arc<Device>,
    handle: sys::CUevent,
}

// SAFETY: the driver takes calls for an event from any thread.
unsafe impl Send for Event {}
// SAFETY: the same.
unsafe impl Sync for Event {}

impl Event {
    /// An event that has been reached.
    ///
    /// # Errors
    /// The device is lost or out of memory.
    pub fn new(device: &Arc<Device>) -> Result<Self, DeviceError> {
        // Those that only order work cost less without a time.
        Self::with_flags(device, CUevent_flags::CU_EVENT_DISABLE_TIMING)
    }

    /// An event that keeps when it was reached, by the device's clock.
    pub(super) fn timed(device: &Arc<Device>) -> Result<Self, DeviceError> {
        Self::with_flags(device, CUevent_flags::CU_EVENT_DEFAULT)
    }

    fn with_flags(device: &Arc<Device>, flags: CUevent_flags) -> Result<Self, DeviceError> {
        let (mut handle, flags) = (null_mut(), flags as u32);
        // SAFETY: the pointer is to a local of its type.
        device.call("cuEventCreate", || unsafe { sys::cuEventCreate(&raw mut handle, flags) })?;
        Ok(Self { device: Arc::clone(device), handle })
    }

    /// Moves it to the present end of `stream`.
    ///
    /// # Errors
    /// The device is lost.
    pub fn record(&self, stream: &Stream) -> Result<(), DeviceError> {
        // SAFETY: stream and event live.
        self.device
            .call("cuEventRecord", || unsafe { sys::cuEventRecord(self.handle, stream.handle) })
    }

    /// Whether it is reached.
    ///
    /// # Errors
    /// Something before it failed, and the device is lost.
    pub fn has_come(&self) -> Result<bool, DeviceError> {
        let mut code = CUresult::CUDA_SUCCESS;
        self.device.call("cuEventQuery", || {
            // SAFETY: the event lives.
            code = unsafe { sys::cuEventQuery(self.handle) };
            if code == CUresult::CUDA_ERROR_NOT_READY { CUresult::CUDA_SUCCESS } else { code }
        })?;
        Ok(code == CUresult::CUDA_SUCCESS)
    }

    /// Waits until it is reached.
    ///
    /// # Errors
    /// Something before it failed, and the device is lost.
    pub fn synchronize(&self) -> Result<(), DeviceError> {
        // SAFETY: the event lives.
        self.device.call("cuEventSynchronize", || unsafe { sys::cuEventSynchronize(self.handle) })
    }

    /// Time from this event to `end`, both timed and reached, to about half a microsecond.
    pub(super) fn until(&self, end: &Self) -> Result<Duration, DeviceError> {
        /// As in every driver; the bindings know only the variant of CUDA 12.8 and later.
        type ElapsedTime = unsafe extern "C" fn(*mut f32, CUevent, CUevent) -> CUresult;

        let mut milliseconds = 0.0;
        self.device.call("cuEventElapsedTime", || {
            // SAFETY: the driver is loaded, since there is a device; the function has this type,
            // both events live, and the pointer is to a local number.
            unsafe {
                let elapsed = sys::culib().get::<ElapsedTime>(b"cuEventElapsedTime");
                elapsed.map_or(CUresult::CUDA_ERROR_NOT_FOUND, |elapsed| {
                    elapsed(&raw mut milliseconds, self.handle, end.handle)
                })
            }
        })?;
        Ok(Duration::try_from_secs_f32(milliseconds / 1e3).unwrap_or_default())
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: the event lives, and nobody has it any more.
        let _ =
            self.device.call("cuEventDestroy", || unsafe { sys::cuEventDestroy_v2(self.handle) });
    }
}
