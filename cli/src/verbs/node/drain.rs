//! `entente node drain`: replicas move away before the node does.
//!
//! The leader refuses what would leave an expert without a replica in the node's region. Once it
//! has accepted, the drain goes on whether this program waits or not.

use std::sync::Arc;

use clap::Args;
use entente_membership::state::{NodeState, State};
use entente_proto::ids::{NodeId, NodeName};
use entente_proto::wire;
use serde::Serialize;
use tokio::sync::watch;

use crate::exit::Failure;
use crate::operator::OperatorArgs;
use crate::operator::wait::{Countdown, WaitArgs};

/// The flags of `entente node drain`.
#[derive(Debug, Args)]
pub struct DrainArgs {
    #[command(flatten)]
    operator: OperatorArgs,

    #[command(flatten)]
    wait: WaitArgs,

    /// The expert node.
    name: NodeName,
}

/// The answer as JSON has it.
#[derive(Debug, Serialize)]
struct Drained {
    name: NodeName,
    /// Replicas that were placed on it.
    replicas: u32,
    /// Whether nothing is placed on it any more.
    drained: bool,
}

/// Asks for the drain and waits until nothing is placed on the node.
pub fn run(args: DrainArgs) -> anyhow::Result<()> {
    args.operator.run(async |operator| {
        let node = operator.node(&args.name).await?;
        let request = wire::DrainRequest { name: args.name.to_string() };
        let reply = operator
            .leader(|mut admin| {
                let request = request.clone();
                async move { admin.drain(request).await }
            })
            .await?;
        let mut drained =
            Drained { name: args.name.clone(), replicas: reply.replicas, drained: false };
        if !args.wait.no_wait {
            let name = &args.name;
            let goes_on = format!(
                "{name} goes on draining; `entente node ls` shows how far it is, and `entente node \
                 uncordon {name}` calls it off"
            );
            let states = operator.watch().await?;
            args.wait.until(moved_away(states, node.id, name), &goes_on).await?;
            drained.drained = true;
        }
        operator.print(&drained, |answer| match answer.drained {
            true => format!("{} is drained and may be stopped", answer.name),
            false => {
                format!("{} is draining; {} replicas are to move", answer.name, answer.replicas)
            }
        })
    })
}

/// Waits until the committed placement does not name the node any more.
async fn moved_away(
    mut states: watch::Receiver<Option<Arc<State>>>,
    id: NodeId,
    name: &NodeName,
) -> anyhow::Result<()> {
    let mut countdown: Option<Countdown> = None;
    // The voter that tells us may not know of the drain yet.
    let mut has_begun = false;
    loop {
        let state = states.borrow_and_update().clone();
        if let Some(state) = &state {
            let left = state.placement().experts_of(id).len() as u64;
            if left == 0 {
                return Ok(());
            }
            let life = state.node_by_id(id).map(|node| node.state);
            has_begun |= life == Some(NodeState::Draining);
            if has_begun && life == Some(NodeState::Active) {
                return Err(Failure::Refused(format!("the drain of {name} was called off")).into());
            }
            let what = || format!("replicas on {name}");
            countdown.get_or_insert_with(|| Countdown::new(what(), left)).left(left);
        }
        states.changed().await?;
    }
}

#[cfg(test)]
mod tests {
    use entente_membership::state::Command;
    use entente_proto::placement::Placement;

    use super::*;
    use crate::verbs::node::testing;

    #[tokio::test]
    async fn a_drain_is_over_when_nothing_is_placed_on_the_node() {
        let (id, name) = (NodeId(2), "fr-expert-2".parse().unwrap());
        let mut state = testing::state();
        state.apply(Command::SetState(id, NodeState::Draining)).unwrap();
        let (latest, states) = watch::channel(Some(Arc::new(state.clone())));
        let waiting = moved_away(states, id, &name);
        tokio::pin!(waiting);
        assert!(tokio::select! { biased; _ = &mut waiting => false, () = async {} => true });
        state.apply(Command::SetPlacement(Placement::new())).unwrap();
        latest.send(Some(Arc::new(state))).unwrap();
        waiting.await.unwrap();
    }

    #[tokio::test]
    async fn a_drain_that_was_called_off_is_not_waited_for() {
        let (id, name) = (NodeId(1), "fr-expert-1".parse().unwrap());
        let mut state = testing::state();
        state.apply(Command::SetState(id, NodeState::Draining)).unwrap();
        let (latest, states) = watch::channel(Some(Arc::new(state)));
        let waiting = moved_away(states, id, &name);
        tokio::pin!(waiting);
        assert!(tokio::select! { biased; _ = &mut waiting => false, () = async {} => true });
        latest.send(Some(Arc::new(testing::state()))).unwrap();
        let error = waiting.await.unwrap_err();
        assert!(error.to_string().contains("called off"), "{error}");
    }
}
