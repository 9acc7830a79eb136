//! What goes into a [`super::Replica`] and what comes out of it.

use std::collections::BTreeMap;

use entente_proto::wire;

use crate::log::{Batch, Entry, Group, Inconsistent, Snapshot};

/// How a replica runs.
#[derive(Debug, Clone)]
pub struct Config {
    /// Its number in the group; never 0.
    pub id: u64,
    /// Ticks between heartbeats.
    pub heartbeat_ticks: u16,
    /// Ticks without a leader before an election, at least; at most twice as many.
    pub election_ticks: u16,
    /// Decides the election timeouts and marks this start's reads. **Must differ at each start**:
    /// an answer to a read of an earlier start must not be taken for an answer to one of this.
    pub seed: u64,
}

/// A change of the group. Each is made by joint consensus.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// A new member receives the log and does not vote. All voters begin as learners.
    AddLearner(u64),
    /// A learner that has caught up becomes a voter.
    Promote(u64),
    /// A member leaves, for ever.
    Remove(u64),
    /// A learner becomes a voter in the place of one, at one stroke.
    Replace {
        /// The learner.
        promote: u64,
        /// The voter.
        remove: u64,
    },
}

/// Why something was not proposed. What *was* proposed may still get lost: until it is committed
/// its outcome is unknown.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotProposed {
    /// Only the leader proposes.
    #[error("not the leader; try {}", leader_text(*leader))]
    NotLeader {
        /// Who is, if it is known.
        leader: Option<u64>,
    },
    /// Too much is waiting to be committed, or leadership is being handed over.
    #[error("too much is waiting to be committed, or leadership is being handed over")]
    Busy,
    /// The log has bounds.
    #[error("{0}")]
    TooLong(String),
    /// A change of the group is under way.
    #[error("a change of the raft group is under way")]
    ChangeUnderWay,
    /// The change makes no sense in this group.
    #[error("the raft group cannot be changed so: {0}")]
    Change(String),
}

fn leader_text(leader: Option<u64>) -> String {
    leader.map_or_else(|| "again later".to_owned(), |id| format!("voter {id}"))
}

/// The replica cannot go on. The process must stop.
#[derive(Debug, thiserror::Error)]
pub enum ReplicaError {
    /// The disk does not hold a log.
    #[error("the durable log is not consistent: {0}")]
    Inconsistent(#[from] Inconsistent),
    /// raft-rs refuses the configuration or the log.
    #[error("raft: {0}")]
    Raft(String),
    /// The caller broke the order that [`super`] gives.
    #[error("{0} was called between ready() and applied()")]
    Order(&'static str),
    /// A committed change of the group has no meaning; perhaps a newer version proposed it.
    #[error("the change of the raft group at index {0} cannot be read")]
    Change(u64),
}

/// What became of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Received {
    /// It was taken.
    Taken,
    /// Raft has no use for it, for example because its sender is not in the group.
    Ignored,
}

/// The first half of what is to be done.
#[derive(Debug, Default)]
pub struct Effects {
    /// May be sent at once, also before `batch` is durable.
    pub messages: Vec<wire::RaftMessage>,
    /// To be made durable before [`super::Replica::persisted`] is called.
    pub batch: Option<Batch>,
}

/// The second half: what is true once the first is done.
#[derive(Debug, Default)]
pub struct Committed {
    /// May be sent only now.
    pub messages: Vec<wire::RaftMessage>,
    /// A snapshot from the leader replaces the state.
    pub snapshot: Option<Snapshot>,
    /// To be applied in this order, after the snapshot.
    pub entries: Vec<Entry>,
    /// Reads that may be served from a state in which the entry of this index is applied.
    pub reads: Vec<(u64, u64)>,
}

/// What an operator wants to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    /// Its number.
    pub id: u64,
    /// The current term.
    pub term: u64,
    /// The leader, if it is known.
    pub leader: Option<u64>,
    /// Whether it is the leader.
    pub is_leader: bool,
    /// The last committed entry that it knows of.
    pub commit: u64,
    /// The last entry.
    pub last_index: u64,
    /// The place before the first entry.
    pub base: u64,
    /// The last entry in the latest snapshot.
    pub snapshot: u64,
    /// Who takes part.
    pub group: Group,
    /// On the leader: the last entry that each member is known to hold.
    pub matched: BTreeMap<u64, u64>,
}
