//! Raft, behind one door: the only folder that names `raft::`.
//!
//! [`Replica`] is raft-rs without its traps. It knows no thread, clock, socket or file: messages,
//! ticks and wishes go in, and what to make durable, what to send and what is committed come out,
//! in the one order that raft-rs allows:
//!
//! ```text
//!   step, tick, propose, ...        as many as there are
//!   ready()      -> Effects         send `messages`; make `batch` durable
//!   persisted()  -> Committed       only now: send `messages`, apply `entries`
//!   applied()                       only now: the next step, tick, ...
//! ```
//!
//! What is closed here that raft-rs 0.7 leaves open:
//! - it draws election timeouts from a random generator of the thread; they are drawn again from
//!   the seed that the replica was given, so that a run can be repeated;
//! - a follower would forward proposals; here it answers [`NotProposed::NotLeader`];
//! - a lost snapshot would leave its receiver waiting for ever; it is sent again after a while;
//! - its old protobuf parser: nothing is ever decoded with it ([`convert`]).
//!
//! Settings: PreVote and CheckQuorum on, reads by ReadIndex (never by lease: no clock decides),
//! every change of the group by joint consensus.

pub mod convert;
mod memory;
mod replica;
mod types;

pub use replica::{MESSAGE_ENTRIES_LEN_MAX, Replica};
pub use types::{Change, Committed, Config, Effects, NotProposed, Received, ReplicaError, Status};
