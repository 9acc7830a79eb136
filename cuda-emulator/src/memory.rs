//! Memory that ends at a page which traps.
//!
//! The end of a region lies at the end of a page, so that a kernel which goes too far by 16 bytes is
//! stopped there and then; so is one that goes too far back, by up to a page less.
//! Fresh memory is poisoned with all ones, which is a NaN in f32 and in bf16 and a far address.

use std::io;
use std::ptr::null_mut;

use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect, munmap};
use rustix::param::page_size;

/// What every region begins at a multiple of: the widest load of a kernel.
pub const ALIGNMENT_BYTES: usize = 16;

/// A region of memory; it is given back when this is dropped.
#[derive(Debug)]
pub struct Region {
    mapping: usize,
    mapping_bytes: usize,
    address: usize,
    bytes: usize,
}

impl Region {
    /// Maps and poisons a region.
    ///
    /// # Errors
    /// When the machine has no more memory.
    pub fn new(bytes: usize) -> io::Result<Self> {
        let page_bytes = page_size();
        let needed = bytes.next_multiple_of(ALIGNMENT_BYTES);
        let pages = needed.next_multiple_of(page_bytes);
        let mapping_bytes = pages + 2 * page_bytes;
        let rights = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at no particular place touches nobody's memory.
        let mapping =
            unsafe { mmap_anonymous(null_mut(), mapping_bytes, rights, MapFlags::PRIVATE) }?;
        let address = mapping as usize + page_bytes + pages - needed;
        let region = Self { mapping: mapping as usize, mapping_bytes, address, bytes };
        for guard in [region.mapping, region.mapping + mapping_bytes - page_bytes] {
            // SAFETY: the first and the last page of the mapping that was just made.
            unsafe { mprotect(guard as *mut _, page_bytes, MprotectFlags::empty()) }?;
        }
        region.poison();
        Ok(region)
    }

    /// Where it begins.
    pub fn address(&self) -> usize {
        self.address
    }

    /// Its bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Makes it look as if nobody had ever written to it.
    pub fn poison(&self) {
        // SAFETY: these bytes lie within the mapping, between its guards.
        unsafe { (self.address as *mut u8).write_bytes(0xff, self.bytes) };
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: the mapping is this region's alone. It cannot fail for a mapping that exists.
        let _ = unsafe { munmap(self.mapping as *mut _, self.mapping_bytes) };
    }
}
