//! Good certificates, and processes that claim to be somebody else.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::Duration;

use entente_membership::audit::Event;
use entente_membership::voter::genesis;
use entente_proto::identity::{Identity, Role};
use entente_proto::wire;
use entente_proto::wire::admin_client::AdminClient;
use entente_proto::wire::exchange_client::ExchangeClient;
use entente_proto::wire::membership_client::MembershipClient;
use entente_proto::wire::raft_client::RaftClient;
use entente_tls::{ALPN_STREAM, Channel, Incoming};
use rustls::client::ResolvesClientCert;
use tonic::{Code, Status};

use crate::certificates::Shown;
use crate::cluster::{Cluster, name_of};

fn good(cluster: &Cluster, process: &Identity) -> Arc<dyn ResolvesClientCert> {
    Shown::Good.of(cluster, process)
}

fn as_(text: &str) -> Identity {
    format!("spiffe://test/{text}").parse().unwrap()
}

/// The one refusal of this caller.
fn refusal(cluster: &Cluster, caller: &Identity) -> Event {
    let mut events = cluster.events(|event| event.caller.as_ref() == Some(caller));
    assert_eq!(events.len(), 1, "{events:?}");
    let event = events.remove(0);
    assert!(!event.allowed, "{event:?}");
    event
}

/// Votes for itself in so late a term that whoever takes it steps down.
fn vote(cluster: &Cluster, caller: &Identity, from: u64) -> Result<(), Status> {
    let (founded, _) = genesis(cluster.roster.specs()).unwrap();
    let message = wire::RaftMessage { msg_type: 5, from, to: 1, term: 1_000, ..Default::default() };
    let envelope = wire::RaftEnvelope {
        cluster_id: founded.0.to_vec().into(),
        from,
        to: 1,
        message: Some(message),
        ..Default::default()
    };
    let mut raft = RaftClient::new(cluster.dial(&good(cluster, caller)));
    cluster.runtime.block_on(raft.deliver(tokio_stream::once(envelope))).map(drop)
}

#[test]
fn an_expert_node_that_votes_is_refused_and_audited() {
    let cluster = Cluster::start();
    let (caller, term) = (name_of(Role::Expert, "fr"), cluster.membership.status().borrow().term);
    let refused = vote(&cluster, &caller, 1).unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied, "{refused}");
    assert_eq!(refusal(&cluster, &caller).call, "/entente.v1.Raft/Deliver");
    assert_eq!(cluster.membership.status().borrow().term, term);
}

#[test]
fn a_voter_of_the_same_name_that_another_region_made_up_is_refused_and_audited() {
    let cluster = Cluster::start();
    for text in [
        "region/se/role/coordinator/node/fr-coordinator",
        "region/fr/role/witness/node/fr-coordinator",
        "region/fr/role/coordinator/node/another",
    ] {
        let caller = as_(text);
        let refused = vote(&cluster, &caller, 1).unwrap_err();
        assert_eq!(refused.code(), Code::PermissionDenied, "{text}: {refused}");
        assert!(refusal(&cluster, &caller).reason.contains("voter 1 is fr-coordinator of fr"));
    }
}

/// Reports for a node, and what is said to that.
fn report(cluster: &Cluster, caller: &Identity, node: &str) -> Status {
    let report = wire::HeartbeatReport { node: cluster.node(node).0, ..Default::default() };
    let mut members = MembershipClient::new(cluster.dial(&good(cluster, caller)));
    cluster.runtime.block_on(async {
        let answers = members.heartbeat(tokio_stream::once(report)).await.unwrap();
        answers.into_inner().message().await.unwrap_err()
    })
}

#[test]
fn a_heartbeat_of_another_node_is_refused_and_audited() {
    let cluster = Cluster::start();
    for (text, node) in [
        ("region/fr/role/expert/node/fr-expert-1", "fr-expert-2"),
        ("region/fr/role/expert/node/fr-expert-1", "fr-coordinator"),
        ("region/se/role/expert/node/fr-expert-2", "fr-expert-2"),
    ] {
        let (caller, before) = (as_(text), cluster.events(|_| true).len());
        let refused = report(&cluster, &caller, node);
        assert_eq!(refused.code(), Code::PermissionDenied, "{text}: {refused}");
        let event = cluster.events(|_| true).remove(before);
        assert_eq!((event.caller.as_ref(), event.allowed), (Some(&caller), false));
        assert!(event.reason.contains(&format!("is {node} of fr")), "{event:?}");
    }
}

#[test]
fn a_node_of_the_same_name_in_another_region_is_not_registered() {
    let cluster = Cluster::start();
    let caller = as_("region/se/role/expert/node/fr-expert-1");
    let mut members = MembershipClient::new(cluster.dial(&good(&cluster, &caller)));
    let said = wire::RegisterRequest { address: "127.0.0.1:1".to_owned(), ..Default::default() };
    let refused = cluster.runtime.block_on(members.register(said)).unwrap_err();
    assert!(refused.message().contains("is a member already"), "{refused}");
}

#[test]
fn an_expert_node_that_sends_frames_as_a_coordinator_is_refused_and_audited_over_grpc() {
    let cluster = Cluster::start();
    for caller in [name_of(Role::Expert, "fr"), name_of(Role::Coordinator, "se")] {
        let channel = cluster.dial_node(&good(&cluster, &caller));
        let frames = tokio_stream::once(wire::Dispatch::default());
        let mut node = ExchangeClient::new(channel);
        let refused = cluster.runtime.block_on(node.stream(frames)).map(drop).unwrap_err();
        assert_eq!(refused.code(), Code::PermissionDenied, "{refused}");
        assert_eq!(refusal(&cluster, &caller).call, "/entente.v1.Exchange/Stream");
    }
}

/// Does the handshake of the byte stream and waits for the node's greeting.
fn greeting(cluster: &Cluster, caller: &Identity) -> Result<Vec<u8>, String> {
    let config = cluster.client_speaking(&good(cluster, caller), ALPN_STREAM);
    let mut channel = Channel::client(config).unwrap();
    let mut socket = TcpStream::connect(&cluster.exchange).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let (mut incoming, mut said) = (Incoming::default(), Vec::new());
    while said.is_empty() {
        let shaken = channel.shake(&mut incoming).map_err(|error| error.to_string())?;
        // The node may have hung up meanwhile, which the next read tells.
        let _ = socket.write_all(&channel.take_owed());
        if shaken {
            channel.open(&mut incoming, |plain| said.extend_from_slice(plain)).unwrap();
        }
        if said.is_empty() {
            match socket.read(incoming.space()) {
                Ok(0) => return Err("the node has hung up".to_owned()),
                Ok(read) => incoming.advance(read),
                Err(error) => return Err(error.to_string()),
            }
        }
    }
    Ok(said)
}

#[test]
fn an_expert_node_that_opens_a_byte_stream_is_refused_and_audited() {
    let cluster = Cluster::start();
    greeting(&cluster, &name_of(Role::Coordinator, "fr")).unwrap();
    for role in [Role::Expert, Role::Witness, Role::Operator] {
        greeting(&cluster, &name_of(role, "fr")).unwrap_err();
        assert_eq!(refusal(&cluster, &name_of(role, "fr")).call, "/entente.v1.Exchange/Stream");
    }
    let other_country = name_of(Role::Coordinator, "se");
    greeting(&cluster, &other_country).unwrap_err();
    assert_eq!(refusal(&cluster, &other_country).reason, "the call is not for its region");
}

#[test]
fn what_an_operator_orders_is_audited_with_what_it_was_about() {
    let cluster = Cluster::start();
    let caller = name_of(Role::Operator, "se");
    let mut admin = AdminClient::new(cluster.dial(&good(&cluster, &caller)));
    // Whatever becomes of them.
    cluster.runtime.block_on(async {
        let name = "fr-expert-2".to_owned();
        let _ = admin.drain(wire::DrainRequest { name: name.clone() }).await;
        let _ = admin.transfer_leader(wire::TransferLeaderRequest { to: name.clone() }).await;
        let _ = admin.take_snapshot(wire::TakeSnapshotRequest {}).await;
        let _ = admin.rebalance(wire::RebalanceRequest::default()).await;
        let remove = wire::change_group_request::Change::Remove(name);
        let _ = admin.change_group(wire::ChangeGroupRequest { change: Some(remove) }).await;
    });
    let orders = cluster.events(|event| event.caller.as_ref() == Some(&caller) && event.allowed);
    let calls: Vec<&str> =
        orders.iter().map(|event| event.call.rsplit('/').next().unwrap()).collect();
    let made = ["Drain", "TransferLeader", "TakeSnapshot", "Rebalance", "ChangeGroup"];
    assert_eq!(calls, made);
    for event in orders.iter().filter(|event| !event.call.ends_with("TakeSnapshot")) {
        let about = event.reason.contains("fr-expert-2") || event.call.ends_with("Rebalance");
        assert!(about, "{event:?}");
    }
}
