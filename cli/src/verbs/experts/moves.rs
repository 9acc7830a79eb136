//! `entente experts rebalance`, and how every verb here starts moves and waits for them.

use std::time::Duration;

use clap::Args;
use entente_proto::wire::{NodesRequest, RebalanceRequest};
use serde::Serialize;

use crate::operator::wait::{Countdown, WaitArgs};
use crate::operator::{Operator, OperatorArgs};

/// How often the leader is asked how far a move is. Nothing of a move but its commits is known
/// outside the leader, so there is no event to wait for.
const ASK_EVERY: Duration = Duration::from_millis(200);

/// The flags of `entente experts rebalance`.
#[derive(Debug, Args)]
pub struct RebalanceArgs {
    #[command(flatten)]
    operator: OperatorArgs,

    #[command(flatten)]
    wait: WaitArgs,
}

/// The answer as JSON has it.
#[derive(Debug, Serialize)]
struct Moved {
    /// Replicas to load.
    loads: u32,
    /// Replicas to release.
    releases: u32,
    /// Whether all of it is done.
    done: bool,
}

/// Moves to what the planner would choose now.
pub fn run(args: RebalanceArgs) -> anyhow::Result<()> {
    args.operator
        .run(async |operator| start(&operator, RebalanceRequest::default(), args.wait).await)
}

/// Starts moves, waits for them as is wished, and prints what came of it.
pub async fn start(
    operator: &Operator,
    request: RebalanceRequest,
    wait: WaitArgs,
) -> anyhow::Result<()> {
    let reply = operator
        .leader(|mut admin| {
            let request = request.clone();
            async move { admin.rebalance(request).await }
        })
        .await?;
    let mut moved = Moved { loads: reply.loads, releases: reply.releases, done: false };
    if !wait.no_wait {
        let goes_on = "the moves go on; `entente node ls` shows how far they are";
        wait.until(finished(operator), goes_on).await?;
        moved.done = true;
    }
    operator.print(&moved, |moved| {
        let (loads, releases) = (moved.loads, moved.releases);
        let tense = if moved.done { "done" } else { "begun" };
        format!("{loads} replicas to load and {releases} to release: {tense}")
    })
}

async fn finished(operator: &Operator) -> anyhow::Result<()> {
    let mut countdown: Option<Countdown> = None;
    loop {
        let nodes =
            operator.leader(|mut admin| async move { admin.nodes(NodesRequest {}).await }).await?;
        if nodes.replicas_left == 0 && nodes.progress.is_empty() {
            return Ok(());
        }
        // What is loaded may still have to be committed, and what is moved to be released.
        if nodes.replicas_left > 0 {
            let new = || Countdown::new("replicas to load".to_owned(), nodes.replicas_left);
            countdown.get_or_insert_with(new).left(nodes.replicas_left);
        }
        tokio::time::sleep(ASK_EVERY).await;
    }
}
