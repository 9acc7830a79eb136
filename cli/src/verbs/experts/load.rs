//! `entente experts load`: one more replica of one expert.

use clap::Args;
use entente_proto::ids::NodeName;
use entente_proto::wire::RebalanceRequest;

use super::moves;
use crate::operator::OperatorArgs;
use crate::operator::wait::WaitArgs;

/// The flags of `entente experts load`.
#[derive(Debug, Args)]
pub struct LoadArgs {
    #[command(flatten)]
    operator: OperatorArgs,

    #[command(flatten)]
    wait: WaitArgs,

    /// The layer, counted from 0 as in the checkpoint.
    layer: u16,

    /// The expert in the layer, counted from 0.
    expert: u16,

    /// The node that is to hold it too.
    node: NodeName,
}

/// Asks for the replica.
pub fn run(args: LoadArgs) -> anyhow::Result<()> {
    args.operator.run(async |operator| {
        let request = RebalanceRequest {
            layer: Some(args.layer.into()),
            expert: Some(args.expert.into()),
            node: Some(args.node.to_string()),
        };
        moves::start(&operator, request, args.wait).await
    })
}
