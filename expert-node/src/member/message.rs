//! Between the session's words and the wire's.

use std::collections::BTreeSet;

use entente_membership::service::{pack_experts, unpack_experts};
use entente_membership::state::{Node, NodeState, Role, State};
use entente_proto::ids::{NodeId, NodeName, PlacementEpoch};
use entente_proto::placement::ExpertKey;
use entente_proto::wire;

use super::restore::Peer;
use super::session::{Committed, Orders, Report};
use crate::limits::PEERS_MAX;

/// Orders that make no sense.
#[derive(Debug, thiserror::Error)]
#[error("the orders' experts, {0} bytes, are no ascending list of pairs")]
pub(super) struct Malformed(usize);

pub(super) fn report(report: &Report, rows: &[(ExpertKey, u64)]) -> wire::HeartbeatReport {
    let failure = |((layer, expert), reason): (&ExpertKey, &String)| wire::LoadFailure {
        layer: layer.0.into(),
        expert: expert.0.into(),
        reason: reason.clone(),
    };
    let rows_of = |((layer, expert), rows): &(ExpertKey, u64)| wire::ExpertRows {
        layer: layer.0.into(),
        expert: expert.0.into(),
        rows: *rows,
    };
    wire::HeartbeatReport {
        node: report.node.0,
        incarnation: report.incarnation.0,
        sequence: report.sequence,
        held: report.held.as_ref().map(pack_experts),
        failed: report.failed.iter().map(failure).collect(),
        leaving: report.leaving,
        rows: rows.iter().map(rows_of).collect(),
    }
}

pub(super) fn orders(orders: wire::HeartbeatOrders) -> Result<Orders, Malformed> {
    let unpack = |bytes: bytes::Bytes| unpack_experts(&bytes).ok_or(Malformed(bytes.len()));
    Ok(Orders {
        sequence: orders.sequence,
        placement_epoch: PlacementEpoch(orders.placement_epoch),
        wanted: orders.wanted.map(unpack).transpose()?,
        dismissed: orders.dismissed,
    })
}

/// Nodes of the same region that may have an expert: first those on which the placement has it, then
/// those that may have it in their model folder. Absent if the state does not know the node itself.
pub(super) fn peers(state: &State, name: &NodeName, expert: ExpertKey) -> Option<Vec<Peer>> {
    let own = state.node(name)?;
    let serves = |node: &&Node| {
        node.spec.role == Role::ExpertNode
            && node.spec.region == own.spec.region
            && node.id != own.id
            && matches!(node.state, NodeState::Active | NodeState::Draining)
    };
    let holders: BTreeSet<NodeId> = state.placement().replicas(expert).collect();
    let (first, then): (Vec<&Node>, Vec<&Node>) =
        state.nodes().filter(serves).partition(|node| holders.contains(&node.id));
    let peer =
        |node: &&Node| Peer { name: node.spec.name.clone(), address: node.spec.address.clone() };
    Some(first.iter().chain(&then).take(PEERS_MAX).map(peer).collect())
}

/// What a state says about the node of this name.
pub(super) fn committed(state: &State, name: &NodeName) -> Committed {
    let node = state.node(name);
    Committed {
        placement_epoch: state.placement_epoch(),
        placed: node.map(|node| state.placement().experts_of(node.id)).unwrap_or_default(),
        active: node
            .filter(|node| node.state == NodeState::Active)
            .and_then(|node| node.incarnation),
    }
}
