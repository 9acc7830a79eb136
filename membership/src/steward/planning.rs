//! What each region should hold.
//!
//! A region is thought about when something changed that a plan depends on ([`Inputs`]). What it is
//! heading for already stays if it still gives every expert its replicas; so does what is committed;
//! only then is it planned anew. Where the wanted replicas cannot be had, it is planned with fewer.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use entente_proto::ids::{Incarnation, NodeId, Region};
use entente_proto::placement::{ExpertKey, Placement};
use entente_router::placement::{Host, HostState, PlacementRefused, Plan, Planner, RoundTrips};

use super::Leading;
use super::views::Standing;
use crate::served::ServedModel;
use crate::state::{Node, NodeState};

/// Redundant copies of hot experts that a rebalance may place in a layer: one for so many experts,
/// as DeepSeek-V3 is deployed (arXiv 2412.19437, section 3.4.1: 32 for 256).
const EXPERTS_PER_REDUNDANT: u16 = 8;

/// All that the plan of a region depends on, but for loads and for what is held.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Inputs {
    pub model: Arc<ServedModel>,
    pub replicas: u16,
    pub members: BTreeMap<NodeId, Member>,
}

/// A node as far as a plan depends on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Member {
    pub standing: Standing,
    /// Whether coordinators use it.
    pub serves: bool,
    pub incarnation: Option<Incarnation>,
    pub memory_bytes: Option<u64>,
    site: String,
}

impl Member {
    /// Experts that fit on it; not limited when absent.
    pub fn room(&self, expert_bytes: u64) -> Option<usize> {
        let room = self.memory_bytes? / expert_bytes.max(1);
        Some(usize::try_from(room).unwrap_or(usize::MAX))
    }
}

impl Leading {
    /// The inputs of a region's plan; none before a model is agreed on.
    pub(super) fn inputs(&self, region: Region, now_ms: u64) -> Option<Inputs> {
        let member = |node: &Node| Member {
            standing: self.standing(node, now_ms),
            serves: node.incarnation.is_some()
                && matches!(node.state, NodeState::Active | NodeState::Draining),
            incarnation: node.incarnation,
            memory_bytes: node.spec.memory_bytes,
            site: node.spec.site.clone(),
        };
        let mut members: BTreeMap<NodeId, Member> =
            self.nodes_in(region).map(|node| (node.id, member(node))).collect();
        self.lose_patience(&mut members);
        let replicas = self.state.replicas().get(&region).copied().unwrap_or(1).max(1);
        Some(Inputs { model: Arc::clone(self.model.as_ref()?), replicas, members })
    }

    /// Where an expert has no other replica, nodes that went down under this leader are not waited
    /// for. Those that it has never seen may just be starting, together with the cluster.
    fn lose_patience(&self, members: &mut BTreeMap<NodeId, Member>) {
        let is_down = |id: NodeId| {
            self.state.node_by_id(id).is_some_and(|node| node.state == NodeState::Down)
        };
        let down: BTreeSet<NodeId> = members.keys().copied().filter(|id| is_down(*id)).collect();
        let needed = |id: &NodeId| !self.placed(*id).is_empty();
        if !down.iter().any(needed) {
            return;
        }
        let is_lost = |nodes: &BTreeSet<NodeId>| {
            let mut here = nodes.iter().filter(|id| members.contains_key(id)).peekable();
            here.peek().is_some() && here.all(|id| down.contains(id))
        };
        if !self.state.placement().iter().any(|(_, nodes)| is_lost(nodes)) {
            return;
        }
        for (id, member) in members.iter_mut().filter(|(id, _)| down.contains(id)) {
            if self.views.get(id).is_some_and(|view| view.seen) {
                member.standing = Standing::Gone;
            }
        }
    }

    /// What the committed placement names in a region.
    pub(super) fn committed_in(&self, region: Region) -> Placement {
        let is_here =
            |id: &NodeId| self.state.node_by_id(*id).is_some_and(|node| node.spec.region == region);
        let mut committed = Placement::new();
        for (expert, nodes) in self.state.placement().iter() {
            for node in nodes.iter().filter(|id| is_here(id)) {
                committed.add(expert, *node);
            }
        }
        committed
    }

    /// What a region should hold, and why that is less than wanted, if it is. `heading` is what it
    /// was to hold until now; none if that must not count any more.
    pub(super) fn choose(
        &self,
        region: Region,
        inputs: &Inputs,
        heading: Option<&Placement>,
        keep_committed: bool,
    ) -> (Placement, Option<PlacementRefused>) {
        let committed = self.committed_in(region);
        let kept = keep_committed.then_some(&committed);
        let mut candidates = heading.into_iter().chain(kept);
        if let Some(target) = candidates.find(|target| self.suffices(target, inputs, &committed)) {
            return (target.clone(), None);
        }
        let hosts = self.hosts(inputs);
        let redundant = redundant_in(&committed, inputs);
        match self.plan_at_most(region, inputs, &hosts, inputs.replicas, redundant) {
            Ok((plan, refused)) => (plan.placement, refused),
            Err(refused) => (committed, Some(refused)),
        }
    }

    /// Whether a placement gives every expert its replicas where they count, and each node that is
    /// up something to do, and may be committed.
    fn suffices(&self, target: &Placement, inputs: &Inputs, committed: &Placement) -> bool {
        let shape = &inputs.model.shape;
        let experts: BTreeSet<ExpertKey> = shape.experts().collect();
        let may_hold = |expert: ExpertKey, id: &NodeId| {
            let Some(member) = inputs.members.get(id) else { return false };
            let is_there = committed.replicas(expert).any(|other| other == *id);
            let held = self.views.get(id).and_then(|view| view.held.as_ref());
            match member.standing {
                Standing::Sick => held.is_some_and(|held| held.contains(&expert)),
                standing if standing.takes_new() => true,
                standing => standing.counts() && is_there,
            }
        };
        let is_good = |(expert, nodes): (ExpertKey, &BTreeSet<NodeId>)| {
            experts.contains(&expert) && nodes.iter().all(|id| may_hold(expert, id))
        };
        let is_used = |(id, member): (&NodeId, &Member)| {
            let count = target.experts_of(*id).len();
            let fits = member.room(shape.expert_bytes).is_none_or(|room| count <= room);
            fits && (count > 0 || member.standing != Standing::Up)
        };
        let wanted = usize::from(inputs.replicas);
        experts.iter().all(|expert| target.replicas(*expert).count() >= wanted)
            && target.iter().all(is_good)
            && inputs.members.iter().all(is_used)
    }

    /// The nodes of a region as the planner sees them. What is on its way counts as held, so that
    /// a plan made on the way is the same.
    pub(super) fn hosts(&self, inputs: &Inputs) -> Vec<Host> {
        inputs.members.iter().filter_map(|(id, member)| self.host(*id, member)).collect()
    }

    fn host(&self, id: NodeId, member: &Member) -> Option<Host> {
        let node = self.state.node_by_id(id)?;
        let view = self.views.get(&id);
        let held = view.and_then(|view| view.held.clone()).unwrap_or_default();
        let work = self.works.get(&node.spec.region).and_then(|work| work.moves.as_ref());
        let (state, held) = match member.standing {
            Standing::Leaving | Standing::Gone | Standing::Unheard => return None,
            // Before the first placement everybody is still to come.
            _ if self.state.placement_epoch().0 == 0 => (HostState::Usable, BTreeSet::new()),
            Standing::Sick => (HostState::Cordoned, held),
            Standing::Cordoned | Standing::Absent => (HostState::Cordoned, self.placed(id).clone()),
            Standing::Up | Standing::Expected => {
                let mut share = self.placed(id).clone();
                share.extend(work.into_iter().flat_map(|moves| moves.loading(id)));
                // A node that came back may still hold what has been placed elsewhere since.
                (HostState::Usable, if share.is_empty() { held } else { share })
            }
        };
        let site = Some(member.site.clone()).filter(|site| !site.is_empty());
        let region = node.spec.region;
        Some(Host { id, region, site, memory_bytes: member.memory_bytes, state, held })
    }

    /// The plan with the most replicas up to a bound that can be had; with it, why there are no
    /// more.
    pub(super) fn plan_at_most(
        &self,
        region: Region,
        inputs: &Inputs,
        hosts: &[Host],
        replicas_max: u16,
        redundant_per_layer: u16,
    ) -> Result<(Plan, Option<PlacementRefused>), PlacementRefused> {
        let mut refused = None;
        for replicas in (1..=replicas_max).rev() {
            match self.plan_with(region, inputs, hosts, replicas, redundant_per_layer) {
                Ok(plan) => return Ok((plan, refused)),
                Err(error) => refused = refused.or(Some(error)),
            }
        }
        Err(refused.unwrap_or(PlacementRefused::NoReplicas))
    }

    pub(super) fn plan_with(
        &self,
        region: Region,
        inputs: &Inputs,
        hosts: &[Host],
        replicas: u16,
        redundant_per_layer: u16,
    ) -> Result<Plan, PlacementRefused> {
        let shape = &inputs.model.shape;
        let planner = Planner {
            hosts,
            shape,
            serving: &[region].into(),
            replicas,
            redundant_per_layer,
            loads: self.measured.loads(region, shape),
            round_trips: &RoundTrips::default(),
        };
        planner.plan()
    }
}

/// Redundant copies in a layer of a rebalanced placement.
pub(super) fn redundant_for(inputs: &Inputs) -> u16 {
    let experts = inputs.model.shape.layers.iter().map(|(_, experts)| *experts).max();
    experts.unwrap_or_default().div_ceil(EXPERTS_PER_REDUNDANT)
}

/// The most copies that a layer has beyond what all of its experts have: what a rebalance placed
/// there is to survive the plans after it.
fn redundant_in(committed: &Placement, inputs: &Inputs) -> u16 {
    let redundant = |(layer, experts): &(_, u16)| {
        let count =
            |expert| committed.replicas((*layer, entente_proto::ids::ExpertId(expert))).count();
        let least = (0..*experts).map(count).min().unwrap_or_default();
        (0..*experts).map(|expert| count(expert) - least).sum::<usize>()
    };
    let most = inputs.model.shape.layers.iter().map(redundant).max().unwrap_or_default();
    u16::try_from(most).unwrap_or(u16::MAX).min(redundant_for(inputs))
}
