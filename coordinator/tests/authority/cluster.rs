//! A voter and an expert node in fr, and clients that call whatever they like.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::BufMut;
use entente_expert_node::{Config, ExpertNode, NodeHandle, Secured, serve};
use entente_membership::audit::{Event, Sink};
use entente_membership::roster::{Roster, RosterNode, RosterVoter, VoterRole};
use entente_membership::service::{self, Membership, Process, Service};
use entente_model::kernels::WeightFormat;
use entente_proto::identity::{Expected, Identity, Role};
use entente_proto::ids::{NodeId, NodeName};
use entente_tls::{ALPN_GRPC, Authority, Credentials, Roots};
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::client::ResolvesClientCert;
use rustls::pki_types::ServerName;
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;
use tokio_rustls::TlsConnector;
use tonic::client::Grpc;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};

const HOUR: Duration = Duration::from_secs(3_600);
const LONG: Duration = Duration::from_secs(20);
const CHECKPOINT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/mixtral");

/// What became of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// There was no connection.
    TurnedAway,
    /// The caller may not.
    Denied,
    /// A handler has looked at it, and may not have liked it.
    Served,
}

/// The process of a role in a region that the tests are about.
pub fn name_of(role: Role, region: &str) -> Identity {
    let node = match role {
        Role::Coordinator => format!("{region}-coordinator"),
        Role::Expert => format!("{region}-expert-1"),
        _ => format!("{region}-{role}"),
    };
    format!("spiffe://test/region/{region}/role/{role}/node/{node}").parse().unwrap()
}

pub struct Cluster {
    pub authorities: BTreeMap<&'static str, Authority>,
    pub stranger: Authority,
    pub runtime: Runtime,
    pub membership: Membership,
    pub roster: Roster,
    control: String,
    pub exchange: String,
    observer: Credentials,
    events: Arc<Mutex<Vec<Event>>>,
    _dir: tempfile::TempDir,
}

fn authority(region: &str) -> Authority {
    Authority::new(&"test".parse().unwrap(), region.parse().unwrap(), HOUR).unwrap()
}

/// The cluster as a list, by which a node that joins nobody loads its experts, and with its voter.
fn rosters(control: &str, exchange: &str) -> (Roster, Roster) {
    let fr = "fr".parse().unwrap();
    let node = |number: u16, address: &str| RosterNode {
        name: format!("fr-expert-{number}").parse().unwrap(),
        region: fr,
        address: address.to_owned(),
    };
    let voter = RosterVoter {
        name: "fr-coordinator".parse().unwrap(),
        region: fr,
        role: VoterRole::Coordinator,
        address: control.to_owned(),
    };
    let nodes = vec![node(1, exchange), node(2, "127.0.0.1:1")];
    let roster = Roster::new("test".to_owned(), 1, nodes).unwrap();
    (roster.clone(), roster.with_voters(vec![voter]).unwrap())
}

impl Cluster {
    pub fn start() -> Self {
        let authorities = BTreeMap::from(["fr", "se"].map(|region| (region, authority(region))));
        let all: Vec<&str> = authorities.values().map(Authority::certificate_pem).collect();
        let roots = Roots::from_pem(all.concat().as_bytes()).unwrap();
        let own = |role| {
            let issued = authorities["fr"].issue(&name_of(role, "fr"), HOUR).unwrap();
            Credentials::new(roots.clone(), &issued.certificate_pem, &issued.key_pem).unwrap()
        };
        let events = Arc::new(Mutex::new(Vec::new()));
        let seen = events.clone();
        let audit = Sink::to(move |event| seen.lock().unwrap().push(event));
        let (runtime, dir) = (Runtime::new().unwrap(), tempfile::tempdir().unwrap());
        let control = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let exchange = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let addresses = (control.local_addr().unwrap(), exchange.local_addr().unwrap());
        let (address, exchange_address) = (addresses.0.to_string(), addresses.1.to_string());
        let (list, roster) = rosters(&address, &exchange_address);
        let node = node(list);
        let secured = Secured { credentials: own(Role::Expert), audit: audit.clone() };
        runtime.spawn(serve(node, exchange, Some(secured), std::future::pending()));
        let file = service::Config::new(address.clone(), dir.path().to_owned());
        let credentials = own(Role::Coordinator);
        let process = Process { listener: Some(control), audit, ..Process::from(credentials) };
        let name: NodeName = "fr-coordinator".parse().unwrap();
        let started = runtime.block_on(service::start(file, &roster, &name, process));
        let Service { handle: membership, .. } = started.unwrap();
        let observer = own(Role::Operator);
        let cluster = Self {
            authorities,
            stranger: authority("fr"),
            runtime,
            membership,
            roster,
            control: address,
            exchange: exchange_address,
            observer,
            events,
            _dir: dir,
        };
        let status = cluster.membership.status();
        cluster.until("it leads", || status.borrow().is_leader);
        cluster
    }

    /// A configuration with which this is shown to any process of the cluster.
    pub fn client(&self, shown: &Arc<dyn ResolvesClientCert>) -> Arc<ClientConfig> {
        self.client_speaking(shown, ALPN_GRPC)
    }

    pub fn client_speaking(
        &self,
        shown: &Arc<dyn ResolvesClientCert>,
        alpn: &[u8],
    ) -> Arc<ClientConfig> {
        let roles = vec![Role::Coordinator, Role::Expert];
        let anyone = Expected { cluster: "test".parse().unwrap(), roles, member: None };
        let mut config = (*self.observer.client(anyone, &[alpn]).unwrap()).clone();
        config.client_auth_cert_resolver = shown.clone();
        Arc::new(config)
    }

    /// Makes a call with an empty message to the process that serves it.
    pub fn call(&self, client: &Arc<ClientConfig>, call: &'static str) -> Outcome {
        let at = if call.contains(".Exchange/") { &self.exchange } else { &self.control };
        let called = async {
            let Ok(channel) = dial(client.clone(), at.clone()).await else {
                return Outcome::TurnedAway;
            };
            let mut grpc = Grpc::new(channel);
            if grpc.ready().await.is_err() {
                return Outcome::TurnedAway;
            }
            let path = PathAndQuery::from_static(call);
            let answered = grpc.server_streaming(Request::new(()), path, Empty).await;
            answered.map_or_else(|status| outcome(&status), |_| Outcome::Served)
        };
        let called = async { tokio::time::timeout(LONG, called).await };
        self.runtime.block_on(called).unwrap_or_else(|_| panic!("{call} was not answered"))
    }

    /// A connection to the voter.
    pub fn dial(&self, shown: &Arc<dyn ResolvesClientCert>) -> Channel {
        let dialled = dial(self.client(shown), self.control.clone());
        self.runtime.block_on(dialled).unwrap()
    }

    /// A connection to the expert node.
    pub fn dial_node(&self, shown: &Arc<dyn ResolvesClientCert>) -> Channel {
        let dialled = dial(self.client(shown), self.exchange.clone());
        self.runtime.block_on(dialled).unwrap()
    }

    pub fn events(&self, which: impl Fn(&Event) -> bool) -> Vec<Event> {
        self.events.lock().unwrap().iter().filter(|event| which(event)).cloned().collect()
    }

    pub fn until(&self, what: &str, mut is_so: impl FnMut() -> bool) {
        let end = Instant::now() + LONG;
        while !is_so() {
            assert!(Instant::now() < end, "it does not come about that {what}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn node(&self, name: &str) -> NodeId {
        let state = self.membership.state();
        state.borrow().node(&name.parse().unwrap()).unwrap().id
    }
}

fn node(list: Roster) -> NodeHandle {
    let mut config = Config::new(
        "fr-expert-1".parse().unwrap(),
        "fr".parse().unwrap(),
        "127.0.0.1:0".to_owned(),
        CHECKPOINT.into(),
        WeightFormat::F32,
        list,
    );
    config.threads = Some(1);
    ExpertNode::load(&config, &()).unwrap()
}

/// What a status says about the way to the handler: one that the other end has sent has no cause on
/// this one.
fn outcome(status: &Status) -> Outcome {
    match status.code() {
        _ if std::error::Error::source(status).is_some() => Outcome::TurnedAway,
        Code::PermissionDenied | Code::Unauthenticated => Outcome::Denied,
        Code::Unimplemented => panic!("nobody serves it: {status}"),
        _ => Outcome::Served,
    }
}

async fn dial(
    config: Arc<ClientConfig>,
    address: String,
) -> Result<Channel, tonic::transport::Error> {
    let connector = tower::service_fn(move |_| {
        let (config, address) = (config.clone(), address.clone());
        async move {
            let socket = TcpStream::connect(address).await?;
            let name = ServerName::try_from("entente").unwrap();
            TlsConnector::from(config).connect(name, socket).await.map(TokioIo::new)
        }
    });
    Endpoint::from_static("http://cluster").connect_with_connector(connector).await
}

/// Sends a message without fields, which is one of every type, and looks at no answer.
#[derive(Clone, Copy)]
struct Empty;

impl Codec for Empty {
    type Encode = ();
    type Decode = ();
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Empty {
    type Item = ();
    type Error = Status;

    fn encode(&mut self, (): (), into: &mut EncodeBuf<'_>) -> Result<(), Status> {
        into.put_slice(&[]);
        Ok(())
    }
}

impl Decoder for Empty {
    type Item = ();
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<()>, Status> {
        bytes::Buf::advance(from, bytes::Buf::remaining(from));
        Ok(Some(()))
    }
}
