//! Wakes the engine's thread when it waits, at the cost of nothing when it does not.

use std::io;
use std::sync::atomic::{AtomicU8, Ordering};

use mio::{Poll, Token, Waker};

/// Nobody has rung since the owner looked.
const QUIET: u8 = 0;
/// Somebody has; the owner must look before it waits.
const RUNG: u8 = 1;
/// The owner waits, or is about to.
const PARKED: u8 = 2;

/// Rung by everything that puts something where the engine will look, after putting it there.
pub struct Bell {
    state: AtomicU8,
    waker: Waker,
}

impl Bell {
    pub(crate) fn new(poll: &Poll, token: Token) -> io::Result<Self> {
        Ok(Self { state: AtomicU8::new(QUIET), waker: Waker::new(poll.registry(), token)? })
    }

    /// Makes the owner look. Only an owner that waits costs a system call.
    pub fn ring(&self) {
        if self.state.swap(RUNG, Ordering::AcqRel) == PARKED
            && let Err(error) = self.waker.wake()
        {
            tracing::error!(%error, "the engine cannot be woken");
        }
    }

    /// Whether the owner may wait: nobody has rung since [`Bell::unpark`].
    pub(crate) fn park(&self) -> bool {
        let quiet = self.state.compare_exchange(QUIET, PARKED, Ordering::AcqRel, Ordering::Acquire);
        quiet.is_ok()
    }

    /// The owner is about to look at everything.
    pub(crate) fn unpark(&self) {
        self.state.swap(QUIET, Ordering::AcqRel);
    }
}
