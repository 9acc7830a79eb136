//! The words that every part of Entente shares: generated wire messages, and the validated types
//! that the rest of the program uses instead of them.
//!
//! A wire message ([`wire`]) is whatever a peer chose to send. It becomes a [`frame`] only through
//! a conversion that checks every length with checked arithmetic before anything is allocated, so
//! code behind that door never meets a row that is too short or a region that is no country code.
//!
//! Invariants:
//! - an identifier ([`ids`]) that exists is valid; there is no way to build one unchecked;
//! - a [`frame::Dispatch`] holds exactly `row_count x hidden` values and every assignment's row
//!   exists; a [`frame::Answer`] is checked against the dispatch that it answers;
//! - a [`placement::Placement`] lists every replica once and no expert without one;
//! - an [`identity::Identity`] has one spelling;
//! - [`link::Link`] is the one door to another node, whatever carries the bytes.
//!
//! What this crate does not know: sockets, clocks, tokio, models, which experts exist where. The
//! gRPC stubs are behind the feature `grpc`, so that the pure crates build without them.

pub mod frame;
pub mod identity;
pub mod ids;
pub mod link;
pub mod list;
pub mod placement;
pub mod statement;
pub mod stream;

/// Messages as they cross the network or lie on a disk, generated from `proto/entente/v1`.
#[allow(missing_docs, clippy::all)]
pub mod wire {
    include!(concat!(env!("OUT_DIR"), "/entente.v1.rs"));
}
