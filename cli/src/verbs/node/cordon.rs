//! `entente node cordon` and `entente node uncordon`.

use clap::Args;
use entente_membership::state::{Command, NodeState};
use entente_proto::ids::NodeName;
use serde::Serialize;

use crate::operator::OperatorArgs;

/// The flags of both.
#[derive(Debug, Args)]
pub struct CordonArgs {
    #[command(flatten)]
    operator: OperatorArgs,

    /// The expert node.
    name: NodeName,
}

/// The answer as JSON has it.
#[derive(Debug, Serialize)]
struct Cordoned {
    name: NodeName,
    cordoned: bool,
    /// Whether a drain was called off.
    drain_ended: bool,
}

/// Says whether the node may get further replicas.
pub fn run(args: CordonArgs, cordoned: bool) -> anyhow::Result<()> {
    args.operator.run(async |operator| {
        let node = operator.node(&args.name).await?;
        operator.propose(Command::Cordon(node.id, cordoned)).await?;
        let drain_ended = !cordoned && node.state == NodeState::Draining;
        if drain_ended {
            operator.propose(Command::SetState(node.id, NodeState::Active)).await?;
        }
        let answer = Cordoned { name: args.name.clone(), cordoned, drain_ended };
        operator.print(&answer, |answer| {
            let what = match (answer.cordoned, answer.drain_ended) {
                (true, _) => "gets no further replicas",
                (false, false) => "may get replicas",
                (false, true) => "may get replicas; its drain was called off",
            };
            format!("{} {what}", answer.name)
        })
    })
}
