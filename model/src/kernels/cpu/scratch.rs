//! Buffers that are used again: a fresh large one would be paid for page by page, every call.

use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, PoisonError};

/// Buffers that are not in use.
pub struct Scratch<T> {
    free: Mutex<Vec<Vec<T>>>,
}

/// A buffer with unspecified contents, which goes back when dropped.
pub struct Buffer<'a, T> {
    scratch: &'a Scratch<T>,
    values: Vec<T>,
    len: usize,
}

impl<T: Copy + Default> Scratch<T> {
    pub fn new() -> Self {
        Self { free: Mutex::default() }
    }

    /// A buffer of `len` values. At most as many buffers exist as were ever in use at once.
    pub fn take(&self, len: usize) -> Buffer<'_, T> {
        let free = self.free.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut values = free.unwrap_or_default();
        if values.len() < len {
            // Dropping the contents first: growing would copy them.
            values.clear();
            values.resize(len, T::default());
        }
        Buffer { scratch: self, values, len }
    }
}

impl<T> Deref for Buffer<'_, T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.values[..self.len]
    }
}

impl<T> DerefMut for Buffer<'_, T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.values[..self.len]
    }
}

impl<T> Drop for Buffer<'_, T> {
    fn drop(&mut self) {
        let values = std::mem::take(&mut self.values);
        self.scratch.free.lock().unwrap_or_else(PoisonError::into_inner).push(values);
    }
}
