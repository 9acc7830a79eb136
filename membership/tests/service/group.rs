//! The raft group changes while it works.

use entente_membership::state::Expect;
use entente_proto::identity::Role;
use entente_proto::wire;
use entente_proto::wire::admin_client::AdminClient;
use entente_proto::wire::change_group_request::Change;
use tonic::{Response, Status};

use crate::world::{LONG, World, put, value};

/// Calls the leader as an operator.
macro_rules! admin {
    ($world:expr, $call:ident, $request:expr) => {{
        let client = $world.operator();
        let request = $request;
        $world.runtime.block_on(client.leader(LONG, |channel| {
            let request = request.clone();
            async move { AdminClient::new(channel).$call(request).await.map(Response::into_inner) }
        }))
    }};
}

fn change(world: &World, change: Change) -> Result<u64, String> {
    let request = wire::ChangeGroupRequest { change: Some(change) };
    let changed = admin!(world, change_group, request);
    changed.map(|reply| reply.voter).map_err(|error| error.to_string())
}

fn propose(world: &World, text: &str) {
    let proposed = world.operator();
    let proposed = proposed.propose(LONG, Expect::default(), put("key", text, None));
    world.runtime.block_on(proposed).unwrap();
}

#[test]
fn status_tells_who_is_in_the_group_and_who_leads() {
    let world = World::of(3);
    let leader = world.leader();
    let status = admin!(world, status, wire::StatusRequest {}).unwrap();
    assert_eq!(status.leader_name, format!("voter-{leader}"));
    let members: Vec<_> = status.members.iter().map(|m| (m.name.as_str(), &*m.role)).collect();
    assert_eq!(members, [("voter-0", "voter"), ("voter-1", "voter"), ("voter-2", "voter")]);
    assert!(status.term > 1);
}

#[test]
fn leadership_is_handed_to_whom_an_operator_names() {
    let world = World::of(3);
    let to = (world.leader() + 1) % 3;
    let request = wire::TransferLeaderRequest { to: format!("voter-{to}") };
    admin!(world, transfer_leader, request).unwrap();
    assert_eq!(world.leader(), to);
    let request = wire::TransferLeaderRequest { to: "fr-expert-1".to_owned() };
    let refused = admin!(world, transfer_leader, request).unwrap_err();
    assert!(refused.to_string().contains("is not in the raft group"), "{refused}");
}

#[test]
fn a_voter_is_removed_and_does_not_come_back_under_its_number() {
    let mut world = World::of(3);
    let follower = (world.leader() + 1) % 3;
    let name = format!("voter-{follower}");
    let removed = change(&world, Change::Remove(name.clone())).unwrap();
    // An operator whose first call got lost on its way back asks again.
    assert_eq!(change(&world, Change::Remove(name.clone())), Ok(removed));
    world.kill(follower);
    propose(&world, "with two");
    let refused = change(&world, Change::AddLearner(name)).unwrap_err();
    assert!(refused.contains("has no disk that could join"), "{refused}");
}

#[test]
fn a_new_witness_joins_learns_is_promoted_and_counts() {
    let mut world = World::of(3);
    propose(&world, "before it came");
    let joiner = world.start_joiner("voter-new");
    change(&world, Change::AddLearner("voter-new".to_owned())).unwrap();
    world.until("the learner has what was before it", || {
        let state = world.handle(joiner).state().borrow().clone();
        value(&state, "key").map(drop)
    });
    world.until("it is promoted", || change(&world, Change::Promote("voter-new".to_owned())).ok());
    // Of four voters any three are a quorum, the new one among them.
    let leader = world.leader();
    let other = (0..3).find(|i| *i != leader).unwrap();
    world.kill(other);
    propose(&world, "with three of four");
    world.everywhere("it is there", |state| {
        value(state, "key").as_deref() == Some("with three of four")
    });
    let status = admin!(world, status, wire::StatusRequest {}).unwrap();
    assert_eq!(status.members.len(), 4);
}

#[test]
fn what_only_the_leader_knows_is_asked_of_the_leader() {
    let world = World::of(3);
    let nodes = admin!(world, nodes, wire::NodesRequest {}).unwrap();
    let names = nodes.nodes.iter().filter_map(|node| node.node.as_ref()?.spec.as_ref());
    let names: Vec<_> = names.map(|spec| spec.name.as_str()).collect();
    assert_eq!(names, ["fr-expert-1", "voter-0", "voter-1", "voter-2"]);
    let follower = (world.leader() + 1) % 3;
    let channel = world.dial(&world.credentials(Role::Operator, "ops"), follower);
    let asked = AdminClient::new(channel);
    let refused: Status = world
        .runtime
        .block_on(async move {
            let mut asked = asked;
            asked.nodes(wire::NodesRequest {}).await
        })
        .unwrap_err();
    let reason = entente_membership::net::Reason::of(&refused);
    assert_eq!(reason, Some(entente_membership::net::Reason::NotLeader));
}
