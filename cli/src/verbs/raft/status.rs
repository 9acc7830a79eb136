//! `entente raft status`: what each voter says about itself.
//!
//! Every member of the group is asked on its own, as only it knows how far its log is. One that
//! does not answer has a line that says so.

use std::time::Duration;

use clap::Args;
use entente_proto::wire::{GroupMember, StatusReply, StatusRequest};
use serde::Serialize;
use tokio::time::timeout;

use crate::cluster::columns;
use crate::operator::{Operator, OperatorArgs, or_dash};

/// How long one voter may take to answer.
const ANSWER_MAX: Duration = Duration::from_secs(2);

/// The flags of `entente raft status`.
#[derive(Debug, Args)]
pub struct StatusArgs {
    #[command(flatten)]
    operator: OperatorArgs,
}

/// The answer as JSON has it.
#[derive(Debug, Serialize)]
struct Group {
    /// The leader's name, as the first voter that answered knows it; null when it knows none.
    leader: Option<String>,
    voters: Vec<VoterRow>,
}

/// One member of the group. What only it knows is null when it does not answer.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct VoterRow {
    name: String,
    /// Its number in the group.
    voter: u64,
    region: String,
    /// `voter`, `learner`, `joining` or `leaving`.
    role: String,
    address: String,
    /// Whether it says that it leads.
    leads: Option<bool>,
    term: Option<u64>,
    commit_index: Option<u64>,
    applied_index: Option<u64>,
    last_index: Option<u64>,
    snapshot_index: Option<u64>,
    /// How much of its log the leader knows to be right.
    matched_index: Option<u64>,
    membership_epoch: Option<u64>,
    placement_epoch: Option<u64>,
    /// Checkpoints of audit logs that it did not cosign, as they contradicted others; null where it
    /// cosigns none.
    cosign_refused: Option<u64>,
    /// Why it does not answer.
    error: Option<String>,
}

/// Asks everybody and prints a line each.
pub fn run(args: StatusArgs) -> anyhow::Result<()> {
    args.operator.run(async |operator| {
        let first =
            operator.any(|mut admin| async move { admin.status(StatusRequest {}).await }).await?;
        let mut answers = Vec::new();
        for member in first.members {
            let answer = match timeout(ANSWER_MAX, ask(&operator, &member)).await {
                Ok(answer) => answer.map_err(|error| format!("{error:#}")),
                Err(_) => Err(format!("no answer within {} s", ANSWER_MAX.as_secs())),
            };
            answers.push((member, answer));
        }
        let leader = Some(first.leader_name).filter(|name| !name.is_empty());
        operator.print(&Group { leader, voters: rows(answers) }, table)
    })
}

async fn ask(operator: &Operator, member: &GroupMember) -> anyhow::Result<StatusReply> {
    let mut admin = operator.at(&member.address).await?;
    Ok(admin.status(StatusRequest {}).await?.into_inner())
}

fn rows(answers: Vec<(GroupMember, Result<StatusReply, String>)>) -> Vec<VoterRow> {
    // Only the leader knows how far the others' logs are right.
    let leader = answers.iter().filter_map(|(_, answer)| answer.as_ref().ok());
    let matched: Vec<(u64, Option<u64>)> = leader
        .filter(|status| status.leader == status.voter)
        .max_by_key(|status| status.term)
        .map(|status| status.members.iter().map(|m| (m.voter, m.matched_index)).collect())
        .unwrap_or_default();
    let row = |(member, answer): (GroupMember, Result<StatusReply, String>)| {
        let of_voter = |(voter, matched): &(u64, Option<u64>)| {
            if *voter == member.voter { *matched } else { None }
        };
        let matched_index = matched.iter().find_map(of_voter);
        let said = |value: fn(&StatusReply) -> u64| answer.as_ref().ok().map(value);
        VoterRow {
            leads: answer.as_ref().ok().map(|status| status.leader == status.voter),
            term: said(|status| status.term),
            commit_index: said(|status| status.commit_index),
            applied_index: said(|status| status.applied_index),
            last_index: said(|status| status.last_index),
            snapshot_index: said(|status| status.snapshot_index),
            membership_epoch: said(|status| status.membership_epoch),
            placement_epoch: said(|status| status.placement_epoch),
            cosign_refused: answer.as_ref().ok().and_then(|status| status.cosign_refused),
            error: answer.err(),
            matched_index,
            name: member.name,
            voter: member.voter,
            region: member.region,
            role: member.role,
            address: member.address,
        }
    };
    answers.into_iter().map(row).collect()
}

fn table(group: &Group) -> String {
    let mut table = columns([
        "NAME",
        "VOTER",
        "REGION",
        "ROLE",
        "LEADS",
        "TERM",
        "COMMITTED",
        "APPLIED",
        "LAST",
        "SNAPSHOT",
        "MATCHED",
        "EPOCHS",
        "ADDRESS",
        "ERROR",
    ]);
    for row in &group.voters {
        let epochs = row.membership_epoch.zip(row.placement_epoch);
        table.add_row([
            row.name.clone(),
            row.voter.to_string(),
            row.region.clone(),
            row.role.clone(),
            or_dash(row.leads.map(|leads| if leads { "yes" } else { "no" })),
            or_dash(row.term),
            or_dash(row.commit_index),
            or_dash(row.applied_index),
            or_dash(row.last_index),
            or_dash(row.snapshot_index),
            or_dash(row.matched_index),
            or_dash(epochs.map(|(membership, placement)| format!("{membership}/{placement}"))),
            row.address.clone(),
            or_dash(row.error.as_ref()),
        ]);
    }
    table.trim_fmt()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(voter: u64, name: &str, matched_index: Option<u64>) -> GroupMember {
        GroupMember {
            voter,
            name: name.to_owned(),
            region: "fr".to_owned(),
            address: format!("{name}:1"),
            role: "voter".to_owned(),
            matched_index,
        }
    }

    #[test]
    fn what_the_leader_knows_of_a_voter_is_shown_also_when_that_voter_is_silent() {
        let leader = StatusReply {
            voter: 1,
            term: 4,
            leader: 1,
            last_index: 9,
            members: vec![member(1, "a", Some(9)), member(2, "b", Some(7))],
            ..Default::default()
        };
        let rows = rows(vec![
            (member(1, "a", None), Ok(leader)),
            (member(2, "b", None), Err("connection refused".to_owned())),
        ]);
        assert_eq!((rows[0].leads, rows[0].matched_index), (Some(true), Some(9)));
        assert_eq!((rows[1].leads, rows[1].matched_index, rows[1].term), (None, Some(7), None));
        let text = table(&Group { leader: Some("a".to_owned()), voters: rows });
        assert!(text.lines().nth(2).unwrap().ends_with("connection refused"), "{text}");
    }
}
