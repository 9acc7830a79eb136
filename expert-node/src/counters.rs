//! Counts what befell weights, for whoever shows metrics.

use std::sync::atomic::{AtomicU64, Ordering};

/// Since the start of the process.
#[derive(Debug, Default)]
pub struct Counters {
    scrubbed: AtomicU64,
    spoilt: AtomicU64,
    restored: AtomicU64,
    refused: AtomicU64,
    lent: AtomicU64,
}

/// Their values at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Experts in memory that were compared with their SHA-256.
    pub scrubbed: u64,
    /// Those of them that had changed, and were taken out.
    pub spoilt: u64,
    /// Experts that came from a peer, and were the right ones.
    pub restored: u64,
    /// Experts that came from a peer, and were not.
    pub refused: u64,
    /// Experts that were given to a peer.
    pub lent: u64,
}

impl Counters {
    /// The values now.
    pub fn read(&self) -> Counts {
        let value = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counts {
            scrubbed: value(&self.scrubbed),
            spoilt: value(&self.spoilt),
            restored: value(&self.restored),
            refused: value(&self.refused),
            lent: value(&self.lent),
        }
    }

    pub(crate) fn count_scrubbed(&self, is_sound: bool) {
        add(&self.scrubbed);
        if !is_sound {
            add(&self.spoilt);
        }
    }

    pub(crate) fn count_restored(&self) {
        add(&self.restored);
    }

    pub(crate) fn count_refused(&self) {
        add(&self.refused);
    }

    pub(crate) fn count_lent(&self) {
        add(&self.lent);
    }
}

fn add(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}
