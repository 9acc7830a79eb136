//! [`Replica`]: one voter or learner of the raft group.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use entente_proto::wire;
use prost::Message as _;
use raft::eraftpb::{self, ConfChangeSingle, ConfChangeTransition, ConfChangeType, ConfChangeV2};
use raft::{RawNode, ReadOnlyOption, SnapshotStatus, StateRole};

use super::convert;
use super::memory::Memory;
use super::types::{
    Change, Committed, Config, Effects, NotProposed, Received, ReplicaError, Status,
};
use crate::log::{Batch, Durable, Entry, Group, Snapshot};

/// Bytes of entries in one message, unless a single entry is longer.
pub const MESSAGE_ENTRIES_LEN_MAX: u64 = 64 << 10;
/// Bytes of entries that may be proposed and not committed; more is refused as busy.
const UNCOMMITTED_LEN_MAX: u64 = 4 << 20;
/// Bytes of entries that are handed out to be applied at a time, unless one entry is longer.
const COMMITTED_LEN_MAX: u64 = 4 << 20;
/// Append messages on the way to one follower.
const INFLIGHT_MESSAGES_MAX: usize = 256;
/// Entries that a learner may lack when it is promoted: a heartbeat's worth.
const PROMOTE_LAG_MAX: u64 = 64;

/// One member of the raft group.
pub struct Replica {
    raw: RawNode<Memory>,
    config: Config,
    random: u64,
    reads_asked: u64,
    group: Group,
    /// raft-rs reports a commit that it learns late only once; every batch carries the latest.
    hard_state: crate::log::HardState,
    pending: Option<raft::Ready>,
    compaction: Option<(Snapshot, (u64, u64))>,
    /// Snapshots on their way, with the ticks since.
    snapshots: BTreeMap<u64, u16>,
}

impl Replica {
    /// Starts from what the disk holds. Everything after the snapshot is handed out again.
    pub fn open(config: Config, durable: Durable) -> Result<Self, ReplicaError> {
        durable.check()?;
        let election_ticks = usize::from(config.election_ticks);
        let settings = raft::Config {
            id: config.id,
            election_tick: election_ticks,
            heartbeat_tick: config.heartbeat_ticks.into(),
            min_election_tick: election_ticks,
            max_election_tick: 2 * election_ticks,
            applied: durable.snapshot.index,
            max_size_per_msg: MESSAGE_ENTRIES_LEN_MAX,
            max_inflight_msgs: INFLIGHT_MESSAGES_MAX,
            max_uncommitted_size: UNCOMMITTED_LEN_MAX,
            max_committed_size_per_ready: COMMITTED_LEN_MAX,
            pre_vote: true,
            check_quorum: true,
            read_only_option: ReadOnlyOption::Safe,
            ..raft::Config::default()
        };
        let logger = slog::Logger::root(slog::Discard, slog::o!());
        let (group, hard_state) = (durable.snapshot.group.clone(), durable.hard_state);
        let raw = RawNode::new(&settings, Memory(durable), &logger).map_err(raft_error)?;
        let random = config.seed ^ config.id.rotate_left(32);
        let mut replica = Self {
            raw,
            config,
            random,
            reads_asked: 0,
            group,
            hard_state,
            pending: None,
            compaction: None,
            snapshots: BTreeMap::new(),
        };
        replica.draw_election_timeout();
        Ok(replica)
    }

    /// Takes a message of another member.
    pub fn step(&mut self, message: wire::RaftMessage) -> Result<Received, ReplicaError> {
        self.expect_idle("step()")?;
        let addressed = message.to == self.config.id;
        let Ok(message) = convert::message_from_wire(message) else {
            return Ok(Received::Ignored);
        };
        if !addressed || malformed(&message) {
            return Ok(Received::Ignored);
        }
        let taken = self.raw.step(message).is_ok();
        self.draw_election_timeout();
        Ok(if taken { Received::Taken } else { Received::Ignored })
    }

    /// Time passes.
    pub fn tick(&mut self) -> Result<(), ReplicaError> {
        self.expect_idle("tick()")?;
        self.raw.tick();
        self.draw_election_timeout();
        self.resend_snapshots();
        self.leave_joint();
        Ok(())
    }

    /// Proposes an entry. `Ok` says that it is on its way, not that it will arrive.
    pub fn propose(&mut self, data: Bytes) -> Result<(), NotProposed> {
        self.expect_leader()?;
        self.raw.propose(Vec::new(), data.to_vec()).map_err(|_| NotProposed::Busy)
    }

    /// Proposes a change of the group.
    pub fn change(&mut self, change: Change) -> Result<(), NotProposed> {
        self.expect_leader()?;
        if self.raw.raft.has_pending_conf() || !self.group.outgoing.is_empty() {
            return Err(NotProposed::ChangeUnderWay);
        }
        self.check_change(change)?;
        let singles = match change {
            Change::AddLearner(id) => vec![(id, ConfChangeType::AddLearnerNode)],
            Change::Promote(id) => vec![(id, ConfChangeType::AddNode)],
            Change::Remove(id) => vec![(id, ConfChangeType::RemoveNode)],
            Change::Replace { promote, remove } => {
                vec![(promote, ConfChangeType::AddNode), (remove, ConfChangeType::RemoveNode)]
            }
        };
        let mut proposal = ConfChangeV2::default();
        proposal.set_transition(ConfChangeTransition::Implicit);
        let singles: Vec<ConfChangeSingle> = singles.into_iter().map(single).collect();
        proposal.set_changes(singles.into());
        self.raw.propose_conf_change(Vec::new(), proposal).map_err(|_| NotProposed::Busy)
    }

    fn check_change(&self, change: Change) -> Result<(), NotProposed> {
        let refuse = |text: String| Err(NotProposed::Change(text));
        let (joins, leaves) = match change {
            Change::AddLearner(id) if self.group.contains(id) => {
                return refuse(format!("{id} is a member already"));
            }
            Change::AddLearner(_) => return Ok(()),
            Change::Promote(id) => (Some(id), None),
            Change::Remove(id) => (None, Some(id)),
            Change::Replace { promote, remove } => (Some(promote), Some(remove)),
        };
        if let Some(id) = leaves.filter(|id| !self.group.contains(*id)) {
            return refuse(format!("{id} is not a member"));
        }
        if leaves.is_some_and(|id| self.group.voters.contains(&id))
            && joins.is_none()
            && self.group.voters.len() == 1
        {
            return refuse("the last voter cannot leave".to_owned());
        }
        let Some(id) = joins else { return Ok(()) };
        if !self.group.learners.contains(&id) {
            return refuse(format!("{id} is not a learner"));
        }
        let matched = self.raw.raft.prs().get(id).map_or(0, |progress| progress.matched);
        let commit = self.hard_state.commit;
        if matched.saturating_add(PROMOTE_LAG_MAX) < commit {
            return refuse(format!("learner {id} holds {matched} of {commit} entries"));
        }
        Ok(())
    }

    /// Asks from which index on a state is fit to be read now; any member that
    /// knows a leader may.
    /// The answer comes in
    /// [`Committed::reads`] under the number returned, or never: ask again after a while.
    pub fn read_index(&mut self) -> Result<u64, NotProposed> {
        if self.pending.is_some() {
            return Err(NotProposed::Busy);
        }
        // One that was taken out of the group is told nothing any more, not even who leads.
        if self.leader().is_none() || !self.group.contains(self.config.id) {
            return Err(NotProposed::NotLeader { leader: None });
        }
        self.reads_asked += 1;
        let number = self.reads_asked;
        let context = [self.config.id, self.config.seed, number];
        self.raw.read_index(context.iter().flat_map(|part| part.to_le_bytes()).collect());
        Ok(number)
    }

    /// Hands leadership to a voter, when it can take it.
    pub fn transfer_leader(&mut self, to: u64) -> Result<(), NotProposed> {
        self.expect_leader()?;
        if !self.group.voters.contains(&to) {
            return Err(NotProposed::Change(format!("{to} is not a voter")));
        }
        self.raw.transfer_leader(to);
        Ok(())
    }

    /// Stands for election at once; for a first start, where nobody leads yet.
    pub fn campaign(&mut self) -> Result<(), ReplicaError> {
        self.expect_idle("campaign()")?;
        // Not being able to stand is no error: somebody else will.
        let _ = self.raw.campaign();
        self.draw_election_timeout();
        Ok(())
    }

    /// Replaces all entries up to `snapshot.index` but for the last `keep`, for followers that are
    /// a little behind. The change is in the next batch.
    pub fn compact(&mut self, index: u64, data: Bytes, keep: u64) -> Result<(), ReplicaError> {
        let memory = &self.raw.store().0;
        if index <= memory.snapshot.index {
            return Ok(());
        }
        let term_of = |at| self.raw.raft.raft_log.term(at).map_err(raft_error);
        let snapshot = Snapshot { index, term: term_of(index)?, group: self.group.clone(), data };
        let base = index.saturating_sub(keep).max(memory.base.0);
        self.compaction = Some((snapshot, (base, term_of(base)?)));
        Ok(())
    }

    /// What is to be done now; `None` when there is nothing.
    pub fn ready(&mut self) -> Result<Option<Effects>, ReplicaError> {
        self.expect_idle("ready()")?;
        if !self.raw.has_ready() && self.compaction.is_none() {
            return Ok(None);
        }
        let mut ready = self.raw.ready();
        if let Some(hard_state) = ready.hs() {
            self.hard_state = convert::hard_state_in(hard_state);
        }
        let batch = self.batch(&mut ready);
        if let Some(batch) = &batch {
            self.raw.mut_store().absorb(batch);
        }
        let messages = self.outgoing(ready.take_messages());
        self.pending = Some(ready);
        Ok(Some(Effects { messages, batch }))
    }

    fn batch(&mut self, ready: &mut raft::Ready) -> Option<Batch> {
        let compaction = self.compaction.take();
        let durable = &self.raw.store().0;
        let mut batch = Batch {
            hard_state: self.hard_state,
            snapshot: None,
            clear: false,
            entries: ready.take_entries().into_iter().map(convert::entry_in).collect(),
            base: durable.base,
        };
        if let Some((snapshot, base)) = compaction {
            (batch.snapshot, batch.base) = (Some(snapshot), base);
        }
        // The leader's snapshot is of a later entry than any of ours.
        if !ready.snapshot().is_empty() {
            let snapshot = convert::snapshot_in(ready.snapshot());
            batch.base = (snapshot.index, snapshot.term);
            (batch.snapshot, batch.clear) = (Some(snapshot), true);
        }
        let changed = batch.snapshot.is_some()
            || !batch.entries.is_empty()
            || batch.hard_state != durable.hard_state;
        changed.then_some(batch)
    }

    /// The batch of the last [`Replica::ready`] is durable, or there was none.
    pub fn persisted(&mut self) -> Result<Committed, ReplicaError> {
        let Some(mut ready) = self.pending.take() else {
            return Err(ReplicaError::Order("persisted()"));
        };
        let snapshot =
            (!ready.snapshot().is_empty()).then(|| convert::snapshot_in(ready.snapshot()));
        if let Some(snapshot) = &snapshot {
            self.group = snapshot.group.clone();
        }
        let mut messages = ready.take_persisted_messages();
        let mut entries = ready.take_committed_entries();
        let reads = ready.take_read_states();
        let mut light = self.raw.advance_append(ready);
        messages.append(&mut light.take_messages());
        entries.append(&mut light.take_committed_entries());
        if let Some(commit) = light.commit_index() {
            self.hard_state.commit = commit;
        }
        Ok(Committed {
            messages: self.outgoing(messages),
            snapshot,
            entries: entries.into_iter().map(convert::entry_in).collect(),
            reads: reads.iter().filter_map(|read| self.own_read(read)).collect(),
        })
    }

    /// A committed change of the group takes effect. Returns who left. The change is refused if
    /// `may_join` says no to anybody who joins; it must say the same on every member.
    pub fn apply_change(
        &mut self,
        entry: &Entry,
        may_join: impl Fn(u64) -> bool,
    ) -> Result<BTreeSet<u64>, ReplicaError> {
        let change = wire::RaftConfChange::decode(&entry.data[..]).ok();
        let change = change.and_then(convert::change_from_wire);
        let change = change.ok_or(ReplicaError::Change(entry.index))?;
        let mut joins = change
            .get_changes()
            .iter()
            .filter(|single| single.get_change_type() != ConfChangeType::RemoveNode);
        if !joins.all(|single| may_join(single.node_id)) {
            return Ok(BTreeSet::new());
        }
        let before = std::mem::take(&mut self.group);
        // A change that does not fit the group, such as one proposed twice, changes nothing; every
        // member finds so alike.
        let conf = self.raw.apply_conf_change(&change);
        let Ok(conf) = conf else {
            self.group = before;
            return Ok(BTreeSet::new());
        };
        self.group = convert::group_in(&conf);
        // raft-rs would lead on without itself, and panic on the next acknowledgement.
        if self.is_leader() && !self.group.contains(self.config.id) {
            let term = self.raw.raft.term;
            self.raw.raft.become_follower(term, raft::INVALID_ID);
        }
        let members = before.voters.iter().chain(&before.learners).chain(&before.outgoing);
        Ok(members.copied().filter(|id| !self.group.contains(*id)).collect())
    }

    /// Everything that was committed is applied.
    pub fn applied(&mut self) {
        self.raw.advance_apply();
    }

    /// Who takes part.
    pub fn group(&self) -> &Group {
        &self.group
    }

    /// The log as it is in memory, which is as the last batch left the disk.
    pub fn log(&self) -> &Durable {
        &self.raw.store().0
    }

    /// Whether it leads.
    pub fn is_leader(&self) -> bool {
        self.raw.raft.state == StateRole::Leader
    }

    /// Who leads, if it is known.
    pub fn leader(&self) -> Option<u64> {
        (self.raw.raft.leader_id != 0).then_some(self.raw.raft.leader_id)
    }

    /// What an operator wants to know.
    pub fn status(&self) -> Status {
        let log = self.log();
        let matched = self.raw.raft.prs().iter().map(|(id, progress)| (*id, progress.matched));
        Status {
            id: self.config.id,
            term: self.raw.raft.term,
            leader: self.leader(),
            is_leader: self.is_leader(),
            commit: self.hard_state.commit,
            last_index: log.last_index(),
            base: log.base.0,
            snapshot: log.snapshot.index,
            group: self.group.clone(),
            matched: if self.is_leader() { matched.collect() } else { BTreeMap::new() },
        }
    }

    fn expect_idle(&self, what: &'static str) -> Result<(), ReplicaError> {
        if self.pending.is_some() { Err(ReplicaError::Order(what)) } else { Ok(()) }
    }

    fn expect_leader(&self) -> Result<(), NotProposed> {
        if self.pending.is_some() {
            return Err(NotProposed::Busy);
        }
        if self.is_leader() {
            return Ok(());
        }
        Err(NotProposed::NotLeader { leader: self.leader() })
    }

    /// raft-rs draws a timeout only where it also begins to count from 0; so wherever the count is
    /// at 0 we draw again, from the seed, and what raft-rs drew is never used.
    fn draw_election_timeout(&mut self) {
        let ticks = usize::from(self.config.election_ticks);
        if self.raw.raft.election_elapsed != 0 {
            return;
        }
        // SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        let extra = (z % ticks as u64) as usize;
        self.raw.raft.set_randomized_election_timeout(ticks + extra);
    }

    fn outgoing(&mut self, messages: Vec<eraftpb::Message>) -> Vec<wire::RaftMessage> {
        for message in &messages {
            if message.has_snapshot() && !message.get_snapshot().is_empty() {
                self.snapshots.insert(message.to, 0);
            }
        }
        messages.iter().map(convert::message_to_wire).collect()
    }

    /// Nobody reports whether a snapshot arrived. A member that got it answers; for one that does
    /// not, the leader probes again after an election timeout and sends another if need be.
    fn resend_snapshots(&mut self) {
        let timeout = self.config.election_ticks;
        let mut expired = Vec::new();
        for (id, ticks) in &mut self.snapshots {
            *ticks += 1;
            if *ticks > timeout {
                expired.push(*id);
            }
        }
        for id in expired {
            self.snapshots.remove(&id);
            self.raw.report_snapshot(id, SnapshotStatus::Failure);
        }
    }

    /// raft-rs ends a joint group by itself only on the leader that began it. Any leader does here.
    fn leave_joint(&mut self) {
        if self.is_leader() && self.group.auto_leave && !self.raw.raft.has_pending_conf() {
            // Being busy is no error: the next tick tries again.
            let _ = self.raw.propose_conf_change(Vec::new(), ConfChangeV2::default());
        }
    }

    fn own_read(&self, read: &raft::ReadState) -> Option<(u64, u64)> {
        let part = |at: usize| {
            let bytes = read.request_ctx.get(at * 8..at * 8 + 8)?;
            Some(u64::from_le_bytes(bytes.try_into().ok()?))
        };
        let own = part(0)? == self.config.id && part(1)? == self.config.seed;
        own.then_some((part(2)?, read.index))
    }
}

/// What raft-rs takes on trust from its peers and would panic on.
fn malformed(message: &eraftpb::Message) -> bool {
    let kind = message.get_msg_type();
    let mut index = message.index;
    let in_order = message.get_entries().iter().all(|entry| {
        index += 1;
        entry.index == index && entry.term <= message.term
    });
    let is_append = kind == eraftpb::MessageType::MsgAppend;
    let is_read =
        matches!(kind, eraftpb::MessageType::MsgReadIndex | eraftpb::MessageType::MsgReadIndexResp);
    message.from == 0
        || (is_append && !in_order)
        || (is_read && message.get_entries().len() != 1)
        || (!is_append && !is_read && !message.get_entries().is_empty())
        || (kind == eraftpb::MessageType::MsgSnapshot && message.get_snapshot().is_empty())
}

fn single((id, kind): (u64, ConfChangeType)) -> ConfChangeSingle {
    let mut single = ConfChangeSingle::default();
    single.set_change_type(kind);
    single.node_id = id;
    single
}

fn raft_error(error: raft::Error) -> ReplicaError {
    ReplicaError::Raft(error.to_string())
}
