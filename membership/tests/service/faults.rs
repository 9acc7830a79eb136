//! Voters stop and come back.

use std::time::{Duration, Instant};

use entente_membership::client::ClientError;
use entente_membership::service::{Config, ServiceError};
use entente_membership::state::Expect;
use entente_proto::identity::Role;

use crate::world::{LONG, World, put, value};

fn propose(world: &World, key: &str, text: &str) {
    let client = world.operator();
    let proposed = client.propose(LONG, Expect::default(), put(key, text, None));
    world.runtime.block_on(proposed).unwrap();
}

#[test]
fn a_voter_restarted_from_its_disk_catches_up() {
    let mut world = World::of(3);
    let follower = (world.leader() + 1) % 3;
    propose(&world, "before", "x");
    world.kill(follower);
    propose(&world, "meanwhile", "y");
    world.start(follower);
    world.everywhere("all of it is there", |state| {
        value(state, "before").is_some() && value(state, "meanwhile").is_some()
    });
}

#[test]
fn a_voter_that_is_far_behind_is_sent_a_snapshot() {
    let mut world = World::of(3);
    let leader = world.leader();
    let follower = (leader + 1) % 3;
    world.kill(follower);
    let channel = world.dial(&world.credentials(Role::Operator, "ops"), leader);
    let mut admin = entente_proto::wire::admin_client::AdminClient::new(channel);
    // More entries than a snapshot leaves in the log.
    let client = world.operator();
    world.runtime.block_on(async {
        for round in 0..1_100_u32 {
            let command = put("key", &round.to_string(), None);
            client.propose(LONG, Expect::default(), command).await.unwrap();
        }
        let request = entente_proto::wire::TakeSnapshotRequest {};
        let taken = admin.take_snapshot(request).await.unwrap().into_inner();
        assert!(taken.index > 1_100);
    });
    world.until("the log is cut", || {
        let status = world.handle(leader).status().borrow().clone();
        (status.base > 10).then_some(())
    });
    world.start(follower);
    world.everywhere("the last is there", |state| value(state, "key").as_deref() == Some("1099"));
}

#[test]
fn a_whole_cluster_that_stops_comes_back_as_it_was() {
    let mut world = World::of(3);
    propose(&world, "key", "kept");
    let epoch = world.handle(0).state().borrow().membership_epoch();
    (0..3).for_each(|i| world.shut_down(i));
    (0..3).for_each(|i| world.start(i));
    world.everywhere("the record is there", |state| value(state, "key").as_deref() == Some("kept"));
    assert!(world.handle(0).state().borrow().membership_epoch() >= epoch);
}

#[test]
fn a_leader_that_is_shut_down_hands_over() {
    let mut world = World::of(3);
    let leader = world.leader();
    propose(&world, "key", "value");
    let began = Instant::now();
    world.shut_down(leader);
    assert_ne!(world.leader(), leader);
    propose(&world, "key", "another");
    assert!(began.elapsed() < LONG);
}

#[test]
fn without_a_quorum_proposals_fail_clearly_the_state_stays_and_it_heals() {
    let mut world = World::of(3);
    propose(&world, "key", "last");
    let leader = world.leader();
    let others: Vec<usize> = (0..3).filter(|i| *i != leader).collect();
    world.everywhere("the record is there", |state| value(state, "key").is_some());
    let address = world.address(leader);
    others.iter().for_each(|i| world.kill(*i));
    world.until("it leads no more", || {
        (!world.handle(leader).status().borrow().is_leader).then_some(())
    });

    let client = world.client(Role::Operator, "ops", vec![address]);
    let watched = {
        let _inside = world.runtime.enter();
        client.watch()
    };
    let short = Duration::from_millis(600);
    let proposed = client.propose(short, Expect::default(), put("key", "never", None));
    let error = world.runtime.block_on(proposed).unwrap_err();
    assert!(matches!(error, ClientError::Deadline(_)), "{error:?}");
    let read = world.runtime.block_on(world.handle(leader).read(short));
    assert!(read.is_none(), "a read was confirmed without a quorum");
    // What was agreed on last is still told to whoever asks.
    let state = world.until("the last state is seen", || watched.borrow().clone());
    assert_eq!(value(&state, "key").as_deref(), Some("last"));

    others.iter().for_each(|i| world.start(*i));
    propose(&world, "key", "healed");
    world.until("the watcher sees it", || {
        let state = watched.borrow().clone()?;
        (value(&state, "key")? == "healed").then_some(())
    });
}

#[test]
fn a_watch_resumes_at_another_voter_and_never_goes_back() {
    let mut world = World::of(3);
    world.leader();
    let client = world.operator();
    let watched = {
        let _inside = world.runtime.enter();
        client.watch()
    };
    let (mut last, mut seen) = (0, 0);
    for round in 0..9_u32 {
        propose(&world, "key", &round.to_string());
        world.until("the round is seen", || {
            let state = watched.borrow().clone()?;
            assert!(state.applied_index() >= last, "the watch went back");
            last = state.applied_index();
            (value(&state, "key")? == round.to_string()).then_some(())
        });
        seen += 1;
        let voter = round as usize % 3;
        world.kill(voter);
        world.start(voter);
    }
    assert_eq!(seen, 9);
}

#[test]
fn a_disk_of_another_voter_is_not_used() {
    let mut world = World::of(3);
    world.leader();
    world.kill(0);
    let config = world.config(&world.address(1), "voter-0");
    world.kill(1);
    let error = world.run_voter(1, config).unwrap();
    assert!(matches!(error, ServiceError::Disk(_)), "{error:?}");
    assert!(error.to_string().contains("of voter 1, which is voter-0, not voter-1"), "{error}");
}

#[test]
fn a_founder_that_lost_its_disk_does_not_begin_again_and_may_join_anew() {
    let mut world = World::of(3);
    propose(&world, "key", "value");
    world.everywhere("all voters are registered", |state| {
        let mut voters = state.nodes().filter(|node| node.spec.role.votes());
        voters.all(|node| node.incarnation.is_some())
    });
    let lost = (world.leader() + 1) % 3;
    world.kill(lost);
    let config = world.config(&world.address(lost), &format!("voter-{lost}"));
    std::fs::remove_dir_all(&config.data_dir).unwrap();
    let error = world.run_voter(lost, config.clone()).unwrap();
    assert!(error.to_string().contains("has been in the cluster before"), "{error}");
    world.start_as(lost, Config { join: true, ..config });
    assert_eq!(world.handle(lost).status().borrow().id, 4);
}

#[test]
fn times_that_do_not_fit_end_the_start() {
    let world = World::founded_with(1);
    let config = Config { election_ms: 10, ..world.config(&world.address(0), "voter-0") };
    let error = world.run_voter(0, config).unwrap();
    assert!(error.to_string().starts_with("membership.election_ms is 10"), "{error}");
}

/// Prints how long the control plane is away when its leader is killed.
#[test]
fn the_control_plane_comes_back_after_its_leader_is_killed() {
    let mut world = World::of(3);
    let client = world.operator();
    let mut took_ms = Vec::new();
    for round in 0..20 {
        propose(&world, "key", "before");
        let leader = world.leader();
        let command = put("key", &round.to_string(), None);
        let (began, proposed) = world.kill_and(leader, {
            let client = client.clone();
            async move { client.propose(LONG, Expect::default(), command).await }
        });
        proposed.unwrap();
        took_ms.push(u64::try_from(began.elapsed().as_millis()).unwrap());
        world.disk_given_up(leader);
        world.start(leader);
    }
    took_ms.sort_unstable();
    println!("a proposal commits after the leader is killed, ms: {took_ms:?}");
    println!("p50 {} p99 {}", took_ms[9], took_ms[19]);
}
