//! A node in a live cluster whose control plane does what each test says.

#![allow(clippy::unwrap_used)]

mod peer;
mod plane;
mod weights;

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use entente_expert_node::{Config, Error, Listeners, Ready, run};
use entente_membership::roster::{Roster, RosterVoter, VoterRole};
use entente_membership::state::NodeState;
use entente_model::Checkpoint;
use entente_model::kernels::WeightFormat;
use entente_proto::frame::{Dispatch, Refusal};
use entente_proto::identity::Role;
use entente_proto::ids::NodeName;
use entente_proto::link::NodeInfo;
use entente_tls::{Authority, Credentials, Files, Issued};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use peer::{Coordinator, frame};
use plane::{PATIENCE, Plane, Voter, experts, pack};

const CHECKPOINT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/mixtral");
const HOUR: Duration = Duration::from_secs(3_600);

fn name() -> NodeName {
    "fr-expert-1".parse().unwrap()
}

/// A plane, a node that runs against it, and a coordinator that may dial the node.
struct Cluster {
    plane: Arc<Plane>,
    voter: Option<Voter>,
    own: Credentials,
    config: Config,
    /// Where the node listens; kept, so that nobody else gets the port.
    exchange: TcpListener,
    coordinator: Coordinator,
    authority: Authority,
    /// The CA of another region.
    foreign: Authority,
    _dir: tempfile::TempDir,
}

/// A node under way.
struct Node {
    ready: oneshot::Receiver<Ready>,
    leave: Option<oneshot::Sender<()>>,
    ended: JoinHandle<Result<(), Error>>,
}

impl Cluster {
    async fn new() -> Self {
        let digest = Checkpoint::open(CHECKPOINT.as_ref()).unwrap().digest();
        Self::serving(&digest.0).await
    }

    async fn serving(digest: &[u8]) -> Self {
        let (cluster, region) = ("test".parse().unwrap(), "fr".parse().unwrap());
        let authority = Authority::new(&cluster, region, HOUR).unwrap();
        let foreign = Authority::new(&cluster, "se".parse().unwrap(), HOUR).unwrap();
        let issue = |role: Role, name: &str| -> Issued {
            let identity = format!("spiffe://test/region/fr/role/{role}/node/{name}");
            authority.issue(&identity.parse().unwrap(), HOUR).unwrap()
        };
        let own = authority.credentials(&issue(Role::Coordinator, "fr-coordinator")).unwrap();
        let control = TcpListener::bind("127.0.0.1:0").unwrap();
        let voter = RosterVoter {
            name: "fr-coordinator".parse().unwrap(),
            region: "fr".parse().unwrap(),
            role: VoterRole::Coordinator,
            address: control.local_addr().unwrap().to_string(),
        };
        let roster = roster(voter);
        let plane = Plane::new(&roster, &name(), digest);
        let voter = Some(plane.serve(control, &own));
        let dir = tempfile::tempdir().unwrap();
        let exchange = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = exchange.local_addr().unwrap();
        let config = Config {
            threads: Some(1),
            tls: Some(write(dir.path(), &authority, &issue(Role::Expert, "fr-expert-1"))),
            drain_deadline_ms: Some(60_000),
            ..Config::new(
                name(),
                "fr".parse().unwrap(),
                address.to_string(),
                CHECKPOINT.into(),
                WeightFormat::F32,
                roster,
            )
        };
        let coordinator =
            Coordinator { own: own.clone(), node: name(), address: address.to_string() };
        Self { plane, voter, own, config, exchange, coordinator, authority, foreign, _dir: dir }
    }

    /// A frame as a coordinator sends it that knows of the latest commits.
    fn frame(&self, info: &NodeInfo, experts: [u16; 2]) -> Dispatch {
        let (state, mut frame) = (self.plane.state(), frame(info, experts));
        frame.fence.membership_epoch = state.membership_epoch();
        frame.fence.placement_epoch = state.placement_epoch();
        frame
    }

    fn start(&self) -> Node {
        let (on_ready, ready) = oneshot::channel();
        let (leave, told) = oneshot::channel::<()>();
        let config = self.config.clone();
        let ended = tokio::spawn(run(
            config,
            Listeners { exchange: Some(self.exchange.try_clone().unwrap()), metrics: None },
            |_, _| {},
            move |ready| {
                let _ = on_ready.send(ready);
            },
            async { drop(told.await) },
            std::future::pending(),
        ));
        Node { ready, leave: Some(leave), ended }
    }

    /// A node that holds experts 0 to 3 of layer 0, as placed, and serves.
    async fn start_serving(&self) -> Node {
        let four = experts(0, 0..4);
        self.plane.want(&four);
        let mut node = self.start();
        let packed = pack(&four);
        self.plane.reported("its experts", |r| r.held.as_deref() == Some(&packed[..])).await;
        self.plane.place(&four);
        self.plane.set_state(NodeState::Active);
        let ready = timeout(PATIENCE, &mut node.ready).await.expect("ready in time").unwrap();
        assert_eq!(ready.experts, 4);
        node
    }
}

impl Node {
    fn leave(&mut self) {
        self.leave.take().unwrap().send(()).unwrap();
    }

    async fn end(self) -> Result<(), Error> {
        timeout(PATIENCE, self.ended).await.expect("an end in time").unwrap()
    }
}

fn roster(voter: RosterVoter) -> Roster {
    let listed = r#"name = "test"
        voters = [{ name = "x", region = "fr", role = "witness", address = "x:1" }]"#;
    toml::from_str::<Roster>(listed).unwrap().with_voters(vec![voter]).unwrap()
}

fn write(dir: &std::path::Path, authority: &Authority, issued: &Issued) -> Files {
    let file = |name: &str, pem: &str| {
        let path = dir.join(name);
        std::fs::write(&path, pem).unwrap();
        path
    };
    Files {
        ca: file("ca.pem", authority.certificate_pem()),
        certificate: file("node.pem", &issued.certificate_pem),
        key: file("node.key", &issued.key_pem),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_joins_loads_what_is_wanted_and_takes_frames_under_the_incarnation_of_the_cluster() {
    let cluster = Cluster::new().await;
    let _node = cluster.start_serving().await;
    let mut link = cluster.coordinator.dial().await;
    let state = cluster.plane.state();
    let member = state.node(&name()).unwrap();
    assert_eq!(Some(link.info.fence.incarnation), member.incarnation);
    assert_eq!(link.info.experts, experts(0, 0..4));
    assert_eq!(member.spec.address, cluster.coordinator.address);
    assert_eq!(member.spec.kernel_class, link.info.kernel_class.0);
    assert!(link.ask(&cluster.frame(&link.info, [0, 3])).await.result.is_ok());
    let rows = cluster.plane.reported("rows", |report| !report.rows.is_empty()).await.rows;
    let rows: Vec<_> = rows.iter().map(|r| (r.layer, r.expert, r.rows)).collect();
    assert_eq!(rows, [(0, 0, 2), (0, 3, 1)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_move_while_frames_are_answered_with_the_same_bits() {
    let cluster = Cluster::new().await;
    let _node = cluster.start_serving().await;
    let mut link = cluster.coordinator.dial().await;
    let expected = link.ask(&cluster.frame(&link.info, [0, 1])).await.result.unwrap();
    let (plane, six, two) = (&cluster.plane, experts(0, 0..6), experts(0, 0..2));
    plane.want(&six);
    plane.reported("the new ones", |r| r.held.as_deref() == Some(&pack(&six)[..])).await;
    plane.place(&two);
    plane.want(&two);
    plane.reported("the old ones gone", |r| r.held.as_deref() == Some(&pack(&two)[..])).await;
    let asked = cluster.frame(&link.info, [0, 1]);
    assert_eq!(link.ask(&asked).await.result.unwrap(), expected);
    let refused = link.ask(&cluster.frame(&link.info, [0, 5])).await.result;
    assert!(matches!(refused, Err(Refusal::NotHeld(_))), "{refused:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fenced_node_registers_anew_keeps_its_weights_and_is_greeted_again() {
    let cluster = Cluster::new().await;
    let _node = cluster.start_serving().await;
    let mut link = cluster.coordinator.dial().await;
    let (first, mut stream) = cluster.coordinator.dial_stream().await;
    let expected = link.ask(&cluster.frame(&first, [0, 3])).await.result.unwrap();
    cluster.plane.set_state(NodeState::Down);
    let before = first.fence.incarnation;
    let packed = pack(&experts(0, 0..4));
    let again = |report: &entente_proto::wire::HeartbeatReport| report.incarnation > before.0;
    let report = cluster.plane.reported("a new start", again).await;
    assert_eq!(report.held.as_deref(), Some(&packed[..]));
    link.ended().await;
    let mut rest = [0; 1];
    let read = tokio::io::AsyncReadExt::read(&mut stream, &mut rest);
    let end = timeout(PATIENCE, read).await.expect("an end in time");
    assert!(!matches!(end, Ok(1..)), "{end:?}");
    let mut link = cluster.coordinator.dial().await;
    assert_eq!(link.info.fence.incarnation.0, report.incarnation);
    let stale = link.ask(&cluster.frame(&first, [0, 3])).await.result;
    let Err(Refusal::StaleFence(have)) = stale else { panic!("{stale:?}") };
    assert_eq!(have.incarnation, link.info.fence.incarnation);
    assert_eq!(link.ask(&cluster.frame(&link.info, [0, 3])).await.result.unwrap(), expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_leaves_serves_until_it_is_dismissed() {
    let cluster = Cluster::new().await;
    let mut node = cluster.start_serving().await;
    let mut link = cluster.coordinator.dial().await;
    node.leave();
    cluster.plane.reported("that it leaves", |report| report.leaving).await;
    cluster.plane.set_state(NodeState::Draining);
    assert!(link.ask(&cluster.frame(&link.info, [0, 3])).await.result.is_ok());
    assert!(!node.ended.is_finished());
    cluster.plane.place(&experts(0, 0..0));
    cluster.plane.want(&experts(0, 0..0));
    cluster.plane.dismiss();
    node.end().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_control_plane_a_node_serves_on_and_finds_it_again() {
    let mut cluster = Cluster::new().await;
    let _node = cluster.start_serving().await;
    let mut link = cluster.coordinator.dial().await;
    let expected = link.ask(&cluster.frame(&link.info, [0, 3])).await.result.unwrap();
    cluster.voter = None;
    let until = tokio::time::Instant::now() + Duration::from_secs(2);
    while tokio::time::Instant::now() < until {
        assert_eq!(link.ask(&cluster.frame(&link.info, [0, 3])).await.result.unwrap(), expected);
    }
    let control = TcpListener::bind(&cluster.config.cluster.voters()[0].address).unwrap();
    cluster.voter = Some(cluster.plane.serve(control, &cluster.own));
    let report = cluster.plane.reported("what it holds", |report| report.held.is_some()).await;
    assert_eq!(report.incarnation, link.info.fence.incarnation.0, "it is the same start");
    assert_eq!(link.ask(&cluster.frame(&link.info, [0, 3])).await.result.unwrap(), expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_with_another_model_ends_with_the_reason() {
    let cluster = Cluster::serving(&[9; 32]).await;
    let error = cluster.start().end().await.unwrap_err();
    assert!(error.to_string().ends_with("the cluster serves another model"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_whose_configuration_names_another_region_than_its_certificate_does_not_start() {
    let mut cluster = Cluster::new().await;
    cluster.config.region = "se".parse().unwrap();
    let error = cluster.start().end().await.unwrap_err().to_string();
    assert!(error.contains("/region/fr/role/expert/node/fr-expert-1"), "{error}");
    assert!(error.contains("expected was expert fr-expert-1 of test in se"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_computed_and_frames_refused_are_told_over_http() {
    let mut cluster = Cluster::new().await;
    let metrics = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = metrics.local_addr().unwrap();
    drop(metrics);
    cluster.config.metrics_listen = Some(address.to_string());
    let _node = cluster.start_serving().await;
    assert!(http(address, "/livez").await.starts_with("HTTP/1.1 200"));
    assert!(http(address, "/readyz").await.starts_with("HTTP/1.1 200"));
    let mut link = cluster.coordinator.dial().await;
    let good = cluster.frame(&link.info, [0, 3]);
    assert!(link.ask(&good).await.result.is_ok());
    for regions in [vec![], vec!["se".parse().unwrap()]] {
        let allowed_regions = regions.into_iter().collect();
        let refused = link.ask(&Dispatch { allowed_regions, ..good.clone() }).await.result;
        assert!(matches!(refused, Err(Refusal::RegionRefused(_))), "{refused:?}");
    }
    let text = http(address, "/metrics").await;
    for line in [
        "entente_expert_rows_total{region=\"fr\"} 3\n",
        "entente_refused_frames_total{reason=\"region_refused\"} 2\n",
        "entente_experts_held 4\n",
    ] {
        assert!(text.contains(line), "{line} is not in {text}");
    }
}

/// What is answered, head and body.
async fn http(address: SocketAddr, path: &str) -> String {
    let mut socket = TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    socket.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).await.unwrap();
    answer
}
