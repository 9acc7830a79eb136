//! Streams and events.

use std::ffi::{c_int, c_uint, c_void};

use super::put;
use crate::driver::{Advance, Code, Foreign, Handle, Work, current};

/// `CU_STREAM_NON_BLOCKING`: a stream that does not wait for the default one. There are no others
/// here, as each of them would hide a wait that is missing.
const NON_BLOCKING: c_uint = 1;

#[unsafe(no_mangle)]
unsafe extern "C" fn cuStreamCreate(to: *mut Handle, flags: c_uint) -> Code {
    current(|driver, device| {
        if flags != NON_BLOCKING {
            return Err(Code::ERROR_NOT_SUPPORTED);
        }
        // SAFETY: the caller has room for a pointer.
        unsafe { put(to, driver.create_stream(device)) }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuStreamCreateWithPriority(
    to: *mut Handle,
    flags: c_uint,
    _priority: c_int,
) -> Code {
    // SAFETY: as above.
    unsafe { cuStreamCreate(to, flags) }
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamDestroy_v2(stream: Handle) -> Code {
    current(|driver, _| driver.destroy_stream(stream))
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamSynchronize(stream: Handle) -> Code {
    current(|driver, _| {
        driver.may_wait_for(stream)?;
        driver.synchronise(stream)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamQuery(stream: Handle) -> Code {
    current(|driver, _| {
        driver.may_wait_for(stream)?;
        let stream = driver.stream(stream)?;
        match driver.step(stream) {
            Ok(true) | Err(Code::PENDING) => Err(Code::ERROR_NOT_READY),
            Ok(false) => Ok(()),
            Err(code) => Err(code),
        }
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamWaitEvent(stream: Handle, event: Handle, _flags: c_uint) -> Code {
    current(|driver, _| driver.wait(stream, event))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuEventCreate(to: *mut Handle, _flags: c_uint) -> Code {
    // SAFETY: the caller has room for a pointer.
    current(|driver, _| unsafe { put(to, driver.create_event()) })
}

#[unsafe(no_mangle)]
extern "C" fn cuEventDestroy_v2(event: Handle) -> Code {
    current(|driver, _| driver.destroy_event(event))
}

#[unsafe(no_mangle)]
extern "C" fn cuEventRecord(event: Handle, stream: Handle) -> Code {
    current(|driver, _| driver.record(event, stream))
}

#[unsafe(no_mangle)]
extern "C" fn cuEventQuery(event: Handle) -> Code {
    current(|driver, _| {
        driver.may_block()?;
        driver.query_event(event)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuEventSynchronize(event: Handle) -> Code {
    current(|driver, _| {
        driver.may_block()?;
        driver.synchronise_event(event)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuEventElapsedTime(to: *mut f32, from: Handle, later: Handle) -> Code {
    current(|driver, _| {
        let seconds = driver.event(from)?.seconds_to(&*driver.event(later)?);
        // SAFETY: the caller has room for a number.
        unsafe { put(to, 1e3 * seconds.ok_or(Code::ERROR_NOT_READY)?) }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuEventElapsedTime_v2(to: *mut f32, from: Handle, later: Handle) -> Code {
    // SAFETY: as above.
    unsafe { cuEventElapsedTime(to, from, later) }
}

/// Asks a stream for work of another library, the stand-in for NCCL. No function of the driver's.
#[unsafe(no_mangle)]
unsafe extern "C" fn entente_emulator_ask(
    stream: Handle,
    advance: Advance,
    data: *mut c_void,
) -> Code {
    // SAFETY: the caller promises that `data` is what `advance` wants until it is done.
    current(|driver, _| driver.ask(stream, Work::Foreign(unsafe { Foreign::new(advance, data) })))
}
