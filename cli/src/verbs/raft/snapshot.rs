//! `entente raft snapshot`.

use clap::Args;
use entente_proto::wire::TakeSnapshotRequest;
use serde::Serialize;

use crate::operator::OperatorArgs;

/// The flags of `entente raft snapshot`.
#[derive(Debug, Args)]
pub struct SnapshotArgs {
    #[command(flatten)]
    operator: OperatorArgs,
}

/// The answer as JSON has it.
#[derive(Debug, Serialize)]
struct Taken {
    /// The last entry that is in it.
    index: u64,
}

/// Asks the leader for one.
pub fn run(args: SnapshotArgs) -> anyhow::Result<()> {
    args.operator.run(async |operator| {
        let reply = operator
            .leader(|mut admin| async move { admin.take_snapshot(TakeSnapshotRequest {}).await })
            .await?;
        operator.print(&Taken { index: reply.index }, |taken| {
            format!("a snapshot is taken at entry {}", taken.index)
        })
    })
}
