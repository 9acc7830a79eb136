//! Goal: nobody can tell from an answer how it was computed.
//! Method: real engines over real links to nodes of this process. The same requests go to one that
//! runs each alone, with all experts in its own process, and to one that is disturbed.

// Everything here is a test, which clippy sees in #[test] functions only.
#![allow(clippy::unwrap_used)]

mod committed;
mod device;
mod graphs;
mod micro_batches;
mod residency;
mod setup;
mod statements;
mod tally;
mod threads;

/// Each check runs once over each transport that has a network in it.
macro_rules! over_networks {
    ($($check:ident),+ $(,)?) => {
        mod grpc {
            $(#[test] fn $check() { super::$check(crate::setup::Transport::Grpc); })+
        }
        mod stream {
            $(#[test] fn $check() { super::$check(crate::setup::Transport::Stream); })+
        }
    };
}
pub(crate) use over_networks;
