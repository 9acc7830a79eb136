//! Modules, functions, launches.

use std::ffi::{CStr, c_char, c_int, c_uint};

use entente_nvrtc_emulator::IMAGE_BYTES;

use super::put;
use crate::driver::{Code, Handle, Launch, Work, current};

/// `CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES`.
const MAX_DYNAMIC_SHARED_SIZE_BYTES: c_int = 8;
/// `CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT`: a hint, per cent or -1.
const PREFERRED_SHARED_MEMORY_CARVEOUT: c_int = 9;

#[unsafe(no_mangle)]
unsafe extern "C" fn cuModuleLoadData(to: *mut Handle, image: *const [u8; IMAGE_BYTES]) -> Code {
    current(|driver, device| {
        // SAFETY: the caller hands over an image, which has at least so many bytes.
        let image = unsafe { image.as_ref() }.ok_or(Code::ERROR_INVALID_VALUE)?;
        // SAFETY: the caller has room for a pointer.
        unsafe { put(to, driver.load_module(device, image)?) }
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuModuleUnload(module: Handle) -> Code {
    current(|driver, _| driver.unload_module(module))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuModuleGetFunction(
    to: *mut Handle,
    module: Handle,
    name: *const c_char,
) -> Code {
    // SAFETY: the caller hands over a string that ends with a zero.
    let name = unsafe { CStr::from_ptr(name) };
    // SAFETY: the caller has room for a pointer.
    current(|driver, _| unsafe { put(to, driver.find_function(module, name)?) })
}

#[unsafe(no_mangle)]
extern "C" fn cuFuncSetAttribute(function: Handle, attribute: c_int, value: c_int) -> Code {
    current(|driver, _| match attribute {
        MAX_DYNAMIC_SHARED_SIZE_BYTES => driver.set_shared_bytes_max(function, value),
        PREFERRED_SHARED_MEMORY_CARVEOUT if (-1..=100).contains(&value) => Ok(()),
        _ => Err(Code::ERROR_NOT_SUPPORTED),
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuLaunchKernel(
    function: Handle,
    grid_x: c_uint,
    grid_y: c_uint,
    grid_z: c_uint,
    block_x: c_uint,
    block_y: c_uint,
    block_z: c_uint,
    shared_bytes: c_uint,
    stream: Handle,
    arguments: *const *const u8,
    extra: *const *const u8,
) -> Code {
    current(|driver, _| {
        if !extra.is_null() {
            return Err(Code::ERROR_NOT_SUPPORTED);
        }
        let function = driver.function(function)?;
        let (grid, block) = ([grid_x, grid_y, grid_z], [block_x, block_y, block_z]);
        // SAFETY: the caller promises a pointer to each of the function's arguments.
        let launch =
            unsafe { Launch::new(function, grid, block, shared_bytes as usize, arguments) }?;
        driver.ask(stream, Work::Launch(launch))
    })
}
