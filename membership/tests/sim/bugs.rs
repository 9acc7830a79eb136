//! Bugs planted around the shipped code: each makes a disk, a network or a shell break one promise
//! that the cores rely on, or undoes one thing that they do. None of them is in the library, so
//! none can be shipped.

use entente_membership::log::Durable;
use entente_membership::state::codec::sha256;
use entente_proto::list;
use entente_proto::wire::{self, state_item::Item};
use prost::Message;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Bug {
    /// The disk says that a batch is durable when it is not.
    SkipFsync,
    /// A restarted voter does not know whom it voted for.
    VoteForgotten,
    /// Messages that need a durable batch are sent before it is.
    AckBeforePersist,
    /// A client is told of success when its request is only proposed.
    AnswerBeforeCommit,
    /// The end of the log is taken for a torn write when it is opened.
    TailTruncated,
    /// A voter that lost its disk comes back under its old number.
    EmptyDiskOldNumber,
    /// A restarted voter believes to be alone in its group.
    GroupOfOne,
    /// A command that names an older incarnation is applied.
    StaleFenceAccepted,
    /// A repeated command is applied again.
    DedupeForgotten,
    /// A restored snapshot has the membership epoch before.
    EpochGoesBack,
    /// A restored snapshot mints an incarnation again.
    IncarnationReused,
    /// A snapshot that was damaged on the way is installed.
    SnapshotNotVerified,
    /// Any voter answers reads from what it has.
    ReadAnywhere,
    /// The leader answers reads without asking whether it still is.
    ReadWithoutIndex,
    /// A restarted voter has the founding group, whatever was agreed since.
    ChangesForgotten,
}

/// What a restarted voter finds on its disk.
pub fn reopened(bug: Option<Bug>, id: u64, mut durable: Durable, genesis: &Durable) -> Durable {
    match bug {
        Some(Bug::VoteForgotten) => durable.hard_state.vote = 0,
        Some(Bug::TailTruncated) if durable.entries.len() > 1 => {
            durable.entries.pop();
            durable.hard_state.commit = durable.hard_state.commit.min(durable.last_index());
            if durable.snapshot.index > durable.last_index() {
                return genesis.clone();
            }
        }
        Some(Bug::EmptyDiskOldNumber) => return genesis.clone(),
        Some(Bug::GroupOfOne) => durable.snapshot.group.voters = [id].into(),
        Some(Bug::ChangesForgotten) => durable.snapshot.group = genesis.snapshot.group.clone(),
        Some(Bug::EpochGoesBack) => {
            tamper(&mut durable.snapshot.data, |state| {
                state.membership_epoch = state.membership_epoch.saturating_sub(1);
            });
        }
        Some(Bug::IncarnationReused) => {
            tamper(&mut durable.snapshot.data, |state| {
                state.incarnations_minted = state.incarnations_minted.saturating_sub(1);
            });
        }
        _ => {}
    }
    durable
}

/// Damage on the way. Without verification nobody would notice, so with the bug its digest fits.
pub fn damaged(bug: Option<Bug>, snapshot: &mut wire::RaftSnapshot) {
    if bug == Some(Bug::SnapshotNotVerified) {
        tamper(&mut snapshot.data, |state| state.clock_ms += 1);
        return;
    }
    let mut data = snapshot.data.to_vec();
    let middle = data.len() / 2;
    data[middle] ^= 1;
    snapshot.data = data.into();
}

/// Changes the head of a sealed state and seals it again.
fn tamper(data: &mut bytes::Bytes, change: impl FnOnce(&mut wire::StateHead)) {
    if data.is_empty() {
        return;
    }
    let Ok(mut sealed) = wire::SealedState::decode(&data[..]) else { return };
    let mut rest = &sealed.state[..];
    let first = wire::StateItem::decode_length_delimited(&mut rest);
    let Ok(Some(Item::Head(mut head))) = first.map(|first| first.item) else { return };
    change(&mut head);
    let mut state = Vec::new();
    list::push(&mut state, &wire::StateItem { item: Some(Item::Head(head)) });
    state.extend_from_slice(rest);
    sealed.state = state.into();
    sealed.sha256 = sha256(&sealed.state).to_vec().into();
    *data = sealed.encode_to_vec().into();
}
