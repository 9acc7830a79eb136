//! One suite over all transports: whatever carries a frame, the answer is the same bytes.

// Everything here is a test, which clippy sees in #[test] functions only.
#![allow(clippy::unwrap_used)]

mod backlog;
mod nccl;
mod setup;
mod strangers;

use std::net::TcpListener;
use std::time::{Duration, Instant};

use entente_coordinator::link::Links;
use entente_expert_node::NodeHandle;
use entente_expert_node::inproc::InprocLink;
use entente_model::kernels::WeightFormat;
use entente_proto::frame::{Answer, Assignment, Dispatch, Refusal};
use entente_proto::ids::{ExchangeId, ExpertId, LayerId, RequestId};
use entente_proto::link::{LinkEvent, NotSent};
use entente_proto::wire;
use entente_proto::wire::exchange_client::ExchangeClient;
use tokio::runtime::Runtime;
use tokio_stream::StreamExt;
use tonic::transport::Endpoint;

use setup::*;

/// Each check runs once over each transport.
macro_rules! over_all_transports {
    ($($check:ident),+ $(,)?) => {
        mod inproc { $(#[test] fn $check() { super::$check(super::open_inproc); })+ }
        mod grpc { $(#[test] fn $check() { super::$check(|node| super::GRPC.open(node)); })+ }
        mod grpc_tls {
            $(#[test] fn $check() { super::$check(|node| super::GRPC_TLS.open(node)); })+
        }
        mod stream { $(#[test] fn $check() { super::$check(|node| super::STREAM.open(node)); })+ }
        mod stream_tls {
            $(#[test] fn $check() { super::$check(|node| super::STREAM_TLS.open(node)); })+
        }
        mod by_nccl { $(#[test] fn $check() { super::$check(super::nccl::open); })+ }
    };
}

over_all_transports! {
    answers_are_the_bytes_that_the_experts_give,
    a_hundred_frames_in_flight_are_each_answered_with_their_own_rows,
    the_largest_frame_gets_through,
    answers_are_taken_while_frames_are_sent,
    what_must_not_be_computed_is_refused,
    a_draining_node_says_so,
}

/// Each check runs once over each transport that has a network in it.
macro_rules! over_networks {
    ($($check:ident),+ $(,)?) => {
        mod network_grpc { $(#[test] fn $check() { super::$check(super::GRPC); })+ }
        mod network_grpc_tls { $(#[test] fn $check() { super::$check(super::GRPC_TLS); })+ }
        mod network_stream { $(#[test] fn $check() { super::$check(super::STREAM); })+ }
        mod network_stream_tls { $(#[test] fn $check() { super::$check(super::STREAM_TLS); })+ }
    };
}

over_networks! {
    a_killed_node_is_noticed_at_once_and_found_again_as_another_incarnation,
    a_node_that_stops_ends_the_link,
    a_node_that_cannot_be_reached_is_reported_once_with_the_reason,
    a_node_with_another_name_is_not_used,
    a_node_that_says_nothing_is_given_up,
}

fn answers_are_the_bytes_that_the_experts_give(open: fn(NodeHandle) -> Open) {
    for weights in [WeightFormat::F32, WeightFormat::Bf16] {
        let open = open(load(weights));
        let frame = frame(&open.info, 1, 2, 5);
        let answer = open.ask(frame.clone());
        assert_eq!((answer.exchange, answer.fence), (frame.exchange, Some(frame.fence)));
        assert_eq!(answer.result.unwrap(), expected(&frame, weights));
    }
}

fn a_hundred_frames_in_flight_are_each_answered_with_their_own_rows(open: fn(NodeHandle) -> Open) {
    let open = open(load(WeightFormat::Bf16));
    let frames: Vec<Dispatch> =
        (0..100).map(|i| frame(&open.info, i, (i % 3) as u16, 1 + i as usize % 7)).collect();
    let alone: Vec<Answer> = frames.iter().map(|frame| open.ask(frame.clone())).collect();
    for frame in frames.into_iter().rev() {
        open.send(frame);
    }
    let mut together: Vec<Answer> = (0..100).map(|_| open.answer()).collect();
    together.sort_by_key(|answer| answer.exchange);
    assert_eq!(together, alone);
}

fn the_largest_frame_gets_through(open: fn(NodeHandle) -> Open) {
    let open = open(load(WeightFormat::F32));
    let frame = largest(&open.info, 1);
    let answer = open.ask(frame.clone());
    assert_eq!(answer.check(&frame), Ok(()));
    assert!(answer.result.is_ok());
}

/// More than the sockets' buffers hold goes both ways before anybody asks for an answer: neither
/// end may wait for the other for ever.
fn answers_are_taken_while_frames_are_sent(open: fn(NodeHandle) -> Open) {
    const FRAMES: u64 = 12;
    let open = open(load(WeightFormat::F32));
    let frame = largest(&open.info, 0);
    for number in 0..FRAMES {
        open.send(Dispatch { exchange: ExchangeId(number), ..frame.clone() });
    }
    for _ in 0..FRAMES {
        let answer = open.answer();
        assert!(answer.result.is_ok(), "{:?}", answer.result);
    }
}

fn what_must_not_be_computed_is_refused(open: fn(NodeHandle) -> Open) {
    type Spoil = fn(&mut Dispatch);
    let cases: [(&str, Spoil); 8] = [
        ("stale fence", |f| f.fence.incarnation.0 -= 1),
        ("stale fence", |f| f.fence.model_digest.0[0] ^= 1),
        ("region refused", |f| f.allowed_regions = ["se".parse().unwrap()].into()),
        ("region refused", |f| f.allowed_regions.clear()),
        ("invalid frame: layer 3", |f| f.layer = LayerId(3)),
        ("invalid frame: layer 1 has only 8", |f| f.assignments[0].expert = ExpertId(8)),
        ("invalid frame: hidden", |f| {
            f.hidden = 32;
            f.assignments.truncate(1);
        }),
        ("expert not held", |f| {
            f.assignments = (0..8).map(|e| Assignment { row: 0, expert: ExpertId(e) }).collect();
        }),
    ];
    let open = open(load(WeightFormat::F32));
    for (reason, spoil) in cases {
        let mut bad = frame(&open.info, 1, 1, 2);
        spoil(&mut bad);
        bad.requests = vec![(RequestId(1), bad.assignments.len() as u32)];
        let refusal = open.ask(bad).result.unwrap_err().to_string();
        assert!(refusal.starts_with(reason), "{refusal} does not say {reason}");
    }
    assert!(open.ask(frame(&open.info, 2, 1, 2)).result.is_ok(), "the node takes good frames");
}

fn a_draining_node_says_so(open: fn(NodeHandle) -> Open) {
    let node = load(WeightFormat::F32);
    let open = open(node.clone());
    node.drain();
    assert_eq!(open.ask(frame(&open.info, 1, 1, 2)).result, Err(Refusal::Draining));
}

fn a_killed_node_is_noticed_at_once_and_found_again_as_another_incarnation(network: Network) {
    let client = Runtime::new().unwrap();
    let server = network.serve(load(WeightFormat::F32), "127.0.0.1:0");
    let mut links = network.dial(&name(), &server.address, &client);
    let before = up(&mut links);
    let killed = Instant::now();
    let address = server.kill();
    down(&mut links);
    assert!(killed.elapsed() < Duration::from_secs(1), "took {:?}", killed.elapsed());
    assert_eq!(links.send(NODE, frame(&before, 1, 1, 1)), Err(NotSent));

    let _server = network.serve(load(WeightFormat::F32), &address);
    let after = up(&mut links);
    assert!(after.fence.incarnation > before.fence.incarnation);
    links.send(NODE, frame(&before, 2, 1, 1)).unwrap();
    let LinkEvent::Answer(answer) = event(&mut links) else { panic!("no answer") };
    assert_eq!(answer.result, Err(Refusal::StaleFence(Box::new(after.fence))));
}

fn a_node_that_stops_ends_the_link(network: Network) {
    let client = Runtime::new().unwrap();
    let server = network.serve(load(WeightFormat::F32), "127.0.0.1:0");
    let mut links = network.dial(&name(), &server.address, &client);
    let info = up(&mut links);
    links.send(NODE, frame(&info, 1, 1, 2)).unwrap();
    assert!(matches!(event(&mut links), LinkEvent::Answer(_)));
    server.stop();
    let reason = down(&mut links);
    assert!(reason.starts_with("the node ended the "), "{reason}");
}

fn a_node_that_cannot_be_reached_is_reported_once_with_the_reason(network: Network) {
    let client = Runtime::new().unwrap();
    // A port that was free a moment ago.
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut links = network.dial(&name(), &address.to_string(), &client);
    let reason = down(&mut links);
    assert!(reason.contains(&address.to_string()) && reason.contains("refused"), "{reason}");
    let again = links.next(Duration::from_millis(300));
    assert!(again.is_none(), "{again:?}");
}

fn a_node_with_another_name_is_not_used(network: Network) {
    let server = network.serve(load(WeightFormat::F32), "127.0.0.1:0");
    let other = "fr-expert-2".parse().unwrap();
    let mut links = network.dial(&other, &server.address, &server.runtime);
    let reason = down(&mut links);
    let expected = if network.tls {
        "the peer is spiffe://test/region/fr/role/expert/node/fr-expert-1, expected was expert \
         fr-expert-2 of test in fr"
    } else {
        "another node answered: fr-expert-1"
    };
    assert!(reason.ends_with(expected), "{reason}");
    let info = load(WeightFormat::F32).info();
    assert_eq!(links.send(NODE, frame(&info, 1, 1, 1)), Err(NotSent));
}

fn a_node_that_says_nothing_is_given_up(network: Network) {
    let client = Runtime::new().unwrap();
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = silent.local_addr().unwrap().to_string();
    let began = Instant::now();
    let reason = down(&mut network.dial(&name(), &address, &client));
    assert!(began.elapsed() < Duration::from_secs(8), "{reason} after {:?}", began.elapsed());
}

#[test]
fn of_a_link_that_was_given_up_or_replaced_nothing_is_heard() {
    let node = load(WeightFormat::F32);
    let mut links = Links::new().unwrap();
    let add = |links: &mut Links| {
        let node = node.clone();
        links.add(NODE, |mailbox| Box::new(InprocLink::open(NODE, node, mailbox)));
    };
    add(&mut links);
    links.remove(NODE);
    assert!(links.next(Duration::ZERO).is_none(), "it had reported that it was up");
    add(&mut links);
    add(&mut links);
    up(&mut links);
    assert!(links.next(Duration::ZERO).is_none(), "only the link that is there is up");
}

#[test]
fn a_malformed_frame_is_refused_by_its_number_and_the_stream_lives() {
    let node = load(WeightFormat::F32);
    let info = node.info();
    let server = GRPC.serve(node, "127.0.0.1:0");
    let good: wire::Dispatch = frame(&info, 2, 1, 2).into();
    let mut bad = wire::Dispatch { exchange_id: 1, ..good.clone() };
    bad.rows = bad.rows.slice(1..);
    let answers: Vec<wire::Combine> = server.runtime.block_on(async {
        let endpoint = Endpoint::from_shared(format!("http://{}", server.address)).unwrap();
        let mut client = ExchangeClient::new(endpoint.connect().await.unwrap());
        let answers = client.stream(tokio_stream::iter([bad, good])).await.unwrap();
        answers.into_inner().collect::<Result<_, _>>().await.unwrap()
    });
    let by_number = |id: u64| {
        let answer = answers.iter().find(|answer| answer.exchange_id == id).unwrap();
        Answer::try_from(answer.clone()).unwrap().result
    };
    let refusal = by_number(1).unwrap_err().to_string();
    assert_eq!(refusal, "invalid frame: rows has 511 bytes, expected 512");
    assert!(by_number(2).is_ok());
}
