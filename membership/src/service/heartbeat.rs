//! The stream of one node's heartbeats: each report is told to the steward and answered with what
//! the node is to hold.

use std::collections::BTreeSet;
use std::sync::Arc;

use entente_proto::identity::Identity;
use entente_proto::ids::{ExpertId, Incarnation, LayerId, NodeId};
use entente_proto::placement::ExpertKey;
use entente_proto::wire;
use tokio::sync::mpsc;
use tonic::{Status, Streaming};

use super::shared::Shared;
use super::steward_shell::{Ask, Heard};
use crate::net::Reason;
use crate::steward::{Orders, Report};

const CALL: &str = "/entente.v1.Membership/Heartbeat";
/// Bytes of one expert in a packed list: layer and expert, u16 each.
const KEY_LEN: usize = 4;
/// Most failures, and most row counts, in one report.
const LIST_LEN_MAX: usize = 65_536;

/// Packs experts as the wire has them: (layer u16, expert u16) pairs, little-endian, ascending.
pub fn pack_experts(experts: &BTreeSet<ExpertKey>) -> bytes::Bytes {
    let pair = |(layer, expert): &ExpertKey| {
        let [a, b] = layer.0.to_le_bytes();
        let [c, d] = expert.0.to_le_bytes();
        [a, b, c, d]
    };
    experts.iter().flat_map(pair).collect::<Vec<u8>>().into()
}

/// Reads what [`pack_experts`] wrote; `None` if it is not that.
pub fn unpack_experts(bytes: &[u8]) -> Option<BTreeSet<ExpertKey>> {
    let (pairs, rest) = bytes.as_chunks::<KEY_LEN>();
    let key = |&[a, b, c, d]: &[u8; KEY_LEN]| {
        (LayerId(u16::from_le_bytes([a, b])), ExpertId(u16::from_le_bytes([c, d])))
    };
    let keys: Vec<ExpertKey> = pairs.iter().map(key).collect();
    let ascending = keys.is_sorted_by(|a, b| a < b);
    (rest.is_empty() && ascending).then(|| keys.into_iter().collect())
}

/// One stream.
pub(super) struct Heartbeat {
    shared: Shared,
    caller: Arc<Identity>,
    /// What the last answer told.
    wanted: Option<BTreeSet<ExpertKey>>,
}

impl Heartbeat {
    pub(super) fn new(shared: Shared, caller: Arc<Identity>) -> Self {
        Self { shared, caller, wanted: None }
    }

    pub(super) async fn run(
        mut self,
        reports: Streaming<wire::HeartbeatReport>,
        answers: mpsc::Sender<Result<wire::HeartbeatOrders, Status>>,
    ) {
        if let Err(status) = self.answer(reports, &answers).await {
            // The node may have gone already.
            let _ = answers.send(Err(status)).await;
        }
    }

    async fn answer(
        &mut self,
        mut reports: Streaming<wire::HeartbeatReport>,
        answers: &mpsc::Sender<Result<wire::HeartbeatOrders, Status>>,
    ) -> Result<(), Status> {
        let mut status = self.shared.status.clone();
        let shared = self.shared.clone();
        loop {
            let report = tokio::select! {
                report = reports.message() => report?,
                _ = status.wait_for(|status| !status.is_leader) => {
                    return Err(self.shared.not_leader());
                }
                () = shared.stopped() => return Err(Status::unavailable("the voter stops")),
            };
            let Some(report) = report else { return Ok(()) };
            let orders = self.report(report).await?;
            if answers.send(Ok(orders)).await.is_err() {
                return Ok(());
            }
        }
    }

    async fn report(
        &mut self,
        report: wire::HeartbeatReport,
    ) -> Result<wire::HeartbeatOrders, Status> {
        let sequence = report.sequence;
        self.check(NodeId(report.node))?;
        let report = parse(report)?;
        let heard = self.shared.steward.ask(|answer| Ask::Report(report, answer)).await;
        match heard.ok_or_else(|| self.shared.not_leader())? {
            Heard::Fenced => {
                Err(Reason::Fenced.status("this start of the node counts no more; register again"))
            }
            Heard::Orders(Orders { wanted, dismissed }, state) => {
                let changed = self.wanted.as_ref() != Some(&wanted);
                let packed = changed.then(|| pack_experts(&wanted));
                self.wanted = Some(wanted);
                Ok(wire::HeartbeatOrders {
                    sequence,
                    membership_epoch: state.membership_epoch().0,
                    placement_epoch: state.placement_epoch().0,
                    wanted: packed,
                    dismissed,
                })
            }
        }
    }

    /// A node speaks for itself only.
    fn check(&self, node: NodeId) -> Result<(), Status> {
        let state = self.shared.state();
        match state.node_by_id(node) {
            Some(node) if node.spec.is(&self.caller) => Ok(()),
            Some(other) => {
                let reason = format!("node {node} is {} of {}", other.spec.name, other.spec.region);
                Err(self.shared.guard.refuse(&self.caller, CALL, &reason))
            }
            None => Err(Reason::Fenced.status(format!("node {node} is not a member; register"))),
        }
    }
}

fn parse(report: wire::HeartbeatReport) -> Result<Report, Status> {
    let invalid = |what: &str| Status::invalid_argument(format!("the report's {what}"));
    if report.failed.len() > LIST_LEN_MAX || report.rows.len() > LIST_LEN_MAX {
        return Err(invalid("lists are too long"));
    }
    let key = |layer: u32, expert: u32| -> Option<ExpertKey> {
        Some((LayerId(layer.try_into().ok()?), ExpertId(expert.try_into().ok()?)))
    };
    let held = report.held.map(|held| unpack_experts(&held).ok_or(())).transpose();
    let failed: Option<Vec<_>> = report.failed.iter().map(|f| key(f.layer, f.expert)).collect();
    let rows = report.rows.iter().map(|r| Some((key(r.layer, r.expert)?, r.rows)));
    for failure in &report.failed {
        let reason: String = failure.reason.chars().take(200).collect();
        let (node, layer, expert) = (report.node, failure.layer, failure.expert);
        tracing::warn!(node, layer, expert, reason, "a node could not load an expert");
    }
    Ok(Report {
        node: NodeId(report.node),
        incarnation: Incarnation(report.incarnation),
        sequence: report.sequence,
        held: held.map_err(|()| invalid("list of held experts is not one"))?,
        failed: failed.ok_or_else(|| invalid("failures name no experts"))?,
        leaving: report.leaving,
        rows: rows.collect::<Option<_>>().ok_or_else(|| invalid("rows name no experts"))?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn experts_survive_being_packed_and_what_is_not_ascending_is_refused() {
        let experts = [(1, 2), (1, 300), (7, 0)].map(|(l, e)| (LayerId(l), ExpertId(e)));
        let experts = BTreeSet::from(experts);
        let packed = pack_experts(&experts);
        assert_eq!(packed.len(), 12);
        assert_eq!(unpack_experts(&packed), Some(experts));
        assert_eq!(unpack_experts(&packed[..11]), None);
        assert_eq!(unpack_experts(&[&packed[4..], &packed[..4]].concat()), None);
        assert_eq!(unpack_experts(&[&packed[..4], &packed[..4]].concat()), None);
    }
}
