//! What a voter refuses; that it works is shown by the simulator.

use super::*;
use crate::state::{Applied, Command, Expect, Role};

fn coordinator(name: &str) -> NodeSpec {
    NodeSpec {
        name: name.parse().unwrap(),
        region: "fr".parse().unwrap(),
        site: String::new(),
        role: Role::Coordinator,
        address: "127.0.0.1:1".to_owned(),
        memory_bytes: None,
        kernel_class: String::new(),
        device: None,
    }
}

fn voter(of: usize) -> Voter {
    let names = ["a", "b", "c"].iter().take(of);
    let (cluster, durable) = genesis(names.map(|name| coordinator(name)).collect()).unwrap();
    let raft = Config { id: 1, heartbeat_ticks: 2, election_ticks: 10, seed: 1 };
    let settings =
        Settings { raft, cluster, snapshot_entries: 8, snapshot_keep: 2, tells_changes: false };
    Voter::open(settings, durable).unwrap()
}

/// Does all there is to do, on a disk that is always at once done.
fn settle(voter: &mut Voter) -> Vec<Answer> {
    let mut answers = Vec::new();
    while voter.ready().unwrap().is_some() {
        answers.append(&mut voter.persisted().unwrap().answers);
    }
    answers
}

fn open_session() -> Request {
    let (expect, command) = (Expect::default(), Command::OpenSession);
    Request { session: SessionId(0), sequence: 0, at_ms: 0, expect, command }
}

fn append(voter: &Voter, index: u64) -> wire::RaftEnvelope {
    let entry = wire::RaftEntry {
        entry_type: 0,
        term: 2,
        index,
        data: Bytes::new(),
        context: Bytes::new(),
    };
    let mut entries = Vec::new();
    entente_proto::list::push(&mut entries, &entry);
    let message = wire::RaftMessage {
        msg_type: 3,
        to: 1,
        from: 2,
        term: 2,
        log_term: 1,
        index: 1,
        entries: entries.into(),
        ..wire::RaftMessage::default()
    };
    let cluster_id = Bytes::copy_from_slice(&voter.settings.cluster.0);
    let message = Some(message);
    wire::RaftEnvelope { cluster_id, from: 2, to: 1, message, ..wire::RaftEnvelope::default() }
}

#[test]
fn a_lone_voter_elects_itself_and_answers() {
    let mut voter = voter(1);
    voter.campaign().unwrap();
    settle(&mut voter);
    voter.propose(&open_session()).unwrap();
    let answers = settle(&mut voter);
    assert!(matches!(answers[..], [Answer { outcome: Ok(Applied::Session(_)), .. }]));
}

#[test]
fn a_follower_proposes_nothing_and_says_who_leads() {
    let mut voter = voter(3);
    assert_eq!(voter.propose(&open_session()), Err(NotProposed::NotLeader { leader: None }));
    assert_eq!(voter.receive(append(&voter, 2)).unwrap(), Received::Taken);
    settle(&mut voter);
    let refused = voter.propose(&open_session()).unwrap_err();
    assert_eq!(refused.to_string(), "not the leader; try voter 2");
}

#[test]
fn a_message_for_another_or_out_of_order_is_ignored() {
    let mut voter = voter(3);
    let good = append(&voter, 2);
    let spoilt = [
        wire::RaftEnvelope { cluster_id: Bytes::from_static(&[0; 16]), ..good.clone() },
        wire::RaftEnvelope { to: 2, ..good.clone() },
        wire::RaftEnvelope { from: 3, ..good.clone() },
        wire::RaftEnvelope { message: None, ..good.clone() },
        // raft-rs would panic on this one.
        append(&voter, 7),
    ];
    for envelope in spoilt {
        assert_eq!(voter.receive(envelope.clone()).unwrap(), Received::Ignored, "{envelope:?}");
    }
    voter.receive(wire::RaftEnvelope { incarnation: 5, ..good.clone() }).unwrap();
    settle(&mut voter);
    let older = wire::RaftEnvelope { incarnation: 4, ..good };
    assert_eq!(voter.receive(older).unwrap(), Received::Ignored);
}

#[test]
fn nothing_may_happen_before_the_batch_is_durable() {
    let mut voter = voter(1);
    voter.campaign().unwrap();
    assert!(voter.persisted().is_err());
    voter.ready().unwrap().unwrap();
    assert!(voter.tick().is_err());
    assert!(voter.ready().is_err());
    assert_eq!(voter.propose(&open_session()), Err(NotProposed::Busy));
}

#[test]
fn a_follower_whose_state_differs_from_its_leaders_stops() {
    let mut voter = voter(3);
    while voter.state.applied_index() < crate::state::MARK_INTERVAL {
        voter.state.apply_entry(voter.state.applied_index() + 1, None).unwrap();
    }
    let mark = voter.state.marks().next().unwrap();
    let told = |sha256: [u8; 32]| wire::HashMark {
        index: mark.index,
        sha256: Bytes::copy_from_slice(&sha256),
    };
    let mut envelope = append(&voter, 2);
    envelope.mark = Some(told([0; 32]));
    let error = voter.receive(envelope.clone()).unwrap_err();
    assert!(matches!(error, VoterError::Differs { index: 1_024, leader: 2 }));
    envelope.mark = Some(told(mark.sha256));
    assert_eq!(voter.receive(envelope).unwrap(), Received::Taken);
}

#[test]
fn only_a_minted_voter_joins_and_the_last_one_stays() {
    let mut voter = voter(1);
    voter.campaign().unwrap();
    settle(&mut voter);
    let refused = voter.change(Change::AddLearner(2)).unwrap_err().to_string();
    assert!(refused.contains("voter 2 is not minted"), "{refused}");
    let refused = voter.change(Change::Remove(1)).unwrap_err().to_string();
    assert!(refused.contains("the last voter cannot leave"), "{refused}");
    let refused = voter.change(Change::Promote(1)).unwrap_err().to_string();
    assert!(refused.contains("1 is not a learner"), "{refused}");
}
