//! What operators ask.

use std::time::Duration;

use entente_proto::ids::{ExpertId, LayerId, NodeId, NodeName};
use entente_proto::wire;
use entente_proto::wire::admin_server;
use entente_proto::wire::change_group_request::Change as Wanted;
use tonic::{Request, Response, Status, async_trait};

use super::members::not_proposed;
use super::shared::{Shared, voter_spec};
use super::steward_shell::{Ask, Nodes};
use crate::guard::caller;
use crate::net::Reason;
use crate::raft::{self, Change};
use crate::state::State;
use crate::state::codec::{node_out, placement_out};
use crate::steward::{PlanError, Rebalance, Unsafe};

/// How long a change of the group, or of the leader, is waited for.
const CHANGE_MAX: Duration = Duration::from_secs(5);

pub(super) struct Admin(pub(super) Shared);

#[async_trait]
impl admin_server::Admin for Admin {
    async fn status(
        &self,
        _: Request<wire::StatusRequest>,
    ) -> Result<Response<wire::StatusReply>, Status> {
        let (state, status) = (self.0.state(), self.0.status());
        let name_of = |id| voter_spec(&state, id).map(|spec| spec.name.to_string());
        let leader = status.leader.unwrap_or_default();
        Ok(Response::new(wire::StatusReply {
            voter: status.id,
            name: self.0.own.name.to_string(),
            term: status.term,
            leader,
            leader_name: name_of(leader).unwrap_or_default(),
            commit_index: status.commit,
            applied_index: state.applied_index(),
            last_index: status.last_index,
            snapshot_index: status.snapshot,
            membership_epoch: state.membership_epoch().0,
            placement_epoch: state.placement_epoch().0,
            members: members(&state, &status),
            cosign_refused: self.0.cosigner.as_ref().map(|cosigner| cosigner.refused()),
        }))
    }

    async fn change_group(
        &self,
        request: Request<wire::ChangeGroupRequest>,
    ) -> Result<Response<wire::ChangeGroupReply>, Status> {
        let missing = || Status::invalid_argument("there is no change");
        let wanted = self.ordered("ChangeGroup", request)?.change.ok_or_else(missing)?;
        let (state, status) = (self.0.state(), self.0.status());
        let change = match wanted {
            Wanted::AddLearner(name) => Change::AddLearner(voter_to_add(&state, &name)?),
            Wanted::Promote(name) => Change::Promote(member(&state, &status, &name)?),
            Wanted::Remove(name) => Change::Remove(voter_to_remove(&state, &status, &name)?),
        };
        let (Change::AddLearner(voter) | Change::Promote(voter) | Change::Remove(voter)) = change
        else {
            return Err(Status::internal("another change than was asked for"));
        };
        // A call that is repeated because its answer got lost is answered alike.
        if in_effect(change, &status) {
            return Ok(Response::new(wire::ChangeGroupReply { voter }));
        }
        let proposed = self.0.owner.change(change).await;
        proposed.map_err(|error| not_proposed(&self.0, &error))?;
        wait_for(&self.0, |status| in_effect(change, status)).await?;
        Ok(Response::new(wire::ChangeGroupReply { voter }))
    }

    async fn transfer_leader(
        &self,
        request: Request<wire::TransferLeaderRequest>,
    ) -> Result<Response<wire::TransferLeaderReply>, Status> {
        let request = self.ordered("TransferLeader", request)?;
        let to = member(&self.0.state(), &self.0.status(), &request.to)?;
        let proposed = self.0.owner.transfer(to).await;
        proposed.map_err(|error| not_proposed(&self.0, &error))?;
        wait_for(&self.0, |status| status.leader == Some(to)).await?;
        Ok(Response::new(wire::TransferLeaderReply {}))
    }

    async fn take_snapshot(
        &self,
        request: Request<wire::TakeSnapshotRequest>,
    ) -> Result<Response<wire::TakeSnapshotReply>, Status> {
        self.ordered("TakeSnapshot", request)?;
        let busy = || Status::resource_exhausted("too much waits for the log");
        let index = self.0.owner.take_snapshot().await.ok_or_else(busy)?;
        Ok(Response::new(wire::TakeSnapshotReply { index }))
    }

    async fn nodes(
        &self,
        _: Request<wire::NodesRequest>,
    ) -> Result<Response<wire::NodesReply>, Status> {
        let nodes: Nodes = self.steward(Ask::Nodes).await?;
        let report = |node: &crate::state::Node| {
            let health = nodes.health.get(&node.id);
            let count =
                |count: Option<usize>| u32::try_from(count.unwrap_or(0)).unwrap_or(u32::MAX);
            let placed = nodes.state.placement().experts_of(node.id).len();
            wire::NodeReport {
                node: Some(node_out(node)),
                heartbeat_age_ms: health.and_then(|health| health.heartbeat_age_ms),
                placed: count(Some(placed)),
                held: count(health.map(|health| health.held)),
                wanted: count(health.map(|health| health.wanted)),
            }
        };
        Ok(Response::new(wire::NodesReply {
            nodes: nodes.state.nodes().map(report).collect(),
            progress: nodes.progress,
            replicas_left: nodes.replicas_left as u64,
        }))
    }

    async fn ok_to_stop(
        &self,
        request: Request<wire::OkToStopRequest>,
    ) -> Result<Response<wire::OkToStopReply>, Status> {
        let names = request.into_inner().names;
        let state = self.0.state();
        let nodes = names.iter().map(|name| node(&state, name)).collect::<Result<_, _>>()?;
        match self.steward(|answer| Ask::OkToStop(nodes, answer)).await? {
            Ok(()) => Ok(Response::new(wire::OkToStopReply { ok: true, reason: String::new() })),
            Err(Unsafe::NotLeading) => Err(self.0.not_leader()),
            Err(reason) => {
                let reason = reason.to_string();
                Ok(Response::new(wire::OkToStopReply { ok: false, reason }))
            }
        }
    }

    async fn drain(
        &self,
        request: Request<wire::DrainRequest>,
    ) -> Result<Response<wire::DrainReply>, Status> {
        let request = self.ordered("Drain", request)?;
        let state = self.0.state();
        let node = node(&state, &request.name)?;
        match self.steward(|answer| Ask::Drain(node, answer)).await? {
            Ok(()) => {
                let replicas = state.placement().experts_of(node).len();
                let replicas = u32::try_from(replicas).unwrap_or(u32::MAX);
                Ok(Response::new(wire::DrainReply { replicas }))
            }
            Err(Unsafe::NotLeading) => Err(self.0.not_leader()),
            Err(reason) => Err(Reason::Unsafe.status(reason.to_string())),
        }
    }

    async fn plan(
        &self,
        request: Request<wire::PlanRequest>,
    ) -> Result<Response<wire::PlanReply>, Status> {
        let replicas = request.into_inner().replicas.map(u16::try_from).transpose();
        let replicas = replicas.map_err(|_| Status::invalid_argument("so many replicas"))?;
        let planned = self.steward(|answer| Ask::Plan(replicas, answer)).await?;
        let plan = planned.map_err(|error| self.no_plan(&error))?;
        Ok(Response::new(wire::PlanReply {
            experts: placement_out(&plan.placement),
            lines: plan.lines,
            loads: u32::try_from(plan.loads).unwrap_or(u32::MAX),
            releases: u32::try_from(plan.releases).unwrap_or(u32::MAX),
        }))
    }

    async fn rebalance(
        &self,
        request: Request<wire::RebalanceRequest>,
    ) -> Result<Response<wire::RebalanceReply>, Status> {
        let request = self.ordered("Rebalance", request)?;
        let what = rebalance(&self.0.state(), &request)?;
        let planned = self.steward(|answer| Ask::Rebalance(what, answer)).await?;
        let plan = planned.map_err(|error| self.no_plan(&error))?;
        Ok(Response::new(wire::RebalanceReply {
            loads: u32::try_from(plan.loads).unwrap_or(u32::MAX),
            releases: u32::try_from(plan.releases).unwrap_or(u32::MAX),
        }))
    }
}

impl Admin {
    /// What an operator orders of the leader, and a trace of it.
    fn ordered<T: std::fmt::Debug>(&self, call: &str, request: Request<T>) -> Result<T, Status> {
        self.0.expect_leader()?;
        let caller = caller(&request)?;
        let request = request.into_inner();
        let call = format!("/entente.v1.Admin/{call}");
        self.0.guard.obey(&caller, &call, &format!("{request:?}"));
        Ok(request)
    }

    async fn steward<T>(
        &self,
        ask: impl FnOnce(tokio::sync::oneshot::Sender<T>) -> Ask,
    ) -> Result<T, Status> {
        self.0.expect_leader()?;
        self.0.steward.ask(ask).await.ok_or_else(|| self.0.not_leader())
    }

    fn no_plan(&self, error: &PlanError) -> Status {
        match error {
            PlanError::NotLeading => self.0.not_leader(),
            error => Status::failed_precondition(error.to_string()),
        }
    }
}

/// What was proposed may get lost; then it is unknown, and the operator looks.
pub(super) async fn wait_for(
    shared: &Shared,
    done: impl FnMut(&raft::Status) -> bool,
) -> Result<(), Status> {
    let mut status = shared.status.clone();
    match tokio::time::timeout(CHANGE_MAX, status.wait_for(done)).await {
        Ok(Ok(_)) => Ok(()),
        // Not the reason that makes clients repeat the call: it may not be harmless.
        _ => Err(Status::failed_precondition(
            "it was not done in time, and may still be; see Status",
        )),
    }
}

pub(super) fn in_effect(change: Change, status: &raft::Status) -> bool {
    let group = &status.group;
    match change {
        Change::AddLearner(id) => group.learners.contains(&id) || group.voters.contains(&id),
        Change::Promote(id) => group.voters.contains(&id) && group.outgoing.is_empty(),
        Change::Remove(id) => !group.contains(id),
        Change::Replace { promote, remove } => {
            group.voters.contains(&promote) && !group.contains(remove)
        }
    }
}

fn members(state: &State, status: &raft::Status) -> Vec<wire::GroupMember> {
    let group = &status.group;
    let known = state.voters().map(|(id, _)| id.0).filter(|id| group.contains(*id));
    let member = |id: u64| {
        let role = match (group.voters.contains(&id), group.outgoing.contains(&id)) {
            (true, false) if !group.outgoing.is_empty() => "joining",
            (true, _) => "voter",
            (false, true) => "leaving",
            (false, false) => "learner",
        };
        let spec = voter_spec(state, id);
        wire::GroupMember {
            voter: id,
            name: spec.map(|spec| spec.name.to_string()).unwrap_or_default(),
            region: spec.map(|spec| spec.region.to_string()).unwrap_or_default(),
            address: spec.map(|spec| spec.address.clone()).unwrap_or_default(),
            role: role.to_owned(),
            matched_index: status.matched.get(&id).copied(),
        }
    };
    known.map(member).collect()
}

fn node(state: &State, name: &str) -> Result<NodeId, Status> {
    let name: NodeName = name.parse().map_err(|error: entente_proto::ids::InvalidId| {
        Status::invalid_argument(error.to_string())
    })?;
    let node = state.node(&name).map(|node| node.id);
    node.ok_or_else(|| Status::not_found(format!("{name} is not a member of this cluster")))
}

/// The number of this node in the group.
fn member(state: &State, status: &raft::Status, name: &str) -> Result<u64, Status> {
    let node = node(state, name)?;
    let ids = state.voters().filter(|(_, voter)| voter.node == node).map(|(id, _)| id.0);
    ids.filter(|id| status.group.contains(*id))
        .last()
        .ok_or_else(|| Status::not_found(format!("{name} is not in the raft group")))
}

/// The number that the node's empty disk has got: its latest. Only the process whose disk it is asks
/// for a number, when it starts, so there is never one without a disk.
fn voter_to_add(state: &State, name: &str) -> Result<u64, Status> {
    let node = node(state, name)?;
    let own = state.voters().filter(|(_, voter)| voter.node == node && !voter.retired);
    let latest = own.last().map(|(id, _)| id.0);
    latest.ok_or_else(|| {
        Status::failed_precondition(format!(
            "{name} has no disk that could join; start it with membership.join = true"
        ))
    })
}

/// The number of this node in the group, or the one that was removed from it.
fn voter_to_remove(state: &State, status: &raft::Status, name: &str) -> Result<u64, Status> {
    member(state, status, name).or_else(|error| {
        let node = node(state, name)?;
        let own = state.voters().filter(|(_, voter)| voter.node == node && voter.retired);
        own.last().map(|(id, _)| id.0).ok_or(error)
    })
}

fn rebalance(state: &State, request: &wire::RebalanceRequest) -> Result<Rebalance, Status> {
    let wire::RebalanceRequest { layer, expert, node: name } = request;
    let (Some(layer), Some(expert), Some(name)) = (layer, expert, name) else {
        return match (layer, expert, name) {
            (None, None, None) => Ok(Rebalance::ToPlan),
            _ => Err(Status::invalid_argument("layer, expert and node: all three or none")),
        };
    };
    let number = |number: u32| {
        u16::try_from(number).map_err(|_| Status::invalid_argument("there is no such expert"))
    };
    let expert = (LayerId(number(*layer)?), ExpertId(number(*expert)?));
    Ok(Rebalance::Replica { expert, node: node(state, name)? })
}
