//! Who is in the cluster, and which expert is placed where: the facts that all processes share.
//!
//! [`state::State`] is a replicated state machine: the same commands in the same order give the
//! same state on every process, bit for bit. It has no other input. Two things issue commands:
//!
//! ```text
//!   configuration file ── roster::Roster ──┐
//!                                          ├──► state::Command ──► State::apply
//!   raft log (to come: one more source) ───┘
//! ```
//!
//! Today each process reads the same [`roster::Roster`] from its configuration and replays it, so
//! that all of them arrive at membership epoch 1 and placement epoch 1. When raft arrives it
//! replays committed log entries through the same commands; nothing beyond this crate will notice.
//!
//! Invariants:
//! - a command is applied entirely or refused entirely, and every process decides alike;
//! - each accepted change raises exactly one epoch by one; epochs never fall;
//! - an incarnation is handed out once; a node number is never used again;
//! - the placement names only expert nodes that are members.
//!
//! What this crate does not know: sockets, clocks, randomness, hash order, floats, whether a node
//! answers (that is evidence, and evidence becomes a command only through somebody's decision), how
//! a placement is computed (the router plans it), what a model is.

pub mod roster;
pub mod state;
