//! The driver, its devices and their contexts.

use std::ffi::{c_char, c_int, c_uint};

use super::put;
use crate::driver::{Code, Handle, attribute, context, current, machine, set_context};

/// CUDA 12.8, as the driver writes versions.
const DRIVER_VERSION: c_int = 12_080;

const NAME: &[u8] = b"Entente emulated device\0";

#[unsafe(no_mangle)]
extern "C" fn cuInit(_flags: c_uint) -> Code {
    machine(|driver| driver.initialise())
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDriverGetVersion(to: *mut c_int) -> Code {
    // SAFETY: the caller has room for a number.
    unsafe { put(to, DRIVER_VERSION) }.into()
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuGetErrorName(code: Code, to: *mut *const c_char) -> Code {
    let name = code.texts().map(|(name, _)| name).ok_or(Code::ERROR_INVALID_VALUE);
    // SAFETY: the caller has room for a pointer.
    name.and_then(|name| unsafe { put(to, name.as_ptr()) }).into()
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuGetErrorString(code: Code, to: *mut *const c_char) -> Code {
    let text = code.texts().map(|(_, text)| text).ok_or(Code::ERROR_INVALID_VALUE);
    // SAFETY: the caller has room for a pointer.
    text.and_then(|text| unsafe { put(to, text.as_ptr()) }).into()
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetCount(to: *mut c_int) -> Code {
    // SAFETY: the caller has room for a number.
    machine(|driver| unsafe { put(to, driver.device_count()? as c_int) })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGet(to: *mut c_int, ordinal: c_int) -> Code {
    machine(|driver| {
        driver.device(ordinal)?;
        // SAFETY: the caller has room for a device.
        unsafe { put(to, ordinal) }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetName(to: *mut c_char, bytes: c_int, device: c_int) -> Code {
    machine(|driver| {
        driver.device(device)?;
        if (bytes as usize) < NAME.len() {
            return Err(Code::ERROR_INVALID_VALUE);
        }
        // SAFETY: the caller has room for so many bytes.
        unsafe { to.cast::<u8>().copy_from(NAME.as_ptr(), NAME.len()) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetUuid(to: *mut [u8; 16], device: c_int) -> Code {
    machine(|driver| {
        driver.device(device)?;
        let mut uuid = *b"entente-emulated";
        uuid[15] = device as u8;
        // SAFETY: the caller has room for the bytes.
        unsafe { put(to, uuid) }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetUuid_v2(to: *mut [u8; 16], device: c_int) -> Code {
    // SAFETY: as above.
    unsafe { cuDeviceGetUuid(to, device) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceTotalMem_v2(to: *mut usize, device: c_int) -> Code {
    // SAFETY: the caller has room for a number.
    machine(|driver| unsafe { put(to, driver.device(device)?.memory().1) })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetAttribute(to: *mut c_int, number: c_int, device: c_int) -> Code {
    machine(|driver| {
        driver.device(device)?;
        // SAFETY: the caller has room for a number.
        unsafe { put(to, attribute(number).ok_or(Code::ERROR_INVALID_VALUE)?) }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDevicePrimaryCtxRetain(to: *mut Handle, device: c_int) -> Code {
    // SAFETY: the caller has room for a pointer.
    machine(|driver| unsafe { put(to, driver.retain(device)?) })
}

#[unsafe(no_mangle)]
extern "C" fn cuDevicePrimaryCtxRelease_v2(device: c_int) -> Code {
    // What was allocated stays until the process ends, as it does here while others hold the
    // context; nobody opens a device twice to find out.
    machine(|driver| driver.device(device).map(drop))
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxSetCurrent(context: Handle) -> Code {
    machine(|driver| {
        if context != 0 {
            driver.device_of(context)?;
        }
        set_context(context);
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuCtxGetCurrent(to: *mut Handle) -> Code {
    // SAFETY: the caller has room for a pointer.
    unsafe { put(to, context()) }.into()
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuCtxGetDevice(to: *mut c_int) -> Code {
    // SAFETY: the caller has room for a device.
    current(|_, device| unsafe { put(to, device as c_int) })
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxSetFlags(_flags: c_uint) -> Code {
    current(|_, _| Ok(()))
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxSynchronize() -> Code {
    current(|driver, device| {
        driver.may_wait_for_device(device)?;
        driver.synchronise_device(device)
    })
}
