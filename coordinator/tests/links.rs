//! One suite over all transports: whatever carries a frame, the answer is the same bytes.

// Everything here is a test, which clippy sees in #[test] functions only.
#![allow(clippy::unwrap_used)]

use std::cell::RefCell;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock};
use std::thread;
use std::time::{Duration, Instant};

use entente_coordinator::link::grpc::GrpcLink;
use entente_coordinator::link::{Links, Peer};
use entente_expert_node::inproc::InprocLink;
use entente_expert_node::{Config, ExpertNode, NodeHandle, serve};
use entente_membership::roster::{Roster, RosterNode};
use entente_model::kernels::{FfnGroup, WeightFormat, select};
use entente_model::{Checkpoint, load_expert};
use entente_proto::frame::{Answer, Assignment, Dispatch, Dtype, ROWS_MAX, Refusal};
use entente_proto::identity::{Expected, Role};
use entente_proto::ids::{ExchangeId, ExpertId, LayerId, NodeId, NodeName};
use entente_proto::link::{LinkEvent, NodeInfo, NotSent};
use entente_proto::wire;
use entente_proto::wire::exchange_client::ExchangeClient;
use entente_tls::{ALPN_GRPC, ALPN_STREAM, Authority, Credentials};
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
        tls: None,
        cluster: Roster::new("test".to_owned(), 1, vec![node(1), node(2)]).unwrap(),
    };
    ExpertNode::load(&config, &()).unwrap()
}

/// The CA of the cluster, and of another one.
static OURS: LazyLock<Authority> = LazyLock::new(|| Authority::new("test", HOUR).unwrap());
static THEIRS: LazyLock<Authority> = LazyLock::new(|| Authority::new("test", HOUR).unwrap());
const HOUR: Duration = Duration::from_secs(3_600);

fn credentials(authority: &Authority, role: Role, name: &str) -> Credentials {
    let identity = format!("spiffe://test/region/fr/role/{role}/node/{name}").parse().unwrap();
    authority.credentials(authority.issue(&identity, HOUR).unwrap()).unwrap()
}

/// One way to reach a node over a network.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Network {
    grpc: bool,
    tls: bool,
}

const GRPC: Network = Network { grpc: true, tls: false };
const GRPC_TLS: Network = Network { grpc: true, tls: true };
const STREAM: Network = Network { grpc: false, tls: false };
const STREAM_TLS: Network = Network { grpc: false, tls: true };

impl Network {
    fn serve(self, node: NodeHandle, address: &str) -> Server {
        let own = self.tls.then(|| credentials(&OURS, Role::Expert, "fr-expert-1"));
        Server::start(node, address, own)
    }

    /// A link from a coordinator with good credentials to the node of this name.
    fn dial(self, name: &NodeName, address: &str, on: &Runtime) -> Links {
        let own = self.tls.then(|| credentials(&OURS, Role::Coordinator, "fr-coordinator"));
        self.dial_as(own, name, address, on)
    }

    fn dial_as(
        self,
        own: Option<Credentials>,
        name: &NodeName,
        address: &str,
        on: &Runtime,
    ) -> Links {
        let member = Some(("fr".parse().unwrap(), name.clone()));
        let expert = Expected { cluster: "test".parse().unwrap(), role: Role::Expert, member };
        let alpn = if self.grpc { ALPN_GRPC } else { ALPN_STREAM };
        let tls = own.map(|own| own.client(expert, &[alpn]).unwrap());
        let peer = Peer { node: NODE, name: name.clone(), address: address.to_owned(), tls };
        let mut links = Links::new().unwrap();
        if self.grpc {
            let link = GrpcLink::open(peer, links.mailbox(), on.handle());
            links.add(NODE, Box::new(link));
        } else {
            links.dial(peer).unwrap();
        }
        links
    }

    fn open(self, node: NodeHandle) -> Open {
        let server = self.serve(node, "127.0.0.1:0");
        let mut links = self.dial(&name(), &server.address, &server.runtime);
        Open { info: up(&mut links), links: links.into(), _server: Some(server) }
    }
}

/// A link that is up, and what keeps it so.
struct Open {
    info: NodeInfo,
    links: RefCell<Links>,
    _server: Option<Server>,
}

impl Open {
    fn send(&self, frame: Dispatch) {
        self.links.borrow_mut().send(NODE, frame).unwrap();
    }

    fn answer(&self) -> Answer {
        match event(&mut self.links.borrow_mut()) {
            LinkEvent::Answer(answer) => answer,
            other => panic!("expected an answer, got {other:?}"),
        }
    }

    fn ask(&self, frame: Dispatch) -> Answer {
        self.send(frame);
        self.answer()
    }
}

fn event(links: &mut Links) -> LinkEvent {
    let (node, event) = links.next(PATIENCE).expect("an event");
    assert_eq!(node, NODE);
    event
}

fn up(links: &mut Links) -> NodeInfo {
    match event(links) {
        LinkEvent::Up(info) => info,
        other => panic!("expected the link to come up, got {other:?}"),
    }
}

fn down(links: &mut Links) -> String {
    match event(links) {
        LinkEvent::Down(reason) => reason,
        other => panic!("expected the link to go down, got {other:?}"),
    }
}

fn open_inproc(node: NodeHandle) -> Open {
    let mut links = Links::new().unwrap();
    let link = InprocLink::open(NODE, node, links.mailbox());
    links.add(NODE, Box::new(link));
    Open { info: up(&mut links), links: links.into(), _server: None }
}

/// A node that serves, on a runtime of its own.
struct Server {
    address: String,
    shutdown: oneshot::Sender<()>,
    served: tokio::task::JoinHandle<Result<(), entente_expert_node::Error>>,
    runtime: Runtime,
}

impl Server {
    fn start(node: NodeHandle, address: &str, own: Option<Credentials>) -> Self {
        let runtime = Runtime::new().unwrap();
        let listener = runtime.block_on(tokio::net::TcpListener::bind(address)).unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (shutdown, told) = oneshot::channel();
        let served = runtime.spawn(async move {
            let until_told = async {
                let _ = told.await;
            };
            serve(node, listener, own.as_ref(), until_told).await
        });
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
        mod grpc { $(#[test] fn $check() { super::$check(|node| super::GRPC.open(node)); })+ }
        mod grpc_tls {
            $(#[test] fn $check() { super::$check(|node| super::GRPC_TLS.open(node)); })+
        }
        mod stream { $(#[test] fn $check() { super::$check(|node| super::STREAM.open(node)); })+ }
        mod stream_tls {
            $(#[test] fn $check() { super::$check(|node| super::STREAM_TLS.open(node)); })+
        }
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

fn largest(info: &NodeInfo, exchange: u64) -> Dispatch {
    let mut frame = frame(info, exchange, 0, ROWS_MAX);
    frame.assignments = Vec::new();
    for row in 0..ROWS_MAX as u16 {
        let held = info.experts.iter().filter(|(layer, _)| *layer == LayerId(0));
        frame.assignments.extend(held.map(|(_, expert)| Assignment { row, expert: *expert }));
    }
    frame
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

/// Each check runs once over each transport with TLS.
macro_rules! over_tls {
    ($($check:ident),+ $(,)?) => {
        mod tls_grpc { $(#[test] fn $check() { super::$check(super::GRPC_TLS); })+ }
        mod tls_stream { $(#[test] fn $check() { super::$check(super::STREAM_TLS); })+ }
    };
}

over_tls! {
    a_node_of_another_ca_is_not_used,
    a_peer_that_is_no_coordinator_of_ours_is_refused,
    a_peer_in_plain_text_is_refused,
    a_peer_that_stalls_in_the_handshake_is_given_up_and_holds_up_nobody,
}

fn a_node_of_another_ca_is_not_used(network: Network) {
    let theirs = credentials(&THEIRS, Role::Expert, "fr-expert-1");
    let server = Server::start(load(WeightFormat::F32), "127.0.0.1:0", Some(theirs));
    let mut links = network.dial(&name(), &server.address, &server.runtime);
    let reason = down(&mut links);
    assert!(reason.contains("invalid peer certificate: BadSignature"), "{reason}");
}

fn a_peer_that_is_no_coordinator_of_ours_is_refused(network: Network) {
    let server = network.serve(load(WeightFormat::F32), "127.0.0.1:0");
    for own in [
        credentials(&OURS, Role::Expert, "fr-expert-1"),
        credentials(&OURS, Role::Operator, "somebody"),
    ] {
        let mut links = network.dial_as(Some(own), &name(), &server.address, &server.runtime);
        // With TLS 1.3 the client is done before the server has looked at its certificate.
        let reason = down(&mut links);
        assert!(!reason.is_empty());
    }
}

fn a_peer_in_plain_text_is_refused(network: Network) {
    let server = network.serve(load(WeightFormat::F32), "127.0.0.1:0");
    let mut links = network.dial_as(None, &name(), &server.address, &server.runtime);
    down(&mut links);
}

fn a_peer_that_stalls_in_the_handshake_is_given_up_and_holds_up_nobody(network: Network) {
    let server = network.serve(load(WeightFormat::F32), "127.0.0.1:0");
    let stall = |begin: &[u8]| {
        let mut peer = TcpStream::connect(&server.address).unwrap();
        peer.write_all(begin).unwrap();
        peer
    };
    // Nothing at all, and the beginning of a record of 512 bytes.
    let stalled = [stall(&[]), stall(&[0x16, 3, 1, 2, 0, 1])];
    let began = Instant::now();
    up(&mut network.dial(&name(), &server.address, &server.runtime));
    assert!(began.elapsed() < Duration::from_secs(2), "took {:?}", began.elapsed());
    for mut peer in stalled {
        peer.set_read_timeout(Some(PATIENCE)).unwrap();
        // Closed, one way or the other.
        let ended = peer.read(&mut [0; 64]);
        assert!(matches!(&ended, Ok(0)) || ended.is_err_and(|e| !is_timeout(&e)));
    }
    assert!(began.elapsed() < Duration::from_secs(10), "took {:?}", began.elapsed());
}

/// Passes bytes between a coordinator and a node until it is told to leave them lying.
struct Relay {
    address: String,
    stopped: Arc<AtomicBool>,
}

impl Relay {
    fn to(address: &str) -> Self {
        let (address, stopped) = (address.to_owned(), Arc::new(AtomicBool::new(false)));
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let relay =
            Self { address: listener.local_addr().unwrap().to_string(), stopped: stopped.clone() };
        thread::spawn(move || {
            let (near, _) = listener.accept().unwrap();
            let far = TcpStream::connect(address).unwrap();
            for (mut from, mut to) in
                [(near.try_clone().unwrap(), far.try_clone().unwrap()), (far, near)]
            {
                let stopped = stopped.clone();
                thread::spawn(move || {
                    let mut bytes = vec![0; 64 << 10];
                    while let Ok(read @ 1..) = from.read(&mut bytes) {
                        while stopped.load(Ordering::Acquire) {
                            thread::sleep(Duration::from_millis(1));
                        }
                        if to.write_all(&bytes[..read]).is_err() {
                            return;
                        }
                    }
                });
            }
        });
        relay
    }
}

fn a_node_that_reads_nothing_does_not_hold_the_engine_up(network: Network) {
    const FRAMES: u64 = 24;
    let server = network.serve(load(WeightFormat::F32), "127.0.0.1:0");
    let relay = Relay::to(&server.address);
    let mut links = network.dial(&name(), &relay.address, &server.runtime);
    let frame = largest(&up(&mut links), 0);
    relay.stopped.store(true, Ordering::Release);
    for number in 0..FRAMES {
        let began = Instant::now();
        links.send(NODE, Dispatch { exchange: ExchangeId(number), ..frame.clone() }).unwrap();
        let took = began.elapsed();
        assert!(took < Duration::from_millis(300), "frame {number} took {took:?}");
    }
    relay.stopped.store(false, Ordering::Release);
    // What waited goes out while the engine waits, whole and in order.
    for number in 0..FRAMES {
        match event(&mut links) {
            LinkEvent::Answer(answer) => {
                assert_eq!(answer.exchange, ExchangeId(number));
                assert!(answer.result.is_ok() && answer.check(&frame).is_ok(), "frame {number}");
            }
            other => panic!("expected an answer, got {other:?}"),
        }
    }
}

mod backlog {
    #[test]
    fn a_node_that_reads_nothing_does_not_hold_the_engine_up_stream() {
        super::a_node_that_reads_nothing_does_not_hold_the_engine_up(super::STREAM);
    }

    #[test]
    fn a_node_that_reads_nothing_does_not_hold_the_engine_up_stream_tls() {
        super::a_node_that_reads_nothing_does_not_hold_the_engine_up(super::STREAM_TLS);
    }
}

fn is_timeout(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut)
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
