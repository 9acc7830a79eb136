//! What is proposed is committed once, whoever is asked and whatever breaks.

use entente_membership::net::Reason;
use entente_membership::state::{Expect, RecordKind};
use entente_proto::identity::Role;
use std::time::Duration;

use crate::world::{LONG, World, put, value};

#[test]
fn three_voters_elect_one_and_all_come_to_what_a_follower_was_asked_for() {
    let world = World::of(3);
    let follower = (world.leader() + 1) % 3;
    let handle = world.handle(follower);
    let applied = handle.propose(LONG, Expect::default(), put("key", "value", Some(0)));
    world.runtime.block_on(applied).unwrap();
    world.everywhere("the record is there", |state| value(state, "key").is_some());
}

#[test]
fn each_voter_registers_itself_and_takes_part() {
    let world = World::of(3);
    world.everywhere("all voters are active with an incarnation", |state| {
        let voters = state.nodes().filter(|node| node.spec.role.votes());
        voters.into_iter().all(|node| {
            node.incarnation.is_some() && node.state == entente_membership::state::NodeState::Active
        })
    });
}

/// Appends to one record, each time at the revision that the last time gave. An append that is
/// applied twice, or not at all, leaves the record at another value.
#[test]
fn proposals_through_followers_are_applied_once_although_voters_are_killed_meanwhile() {
    let mut world = World::of(3);
    let client = world.operator();
    let mut revision = 0;
    for round in 0..30_u64 {
        if round % 10 == 5 {
            // The connections of whoever leads are cut with proposals on them.
            let leader = world.leader();
            let proposal = client.clone();
            let command = put("count", &round.to_string(), Some(revision));
            let proposed = world
                .runtime
                .spawn(async move { proposal.propose(LONG, Expect::default(), command).await });
            world.kill(leader);
            let applied = world.runtime.block_on(proposed).unwrap().unwrap();
            revision = revision_of(applied);
            world.start(leader);
            continue;
        }
        let command = put("count", &round.to_string(), Some(revision));
        let applied = world.runtime.block_on(client.propose(LONG, Expect::default(), command));
        revision = revision_of(applied.unwrap_or_else(|error| panic!("round {round}: {error}")));
    }
    // Each append raised the revision by exactly one.
    assert_eq!(revision, 30);
    world.everywhere("the last append is there", |state| {
        let record = state.record(RecordKind::Tenant, "count");
        record.is_some_and(|record| record.revision == 30 && record.value == b"29"[..])
    });
}

fn revision_of(applied: entente_membership::state::Applied) -> u64 {
    match applied {
        entente_membership::state::Applied::Revision(revision) => revision,
        other => panic!("{other:?} is no revision"),
    }
}

#[test]
fn a_follower_refuses_a_proposal_and_names_the_leader() {
    let world = World::of(3);
    let leader = world.leader();
    let follower = (leader + 1) % 3;
    let channel = world.dial(&world.credentials(Role::Operator, "ops"), follower);
    let mut client = entente_proto::wire::membership_client::MembershipClient::new(channel);
    let request = entente_membership::state::Request {
        session: entente_membership::state::SessionId(0),
        sequence: 0,
        at_ms: 0,
        expect: Expect::default(),
        command: entente_membership::state::Command::OpenSession,
    };
    let message = entente_proto::wire::ProposeRequest { request: Some(request.to_wire()) };
    let refused = world.runtime.block_on(client.propose(message)).unwrap_err();
    assert_eq!(Reason::of(&refused), Some(Reason::NotLeader));
    assert_eq!(Reason::leader_in(&refused), Some(world.address(leader).as_str()));
}

#[test]
fn a_read_at_a_follower_sees_what_was_committed_before_it() {
    let world = World::of(3);
    let follower = (world.leader() + 1) % 3;
    let client = world.operator();
    for round in 0..20 {
        let text = round.to_string();
        let proposed = client.propose(LONG, Expect::default(), put("key", &text, None));
        let state = world.runtime.block_on(async {
            proposed.await.unwrap();
            world.handle(follower).read(Duration::from_secs(5)).await.unwrap()
        });
        assert_eq!(value(&state, "key"), Some(text));
    }
}
