//! `entente experts place`: plan, look, then apply.

use clap::Args;
use entente_membership::state::{Command, REPLICAS_MAX, State};
use entente_proto::ids::{ExpertId, LayerId, NodeId};
use entente_proto::wire::{PlanReply, PlanRequest, RebalanceRequest};
use serde::Serialize;

use super::list::{ExpertRow, row, table};
use super::moves;
use crate::operator::wait::WaitArgs;
use crate::operator::{Operator, OperatorArgs};

/// The flags of `entente experts place`.
#[derive(Debug, Args)]
pub struct PlaceArgs {
    #[command(flatten)]
    operator: OperatorArgs,

    #[command(flatten)]
    wait: WaitArgs,

    /// Replicas of each expert in each region; as it is now if absent.
    #[arg(long, env = "ENTENTE_REPLICAS", value_name = "N")]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=i64::from(REPLICAS_MAX)))]
    replicas: Option<u16>,

    /// Show the plan and change nothing.
    #[arg(long, env = "ENTENTE_DRY_RUN")]
    dry_run: bool,
}

/// The answer as JSON has it.
#[derive(Debug, Serialize)]
struct Plan {
    /// Replicas to load.
    loads: u32,
    /// Replicas to release.
    releases: u32,
    /// The arithmetic, a line each.
    lines: Vec<String>,
    experts: Vec<ExpertRow>,
}

/// Shows the plan, or makes it happen. A plan that does not fit is refused in both cases, before
/// anything is changed.
pub fn run(args: PlaceArgs) -> anyhow::Result<()> {
    args.operator.run(async |operator| {
        let request = PlanRequest { replicas: args.replicas.map(u32::from) };
        let reply = operator.leader(|mut admin| async move { admin.plan(request).await }).await?;
        let state = operator.state().await?;
        if args.dry_run {
            return operator.print(&plan(&state, reply), |plan| {
                let (loads, releases) = (plan.loads, plan.releases);
                let what = format!("{loads} replicas to load and {releases} to release");
                format!("{}\n\n{}\n{what}", table(&plan.experts), plan.lines.join("\n"))
            });
        }
        if let Some(replicas) = args.replicas {
            want(&operator, &state, replicas).await?;
        }
        moves::start(&operator, RebalanceRequest::default(), args.wait).await
    })
}

/// Commits how many replicas every region should have.
async fn want(operator: &Operator, state: &State, replicas: u16) -> anyhow::Result<()> {
    for (region, have) in state.replicas() {
        if *have != replicas {
            operator.propose(Command::SetReplicas(*region, replicas)).await?;
        }
    }
    Ok(())
}

fn plan(state: &State, reply: PlanReply) -> Plan {
    // A number beyond 65,535 names no layer and no expert; it is shown as the largest.
    let short = |number: u32| u16::try_from(number).unwrap_or(u16::MAX);
    let experts = reply.experts.iter().map(|placed| {
        let nodes: Vec<NodeId> = placed.nodes.iter().map(|id| NodeId(*id)).collect();
        row(state, LayerId(short(placed.layer)), ExpertId(short(placed.expert)), &nodes)
    });
    let (loads, releases, experts) = (reply.loads, reply.releases, experts.collect());
    Plan { loads, releases, lines: reply.lines, experts }
}

#[cfg(test)]
mod tests {
    use entente_proto::wire::ExpertReplicas;

    use super::*;
    use crate::verbs::node::testing;

    #[test]
    fn a_plan_names_the_nodes() {
        let experts = vec![ExpertReplicas { layer: 3, expert: 1, nodes: vec![1, 2, 99] }];
        let lines = vec!["fr: 2 experts on 2 nodes".to_owned()];
        let reply = PlanReply { experts, lines, loads: 1, releases: 0 };
        let json = serde_json::to_value(plan(&testing::state(), reply)).unwrap();
        assert_eq!(json["experts"][0]["nodes"][1], "fr-expert-2");
        assert_eq!(json["experts"][0]["nodes"][2], "99");
        assert_eq!(json["loads"], 1);
    }
}
