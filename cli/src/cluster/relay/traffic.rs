//! What has passed between two processes: counted where it is let through, shown to whoever asks.
//!
//! The relay reads none of it, so it cannot tell rows from heartbeats; but who has dialled whom says
//! it: a coordinator dials an expert node for rows and for nothing else.

use std::sync::atomic::{AtomicU64, Ordering};

use entente_proto::ids::NodeName;
use serde::{Deserialize, Serialize};

/// What has passed between two processes since the relay was opened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traffic {
    /// Who dialled.
    pub dialler: NodeName,
    /// Who was dialled.
    pub target: NodeName,
    /// Connections that were let through.
    pub connections: u64,
    /// Connections that were not, as the link was cut.
    pub refused: u64,
    /// Bytes that the dialler said.
    pub bytes_there: u64,
    /// Bytes that the target said.
    pub bytes_back: u64,
}

impl Traffic {
    /// Bytes in both directions.
    pub fn bytes(&self) -> u64 {
        self.bytes_there + self.bytes_back
    }
}

/// The counters of one pair. They only ever count up, each on its own.
#[derive(Debug, Default)]
pub struct Counters {
    connections: AtomicU64,
    refused: AtomicU64,
    bytes_there: AtomicU64,
    bytes_back: AtomicU64,
}

impl Counters {
    /// A connection came up, or was refused.
    pub fn connection(&self, refused: bool) {
        let counter = if refused { &self.refused } else { &self.connections };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// What counts the bytes of each direction: the dialler's, the target's.
    pub fn directions(&self) -> [&AtomicU64; 2] {
        [&self.bytes_there, &self.bytes_back]
    }

    /// What they show now.
    pub fn of(&self, dialler: NodeName, target: NodeName) -> Traffic {
        let value = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Traffic {
            dialler,
            target,
            connections: value(&self.connections),
            refused: value(&self.refused),
            bytes_there: value(&self.bytes_there),
            bytes_back: value(&self.bytes_back),
        }
    }
}
