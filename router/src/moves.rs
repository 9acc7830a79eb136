//! From the placement that is to the placement that should be, without an expert ever being
//! without a replica that serves: load the new one, commit, then release the old one.
//!
//! A state machine: events in (loaded, load failed, committed, released, node lost), commands out.
//! It goes in rounds, each step of which waits for the one before:
//!
//! ```text
//!        ┌───────────────────────────────────────────────────────┐
//!        ▼                                                       │
//!   load what fits ──► commit what is ready ──► release what is no longer placed
//! ```
//!
//! A round loads as much as memory takes while everything old is still there; what it releases
//! makes room for the next. Where nodes are so full that nothing can begin, one copy steps aside to
//! a node that has room. Where none has, the move is refused with the arithmetic. An expert that no
//! committed replica serves does not wait for its round: it is committed as soon as it is ready.
//!
//! Invariants, as long as no node is lost:
//! - **No commit and no release lowers the ready replicas of an expert in a region** below what is
//!   placed there or what there shall be, whichever is less; so never to none.
//! - **Memory is never exceeded**: what is held, being loaded and not yet released counts.
//! - A node loads at most `loads_per_node_max` experts at once; one commit is in flight at most.
//! - A replica is released only after a commit that no longer names it, and only if no commit of
//!   somebody else can still come in between: see `sealed`.
//! - No commit leaves an expert without a name: where nothing else is ready, it names what it named.
//!
//! A lost node takes what it held, and nothing else is taken away for it: what is ready elsewhere is
//! committed in its place. The owner then plans anew and starts over from what is ready, and from
//! what is still on its way.
//!
//! It knows no clock and no weights. How long a load may take is its owner's business.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use entente_proto::ids::{ExpertId, LayerId, NodeId, Region};
use entente_proto::placement::{ExpertKey, Placement};

/// Times that loading an expert on a node is tried.
const LOAD_TRIES_MAX: u8 = 3;
/// The first and the last expert that a model may have, to find those of a node in a set of pairs.
const EXPERT_MIN: ExpertKey = (LayerId(0), ExpertId(0));
const EXPERT_MAX: ExpertKey = (LayerId(u16::MAX), ExpertId(u16::MAX));

/// A node as a move sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MoveNode {
    /// The country that it stands in.
    pub region: Region,
    /// Experts that fit into its memory; not limited when absent.
    pub room: Option<usize>,
    /// The experts that it holds, loaded and able to serve.
    pub ready: BTreeSet<ExpertKey>,
    /// Experts that it is loading from before: reported like those of this move.
    pub loading: BTreeSet<ExpertKey>,
    /// Experts that it is releasing from before, reported alike. None of them is in `ready`.
    pub releasing: BTreeSet<ExpertKey>,
    /// Whether it is up.
    pub up: bool,
    /// Whether coordinators use it: what it holds before that relieves nobody.
    pub serves: bool,
    /// Whether a placement may name it for what it is not named for now.
    pub takes_new: bool,
}

/// Something that the owner must get done, and then report.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Let the node load an expert; then [`Moves::on_loaded`] or [`Moves::on_load_failed`].
    Load {
        /// The node.
        node: NodeId,
        /// The expert.
        expert: ExpertKey,
    },
    /// Have the cluster agree on this placement; then [`Moves::on_committed`].
    Commit {
        /// The placement.
        placement: Placement,
    },
    /// Let the node forget an expert; then [`Moves::on_released`].
    Release {
        /// The node.
        node: NodeId,
        /// The expert.
        expert: ExpertKey,
    },
}

/// How far a move is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Progress {
    /// Reports are outstanding.
    Moving {
        /// Replicas of the target that are not ready yet.
        left: usize,
    },
    /// What is committed is the target, and nothing else is held.
    Done,
    /// Nothing more can be done; what is committed is safe. Plan anew from what is ready.
    Stuck(Stuck),
}

/// Why a move does not get to its end.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Stuck {
    /// Nodes must load before they can release, and have no room for that.
    #[error(
        "{left} replicas are left to load, and no node has room for one more: node {node} holds \
         {held} experts of the {room} that fit; moving needs {expert_bytes} bytes more"
    )]
    NoHeadroom {
        /// Replicas of the target that are not ready.
        left: usize,
        /// The first node that lacks room.
        node: NodeId,
        /// Experts that it holds.
        held: usize,
        /// Experts that fit.
        room: usize,
        /// Bytes of one expert.
        expert_bytes: u64,
    },
    /// A node of the target is down.
    #[error("{left} replicas are left to load, and node {node} is down")]
    NodeDown {
        /// Replicas of the target that are not ready.
        left: usize,
        /// The node.
        node: NodeId,
    },
    /// A node could not load an expert, however often it tried.
    #[error("{left} replicas are left to load, and node {node} failed {tries} times to load one")]
    LoadFailed {
        /// Replicas of the target that are not ready.
        left: usize,
        /// The node.
        node: NodeId,
        /// Times that it tried.
        tries: u8,
    },
}

impl Stuck {
    /// Replicas of the target that are not ready.
    pub fn left(&self) -> usize {
        match self {
            Self::NoHeadroom { left, .. }
            | Self::NodeDown { left, .. }
            | Self::LoadFailed { left, .. } => *left,
        }
    }
}

/// The state machine of one move. One task owns it.
#[derive(Debug, Clone)]
pub struct Moves {
    nodes: BTreeMap<NodeId, MoveNode>,
    committed: Placement,
    target: Placement,
    /// The placement that is being committed.
    committing: Option<Placement>,
    loading: BTreeSet<(NodeId, ExpertKey)>,
    releasing: BTreeSet<(NodeId, ExpertKey)>,
    failures: BTreeMap<(NodeId, ExpertKey), u8>,
    /// Copies that are to leave first, because another stepped aside for them; none comes back.
    vacated: BTreeSet<(NodeId, ExpertKey)>,
    /// No commit of somebody else can replace what is committed, unless it has seen it.
    sealed: bool,
    loads_per_node_max: usize,
    expert_bytes: u64,
}

impl Moves {
    /// Starts a move from what is committed to `target`: the first steps come with it.
    ///
    /// `nodes` are those of either placement, with what each holds ready now. One that is missing
    /// there counts as down.
    ///
    /// `sealed` says that the owner made the committed placement itself. Otherwise a commit that an
    /// earlier owner proposed may still come, and name a replica that is being released meanwhile;
    /// so before the first release the move commits once more, which that other one did not expect.
    pub fn start(
        nodes: BTreeMap<NodeId, MoveNode>,
        committed: Placement,
        target: Placement,
        sealed: bool,
        loads_per_node_max: usize,
        expert_bytes: u64,
    ) -> (Self, Vec<Step>) {
        let (mut loading, mut releasing) = (BTreeSet::new(), BTreeSet::new());
        for (id, node) in nodes.iter().filter(|(_, node)| node.up) {
            loading.extend(node.loading.iter().map(|expert| (*id, *expert)));
            releasing.extend(node.releasing.iter().map(|expert| (*id, *expert)));
        }
        let mut moves = Self {
            nodes,
            committed,
            target,
            committing: None,
            loading,
            releasing,
            failures: BTreeMap::new(),
            vacated: BTreeSet::new(),
            sealed,
            loads_per_node_max: loads_per_node_max.max(1),
            expert_bytes,
        };
        let steps = moves.advance();
        (moves, steps)
    }

    /// What the cluster has agreed on last.
    pub fn committed(&self) -> &Placement {
        &self.committed
    }

    /// What this move is heading for.
    pub fn target(&self) -> &Placement {
        &self.target
    }

    /// What a node is loading.
    pub fn loading(&self, node: NodeId) -> impl Iterator<Item = ExpertKey> + '_ {
        of_node(&self.loading, node)
    }

    /// Nodes that could not load an expert, however often they tried.
    pub fn failing(&self) -> impl Iterator<Item = NodeId> + '_ {
        let given_up = self.failures.iter().filter(|(_, tries)| **tries >= LOAD_TRIES_MAX);
        given_up.map(|((node, _), _)| *node)
    }

    /// Takes note that a node has an expert ready.
    pub fn on_loaded(&mut self, node: NodeId, expert: ExpertKey) -> Vec<Step> {
        let pair = (node, expert);
        self.loading.remove(&pair);
        self.failures.remove(&pair);
        // Also one that was given up: the node goes on trying what is placed on it.
        if !self.releasing.contains(&pair)
            && let Some(node) = self.nodes.get_mut(&node).filter(|node| node.up)
        {
            node.ready.insert(expert);
        }
        self.advance()
    }

    /// Takes note that a node has loaded an expert on orders of somebody else, and is about to
    /// release it because it is not in ours.
    pub fn on_unwanted(&mut self, node: NodeId, expert: ExpertKey) {
        if self.is_up(node) {
            self.releasing.insert((node, expert));
        }
    }

    /// Takes note that a node could not load an expert. It is tried again, up to a bound.
    pub fn on_load_failed(&mut self, node: NodeId, expert: ExpertKey) -> Vec<Step> {
        if self.loading.remove(&(node, expert)) {
            *self.failures.entry((node, expert)).or_default() += 1;
        }
        self.advance()
    }

    /// Takes note that the placement of the last [`Step::Commit`] is what the cluster agrees on.
    pub fn on_committed(&mut self) -> Vec<Step> {
        if let Some(placement) = self.committing.take() {
            self.committed = placement;
            self.sealed = true;
        }
        self.advance()
    }

    /// Takes note that a node has forgotten an expert.
    pub fn on_released(&mut self, node: NodeId, expert: ExpertKey) -> Vec<Step> {
        self.releasing.remove(&(node, expert));
        self.advance()
    }

    /// Takes note that a node is lost, with everything that it held and was loading.
    pub fn on_node_down(&mut self, node: NodeId) -> Vec<Step> {
        self.loading.retain(|(other, _)| *other != node);
        self.releasing.retain(|(other, _)| *other != node);
        if let Some(node) = self.nodes.get_mut(&node) {
            node.up = false;
            node.ready.clear();
        }
        self.advance()
    }

    /// How far the move is.
    pub fn progress(&self) -> Progress {
        let left: Vec<(NodeId, ExpertKey)> = self.left().collect();
        let busy =
            self.committing.is_some() || !self.loading.is_empty() || !self.releasing.is_empty();
        if busy || left.iter().any(|(node, expert)| self.holds(*node, *expert)) {
            return Progress::Moving { left: left.len() };
        }
        let Some(first) = left.first() else { return Progress::Done };
        Progress::Stuck(self.stuck(left.len(), first.0))
    }

    /// Why nothing can be done about the `left` replicas that are not ready.
    fn stuck(&self, left: usize, first: NodeId) -> Stuck {
        let down = self.left().find(|(node, _)| !self.is_up(*node));
        if let Some((node, _)) = down {
            return Stuck::NodeDown { left, node };
        }
        if let Some(((node, _), tries)) =
            self.failures.iter().find(|(_, tries)| **tries >= LOAD_TRIES_MAX)
        {
            return Stuck::LoadFailed { left, node: *node, tries: *tries };
        }
        let room = self.nodes.get(&first).and_then(|node| node.room).unwrap_or(usize::MAX);
        let (held, expert_bytes) = (self.held(first), self.expert_bytes);
        Stuck::NoHeadroom { left, node: first, held, room, expert_bytes }
    }

    /// Replicas of the target that are not ready.
    fn left(&self) -> impl Iterator<Item = (NodeId, ExpertKey)> + '_ {
        let all =
            self.target.iter().flat_map(|(expert, nodes)| nodes.iter().map(move |n| (*n, expert)));
        all.filter(|(node, expert)| !self.is_ready(*node, *expert))
    }

    fn is_up(&self, node: NodeId) -> bool {
        self.nodes.get(&node).is_some_and(|node| node.up)
    }

    /// Whether a node holds an expert, be it before coordinators use the node.
    fn holds(&self, node: NodeId, expert: ExpertKey) -> bool {
        self.nodes.get(&node).is_some_and(|node| node.up && node.ready.contains(&expert))
    }

    fn is_ready(&self, node: NodeId, expert: ExpertKey) -> bool {
        self.holds(node, expert) && self.nodes.get(&node).is_some_and(|node| node.serves)
    }

    /// Experts that take memory on a node: held, on their way in or on their way out. What is placed
    /// there and could not be loaded counts, because the node goes on trying.
    fn held(&self, node: NodeId) -> usize {
        let ready = self.nodes.get(&node).map_or(0, |node| node.ready.len());
        let (least, most) = ((node, EXPERT_MIN), (node, EXPERT_MAX));
        let pending = |pair: &&(NodeId, ExpertKey)| {
            let is_placed = self.committed.replicas(pair.1).any(|other| other == node);
            is_placed
                && !self.holds(node, pair.1)
                && !self.loading.contains(pair)
                && !self.releasing.contains(pair)
        };
        let failed = self.failures.range(least..=most).map(|(pair, _)| pair);
        let failed = failed.filter(pending).count();
        let moving = of_node(&self.loading, node).count() + of_node(&self.releasing, node).count();
        ready + moving + failed
    }

    /// Experts that still fit on a node.
    fn headroom(&self, node: NodeId) -> usize {
        let room = self.nodes.get(&node).and_then(|node| node.room);
        room.map_or(usize::MAX, |room| room.saturating_sub(self.held(node)))
    }

    fn has_room(&self, node: NodeId) -> bool {
        self.headroom(node) > 0
    }

    /// What can be done now: loads; once none is in flight, a commit; after it, releases.
    fn advance(&mut self) -> Vec<Step> {
        let mut steps = self.loads();
        if self.committing.is_some() {
            return steps;
        }
        let next = self.next();
        let round_ends = self.loading.is_empty();
        let seals = round_ends && !self.sealed && self.surplus().next().is_some();
        if (next != self.committed && (round_ends || self.saves(&next))) || seals {
            self.committing = Some(next.clone());
            steps.push(Step::Commit { placement: next });
            return steps;
        }
        if round_ends {
            // What is committed is all that is worth keeping now, so the rest may go.
            steps.extend(self.releases());
            if self.releasing.is_empty() {
                steps.extend(self.step_aside());
            }
        }
        steps
    }

    /// Whether a placement gives an expert a replica that serves in a region where what is committed
    /// gives it none.
    fn saves(&self, next: &Placement) -> bool {
        let region = |id: &NodeId| self.nodes.get(id).map(|node| node.region);
        next.iter().any(|(expert, nodes)| {
            let serves = |id: &NodeId| self.is_ready(*id, expert);
            let served: BTreeSet<_> =
                self.committed.replicas(expert).filter(serves).map(|id| region(&id)).collect();
            nodes.iter().filter(|id| serves(id)).any(|id| !served.contains(&region(id)))
        })
    }

    /// Loads that memory and the bound of each node allow.
    fn loads(&mut self) -> Vec<Step> {
        let left: Vec<(NodeId, ExpertKey)> = self.left().collect();
        let mut slots: BTreeMap<NodeId, usize> = BTreeMap::new();
        let mut steps = Vec::new();
        for pair in left {
            let (node, expert) = pair;
            let tries = self.failures.get(&pair).copied().unwrap_or_default();
            // What is being released is still there, and not there when the load begins.
            let may_load = self.is_up(node)
                && tries < LOAD_TRIES_MAX
                && !self.holds(node, expert)
                && !self.loading.contains(&pair)
                && !self.releasing.contains(&pair);
            if !may_load {
                continue;
            }
            let slots = slots.entry(node).or_insert_with(|| self.slots(node));
            if *slots > 0 {
                *slots -= 1;
                self.loading.insert(pair);
                steps.push(Step::Load { node, expert });
            }
        }
        steps
    }

    /// Loads that may begin on a node.
    fn slots(&self, node: NodeId) -> usize {
        let loading = of_node(&self.loading, node).count();
        self.loads_per_node_max.saturating_sub(loading).min(self.headroom(node))
    }

    /// The placement that may be committed now: what is ready of the target, and in each region as
    /// many others as the target still lacks there.
    fn next(&self) -> Placement {
        let mut next = Placement::new();
        let experts: BTreeSet<ExpertKey> =
            self.committed.iter().chain(self.target.iter()).map(|(expert, _)| expert).collect();
        for expert in experts {
            let mut lacking: BTreeMap<Region, usize> = BTreeMap::new();
            let mut named: BTreeSet<NodeId> = BTreeSet::new();
            for node in self.target.replicas(expert) {
                // What is named there and is not ready may come back; until then another stands in.
                if self.committed.replicas(expert).any(|other| other == node) {
                    named.insert(node);
                }
                match self.nodes.get(&node) {
                    _ if self.is_ready(node, expert) => named.extend([node]),
                    Some(node) => *lacking.entry(node.region).or_default() += 1,
                    // Nobody knows which copies it was to relieve, so all of them stay.
                    None => named.extend(self.committed.replicas(expert)),
                }
            }
            for (region, lacking) in lacking {
                let stand_ins = self.stand_ins(expert, region);
                let here = |id: &&NodeId| self.nodes.get(*id).is_some_and(|n| n.region == region);
                let ready = |id: &NodeId| self.is_ready(*id, expert);
                // Where none is ready, the next that becomes so may be any of those that are named.
                let served = named.iter().filter(here).chain(&stand_ins).any(ready);
                let count = if served { lacking } else { usize::MAX };
                named.extend(stand_ins.into_iter().take(count));
            }
            for node in named {
                next.add(expert, node);
            }
        }
        next
    }

    /// Nodes of a region that may stand in for a replica of the target which is not ready, the best
    /// first: one that is ready, and of those the copy that another stepped aside for last.
    fn stand_ins(&self, expert: ExpertKey, region: Region) -> Vec<NodeId> {
        let committed: BTreeSet<NodeId> = self.committed.replicas(expert).collect();
        let target: BTreeSet<NodeId> = self.target.replicas(expert).collect();
        // A committed copy that is not ready may come back with its node: better than no name.
        let may = |id: &NodeId| {
            let ours = self.nodes.get(id).is_none_or(|node| node.region == region);
            let takes = self.nodes.get(id).is_some_and(|node| node.takes_new);
            let has = (takes && self.is_ready(*id, expert)) || committed.contains(id);
            ours && has && !target.contains(id)
        };
        let all: BTreeSet<NodeId> = self.nodes.keys().chain(&committed).copied().collect();
        let mut nodes: Vec<NodeId> = all.into_iter().filter(may).collect();
        let ready = |id: &NodeId| self.is_ready(*id, expert);
        let vacated = |id: &NodeId| self.vacated.contains(&(*id, expert));
        nodes.sort_by_key(|id| (!ready(id), vacated(id), !committed.contains(id), *id));
        nodes
    }

    /// What is held and named neither by the committed placement nor by the target.
    fn surplus(&self) -> impl Iterator<Item = (NodeId, ExpertKey)> + '_ {
        let named = |id: NodeId, expert: ExpertKey| {
            let mut nodes = self.committed.replicas(expert).chain(self.target.replicas(expert));
            nodes.any(|other| other == id)
        };
        let up = self.nodes.iter().filter(|(_, node)| node.up);
        let pairs = up.flat_map(|(id, node)| node.ready.iter().map(|expert| (*id, *expert)));
        pairs.filter(move |(id, expert)| !named(*id, *expert))
    }

    /// Releases the surplus.
    fn releases(&mut self) -> Vec<Step> {
        let surplus: Vec<(NodeId, ExpertKey)> = self.surplus().collect();
        let mut release = |(node, expert)| {
            if let Some(node) = self.nodes.get_mut(&node) {
                node.ready.remove(&expert);
            }
            self.releasing.insert((node, expert));
            Step::Release { node, expert }
        };
        surplus.into_iter().map(&mut release).collect()
    }

    /// When full nodes wait for each other: copies one expert that must leave such a node to a
    /// third one that has room, from where it moves on later. What left a node so does not come
    /// back to it, so that this ends.
    fn step_aside(&mut self) -> Option<Step> {
        let blocked: BTreeSet<NodeId> = self
            .left()
            .filter(|pair| self.is_up(pair.0) && !self.failures.contains_key(pair))
            .map(|(node, _)| node)
            .filter(|node| !self.has_room(*node))
            .collect();
        for from in blocked {
            let leaves = |expert: &&ExpertKey| !self.target.replicas(**expert).any(|n| n == from);
            for expert in self.nodes[&from].ready.iter().filter(leaves) {
                if let Some(to) = self.refuge(from, *expert) {
                    let expert = *expert;
                    self.vacated.insert((from, expert));
                    self.loading.insert((to, expert));
                    return Some(Step::Load { node: to, expert });
                }
            }
        }
        None
    }

    /// A node of the same region that could take a copy for a while.
    fn refuge(&self, from: NodeId, expert: ExpertKey) -> Option<NodeId> {
        let takes = |(id, node): &(&NodeId, &MoveNode)| {
            let pair = (**id, expert);
            node.up
                && node.serves
                && node.takes_new
                && node.region == self.nodes[&from].region
                && !node.ready.contains(&expert)
                && !self.failures.contains_key(&pair)
                && !self.vacated.contains(&pair)
                && self.has_room(**id)
        };
        self.nodes.iter().find(takes).map(|(id, _)| *id)
    }
}

/// The experts that would be without a ready replica in a region if these nodes of it stopped: empty
/// when it is safe to stop them. What no node of the region has even now is not their doing.
pub fn lost_without(
    stopping: &BTreeSet<NodeId>,
    nodes: &BTreeMap<NodeId, MoveNode>,
    committed: &Placement,
) -> BTreeSet<(Region, ExpertKey)> {
    let mut lost = BTreeSet::new();
    for (expert, on) in committed.iter() {
        let ready = |id: &NodeId| {
            let node = nodes.get(id).filter(|node| node.up && node.serves);
            node.filter(|node| node.ready.contains(&expert)).map(|node| node.region)
        };
        let regions = |stops: bool| {
            on.iter().filter(move |id| stopping.contains(id) == stops).filter_map(ready)
        };
        let stay: BTreeSet<Region> = regions(false).collect();
        lost.extend(regions(true).filter(|region| !stay.contains(region)).map(|r| (r, expert)));
    }
    lost
}

/// The experts of one node in a set of pairs.
fn of_node(
    pairs: &BTreeSet<(NodeId, ExpertKey)>,
    node: NodeId,
) -> impl Iterator<Item = ExpertKey> + '_ {
    pairs.range((node, EXPERT_MIN)..=(node, EXPERT_MAX)).map(|(_, expert)| *expert)
}
