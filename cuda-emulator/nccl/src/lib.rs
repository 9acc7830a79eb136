//! A stand-in for NCCL, beside the stand-in for NVIDIA's driver, for tests.
//!
//! Communicators have one rank or two, which exchange bytes of emulated devices between processes of
//! one machine over Unix sockets. As of the real library, calls only begin things: a communicator is
//! set up in the background, and what is exchanged is work of a stream, which the emulated driver goes
//! on with when somebody looks. A peer that goes leaves that work where it is until the communicator
//! is aborted; whoever asks is told.
//!
//! It is stricter than NCCL where that shows mistakes: lengths of a send and its receive must be equal,
//! memory must be a device's, and only communicators that never block are made.
//!
//! What it does not know: collectives, several devices, anything that NCCL does for speed.

mod communicator;
mod link;
mod work;

use std::ffi::{c_char, c_int, c_void};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use communicator::{Communicator, Config, UniqueId};
use work::Operation;

/// `ncclResult_t`.
pub type Code = c_int;

const SUCCESS: Code = 0;
const SYSTEM_ERROR: Code = 2;
const INVALID_ARGUMENT: Code = 4;
const INVALID_USAGE: Code = 5;
const REMOTE_ERROR: Code = 6;
const IN_PROGRESS: Code = 7;

/// The version that this pretends to be: 2.27.3.
const VERSION: c_int = 22_703;

#[unsafe(no_mangle)]
unsafe extern "C" fn ncclGetVersion(to: *mut c_int) -> Code {
    // SAFETY: the caller has room for a number.
    unsafe { to.write(VERSION) };
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ncclGetUniqueId(to: *mut UniqueId) -> Code {
    let Ok(id) = UniqueId::new() else { return SYSTEM_ERROR };
    // SAFETY: the caller has room for an id.
    unsafe { to.write(id) };
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ncclCommInitRankConfig(
    to: *mut *mut Communicator,
    ranks: c_int,
    id: UniqueId,
    rank: c_int,
    config: *const Config,
) -> Code {
    // SAFETY: null or a configuration.
    let is_usable = unsafe { config.as_ref() }.is_some_and(Config::is_usable);
    if !is_usable || !(1..=2).contains(&ranks) || !(0..ranks).contains(&rank) {
        return INVALID_ARGUMENT;
    }
    let communicator = Box::new(Communicator::join(id, ranks, rank));
    // SAFETY: the caller has room for a pointer.
    unsafe { to.write(Box::into_raw(communicator)) };
    IN_PROGRESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ncclCommGetAsyncError(of: *mut Communicator, to: *mut Code) -> Code {
    // SAFETY: null or what ncclCommInitRankConfig gave.
    let Some(communicator) = (unsafe { of.as_ref() }) else { return INVALID_ARGUMENT };
    // SAFETY: the caller has room for a code.
    unsafe { to.write(communicator.0.state.load(Ordering::Acquire)) };
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ncclCommAbort(of: *mut Communicator) -> Code {
    if of.is_null() {
        return INVALID_ARGUMENT;
    }
    // SAFETY: what ncclCommInitRankConfig gave, for the last time.
    let communicator = unsafe { Box::from_raw(of) };
    communicator.0.abort();
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn ncclGroupStart() -> Code {
    work::begin();
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn ncclGroupEnd() -> Code {
    work::end()
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ncclSend(
    from: *const c_void,
    count: usize,
    kind: c_int,
    peer: c_int,
    of: *mut Communicator,
    stream: *mut c_void,
) -> Code {
    // SAFETY: as of the caller.
    unsafe { exchange(Operation::send(from.addr(), count), kind, peer, of, stream) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn ncclRecv(
    to: *mut c_void,
    count: usize,
    kind: c_int,
    peer: c_int,
    of: *mut Communicator,
    stream: *mut c_void,
) -> Code {
    // SAFETY: as of the caller.
    unsafe { exchange(Operation::receive(to.addr(), count), kind, peer, of, stream) }
}

/// # Safety
/// The communicator must be null or what `ncclCommInitRankConfig` gave and nobody aborted.
unsafe fn exchange(
    operation: Operation,
    kind: c_int,
    peer: c_int,
    of: *mut Communicator,
    stream: *mut c_void,
) -> Code {
    /// `ncclUint8`.
    const BYTES: c_int = 1;

    // SAFETY: as the caller promises.
    let Some(communicator) = (unsafe { of.as_ref() }) else { return INVALID_ARGUMENT };
    let shared = &communicator.0;
    let usual_peer = if shared.ranks == 1 { 0 } else { 1 - shared.rank };
    if kind != BYTES || peer != usual_peer || !operation.is_of_device() {
        return INVALID_ARGUMENT;
    }
    if shared.state.load(Ordering::Acquire) != SUCCESS {
        return INVALID_USAGE;
    }
    work::begin();
    work::add(Arc::clone(shared), stream.addr(), operation);
    work::end()
}

#[unsafe(no_mangle)]
extern "C" fn ncclGetErrorString(code: Code) -> *const c_char {
    let text = match code {
        SUCCESS => c"no error",
        SYSTEM_ERROR => c"unhandled system error",
        INVALID_ARGUMENT => c"invalid argument",
        INVALID_USAGE => c"invalid usage",
        REMOTE_ERROR => c"remote process exited or there was a network error",
        IN_PROGRESS => c"NCCL operation in progress",
        _ => c"unknown result code",
    };
    text.as_ptr()
}
