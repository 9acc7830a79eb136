//! What the leader knows of each node from its reports, and what that amounts to.

use std::collections::BTreeSet;

use entente_proto::ids::{Incarnation, NodeId};
use entente_proto::placement::ExpertKey;

use super::{Leading, Report};
use crate::state::{NODES_MAX, Node, NodeState};

/// What one start of a node has reported, and what became of earlier ones.
#[derive(Debug, Clone, Default)]
pub(super) struct View {
    /// The start.
    pub incarnation: Incarnation,
    /// When this leader first knew of it.
    pub since_ms: u64,
    sequence: Option<u64>,
    /// The last report.
    pub heard_ms: Option<u64>,
    /// What it holds; absent until it has said so.
    pub held: Option<BTreeSet<ExpertKey>>,
    /// What it holds and has been told, by its orders, to release.
    pub releasing: BTreeSet<ExpertKey>,
    /// It wants to stop.
    pub leaving: bool,
    /// This leader has seen the node alive, in whichever start.
    pub seen: bool,
    /// Since when it is down, as far as this leader knows.
    pub down_since_ms: Option<u64>,
    /// It could not load what it should; it is given nothing before this time.
    pub sick_until_ms: u64,
    /// When it last loaded something, or had nothing to load.
    pub grown_ms: u64,
}

/// What the steward makes of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Standing {
    /// It lives and may be given experts.
    Up,
    /// It lives, keeps what is placed on it, and is given nothing.
    Cordoned,
    /// It lives, keeps what it holds, and is given nothing because it failed to load.
    Sick,
    /// It lives and is to be empty.
    Leaving,
    /// It has never registered: a founder that is still to be started.
    Expected,
    /// It does not serve, but is waited for: what is placed on it stays so.
    Absent,
    /// It is waited for no more.
    Gone,
    /// It should live, and has not reported to this leader: nobody knows what it holds.
    Unheard,
}

impl Standing {
    /// Whether it carries out orders.
    pub fn is_up(self) -> bool {
        matches!(self, Self::Up | Self::Cordoned | Self::Sick | Self::Leaving)
    }

    /// Whether a replica that is placed on it counts.
    pub fn counts(self) -> bool {
        !matches!(self, Self::Leaving | Self::Gone | Self::Unheard)
    }

    /// Whether it may be given a replica.
    pub fn takes_new(self) -> bool {
        matches!(self, Self::Up | Self::Expected)
    }
}

impl View {
    /// The view of a start, when it is first heard of.
    fn of(incarnation: Incarnation, now_ms: u64, before: Option<&Self>) -> Self {
        let seen = before.is_some_and(|view| view.seen);
        Self { incarnation, since_ms: now_ms, grown_ms: now_ms, seen, ..Self::default() }
    }
}

impl Leading {
    /// Brings the views in line with the committed state.
    pub(super) fn look_at_nodes(&mut self, now_ms: u64) {
        let nodes: Vec<(NodeId, Incarnation, bool)> = self
            .nodes()
            .map(|n| (n.id, n.incarnation.unwrap_or_default(), n.state == NodeState::Down))
            .collect();
        for (id, incarnation, is_down) in nodes {
            let view = self.views.get(&id);
            if view.is_none_or(|view| view.incarnation < incarnation) {
                let view = View::of(incarnation, now_ms, view);
                self.views.insert(id, view);
            }
            let placed = self.placed.get(&id);
            if let Some(view) = self.views.get_mut(&id) {
                let since_ms = view.down_since_ms.unwrap_or(now_ms);
                view.down_since_ms = is_down.then_some(since_ms);
                // Somebody else has placed it there; then it stays.
                view.releasing.retain(|expert| !placed.is_some_and(|set| set.contains(expert)));
            }
        }
    }

    /// Takes note of a report. Returns whether it says more than that the node lives.
    pub(super) fn hear(&mut self, report: Report, now_ms: u64) -> bool {
        let Report { node: id, incarnation, sequence, held, failed, leaving, rows } = report;
        let node = self.state.node_by_id(id);
        // What was minted a moment ago may not have arrived here yet.
        let is_new = incarnation.0 > self.state.incarnations_minted();
        let is_known = node.is_some_and(|node| node.incarnation == Some(incarnation));
        if !(is_known || is_new) || id.0 as usize >= NODES_MAX {
            return false;
        }
        let region = node.map(|node| node.spec.region);
        let view = self.views.entry(id).or_default();
        if view.incarnation < incarnation {
            *view = View::of(incarnation, now_ms, Some(view));
        }
        if view.incarnation != incarnation || view.sequence.is_some_and(|last| sequence <= last) {
            return false;
        }
        if held.is_none() && view.held.is_none() {
            // Its first report went to somebody else. Unheard for long, it will register anew.
            return false;
        }
        let is_first = view.heard_ms.is_none();
        let leaves = leaving != view.leaving;
        view.sequence = Some(sequence);
        view.heard_ms = Some(now_ms);
        view.leaving = leaving;
        view.seen = true;
        if let (Some(region), Some(model)) = (region, &self.model) {
            self.measured.add(region, &model.shape, &rows);
        }
        let moved = held.is_some_and(|held| self.on_held(id, held, now_ms));
        let fails = self.on_failed(id, &failed, now_ms);
        is_first || leaves || moved || fails
    }

    /// What the steward makes of a node, which is not removed.
    pub(super) fn standing(&self, node: &Node, now_ms: u64) -> Standing {
        let Some(incarnation) = node.incarnation else {
            return if node.state == NodeState::Down { Standing::Gone } else { Standing::Expected };
        };
        let view = self.views.get(&node.id).filter(|view| view.incarnation == incarnation);
        if node.state == NodeState::Down {
            return self.standing_down(view, now_ms);
        }
        let Some(view) = view.filter(|view| view.held.is_some()) else {
            // One that joins serves nobody yet; others must not be planned for behind their backs.
            let joins = node.state == NodeState::Joining;
            return if joins { Standing::Absent } else { Standing::Unheard };
        };
        match node.state {
            _ if view.leaving => Standing::Leaving,
            NodeState::Draining => Standing::Leaving,
            _ if node.cordoned => Standing::Cordoned,
            _ if now_ms < view.sick_until_ms => Standing::Sick,
            _ => Standing::Up,
        }
    }

    /// A node that is down may come back, for a while.
    fn standing_down(&self, view: Option<&View>, now_ms: u64) -> Standing {
        let since_ms = view.and_then(|view| view.down_since_ms).unwrap_or(self.since_ms);
        let waits = now_ms < since_ms.saturating_add(self.settings.restore_after_ms);
        if waits { Standing::Absent } else { Standing::Gone }
    }
}
