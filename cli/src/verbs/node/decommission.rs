//! `entente node decommission`: a node that is down, and holds nothing, leaves for good.

use clap::Args;
use entente_membership::state::{Command, NodeState};
use entente_proto::ids::NodeName;
use serde::Serialize;

use crate::exit::Failure;
use crate::operator::{OperatorArgs, confirm};

/// The flags of `entente node decommission`.
#[derive(Debug, Args)]
pub struct DecommissionArgs {
    #[command(flatten)]
    operator: OperatorArgs,

    /// Do not ask: the name can never be used again in this cluster.
    #[arg(long, env = "ENTENTE_YES")]
    yes: bool,

    /// The node.
    name: NodeName,
}

/// The answer as JSON has it.
#[derive(Debug, Serialize)]
struct Removed {
    name: NodeName,
    state: &'static str,
}

/// Takes the node out. What is placed on it and whether it is down is checked where it counts, in
/// the committed state; here is only what to do about it.
pub fn run(args: DecommissionArgs) -> anyhow::Result<()> {
    let name = &args.name;
    args.operator.run(async |operator| {
        let node = operator.node(name).await?;
        if node.state != NodeState::Down && node.state != NodeState::Removed {
            let text = format!(
                "{name} is not down. Drain it (`entente node drain {name}`), stop its process, and \
                 decommission it then"
            );
            return Err(Failure::Refused(text).into());
        }
        confirm(args.yes, &format!("decommissioning {name}"))?;
        operator.propose(Command::SetState(node.id, NodeState::Removed)).await?;
        operator.print(&Removed { name: name.clone(), state: "removed" }, |removed| {
            format!("{} is out of the cluster for good", removed.name)
        })
    })
}
