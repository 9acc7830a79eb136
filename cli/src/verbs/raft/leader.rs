//! `entente raft transfer-leader`: before the leader's machine is stopped, another one leads.

use clap::Args;
use entente_proto::ids::NodeName;
use entente_proto::wire::TransferLeaderRequest;
use serde::Serialize;

use crate::operator::OperatorArgs;

/// The flags of `entente raft transfer-leader`.
#[derive(Debug, Args)]
pub struct TransferArgs {
    #[command(flatten)]
    operator: OperatorArgs,

    /// The voter that is to lead.
    name: NodeName,
}

/// The answer as JSON has it.
#[derive(Debug, Serialize)]
struct Transferred {
    leader: NodeName,
}

/// Asks the leader to hand over.
pub fn run(args: TransferArgs) -> anyhow::Result<()> {
    args.operator.run(async |operator| {
        let request = TransferLeaderRequest { to: args.name.to_string() };
        operator
            .leader(|mut admin| {
                let request = request.clone();
                async move { admin.transfer_leader(request).await }
            })
            .await?;
        operator.print(&Transferred { leader: args.name.clone() }, |answer| {
            format!("{} leads", answer.leader)
        })
    })
}
