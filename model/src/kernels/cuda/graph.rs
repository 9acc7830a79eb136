//! Work that is recorded once and then put into a stream as one piece.
//!
//! To start a kernel takes the host about as long as a small kernel takes the device. A [`Graph`] is
//! a row of launches, with their arguments, that the driver starts at once.
//!
//! It is recorded by issuing the work as ever: while a stream is captured, the same methods that
//! would start kernels add them to the graph. So there is one way to say what is to be done, and a
//! graph cannot differ from it. What must not be captured (waiting, copies of the process's memory,
//! taking and freeing memory) the driver refuses, and the capture with it.
//!
//! Invariant: whoever keeps a graph keeps the device memory that it was recorded with, where it was.
//! The driver does not know what belongs to a graph, and a launch without its memory is the same as
//! one with the number of a row that is none (`ops`).

use std::cell::Cell;
use std::ptr::null_mut;
use std::sync::Arc;

use cudarc::driver::sys::{self, CUstreamCaptureMode};

use super::device::Device;
use super::stream::Stream;
use crate::kernels::DeviceError;

thread_local! {
    /// Whether this thread captures.
    static CAPTURES: Cell<bool> = const { Cell::new(false) };
}

/// Whether this thread captures just now, and so waits for nobody else who does.
pub(super) fn captures() -> bool {
    CAPTURES.get()
}

/// Work that was captured, ready to be put into a stream.
pub struct Graph {
    device: Arc<Device>,
    handle: sys::CUgraphExec,
}

// SAFETY: the driver takes calls for it from any thread; it is launched through `&Stream`, and the
// driver orders launches of one graph among themselves.
unsafe impl Send for Graph {}

impl Stream {
    /// Has `record` put work into this stream, of which nothing is done, and gives it as a graph.
    /// Nobody else may use the stream meanwhile.
    ///
    /// # Errors
    /// [`DeviceError::Unsupported`]: something was asked for that cannot be captured, or the driver
    /// captures nothing. [`DeviceError::OutOfMemory`]: there is no room for the graph. In both cases
    /// the stream is as before, and the work may be issued without a graph. Otherwise the device is
    /// lost, or `record` failed.
    pub fn capture(
        &self,
        record: impl FnOnce() -> Result<(), DeviceError>,
    ) -> Result<Graph, DeviceError> {
        let device = self.device();
        let graph = {
            // A thread that waits for the whole device would void the capture, and be refused.
            let _quiet = device.quiet();
            // Of other threads nothing but that is refused.
            let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
            // SAFETY: the stream lives.
            device.call("cuStreamBeginCapture", || unsafe {
                sys::cuStreamBeginCapture_v2(self.handle(), mode)
            })?;
            CAPTURES.set(true);
            let recorded = record();
            let mut graph = null_mut();
            // Whatever became of it: the stream must not stay as it is.
            // SAFETY: the stream lives; the pointer is to a local of its type.
            let ended = device.call("cuStreamEndCapture", || unsafe {
                sys::cuStreamEndCapture(self.handle(), &raw mut graph)
            });
            CAPTURES.set(false);
            let graph = Recorded { device, handle: graph };
            recorded.and(ended)?;
            graph
        };
        graph.instantiate()
    }

    /// Puts the work of a graph into this stream.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`]: there is no room to launch it, and nothing of it is done.
    /// Otherwise the device is lost.
    pub fn launch(&self, graph: &Graph) -> Result<(), DeviceError> {
        // SAFETY: graph and stream live; what the graph's kernels read and write is there, see the
        // module.
        self.device()
            .call("cuGraphLaunch", || unsafe { sys::cuGraphLaunch(graph.handle, self.handle()) })
    }
}

/// A graph as it was recorded; null if nothing was.
struct Recorded<'a> {
    device: &'a Arc<Device>,
    handle: sys::CUgraph,
}

impl Recorded<'_> {
    fn instantiate(&self) -> Result<Graph, DeviceError> {
        let mut handle = null_mut();
        // SAFETY: the graph lives; the pointer is to a local of its type.
        self.device.call("cuGraphInstantiate", || unsafe {
            sys::cuGraphInstantiateWithFlags(&raw mut handle, self.handle, 0)
        })?;
        Ok(Graph { device: Arc::clone(self.device), handle })
    }
}

impl Drop for Recorded<'_> {
    fn drop(&mut self) {
        if !self.handle.is_null() {
            // SAFETY: the graph lives, and nobody has it any more.
            let _ =
                self.device.call("cuGraphDestroy", || unsafe { sys::cuGraphDestroy(self.handle) });
        }
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // Launches that are under way are finished first; the driver sees to that.
        // SAFETY: it lives, and nobody has it any more.
        let _ = self
            .device
            .call("cuGraphExecDestroy", || unsafe { sys::cuGraphExecDestroy(self.handle) });
    }
}
