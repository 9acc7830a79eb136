//! The life of nodes: who becomes active, who drains, who is down. Reports are evidence, and only a
//! commit makes them count.

use entente_proto::ids::{MembershipEpoch, NodeId};

use super::{Command, Leading, RETRY_MS};
use crate::state::{self, Applied, Expect, Node, NodeState, Outcome};

/// A change of a node's state on its way into the committed state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum InFlight {
    /// It is proposed under this number.
    Asked(u64),
    /// It is committed by this epoch, which has not arrived yet.
    Made(MembershipEpoch),
    /// It was refused, or is unknown; the state may explain it before this time.
    Wait(u64),
}

impl Leading {
    /// Proposes what the nodes' states should be, where they are something else.
    pub(super) fn live(&mut self, now_ms: u64) -> Vec<Command> {
        let epoch = self.state.membership_epoch();
        self.in_flight.retain(|_, in_flight| match in_flight {
            InFlight::Asked(_) => true,
            InFlight::Made(made) => *made > epoch,
            InFlight::Wait(until_ms) => now_ms < *until_ms,
        });
        let free = |node: &&Node| !self.in_flight.contains_key(&node.id);
        let change = |node: &Node| Some((node.id, self.next_state(node, now_ms)?));
        let changes: Vec<(NodeId, NodeState)> =
            self.nodes().filter(free).filter_map(change).collect();
        changes.into_iter().map(|(node, to)| self.change_state(node, to)).collect()
    }

    /// Proposes the state of a node, for its present start only.
    pub(super) fn change_state(&mut self, id: NodeId, to: NodeState) -> Command {
        let incarnation = self.state.node_by_id(id).and_then(|node| node.incarnation);
        let expect = Expect {
            incarnation: Some((id, incarnation.unwrap_or_default())),
            membership_epoch: None,
            // Whether a node holds all that is placed on it depends on what is placed.
            placement_epoch: (to == NodeState::Active).then(|| self.state.placement_epoch()),
        };
        let (number, command) = self.propose(expect, state::Command::SetState(id, to));
        self.in_flight.insert(id, InFlight::Asked(number));
        command
    }

    /// What the node should become now.
    fn next_state(&self, node: &Node, now_ms: u64) -> Option<NodeState> {
        if self.is_silent(node, now_ms) {
            return Some(NodeState::Down);
        }
        let view = self.views.get(&node.id)?;
        let held = view.held.as_ref().filter(|_| node.incarnation == Some(view.incarnation))?;
        match node.state {
            NodeState::Active if view.leaving => Some(NodeState::Draining),
            // Before there is a placement nobody knows what the node must hold.
            NodeState::Joining if self.is_placed() => {
                let ready = |expert| held.contains(expert) && !view.releasing.contains(expert);
                self.placed(node.id).iter().all(ready).then_some(NodeState::Active)
            }
            _ => None,
        }
    }

    /// Whether it is decided what nodes hold. A model without experts has nothing to decide.
    fn is_placed(&self) -> bool {
        let is_dense = self.model.as_ref().is_some_and(|model| model.shape.expert_count() == 0);
        is_dense || self.state.placement_epoch().0 > 0
    }

    /// Whether the node has not reported for so long that it counts as down.
    fn is_silent(&self, node: &Node, now_ms: u64) -> bool {
        let lives =
            matches!(node.state, NodeState::Joining | NodeState::Active | NodeState::Draining);
        let view = self.views.get(&node.id);
        let (last_ms, patience_ms) = match node.incarnation {
            // A founder that is still to be started.
            None => (self.since_ms, self.settings.restore_after_ms),
            Some(incarnation) => {
                let view = view.filter(|view| view.incarnation == incarnation);
                let heard_ms = view.map(|view| view.heard_ms.unwrap_or(view.since_ms));
                let last_ms = heard_ms.unwrap_or(self.since_ms).max(self.since_ms);
                (last_ms, self.settings.down_after_ms)
            }
        };
        lives && now_ms >= last_ms.saturating_add(patience_ms)
    }

    pub(super) fn state_answered(&mut self, id: u64, outcome: Option<Outcome>, now_ms: u64) {
        let asked = |in_flight: &&mut InFlight| **in_flight == InFlight::Asked(id);
        if let Some(in_flight) = self.in_flight.values_mut().find(asked) {
            *in_flight = match outcome {
                Some(Ok(Applied::Membership(epoch))) => InFlight::Made(epoch),
                _ => InFlight::Wait(now_ms.saturating_add(RETRY_MS)),
            };
        }
    }
}
