//! The log as raft-rs reads it: in memory, bounded by compaction, and no more than what the last
//! [`Batch`] made durable together with what the next one will.

use raft::eraftpb;
use raft::{GetEntriesContext, RaftState, StorageError};

use super::convert;
use crate::log::{Batch, Durable};

/// A mirror of what is on the disk.
pub(super) struct Memory(pub Durable);

impl Memory {
    pub fn absorb(&mut self, batch: &Batch) {
        self.0.absorb(batch);
    }
}

impl raft::Storage for Memory {
    fn initial_state(&self) -> raft::Result<RaftState> {
        let hard_state = convert::hard_state_out(self.0.hard_state);
        Ok(RaftState::new(hard_state, convert::group_out(&self.0.snapshot.group)))
    }

    fn entries(
        &self,
        low: u64,
        high: u64,
        max_size: impl Into<Option<u64>>,
        _: GetEntriesContext,
    ) -> raft::Result<Vec<eraftpb::Entry>> {
        let base = self.0.base.0;
        if low <= base {
            return Err(StorageError::Compacted.into());
        }
        if high > self.0.last_index() + 1 {
            return Err(StorageError::Unavailable.into());
        }
        let (from, to) = ((low - base - 1) as usize, (high - base - 1) as usize);
        let mut left = max_size.into().unwrap_or(u64::MAX);
        let mut entries = Vec::new();
        for entry in &self.0.entries[from..to] {
            // The first is returned whatever its size, or the log would never get past it.
            let len = entry.data.len() as u64 + convert::ENTRY_OVERHEAD;
            if len > left && !entries.is_empty() {
                break;
            }
            left = left.saturating_sub(len);
            entries.push(convert::entry_out(entry));
        }
        Ok(entries)
    }

    fn term(&self, index: u64) -> raft::Result<u64> {
        let (base, base_term) = self.0.base;
        if index == base {
            return Ok(base_term);
        }
        if index == self.0.snapshot.index {
            return Ok(self.0.snapshot.term);
        }
        let offset = index.checked_sub(base + 1).ok_or(StorageError::Compacted)?;
        let entry = self.0.entries.get(offset as usize).ok_or(StorageError::Unavailable)?;
        Ok(entry.term)
    }

    fn first_index(&self) -> raft::Result<u64> {
        Ok(self.0.base.0 + 1)
    }

    fn last_index(&self) -> raft::Result<u64> {
        Ok(self.0.last_index())
    }

    fn snapshot(&self, request_index: u64, _: u64) -> raft::Result<eraftpb::Snapshot> {
        if self.0.snapshot.index < request_index {
            return Err(StorageError::SnapshotTemporarilyUnavailable.into());
        }
        Ok(convert::snapshot_out(&self.0.snapshot))
    }
}
