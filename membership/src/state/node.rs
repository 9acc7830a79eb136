//! What is known of a node, and how its life goes.

use entente_proto::identity::{self, Identity};
use entente_proto::ids::{Incarnation, NodeId, NodeName, Region};
use serde::{Deserialize, Serialize};

/// What a node is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Attention, gate, sampler and API; votes.
    Coordinator,
    /// Holds experts.
    ExpertNode,
    /// Votes, and does nothing else.
    Witness,
}

impl Role {
    /// Its name, as the command line has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Coordinator => "coordinator",
            Self::ExpertNode => "expert-node",
            Self::Witness => "witness",
        }
    }

    /// What its certificate calls it.
    pub fn identity(self) -> identity::Role {
        match self {
            Self::Coordinator => identity::Role::Coordinator,
            Self::ExpertNode => identity::Role::Expert,
            Self::Witness => identity::Role::Witness,
        }
    }

    /// Whether such a node takes part in the raft group.
    pub fn votes(self) -> bool {
        matches!(self, Self::Coordinator | Self::Witness)
    }
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
    /// Its name, for people and for programs that watch the membership.
    pub fn name(self) -> &'static str {
        match self {
            Self::Joining => "joining",
            Self::Active => "active",
            Self::Draining => "draining",
            Self::Down => "down",
            Self::Removed => "removed",
        }
    }

    pub(super) fn may_become(self, next: Self) -> bool {
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

/// A device that a node computes on, as its driver describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeDevice {
    /// What it is called, such as `NVIDIA H100 80GB HBM3`.
    pub name: String,
    /// Which one of its kind it is.
    pub uuid: String,
    /// Bytes of memory that it has.
    pub memory_bytes: u64,
    /// Bytes a second that its memory delivers; 0 when it does not tell.
    pub bandwidth_bytes_s: u64,
}

/// What is said about a node when it becomes a member.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeSpec {
    /// Unique in the cluster, for ever.
    pub name: NodeName,
    /// The country that it stands in.
    pub region: Region,
    /// The data centre within the region; empty when the operator names none.
    pub site: String,
    /// What it is for.
    pub role: Role,
    /// Where it is reached, `host:port`.
    pub address: String,
    /// Bytes that expert weights may take there; not limited when absent.
    pub memory_bytes: Option<u64>,
    /// Instruction set, weight format and kernel version; empty until the node has told it.
    pub kernel_class: String,
    /// What it computes on, if that is not its processor.
    pub device: Option<NodeDevice>,
}

impl NodeSpec {
    /// Whether this is said of the process with that certificate. A name alone is not enough: the CA
    /// of another region could give it to somebody else.
    pub fn is(&self, process: &Identity) -> bool {
        let Identity { cluster: _, region, role, node } = process;
        (&self.name, self.region, self.role.identity()) == (node, *region, *role)
    }
}

/// A member.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Its number.
    pub id: NodeId,
    /// What was said when it became a member, and corrected each time that it registered.
    pub spec: NodeSpec,
    /// Where it is in its life.
    pub state: NodeState,
    /// Gets no further replicas, by an operator's wish.
    pub cordoned: bool,
    /// Its latest start, once it has registered.
    pub incarnation: Option<Incarnation>,
    /// When its state last changed, milliseconds since 1970 by the proposer's clock.
    pub changed_at_ms: u64,
}

impl Node {
    /// Whether a placement may put a replica on it that it does not hold yet.
    pub fn takes_replicas(&self) -> bool {
        self.spec.role == Role::ExpertNode
            && !self.cordoned
            && matches!(self.state, NodeState::Joining | NodeState::Active)
    }
}
