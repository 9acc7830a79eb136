//! Between raft-rs' types, ours, and the messages of the network and the disk.
//!
//! raft-rs' own protobuf parser is never used: it is of a version with a known stack overflow.
//! Everything from outside is decoded by prost and copied over here, field by field.

use bytes::Bytes;
use entente_proto::{list, wire};
use raft::eraftpb;

use super::MESSAGE_ENTRIES_LEN_MAX;
use crate::log::{Entry, EntryKind, Group, HardState, Snapshot};

/// Bytes of an encoded entry beside its content, at most.
pub(super) const ENTRY_OVERHEAD: u64 = 32;

/// Entries that one message has at most: more than fit into its length, as one that carries a request
/// takes more than 8 bytes. Of entries that carry nothing each byte would take many in memory.
const ENTRIES_MAX: usize = MESSAGE_ENTRIES_LEN_MAX as usize / 8;

/// A number of the wire that no type here has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0} is missing or unknown")]
pub struct Unknown(pub &'static str);

pub(super) fn hard_state_out(hard: HardState) -> eraftpb::HardState {
    let mut out = eraftpb::HardState::default();
    (out.term, out.vote, out.commit) = (hard.term, hard.vote, hard.commit);
    out
}

pub(super) fn hard_state_in(hard: &eraftpb::HardState) -> HardState {
    HardState { term: hard.term, vote: hard.vote, commit: hard.commit }
}

pub(super) fn group_out(group: &Group) -> eraftpb::ConfState {
    eraftpb::ConfState {
        voters: group.voters.iter().copied().collect(),
        learners: group.learners.iter().copied().collect(),
        voters_outgoing: group.outgoing.iter().copied().collect(),
        learners_next: group.learners_next.iter().copied().collect(),
        auto_leave: group.auto_leave,
        ..eraftpb::ConfState::default()
    }
}

pub(super) fn group_in(conf: &eraftpb::ConfState) -> Group {
    Group {
        voters: conf.voters.iter().copied().collect(),
        learners: conf.learners.iter().copied().collect(),
        outgoing: conf.voters_outgoing.iter().copied().collect(),
        learners_next: conf.learners_next.iter().copied().collect(),
        auto_leave: conf.auto_leave,
    }
}

pub(super) fn entry_out(entry: &Entry) -> eraftpb::Entry {
    let mut out = eraftpb::Entry::default();
    out.set_entry_type(match entry.kind {
        EntryKind::Normal => eraftpb::EntryType::EntryNormal,
        EntryKind::Group => eraftpb::EntryType::EntryConfChangeV2,
    });
    (out.index, out.term, out.data) = (entry.index, entry.term, entry.data.clone());
    out
}

pub(super) fn entry_in(entry: eraftpb::Entry) -> Entry {
    let kind = match entry.get_entry_type() {
        eraftpb::EntryType::EntryNormal => EntryKind::Normal,
        _ => EntryKind::Group,
    };
    Entry { index: entry.index, term: entry.term, kind, data: entry.data }
}

pub(super) fn snapshot_out(snapshot: &Snapshot) -> eraftpb::Snapshot {
    let mut out = eraftpb::Snapshot::default();
    let metadata = out.mut_metadata();
    (metadata.index, metadata.term) = (snapshot.index, snapshot.term);
    metadata.set_conf_state(group_out(&snapshot.group));
    out.data = snapshot.data.clone();
    out
}

pub(super) fn snapshot_in(snapshot: &eraftpb::Snapshot) -> Snapshot {
    let metadata = snapshot.get_metadata();
    Snapshot {
        index: metadata.index,
        term: metadata.term,
        group: group_in(metadata.get_conf_state()),
        data: snapshot.data.clone(),
    }
}

/// An entry as it is kept on the disk.
pub fn entry_to_wire(entry: &Entry) -> wire::RaftEntry {
    let entry_type = match entry.kind {
        EntryKind::Normal => eraftpb::EntryType::EntryNormal,
        EntryKind::Group => eraftpb::EntryType::EntryConfChangeV2,
    };
    wire::RaftEntry {
        entry_type: entry_type as i32,
        term: entry.term,
        index: entry.index,
        data: entry.data.clone(),
        context: Bytes::new(),
    }
}

/// An entry as it came from the disk or the network.
pub fn entry_from_wire(entry: wire::RaftEntry) -> Result<Entry, Unknown> {
    let kind = match entry.entry_type {
        t if t == eraftpb::EntryType::EntryNormal as i32 => EntryKind::Normal,
        t if t == eraftpb::EntryType::EntryConfChangeV2 as i32 => EntryKind::Group,
        _ => return Err(Unknown("the type of an entry")),
    };
    Ok(Entry { index: entry.index, term: entry.term, kind, data: entry.data })
}

/// A snapshot as it is sent or kept.
pub fn snapshot_to_wire(snapshot: &Snapshot) -> wire::RaftSnapshot {
    let group = &snapshot.group;
    let conf_state = wire::RaftConfState {
        voters: group.voters.iter().copied().collect(),
        learners: group.learners.iter().copied().collect(),
        voters_outgoing: group.outgoing.iter().copied().collect(),
        learners_next: group.learners_next.iter().copied().collect(),
        auto_leave: group.auto_leave,
    };
    let metadata = wire::RaftSnapshotMetadata {
        conf_state: Some(conf_state),
        index: snapshot.index,
        term: snapshot.term,
    };
    wire::RaftSnapshot { data: snapshot.data.clone(), metadata: Some(metadata) }
}

/// A snapshot as it came from the disk or the network. Its data is not looked at.
pub fn snapshot_from_wire(snapshot: wire::RaftSnapshot) -> Result<Snapshot, Unknown> {
    let metadata = snapshot.metadata.ok_or(Unknown("the place of a snapshot"))?;
    let conf = metadata.conf_state.ok_or(Unknown("the group of a snapshot"))?;
    let group = Group {
        voters: conf.voters.into_iter().collect(),
        learners: conf.learners.into_iter().collect(),
        outgoing: conf.voters_outgoing.into_iter().collect(),
        learners_next: conf.learners_next.into_iter().collect(),
        auto_leave: conf.auto_leave,
    };
    Ok(Snapshot { index: metadata.index, term: metadata.term, group, data: snapshot.data })
}

pub(super) fn message_to_wire(message: &eraftpb::Message) -> wire::RaftMessage {
    let mut entries = Vec::new();
    for entry in message.get_entries() {
        let context = entry.context.clone();
        let entry = wire::RaftEntry { context, ..entry_to_wire(&entry_in(entry.clone())) };
        list::push(&mut entries, &entry);
    }
    wire::RaftMessage {
        msg_type: message.get_msg_type() as i32,
        to: message.to,
        from: message.from,
        term: message.term,
        log_term: message.log_term,
        index: message.index,
        entries: entries.into(),
        commit: message.commit,
        commit_term: message.commit_term,
        snapshot: message
            .has_snapshot()
            .then(|| snapshot_to_wire(&snapshot_in(message.get_snapshot()))),
        request_snapshot: message.request_snapshot,
        reject: message.reject,
        reject_hint: message.reject_hint,
        context: message.context.clone(),
        priority: message.priority,
    }
}

pub(super) fn message_from_wire(message: wire::RaftMessage) -> Result<eraftpb::Message, Unknown> {
    let mut out = eraftpb::Message::default();
    out.set_msg_type(message_type(message.msg_type).ok_or(Unknown("the type of a message"))?);
    (out.to, out.from, out.term) = (message.to, message.from, message.term);
    (out.log_term, out.index) = (message.log_term, message.index);
    (out.commit, out.commit_term) = (message.commit, message.commit_term);
    (out.reject, out.reject_hint) = (message.reject, message.reject_hint);
    (out.request_snapshot, out.priority) = (message.request_snapshot, message.priority);
    out.context = message.context;
    let mut entries = Vec::new();
    for entry in list::each::<wire::RaftEntry, _>(message.entries) {
        let entry = entry.map_err(|_| Unknown("an entry"))?;
        if entries.len() == ENTRIES_MAX {
            return Err(Unknown("the end of a message's entries"));
        }
        let context = entry.context.clone();
        let mut entry = entry_out(&entry_from_wire(entry)?);
        entry.context = context;
        entries.push(entry);
    }
    out.set_entries(entries.into());
    if let Some(snapshot) = message.snapshot {
        out.set_snapshot(snapshot_out(&snapshot_from_wire(snapshot)?));
    }
    Ok(out)
}

/// The types that one voter may send another. Local ones are not among them, and neither is a
/// proposal: only the leader itself proposes, after it has looked at the request.
fn message_type(number: i32) -> Option<eraftpb::MessageType> {
    use eraftpb::MessageType as T;
    let types = [
        T::MsgAppend,
        T::MsgAppendResponse,
        T::MsgRequestVote,
        T::MsgRequestVoteResponse,
        T::MsgSnapshot,
        T::MsgHeartbeat,
        T::MsgHeartbeatResponse,
        T::MsgTransferLeader,
        T::MsgTimeoutNow,
        T::MsgReadIndex,
        T::MsgReadIndexResp,
        T::MsgRequestPreVote,
        T::MsgRequestPreVoteResponse,
    ];
    types.into_iter().find(|kind| *kind as i32 == number)
}

/// Whether only a leader sends messages of this type.
pub fn is_of_leader(number: i32) -> bool {
    use eraftpb::MessageType as T;
    [T::MsgAppend, T::MsgHeartbeat, T::MsgSnapshot].into_iter().any(|kind| kind as i32 == number)
}

pub(super) fn change_from_wire(change: wire::RaftConfChange) -> Option<eraftpb::ConfChangeV2> {
    use eraftpb::{ConfChangeTransition as Transition, ConfChangeType as Type};
    let mut out = eraftpb::ConfChangeV2::default();
    let transitions = [Transition::Auto, Transition::Implicit, Transition::Explicit];
    out.set_transition(transitions.into_iter().find(|t| *t as i32 == change.transition)?);
    let mut singles = Vec::with_capacity(change.changes.len());
    for single in change.changes {
        let types = [Type::AddNode, Type::RemoveNode, Type::AddLearnerNode];
        let kind = types.into_iter().find(|t| *t as i32 == single.change_type)?;
        let mut out = eraftpb::ConfChangeSingle::default();
        out.set_change_type(kind);
        out.node_id = single.node_id;
        singles.push(out);
    }
    out.set_changes(singles.into());
    Some(out)
}
