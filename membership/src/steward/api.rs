//! What goes in and out of the steward.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use entente_proto::ids::{Incarnation, NodeId, Region};
use entente_proto::placement::{ExpertKey, Placement};
use entente_router::moves::Stuck;
use entente_router::placement::PlacementRefused;

use crate::state::{self, Expect, Outcome, State};

/// How patient the steward is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// A node that has not reported for so long is down.
    pub down_after_ms: u64,
    /// What a node held that is down is restored elsewhere after so long, or at once where an
    /// expert has no other replica.
    pub restore_after_ms: u64,
    /// Experts that a node loads at once on the steward's order.
    pub loads_per_node_max: usize,
}

impl Default for Settings {
    fn default() -> Self {
        Self { down_after_ms: 1_000, restore_after_ms: 10_000, loads_per_node_max: 4 }
    }
}

/// What a node says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// The node.
    pub node: NodeId,
    /// Its start.
    pub incarnation: Incarnation,
    /// Rises with each report of this start, over all its streams. A report that is not newer than
    /// the last one is dropped.
    pub sequence: u64,
    /// What is loaded and serves; absent when it is as in the last report. It must not name what
    /// the node is about to release on orders that it has already accepted.
    pub held: Option<BTreeSet<ExpertKey>>,
    /// What could not be loaded since the last report.
    pub failed: Vec<ExpertKey>,
    /// The node wants to stop.
    pub leaving: bool,
    /// Rows computed for each expert since the last report.
    pub rows: Vec<(ExpertKey, u64)>,
}

/// What a node is told.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Orders {
    /// What it is to hold. It loads what is missing, and releases what is more, unless the latest
    /// committed placement that it has seen names it for that.
    pub wanted: BTreeSet<ExpertKey>,
    /// Nothing is placed on it and nothing is wanted of it: it may stop.
    pub dismissed: bool,
}

/// What happens to the steward.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// This process leads from here on, and has applied what earlier leaders committed.
    Leads,
    /// It leads no more.
    Follows,
    /// The committed state. An older one than the last is dropped.
    Committed(Arc<State>),
    /// A node reports. Before [`Event::Leads`] reports are dropped, so nodes must report anew.
    Report(Report),
    /// Time has passed. Ten ticks a second are plenty.
    Tick,
    /// What became of a proposal.
    Answered {
        /// Which one.
        id: u64,
        /// Absent when it is not known.
        outcome: Option<Outcome>,
    },
}

/// What the steward wants done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Propose this here, as long as this process leads; then [`Event::Answered`], once.
    Propose {
        /// Names it in the answer.
        id: u64,
        /// The fence.
        expect: Expect,
        /// The change.
        command: state::Command,
    },
}

/// A node as the leader sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NodeHealth {
    /// Milliseconds since its last report to this leader; absent when there was none.
    pub heartbeat_age_ms: Option<u64>,
    /// Experts that the committed placement names for it.
    pub placed: usize,
    /// Experts that it reported to hold.
    pub held: usize,
    /// Experts that it is to hold.
    pub wanted: usize,
}

/// How far the regions are from what was planned for them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Progress {
    /// Each region that serves.
    pub regions: BTreeMap<Region, RegionProgress>,
}

/// How far one region is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegionProgress {
    /// What goes on.
    pub activity: Activity,
    /// Fewer replicas than wanted, or not even one of each: why.
    pub degraded: Option<PlacementRefused>,
}

/// What goes on in a region.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Activity {
    /// All is as planned.
    Idle,
    /// Nodes that should be up have not reported to this leader yet.
    Waiting,
    /// Experts are on their way.
    Moving {
        /// Replicas that are not ready yet.
        left: usize,
    },
    /// Nothing can be done until something changes.
    Stuck(Stuck),
}

impl Progress {
    /// Replicas that are not ready yet.
    pub fn replicas_left(&self) -> usize {
        let left = |region: &RegionProgress| match &region.activity {
            Activity::Moving { left } => *left,
            Activity::Stuck(stuck) => stuck.left(),
            Activity::Idle | Activity::Waiting => 0,
        };
        self.regions.values().map(left).sum()
    }

    /// Whether all is as planned.
    pub fn is_idle(&self) -> bool {
        self.regions.values().all(|region| region.activity == Activity::Idle)
    }
}

/// A line a region that is not idle, or is degraded; empty when all is well.
impl fmt::Display for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = Vec::new();
        for (region, progress) in &self.regions {
            match &progress.activity {
                Activity::Idle => {}
                Activity::Waiting => parts.push(format!("region {region}: waiting for reports")),
                Activity::Moving { left } => {
                    parts.push(format!("region {region}: {left} replicas left to load"));
                }
                Activity::Stuck(stuck) => parts.push(format!("region {region}: {stuck}")),
            }
            if let Some(refused) = &progress.degraded {
                parts.push(format!("degraded: {refused}"));
            }
        }
        f.write_str(&parts.join("\n"))
    }
}

/// A placement that the planner would choose.
#[derive(Debug, Clone, PartialEq)]
pub struct Proposal {
    /// It.
    pub placement: Placement,
    /// The arithmetic, a line each.
    pub lines: Vec<String>,
    /// Replicas to load.
    pub loads: usize,
    /// Replicas to release.
    pub releases: usize,
}

/// What an operator wants moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rebalance {
    /// To what [`Steward::plan`](super::Steward::plan) gives.
    ToPlan,
    /// One more replica.
    Replica {
        /// Of this expert.
        expert: ExpertKey,
        /// There.
        node: NodeId,
    },
}

/// Why there is no plan.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// This process does not lead.
    #[error("this process does not lead")]
    NotLeading,
    /// No coordinator has said yet what is served.
    #[error("the cluster has not agreed on a model yet")]
    NoModel,
    /// The planner would guess.
    #[error("region {0}: not all nodes have reported to this leader yet")]
    Waiting(Region),
    /// It does not fit.
    #[error(transparent)]
    Refused(#[from] PlacementRefused),
    /// The replica cannot be put there.
    #[error("node {node} cannot take the replica: {reason}")]
    Node {
        /// The node.
        node: NodeId,
        /// Why.
        reason: &'static str,
    },
}

/// Why a node may not stop.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unsafe {
    /// This process does not lead.
    #[error("this process does not lead")]
    NotLeading,
    /// There is no such expert node.
    #[error("node {0} is not an expert node of this cluster")]
    NoExpertNode(NodeId),
    /// Nobody knows what is there.
    #[error("region {0}: not all nodes have reported to this leader yet")]
    Waiting(Region),
    /// Its life does not go that way.
    #[error("node {node} is {state:?}; only a node that is active can be drained")]
    NotActive {
        /// The node.
        node: NodeId,
        /// What it is.
        state: state::NodeState,
    },
    /// Experts would have no replica in their region.
    #[error("region {region}: {experts} experts would be without a replica there{}", why(.refused))]
    Lost {
        /// The region.
        region: Region,
        /// How many.
        experts: usize,
        /// Why the other nodes cannot take them, where they were asked to.
        refused: Option<PlacementRefused>,
    },
}

fn why(refused: &Option<PlacementRefused>) -> String {
    refused.as_ref().map_or_else(String::new, |refused| format!("; {refused}"))
}
