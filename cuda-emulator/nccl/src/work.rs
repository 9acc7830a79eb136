//! What is exchanged: the operations of a group are one piece of work of a stream, which goes on with
//! each of them as far as the sockets let it.

use std::cell::RefCell;
use std::ffi::{c_int, c_void};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::communicator::Shared;
use crate::{Code, INVALID_USAGE, REMOTE_ERROR, SUCCESS, SYSTEM_ERROR, link};

/// A send or a receive.
pub struct Operation {
    sends: bool,
    address: usize,
    bytes: usize,
    /// The length goes first, so that a receive of another one is found out.
    prefix: [u8; 8],
    /// How much of prefix and bytes is done.
    at: usize,
}

impl Operation {
    pub fn send(address: usize, bytes: usize) -> Self {
        Self { sends: true, address, bytes, prefix: (bytes as u64).to_le_bytes(), at: 0 }
    }

    pub fn receive(address: usize, bytes: usize) -> Self {
        Self { sends: false, address, bytes, prefix: [0; 8], at: 0 }
    }

    pub fn is_of_device(&self) -> bool {
        link::is_memory(self.address, self.bytes)
    }

    /// Goes on; whether it is done.
    fn advance(&mut self, [to, from]: &mut [UnixStream; 2]) -> Result<bool, Code> {
        let end = self.prefix.len() + self.bytes;
        while self.at < end {
            // SAFETY: the host has promised the stream that this memory stays, and is nobody else's.
            let bytes =
                unsafe { std::slice::from_raw_parts_mut(self.address as *mut u8, self.bytes) };
            let part = match self.at.checked_sub(self.prefix.len()) {
                None => &mut self.prefix[self.at..],
                Some(at) => &mut bytes[at..],
            };
            match if self.sends { to.write(part) } else { from.read(part) } {
                Ok(0) => return Err(REMOTE_ERROR),
                Ok(moved) => self.at += moved,
                Err(error) if is_for_later(&error) => return Ok(false),
                Err(_) => return Err(REMOTE_ERROR),
            }
            if self.at == self.prefix.len() && u64::from_le_bytes(self.prefix) != self.bytes as u64
            {
                return Err(INVALID_USAGE);
            }
        }
        Ok(true)
    }
}

fn is_for_later(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

/// Operations of one communicator in one stream.
struct Work {
    shared: Arc<Shared>,
    stream: usize,
    operations: Vec<Operation>,
}

impl Work {
    fn advance(&mut self, fault: c_int) -> bool {
        /// Numbers of the emulator's settings.
        const HANGS: c_int = 1;
        const FAILS: c_int = 2;

        if self.shared.aborted.load(Ordering::Acquire) {
            return true;
        }
        match fault {
            HANGS => return false,
            FAILS => self.shared.fail(SYSTEM_ERROR),
            _ => {}
        }
        // A kernel whose communicator has failed spins until somebody aborts.
        if self.shared.state.load(Ordering::Acquire) != SUCCESS {
            return false;
        }
        let mut wires = self.shared.wires();
        let Some(wires) = wires.as_mut() else { return false };
        let mut done = true;
        for operation in &mut self.operations {
            match operation.advance(wires) {
                Ok(complete) => done &= complete,
                Err(code) => {
                    self.shared.fail(code);
                    return false;
                }
            }
        }
        done
    }
}

/// What the emulated driver calls.
unsafe extern "C" fn advance(data: *mut c_void, fault: c_int) -> c_int {
    let work: *mut Work = data.cast();
    // SAFETY: made of a box in `end`, and alive until this says that it is done.
    let done = unsafe { (*work).advance(fault) };
    if done {
        // SAFETY: as above, for the last time.
        drop(unsafe { Box::from_raw(work) });
    }
    c_int::from(done)
}

thread_local! {
    /// How many groups are open within each other, and what is in them.
    static GROUP: RefCell<(usize, Vec<Work>)> = const { RefCell::new((0, Vec::new())) };
}

/// Opens a group.
pub fn begin() {
    GROUP.with_borrow_mut(|(depth, _)| *depth += 1);
}

/// Puts an operation into the group that is open.
pub fn add(shared: Arc<Shared>, stream: usize, operation: Operation) {
    GROUP.with_borrow_mut(|(_, works)| {
        let same = |work: &&mut Work| Arc::ptr_eq(&work.shared, &shared) && work.stream == stream;
        match works.iter_mut().find(same) {
            Some(work) => work.operations.push(operation),
            None => works.push(Work { shared, stream, operations: vec![operation] }),
        }
    });
}

/// Closes a group; the outermost one's operations go to their streams.
pub fn end() -> Code {
    let works = GROUP.with_borrow_mut(|(depth, works)| {
        let outermost = *depth == 1;
        *depth = depth.saturating_sub(1);
        if outermost { std::mem::take(works) } else { Vec::new() }
    });
    for work in works {
        let (stream, data) = (work.stream, Box::into_raw(Box::new(work)));
        // SAFETY: the box is there until its work is done.
        if !unsafe { link::ask(stream, advance, data.cast()) } {
            // SAFETY: nobody has taken it.
            drop(unsafe { Box::from_raw(data) });
            return SYSTEM_ERROR;
        }
    }
    SUCCESS
}
