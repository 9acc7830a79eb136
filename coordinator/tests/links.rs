//! One suite over all transports: whatever carries a frame, the answer is the same bytes.

// Everything here is a test, which clippy sees in #[test] functions only.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use entente_coordinator::link::grpc::GrpcLink;
use entente_coordinator::link::stream::StreamLink;
use entente_expert_node::inproc::InprocLink;
use entente_expert_node::{Config, ExpertNode, NodeHandle, serve};
use entente_membership::roster::{Roster, RosterNode};
use entente_model::kernels::{FfnGroup, WeightFormat, select};
use entente_model::{Checkpoint, load_expert};
use entente_proto::frame::{Answer, Assignment, Dispatch, Dtype, ROWS_MAX, Refusal};
use entente_proto::ids::{ExchangeId, ExpertId, LayerId, NodeId, NodeName};
use entente_proto::link::{Link, LinkEvent, LinkEvents, NodeInfo, NotSent};
use entente_proto::wire;
use entente_proto::wire::exchange_client::ExchangeClient;
use tokio::runtime::Runtime;
use tokio::sync::oneshot;
use tokio_stream::StreamExt;
use tonic::transport::Endpoint;

const NODE: NodeId = NodeId(7);
const CHECKPOINT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/mixtral");
const PATIENCE: Duration = Duration::from_secs(20);

fn name() -> NodeName {
    "fr-expert-1".parse().unwrap()
}

/// Loads one of two nodes in fr, so that it holds half of the experts.
fn load(weights: WeightFormat) -> NodeHandle {
    let node = |number: u16| RosterNode {
        name: format!("fr-expert-{number}").parse().unwrap(),
        region: "fr".parse().unwrap(),
        address: format!("127.0.0.1:{number}"),
    };
    let config = Config {
        name: name(),
        region: "fr".parse().unwrap(),
        listen: "127.0.0.1:0".to_owned(),
        model: CHECKPOINT.into(),
        weights,
        threads: Some(1),
        cluster: Roster::new("test".to_owned(), 1, vec![node(1), node(2)]).unwrap(),
    };
    ExpertNode::load(&config, &()).unwrap()
}

struct Events(Sender<LinkEvent>);

impl LinkEvents for Events {
    fn on_event(&self, node: NodeId, event: LinkEvent) {
        assert_eq!(node, NODE);
        // The test that listened may be over.
        let _ = self.0.send(event);
    }
}

/// A link that is up, and what keeps it so.
struct Open {
    info: NodeInfo,
    link: Box<dyn Link>,
    events: Receiver<LinkEvent>,
    _server: Option<Server>,
}

impl Open {
    fn answer(&self) -> Answer {
        match self.events.recv_timeout(PATIENCE) {
            Ok(LinkEvent::Answer(answer)) => answer,
            other => panic!("expected an answer, got {other:?}"),
        }
    }

    fn ask(&self, frame: Dispatch) -> Answer {
        self.link.send(frame).unwrap();
        self.answer()
    }
}

fn up(events: &Receiver<LinkEvent>) -> NodeInfo {
    match events.recv_timeout(PATIENCE) {
        Ok(LinkEvent::Up(info)) => info,
        other => panic!("expected the link to come up, got {other:?}"),
    }
}

fn down(events: &Receiver<LinkEvent>) -> String {
    match events.recv_timeout(PATIENCE) {
        Ok(LinkEvent::Down(reason)) => reason,
        other => panic!("expected the link to go down, got {other:?}"),
    }
}

fn open_inproc(node: NodeHandle) -> Open {
    let (sender, events) = channel();
    let link = Box::new(InprocLink::open(NODE, node, Arc::new(Events(sender))));
    Open { info: up(&events), link, events, _server: None }
}

fn open_grpc(node: NodeHandle) -> Open {
    let server = Server::start(node, "127.0.0.1:0");
    let (link, events) = dial(&name(), &server.address, &server.runtime);
    Open { info: up(&events), link, events, _server: Some(server) }
}

type Dial = fn(&NodeName, &str, &Runtime) -> (Box<dyn Link>, Receiver<LinkEvent>);

fn dial(name: &NodeName, address: &str, on: &Runtime) -> (Box<dyn Link>, Receiver<LinkEvent>) {
    let (sender, events) = channel();
    let sink = Arc::new(Events(sender));
    let link = GrpcLink::open(NODE, name.clone(), address.to_owned(), sink, on.handle());
    (Box::new(link), events)
}

fn open_stream(node: NodeHandle) -> Open {
    let server = Server::start(node, "127.0.0.1:0");
    let (link, events) = dial_stream(&name(), &server.address, &server.runtime);
    Open { info: up(&events), link, events, _server: Some(server) }
}

fn dial_stream(
    name: &NodeName,
    address: &str,
    _: &Runtime,
) -> (Box<dyn Link>, Receiver<LinkEvent>) {
    let (sender, events) = channel();
    let sink = Arc::new(Events(sender));
    let link = StreamLink::open(NODE, name.clone(), address.to_owned(), sink).unwrap();
    (Box::new(link), events)
}

/// A node that serves, on a runtime of its own.
struct Server {
    address: String,
    shutdown: oneshot::Sender<()>,
    served: tokio::task::JoinHandle<Result<(), entente_expert_node::Error>>,
    runtime: Runtime,
}

impl Server {
    fn start(node: NodeHandle, address: &str) -> Self {
        let runtime = Runtime::new().unwrap();
        let listener = runtime.block_on(tokio::net::TcpListener::bind(address)).unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (shutdown, told) = oneshot::channel();
        let served = runtime.spawn(serve(node, listener, async {
            let _ = told.await;
        }));
        Self { address, shutdown, served, runtime }
    }

    /// As a killed process ends: the sockets close, and nothing is said. Returns the address.
    fn kill(self) -> String {
        self.runtime.shutdown_background();
        self.address
    }

    fn stop(self) {
        self.shutdown.send(()).unwrap();
        self.runtime.block_on(self.served).unwrap().unwrap();
    }
}

/// A frame of `rows` rows, each through two experts that the node holds.
fn frame(info: &NodeInfo, exchange: u64, layer: u16, rows: usize) -> Dispatch {
    let dtype = if info.kernel_class.0.starts_with("bf16") { Dtype::Bf16 } else { Dtype::F32 };
    let hidden = 64;
    let value = |i: usize| ((i as f32 + exchange as f32) * 0.37).sin();
    let values: Vec<f32> = (0..rows * hidden).map(value).collect();
    let mut bytes = Vec::new();
    dtype.encode(&values, &mut bytes);
    let held: Vec<ExpertId> =
        info.experts.iter().filter(|(l, _)| *l == LayerId(layer)).map(|(_, e)| *e).collect();
    let pair = |row: usize| [held[row % held.len()], held[(row + 1) % held.len()]];
    let assignments = (0..rows)
        .flat_map(|row| pair(row).map(|expert| Assignment { row: row as u16, expert }))
        .collect();
    Dispatch {
        exchange: ExchangeId(exchange),
        fence: info.fence,
        layer: LayerId(layer),
        allowed_regions: ["fr".parse().unwrap()].into(),
        deadline_ms: 20_000,
        dtype,
        hidden,
        assignments,
        rows: bytes.into(),
    }
}

/// What the experts make of a frame, row by row, without a node.
fn expected(frame: &Dispatch, weights: WeightFormat) -> Vec<u8> {
    let checkpoint = Checkpoint::open(CHECKPOINT.as_ref()).unwrap();
    let kernels = select(weights, 1).unwrap();
    let row_len = frame.hidden * frame.dtype.size();
    let mut out = Vec::new();
    for assignment in &frame.assignments {
        let ffn =
            load_expert(&checkpoint, kernels.as_ref(), frame.layer, assignment.expert).unwrap();
        let (mut x, mut y) = (vec![0.0; frame.hidden], vec![0.0; frame.hidden]);
        frame.dtype.decode(&frame.rows[usize::from(assignment.row) * row_len..][..row_len], &mut x);
        kernels.gated_ffn(&x, &[FfnGroup { ffn: &ffn, rows: &[(0, 0)] }], &mut y);
        frame.dtype.encode(&y, &mut out);
    }
    out
}

/// Each check runs once over each transport.
macro_rules! over_all_transports {
    ($($check:ident),+ $(,)?) => {
        mod inproc { $(#[test] fn $check() { super::$check(super::open_inproc); })+ }
        mod grpc { $(#[test] fn $check() { super::$check(super::open_grpc); })+ }
        mod stream { $(#[test] fn $check() { super::$check(super::open_stream); })+ }
    };
}

over_all_transports! {
    answers_are_the_bytes_that_the_experts_give,
    a_hundred_frames_in_flight_are_each_answered_with_their_own_rows,
    the_largest_frame_gets_through,
    what_must_not_be_computed_is_refused,
    a_draining_node_says_so,
}

/// Each check runs once over each transport that has a network in it.
macro_rules! over_networks {
    ($($check:ident),+ $(,)?) => {
        mod network_grpc { $(#[test] fn $check() { super::$check(super::dial); })+ }
        mod network_stream { $(#[test] fn $check() { super::$check(super::dial_stream); })+ }
    };
}

over_networks! {
    a_killed_node_is_noticed_at_once_and_found_again_as_another_incarnation,
    a_node_that_stops_ends_the_link,
    a_node_that_cannot_be_reached_is_reported_once_with_the_reason,
    a_node_with_another_name_is_not_used,
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
        open.link.send(frame).unwrap();
    }
    let mut together: Vec<Answer> = (0..100).map(|_| open.answer()).collect();
    together.sort_by_key(|answer| answer.exchange);
    assert_eq!(together, alone);
}

fn the_largest_frame_gets_through(open: fn(NodeHandle) -> Open) {
    let open = open(load(WeightFormat::F32));
    let mut frame = frame(&open.info, 1, 0, ROWS_MAX);
    frame.assignments = Vec::new();
    for row in 0..ROWS_MAX as u16 {
        let held = open.info.experts.iter().filter(|(layer, _)| *layer == LayerId(0));
        frame.assignments.extend(held.map(|(_, expert)| Assignment { row, expert: *expert }));
    }
    let answer = open.ask(frame.clone());
    assert_eq!(answer.check(&frame), Ok(()));
    assert!(answer.result.is_ok());
}

fn what_must_not_be_computed_is_refused(open: fn(NodeHandle) -> Open) {
    type Spoil = fn(&mut Dispatch);
    let cases: [(&str, Spoil); 7] = [
        ("stale fence", |f| f.fence.incarnation.0 -= 1),
        ("stale fence", |f| f.fence.placement_epoch.0 += 1),
        ("region refused", |f| f.allowed_regions = ["se".parse().unwrap()].into()),
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

fn a_killed_node_is_noticed_at_once_and_found_again_as_another_incarnation(dial: Dial) {
    let client = Runtime::new().unwrap();
    let server = Server::start(load(WeightFormat::F32), "127.0.0.1:0");
    let (link, events) = dial(&name(), &server.address, &client);
    let before = up(&events);
    let killed = Instant::now();
    let address = server.kill();
    down(&events);
    assert!(killed.elapsed() < Duration::from_secs(1), "took {:?}", killed.elapsed());
    assert_eq!(link.send(frame(&before, 1, 1, 1)), Err(NotSent));

    let _server = Server::start(load(WeightFormat::F32), &address);
    let after = up(&events);
    assert!(after.fence.incarnation > before.fence.incarnation);
    link.send(frame(&before, 2, 1, 1)).unwrap();
    let Ok(LinkEvent::Answer(answer)) = events.recv_timeout(PATIENCE) else { panic!("no answer") };
    assert_eq!(answer.result, Err(Refusal::StaleFence(Box::new(after.fence))));
}

fn a_node_that_stops_ends_the_link(dial: Dial) {
    let client = Runtime::new().unwrap();
    let server = Server::start(load(WeightFormat::F32), "127.0.0.1:0");
    let (link, events) = dial(&name(), &server.address, &client);
    let info = up(&events);
    link.send(frame(&info, 1, 1, 2)).unwrap();
    assert!(matches!(events.recv_timeout(PATIENCE), Ok(LinkEvent::Answer(_))));
    server.stop();
    let reason = down(&events);
    assert!(reason.starts_with("the node ended the "), "{reason}");
}

fn a_node_that_cannot_be_reached_is_reported_once_with_the_reason(dial: Dial) {
    let client = Runtime::new().unwrap();
    // A port that was free a moment ago.
    let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let (_link, events) = dial(&name(), &address.to_string(), &client);
    let reason = down(&events);
    assert!(reason.contains(&address.to_string()) && reason.contains("refused"), "{reason}");
    let again = events.recv_timeout(Duration::from_millis(300));
    assert!(matches!(again, Err(RecvTimeoutError::Timeout)), "{again:?}");
}

fn a_node_with_another_name_is_not_used(dial: Dial) {
    let server = Server::start(load(WeightFormat::F32), "127.0.0.1:0");
    let other = "fr-expert-2".parse().unwrap();
    let (link, events) = dial(&other, &server.address, &server.runtime);
    assert_eq!(down(&events), "another node answered: fr-expert-1");
    let info = load(WeightFormat::F32).info();
    assert_eq!(link.send(frame(&info, 1, 1, 1)), Err(NotSent));
}

#[test]
fn a_malformed_frame_is_refused_by_its_number_and_the_stream_lives() {
    let node = load(WeightFormat::F32);
    let info = node.info();
    let server = Server::start(node, "127.0.0.1:0");
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
