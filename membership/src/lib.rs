//! Who is in the cluster, and which expert is placed where: the facts that all processes share.
//!
//! [`state::State`] is a replicated state machine: the same commands in the same order give the
//! same state on every process, bit for bit. It has no other input. Two things issue commands:
//!
//! ```text
//!   configuration file ── roster::Roster ──┐
//!                                          ├──► state::Command ──► State::apply
//!   clients ── state::Request ── raft ─────┘
//!
//!   voter::Voter      one process of the raft group: replica and state together; pure
//!     raft::Replica     raft-rs behind one door; pure
//!     state::State      what the committed entries amount to; pure
//!   store::Store      makes each log::Batch durable
//!   steward::Steward  what the leader does for the expert nodes: reports in, proposals and orders
//!                     out; pure
//! ```
//!
//! Invariants:
//! - a command is applied entirely or refused entirely, and every process decides alike;
//! - each accepted change raises exactly one epoch by one; epochs never fall;
//! - an incarnation is handed out once; a node number and a voter number are never used again;
//! - the placement names only expert nodes that are members;
//! - nothing is said to a peer or a client before what it rests on is durable.
//!
//! What this crate does not know: sockets, clocks, threads, randomness, hash order, floats, whether
//! how a placement is computed (the router plans it), what a model is. Whether a node answers is
//! evidence, which only [`steward`] knows, and which counts once it is committed. Files are known to
//! [`store`] alone.

pub mod log;
pub mod raft;
pub mod roster;
pub mod served;
pub mod state;
pub mod steward;
pub mod store;
pub mod voter;
