//! Kernels that touch memory which is not theirs, or that do what has no meaning.
//!
//! The first trap at a guard page or at an address where nothing is. The others trap where the
//! C++ compiler has put a check: at an address that is not aligned, an index beyond an array, a sum
//! that overflows. The trap is taken on the thread's own fiber, which from there gives way for ever:
//! the mistake has its kernel and its place like any other. Traps of anybody else are as if this were
//! not here.

use std::ffi::{c_int, c_void};
use std::mem::MaybeUninit;
use std::ptr::{null, null_mut};
use std::sync::{Once, OnceLock};

use super::lane;

/// The signals of traps, and what was done with them before.
static BEFORE: [(c_int, OnceLock<libc::sigaction>); 2] =
    [(libc::SIGSEGV, OnceLock::new()), (libc::SIGILL, OnceLock::new())];

/// From now on, finds traps of fibers.
pub fn find() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| BEFORE.iter().for_each(|(signal, before)| take(*signal, before)));
}

fn take(signal: c_int, keep: &OnceLock<libc::sigaction>) {
    let handler: extern "C" fn(c_int, *const libc::siginfo_t, *const c_void) = trapped;
    let mut before = MaybeUninit::uninit();
    // SAFETY: the old action is written and kept before the new one is there; zeros are an action
    // without flags.
    unsafe {
        libc::sigaction(signal, null(), before.as_mut_ptr());
        keep.get_or_init(|| before.assume_init());
        let mut action: libc::sigaction = MaybeUninit::zeroed().assume_init();
        action.sa_sigaction = handler as usize;
        // On the stack that trapped, and so that the next trap is taken too: this one is never
        // returned from.
        action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER;
        libc::sigaction(signal, &raw const action, null_mut());
    }
}

extern "C" fn trapped(signal: c_int, info: *const libc::siginfo_t, _context: *const c_void) {
    let here = 0_u8;
    if lane::is_on_fiber(&raw const here as usize) {
        // SAFETY: such a signal comes with the address that was touched.
        let address = unsafe { (*info).si_addr() } as usize;
        lane::fail_by_trap(match signal {
            libc::SIGSEGV => format!("touches address {address:#x}, where it has no memory"),
            _ => "goes beyond an array or a number, or to an address not aligned".to_owned(),
        });
    }
    // Done as if nothing had been here: the same instruction traps again.
    for (_, before) in BEFORE.iter().filter(|(taken, _)| *taken == signal) {
        if let Some(before) = before.get() {
            // SAFETY: the action that was there before.
            unsafe { libc::sigaction(signal, before, null_mut()) };
        }
    }
}
