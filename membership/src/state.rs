//! The replicated state machine: members, their states, and the placement.

use std::collections::BTreeMap;
use std::sync::Arc;

use entente_proto::ids::{Incarnation, MembershipEpoch, NodeId, NodeName, PlacementEpoch, Region};
use entente_proto::placement::Placement;
use serde::{Deserialize, Serialize};

/// Most nodes that a cluster may have had in its life, removed ones included.
pub const NODES_MAX: usize = 4_096;

/// What a node is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Attention, gate, sampler and API.
    Coordinator,
    /// Holds experts.
    ExpertNode,
}

/// Where a node is in its life.
///
/// ```text
///   joining ──► active ──► draining ──► down ──► removed
///      ▲          ▲  └────────┼──────────▲  │
///      │          └───────────┘             │      (draining may be called off;
///      └────────────────────────────────────┘       a node that is down may register again)
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NodeState {
    /// A member that loads its experts; takes no traffic.
    Joining,
    /// Takes traffic.
    Active,
    /// Finishes what it has; its replicas move elsewhere.
    Draining,
    /// Takes no traffic; may come back.
    Down,
    /// Never comes back. Its number and its name stay taken.
    Removed,
}

impl NodeState {
    fn may_become(self, next: Self) -> bool {
        use NodeState::{Active, Down, Draining, Joining, Removed};
        matches!(
            (self, next),
            (Joining, Active | Down)
                | (Active, Draining | Down)
                | (Draining, Active | Down)
                | (Down, Removed)
        )
    }
}

/// What is said about a node when it becomes a member.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeSpec {
    /// Unique in the cluster, for ever.
    pub name: NodeName,
    /// The country that it stands in.
    pub region: Region,
    /// What it is for.
    pub role: Role,
    /// Where it is reached, `host:port`.
    pub address: String,
}

/// A member.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Its number.
    pub id: NodeId,
    /// What was said when it became a member.
    pub spec: NodeSpec,
    /// Where it is in its life.
    pub state: NodeState,
    /// Its latest start, once it has registered.
    pub incarnation: Option<Incarnation>,
}

/// A change that somebody wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Starts the cluster with these nodes, which take traffic at once; the first command of all.
    /// Nodes are numbered in the order of their names, so that the order of a file does not matter.
    Found(Vec<NodeSpec>),
    /// Adds a member, joining.
    AddNode(NodeSpec),
    /// A node has started: mints its incarnation. It is joining from here on.
    Register(NodeId),
    /// Moves a node on in its life.
    SetState(NodeId, NodeState),
    /// Replaces the placement.
    SetPlacement(Placement),
}

/// What an accepted command brought about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Applied {
    /// The members, or the state of one, changed.
    Membership(MembershipEpoch),
    /// A node was added under this number.
    Added(NodeId),
    /// A node registered and got this incarnation.
    Registered(Incarnation),
    /// The placement changed.
    Placement(PlacementEpoch),
}

/// Why a command changed nothing. The same command on the same state is always refused alike.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// A cluster is founded once, and before anything else.
    #[error("the cluster is founded already")]
    FoundedAlready,
    /// Nothing happens before the cluster is founded.
    #[error("the cluster is not founded")]
    NotFounded,
    /// Two members would have one name.
    #[error("node {0} is, or was, a member already")]
    NameTaken(NodeName),
    /// There is no such member.
    #[error("node {0} is not a member")]
    NotAMember(NodeId),
    /// The node's life does not go that way.
    #[error("node {node} is {from:?} and cannot become {to:?}")]
    Transition {
        /// The node.
        node: NodeName,
        /// What it is.
        from: NodeState,
        /// What it was meant to become.
        to: NodeState,
    },
    /// A node that the placement names cannot be removed.
    #[error("node {node} has {replicas} replicas placed on it; move them first")]
    StillPlaced {
        /// The node.
        node: NodeName,
        /// Replicas that the placement puts there.
        replicas: usize,
    },
    /// The placement names a node that cannot hold experts.
    #[error("the placement names node {0}, which is no expert node of this cluster")]
    NoExpertNode(NodeId),
    /// The cluster has had too many nodes.
    #[error("the cluster would have more than {NODES_MAX} nodes, removed ones included")]
    TooMany,
}

/// Everything that the cluster has agreed on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct State {
    membership_epoch: MembershipEpoch,
    placement_epoch: PlacementEpoch,
    incarnations_minted: u64,
    nodes: BTreeMap<NodeId, Node>,
    placement: Arc<Placement>,
}

impl State {
    /// The state before the cluster is founded.
    pub fn new() -> Self {
        Self::default()
    }

    /// Counts changes of the members.
    pub fn membership_epoch(&self) -> MembershipEpoch {
        self.membership_epoch
    }

    /// Counts changes of the placement.
    pub fn placement_epoch(&self) -> PlacementEpoch {
        self.placement_epoch
    }

    /// All members, removed ones included, in order of number.
    pub fn nodes(&self) -> impl Iterator<Item = &Node> {
        self.nodes.values()
    }

    /// The member of this name.
    pub fn node(&self, name: &NodeName) -> Option<&Node> {
        self.nodes().find(|node| node.spec.name == *name)
    }

    /// Which node holds which expert.
    pub fn placement(&self) -> &Arc<Placement> {
        &self.placement
    }

    /// Applies one command. A refused one leaves the state as it was.
    pub fn apply(&mut self, command: Command) -> Result<Applied, Refused> {
        let founded = self.membership_epoch != MembershipEpoch::default();
        match command {
            Command::Found(_) if founded => Err(Refused::FoundedAlready),
            Command::Found(specs) => self.found(specs),
            _ if !founded => Err(Refused::NotFounded),
            Command::AddNode(spec) => self.add(spec),
            Command::Register(id) => self.register(id),
            Command::SetState(id, state) => self.set_state(id, state),
            Command::SetPlacement(placement) => self.set_placement(placement),
        }
    }

    fn found(&mut self, mut specs: Vec<NodeSpec>) -> Result<Applied, Refused> {
        if specs.len() > NODES_MAX {
            return Err(Refused::TooMany);
        }
        specs.sort_by(|a, b| a.name.cmp(&b.name));
        if let Some(pair) = specs.windows(2).find(|pair| pair[0].name == pair[1].name) {
            return Err(Refused::NameTaken(pair[0].name.clone()));
        }
        for spec in specs {
            self.insert(spec, NodeState::Active);
        }
        Ok(self.membership_changed())
    }

    fn add(&mut self, spec: NodeSpec) -> Result<Applied, Refused> {
        if self.node(&spec.name).is_some() {
            return Err(Refused::NameTaken(spec.name));
        }
        if self.nodes.len() >= NODES_MAX {
            return Err(Refused::TooMany);
        }
        let id = self.insert(spec, NodeState::Joining);
        self.membership_changed();
        Ok(Applied::Added(id))
    }

    /// Numbers count up: no entry is ever taken out, so the count is the next free number.
    fn insert(&mut self, spec: NodeSpec, state: NodeState) -> NodeId {
        let id = NodeId(self.nodes.len() as u32);
        self.nodes.insert(id, Node { id, spec, state, incarnation: None });
        id
    }

    fn register(&mut self, id: NodeId) -> Result<Applied, Refused> {
        let incarnation = Incarnation(self.incarnations_minted + 1);
        let node = self.nodes.get_mut(&id).ok_or(Refused::NotAMember(id))?;
        if node.state == NodeState::Removed {
            let (from, to) = (node.state, NodeState::Joining);
            return Err(Refused::Transition { node: node.spec.name.clone(), from, to });
        }
        node.state = NodeState::Joining;
        node.incarnation = Some(incarnation);
        self.incarnations_minted = incarnation.0;
        self.membership_changed();
        Ok(Applied::Registered(incarnation))
    }

    fn set_state(&mut self, id: NodeId, to: NodeState) -> Result<Applied, Refused> {
        let replicas = self.placement.experts_of(id).len();
        let node = self.nodes.get_mut(&id).ok_or(Refused::NotAMember(id))?;
        let (name, from) = (node.spec.name.clone(), node.state);
        if !from.may_become(to) {
            return Err(Refused::Transition { node: name, from, to });
        }
        if to == NodeState::Removed && replicas > 0 {
            return Err(Refused::StillPlaced { node: name, replicas });
        }
        node.state = to;
        Ok(self.membership_changed())
    }

    fn set_placement(&mut self, placement: Placement) -> Result<Applied, Refused> {
        let holds = |id: &NodeId| {
            self.nodes.get(id).is_some_and(|node| {
                node.spec.role == Role::ExpertNode && node.state != NodeState::Removed
            })
        };
        if let Some(stranger) = placement.nodes().into_iter().find(|id| !holds(id)) {
            return Err(Refused::NoExpertNode(stranger));
        }
        self.placement = Arc::new(placement);
        self.placement_epoch.0 += 1;
        Ok(Applied::Placement(self.placement_epoch))
    }

    fn membership_changed(&mut self) -> Applied {
        self.membership_epoch.0 += 1;
        Applied::Membership(self.membership_epoch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use entente_proto::ids::{ExpertId, LayerId};

    fn spec(name: &str) -> NodeSpec {
        NodeSpec {
            name: name.parse().unwrap(),
            region: "fr".parse().unwrap(),
            role: Role::ExpertNode,
            address: "127.0.0.1:1".to_owned(),
        }
    }

    fn founded() -> State {
        let mut state = State::new();
        state.apply(Command::Found(vec![spec("b"), spec("a")])).unwrap();
        state
    }

    fn placed_on(id: u32) -> Command {
        let mut placement = Placement::new();
        placement.add((LayerId(0), ExpertId(0)), NodeId(id));
        Command::SetPlacement(placement)
    }

    #[test]
    fn a_cluster_is_founded_with_active_nodes_numbered_by_name_at_epoch_1() {
        let state = founded();
        let got: Vec<_> = state.nodes().map(|n| (n.id.0, n.spec.name.as_str(), n.state)).collect();
        assert_eq!(got, [(0, "a", NodeState::Active), (1, "b", NodeState::Active)]);
        assert_eq!(state.membership_epoch(), MembershipEpoch(1));
        assert_eq!(state.placement_epoch(), PlacementEpoch(0));
    }

    #[test]
    fn each_change_raises_one_epoch_by_one() {
        let mut state = founded();
        assert_eq!(state.apply(placed_on(1)), Ok(Applied::Placement(PlacementEpoch(1))));
        assert_eq!(state.apply(Command::AddNode(spec("c"))), Ok(Applied::Added(NodeId(2))));
        let active = Command::SetState(NodeId(2), NodeState::Active);
        assert_eq!(state.apply(active), Ok(Applied::Membership(MembershipEpoch(3))));
    }

    #[test]
    fn an_incarnation_is_never_handed_out_twice() {
        let mut state = founded();
        let minted = [0, 1, 0].map(|id| state.apply(Command::Register(NodeId(id))).unwrap());
        let expected = [1, 2, 3].map(|i| Applied::Registered(Incarnation(i)));
        assert_eq!(minted, expected);
        assert_eq!(state.nodes[&NodeId(0)].state, NodeState::Joining);
    }

    #[test]
    fn what_is_refused_names_the_cause_and_changes_nothing() {
        let mut state = founded();
        state.apply(placed_on(0)).unwrap();
        state.apply(Command::SetState(NodeId(0), NodeState::Down)).unwrap();
        state.apply(Command::SetState(NodeId(1), NodeState::Down)).unwrap();
        state.apply(Command::SetState(NodeId(1), NodeState::Removed)).unwrap();
        let coordinator = NodeSpec { role: Role::Coordinator, ..spec("c") };
        state.apply(Command::AddNode(coordinator)).unwrap();
        let cases = [
            (Command::Found(Vec::new()), "founded already"),
            (Command::AddNode(spec("b")), "node b is, or was, a member already"),
            (Command::Register(NodeId(9)), "node 9 is not a member"),
            (Command::Register(NodeId(1)), "cannot become Joining"),
            (Command::SetState(NodeId(0), NodeState::Active), "is Down and cannot become Active"),
            (Command::SetState(NodeId(0), NodeState::Removed), "has 1 replicas placed on it"),
            (placed_on(1), "names node 1"),
            (placed_on(2), "names node 2"),
            (placed_on(9), "names node 9"),
        ];
        for (command, cause) in cases {
            let before = state.clone();
            let refused = state.apply(command).unwrap_err().to_string();
            assert!(refused.contains(cause), "{refused} does not say {cause}");
            assert_eq!(state, before);
        }
        let early = State::new().apply(Command::Register(NodeId(0)));
        assert_eq!(early, Err(Refused::NotFounded));
    }
}
