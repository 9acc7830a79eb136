//! Which failure it is when a call came to nothing, so that scripts can branch on it.
//!
//! A call to the leader whose time is up says only what was heard last. Whether there is a leader
//! at all, any voter knows; so it is asked before the verdict.

use std::time::Duration;

use entente_membership::client::ClientError;
use entente_proto::wire;

use super::{Operator, admin};
use crate::exit::Failure;

/// How long the question who leads may take.
const DIAGNOSIS_MAX: Duration = Duration::from_secs(2);

impl Operator {
    pub(super) async fn failure(&self, error: ClientError) -> Failure {
        let last = match error {
            ClientError::Deadline(last) => last,
            other => return verdict(other),
        };
        let asked = self.client.any(DIAGNOSIS_MAX, |channel| async {
            Ok(admin(channel).status(wire::StatusRequest {}).await?.into_inner())
        });
        diagnosis(asked.await.ok(), &last)
    }
}

/// What an error means that needs no further question.
fn verdict(error: ClientError) -> Failure {
    let text = error.to_string();
    match error {
        ClientError::Status(_) | ClientError::Refused(_) => Failure::Refused(text),
        ClientError::Unknown(_) => Failure::Pending(format!(
            "{text}; look before you repeat it: `entente node ls`, `entente raft status`"
        )),
        ClientError::NoAddress | ClientError::Deadline(_) | ClientError::Malformed(_) => {
            Failure::Unreachable(text)
        }
    }
}

/// What the answer of some voter, or of none, says about a leader that did not answer.
fn diagnosis(status: Option<wire::StatusReply>, last: &str) -> Failure {
    let Some(status) = status else {
        return Failure::Unreachable(format!(
            "no voter answers; the last attempt: {last}. See whether coordinators and witnesses \
             run, and whether the addresses are those of their control planes"
        ));
    };
    if status.leader == 0 {
        let voters = status.members.iter().filter(|member| member.role == "voter").count();
        return Failure::NoQuorum(format!(
            "{} answers and knows no leader, so fewer than {} of {voters} voters reach each other. \
             Requests are served as before; changes wait until voters are back: `entente raft \
             status` names those that are missing",
            status.name,
            voters / 2 + 1,
        ));
    }
    Failure::NotLeader(format!(
        "{} leads, but does not answer here: {last}. {} answers; try again, or from where the \
         leader can be reached",
        status.leader_name, status.name
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_leader_no_answer_and_a_leader_out_of_reach_are_told_apart() {
        let member = |voter: u64| wire::GroupMember {
            voter,
            role: "voter".to_owned(),
            ..Default::default()
        };
        let members: Vec<_> = (1..=3).map(member).collect();
        let status = |leader: u64, leader_name: &str| wire::StatusReply {
            name: "witness".to_owned(),
            leader,
            leader_name: leader_name.to_owned(),
            members: members.clone(),
            ..Default::default()
        };
        let text = diagnosis(Some(status(0, "")), "not the leader").to_string();
        assert!(text.starts_with("no quorum: witness") && text.contains("2 of 3"), "{text}");
        let text = diagnosis(Some(status(1, "fr-coordinator")), "cut").to_string();
        assert!(text.starts_with("not the leader: fr-coordinator leads"), "{text}");
        let text = diagnosis(None, "connection refused").to_string();
        assert!(text.starts_with("unreachable:") && text.contains("connection refused"), "{text}");
    }
}
