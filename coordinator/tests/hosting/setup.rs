//! A coordinator alone in its raft group, and expert nodes that join.

use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use entente_coordinator::config::{ApiConfig, EngineConfig, Transport};
use entente_coordinator::{Config, Error};
use entente_expert_node::Listeners;
use entente_membership::client::Client;
use entente_membership::roster::Roster;
use entente_membership::service;
use entente_membership::state::State;
use entente_model::kernels::{DeviceId, WeightFormat};
use entente_tls::{Authority, Files};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::runtime::Runtime;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

pub const PATIENCE: Duration = Duration::from_secs(20);
const HOUR: Duration = Duration::from_secs(3_600);

pub fn checkpoint(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(name)
}

/// One coordinator, alone in its raft group, with a disk.
pub struct Lonely {
    disk: tempfile::TempDir,
    authority: Authority,
    roster: Roster,
    control: SocketAddr,
    /// What the first start listens on, so that nobody else takes the port before.
    listener: Mutex<Option<TcpListener>>,
}

/// A coordinator that runs.
pub struct Running {
    http: SocketAddr,
    stop: oneshot::Sender<()>,
    pub ended: JoinHandle<Result<(), Error>>,
}

impl Lonely {
    pub fn new(replicas: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let control = listener.local_addr().unwrap();
        // Expert nodes join by themselves.
        let roster = serde_json::json!({
            "name": "test",
            "replicas": replicas,
            "voters": [{
                "name": "fr-coordinator", "region": "fr", "role": "coordinator",
                "address": control.to_string(),
            }],
        });
        let roster = serde_json::from_value(roster).unwrap();
        let disk = tempfile::tempdir().unwrap();
        let (cluster, region) = ("test".parse().unwrap(), "fr".parse().unwrap());
        let authority = Authority::new(&cluster, region, HOUR).unwrap();
        let lonely = Self { disk, authority, roster, control, listener: Some(listener).into() };
        let ca = lonely.authority.certificate_pem();
        std::fs::write(lonely.file("ca.pem"), ca).unwrap();
        lonely
    }

    fn file(&self, name: &str) -> PathBuf {
        self.disk.path().join(name)
    }

    /// Writes the credentials of a process of fr.
    fn issue(&self, role: &str, name: &str) -> Files {
        let identity = format!("spiffe://test/region/fr/role/{role}/node/{name}");
        let issued = self.authority.issue(&identity.parse().unwrap(), HOUR).unwrap();
        let files = Files {
            ca: self.file("ca.pem"),
            certificate: self.file(&format!("{name}.pem")),
            key: self.file(&format!("{name}.key")),
        };
        std::fs::write(&files.certificate, &issued.certificate_pem).unwrap();
        std::fs::write(&files.key, &issued.key_pem).unwrap();
        files
    }

    pub fn config(&self, model: &str) -> Config {
        Config {
            name: "fr-coordinator".parse().unwrap(),
            region: "fr".parse().unwrap(),
            http: "127.0.0.1:0".to_owned(),
            model: checkpoint(model),
            weights: WeightFormat::Bf16,
            threads: Some(1),
            device: DeviceId::Cpu,
            transport: Transport::Stream,
            served_model_name: None,
            api: ApiConfig { open: true, ..ApiConfig::default() },
            engine: EngineConfig::default(),
            tls: Some(self.issue("coordinator", "fr-coordinator")),
            audit: None,
            nccl: None,
            membership: Some(service::Config {
                down_after_ms: 500,
                restore_after_ms: 200,
                ..service::Config::new(self.control.to_string(), self.file("log"))
            }),
            cluster: self.roster.clone(),
        }
    }

    pub fn run(&self, model: &str) -> Running {
        self.run_with(self.config(model))
    }

    pub fn run_with(&self, config: Config) -> Running {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let http = listener.local_addr().unwrap();
        let (stop, told) = oneshot::channel();
        let until_told = async {
            let _ = told.await;
        };
        let control = self.listener.lock().unwrap().take();
        let run = entente_coordinator::run(
            config,
            Some(listener),
            control,
            |_, _| {},
            |_| {},
            until_told,
        );
        Running { http, stop, ended: tokio::spawn(run) }
    }

    /// Starts an expert node, which joins.
    pub fn join(&self, name: &str) -> Node {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let config = entente_expert_node::Config {
            name: name.parse().unwrap(),
            region: "fr".parse().unwrap(),
            listen: listener.local_addr().unwrap().to_string(),
            model: checkpoint("mixtral"),
            weights: WeightFormat::Bf16,
            threads: Some(1),
            memory_bytes: None,
            site: None,
            advertise: None,
            drain_deadline_ms: None,
            scrub_interval_s: None,
            device: DeviceId::Cpu,
            metrics_listen: None,
            tls: Some(self.issue("expert", name)),
            nccl: None,
            membership: Default::default(),
            cluster: self.roster.clone(),
        };
        let runtime = Runtime::new().unwrap();
        let never = std::future::pending;
        runtime.spawn(entente_expert_node::run(
            config,
            Listeners { exchange: Some(listener), metrics: None },
            |_, _| {},
            |_| {},
            never(),
            never(),
        ));
        Node(Some(runtime))
    }

    /// A client with an operator's certificate.
    pub fn operator(&self) -> Client {
        let identity = "spiffe://test/region/fr/role/operator/node/somebody";
        let issued = self.authority.issue(&identity.parse().unwrap(), HOUR).unwrap();
        let credentials = self.authority.credentials(&issued).unwrap();
        Client::new(&credentials, vec![self.control.to_string()]).unwrap()
    }

    /// The committed state, once it is as wanted, as an operator sees it.
    pub async fn committed(&self, wanted: impl Fn(&State) -> bool) -> Arc<State> {
        let mut states = self.operator().watch();
        let committed = states.wait_for(|state| state.as_ref().is_some_and(|state| wanted(state)));
        let state = tokio::time::timeout(PATIENCE, committed).await.expect("not committed in time");
        state.unwrap().clone().unwrap()
    }
}

/// An expert node on a runtime of its own; dropping that closes its sockets, and nothing is said.
pub struct Node(Option<Runtime>);

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

impl Running {
    pub async fn get(&self, path: &str) -> String {
        self.ask(format!("GET {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n")).await
    }

    /// Waits until every expert has a live replica.
    pub async fn ready(&self) {
        let ready = async {
            while !self.get("/readyz").await.starts_with("HTTP/1.1 200") {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(PATIENCE, ready).await.expect("not ready in time");
    }

    /// Waits until tokens are generated.
    pub async fn generating(&self) {
        let count = || async { self.metric("entente_generation_tokens_total").await };
        let before = count().await;
        while count().await < before + 100 {
            tokio::task::yield_now().await;
        }
    }

    pub async fn metric(&self, name: &str) -> u64 {
        let metrics = self.get("/metrics").await;
        let value = metrics.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok());
        value.unwrap_or_else(|| panic!("{name} is not in {metrics}"))
    }

    /// The tokens that follow the `number`th prompt, with their scores.
    pub async fn complete(&self, number: u64) -> Value {
        let prompt: Vec<u64> = (0..20).map(|i| 3 + (i * 7 + number * 31) % 200).collect();
        let body = serde_json::json!({
            "prompt": prompt, "max_tokens": 400, "ignore_eos": true, "return_token_ids": true,
            "temperature": 0.8, "seed": number, "logprobs": 1,
        });
        let (body, headers) = (body.to_string(), "host: test\r\nconnection: close");
        let len = body.len();
        let request = format!(
            "POST /v1/completions HTTP/1.1\r\n{headers}\r\ncontent-type: application/json\r\n\
             content-length: {len}\r\n\r\n{body}"
        );
        let reply = self.ask(request).await;
        assert!(reply.starts_with("HTTP/1.1 200"), "{reply}");
        let (_, body) = reply.split_once("\r\n\r\n").unwrap();
        serde_json::from_str::<Value>(body).unwrap()["choices"].take()
    }

    pub async fn ask(&self, request: String) -> String {
        let mut socket = TcpStream::connect(self.http).await.unwrap();
        socket.write_all(request.as_bytes()).await.unwrap();
        let mut reply = String::new();
        socket.read_to_string(&mut reply).await.unwrap();
        reply
    }

    pub async fn stop(self) -> Result<(), Error> {
        let _ = self.stop.send(());
        tokio::time::timeout(PATIENCE, self.ended).await.expect("did not stop in time").unwrap()
    }
}
