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
//!   voter::Voter    one process of the raft group: replica and state together; pure
//!     raft::Replica   raft-rs behind one door; pure
//!     state::State    what the committed entries amount to; pure
//!   steward::Steward  what the leader decides about expert nodes; pure
//!   store::Store    makes each log::Batch durable
//!
//!   service         a thread and sockets around voter, store and steward: the control plane
//!   access, guard   who may call what: one table, and the door that asks it
//!   audit           what was refused, and what operators ordered; allowance bounds what strangers add
//!   client          how everybody else speaks to it, over net
//!   enrolment       how a process gets its first certificate, and keeps one
//! ```
//!
//! Invariants:
//! - a command is applied entirely or refused entirely, and every process decides alike;
//! - each accepted change raises exactly one epoch by one; epochs never fall;
//! - an incarnation is handed out once; a node number and a voter number are never used again;
//! - the placement names only expert nodes that are members;
//! - nothing is said to a peer or a client before what it rests on is durable.
//!
//! What the pure parts do not know: sockets, clocks, threads, randomness, hash order, floats. Files
//! are known to [`store`] alone; sockets, time and tasks to [`net`], [`client`],
//! [`enrolment`] and [`service`]. What
//! no part knows: what a model is, and how a placement is computed (the router plans it).

pub mod access;
pub mod allowance;
pub mod audit;
pub mod checkpoint;
pub mod client;
pub mod enrolment;
pub mod guard;
pub mod log;
pub mod metrics;
#[cfg(feature = "etcd")]
pub mod mirror;
pub mod net;
pub mod raft;
pub mod roster;
pub mod served;
pub mod service;
pub mod state;
pub mod steward;
pub mod store;
pub mod tenant;
pub mod token;
pub mod voter;
