//! How each region gets to what it should hold: one [`Moves`] a region, started over whenever
//! something changed, from what is committed, held, and on its way.
//!
//! Reports become its events, and of its steps only commits are proposed: loads and releases are in
//! the set that each node is told to hold ([`super::orders`]).
//!
//! Two things make it safe that reports, orders and proposals cross each other on the way:
//! - An expert that was once missing from a node's orders counts as on its way out until a report
//!   lacks it, and is in no orders before that, even if it is still reported and wanted again.
//! - A proposal whose outcome nobody knows, or of an earlier leader, may still be applied, as long
//!   as the placement that it expects is there. So nothing is released before this leader has
//!   committed a placement itself (`sealed` of [`Moves::start`]).

use std::collections::{BTreeMap, BTreeSet};

use entente_proto::ids::{NodeId, PlacementEpoch, Region};
use entente_proto::placement::{ExpertKey, Placement};
use entente_router::moves::{MoveNode, Moves, Step};
use entente_router::placement::PlacementRefused;

use super::planning::{Inputs, Member};
use super::views::Standing;
use super::{Command, Leading, RETRY_MS};
use crate::state::{self, Applied, Expect, Outcome};

/// Time in which a node that is loading must have loaded something. Generous: an expert is at most
/// a few hundred megabytes.
const LOAD_STALL_MS: u64 = 60_000;

/// What is done in a region.
#[derive(Debug, Clone)]
pub(super) struct Work {
    pub inputs: Inputs,
    /// What the region should hold.
    pub target: Placement,
    /// Why that is less than wanted, if it is.
    pub refused: Option<PlacementRefused>,
    /// How it gets there; absent until there is a first placement.
    pub moves: Option<Moves>,
    /// An operator has just ordered the target.
    pub is_ordered: bool,
    /// What the region is to be committed to hold next.
    commit: Option<Placement>,
    /// The placement that was last compared with what the moves believe to be committed.
    seen: PlacementEpoch,
    /// When the moves are to be started over though no input changed.
    pub restart_at_ms: Option<u64>,
}

/// A placement that is proposed.
#[derive(Debug, Clone)]
pub(super) struct Pending {
    /// The number of the proposal.
    pub id: u64,
    /// Whose; absent for the first placement, which is that of all regions.
    region: Option<Region>,
    /// The epoch that it made, when that is known.
    made: Option<PlacementEpoch>,
}

impl Leading {
    /// Does in each region what can be done now.
    pub(super) fn move_on(&mut self, now_ms: u64) -> Vec<Command> {
        self.settle(now_ms);
        let serving = self.serving();
        self.works.retain(|region, _| serving.contains(region));
        self.waiting.clear();
        for region in serving {
            let Some(inputs) = self.inputs(region, now_ms) else { continue };
            if inputs.members.values().any(|member| member.standing == Standing::Unheard) {
                self.waiting.insert(region);
            } else if self.is_due(region, &inputs, now_ms) {
                self.restart(region, inputs);
            }
        }
        self.propose_placement(now_ms).into_iter().collect()
    }

    /// Whether a region is to be thought about anew. While a placement of its is under way it is
    /// not known what to start from.
    fn is_due(&mut self, region: Region, inputs: &Inputs, now_ms: u64) -> bool {
        if self.pending.as_ref().is_some_and(|p| p.region.is_none_or(|other| other == region)) {
            return false;
        }
        let epoch = self.state.placement_epoch();
        let foreign = match self.works.get(&region) {
            Some(work) if work.seen != epoch => {
                let committed = self.committed_in(region);
                work.moves.as_ref().is_none_or(|moves| *moves.committed() != committed)
            }
            _ => false,
        };
        let Some(work) = self.works.get_mut(&region) else { return true };
        work.seen = epoch;
        foreign || work.inputs != *inputs || work.restart_at_ms.is_some_and(|at| at <= now_ms)
    }

    /// Thinks about a region anew, and starts its moves over.
    fn restart(&mut self, region: Region, inputs: Inputs) {
        let old = self.works.get(&region);
        // Fewer replicas are wanted, or another model: what there is would do, and is too much.
        let is_same = old.is_none_or(|old| {
            old.inputs.replicas == inputs.replicas && old.inputs.model == inputs.model
        });
        let heading = old.filter(|_| is_same).map(|old| &old.target);
        let (target, refused) = match old.filter(|old| old.is_ordered) {
            Some(old) => (old.target.clone(), old.refused.clone()),
            None => self.choose(region, &inputs, heading, is_same),
        };
        let seen = self.state.placement_epoch();
        let (moves, steps) = if seen.0 == 0 {
            (None, Vec::new())
        } else {
            let (moves, steps) = Moves::start(
                self.move_nodes(&inputs, old),
                self.committed_in(region),
                target.clone(),
                self.own_epoch == Some(seen),
                self.settings.loads_per_node_max,
                inputs.model.shape.expert_bytes,
            );
            (Some(moves), steps)
        };
        let (is_ordered, commit, restart_at_ms) = (false, None, None);
        let work = Work { inputs, target, refused, moves, is_ordered, commit, seen, restart_at_ms };
        self.works.insert(region, work);
        self.take(region, steps);
    }

    /// The nodes of a region as a move sees them; `old` is the one that it replaces.
    pub(super) fn move_nodes(
        &self,
        inputs: &Inputs,
        old: Option<&Work>,
    ) -> BTreeMap<NodeId, MoveNode> {
        let expert_bytes = inputs.model.shape.expert_bytes;
        let same_start = |id: &NodeId, member: &Member| {
            let before = old.and_then(|old| old.inputs.members.get(id));
            before.is_some_and(|before| before.incarnation == member.incarnation)
        };
        let node = |(id, member): (&NodeId, &Member)| {
            let up = member.standing.is_up();
            let view = self.views.get(id).filter(|_| up);
            let held = view.and_then(|view| view.held.clone()).unwrap_or_default();
            let releasing = view.map(|view| view.releasing.clone()).unwrap_or_default();
            let mut loading = self.placed(*id).clone();
            let before = old.filter(|_| same_start(id, member)).and_then(|old| old.moves.as_ref());
            loading.extend(before.into_iter().flat_map(|moves| moves.loading(*id)));
            let node = MoveNode {
                region: self.state.node_by_id(*id)?.spec.region,
                room: member.room(expert_bytes),
                loading: &loading - &held,
                ready: &held - &releasing,
                releasing,
                up,
                serves: member.serves,
                takes_new: member.standing.takes_new() || member.standing == Standing::Sick,
            };
            Some((*id, node))
        };
        inputs.members.iter().filter_map(node).collect()
    }

    /// Takes note of the steps of a region's moves.
    fn take(&mut self, region: Region, steps: Vec<Step>) {
        for step in steps {
            match step {
                // It is among the moves' loads, and so in the node's orders.
                Step::Load { .. } => {}
                Step::Release { node, expert } => {
                    if let Some(view) = self.views.get_mut(&node) {
                        view.releasing.insert(expert);
                    }
                }
                Step::Commit { placement } => {
                    if let Some(work) = self.works.get_mut(&region) {
                        work.commit = Some(placement);
                    }
                }
            }
        }
    }

    /// Lets the moves of a node's region take an event.
    fn tell(&mut self, node: NodeId, event: impl FnOnce(&mut Moves) -> Vec<Step>) {
        let Some(region) = self.state.node_by_id(node).map(|node| node.spec.region) else { return };
        let start = self.views.get(&node).map(|view| view.incarnation);
        let knows = |work: &&mut Work| {
            work.inputs.members.get(&node).is_some_and(|member| member.incarnation == start)
        };
        // Moves that know an earlier start of the node are started over as soon as may be.
        let work = self.works.get_mut(&region).filter(knows);
        let steps = work.and_then(|work| work.moves.as_mut()).map(event).unwrap_or_default();
        self.take(region, steps);
    }

    /// Takes note of what a node holds. Returns whether that is news.
    pub(super) fn on_held(&mut self, id: NodeId, held: BTreeSet<ExpertKey>, now_ms: u64) -> bool {
        let wanted = self.wanted(id);
        let Some(view) = self.views.get_mut(&id) else { return false };
        view.grown_ms = now_ms;
        // The first report changes what the node counts for, and so everything starts over.
        let Some(before) = view.held.replace(held.clone()) else { return true };
        for expert in before.difference(&held) {
            let is_told = self.views.get_mut(&id).is_some_and(|v| v.releasing.remove(expert));
            if is_told {
                self.tell(id, |moves| moves.on_released(id, *expert));
            } else {
                self.restart_region_of(id);
            }
        }
        for expert in held.difference(&before) {
            if wanted.contains(expert) {
                self.tell(id, |moves| moves.on_loaded(id, *expert));
                continue;
            }
            // Loaded on earlier orders. Ours, which lack it, are on their way.
            if let Some(view) = self.views.get_mut(&id) {
                view.releasing.insert(*expert);
            }
            self.tell(id, |moves| {
                moves.on_unwanted(id, *expert);
                Vec::new()
            });
        }
        before != held
    }

    /// The node has lost something: the moves believe it to be there.
    fn restart_region_of(&mut self, id: NodeId) {
        let region = self.state.node_by_id(id).map(|node| node.spec.region);
        if let Some(work) = region.and_then(|region| self.works.get_mut(&region)) {
            work.restart_at_ms = Some(0);
        }
    }

    /// Takes note of what a node could not load. One that fails time and again is given nothing for
    /// a while. Returns whether anything failed.
    pub(super) fn on_failed(&mut self, id: NodeId, failed: &[ExpertKey], now_ms: u64) -> bool {
        for expert in failed {
            self.tell(id, |moves| moves.on_load_failed(id, *expert));
        }
        let sick_until_ms = now_ms.saturating_add(self.settings.restore_after_ms);
        let moves = self.works.values().filter_map(|work| work.moves.as_ref());
        let is_failing = !failed.is_empty() && moves.flat_map(Moves::failing).any(|n| n == id);
        if let Some(view) = self.views.get_mut(&id).filter(|_| is_failing) {
            view.sick_until_ms = sick_until_ms;
        }
        !failed.is_empty()
    }

    /// A node that loads nothing of what it should counts as failing.
    pub(super) fn give_up_stalled(&mut self, now_ms: u64) {
        let ids: Vec<NodeId> = self.views.keys().copied().collect();
        for id in ids {
            let region = self.state.node_by_id(id).map(|node| node.spec.region);
            let moves = region.and_then(|r| self.works.get(&r)).and_then(|w| w.moves.as_ref());
            let loading: Vec<ExpertKey> =
                moves.into_iter().flat_map(|moves| moves.loading(id)).collect();
            let Some(view) = self.views.get_mut(&id) else { continue };
            let stalls = now_ms >= view.grown_ms.saturating_add(LOAD_STALL_MS);
            if loading.is_empty() || stalls {
                view.grown_ms = now_ms;
                self.on_failed(id, &loading, now_ms);
            }
        }
    }

    /// Proposes the placement that a region waits for, one at a time.
    fn propose_placement(&mut self, now_ms: u64) -> Option<Command> {
        if self.pending.is_some() || now_ms < self.propose_after_ms {
            return None;
        }
        let epoch = self.state.placement_epoch();
        let (region, placement) = if epoch.0 == 0 {
            (None, self.first_placement()?)
        } else {
            let commit = |(region, work): (&Region, &Work)| Some((*region, work.commit.clone()?));
            let (region, placement) = self.works.iter().find_map(commit)?;
            (Some(region), self.merged(region, &placement))
        };
        let expect = Expect { placement_epoch: Some(epoch), ..Expect::default() };
        let (id, command) = self.propose(expect, state::Command::SetPlacement(placement));
        self.pending = Some(Pending { id, region, made: None });
        Some(command)
    }

    /// What all regions should hold, so that each node can load its part at once; none if no region
    /// has a plan.
    fn first_placement(&self) -> Option<Placement> {
        let mut placement = Placement::new();
        for (expert, nodes) in self.works.values().flat_map(|work| work.target.iter()) {
            for node in nodes {
                placement.add(expert, *node);
            }
        }
        placement.iter().next()?;
        Some(placement)
    }

    /// What is committed, but for one region.
    fn merged(&self, region: Region, here: &Placement) -> Placement {
        let mut placement = here.clone();
        let elsewhere =
            |id: &NodeId| self.state.node_by_id(*id).is_none_or(|node| node.spec.region != region);
        for (expert, nodes) in self.state.placement().iter() {
            for node in nodes.iter().filter(|id| elsewhere(id)) {
                placement.add(expert, *node);
            }
        }
        placement
    }

    pub(super) fn placement_answered(&mut self, outcome: Option<Outcome>, now_ms: u64) {
        let Some(pending) = &mut self.pending else { return };
        if let Some(Ok(Applied::Placement(epoch))) = outcome {
            pending.made = Some(epoch);
            return;
        }
        // Refused: the state that explains it is on its way. Unknown: it may still be applied.
        if outcome.is_none() {
            self.own_epoch = None;
        }
        let region = pending.region;
        self.pending = None;
        self.propose_after_ms = now_ms.saturating_add(RETRY_MS);
        if let Some(work) = region.and_then(|region| self.works.get_mut(&region)) {
            work.commit = None;
            work.restart_at_ms = Some(self.propose_after_ms);
        }
    }

    /// Takes note that the proposed placement is in the committed state.
    fn settle(&mut self, now_ms: u64) {
        let epoch = self.state.placement_epoch();
        let is_there = |pending: &Pending| pending.made.is_some_and(|made| made <= epoch);
        let Some(pending) = self.pending.take_if(|pending| is_there(pending)) else { return };
        self.own_epoch = pending.made;
        let Some(region) = pending.region else { return };
        let (committed, inputs) = (self.committed_in(region), self.inputs(region, now_ms));
        let Some(work) = self.works.get_mut(&region) else { return };
        let is_last = work.commit.take() == Some(committed);
        if !is_last || Some(&work.inputs) != inputs.as_ref() {
            // Somebody else has committed after it, or what the moves rely on has changed meanwhile.
            work.restart_at_ms = Some(now_ms);
            return;
        }
        work.seen = epoch;
        let steps = work.moves.as_mut().map(Moves::on_committed).unwrap_or_default();
        self.take(region, steps);
    }
}
