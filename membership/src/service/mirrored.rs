//! Hands every state that changed something to the mirror in etcd, if there is one.
//!
//! The owner's thread never waits for etcd: what does not fit is skipped, and the latest state is
//! handed over once there is room again.

use std::sync::Arc;

use entente_proto::ids::NodeName;
use tokio::sync::{mpsc, watch};

use crate::mirror::{self, Config, QUEUE_LEN_MAX};
use crate::state::State;

pub(super) struct Mirrored {
    states: mpsc::Sender<Arc<State>>,
    leads: watch::Sender<bool>,
    skipped: Option<Arc<State>>,
}

impl Mirrored {
    /// Starts the mirror, a task that ends with this value.
    pub(super) fn start(config: Config, cluster: &NodeName) -> Self {
        let (states, queue) = mpsc::channel(QUEUE_LEN_MAX);
        let (leads, led) = watch::channel(false);
        tokio::spawn(mirror::run(config, cluster.to_string(), led, queue));
        Self { states, leads, skipped: None }
    }

    /// Takes note of the states after each change, `latest` the last, and of who leads.
    pub(super) fn take(&mut self, changes: Vec<State>, latest: &State, leads: bool) {
        let begins = leads && !self.leads.send_replace(leads);
        if !leads {
            self.leads.send_replace(false);
            self.skipped = None;
            return;
        }
        let skipped = self.skipped.take().filter(|_| changes.is_empty());
        let first = begins.then(|| Arc::new(latest.clone())).filter(|_| changes.is_empty());
        for state in skipped.into_iter().chain(first).chain(changes.into_iter().map(Arc::new)) {
            self.skipped =
                self.states.try_send(state).err().map(mpsc::error::TrySendError::into_inner);
        }
    }
}
