//! Rows from one GPU to another by NCCL, between two processes.
//!
//! [`UniqueId`] is how the two find each other, [`Communicator`] what they have in common then, and a
//! [`Lane`] a way in one direction: one end sends rows, the other receives them, in one order.
//!
//! NCCL is a library that may be missing, loaded by the name under which it is installed; its
//! bindings in `cudarc` do not look for that one (`docs/decisions/0022`).
//!
//! Invariants:
//! - nothing here waits longer than its [`Patience`]: communicators never block, and what they were
//!   asked for is looked after until it is done, has failed, or somebody gives up;
//! - whatever fails leaves a communicator that is of no more use, and that is aborted when it is
//!   dropped: a kernel that waits for a peer that is gone ends then, and not before;
//! - rows that are received are those that were sent as the same number, or an error.
//!
//! What this module does not know: what rows are, who the peer is, and how it heard of the id. What is
//! sent is not encrypted.

mod communicator;
mod lane;
mod library;

use std::time::{Duration, Instant};

pub use communicator::{Communicator, Rank, UniqueId};
pub use lane::{LANES_MAX, Lane};
pub(super) use library::version;

use crate::kernels::DeviceError;

/// The version of the library, as it writes it, if it can be used. Both ends need the same.
///
/// # Errors
/// It is not there, or is too old.
pub fn available() -> Result<u32, DeviceError> {
    Ok(library::load()?.version.unsigned_abs())
}

/// Why nothing comes of an exchange by NCCL.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NcclError {
    /// The device, or NCCL itself, cannot be used.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// NCCL has refused something or given it up.
    #[error("{function} says: {text}")]
    Failed {
        /// What was asked of it.
        function: &'static str,
        /// What it said.
        text: String,
    },
    /// It took too long.
    #[error("NCCL was not done after {0:?}")]
    Overdue(Duration),
    /// Somebody here gave up.
    #[error("the exchange by NCCL was given up")]
    GivenUp,
    /// The two ends do not mean the same rows.
    #[error("NCCL brought {have} where {want} was expected")]
    OutOfStep {
        /// What came, by number and length.
        have: String,
        /// What was to come.
        want: String,
    },
    /// A device has a bounded number of queues.
    #[error("the device has {LANES_MAX} lanes by NCCL already")]
    Crowded,
}

/// How long to wait for a peer.
#[derive(Clone, Copy)]
pub struct Patience<'a> {
    /// Longest time that one thing may take.
    pub wait_max: Duration,
    /// Turns true when nobody wants it any more. Asked often.
    pub given_up: &'a (dyn Fn() -> bool + Sync),
}

/// Looks before the first pause: what takes some microseconds is not slept over.
const LOOKS_MIN: u32 = 64;
/// Between later looks. NCCL has nothing to wait for that ends when a peer is gone.
const PAUSE: Duration = Duration::from_micros(50);

impl Patience<'_> {
    /// Looks until `done`.
    fn wait(&self, mut done: impl FnMut() -> Result<bool, NcclError>) -> Result<(), NcclError> {
        let deadline = Instant::now() + self.wait_max;
        let mut looks = 0;
        while !done()? {
            if (self.given_up)() {
                return Err(NcclError::GivenUp);
            }
            if Instant::now() >= deadline {
                return Err(NcclError::Overdue(self.wait_max));
            }
            looks += 1;
            if looks < LOOKS_MIN { std::thread::yield_now() } else { std::thread::sleep(PAUSE) }
        }
        Ok(())
    }
}
