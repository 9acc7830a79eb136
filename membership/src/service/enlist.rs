//! How a coordinator or a witness that has joined the cluster gets into the raft group by itself.
//!
//! Its certificate says that an operator wanted it there: only a token of that role gives one. So
//! it asks the leader, again and again, to be brought one step further: to get the log as a learner,
//! and a vote once it has caught up. The leader refuses where that would cost the group something: a
//! member whose earlier disk still counts would count twice, one of them dead.

use std::time::Duration;

use entente_proto::ids::NodeName;
use entente_proto::wire;
use entente_proto::wire::enrolment_client::EnrolmentClient;
use tokio::time::sleep;
use tonic::Status;

use super::admin::{in_effect, wait_for};
use super::members::not_proposed;
use super::shared::Shared;
use crate::raft::Change;
use crate::state::VoterId;

/// Entries that a learner may lack when it gets its vote; the next heartbeats bring them.
const LAG_MAX: u64 = 16;
/// How long one attempt may take.
const ATTEMPT_MAX: Duration = Duration::from_secs(5);
/// Pause between two steps: a learner has to be sent the log, and nobody tells when it has it.
const PAUSE: Duration = Duration::from_millis(300);

/// Asks until this voter votes. What stands in the way is logged once.
pub(super) async fn run(shared: Shared) {
    let mut told = String::new();
    loop {
        let own = shared.own.identity.voter;
        if shared.status().group.voters.contains(&own) {
            return;
        }
        let call = |channel| async move {
            EnrolmentClient::new(channel).enlist(wire::EnlistRequest {}).await
        };
        match shared.client.leader(ATTEMPT_MAX, call).await {
            Ok(reply) if reply.get_ref().votes => {
                tracing::info!(voter = own, "this voter has its vote");
                return;
            }
            Ok(_) => {}
            Err(error) => {
                let text = error.to_string();
                if text != told {
                    tracing::warn!(reason = text, "not in the raft group yet");
                    told = text;
                }
            }
        }
        sleep(PAUSE).await;
    }
}

/// Brings the member one step further. Whether it votes.
///
/// # Errors
/// This voter does not lead, or the member must not come in.
pub(super) async fn one_step(shared: &Shared, name: &NodeName) -> Result<bool, Status> {
    shared.expect_leader()?;
    let (state, status) = (shared.state(), shared.status());
    let unknown = || Status::failed_precondition(format!("{name} is not a member"));
    let node = state.node(name).ok_or_else(unknown)?.id;
    let disks = || state.voters().filter(|(_, voter)| voter.node == node);
    let latest = disks().filter(|(_, voter)| !voter.retired).last();
    let Some((VoterId(id), _)) = latest else {
        return Err(Status::failed_precondition(format!("{name} has no disk that could join")));
    };
    let group = &status.group;
    if group.voters.contains(&id) {
        return Ok(true);
    }
    if let Some((VoterId(old), _)) =
        disks().find(|(disk, _)| disk.0 != id && group.contains(disk.0))
    {
        let text = format!(
            "voter {old} of {name} is in the raft group and has lost its disk; \
             entente raft remove {name}"
        );
        return Err(Status::failed_precondition(text));
    }
    let caught_up =
        status.matched.get(&id).is_some_and(|matched| matched + LAG_MAX >= status.commit);
    let change = match group.learners.contains(&id) {
        false => Change::AddLearner(id),
        true if caught_up => Change::Promote(id),
        true => return Ok(false),
    };
    let proposed = shared.owner.change(change).await;
    proposed.map_err(|error| not_proposed(shared, &error))?;
    wait_for(shared, |status| in_effect(change, status)).await?;
    tracing::info!(target: "audit", %name, voter = id, ?change, "enlisted");
    Ok(matches!(change, Change::Promote(_)))
}
