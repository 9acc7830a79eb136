//! `entente node ls`.

use clap::Args;
use entente_proto::wire;
use serde::Serialize;

use super::row::{NodeRow, rows};
use crate::cluster::columns;
use crate::exit::Failure;
use crate::operator::{OperatorArgs, or_dash};

/// The flags of `entente node ls`.
#[derive(Debug, Args)]
pub struct LsArgs {
    #[command(flatten)]
    operator: OperatorArgs,

    /// Also list members that were taken out.
    #[arg(long, env = "ENTENTE_ALL")]
    all: bool,
}

/// The answer as JSON has it.
#[derive(Debug, Serialize)]
struct Members {
    nodes: Vec<NodeRow>,
    membership_epoch: u64,
    placement_epoch: u64,
    /// How far a move to another placement is, in words; empty when there is none.
    progress: String,
    replicas_left: u64,
}

/// Lists the members. Without a leader what is committed is still known.
pub fn run(args: LsArgs) -> anyhow::Result<()> {
    args.operator.run(async |operator| {
        let state = operator.state().await?;
        let reports = operator
            .leader(|mut admin| async move { admin.nodes(wire::NodesRequest {}).await })
            .await;
        let reports = match reports {
            Err(error) if is_about_the_leader(&error) => {
                tracing::warn!("only what is committed is shown: {error}");
                wire::NodesReply::default()
            }
            other => other?,
        };
        let mut nodes = rows(&state, &reports.nodes);
        nodes.retain(|row| args.all || row.state != "removed");
        let members = Members {
            nodes,
            membership_epoch: state.membership_epoch().0,
            placement_epoch: state.placement_epoch().0,
            progress: reports.progress,
            replicas_left: reports.replicas_left,
        };
        operator.print(&members, table)
    })
}

fn is_about_the_leader(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(Failure::NoQuorum(_) | Failure::NotLeader(_)))
}

fn table(members: &Members) -> String {
    let header = [
        "NAME",
        "REGION",
        "ROLE",
        "STATE",
        "ELIGIBLE",
        "PLACED",
        "HELD",
        "WANTED",
        "INCARNATION",
        "LAST-SEEN",
        "ADDRESS",
        "DEVICE",
    ];
    let mut table = columns(header);
    for row in &members.nodes {
        let is_expert_node = row.role == "expert-node";
        table.add_row([
            row.name.clone(),
            row.region.clone(),
            row.role.to_owned(),
            row.state.to_owned(),
            or_dash(is_expert_node.then_some(if row.eligible { "yes" } else { "no" })),
            or_dash(is_expert_node.then_some(row.placed)),
            or_dash(row.held),
            or_dash(row.wanted),
            or_dash(row.incarnation),
            or_dash(row.heartbeat_age_ms.map(|age| format!("{age} ms"))),
            row.address.clone(),
            or_dash(row.device_name()),
        ]);
    }
    let text = table.trim_fmt();
    match members.progress.is_empty() {
        true => text,
        false => format!("{text}\n\n{}", members.progress),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::verbs::node::testing;

    #[test]
    fn a_table_has_a_line_a_member_and_json_has_its_documented_keys() {
        let state = testing::state();
        let members = Members {
            nodes: rows(&state, &[]),
            membership_epoch: 1,
            placement_epoch: 1,
            progress: "2 of 4 replicas are loaded".to_owned(),
            replicas_left: 2,
        };
        let text = table(&members);
        let cells: Vec<Vec<&str>> = text.lines().map(|l| l.split_whitespace().collect()).collect();
        assert_eq!(cells[0].len(), 12, "{text}");
        assert_eq!(cells[2][..6], ["fr-expert-1", "fr", "expert-node", "active", "yes", "2"]);
        assert!(text.ends_with("replicas are loaded"), "{text}");

        let json = serde_json::to_value(&members).unwrap();
        let keys: Vec<&String> = json["nodes"][0].as_object().unwrap().keys().collect();
        let documented = [
            "name",
            "id",
            "region",
            "site",
            "role",
            "state",
            "eligible",
            "cordoned",
            "incarnation",
            "address",
            "memory_bytes",
            "kernel_class",
            "device",
            "changed_at_ms",
            "placed",
            "held",
            "wanted",
            "heartbeat_age_ms",
        ];
        assert_eq!(keys, documented);
    }
}
