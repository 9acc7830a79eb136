//! How a process gets its first certificate ([`join`]) and keeps a valid one: one that runs for long
//! by [`keep_fresh`], an operator's verb by [`renew_on_use`].
//!
//! A key is made where it is used and never leaves the machine: what is sent is a request to have
//! its public half certified. Every renewal is for a new key.
//!
//! What it does not know: which files a process has besides its certificate, and what it serves.

mod files;
mod join;
mod renew;

pub use files::write_private;
pub use join::{JoinError, Joined, join};
pub use renew::{RenewError, keep_fresh, renew, renew_on_use};
