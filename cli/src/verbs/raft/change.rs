//! `entente raft add`, `promote` and `remove`: who is in the group.

use clap::Args;
use entente_proto::ids::NodeName;
use entente_proto::wire::ChangeGroupRequest;
use entente_proto::wire::change_group_request::Change;
use serde::Serialize;

use crate::operator::{OperatorArgs, confirm};

/// The flags of `add` and `promote`.
#[derive(Debug, Args)]
pub struct ChangeArgs {
    #[command(flatten)]
    operator: OperatorArgs,

    /// The coordinator or witness.
    name: NodeName,
}

/// The flags of `remove`.
#[derive(Debug, Args)]
pub struct RemoveArgs {
    #[command(flatten)]
    change: ChangeArgs,

    /// Do not ask: what is on the voter's disk is of no use afterwards.
    #[arg(long, env = "ENTENTE_YES")]
    yes: bool,
}

/// The answer as JSON has it.
#[derive(Debug, Serialize)]
struct Changed {
    name: NodeName,
    /// Its number in the group.
    voter: u64,
    /// `learner`, `voter` or `removed`.
    role: &'static str,
}

/// Adds a learner.
pub fn add(args: ChangeArgs) -> anyhow::Result<()> {
    change(&args, "learner", Change::AddLearner)
}

/// Makes a learner a voter.
pub fn promote(args: ChangeArgs) -> anyhow::Result<()> {
    change(&args, "voter", Change::Promote)
}

/// Takes a voter or a learner out.
pub fn remove(args: RemoveArgs) -> anyhow::Result<()> {
    confirm(args.yes, &format!("removing {} from the raft group", args.change.name))?;
    change(&args.change, "removed", Change::Remove)
}

fn change(
    args: &ChangeArgs,
    role: &'static str,
    change: fn(String) -> Change,
) -> anyhow::Result<()> {
    args.operator.run(async |operator| {
        let request = ChangeGroupRequest { change: Some(change(args.name.to_string())) };
        let reply = operator
            .leader(|mut admin| {
                let request = request.clone();
                async move { admin.change_group(request).await }
            })
            .await?;
        let changed = Changed { name: args.name.clone(), voter: reply.voter, role };
        operator.print(&changed, |changed| {
            format!("{}, voter {}: {}", changed.name, changed.voter, changed.role)
        })
    })
}
