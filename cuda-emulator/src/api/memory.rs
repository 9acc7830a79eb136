//! Memory of devices and of the host, and copies between them.

use std::ffi::c_uint;

use super::put;
use crate::driver::{Code, Driver, Handle, Work, current};

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) -> Code {
    current(|driver, device| {
        let (free_bytes, bytes) = driver.memory(device);
        // SAFETY: the caller has room for two numbers.
        unsafe {
            put(free, free_bytes)?;
            put(total, bytes)
        }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemAlloc_v2(to: *mut usize, bytes: usize) -> Code {
    current(|driver, device| {
        driver.may_block()?;
        // SAFETY: the caller has room for an address.
        unsafe { put(to, driver.allocate(device, bytes)?) }
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemFree_v2(address: usize) -> Code {
    current(|driver, device| {
        driver.may_block()?;
        driver.free(device, address)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemHostAlloc(to: *mut usize, bytes: usize, _flags: c_uint) -> Code {
    current(|driver, _| {
        driver.may_block()?;
        // SAFETY: the caller has room for an address.
        unsafe { put(to, driver.allocate_host(bytes)?) }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemAllocHost_v2(to: *mut usize, bytes: usize) -> Code {
    // SAFETY: as above.
    unsafe { cuMemHostAlloc(to, bytes, 0) }
}

#[unsafe(no_mangle)]
extern "C" fn cuMemFreeHost(address: usize) -> Code {
    current(|driver, _| {
        driver.may_block()?;
        driver.free_host(address)
    })
}

/// From the host: out of memory that is the driver's own when the stream comes to it, out of any
/// other at once.
unsafe fn to_device(
    driver: &mut Driver,
    to: usize,
    from: usize,
    bytes: usize,
    stream: Handle,
) -> Result<(), Code> {
    driver.is_device_memory(to, bytes)?;
    if driver.is_pinned(from, bytes) {
        return driver.ask(stream, Work::Copy { to, from, bytes });
    }
    // SAFETY: the caller of the driver has promised so many bytes there.
    let bytes = unsafe { std::slice::from_raw_parts(from as *const u8, bytes) }.to_vec();
    driver.ask(stream, Work::Write { to, bytes })
}

/// To the host: into memory that is the driver's own when the stream comes to it, into any other
/// before this returns.
fn to_host(
    driver: &mut Driver,
    to: usize,
    from: usize,
    bytes: usize,
    stream: Handle,
) -> Result<(), Code> {
    driver.is_device_memory(from, bytes)?;
    if driver.is_pinned(to, bytes) {
        return driver.ask(stream, Work::Copy { to, from, bytes });
    }
    driver.may_wait_for(stream)?;
    driver.ask(stream, Work::Copy { to, from, bytes })?;
    driver.synchronise(stream)
}

fn within_device(
    driver: &mut Driver,
    to: usize,
    from: usize,
    bytes: usize,
    stream: Handle,
) -> Result<(), Code> {
    driver.is_device_memory(to, bytes)?;
    driver.is_device_memory(from, bytes)?;
    driver.ask(stream, Work::Copy { to, from, bytes })
}

fn fill(
    driver: &mut Driver,
    to: usize,
    value: u8,
    bytes: usize,
    stream: Handle,
) -> Result<(), Code> {
    driver.is_device_memory(to, bytes)?;
    driver.ask(stream, Work::Fill { to, value, bytes })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemcpyHtoDAsync_v2(
    to: usize,
    from: usize,
    bytes: usize,
    stream: Handle,
) -> Code {
    // SAFETY: the caller promises so many bytes at both ends.
    current(|driver, _| unsafe { to_device(driver, to, from, bytes, stream) })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemcpyHtoD_v2(to: usize, from: usize, bytes: usize) -> Code {
    current(|driver, _| {
        driver.may_block()?;
        // SAFETY: as above.
        unsafe { to_device(driver, to, from, bytes, 0) }?;
        driver.synchronise(0)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyDtoHAsync_v2(to: usize, from: usize, bytes: usize, stream: Handle) -> Code {
    current(|driver, _| to_host(driver, to, from, bytes, stream))
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyDtoH_v2(to: usize, from: usize, bytes: usize) -> Code {
    current(|driver, _| {
        driver.may_block()?;
        to_host(driver, to, from, bytes, 0)?;
        driver.synchronise(0)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyDtoDAsync_v2(to: usize, from: usize, bytes: usize, stream: Handle) -> Code {
    current(|driver, _| within_device(driver, to, from, bytes, stream))
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyDtoD_v2(to: usize, from: usize, bytes: usize) -> Code {
    current(|driver, _| {
        driver.may_block()?;
        within_device(driver, to, from, bytes, 0)?;
        driver.synchronise(0)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemsetD8Async(to: usize, value: u8, bytes: usize, stream: Handle) -> Code {
    current(|driver, _| fill(driver, to, value, bytes, stream))
}

#[unsafe(no_mangle)]
extern "C" fn cuMemsetD8_v2(to: usize, value: u8, bytes: usize) -> Code {
    current(|driver, _| {
        driver.may_block()?;
        fill(driver, to, value, bytes, 0)?;
        driver.synchronise(0)
    })
}

/// Whether a range is memory of a device, for the stand-in for NCCL. No function of the driver's.
#[unsafe(no_mangle)]
extern "C" fn entente_emulator_is_memory(address: usize, bytes: usize) -> Code {
    current(|driver, _| driver.is_device_memory(address, bytes))
}
