//! At each start a voter tells the cluster where it is, and gets an incarnation.

use std::sync::Arc;
use std::time::Duration;

use super::ServiceError;
use super::shared::Shared;
use crate::client::ClientError;
use crate::state::{Applied, Command, Expect, NodeState, State};

/// How long one attempt may take; it is repeated.
const ATTEMPT_MAX: Duration = Duration::from_secs(5);

/// Returns when it is done.
///
/// # Errors
/// The cluster refuses it for good, for example because the node was removed from it.
pub(super) async fn run(shared: Shared) -> Result<(), ServiceError> {
    loop {
        // Before there is a leader, and before a learner knows its own node, there is nothing to try.
        let led = shared.status.clone().wait_for(|status| status.leader.is_some()).await.is_ok();
        let knows = |state: &Arc<State>| state.node(&shared.own.name).is_some();
        let known = shared.state.clone().wait_for(knows).await.is_ok();
        if !led || !known {
            return Ok(());
        }
        match register(&shared).await {
            Ok(()) => return Ok(()),
            Err(error @ ClientError::Refused(_)) => return Err(ServiceError::Refused(error)),
            Err(error) => tracing::debug!(%error, "not registered yet"),
        }
    }
}

async fn register(shared: &Shared) -> Result<(), ClientError> {
    let Some(node) = shared.node() else { return Ok(()) };
    let command = Command::RegisterWith {
        node,
        address: shared.own.address.clone(),
        memory_bytes: None,
        kernel_class: String::new(),
        device: None,
    };
    let applied = shared.client.propose(ATTEMPT_MAX, Expect::default(), command).await?;
    let Applied::Registered(incarnation) = applied else { return Ok(()) };
    let expect = Expect { incarnation: Some((node, incarnation)), ..Expect::default() };
    let active = Command::SetState(node, NodeState::Active);
    shared.client.propose(ATTEMPT_MAX, expect, active).await?;
    shared.owner.set_incarnation(incarnation);
    tracing::info!(%node, %incarnation, "this voter is registered");
    Ok(())
}
