//! What nodes are told, and what an operator is told about them.

use std::collections::{BTreeMap, BTreeSet};

use entente_proto::ids::NodeId;
use entente_proto::placement::ExpertKey;
use entente_router::moves::{self, Moves};

use super::{Activity, Leading, NodeHealth, Orders, Progress, RegionProgress, Steward};
use crate::state::{Node, NodeState};

impl Steward {
    /// What the node is told now. While another process leads that is what is placed on it.
    pub fn orders(&self, node: NodeId) -> Orders {
        match &self.leading {
            Some(leading) => leading.orders(node),
            None => Orders { wanted: self.state.placement().experts_of(node), dismissed: false },
        }
    }

    /// What this leader knows of each expert node; nothing while another process leads.
    pub fn node_reports(&self, now_ms: u64) -> BTreeMap<NodeId, NodeHealth> {
        let Some(leading) = &self.leading else { return BTreeMap::new() };
        leading.nodes().map(|node| (node.id, leading.health(node, now_ms))).collect()
    }

    /// How far the moves are; nothing while another process leads.
    pub fn progress(&self) -> Progress {
        self.leading.as_ref().map(Leading::progress).unwrap_or_default()
    }
}

impl Leading {
    /// What a node is to hold: what is placed there, what it is to load, and what it holds and was
    /// not told to release.
    pub(super) fn wanted(&self, id: NodeId) -> BTreeSet<ExpertKey> {
        let mut wanted = self.placed(id).clone();
        if let Some(view) = self.views.get(&id) {
            let held = view.held.iter().flatten();
            wanted.extend(held.filter(|expert| !view.releasing.contains(expert)));
        }
        let region = self.state.node_by_id(id).map(|node| node.spec.region);
        let work = region.and_then(|region| self.works.get(&region));
        let moves = work.and_then(|work| work.moves.as_ref());
        wanted.extend(moves.into_iter().flat_map(|moves| moves.loading(id)));
        wanted
    }

    fn orders(&self, id: NodeId) -> Orders {
        let wanted = self.wanted(id);
        let drains =
            self.state.node_by_id(id).is_some_and(|node| node.state == NodeState::Draining);
        let leaves = drains || self.views.get(&id).is_some_and(|view| view.leaving);
        // What is placed is wanted, so that nothing is placed either.
        let dismissed = leaves && wanted.is_empty();
        Orders { wanted, dismissed }
    }

    fn health(&self, node: &Node, now_ms: u64) -> NodeHealth {
        let view = self.views.get(&node.id);
        let heard_ms = view.and_then(|view| view.heard_ms);
        NodeHealth {
            heartbeat_age_ms: heard_ms.map(|heard_ms| now_ms.saturating_sub(heard_ms)),
            placed: self.placed(node.id).len(),
            held: view.and_then(|view| view.held.as_ref()).map_or(0, BTreeSet::len),
            wanted: self.wanted(node.id).len(),
        }
    }

    fn progress(&self) -> Progress {
        let region = |region| {
            let work = self.works.get(&region);
            let progress = work.and_then(|work| work.moves.as_ref()).map(Moves::progress);
            let activity = match progress {
                _ if self.waiting.contains(&region) => Activity::Waiting,
                None => Activity::Waiting,
                Some(moves::Progress::Done) => Activity::Idle,
                Some(moves::Progress::Moving { left }) => Activity::Moving { left },
                Some(moves::Progress::Stuck(stuck)) => Activity::Stuck(stuck),
            };
            let degraded = work.and_then(|work| work.refused.clone());
            (region, RegionProgress { activity, degraded })
        };
        Progress { regions: self.serving().into_iter().map(region).collect() }
    }
}
