//! What the leader of the raft group does for the expert nodes: it notices who lives, plans who
//! holds what, and moves experts to where they are planned.
//!
//! A pure core: reports, committed states and ticks in; proposals out, and for each node the set of
//! experts that it is to hold. Whoever leads runs one, also a witness.
//!
//! ```text
//!   reports ──► views ──► life ──────────────────────► SetState: active, draining, down
//!                 │
//!   state ────────┴────► planning ──► moving ────────► SetPlacement
//!                     (what should be)   └──► orders   (what each node is to hold)
//! ```
//!
//! Nothing of it is in the log but what it proposes: a new leader starts from what is committed and
//! from what nodes report to hold, and waits until all that should be up have reported or are down.
//!
//! Invariants:
//! - **An expert that has had a replica that serves keeps one**: no commit and no order takes the
//!   last one of a region away; what comes to harm is what nodes lose themselves (`moving`).
//! - What a node is told to hold has all that the committed placement names for it.
//! - What a node holds, loads and has not yet released fits into its memory.
//! - Each region is planned by itself and moves by itself: trouble in one does not wait in another.
//! - Nothing moves for the looks of it: a placement that gives each expert its replicas, and each
//!   node something to do, stays as it is until an operator orders otherwise.
//! - A decision holds only for the start of the node, and the placement, that it was made on.
//!
//! A proposal is in flight for each node at most once, and one for the placement. What became of one
//! is read from the committed state; an unknown outcome is not a failure.
//!
//! What it relies on: [`Event::Leads`] comes after all that earlier leaders committed is applied; a
//! node acts only on orders of the stream that it reports on, gives up loads that are no longer
//! wanted, and releases before it loads.
//!
//! It knows no clock (time is given), no socket, no weights, and of a model only its shape.

mod api;
mod life;
mod loads;
mod moving;
mod operator;
mod orders;
mod planning;
mod views;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use entente_proto::ids::{Incarnation, NodeId, PlacementEpoch, Region};
use entente_proto::placement::ExpertKey;

pub use api::{
    Activity, Command, Event, NodeHealth, Orders, PlanError, Progress, Proposal, Rebalance,
    RegionProgress, Report, Settings, Unsafe,
};

use crate::served::ServedModel;
use crate::state::{self, Expect, Node, NodeState, Outcome, RecordKind, Role, State};
use life::InFlight;
use loads::Measured;
use moving::{Pending, Work};
use views::View;

/// Time before a proposal that was refused, or whose outcome is unknown, is made again: the state
/// that explains it is on its way.
const RETRY_MS: u64 = 100;

/// The state machine. One task owns it.
#[derive(Debug, Clone)]
pub struct Steward {
    settings: Settings,
    state: Arc<State>,
    /// Names proposals; goes on over changes of the leader, so that a late answer fits none.
    proposals: u64,
    leading: Option<Leading>,
}

/// What is known only while this process leads.
#[derive(Debug, Clone)]
struct Leading {
    settings: Settings,
    state: Arc<State>,
    since_ms: u64,
    proposals: u64,
    views: BTreeMap<NodeId, View>,
    /// What the committed placement names for each node.
    placed: BTreeMap<NodeId, BTreeSet<ExpertKey>>,
    model: Option<Arc<ServedModel>>,
    works: BTreeMap<Region, Work>,
    /// Regions in which a node that should be up has not reported yet.
    waiting: BTreeSet<Region>,
    /// Changes of a node's state that are not in the committed state yet.
    in_flight: BTreeMap<NodeId, InFlight>,
    /// The placement that is proposed.
    pending: Option<Pending>,
    /// No placement is proposed before.
    propose_after_ms: u64,
    /// The latest placement that this leader made, unless the outcome of a later one is unknown.
    own_epoch: Option<PlacementEpoch>,
    measured: Measured,
}

impl Steward {
    /// A steward that does not lead yet.
    pub fn new(settings: Settings) -> Self {
        Self { settings, state: Arc::new(State::new()), proposals: 0, leading: None }
    }

    /// Takes an event. `now_ms` is a monotonic clock of any origin.
    pub fn on(&mut self, event: Event, now_ms: u64) -> Vec<Command> {
        if let Event::Committed(state) = &event {
            if state.applied_index() < self.state.applied_index() {
                return Vec::new();
            }
            self.state = Arc::clone(state);
        }
        match (&event, &self.leading) {
            (Event::Leads, None) => {
                let state = Arc::clone(&self.state);
                self.leading = Some(Leading::new(self.settings, state, self.proposals, now_ms));
            }
            (Event::Follows, _) => self.leading = None,
            _ => {}
        }
        let Some(leading) = &mut self.leading else { return Vec::new() };
        let commands = leading.on(event, now_ms);
        self.proposals = leading.proposals;
        commands
    }

    /// Whether this start of the node has been replaced or given up: its stream must end.
    pub fn fenced(&self, node: NodeId, incarnation: Incarnation) -> bool {
        // What was minted a moment ago may not have arrived here yet.
        if incarnation.0 > self.state.incarnations_minted() {
            return false;
        }
        let lives = |node: &Node| {
            node.incarnation == Some(incarnation)
                && !matches!(node.state, NodeState::Down | NodeState::Removed)
        };
        !self.state.node_by_id(node).is_some_and(lives)
    }
}

impl Leading {
    fn new(settings: Settings, state: Arc<State>, proposals: u64, now_ms: u64) -> Self {
        let mut leading = Self {
            settings,
            state: Arc::new(State::new()),
            since_ms: now_ms,
            proposals,
            views: BTreeMap::new(),
            placed: BTreeMap::new(),
            model: None,
            works: BTreeMap::new(),
            waiting: BTreeSet::new(),
            in_flight: BTreeMap::new(),
            pending: None,
            propose_after_ms: now_ms,
            own_epoch: None,
            measured: Measured::new(now_ms),
        };
        leading.commit(state, now_ms);
        leading
    }

    fn on(&mut self, event: Event, now_ms: u64) -> Vec<Command> {
        match event {
            Event::Leads | Event::Follows => {}
            Event::Committed(state) => self.commit(state, now_ms),
            Event::Report(report) => {
                // One that only says that the node lives is by far the most frequent event.
                if !self.hear(report, now_ms) {
                    return Vec::new();
                }
            }
            Event::Tick => {
                self.measured.age(now_ms);
                self.give_up_stalled(now_ms);
            }
            Event::Answered { id, outcome } => self.answered(id, outcome, now_ms),
        }
        let mut commands = self.live(now_ms);
        commands.extend(self.move_on(now_ms));
        commands
    }

    /// Takes over a committed state.
    fn commit(&mut self, state: Arc<State>, now_ms: u64) {
        let model = |state: &State| {
            state.record(RecordKind::Model, crate::served::SERVED_MODEL_KEY).cloned()
        };
        if self.model.is_none() || model(&self.state) != model(&state) {
            self.model = ServedModel::of(&state).and_then(Result::ok).map(Arc::new);
        }
        if self.state.placement_epoch() != state.placement_epoch() {
            self.placed.clear();
            for (expert, nodes) in state.placement().iter() {
                for node in nodes {
                    self.placed.entry(*node).or_default().insert(expert);
                }
            }
        }
        self.state = state;
        self.look_at_nodes(now_ms);
    }

    fn answered(&mut self, id: u64, outcome: Option<Outcome>, now_ms: u64) {
        if self.pending.as_ref().is_some_and(|pending| pending.id == id) {
            self.placement_answered(outcome, now_ms);
        } else {
            self.state_answered(id, outcome, now_ms);
        }
    }

    fn propose(&mut self, expect: Expect, command: state::Command) -> (u64, Command) {
        self.proposals += 1;
        let id = self.proposals;
        (id, Command::Propose { id, expect, command })
    }

    /// The expert nodes that are, or may come back.
    fn nodes(&self) -> impl Iterator<Item = &Node> {
        let is_there =
            |node: &&Node| node.spec.role == Role::ExpertNode && node.state != NodeState::Removed;
        self.state.nodes().filter(is_there)
    }

    fn nodes_in(&self, region: Region) -> impl Iterator<Item = &Node> {
        self.nodes().filter(move |node| node.spec.region == region)
    }

    /// Regions that have coordinators: each needs a complete set of experts.
    fn serving(&self) -> BTreeSet<Region> {
        let serves =
            |node: &&Node| node.spec.role == Role::Coordinator && node.state != NodeState::Removed;
        self.state.nodes().filter(serves).map(|node| node.spec.region).collect()
    }

    /// What the committed placement names for a node.
    fn placed(&self, node: NodeId) -> &BTreeSet<ExpertKey> {
        static NOTHING: BTreeSet<ExpertKey> = BTreeSet::new();
        self.placed.get(&node).unwrap_or(&NOTHING)
    }
}
