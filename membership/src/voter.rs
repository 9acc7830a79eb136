//! [`Voter`]: one process of the raft group, as a pure machine.
//!
//! It puts [`Replica`] and [`State`] together: messages, ticks and requests go in; what to make
//! durable, what to send and what to answer come out. A thread with a disk and sockets around it is
//! a coordinator's membership service or a witness; a simulator around it is a test.
//!
//! ```text
//!   loop {
//!     receive | tick | propose | read | change
//!     while let Some(effects) = voter.ready()? {
//!       send(effects.messages); store.persist(effects.batch)?;   // an error here ends the process
//!       let done = voter.persisted()?;
//!       send(done.messages); answer(done.answers); serve(done.reads);
//!     }
//!   }
//! ```
//!
//! A request that was proposed is *unknown* until an answer to it comes out, which may be never:
//! whoever wants to know repeats it with the same session and sequence.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use entente_proto::ids::Incarnation;
use entente_proto::wire;
use prost::Message;
use sha2::{Digest, Sha256};

use crate::log::{Batch, Durable, Entry, EntryKind, Group, HardState, Snapshot};
use crate::raft::{Change, Config, Effects, NotProposed, Received, Replica, ReplicaError, Status};
use crate::state::codec::{Malformed, REQUEST_LEN_MAX, STATE_LEN_MAX};
use crate::state::{NodeSpec, OutOfOrder, Outcome, Refused, Request, SessionId, State, VoterId};

/// Longest encoded envelope in bytes: a snapshot and a little.
pub const ENVELOPE_LEN_MAX: usize = STATE_LEN_MAX + (1 << 16);
/// Bytes of entries after which a snapshot is taken, however few they are.
pub const LOG_LEN_MAX: u64 = 16 << 20;

/// Names a cluster for its voters: the beginning of the SHA-256 of its first state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ClusterId(pub [u8; 16]);

/// How a voter runs.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Its raft.
    pub raft: Config,
    /// Its cluster; messages of another one are ignored.
    pub cluster: ClusterId,
    /// Entries after which a snapshot is taken.
    pub snapshot_entries: u64,
    /// Entries before a snapshot that are kept, for followers that are a little behind.
    pub snapshot_keep: u64,
    /// Whether somebody wants every state that was committed, and not only the last.
    pub tells_changes: bool,
}

/// The voter cannot go on. The process must stop.
#[derive(Debug, thiserror::Error)]
pub enum VoterError {
    /// Raft cannot go on.
    #[error(transparent)]
    Replica(#[from] ReplicaError),
    /// The snapshot on the disk is not one.
    #[error("the durable snapshot at index {index}: {source}")]
    Snapshot {
        /// Its last entry.
        index: u64,
        /// What is wrong.
        source: Malformed,
    },
    /// The snapshot is of another entry than it says.
    #[error("the snapshot at index {index} holds the state at {applied}")]
    SnapshotIndex {
        /// Where it says to be.
        index: u64,
        /// Where it is.
        applied: u64,
    },
    /// A committed entry has no meaning here; perhaps a newer version proposed it. Skipping it
    /// would be to differ from the voters that understand it.
    #[error("committed entry {index}: {source}")]
    Entry {
        /// The entry.
        index: u64,
        /// What is wrong.
        source: Malformed,
    },
    /// Entries were lost or repeated.
    #[error(transparent)]
    OutOfOrder(#[from] OutOfOrder),
    /// The leader has come to another state from the same entries.
    #[error("the state at index {index} differs from that of voter {leader}")]
    Differs {
        /// Where the hashes were compared.
        index: u64,
        /// Whose hash it is.
        leader: u64,
    },
}

/// An answer to a request that this voter, or another, proposed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// The entry that it was.
    pub index: u64,
    /// Whose request.
    pub session: SessionId,
    /// Which one.
    pub sequence: u64,
    /// What became of it.
    pub outcome: Outcome,
}

/// What to do before [`Voter::persisted`].
#[derive(Debug, Default)]
pub struct Ready {
    /// May be sent at once.
    pub messages: Vec<wire::RaftEnvelope>,
    /// Must be durable first.
    pub batch: Option<Batch>,
}

/// What is true afterwards.
#[derive(Debug, Default)]
pub struct Done {
    /// May be sent only now.
    pub messages: Vec<wire::RaftEnvelope>,
    /// Of all requests that were applied, whoever proposed them.
    pub answers: Vec<Answer>,
    /// Reads, by the number of [`Voter::read`], that [`Voter::state`] is fit for now.
    pub reads: Vec<u64>,
    /// A snapshot took the state's place: answers in between are not known here.
    pub installed: bool,
    /// Members that left the group.
    pub left: BTreeSet<u64>,
    /// The states in which epochs or records had changed, if [`Settings::tells_changes`].
    pub changes: Vec<State>,
}

/// One process of the raft group.
pub struct Voter {
    settings: Settings,
    replica: Replica,
    state: State,
    incarnation: Incarnation,
    /// The latest incarnation seen of each peer.
    peers: BTreeMap<u64, u64>,
    /// Reads that wait for an index to be applied.
    reads: BTreeMap<u64, u64>,
    log_len: u64,
}

/// What the disk of each founding voter holds before the first start, and the cluster's name. All
/// of them must be given the same nodes, in any order.
pub fn genesis(specs: Vec<NodeSpec>) -> Result<(ClusterId, Durable), Refused> {
    let state = State::genesis(specs)?;
    let data = state.seal();
    let mut id = [0; 16];
    id.copy_from_slice(&Sha256::digest(&data)[..16]);
    let group = Group { voters: state.voters().map(|(id, _)| id.0).collect(), ..Group::default() };
    let durable = Durable {
        hard_state: HardState { term: 1, vote: 0, commit: 1 },
        snapshot: Snapshot { index: 1, term: 1, group, data },
        base: (1, 1),
        entries: Vec::new(),
    };
    Ok((ClusterId(id), durable))
}

/// Reads an envelope off the network.
pub fn decode_envelope(bytes: &[u8]) -> Result<wire::RaftEnvelope, Malformed> {
    let (what, max) = ("an envelope", ENVELOPE_LEN_MAX);
    if bytes.len() > max {
        return Err(Malformed::TooLong { what, len: bytes.len(), max });
    }
    wire::RaftEnvelope::decode(bytes)
        .map_err(|error| Malformed::Prost { what, reason: error.to_string() })
}

impl Voter {
    /// Starts from what the disk holds: [`genesis`] for a founder, nothing for a learner.
    pub fn open(settings: Settings, durable: Durable) -> Result<Self, VoterError> {
        let state = restore(&durable.snapshot)?;
        let log_len = durable.entries.iter().map(|entry| entry.data.len() as u64).sum();
        let replica = Replica::open(settings.raft.clone(), durable)?;
        Ok(Self {
            settings,
            replica,
            state,
            incarnation: Incarnation::default(),
            peers: BTreeMap::new(),
            reads: BTreeMap::new(),
            log_len,
        })
    }

    /// The incarnation that this start registered; from here on messages carry it.
    pub fn set_incarnation(&mut self, incarnation: Incarnation) {
        self.incarnation = incarnation;
    }

    /// Takes a message. What is not for this voter, or not credible, is ignored.
    pub fn receive(&mut self, envelope: wire::RaftEnvelope) -> Result<Received, VoterError> {
        let for_us = envelope.cluster_id == self.settings.cluster.0[..]
            && envelope.to == self.settings.raft.id;
        let Some(message) = envelope
            .message
            .filter(|message| for_us && message.from == envelope.from && message.to == envelope.to)
        else {
            return Ok(Received::Ignored);
        };
        let latest = self.peers.entry(envelope.from).or_default();
        if envelope.incarnation != 0 && envelope.incarnation < *latest {
            return Ok(Received::Ignored);
        }
        *latest = envelope.incarnation.max(*latest);
        if let Some(mark) = envelope.mark.filter(|_| speaks_as_leader(&message)) {
            self.compare(&mark, envelope.from)?;
        }
        if message.snapshot.as_ref().is_some_and(|snapshot| !credible(snapshot)) {
            return Ok(Received::Ignored);
        }
        Ok(self.replica.step(message)?)
    }

    /// A follower that differs from its leader stops. A leader does not stop for a follower, or one
    /// sick voter would stop all of them.
    fn compare(&self, theirs: &wire::HashMark, leader: u64) -> Result<(), VoterError> {
        let ours = self.state.marks().find(|mark| mark.index == theirs.index);
        match ours {
            Some(ours) if ours.sha256[..] != theirs.sha256[..] => {
                Err(VoterError::Differs { index: theirs.index, leader })
            }
            _ => Ok(()),
        }
    }

    /// Time passes.
    pub fn tick(&mut self) -> Result<(), VoterError> {
        Ok(self.replica.tick()?)
    }

    /// Stands for election at once.
    pub fn campaign(&mut self) -> Result<(), VoterError> {
        Ok(self.replica.campaign()?)
    }

    /// Proposes a request. `Ok` is not an answer; see [`Done::answers`].
    pub fn propose(&mut self, request: &Request) -> Result<(), NotProposed> {
        let data = request.encode();
        if data.len() > REQUEST_LEN_MAX {
            let text = format!("the request has {} bytes of {REQUEST_LEN_MAX}", data.len());
            return Err(NotProposed::TooLong(text));
        }
        self.replica.propose(data)
    }

    /// Proposes a change of the group. A member that joins must have been minted.
    pub fn change(&mut self, change: Change) -> Result<(), NotProposed> {
        match change {
            Change::AddLearner(id) if !self.state.may_vote(VoterId(id)) => {
                Err(NotProposed::Change(format!("voter {id} is not minted, or retired")))
            }
            _ => self.replica.change(change),
        }
    }

    /// Hands leadership to another voter.
    pub fn transfer_leader(&mut self, to: u64) -> Result<(), NotProposed> {
        self.replica.transfer_leader(to)
    }

    /// Asks for a state that is not older than this moment; not only the leader can. The number comes back in
    /// [`Done::reads`], or never: ask again after a while.
    pub fn read(&mut self) -> Result<u64, NotProposed> {
        self.replica.read_index()
    }

    /// What is to be done; `None` when there is nothing.
    pub fn ready(&mut self) -> Result<Option<Ready>, VoterError> {
        let Some(Effects { messages, batch }) = self.replica.ready()? else { return Ok(None) };
        Ok(Some(Ready { messages: self.envelopes(messages), batch }))
    }

    /// The batch of the last [`Voter::ready`] is durable, or there was none.
    pub fn persisted(&mut self) -> Result<Done, VoterError> {
        let committed = self.replica.persisted()?;
        let mut done = Done::default();
        if let Some(snapshot) = &committed.snapshot {
            self.state = restore(snapshot)?;
            (done.installed, self.log_len) = (true, 0);
        }
        for entry in &committed.entries {
            self.apply(entry, &mut done)?;
        }
        self.replica.applied();
        self.reads.extend(committed.reads);
        let applied = self.state.applied_index();
        done.reads = self.reads.extract_if(.., |_, index| *index <= applied).map(|r| r.0).collect();
        done.messages = self.envelopes(committed.messages);
        self.compact_if_long()?;
        Ok(done)
    }

    fn apply(&mut self, entry: &Entry, done: &mut Done) -> Result<(), VoterError> {
        let index = entry.index;
        self.log_len += entry.data.len() as u64;
        if entry.kind == EntryKind::Group {
            let state = &self.state;
            let left = self.replica.apply_change(entry, |id| state.may_vote(VoterId(id)))?;
            for id in &left {
                self.state.retire_voter(VoterId(*id));
            }
            done.left.extend(left);
        }
        let request = (entry.kind == EntryKind::Normal && !entry.data.is_empty())
            .then(|| Request::decode(&entry.data))
            .transpose()
            .map_err(|source| VoterError::Entry { index, source })?;
        let name = request.as_ref().map(|request| (request.session, request.sequence));
        let before = self.state.changes();
        let outcome = self.state.apply_entry(index, request)?;
        if self.settings.tells_changes && self.state.changes() != before {
            done.changes.push(self.state.clone());
        }
        if let (Some((session, sequence)), Some(outcome)) = (name, outcome) {
            done.answers.push(Answer { index, session, sequence, outcome });
        }
        Ok(())
    }

    /// Takes a snapshot now, which goes to the disk with the next batch. Returns its index.
    pub fn take_snapshot(&mut self) -> Result<u64, VoterError> {
        let applied = self.state.applied_index();
        self.replica.compact(applied, self.state.seal(), self.settings.snapshot_keep)?;
        self.log_len = 0;
        Ok(applied)
    }

    fn compact_if_long(&mut self) -> Result<(), VoterError> {
        let applied = self.state.applied_index();
        let many = applied >= self.replica.log().snapshot.index + self.settings.snapshot_entries;
        let large = self.log_len > LOG_LEN_MAX;
        // A member that joins ignores a snapshot that does not name it, and has no log to catch up
        // by: without one of after the change it would wait for as long as it takes to make many.
        let changed = *self.replica.group() != self.replica.log().snapshot.group;
        if many || large || changed {
            let keep = if large { 0 } else { self.settings.snapshot_keep };
            self.replica.compact(applied, self.state.seal(), keep)?;
            self.log_len = 0;
        }
        Ok(())
    }

    fn envelopes(&self, messages: Vec<wire::RaftMessage>) -> Vec<wire::RaftEnvelope> {
        let mark = self.state.marks().last().map(|mark| wire::HashMark {
            index: mark.index,
            sha256: Bytes::copy_from_slice(&mark.sha256),
        });
        let envelope = |message: wire::RaftMessage| wire::RaftEnvelope {
            cluster_id: Bytes::copy_from_slice(&self.settings.cluster.0),
            from: self.settings.raft.id,
            to: message.to,
            incarnation: self.incarnation.0,
            membership_epoch: self.state.membership_epoch().0,
            mark: mark.clone(),
            message: Some(message),
        };
        messages.into_iter().map(envelope).collect()
    }

    /// What is agreed on, as far as this voter knows. Serving goes by it also without a quorum;
    /// only [`Voter::read`] says that it is not out of date.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Who takes part in raft.
    pub fn group(&self) -> &Group {
        self.replica.group()
    }

    /// The log in memory.
    pub fn log(&self) -> &Durable {
        self.replica.log()
    }

    /// Who leads, if it is known.
    pub fn leader(&self) -> Option<u64> {
        self.replica.leader()
    }

    /// Whether it leads.
    pub fn is_leader(&self) -> bool {
        self.replica.is_leader()
    }

    /// What an operator wants to know.
    pub fn status(&self) -> Status {
        self.replica.status()
    }
}

fn restore(snapshot: &Snapshot) -> Result<State, VoterError> {
    let index = snapshot.index;
    if index == 0 {
        return Ok(State::new());
    }
    let state =
        State::unseal(&snapshot.data).map_err(|source| VoterError::Snapshot { index, source })?;
    let applied = state.applied_index();
    if applied != index {
        return Err(VoterError::SnapshotIndex { index, applied });
    }
    Ok(state)
}

/// Whether a snapshot off the network may replace what is here.
fn credible(snapshot: &wire::RaftSnapshot) -> bool {
    let index = snapshot.metadata.as_ref().map(|metadata| metadata.index);
    State::unseal(&snapshot.data).is_ok_and(|state| Some(state.applied_index()) == index)
}

fn speaks_as_leader(message: &wire::RaftMessage) -> bool {
    crate::raft::convert::is_of_leader(message.msg_type)
}
