//! Large, zeroed, aligned memory for weights and caches.
//!
//! A processor reads memory in lines of 64 bytes, and one AVX-512 register is one line, so the line
//! is the unit here. The memory comes straight from the kernel: untouched pages cost nothing (a
//! cache may be configured larger than it ever gets), and huge pages are asked for, since a
//! decoding step walks through all weights once and would miss the TLB at every 4 KiB.

use std::ops::{Deref, DerefMut};

use memmap2::MmapMut;

/// 32-bit words of one line.
pub(super) const LINE_WORDS: usize = 16;

/// 64 bytes: 16 f32 values as bits, or 16 pairs of bf16 values, the first in the lower half.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C, align(64))]
pub(crate) struct Line(pub [u32; LINE_WORDS]);

// Packed weights are files of lines as they lie in memory.
const _: () = assert!(cfg!(target_endian = "little"), "packed weights are little-endian");

/// A fixed number of lines.
pub(crate) struct Lines {
    /// Absent when there are no lines: an empty mapping does not exist.
    map: Option<MmapMut>,
}

impl Lines {
    /// `count` lines of zeros. Like any allocation, it ends the process when memory is exhausted.
    pub fn zeroed(count: usize) -> Self {
        if count == 0 {
            return Self { map: None };
        }
        let bytes = count.checked_mul(size_of::<Line>()).expect("fewer bytes than addresses");
        let map = MmapMut::map_anon(bytes)
            .unwrap_or_else(|error| panic!("cannot allocate {bytes} bytes: {error}"));
        // Advice: a kernel without huge pages says no, and nothing but speed is lost.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        Self { map: Some(map) }
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.as_bytes().len()
    }

    /// The same memory as bytes, as it is written to files.
    pub fn as_bytes(&self) -> &[u8] {
        self.map.as_deref().unwrap_or_default()
    }

    /// The same memory as bytes, to be read into.
    pub fn as_bytes_mut(&mut self) -> &mut [u8] {
        self.map.as_deref_mut().unwrap_or_default()
    }
}

impl Deref for Lines {
    type Target = [Line];

    fn deref(&self) -> &[Line] {
        let Some(map) = &self.map else { return &[] };
        // SAFETY: the mapping begins at a page, so it is aligned; it is as long as whole lines;
        // every bit pattern is a line.
        unsafe { std::slice::from_raw_parts(map.as_ptr().cast(), map.len() / size_of::<Line>()) }
    }
}

impl DerefMut for Lines {
    fn deref_mut(&mut self) -> &mut [Line] {
        let Some(map) = &mut self.map else { return &mut [] };
        let count = map.len() / size_of::<Line>();
        // SAFETY: as for `deref`, and `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(map.as_mut_ptr().cast(), count) }
    }
}
