//! `entente node ok-to-stop`: asks before machines are switched off.

use clap::Args;
use entente_proto::ids::NodeName;
use entente_proto::wire;
use serde::Serialize;

use crate::exit::Failure;
use crate::operator::OperatorArgs;

/// The flags of `entente node ok-to-stop`.
#[derive(Debug, Args)]
pub struct OkToStopArgs {
    #[command(flatten)]
    operator: OperatorArgs,

    /// The nodes that would stop together.
    #[arg(required = true)]
    names: Vec<NodeName>,
}

/// The answer as JSON has it.
#[derive(Debug, Serialize)]
struct Answer {
    names: Vec<NodeName>,
    ok: bool,
    /// The arithmetic.
    reason: String,
}

/// Prints the answer; "no" is also an exit code.
pub fn run(args: OkToStopArgs) -> anyhow::Result<()> {
    args.operator.run(async |operator| {
        let names = args.names.iter().map(ToString::to_string).collect();
        let request = wire::OkToStopRequest { names };
        let reply = operator
            .leader(|mut admin| {
                let request = request.clone();
                async move { admin.ok_to_stop(request).await }
            })
            .await?;
        let answer = Answer { names: args.names.clone(), ok: reply.ok, reason: reply.reason };
        operator.print(&answer, |answer| if answer.ok { "yes" } else { "no" }.to_owned())?;
        match answer.ok {
            true => Ok(()),
            false => Err(Failure::Refused(answer.reason).into()),
        }
    })
}
