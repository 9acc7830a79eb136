//! The driver's functions as C sees them.
//!
//! Each takes pointers apart, does one thing with the [`crate::driver`], and writes the answer where
//! the caller wants it. What is not here, no one has asked for yet: the loader of `cudarc` says so by
//! name.

mod context;
mod graph;
mod memory;
mod module;
mod stream;

use crate::driver::Code;

/// Writes an answer.
///
/// # Safety
/// `to` must be null, which is an error, or a place for a `T`.
unsafe fn put<T>(to: *mut T, value: T) -> Result<(), Code> {
    if to.is_null() {
        return Err(Code::ERROR_INVALID_VALUE);
    }
    // SAFETY: as the caller promises.
    unsafe { to.write(value) };
    Ok(())
}
