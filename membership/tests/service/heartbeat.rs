//! Expert nodes register and report.

use std::collections::BTreeSet;
use std::time::Duration;

use entente_membership::net::Reason;
use entente_membership::served::{SERVED_MODEL_KEY, ServedModel};
use entente_membership::service::{pack_experts, unpack_experts};
use entente_membership::state::{Command, Expect, NodeState, RecordKind};
use entente_proto::identity::Role;
use entente_proto::ids::{LayerId, ModelDigest};
use entente_proto::placement::ModelShape;
use entente_proto::wire;
use entente_proto::wire::membership_client::MembershipClient;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

use crate::world::{LONG, World};

type Stream = (mpsc::Sender<wire::HeartbeatReport>, Streaming<wire::HeartbeatOrders>);

fn request() -> wire::RegisterRequest {
    wire::RegisterRequest {
        address: "127.0.0.1:9".to_owned(),
        kernel_class: "test".to_owned(),
        model_digest: vec![7; 32].into(),
        ..Default::default()
    }
}

async fn register(
    world: &World,
    node: &str,
    request: wire::RegisterRequest,
) -> Result<wire::RegisterReply, entente_membership::client::ClientError> {
    let addresses = world.roster.voters().iter().map(|voter| voter.address.clone()).collect();
    let client = world.client(Role::Expert, node, addresses);
    let registered = client.leader(LONG, |channel| {
        let request = request.clone();
        async move { Ok(MembershipClient::new(channel).register(request).await?.into_inner()) }
    });
    registered.await
}

async fn stream(world: &World, node: &str) -> Stream {
    let addresses = world.roster.voters().iter().map(|voter| voter.address.clone()).collect();
    let client = world.client(Role::Expert, node, addresses);
    let opened = client.leader(LONG, |channel| async move {
        let (reports, stream) = mpsc::channel(4);
        let mut client = MembershipClient::new(channel);
        let orders = client.heartbeat(ReceiverStream::new(stream)).await?;
        Ok((reports, orders.into_inner()))
    });
    opened.await.unwrap()
}

async fn report(
    (reports, orders): &mut Stream,
    report: wire::HeartbeatReport,
) -> Result<wire::HeartbeatOrders, Status> {
    // The stream may have ended for its last report; its end is read below.
    let _ = reports.send(report).await;
    Ok(orders.message().await?.unwrap())
}

fn alive(registered: wire::RegisterReply, sequence: u64) -> wire::HeartbeatReport {
    let wire::RegisterReply { node, incarnation } = registered;
    let held = Some(pack_experts(&BTreeSet::new()));
    wire::HeartbeatReport { node, incarnation, sequence, held, ..Default::default() }
}

#[test]
fn a_node_that_nobody_listed_registers_and_is_answered() {
    let world = World::of(3);
    world.runtime.block_on(async {
        let first = register(&world, "se-new", request()).await.unwrap();
        let second = register(&world, "se-new", request()).await.unwrap();
        assert_eq!(first.node, second.node);
        assert!(second.incarnation > first.incarnation);
        let mut stream = stream(&world, "se-new").await;
        let orders = report(&mut stream, alive(second, 1)).await.unwrap();
        assert_eq!(orders.sequence, 1);
        assert!(orders.membership_epoch > 1);
        assert_eq!(orders.wanted.as_deref().and_then(unpack_experts), Some(BTreeSet::new()));
        // What has not changed is not said again.
        assert_eq!(report(&mut stream, alive(second, 2)).await.unwrap().wanted, None);
    });
    world.everywhere("the new node is a member in its certificate's region", |state| {
        let node = state.nodes().find(|node| node.spec.name.as_str() == "se-new");
        node.is_some_and(|node| {
            node.spec.region.as_str() == "fr" && node.state != NodeState::Removed
        })
    });
}

#[test]
fn a_node_does_not_report_for_another() {
    let world = World::of(3);
    world.runtime.block_on(async {
        let other = register(&world, "fr-expert-1", request()).await.unwrap();
        register(&world, "fr-thief", request()).await.unwrap();
        let mut stream = stream(&world, "fr-thief").await;
        let refused = report(&mut stream, alive(other, 1)).await.unwrap_err();
        assert_eq!(refused.code(), Code::PermissionDenied, "{refused}");
    });
}

#[test]
fn an_earlier_start_of_a_node_is_fenced() {
    let world = World::of(3);
    world.runtime.block_on(async {
        let first = register(&world, "fr-expert-1", request()).await.unwrap();
        let mut stream = stream(&world, "fr-expert-1").await;
        report(&mut stream, alive(first, 1)).await.unwrap();
        register(&world, "fr-expert-1", request()).await.unwrap();
        let refused = report(&mut stream, alive(first, 2)).await.unwrap_err();
        assert_eq!(Reason::of(&refused), Some(Reason::Fenced), "{refused}");
    });
}

#[test]
fn a_node_with_another_model_or_another_manifest_is_turned_away() {
    let world = World::of(1);
    world.runtime.block_on(async {
        agree_on_model(&world).await;
        let other = wire::RegisterRequest { model_digest: vec![1; 32].into(), ..request() };
        let refused = register(&world, "fr-expert-1", other).await.unwrap_err();
        assert_eq!(refused.reason(), Some(Reason::OtherModel), "{refused}");
        let manifest = Some(vec![5; 32].into());
        let other = wire::RegisterRequest { manifest_sha256: manifest, ..request() };
        let refused = register(&world, "fr-expert-1", other).await.unwrap_err();
        assert_eq!(refused.reason(), Some(Reason::OtherModel), "{refused}");
        assert!(refused.to_string().contains("other weights"), "{refused}");
        register(&world, "fr-expert-1", request()).await.unwrap();
    });
}

fn model() -> ServedModel {
    let shape = ModelShape { layers: vec![(LayerId(0), 4)], expert_bytes: 1 };
    ServedModel { digest: ModelDigest([7; 32]), shape, manifest_sha256: Some([4; 32]) }
}

/// What a coordinator says first.
async fn agree_on_model(world: &World) {
    let command = Command::PutRecord {
        kind: RecordKind::Model,
        key: SERVED_MODEL_KEY.to_owned(),
        value: model().encode(),
        revision: Some(0),
    };
    let operator = world.operator();
    operator.propose(LONG, Expect::default(), command).await.unwrap();
    let replicas = Command::SetReplicas("fr".parse().unwrap(), 1);
    operator.propose(LONG, Expect::default(), replicas).await.unwrap();
}

#[test]
fn a_node_is_active_once_it_holds_what_it_is_told_to_and_down_when_it_falls_silent() {
    let world = World::of(3);
    let node_of = |state: &entente_membership::state::State| {
        state.node(&crate::world::name("fr-expert-1")).unwrap().clone()
    };
    let registered = world.runtime.block_on(async {
        agree_on_model(&world).await;
        let registered = register(&world, "fr-expert-1", request()).await.unwrap();
        let mut stream = stream(&world, "fr-expert-1").await;
        let mut held = BTreeSet::new();
        for sequence in 1.. {
            let held_now = Some(pack_experts(&held));
            let message = wire::HeartbeatReport { held: held_now, ..alive(registered, sequence) };
            let orders = report(&mut stream, message).await.unwrap();
            if let Some(wanted) = orders.wanted.as_deref().and_then(unpack_experts) {
                held = wanted;
            }
            let state = world.handle(0).state().borrow().clone();
            let placed = state.placement().experts_of(node_of(&state).id);
            if node_of(&state).state == NodeState::Active && placed.len() == 4 {
                break;
            }
            assert!(sequence < 500, "it does not become active: {state:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        registered
    });
    // From here on it says nothing.
    world.everywhere("it is down", |state| node_of(state).state == NodeState::Down);
    world.runtime.block_on(async {
        let mut stream = stream(&world, "fr-expert-1").await;
        let refused = report(&mut stream, alive(registered, 1_000)).await.unwrap_err();
        assert_eq!(Reason::of(&refused), Some(Reason::Fenced), "{refused}");
    });
}

#[test]
fn heartbeats_end_with_the_leadership_that_they_were_sent_to() {
    let mut world = World::of(3);
    let leader = world.leader();
    let (registered, mut stream) = world.runtime.block_on(async {
        let registered = register(&world, "fr-expert-1", request()).await.unwrap();
        (registered, stream(&world, "fr-expert-1").await)
    });
    // Without the others it cannot lead on.
    (0..3).filter(|i| *i != leader).for_each(|i| world.kill(i));
    let refused = world.runtime.block_on(async {
        for sequence in 1.. {
            if let Err(status) = report(&mut stream, alive(registered, sequence)).await {
                return status;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        unreachable!("the stream goes on for ever");
    });
    assert_eq!(Reason::of(&refused), Some(Reason::NotLeader), "{refused}");
}
