//! Kernels that touch memory which is not theirs.
//!
//! Such a thread traps at a guard page or at an address where nothing is. The trap is taken on the
//! thread's own fiber, which from there gives way for ever: the mistake has its kernel and its place
//! like any other. Traps of anybody else are as if this were not here.

use std::ffi::{c_int, c_void};
use std::mem::MaybeUninit;
use std::ptr::{null, null_mut};
use std::sync::{Once, OnceLock};

use super::lane;

/// What was done with traps before.
static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

/// From now on, finds traps of fibers.
pub fn find() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let handler: extern "C" fn(c_int, *const libc::siginfo_t, *const c_void) = trapped;
        let mut before = MaybeUninit::uninit();
        // SAFETY: the old action is written and kept before the new one is there; zeros are an
        // action without flags.
        unsafe {
            libc::sigaction(libc::SIGSEGV, null(), before.as_mut_ptr());
            BEFORE.get_or_init(|| before.assume_init());
            let mut action: libc::sigaction = MaybeUninit::zeroed().assume_init();
            action.sa_sigaction = handler as usize;
            // On the stack that trapped, and so that the next trap is taken too: this one is never
            // returned from.
            action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER;
            libc::sigaction(libc::SIGSEGV, &raw const action, null_mut());
        }
    });
}

extern "C" fn trapped(signal: c_int, info: *const libc::siginfo_t, _context: *const c_void) {
    let here = 0_u8;
    if lane::is_on_fiber(&raw const here as usize) {
        // SAFETY: a trap comes with the address that was touched.
        let address = unsafe { (*info).si_addr() } as usize;
        lane::fail_by_trap(address);
    }
    // Done as if nothing had been here: the same instruction traps again.
    if let Some(before) = BEFORE.get() {
        // SAFETY: the action that was there before.
        unsafe { libc::sigaction(signal, before, null_mut()) };
    }
}
