//! Nodes to talk to, and the ways to reach them.

use std::cell::RefCell;
use std::sync::LazyLock;
use std::time::Duration;

use entente_coordinator::link::grpc::GrpcLink;
use entente_coordinator::link::{Links, Peer};
use entente_expert_node::inproc::InprocLink;
use entente_expert_node::{Config, ExpertNode, NodeHandle, serve};
use entente_membership::roster::{Roster, RosterNode};
use entente_model::kernels::{FfnGroup, WeightFormat, select};
use entente_model::{Checkpoint, load_expert};
use entente_proto::frame::{Answer, Assignment, Dispatch, Dtype, ROWS_MAX};
use entente_proto::identity::{Expected, Role};
use entente_proto::ids::{ExchangeId, ExpertId, LayerId, NodeId, NodeName, RequestId};
use entente_proto::link::{LinkEvent, NodeInfo};
use entente_tls::{ALPN_GRPC, ALPN_STREAM, Authority, Credentials};
use tokio::runtime::Runtime;
use tokio::sync::oneshot;

pub const NODE: NodeId = NodeId(7);
pub const CHECKPOINT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/mixtral");
pub const PATIENCE: Duration = Duration::from_secs(20);

pub fn name() -> NodeName {
    "fr-expert-1".parse().unwrap()
}

/// Loads one of two nodes in fr, so that it holds half of the experts.
pub fn load(weights: WeightFormat) -> NodeHandle {
    let node = |number: u16| RosterNode {
        name: format!("fr-expert-{number}").parse().unwrap(),
        region: "fr".parse().unwrap(),
        address: format!("127.0.0.1:{number}"),
    };
    let mut config = Config::new(
        name(),
        "fr".parse().unwrap(),
        "127.0.0.1:0".to_owned(),
        CHECKPOINT.into(),
        weights,
        Roster::new("test".to_owned(), 1, vec![node(1), node(2)]).unwrap(),
    );
    config.threads = Some(1);
    ExpertNode::load(&config, &()).unwrap()
}

/// The CA of the cluster, and of another one.
pub static OURS: LazyLock<Authority> = LazyLock::new(authority);
pub static THEIRS: LazyLock<Authority> = LazyLock::new(authority);
pub const HOUR: Duration = Duration::from_secs(3_600);

fn authority() -> Authority {
    Authority::new(&"test".parse().unwrap(), "fr".parse().unwrap(), HOUR).unwrap()
}

pub fn credentials(authority: &Authority, role: Role, name: &str) -> Credentials {
    let identity = format!("spiffe://test/region/fr/role/{role}/node/{name}").parse().unwrap();
    authority.credentials(&authority.issue(&identity, HOUR).unwrap()).unwrap()
}

/// One way to reach a node over a network.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Network {
    pub grpc: bool,
    pub tls: bool,
}

pub const GRPC: Network = Network { grpc: true, tls: false };
pub const GRPC_TLS: Network = Network { grpc: true, tls: true };
pub const STREAM: Network = Network { grpc: false, tls: false };
pub const STREAM_TLS: Network = Network { grpc: false, tls: true };

impl Network {
    pub fn serve(self, node: NodeHandle, address: &str) -> Server {
        let own = self.tls.then(|| credentials(&OURS, Role::Expert, "fr-expert-1"));
        Server::start(node, address, own)
    }

    /// A link from a coordinator with good credentials to the node of this name.
    pub fn dial(self, name: &NodeName, address: &str, on: &Runtime) -> Links {
        let own = self.tls.then(|| credentials(&OURS, Role::Coordinator, "fr-coordinator"));
        self.dial_as(own, name, address, on)
    }

    pub fn dial_as(
        self,
        own: Option<Credentials>,
        name: &NodeName,
        address: &str,
        on: &Runtime,
    ) -> Links {
        let member = Some(("fr".parse().unwrap(), name.clone()));
        let expert =
            Expected { cluster: "test".parse().unwrap(), roles: vec![Role::Expert], member };
        let alpn = if self.grpc { ALPN_GRPC } else { ALPN_STREAM };
        let tls = own.map(|own| own.client(expert, &[alpn]).unwrap());
        let peer = Peer { node: NODE, name: name.clone(), address: address.to_owned(), tls };
        let mut links = Links::new().unwrap();
        if self.grpc {
            links.add(NODE, |mailbox| Box::new(GrpcLink::open(peer, mailbox, on.handle())));
        } else {
            links.dial(peer).unwrap();
        }
        links
    }

    pub fn open(self, node: NodeHandle) -> Open {
        let server = self.serve(node, "127.0.0.1:0");
        let mut links = self.dial(&name(), &server.address, &server.runtime);
        Open { info: up(&mut links), links: links.into(), _server: Some(server) }
    }
}

/// A link that is up, and what keeps it so.
pub struct Open {
    pub info: NodeInfo,
    pub links: RefCell<Links>,
    pub _server: Option<Server>,
}

impl Open {
    pub fn send(&self, frame: Dispatch) {
        self.links.borrow_mut().send(NODE, frame).unwrap();
    }

    pub fn answer(&self) -> Answer {
        match event(&mut self.links.borrow_mut()) {
            LinkEvent::Answer(answer) => answer,
            other => panic!("expected an answer, got {other:?}"),
        }
    }

    pub fn ask(&self, frame: Dispatch) -> Answer {
        self.send(frame);
        self.answer()
    }
}

pub fn event(links: &mut Links) -> LinkEvent {
    let (node, event) = links.next(PATIENCE).expect("an event");
    assert_eq!(node, NODE);
    event
}

pub fn up(links: &mut Links) -> NodeInfo {
    match event(links) {
        LinkEvent::Up { info, .. } => info,
        other => panic!("expected the link to come up, got {other:?}"),
    }
}

pub fn down(links: &mut Links) -> String {
    match event(links) {
        LinkEvent::Down(reason) => reason,
        other => panic!("expected the link to go down, got {other:?}"),
    }
}

pub fn open_inproc(node: NodeHandle) -> Open {
    let mut links = Links::new().unwrap();
    links.add(NODE, |mailbox| Box::new(InprocLink::open(NODE, node, mailbox)));
    Open { info: up(&mut links), links: links.into(), _server: None }
}

/// A node that serves, on a runtime of its own.
pub struct Server {
    pub address: String,
    pub shutdown: oneshot::Sender<()>,
    pub served: tokio::task::JoinHandle<Result<(), entente_expert_node::Error>>,
    pub runtime: Runtime,
}

impl Server {
    pub fn start(node: NodeHandle, address: &str, own: Option<Credentials>) -> Self {
        let runtime = Runtime::new().unwrap();
        let listener = runtime.block_on(tokio::net::TcpListener::bind(address)).unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (shutdown, told) = oneshot::channel();
        let served = runtime.spawn(async move {
            let until_told = async {
                let _ = told.await;
            };
            serve(node, listener, own.map(Into::into), until_told).await
        });
        Self { address, shutdown, served, runtime }
    }

    /// As a killed process ends: the sockets close, and nothing is said. Returns the address.
    pub fn kill(self) -> String {
        // Not in the background: whoever starts the next one wants the port to be free.
        self.runtime.shutdown_timeout(Duration::from_secs(10));
        self.address
    }

    pub fn stop(self) {
        self.shutdown.send(()).unwrap();
        self.runtime.block_on(self.served).unwrap().unwrap();
    }
}

/// A frame of `rows` rows, each through two experts that the node holds.
pub fn frame(info: &NodeInfo, exchange: u64, layer: u16, rows: usize) -> Dispatch {
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
        requests: vec![(RequestId(1), 2 * rows as u32)],
        assignments,
        rows: bytes.into(),
    }
}

/// What the experts make of a frame, row by row, without a node.
pub fn expected(frame: &Dispatch, weights: WeightFormat) -> Vec<u8> {
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

pub fn largest(info: &NodeInfo, exchange: u64) -> Dispatch {
    let mut frame = frame(info, exchange, 0, ROWS_MAX);
    frame.assignments = Vec::new();
    for row in 0..ROWS_MAX as u16 {
        let held = info.experts.iter().filter(|(layer, _)| *layer == LayerId(0));
        frame.assignments.extend(held.map(|(_, expert)| Assignment { row, expert: *expert }));
    }
    frame.requests = vec![(RequestId(1), frame.assignments.len() as u32)];
    frame
}
