//! What the log consists of, in words that neither raft-rs nor the disk knows.
//!
//! [`crate::raft`] produces a [`Batch`] and [`crate::store`] makes it durable; [`Durable`] is what
//! comes back after a start. Both speak only these types.

use std::collections::BTreeSet;

use bytes::Bytes;

/// What an entry is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EntryKind {
    /// A request, or nothing: each leader begins with an empty entry.
    Normal,
    /// A change of the raft group.
    Group,
}

/// An entry of the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its place, counted from 1.
    pub index: u64,
    /// The term in which a leader appended it.
    pub term: u64,
    /// What it is for.
    pub kind: EntryKind,
    /// Its content.
    pub data: Bytes,
}

/// What a voter must never forget.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct HardState {
    /// The latest term that it has seen.
    pub term: u64,
    /// Whom it voted for in that term; 0 for nobody.
    pub vote: u64,
    /// The last entry that it knows to be committed.
    pub commit: u64,
}

/// Who takes part in raft. While `outgoing` is not empty the group is joint: both `voters` and
/// `outgoing` must agree to everything.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Group {
    /// Those that vote.
    pub voters: BTreeSet<u64>,
    /// Those that only receive the log.
    pub learners: BTreeSet<u64>,
    /// Those that voted before the change that is under way.
    pub outgoing: BTreeSet<u64>,
    /// Those that become learners once the change is over.
    pub learners_next: BTreeSet<u64>,
    /// The leader ends the change by itself.
    pub auto_leave: bool,
}

impl Group {
    /// Whether it takes part in any way.
    pub fn contains(&self, id: u64) -> bool {
        [&self.voters, &self.learners, &self.outgoing, &self.learners_next]
            .iter()
            .any(|set| set.contains(&id))
    }
}

/// The state after an entry, in place of all entries up to it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// The last entry in it.
    pub index: u64,
    /// That entry's term.
    pub term: u64,
    /// The group after that entry.
    pub group: Group,
    /// A sealed state.
    pub data: Bytes,
}

/// What must be durable, all of it or nothing, before anything that depends on it is said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// Replaces the one that is there.
    pub hard_state: HardState,
    /// Replaces the one that is there.
    pub snapshot: Option<Snapshot>,
    /// All entries that are there go first: the snapshot is the leader's, and the log that led
    /// elsewhere ends here.
    pub clear: bool,
    /// Appended. An entry at or below the log's end replaces it and everything after it.
    pub entries: Vec<Entry>,
    /// The place before the log's first entry, and its term; whatever is up to there goes.
    pub base: (u64, u64),
}

/// What a disk holds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Durable {
    /// Terms and votes.
    pub hard_state: HardState,
    /// The latest snapshot.
    pub snapshot: Snapshot,
    /// The place before the first entry, and its term; not after the snapshot.
    pub base: (u64, u64),
    /// The log from `base.0 + 1`, without gaps.
    pub entries: Vec<Entry>,
}

/// Why what a disk holds cannot be a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Inconsistent {
    /// An entry is missing or out of place.
    #[error("entry {found} of the log stands where {expected} should")]
    Gap {
        /// Where it stands.
        expected: u64,
        /// What it says.
        found: u64,
    },
    /// Terms only rise.
    #[error("entry {index} of the log has term {term}, below an earlier one or above the vote's")]
    Term {
        /// The entry.
        index: u64,
        /// Its term.
        term: u64,
    },
    /// More is committed than there is.
    #[error("entry {commit} is committed, but the log ends at {last}")]
    Commit {
        /// The last committed entry.
        commit: u64,
        /// The last entry.
        last: u64,
    },
    /// The log does not join its snapshot.
    #[error("the snapshot ends at {snapshot}, but the log begins after {base} and ends at {last}")]
    Snapshot {
        /// The snapshot's last entry.
        snapshot: u64,
        /// The place before the first entry.
        base: u64,
        /// The last entry.
        last: u64,
    },
}

impl Durable {
    /// The last entry's index.
    pub fn last_index(&self) -> u64 {
        self.entries.last().map_or(self.base.0, |entry| entry.index)
    }

    /// Puts a batch in: what a durable store does, as a function.
    pub fn absorb(&mut self, batch: &Batch) {
        self.hard_state = batch.hard_state;
        if let Some(snapshot) = &batch.snapshot {
            self.snapshot = snapshot.clone();
        }
        if batch.clear {
            self.entries.clear();
        }
        self.base = batch.base;
        if let Some(first) = batch.entries.first() {
            self.entries.retain(|entry| entry.index < first.index);
        }
        self.entries.extend(batch.entries.iter().cloned());
        self.entries.retain(|entry| entry.index > batch.base.0);
    }

    /// Whether this can be a log at all. A disk that says otherwise has lost or changed something.
    pub fn check(&self) -> Result<(), Inconsistent> {
        let (mut index, mut term) = self.base;
        for entry in &self.entries {
            if entry.index != index + 1 {
                return Err(Inconsistent::Gap { expected: index + 1, found: entry.index });
            }
            if entry.term < term || entry.term > self.hard_state.term {
                return Err(Inconsistent::Term { index: entry.index, term: entry.term });
            }
            (index, term) = (entry.index, entry.term);
        }
        let (snapshot, base) = (self.snapshot.index, self.base.0);
        if snapshot < base || snapshot > index {
            return Err(Inconsistent::Snapshot { snapshot, base, last: index });
        }
        let commit = self.hard_state.commit;
        if commit > index { Err(Inconsistent::Commit { commit, last: index }) } else { Ok(()) }
    }
}
