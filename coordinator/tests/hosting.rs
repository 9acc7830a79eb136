//! A coordinator that hosts its own voter: what it agrees on with the cluster, and what it shows.

// Everything here is a test, which clippy sees in #[test] functions only.
#![allow(clippy::unwrap_used)]

use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use entente_coordinator::config::{EngineConfig, Transport};
use entente_coordinator::{Config, Error};
use entente_membership::client::Client;
use entente_membership::roster::{Roster, RosterNode, RosterVoter, VoterRole};
use entente_membership::served::ServedModel;
use entente_membership::service;
use entente_membership::state::State;
use entente_model::Checkpoint;
use entente_model::kernels::WeightFormat;
use entente_tls::{Authority, Files};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

const PATIENCE: Duration = Duration::from_secs(20);
const HOUR: Duration = Duration::from_secs(3_600);

fn checkpoint(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(name)
}

/// One coordinator, alone in its raft group, with a disk.
struct Lonely {
    disk: tempfile::TempDir,
    authority: Authority,
    roster: Roster,
    control: SocketAddr,
}

/// A coordinator that runs.
struct Running {
    http: SocketAddr,
    stop: oneshot::Sender<()>,
    ended: JoinHandle<Result<(), Error>>,
}

impl Lonely {
    fn new() -> Self {
        let control = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let node = |number: u16| RosterNode {
            name: format!("fr-expert-{number}").parse().unwrap(),
            region: "fr".parse().unwrap(),
            address: format!("127.0.0.1:{number}"),
        };
        let voter = RosterVoter {
            name: "fr-coordinator".parse().unwrap(),
            region: "fr".parse().unwrap(),
            role: VoterRole::Coordinator,
            address: control.to_string(),
        };
        let roster = Roster::new("test".to_owned(), 2, vec![node(1), node(2)]).unwrap();
        let roster = roster.with_voters(vec![voter]).unwrap();
        let (disk, authority) =
            (tempfile::tempdir().unwrap(), Authority::new("test", HOUR).unwrap());
        let lonely = Self { disk, authority, roster, control };
        lonely.write_credentials();
        lonely
    }

    fn file(&self, name: &str) -> PathBuf {
        self.disk.path().join(name)
    }

    fn write_credentials(&self) {
        let identity = "spiffe://test/region/fr/role/coordinator/node/fr-coordinator";
        let issued = self.authority.issue(&identity.parse().unwrap(), HOUR).unwrap();
        std::fs::write(self.file("ca.pem"), self.authority.certificate_pem()).unwrap();
        std::fs::write(self.file("own.pem"), &issued.certificate_pem).unwrap();
        std::fs::write(self.file("own.key"), &issued.key_pem).unwrap();
    }

    fn config(&self, model: &str) -> Config {
        Config {
            name: "fr-coordinator".parse().unwrap(),
            region: "fr".parse().unwrap(),
            http: "127.0.0.1:0".to_owned(),
            model: checkpoint(model),
            weights: WeightFormat::Bf16,
            threads: Some(1),
            transport: Transport::Stream,
            served_model_name: None,
            engine: EngineConfig::default(),
            tls: Some(Files {
                ca: self.file("ca.pem"),
                certificate: self.file("own.pem"),
                key: self.file("own.key"),
            }),
            membership: Some(service::Config::new(self.control.to_string(), self.file("log"))),
            cluster: self.roster.clone(),
        }
    }

    fn run(&self, model: &str) -> Running {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let http = listener.local_addr().unwrap();
        let (stop, told) = oneshot::channel();
        let until_told = async {
            let _ = told.await;
        };
        let config = self.config(model);
        let run =
            entente_coordinator::run(config, Some(listener), None, |_, _| {}, |_| {}, until_told);
        Running { http, stop, ended: tokio::spawn(run) }
    }

    /// The committed state, once it is as wanted, as an operator sees it.
    async fn committed(&self, wanted: impl Fn(&State) -> bool) -> Arc<State> {
        let identity = "spiffe://test/region/fr/role/operator/node/somebody";
        let issued = self.authority.issue(&identity.parse().unwrap(), HOUR).unwrap();
        let credentials = self.authority.credentials(issued).unwrap();
        let client = Client::new(&credentials, vec![self.control.to_string()]).unwrap();
        let mut states = client.watch();
        let committed = states.wait_for(|state| state.as_ref().is_some_and(|state| wanted(state)));
        let state = tokio::time::timeout(PATIENCE, committed).await.expect("not committed in time");
        state.unwrap().clone().unwrap()
    }
}

impl Running {
    async fn get(&self, path: &str) -> String {
        let mut socket = TcpStream::connect(self.http).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n");
        socket.write_all(request.as_bytes()).await.unwrap();
        let mut reply = String::new();
        socket.read_to_string(&mut reply).await.unwrap();
        reply
    }

    async fn stop(self) -> Result<(), Error> {
        let _ = self.stop.send(());
        tokio::time::timeout(PATIENCE, self.ended).await.expect("did not stop in time").unwrap()
    }
}

/// What the first coordinator writes down.
fn agreed(state: &State) -> bool {
    ServedModel::of(state).is_some() && !state.replicas().is_empty()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_coordinator_writes_down_the_model_and_the_wanted_replicas() {
    let lonely = Lonely::new();
    let running = lonely.run("mixtral");
    let state = lonely.committed(agreed).await;
    let digest = Checkpoint::open(&checkpoint("mixtral")).unwrap().digest();
    let model = ServedModel::of(&state).unwrap().unwrap();
    assert_eq!(model.digest, digest);
    assert_eq!(state.replicas(), &[("fr".parse().unwrap(), 2)].into());

    let metrics = running.get("/metrics").await;
    assert!(metrics.contains("\nentente_raft_leader 1\n"), "{metrics}");
    let readyz = running.get("/readyz").await;
    assert!(readyz.starts_with("HTTP/1.1 503") && readyz.contains("expert"), "{readyz}");
    running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_coordinator_with_another_model_than_the_clusters_ends_and_says_so() {
    let lonely = Lonely::new();
    let first = lonely.run("mixtral");
    lonely.committed(agreed).await;
    first.stop().await.unwrap();

    let other = lonely.run("mistral-swa");
    let error = tokio::time::timeout(PATIENCE, other.ended).await.unwrap().unwrap().unwrap_err();
    assert!(matches!(error, Error::OtherModel { .. }), "{error}");

    let again = lonely.run("mixtral");
    lonely.committed(agreed).await;
    again.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_voter_lacks_in_its_configuration_is_named() {
    type Spoil = fn(&mut Config);
    let cases: [(&str, Spoil); 4] = [
        ("[membership] is needed", |config| config.membership = None),
        ("[tls] is needed", |config| config.tls = None),
        ("transport: inproc is for", |config| config.transport = Transport::Inproc),
        ("[membership] needs cluster.voters", |config| {
            let nodes = config.cluster.nodes().map(|(_, node)| node.clone()).collect();
            config.cluster = Roster::new("test".to_owned(), 2, nodes).unwrap();
        }),
    ];
    for (cause, spoil) in cases {
        let lonely = Lonely::new();
        let mut config = lonely.config("mixtral");
        spoil(&mut config);
        let run =
            entente_coordinator::run(config, None, None, |_, _| {}, |_| {}, std::future::pending());
        let error = tokio::time::timeout(PATIENCE, run).await.unwrap().unwrap_err().to_string();
        assert!(error.contains(cause), "{error} does not say {cause}");
    }
}
