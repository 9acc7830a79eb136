//! The emulated driver in this process, found as the program found it: by its name.

use std::ffi::{c_int, c_void};
use std::sync::OnceLock;

/// Goes on with a piece of work; 1 says that it is done.
pub type Advance = unsafe extern "C" fn(*mut c_void, c_int) -> c_int;

type Ask = unsafe extern "C" fn(usize, Advance, *mut c_void) -> u32;
type IsMemory = unsafe extern "C" fn(usize, usize) -> u32;

struct Driver {
    ask: Ask,
    is_memory: IsMemory,
}

fn driver() -> Option<&'static Driver> {
    static DRIVER: OnceLock<Option<Driver>> = OnceLock::new();
    let find = || {
        // SAFETY: only a library that is loaded already is found.
        let library =
            unsafe { libc::dlopen(c"libcuda.so".as_ptr(), libc::RTLD_NOW | libc::RTLD_NOLOAD) };
        if library.is_null() {
            return None;
        }
        // SAFETY: functions of our own library, of these types; what is not there is null.
        unsafe {
            let ask = libc::dlsym(library, c"entente_emulator_ask".as_ptr());
            let is_memory = libc::dlsym(library, c"entente_emulator_is_memory".as_ptr());
            Some(Driver {
                ask: std::mem::transmute::<*mut c_void, Option<Ask>>(ask)?,
                is_memory: std::mem::transmute::<*mut c_void, Option<IsMemory>>(is_memory)?,
            })
        }
    };
    DRIVER.get_or_init(find).as_ref()
}

/// Asks a stream for work; whether it takes it.
///
/// # Safety
/// `advance` may be called with `data` until it says that it is done.
pub unsafe fn ask(stream: usize, advance: Advance, data: *mut c_void) -> bool {
    // SAFETY: as the caller promises.
    driver().is_some_and(|driver| unsafe { (driver.ask)(stream, advance, data) } == 0)
}

/// Whether a range is memory of a device.
pub fn is_memory(address: usize, bytes: usize) -> bool {
    // SAFETY: nothing is read or written there.
    driver().is_some_and(|driver| unsafe { (driver.is_memory)(address, bytes) } == 0)
}
