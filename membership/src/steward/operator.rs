//! What an operator may ask and order: a dry run of the plan, a rebalance, whether nodes may stop,
//! and to empty one.

use std::collections::BTreeSet;

use entente_proto::ids::{NodeId, Region};
use entente_proto::placement::{ExpertKey, Placement};
use entente_router::moves::lost_without;
use entente_router::placement::{Host, Plan};

use super::planning::{Inputs, redundant_for};
use super::views::Standing;
use super::{Command, Leading, PlanError, Proposal, Rebalance, Steward, Unsafe};
use crate::state::{NodeState, Role};

impl Steward {
    /// What the planner would choose now, with `replicas` in each region or what each wants.
    /// Changes nothing.
    ///
    /// # Errors
    /// When a region cannot have so many, with the arithmetic.
    pub fn plan(&self, replicas: Option<u16>) -> Result<Proposal, PlanError> {
        let leading = self.leading.as_ref().ok_or(PlanError::NotLeading)?;
        Ok(leading.plan(replicas)?.0)
    }

    /// Starts moving, with the next event.
    pub fn rebalance(&mut self, what: Rebalance) -> Result<Proposal, PlanError> {
        let leading = self.leading.as_mut().ok_or(PlanError::NotLeading)?;
        let (proposal, targets) = match what {
            Rebalance::ToPlan => leading.plan(None)?,
            Rebalance::Replica { expert, node } => leading.one_more(expert, node)?,
        };
        for (region, target) in targets {
            if let Some(work) = leading.works.get_mut(&region) {
                work.target = target;
                work.is_ordered = true;
                work.restart_at_ms = Some(0);
            }
        }
        Ok(proposal)
    }

    /// Whether these nodes may stop now, all of them at once.
    ///
    /// # Errors
    /// When an expert that has a replica in its region would have none.
    pub fn ok_to_stop(&self, nodes: &BTreeSet<NodeId>) -> Result<(), Unsafe> {
        let leading = self.leading.as_ref().ok_or(Unsafe::NotLeading)?;
        nodes.iter().try_for_each(|id| leading.expert_node(*id).map(|_| ()))?;
        match leading.lost(nodes)?.first() {
            None => Ok(()),
            Some((region, experts)) => {
                Err(Unsafe::Lost { region: *region, experts: *experts, refused: None })
            }
        }
    }

    /// Starts to empty a node: it is draining from here on, and [`Steward::progress`] tells how far
    /// it is. One that is draining already is left so.
    ///
    /// # Errors
    /// When an expert would be left without a replica in the node's region, and no other node there
    /// can take it.
    pub fn drain(&mut self, node: NodeId) -> Result<Vec<Command>, Unsafe> {
        let leading = self.leading.as_mut().ok_or(Unsafe::NotLeading)?;
        let (region, state) = leading.expert_node(node)?;
        match state {
            NodeState::Draining => return Ok(Vec::new()),
            NodeState::Active => leading.can_be_emptied(region, node)?,
            state => return Err(Unsafe::NotActive { node, state }),
        }
        let commands = vec![leading.change_state(node, NodeState::Draining)];
        self.proposals = leading.proposals;
        Ok(commands)
    }
}

type Targets = Vec<(Region, Placement)>;

impl Leading {
    fn expert_node(&self, id: NodeId) -> Result<(Region, NodeState), Unsafe> {
        let node = self.state.node_by_id(id);
        let node = node.filter(|node| node.spec.role == Role::ExpertNode);
        let node = node.ok_or(Unsafe::NoExpertNode(id))?;
        Ok((node.spec.region, node.state))
    }

    fn plan(&self, replicas: Option<u16>) -> Result<(Proposal, Targets), PlanError> {
        if self.model.is_none() {
            return Err(PlanError::NoModel);
        }
        let (mut lines, mut targets) = (Vec::new(), Vec::new());
        for region in self.serving() {
            let work = self.works.get(&region).filter(|_| !self.waiting.contains(&region));
            let inputs = &work.ok_or(PlanError::Waiting(region))?.inputs;
            let hosts = self.hosts(inputs);
            let (count, redundant) = (replicas.unwrap_or(inputs.replicas), redundant_for(inputs));
            let plan = self.plan_with(region, inputs, &hosts, count, redundant)?;
            let (loads, releases) = changes(&self.committed_in(region), &plan.placement);
            lines.push(self.line(region, inputs, &hosts, &plan, count));
            lines.push(format!("region {region}: {loads} replicas to load, {releases} to release"));
            targets.push((region, plan.placement));
        }
        Ok((self.proposal(&targets, lines), targets))
    }

    /// The arithmetic of a region's plan.
    fn line(
        &self,
        region: Region,
        inputs: &Inputs,
        hosts: &[Host],
        plan: &Plan,
        replicas: u16,
    ) -> String {
        let shape = &inputs.model.shape;
        let (experts, expert_bytes) = (shape.expert_count(), shape.expert_bytes);
        let measured = match self.measured.loads(region, shape) {
            Some(loads) => format!("by the load of {} rows", loads.values().sum::<u64>()),
            None => "all experts taken for equally hot".to_owned(),
        };
        let figures = plan.regions.get(&region);
        let (needed, there) = figures.map_or((0, 0), |f| (f.bytes_needed, f.bytes_there));
        let redundant = figures.map_or(0, |f| f.redundant);
        let conflicts = figures.map_or(0, |f| f.site_conflicts);
        let balance = figures.into_iter().flat_map(|f| f.max_over_mean.values());
        let busiest = balance.copied().fold(1.0, f64::max);
        format!(
            "region {region}: {replicas} x {experts} experts of {expert_bytes} bytes and \
             {redundant} more of hot ones need {needed} bytes, {} nodes have room for {there}; the \
             busiest node of the worst layer has {busiest:.2} x the mean, {measured}; {conflicts} \
             replicas share a site",
            hosts.len()
        )
    }

    /// What there is to do, with the regions that are not among `targets` as they are.
    fn proposal(&self, targets: &Targets, lines: Vec<String>) -> Proposal {
        let committed = self.state.placement();
        let mut placement = Placement::new();
        let is_planned = |id: &NodeId| {
            let region = self.state.node_by_id(*id).map(|node| node.spec.region);
            targets.iter().any(|(other, _)| Some(*other) == region)
        };
        for (expert, nodes) in committed.iter() {
            for node in nodes.iter().filter(|id| !is_planned(id)) {
                placement.add(expert, *node);
            }
        }
        for (expert, nodes) in targets.iter().flat_map(|(_, target)| target.iter()) {
            nodes.iter().for_each(|node| {
                placement.add(expert, *node);
            });
        }
        let (loads, releases) = changes(committed, &placement);
        Proposal { placement, lines, loads, releases }
    }

    /// One more replica of an expert.
    fn one_more(&self, expert: ExpertKey, id: NodeId) -> Result<(Proposal, Targets), PlanError> {
        let refuse = |reason| PlanError::Node { node: id, reason };
        let model = self.model.as_ref().ok_or(PlanError::NoModel)?;
        let (region, _) = self.expert_node(id).map_err(|_| refuse("it is no expert node"))?;
        let work = self.works.get(&region).filter(|_| !self.waiting.contains(&region));
        let work = work.ok_or(PlanError::Waiting(region))?;
        let member = work.inputs.members.get(&id).ok_or_else(|| refuse("it is not known yet"))?;
        if member.standing != Standing::Up {
            return Err(refuse("it is not up, or is given no replicas now"));
        }
        if !model.shape.experts().any(|other| other == expert) {
            return Err(refuse("the model has no such expert"));
        }
        let mut target = work.target.clone();
        let room = member.room(model.shape.expert_bytes);
        if room.is_some_and(|room| target.experts_of(id).len() >= room) {
            return Err(refuse("its memory is full"));
        }
        if !target.add(expert, id) {
            return Err(refuse("it has that expert already"));
        }
        let targets = vec![(region, target)];
        Ok((self.proposal(&targets, Vec::new()), targets))
    }

    /// Experts that would be without a replica if these nodes stopped, counted by region.
    fn lost(&self, nodes: &BTreeSet<NodeId>) -> Result<Vec<(Region, usize)>, Unsafe> {
        let here = |id: &NodeId| self.state.node_by_id(*id).map(|node| node.spec.region);
        let regions: BTreeSet<Region> = nodes.iter().filter_map(here).collect();
        let serving = self.serving();
        let mut lost = Vec::new();
        for region in regions.intersection(&serving) {
            let work = self.works.get(region).filter(|_| !self.waiting.contains(region));
            let work = work.ok_or(Unsafe::Waiting(*region))?;
            let there = self.move_nodes(&work.inputs, None);
            let count = lost_without(nodes, &there, &self.committed_in(*region)).len();
            lost.extend((count > 0).then_some((*region, count)));
        }
        Ok(lost)
    }

    /// Whether the other nodes that are up can take what a node holds.
    fn can_be_emptied(&self, region: Region, node: NodeId) -> Result<(), Unsafe> {
        let Some((_, experts)) = self.lost(&[node].into())?.first().copied() else {
            return Ok(());
        };
        let Some(work) = self.works.get(&region) else { return Err(Unsafe::Waiting(region)) };
        let mut inputs = work.inputs.clone();
        inputs.members.retain(|id, member| *id != node && member.standing.is_up());
        let hosts = self.hosts(&inputs);
        match self.plan_with(region, &inputs, &hosts, 1, 0) {
            Ok(_) => Ok(()),
            Err(refused) => Err(Unsafe::Lost { region, experts, refused: Some(refused) }),
        }
    }
}

/// Replicas that are in the second placement only, and in the first only.
fn changes(from: &Placement, to: &Placement) -> (usize, usize) {
    let pairs = |placement: &Placement| -> BTreeSet<(ExpertKey, NodeId)> {
        let pairs = placement.iter().flat_map(|(e, nodes)| nodes.iter().map(move |n| (e, *n)));
        pairs.collect()
    };
    let (from, to) = (pairs(from), pairs(to));
    (to.difference(&from).count(), from.difference(&to).count())
}
