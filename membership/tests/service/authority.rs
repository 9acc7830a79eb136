//! Who is let in, and what is believed of what they say.

use entente_membership::audit::Sink;
use entente_membership::guard::Guard;
use entente_membership::net::{Bounds, Dialler, Reason};
use entente_membership::raft;
use entente_membership::voter::genesis;
use entente_proto::identity::Role;
use entente_proto::wire;
use entente_proto::wire::admin_client::AdminClient;
use entente_proto::wire::membership_client::MembershipClient;
use entente_proto::wire::raft_client::RaftClient;
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::world::World;

/// A message that would be taken if it came from whom it says it is from.
fn envelope(world: &World, from: u64, to: u64) -> wire::RaftEnvelope {
    let (cluster, _) = genesis(world.roster.specs()).unwrap();
    // Of so late a term that whoever takes it steps down.
    let message = wire::RaftMessage { msg_type: 8, from, to, term: 1_000, ..Default::default() };
    wire::RaftEnvelope {
        cluster_id: cluster.0.to_vec().into(),
        from,
        to,
        message: Some(message),
        ..Default::default()
    }
}

async fn deliver(channel: Channel, envelope: wire::RaftEnvelope) -> Result<(), Status> {
    let stream = tokio_stream::once(envelope);
    RaftClient::new(channel).deliver(stream).await.map(drop)
}

fn status_of(world: &World, i: usize) -> raft::Status {
    world.handle(i).status().borrow().clone()
}

#[test]
fn an_expert_node_delivers_no_raft_messages() {
    let world = World::of(3);
    let leader = world.leader();
    let term = status_of(&world, leader).term;
    let channel = world.dial(&world.credentials(Role::Expert, "fr-expert-1"), leader);
    let delivered = deliver(channel, envelope(&world, 2, 1));
    let refused = world.runtime.block_on(delivered).unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied, "{refused}");
    assert_eq!(status_of(&world, leader).term, term);
}

#[test]
fn a_voter_delivers_messages_in_its_own_name_only() {
    let world = World::of(3);
    world.leader();
    // voter-1 is voter 2 of the genesis, as names are in order.
    let voter = world.credentials(Role::Coordinator, "voter-1");
    let (own, other) = (envelope(&world, 2, 1), envelope(&world, 3, 1));
    let channel = world.dial(&voter, 0);
    let refused = world.runtime.block_on(deliver(channel.clone(), other)).unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied, "{refused}");
    assert!(refused.message().contains("voter 3 is voter-2"), "{refused}");
    world.runtime.block_on(deliver(channel, own)).unwrap();
}

#[test]
fn messages_for_a_cluster_that_was_founded_otherwise_are_refused() {
    let (world, other) = (World::of(1), World::founded_with(2));
    let voter = world.credentials(Role::Coordinator, "voter-1");
    let channel = world.dial(&voter, 0);
    let refused = world.runtime.block_on(deliver(channel, envelope(&other, 2, 1))).unwrap_err();
    assert_eq!(Reason::of(&refused), Some(Reason::OtherCluster));
}

#[test]
fn a_process_with_a_certificate_of_another_authority_is_not_even_connected() {
    let (world, other) = (World::of(1), World::founded_with(1));
    let strangers = other.credentials(Role::Operator, "ops");
    let dialler = Dialler::new(&strangers, None).unwrap();
    let refused = world.runtime.block_on(dialler.dial(&world.address(0))).unwrap_err();
    assert!(refused.to_string().contains("invalid peer certificate"), "{refused}");
}

#[test]
fn an_expert_node_is_no_operator() {
    let world = World::of(1);
    world.leader();
    let channel = world.dial(&world.credentials(Role::Expert, "fr-expert-1"), 0);
    let mut admin = AdminClient::new(channel.clone());
    let refused = world.runtime.block_on(admin.status(wire::StatusRequest {})).unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    let mut members = MembershipClient::new(channel);
    let propose = members.propose(wire::ProposeRequest::default());
    assert_eq!(world.runtime.block_on(propose).unwrap_err().code(), Code::PermissionDenied);
}

#[test]
fn only_a_voter_is_taken_for_one_by_who_dials() {
    let world = World::of(1);
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let expert = world.credentials(Role::Expert, "fr-expert-1");
    world.runtime.block_on(async {
        listener.set_nonblocking(true).unwrap();
        let listener = tokio::net::TcpListener::from_std(listener).unwrap();
        let guard = Guard::new(expert.identity(), Sink::default());
        let _accepted =
            entente_membership::net::accept(listener, &expert, guard, Bounds::default()).unwrap();
        let dialler = Dialler::new(&world.credentials(Role::Operator, "ops"), None).unwrap();
        let refused = dialler.dial(&address).await.unwrap_err().to_string();
        assert!(refused.contains("expected was a coordinator or witness of demo"), "{refused}");
    });
}
