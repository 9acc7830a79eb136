//! Which node holds which expert: a pure function of the nodes, the model, the replicas wanted and
//! the load measured, so that every process that is given the same cluster computes the same plan.
//!
//! The order of what is granted:
//! 1. one **complete** set of experts in each serving region: a request must never depend on
//!    another country;
//! 2. `replicas` copies of each in each serving region, on as many different nodes, at different
//!    sites where there are some: one node, or one site, may be lost;
//! 3. redundant copies of the experts that are hot, as far as memory goes ([`eplb`]).
//!
//! Within a region the load of every layer is spread evenly over the nodes, because a layer's
//! exchange takes as long as its busiest node. What is there stays there unless moving it pays.
//! What does not fit is refused with the arithmetic, and so is what would cross a border on the
//! normal path: one crossing is one round trip for each layer of each token.
//!
//! It decides what should be, not how to get there; [`crate::moves`] does.

pub mod eplb;
mod region;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use entente_proto::ids::{LayerId, NodeId, Region, RegionSet};
use entente_proto::placement::ExpertKey;
pub use entente_proto::placement::{ModelShape, Placement, PlacementNode};

/// How often each expert was chosen, in rows. What is absent counts as never.
pub type Loads = BTreeMap<ExpertKey, u64>;

/// What may be done with a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostState {
    /// It may be given experts.
    Usable,
    /// It keeps what it holds and is given nothing new.
    Cordoned,
    /// It is to be empty: nothing that it holds counts.
    Draining,
}

/// An expert node as the planner sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host {
    /// The node.
    pub id: NodeId,
    /// The country that it stands in.
    pub region: Region,
    /// The data centre within the region; absent where nobody said.
    pub site: Option<String>,
    /// Bytes that expert weights may take there; not limited when absent.
    pub memory_bytes: Option<u64>,
    /// What may be done with it.
    pub state: HostState,
    /// The experts that it holds now.
    pub held: BTreeSet<ExpertKey>,
}

impl From<&PlacementNode> for Host {
    fn from(node: &PlacementNode) -> Self {
        Self {
            id: node.id,
            region: node.region,
            site: None,
            memory_bytes: node.memory_bytes,
            state: HostState::Usable,
            held: BTreeSet::new(),
        }
    }
}

/// Round-trip times between regions, in microseconds. A pair is measured in either direction.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RoundTrips(BTreeMap<(Region, Region), u64>);

impl RoundTrips {
    /// Takes note of a measured round trip.
    pub fn set(&mut self, a: Region, b: Region, rtt_us: u64) {
        self.0.insert((a.min(b), a.max(b)), rtt_us);
    }

    /// The round trip between two regions, if it was measured.
    pub fn get(&self, a: Region, b: Region) -> Option<u64> {
        self.0.get(&(a.min(b), a.max(b))).copied()
    }
}

/// Everything that a plan depends on.
#[derive(Debug, Clone)]
pub struct Planner<'a> {
    /// The expert nodes that are up, in any order.
    pub hosts: &'a [Host],
    /// The model.
    pub shape: &'a ModelShape,
    /// The regions that have coordinators: each gets a complete set. Others get nothing.
    pub serving: &'a RegionSet,
    /// Copies of each expert in each serving region.
    pub replicas: u16,
    /// Further copies, of hot experts, in each layer of each serving region at most. They take
    /// only memory that is left, and none while no load is measured.
    pub redundant_per_layer: u16,
    /// The load of the last while; without it all experts count as equally hot.
    pub loads: Option<&'a Loads>,
    /// Round trips between regions.
    pub round_trips: &'a RoundTrips,
}

/// A placement with the figures that speak for it.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// Which node should hold which expert.
    pub placement: Placement,
    /// What each serving region looks like.
    pub regions: BTreeMap<Region, RegionPlan>,
}

/// One region of a plan.
#[derive(Debug, Clone, PartialEq)]
pub struct RegionPlan {
    /// Bytes of all copies together.
    pub bytes_needed: u128,
    /// Bytes that the nodes have room for, no node holding an expert twice.
    pub bytes_there: u128,
    /// Copies beyond the replicas that were asked for.
    pub redundant: u64,
    /// Replicas that share a site with another of their expert, where no further copy makes up for
    /// it by standing at a site of its own. A node whose site nobody said counts as one.
    pub site_conflicts: u64,
    /// Load of the busiest node over the average, by layer.
    pub max_over_mean: BTreeMap<LayerId, f64>,
}

/// What serving a region from another would cost at best.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Crossing {
    /// The nearest region that could hold what is missing.
    pub to: Region,
    /// Layers that cannot be complete at home: each costs a round trip for every token.
    pub crossings_per_token: u64,
    /// The measured round trip.
    pub rtt_us: Option<u64>,
}

impl Crossing {
    /// Microseconds that the crossings alone add to every token.
    pub fn predicted_us(&self) -> Option<u64> {
        Some(self.crossings_per_token.saturating_mul(self.rtt_us?))
    }
}

impl fmt::Display for Crossing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { to, crossings_per_token: count, rtt_us } = self;
        write!(f, "serving it from {to} would cross the border {count} times per token")?;
        let ms = |us: u64| us as f64 / 1e3;
        match rtt_us.zip(self.predicted_us()) {
            Some((rtt, all)) => write!(f, ": {count} x {} ms = {} ms per token", ms(rtt), ms(all)),
            None => write!(f, "; the round trip is not measured"),
        }
    }
}

/// Why experts cannot be placed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlacementRefused {
    /// No copies were asked for.
    #[error("replicas is 0; each expert needs at least 1 replica")]
    NoReplicas,
    /// Replicas of one expert would have to share a node.
    #[error(
        "region {region}: {replicas} replicas need {replicas} nodes, it has {nodes}{}",
        and(.crossing)
    )]
    TooFewNodes {
        /// The region.
        region: Region,
        /// Replicas wanted of each expert.
        replicas: u16,
        /// Expert nodes of the region that may be used.
        nodes: usize,
        /// What doing without would cost, where not even one set is complete.
        crossing: Option<Crossing>,
    },
    /// The nodes of a region are too small.
    #[error(
        "region {region}: {replicas} x {experts} experts of {expert_bytes} bytes need {} bytes; \
         its {nodes} nodes have room for {room} experts ({} bytes){}",
        bytes(u64::from(*.replicas) * .experts, *.expert_bytes),
        bytes(*.room, *.expert_bytes),
        and(.crossing)
    )]
    TooLittleMemory {
        /// The region.
        region: Region,
        /// Replicas wanted of each expert.
        replicas: u16,
        /// Experts of the model.
        experts: u64,
        /// Bytes of one expert.
        expert_bytes: u64,
        /// Expert nodes of the region that may be used.
        nodes: usize,
        /// Replicas that fit into them, no node holding an expert twice.
        room: u64,
        /// What doing without would cost, where not even one set is complete.
        crossing: Option<Crossing>,
    },
}

fn bytes(experts: u64, expert_bytes: u64) -> u128 {
    u128::from(experts) * u128::from(expert_bytes)
}

fn and(crossing: &Option<Crossing>) -> String {
    crossing.map_or_else(String::new, |crossing| format!("; {crossing}"))
}

/// Places `replicas` copies of every expert in every region that has nodes: the first placement of
/// a cluster, where nothing is held and nothing measured.
pub fn plan(
    nodes: &[PlacementNode],
    shape: &ModelShape,
    replicas: u16,
) -> Result<Placement, PlacementRefused> {
    let hosts: Vec<Host> = nodes.iter().map(Host::from).collect();
    let planner = Planner {
        hosts: &hosts,
        shape,
        serving: &hosts.iter().map(|host| host.region).collect(),
        replicas,
        redundant_per_layer: 0,
        loads: None,
        round_trips: &RoundTrips::default(),
    };
    planner.plan().map(|plan| plan.placement)
}

impl<'a> Planner<'a> {
    /// Plans every serving region. Deterministic; the order of the hosts does not matter.
    pub fn plan(&self) -> Result<Plan, PlacementRefused> {
        if self.replicas == 0 {
            return Err(PlacementRefused::NoReplicas);
        }
        let mut plan = Plan { placement: Placement::new(), regions: BTreeMap::new() };
        for region in self.serving {
            let packed = region::pack(self, *region).ok_or_else(|| self.refusal(*region))?;
            for (expert, node) in packed.copies() {
                plan.placement.add(expert, node);
            }
            let there = bytes(self.room(*region), self.shape.expert_bytes);
            plan.regions.insert(*region, packed.figures(there));
        }
        Ok(plan)
    }

    /// The hosts of a region whose copies count, in ascending order.
    fn hosts_of(&self, region: Region) -> Vec<&'a Host> {
        let counts = |host: &&Host| host.region == region && host.state != HostState::Draining;
        let mut hosts: Vec<&'a Host> = self.hosts.iter().filter(counts).collect();
        hosts.sort_unstable_by_key(|host| host.id);
        hosts
    }

    /// Different experts that fit on a host: those it may have, bounded by its memory.
    fn room_of(&self, host: &Host) -> u64 {
        let experts = match host.state {
            HostState::Usable => self.shape.expert_count(),
            HostState::Cordoned => host.held.len() as u64,
            HostState::Draining => 0,
        };
        let fits = host.memory_bytes.map(|bytes| bytes / self.shape.expert_bytes.max(1));
        fits.unwrap_or(experts).min(experts)
    }

    fn room(&self, region: Region) -> u64 {
        self.hosts_of(region).into_iter().map(|host| self.room_of(host)).sum()
    }

    /// The arithmetic of why a region could not be packed.
    fn refusal(&self, region: Region) -> PlacementRefused {
        let (replicas, experts) = (self.replicas, self.shape.expert_count());
        let expert_bytes = self.shape.expert_bytes;
        let (nodes, room) = (self.hosts_of(region).len(), self.room(region));
        let crossing = self.crossing(region);
        if room >= u64::from(replicas) * experts || nodes < usize::from(replicas) {
            // Memory would do, were it on other nodes: some expert finds too few that may hold it.
            let usable = |host: &&Host| host.state == HostState::Usable;
            let nodes = self.hosts_of(region).iter().copied().filter(usable).count();
            return PlacementRefused::TooFewNodes { region, replicas, nodes, crossing };
        }
        PlacementRefused::TooLittleMemory {
            region,
            replicas,
            experts,
            expert_bytes,
            nodes,
            room,
            crossing,
        }
    }

    /// What it would cost to serve the region from elsewhere; absent when it can hold one complete
    /// set, or nobody else can.
    fn crossing(&self, region: Region) -> Option<Crossing> {
        let mut room = self.room(region);
        let mut layers: Vec<u64> = self.shape.layers.iter().map(|(_, n)| u64::from(*n)).collect();
        // The small layers first: that leaves the fewest incomplete.
        layers.sort_unstable();
        let mut crossings_per_token = 0;
        for experts in layers {
            match room.checked_sub(experts) {
                Some(left) => room = left,
                None => crossings_per_token += 1,
            }
        }
        let experts = self.shape.expert_count();
        let able = |other: &Region| *other != region && self.room(*other) >= experts;
        let others: BTreeSet<Region> = self.hosts.iter().map(|host| host.region).collect();
        let distance = |other: &Region| {
            let rtt_us = self.round_trips.get(region, *other);
            (rtt_us.is_none(), rtt_us, *other)
        };
        let to = others.into_iter().filter(able).min_by_key(distance)?;
        let rtt_us = self.round_trips.get(region, to);
        (crossings_per_token > 0).then_some(Crossing { to, crossings_per_token, rtt_us })
    }
}
