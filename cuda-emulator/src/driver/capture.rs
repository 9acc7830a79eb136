//! Streams that record what they are asked for instead of doing it, and graphs: what they recorded.
//!
//! While a stream is captured nothing of it happens, so nobody can wait for it, nor for anything of
//! which it is a part; and calls that may wait by the way, such as those for memory, are refused to
//! whom the capture's mode says. Each refusal voids the capture, which then ends without a graph, as
//! the documentation of the driver has it.
//!
//! More is refused here than a device would refuse: forks to other streams, and graphs in graphs.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::{self, ThreadId};

use super::{Code, Driver, Event, Handle, Work};

/// To whom calls are refused that may wait by the way: `CUstreamCaptureMode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// To everybody.
    Global,
    /// To the thread that captures.
    ThreadLocal,
    /// To nobody.
    Relaxed,
}

/// What a stream has recorded so far.
#[derive(Debug)]
pub struct Capture {
    thread: ThreadId,
    mode: Mode,
    works: Vec<Work>,
    is_void: bool,
}

impl Capture {
    /// Takes a piece of work.
    pub fn record(&mut self, work: Work) -> Result<(), Code> {
        let refused = match work {
            _ if self.is_void => Code::ERROR_STREAM_CAPTURE_INVALIDATED,
            // Whose bytes are no longer there when the graph runs.
            Work::Write { .. } => Code::ERROR_STREAM_CAPTURE_UNSUPPORTED,
            // Which may have to wait, and a graph is done in one go.
            Work::Foreign(_) => Code::ERROR_STREAM_CAPTURE_UNSUPPORTED,
            Work::Wait(..) => Code::ERROR_STREAM_CAPTURE_ISOLATION,
            Work::Graph(_) => Code::ERROR_NOT_SUPPORTED,
            work => {
                self.works.push(work);
                return Ok(());
            }
        };
        self.is_void = true;
        Err(refused)
    }

    fn refuses_blocking(&self) -> bool {
        match self.mode {
            Mode::Global => true,
            Mode::ThreadLocal => self.thread == thread::current().id(),
            Mode::Relaxed => false,
        }
    }
}

impl Driver {
    /// Has a stream record from now on.
    pub fn begin_capture(&mut self, stream: Handle, mode: Mode) -> Result<(), Code> {
        let handle = self.stream(stream)?;
        if self.settings.faults().no_graphs {
            return Err(Code::ERROR_NOT_SUPPORTED);
        }
        if handle <= self.devices.len() {
            // The default stream.
            return Err(Code::ERROR_STREAM_CAPTURE_UNSUPPORTED);
        }
        let stream = self.streams.get_mut(&handle).ok_or(Code::ERROR_INVALID_HANDLE)?;
        if stream.capture.is_some() {
            return Err(Code::ERROR_ILLEGAL_STATE);
        }
        let thread = thread::current().id();
        stream.capture = Some(Capture { thread, mode, works: Vec::new(), is_void: false });
        Ok(())
    }

    /// Ends what [`Self::begin_capture`] began; gives the graph.
    pub fn end_capture(&mut self, stream: Handle) -> Result<Handle, Code> {
        let handle = self.stream(stream)?;
        let stream = self.streams.get_mut(&handle).ok_or(Code::ERROR_INVALID_HANDLE)?;
        let capture = stream.capture.take().ok_or(Code::ERROR_ILLEGAL_STATE)?;
        if capture.mode != Mode::Relaxed && capture.thread != thread::current().id() {
            stream.capture = Some(Capture { is_void: true, ..capture });
            return Err(Code::ERROR_STREAM_CAPTURE_WRONG_THREAD);
        }
        if capture.is_void {
            return Err(Code::ERROR_STREAM_CAPTURE_INVALIDATED);
        }
        let graph = self.handle();
        self.graphs.insert(graph, Arc::new(capture.works));
        Ok(graph)
    }

    /// Refuses what may wait by the way to whom some capture refuses it.
    pub fn may_block(&mut self) -> Result<(), Code> {
        self.void_captures(|_, _, capture| capture.refuses_blocking())
    }

    /// Refuses to wait for a stream that is captured, or to ask how far it has come.
    pub fn may_wait_for(&mut self, stream: Handle) -> Result<(), Code> {
        let handle = self.stream(stream)?;
        self.void_captures(|own, _, _| own == handle)
    }

    /// Refuses to wait for a device of which a stream is captured, whoever asks.
    pub fn may_wait_for_device(&mut self, device: usize) -> Result<(), Code> {
        self.void_captures(|_, own, _| own == device)
    }

    /// Voids the captures that something is a mistake for; they are told by stream and device.
    fn void_captures(
        &mut self,
        is_wrong: impl Fn(Handle, usize, &Capture) -> bool,
    ) -> Result<(), Code> {
        let mut outcome = Ok(());
        for (handle, stream) in &mut self.streams {
            let Some(capture) = &mut stream.capture else { continue };
            if is_wrong(*handle, stream.device, capture) {
                capture.is_void = true;
                outcome = Err(Code::ERROR_STREAM_CAPTURE_UNSUPPORTED);
            }
        }
        outcome
    }

    /// Makes something that can be launched out of a graph.
    pub fn instantiate(&mut self, graph: Handle) -> Result<Handle, Code> {
        let works = self.graphs.get(&graph).cloned().ok_or(Code::ERROR_INVALID_HANDLE)?;
        let handle = self.handle();
        self.executables.insert(handle, works);
        Ok(handle)
    }

    /// Asks a stream to do all that a graph holds.
    pub fn launch_graph(&mut self, executable: Handle, stream: Handle) -> Result<(), Code> {
        let works = self.executables.get(&executable).cloned();
        let works = works.ok_or(Code::ERROR_INVALID_HANDLE)?;
        self.ask(stream, Work::Graph(works))
    }

    /// Forgets a graph; what was made of it stays.
    pub fn destroy_graph(&mut self, graph: Handle) -> Result<(), Code> {
        self.graphs.remove(&graph).map(drop).ok_or(Code::ERROR_INVALID_HANDLE)
    }

    /// Forgets what [`Self::instantiate`] made; streams that were asked for it still do it.
    pub fn destroy_executable(&mut self, executable: Handle) -> Result<(), Code> {
        self.executables.remove(&executable).map(drop).ok_or(Code::ERROR_INVALID_HANDLE)
    }

    /// Whether an event was last recorded in a stream that was captured: such a one stands for a
    /// place in a graph, and nobody outside can ask for it.
    pub fn not_captured(event: &Event) -> Result<(), Code> {
        match event.is_captured.load(Ordering::Relaxed) {
            true => Err(Code::ERROR_CAPTURED_EVENT),
            false => Ok(()),
        }
    }
}
