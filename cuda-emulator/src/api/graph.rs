//! Capture and graphs.

use std::ffi::{c_int, c_ulonglong};

use super::put;
use crate::driver::{Code, Handle, Mode, current};

#[unsafe(no_mangle)]
extern "C" fn cuStreamBeginCapture_v2(stream: Handle, mode: c_int) -> Code {
    current(|driver, _| {
        let mode = match mode {
            0 => Mode::Global,
            1 => Mode::ThreadLocal,
            2 => Mode::Relaxed,
            _ => return Err(Code::ERROR_INVALID_VALUE),
        };
        driver.begin_capture(stream, mode)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuStreamEndCapture(stream: Handle, to: *mut Handle) -> Code {
    current(|driver, _| {
        // SAFETY: the caller has room for a pointer.
        unsafe { put(to, 0) }?;
        // SAFETY: as above.
        unsafe { put(to, driver.end_capture(stream)?) }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuGraphInstantiateWithFlags(
    to: *mut Handle,
    graph: Handle,
    flags: c_ulonglong,
) -> Code {
    current(|driver, _| {
        if flags != 0 {
            return Err(Code::ERROR_NOT_SUPPORTED);
        }
        // SAFETY: the caller has room for a pointer.
        unsafe { put(to, driver.instantiate(graph)?) }
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuGraphLaunch(executable: Handle, stream: Handle) -> Code {
    current(|driver, _| driver.launch_graph(executable, stream))
}

#[unsafe(no_mangle)]
extern "C" fn cuGraphDestroy(graph: Handle) -> Code {
    current(|driver, _| driver.destroy_graph(graph))
}

#[unsafe(no_mangle)]
extern "C" fn cuGraphExecDestroy(executable: Handle) -> Code {
    current(|driver, _| driver.destroy_executable(executable))
}
