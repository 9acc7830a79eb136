//! What all fuzz targets have in common: no input may make the program ask for much more memory
//! than the input is long.
//!
//! The allocator of every target looks at each single request while a parser runs. libFuzzer itself
//! sees to crashes, hangs and the sum of all memory.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::fs;
use std::path::Path;

/// How many times the length of the input one allocation may be.
const TIMES: usize = 4;

/// What one allocation may be however short the input is: room for tables, error texts and buffers
/// of a fixed size.
pub const ALLOWANCE_BYTES: usize = 64 << 10;

thread_local! {
    static LIMIT_BYTES: Cell<usize> = const { Cell::new(usize::MAX) };
}

/// The system's allocator, which ends the process when a parser asks it for too much.
struct Limited;

#[global_allocator]
static ALLOCATOR: Limited = Limited;

fn look_at(size: usize) {
    // The thread's value may be gone while the thread ends; then nothing is parsed.
    let limit = LIMIT_BYTES.try_with(Cell::get).unwrap_or(usize::MAX);
    if size > limit {
        LIMIT_BYTES.set(usize::MAX);
        panic!("an allocation of {size} bytes, {limit} are allowed");
    }
}

// SAFETY: hands everything to the system's allocator as it came.
unsafe impl GlobalAlloc for Limited {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        look_at(layout.size());
        // SAFETY: the caller keeps the trait's contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        look_at(layout.size());
        // SAFETY: the caller keeps the trait's contract.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        look_at(size);
        // SAFETY: the caller keeps the trait's contract.
        unsafe { System.realloc(block, layout, size) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the trait's contract.
        unsafe { System.dealloc(block, layout) }
    }
}

/// Writes a good input to where the fuzzer finds it, if it said where.
pub fn seed(name: &str, bytes: &[u8]) {
    if let Some(folder) = std::env::var_os("ENTENTE_FUZZ_SEEDS") {
        fs::write(Path::new(&folder).join(name), bytes).expect("the folder can be written to");
    }
}

/// A file of the small checkpoint that tests use.
pub fn golden(name: &str) -> Vec<u8> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/mixtral");
    fs::read(folder.join(name)).expect("the checkpoint is part of the project")
}

/// Runs a parser over an input of `len` bytes with an eye on what it allocates.
pub fn bounded<T>(len: usize, parse: impl FnOnce() -> T) -> T {
    bounded_beyond(len, ALLOWANCE_BYTES, parse)
}

/// The same where a single allocation may be `allowance` bytes whatever the input is.
pub fn bounded_beyond<T>(len: usize, allowance: usize, parse: impl FnOnce() -> T) -> T {
    LIMIT_BYTES.set(len.saturating_mul(TIMES).max(allowance));
    let parsed = parse();
    LIMIT_BYTES.set(usize::MAX);
    parsed
}
