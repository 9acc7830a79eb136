//! Streams, events, and when what was asked of them is done.
//!
//! A stream is done in order, as far as somebody waits for; where it waits for another stream's
//! event, that stream is done first, up to there. One that is captured records and does nothing.
//! Work of another library, such as an exchange with another process, may have to wait for what is
//! not of this machine: it is [`Code::PENDING`] then, and begins the stream again.

use std::collections::VecDeque;
use std::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use super::capture::Capture;
use super::{Code, Driver, Function, Handle};
use crate::engine::{self, BLOCK_THREADS_MAX, GRID_SIDE_MAX};

/// A kernel, its grid and its arguments, which are copied as the launch is asked for.
#[derive(Debug)]
pub struct Launch {
    function: Function,
    grid: [u32; 3],
    block: [u32; 3],
    shared_bytes: usize,
    /// Each argument at a multiple of 16 bytes.
    arguments: Vec<u128>,
}

impl Launch {
    /// A launch with copies of the arguments.
    ///
    /// # Safety
    /// `arguments` must point to as many pointers as the function has parameters, each to one.
    pub unsafe fn new(
        function: Function,
        grid: [u32; 3],
        block: [u32; 3],
        shared_bytes: usize,
        arguments: *const *const u8,
    ) -> Result<Self, Code> {
        let threads = block.iter().map(|side| u64::from(*side)).product::<u64>();
        let no_block = threads == 0 || threads > u64::from(BLOCK_THREADS_MAX) || block[2] > 64;
        let no_grid = grid.contains(&0)
            || grid[0] > i32::MAX as u32
            || grid[1..].iter().any(|side| *side > GRID_SIDE_MAX);
        if no_block || no_grid || shared_bytes > function.shared_bytes_max {
            return Err(Code::ERROR_INVALID_VALUE);
        }
        let mut copies = Vec::new();
        for (at, bytes) in function.kernel.parameter_bytes().iter().enumerate() {
            let start = copies.len();
            let bytes = *bytes as usize;
            copies.resize(start + bytes.div_ceil(size_of::<u128>()), 0);
            // SAFETY: the caller's pointer is to an argument of so many bytes, for which there is
            // room now.
            unsafe {
                let to: *mut u128 = &raw mut copies[start];
                to.cast::<u8>().copy_from(*arguments.add(at), bytes);
            }
        }
        Ok(Self { function, grid, block, shared_bytes, arguments: copies })
    }

    /// Runs it.
    ///
    /// # Safety
    /// What its pointers lead to must be there.
    unsafe fn run(&self, order: &mut engine::Order) -> Result<(), engine::Fault> {
        let mut at = 0;
        let mut pointers = Vec::new();
        for bytes in self.function.kernel.parameter_bytes() {
            pointers.push((&raw const self.arguments[at]).cast_mut().cast::<c_void>());
            at += (*bytes as usize).div_ceil(size_of::<u128>());
        }
        let launch = engine::Launch {
            kernel: self.function.kernel,
            grid: self.grid,
            block: self.block,
            shared_bytes: self.shared_bytes,
            arguments: &pointers,
        };
        // SAFETY: the arguments were copied by the kernel's own list; the rest is the caller's.
        unsafe { engine::run(&launch, order) }
    }
}

/// A point in a stream.
#[derive(Debug, Default)]
pub struct Event {
    /// How often it was asked to be recorded, and where last.
    asked: AtomicU64,
    stream: AtomicU64,
    /// Up to which of those it has come.
    done: AtomicU64,
    /// Whether the stream was captured where it was last asked to be recorded.
    pub is_captured: AtomicBool,
    /// When it last came to one.
    time: Mutex<Option<Instant>>,
}

impl Event {
    /// Seconds from this event to a later one; none while one of them has not come.
    pub fn seconds_to(&self, later: &Self) -> Option<f32> {
        Some(later.time()?.duration_since(self.time()?).as_secs_f32())
    }

    fn time(&self) -> Option<Instant> {
        *self.time.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn come(&self, number: u64) {
        self.done.fetch_max(number, Ordering::Relaxed);
        *self.time.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }
}

/// Something that a stream is asked to do.
#[derive(Debug)]
pub enum Work {
    /// To copy between any two places.
    Copy {
        /// Where to.
        to: usize,
        /// Where from.
        from: usize,
        /// How much.
        bytes: usize,
    },
    /// To write bytes that were taken from the host's memory at once.
    Write {
        /// Where to.
        to: usize,
        /// What.
        bytes: Vec<u8>,
    },
    /// To fill memory with one byte.
    Fill {
        /// Where.
        to: usize,
        /// With what.
        value: u8,
        /// How much.
        bytes: usize,
    },
    /// To run a kernel.
    Launch(Launch),
    /// To tell that it has come here, the so many-th time.
    Record(Arc<Event>, u64),
    /// To wait until another stream has come to an event the so many-th time.
    Wait(Arc<Event>, u64, Handle),
    /// To do all of this, one after the other.
    Graph(Arc<Vec<Work>>),
    /// To do what another library knows.
    Foreign(Foreign),
}

/// Goes on with a piece of work as far as it gets, with a fault of [`Faults`] that befalls it, and
/// tells with 1 that it is done and will not be asked for again.
///
/// [`Faults`]: crate::settings::Faults
pub type Advance = unsafe extern "C" fn(*mut c_void, c_int) -> c_int;

/// Work of another library.
#[derive(Debug)]
pub struct Foreign {
    advance: Advance,
    data: usize,
}

impl Foreign {
    /// Work that `advance` knows by `data`.
    ///
    /// # Safety
    /// `advance` may be called with `data` from any thread until it says that it is done.
    pub unsafe fn new(advance: Advance, data: *mut c_void) -> Self {
        Self { advance, data: data.addr() }
    }
}

/// A queue of work.
#[derive(Debug)]
pub struct Stream {
    /// The number of its device.
    pub device: usize,
    work: VecDeque<Work>,
    /// What it records, if it does.
    pub capture: Option<Capture>,
}

impl Stream {
    /// A stream of a device, without work.
    pub fn new(device: usize) -> Self {
        Self { device, work: VecDeque::new(), capture: None }
    }
}

impl Driver {
    /// A new stream.
    pub fn create_stream(&mut self, device: usize) -> Handle {
        let handle = self.handle();
        self.streams.insert(handle, Stream::new(device));
        handle
    }

    /// The stream that a caller means; a null pointer is its context's default stream.
    pub fn stream(&self, stream: Handle) -> Result<Handle, Code> {
        let handle = if stream == 0 { super::context() } else { stream };
        self.streams.contains_key(&handle).then_some(handle).ok_or(Code::ERROR_INVALID_HANDLE)
    }

    /// Takes a stream away, once its work is done.
    pub fn destroy_stream(&mut self, stream: Handle) -> Result<(), Code> {
        let outcome = self.synchronise(stream);
        if outcome != Err(Code::PENDING) {
            self.streams.remove(&stream);
        }
        outcome
    }

    /// Asks a stream to do something, or to record it.
    pub fn ask(&mut self, stream: Handle, work: Work) -> Result<(), Code> {
        let handle = self.stream(stream)?;
        if matches!(work, Work::Launch(_) | Work::Graph(_)) {
            self.look_for_faults();
        }
        let stream = self.streams.get_mut(&handle).ok_or(Code::ERROR_INVALID_HANDLE)?;
        self.devices[stream.device].alive()?;
        if let Some(capture) = &mut stream.capture {
            return capture.record(work);
        }
        match work {
            Work::Launch(_) => self.launches.kernels += 1,
            Work::Graph(_) => self.launches.graphs += 1,
            _ => {}
        }
        stream.work.push_back(work);
        Ok(())
    }

    /// Does all work of a stream.
    pub fn synchronise(&mut self, stream: Handle) -> Result<(), Code> {
        let stream = self.stream(stream)?;
        while self.step(stream)? {}
        Ok(())
    }

    /// Does all work of a device.
    pub fn synchronise_device(&mut self, device: usize) -> Result<(), Code> {
        let own = self.streams.iter().filter(|(_, stream)| stream.device == device);
        let own: Vec<Handle> = own.map(|(handle, _)| *handle).collect();
        own.into_iter().try_for_each(|stream| self.synchronise(stream))
    }

    /// Does the next work of a stream, if it has any.
    pub fn step(&mut self, handle: Handle) -> Result<bool, Code> {
        let stream = self.streams.get_mut(&handle).ok_or(Code::ERROR_INVALID_HANDLE)?;
        let device = stream.device;
        self.devices[device].alive()?;
        let Some(work) = stream.work.pop_front() else { return Ok(false) };
        let outcome = self.perform(device, &work);
        if outcome == Err(Code::PENDING)
            && let Some(stream) = self.streams.get_mut(&handle)
        {
            stream.work.push_front(work);
        }
        outcome.map(|()| true)
    }

    fn perform(&mut self, device: usize, work: &Work) -> Result<(), Code> {
        match work {
            // SAFETY: whoever asked for it has promised that both places stay until it is done.
            Work::Copy { to, from, bytes } => unsafe {
                (*to as *mut u8).copy_from(*from as *const u8, *bytes);
            },
            // SAFETY: as above.
            Work::Write { to, bytes } => unsafe {
                (*to as *mut u8).copy_from(bytes.as_ptr(), bytes.len());
            },
            // SAFETY: as above.
            Work::Fill { to, value, bytes } => unsafe {
                (*to as *mut u8).write_bytes(*value, *bytes);
            },
            Work::Launch(launch) => self.run(device, launch)?,
            Work::Record(event, number) => event.come(*number),
            Work::Wait(event, number, other) => self.reach(event, *number, *other)?,
            Work::Graph(works) => works.iter().try_for_each(|work| self.perform(device, work))?,
            Work::Foreign(foreign) => {
                let fault = self.settings.faults().foreign as c_int;
                // SAFETY: as its maker promised; it has not said yet that it is done.
                let done = unsafe { (foreign.advance)(foreign.data as *mut c_void, fault) };
                return if done == 1 { Ok(()) } else { Err(Code::PENDING) };
            }
        }
        Ok(())
    }

    fn run(&mut self, device: usize, launch: &Launch) -> Result<(), Code> {
        std::thread::sleep(self.settings.faults().slow);
        // SAFETY: as for the other work; the host has promised it for the kernel's pointers.
        unsafe { launch.run(&mut self.order) }.map_err(|fault| {
            eprintln!("entente-cuda-emulator: {fault}");
            let code = match fault.trapped {
                true => Code::ERROR_ILLEGAL_ADDRESS,
                false => Code::ERROR_LAUNCH_FAILED,
            };
            self.devices[device].lose(code);
            code
        })
    }

    /// Does the work of a stream until it has come to an event. A stream that is gone has done all.
    fn reach(&mut self, event: &Event, number: u64, stream: Handle) -> Result<(), Code> {
        while event.done.load(Ordering::Relaxed) < number && self.streams.contains_key(&stream) {
            if !self.step(stream)? {
                break;
            }
        }
        Ok(())
    }

    /// A new event.
    pub fn create_event(&mut self) -> Handle {
        let handle = self.handle();
        self.events.insert(handle, Arc::default());
        handle
    }

    /// Forgets an event; streams that wait for it still do.
    pub fn destroy_event(&mut self, event: Handle) -> Result<(), Code> {
        self.events.remove(&event).map(drop).ok_or(Code::ERROR_INVALID_HANDLE)
    }

    /// An event.
    pub fn event(&self, event: Handle) -> Result<Arc<Event>, Code> {
        self.events.get(&event).cloned().ok_or(Code::ERROR_INVALID_HANDLE)
    }

    /// Asks a stream to tell when it has come here.
    pub fn record(&mut self, event: Handle, stream: Handle) -> Result<(), Code> {
        let (event, stream) = (self.event(event)?, self.stream(stream)?);
        let is_captured = self.streams.get(&stream).is_some_and(|stream| stream.capture.is_some());
        event.is_captured.store(is_captured, Ordering::Relaxed);
        if is_captured {
            // A place within a graph, where nothing is to be done.
            return Ok(());
        }
        let number = event.asked.fetch_add(1, Ordering::Relaxed) + 1;
        event.stream.store(stream as u64, Ordering::Relaxed);
        self.ask(stream, Work::Record(event, number))
    }

    /// Asks a stream to wait for what was last asked to be recorded.
    pub fn wait(&mut self, stream: Handle, event: Handle) -> Result<(), Code> {
        let event = self.event(event)?;
        let number = event.asked.load(Ordering::Relaxed);
        let other = event.stream.load(Ordering::Relaxed) as Handle;
        self.ask(stream, Work::Wait(event, number, other))
    }

    /// Waits for an event, if it was asked to be recorded.
    pub fn synchronise_event(&mut self, event: Handle) -> Result<(), Code> {
        let event = self.event(event)?;
        Self::not_captured(&event)?;
        let number = event.asked.load(Ordering::Relaxed);
        self.reach(&event, number, event.stream.load(Ordering::Relaxed) as Handle)
    }

    /// Whether an event has come. If not, its stream does one piece of work, so that somebody who
    /// asks again and again gets there.
    pub fn query_event(&mut self, event: Handle) -> Result<(), Code> {
        let event = self.event(event)?;
        Self::not_captured(&event)?;
        if event.done.load(Ordering::Relaxed) >= event.asked.load(Ordering::Relaxed) {
            return Ok(());
        }
        match self.step(event.stream.load(Ordering::Relaxed) as Handle) {
            Ok(_) | Err(Code::PENDING) => Err(Code::ERROR_NOT_READY),
            Err(code) => Err(code),
        }
    }
}
