//! Engines, the nodes that they use, and what they are asked.

use std::net::TcpListener;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use axum::body::Body;
use axum::http::HeaderMap;
use crossbeam_channel::Receiver;
pub use entente_coordinator::config::Transport;
use entente_coordinator::config::{ApiConfig, Config, EngineConfig};
use entente_coordinator::engine::origin::Origin;
use entente_coordinator::engine::output::StopConditions;
use entente_coordinator::engine::sampler::Sampling;
use entente_coordinator::engine::tally::Closed;
use entente_coordinator::engine::{Event, Readiness, Request};
use entente_coordinator::statements::Stated;
use entente_coordinator::{Started, Wiring};
use entente_expert_node::{ExpertNode, NodeHandle, serve};
use entente_membership::roster::{Roster, RosterNode};
use entente_membership::state::State;
use entente_model::Checkpoint;
use entente_model::kernels::{DeviceId, WeightFormat, select};
use entente_proto::ids::NodeName;
use entente_tls::Credentials;
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, watch};
use tower::ServiceExt;

pub const CHECKPOINT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/mixtral");
pub const PATIENCE: Duration = Duration::from_secs(20);
const WEIGHTS: WeightFormat = WeightFormat::Bf16;

pub fn name(number: usize) -> NodeName {
    format!("fr-expert-{}", number + 1).parse().unwrap()
}

pub fn listener() -> TcpListener {
    TcpListener::bind("127.0.0.1:0").unwrap()
}

/// The nodes behind these listeners.
pub fn roster(listeners: &[TcpListener], replicas: u16) -> Roster {
    let spec = |(number, listener): (usize, &TcpListener)| RosterNode {
        name: name(number),
        region: "fr".parse().unwrap(),
        address: listener.local_addr().unwrap().to_string(),
    };
    let specs = listeners.iter().enumerate().map(spec).collect();
    Roster::new("test".to_owned(), replicas, specs).unwrap()
}

pub fn found(roster: &Roster) -> State {
    let checkpoint = Checkpoint::open(CHECKPOINT.as_ref()).unwrap();
    entente_expert_node::found(roster, &checkpoint, WEIGHTS).unwrap()
}

/// An expert node on a runtime of its own; dropping that closes its sockets, and nothing is said.
pub struct Node {
    pub handle: NodeHandle,
    runtime: Option<Runtime>,
}

impl Node {
    /// The node as the state knows it: with what is placed on it, and the start that was minted.
    pub fn start(state: &State, number: usize, listener: TcpListener) -> Self {
        Self::start_as(None, state, number, listener)
    }

    /// The same behind TLS, if there are credentials.
    pub fn start_as(
        own: Option<Credentials>,
        state: &State,
        number: usize,
        listener: TcpListener,
    ) -> Self {
        let checkpoint = Checkpoint::open(CHECKPOINT.as_ref()).unwrap();
        let kernels = select(WEIGHTS, 1).unwrap();
        let handle = ExpertNode::start(&name(number), state, &checkpoint, kernels, &()).unwrap();
        if let Some(incarnation) = state.node(&name(number)).unwrap().incarnation {
            handle.adopt(incarnation);
        }
        listener.set_nonblocking(true).unwrap();
        let runtime = Runtime::new().unwrap();
        let listener = {
            let _inside = runtime.enter();
            tokio::net::TcpListener::from_std(listener).unwrap()
        };
        let node = handle.clone();
        runtime.spawn(async move {
            serve(node, listener, own.map(Into::into), std::future::pending()).await
        });
        Self { handle, runtime: Some(runtime) }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

pub fn config(roster: &Roster, transport: Transport, engine: EngineConfig) -> Config {
    Config {
        name: "fr-coordinator".parse().unwrap(),
        region: "fr".parse().unwrap(),
        http: "127.0.0.1:0".to_owned(),
        model: CHECKPOINT.into(),
        weights: WEIGHTS,
        threads: Some(1),
        device: DeviceId::Cpu,
        transport,
        served_model_name: None,
        api: ApiConfig::default(),
        engine,
        tls: None,
        audit: None,
        nccl: None,
        membership: None,
        cluster: roster.clone(),
    }
}

/// An engine, and the runtime that its links need.
pub struct Engine {
    pub started: Started,
    /// What has ended; there is room for more than any test ends.
    pub closed: Receiver<Closed>,
    /// What nodes stated about it.
    pub stated: Receiver<Stated>,
    runtime: Runtime,
}

impl Engine {
    /// An engine in a cluster that is only a list.
    pub fn start(config: &Config) -> Self {
        let engine = Self::wired(config, None);
        engine.wait_until_ready();
        engine
    }

    /// An engine that follows what is committed.
    pub fn follow(config: &Config, states: watch::Receiver<Arc<State>>) -> Self {
        Self::wired(config, Some(states))
    }

    fn wired(config: &Config, states: Option<watch::Receiver<Arc<State>>>) -> Self {
        let runtime = Runtime::new().unwrap();
        let (closings, closed) = crossbeam_channel::bounded(1_000);
        let (statements, stated) = crossbeam_channel::bounded(1_000);
        let wiring = Wiring {
            states,
            closings: Some(closings),
            statements: Some(statements),
            ..Wiring::default()
        };
        let started = entente_coordinator::start_wired(config, wiring, |_, _| {});
        let started = runtime.block_on(started).unwrap();
        Self { started, closed, stated, runtime }
    }

    /// Waits for the next generation to be closed.
    pub fn next_closed(&self) -> Closed {
        self.closed.recv_timeout(PATIENCE).expect("a generation is closed")
    }

    /// What the API answers.
    pub fn post(&self, body: &str, headers: &[(&str, &str)]) -> (u16, HeaderMap, String) {
        let Started { api, .. } = &self.started;
        let mut post = axum::http::Request::post("/v1/completions");
        for (name, value) in headers {
            post = post.header(*name, *value);
        }
        let post = post.body(Body::from(body.to_owned())).unwrap();
        let router = entente_coordinator::api::router(api.clone());
        self.runtime.block_on(async {
            let response = router.oneshot(post).await.unwrap();
            let (status, headers) = (response.status().as_u16(), response.headers().clone());
            let body = axum::body::to_bytes(response.into_body(), 1 << 20).await.unwrap();
            (status, headers, String::from_utf8(body.to_vec()).unwrap())
        })
    }

    pub fn wait_until_ready(&self) {
        let mut readiness = self.started.api.engine.readiness();
        let ready = readiness.wait_for(|now| *now == Readiness::Ready);
        let in_time = self.runtime.block_on(async { tokio::time::timeout(PATIENCE, ready).await });
        assert!(in_time.is_ok_and(|ready| ready.is_ok()), "not ready in time");
    }

    pub fn submit(&self, number: u32) -> mpsc::Receiver<Event> {
        self.submit_as(number, origin(&["fr"]))
    }

    pub fn submit_as(&self, number: u32, origin: Arc<Origin>) -> mpsc::Receiver<Event> {
        self.started.api.engine.submit(Request { origin, ..request(number) }).unwrap()
    }

    /// Submits all requests, and hears the scores of each prompt and the first tokens.
    pub fn begin_all(&self) -> Vec<Running> {
        let mut all: Vec<Running> = (0..REQUESTS)
            .map(|number| Running { events: self.submit(number), heard: String::new() })
            .collect();
        all.iter_mut().for_each(|running| running.hear(5));
        all
    }

    /// All requests at once: their steps have prompts, decodes and both in one.
    pub fn answers(&self) -> Vec<String> {
        let mut all: Vec<_> = (0..REQUESTS).map(|number| self.submit(number)).collect();
        all.iter_mut().map(rest).collect()
    }
}

/// A request that has begun.
pub struct Running {
    events: mpsc::Receiver<Event>,
    pub heard: String,
}

impl Running {
    /// Hears some more events.
    pub fn hear(&mut self, events: usize) {
        for _ in 0..events {
            let Some(event) = self.events.blocking_recv() else { return };
            self.heard += &format!("{event:?}\n");
        }
    }

    /// Whatever is heard to the end.
    pub fn finish(mut self) -> String {
        self.heard + &rest(&mut self.events)
    }
}

pub const REQUESTS: u32 = 6;
/// Enough that all are still running when each has begun.
pub const TOKENS: usize = 200;

/// Somebody whose rows may go to these regions.
pub fn origin(regions: &[&str]) -> Arc<Origin> {
    let allowed = regions.iter().map(|code| code.parse().unwrap()).collect();
    Arc::new(Origin { allowed, ..Origin::anonymous("fr".parse().unwrap()) })
}

pub fn request(number: u32) -> Request {
    let temperature = if number.is_multiple_of(2) { 0.0 } else { 0.8 };
    Request {
        origin: origin(&["fr"]),
        prompt: (0..20 + 17 * number).map(|i| 3 + (i * 7 + number * 31) % 200).collect(),
        sampling: Sampling { temperature, top_p: 1.0, top_k: 0, min_p: 0.0, seed: number.into() },
        stop: StopConditions { max_tokens: TOKENS, ..StopConditions::default() },
        logprobs: Some(2),
        prompt_logprobs: Some(1),
    }
}

/// Whatever a request hears from here on, every digit of it.
pub fn rest(events: &mut mpsc::Receiver<Event>) -> String {
    let mut heard = String::new();
    while let Some(event) = events.blocking_recv() {
        heard += &format!("{event:?}\n");
    }
    heard
}

/// The answers to all requests, each computed alone and undisturbed.
pub fn reference() -> &'static [String] {
    static ANSWERS: LazyLock<Vec<String>> = LazyLock::new(|| {
        let roster = roster(&[listener(), listener()], 1);
        let config = config(&roster, Transport::Inproc, EngineConfig::default());
        let alone = Engine::start(&config);
        let answers: Vec<String> =
            (0..REQUESTS).map(|number| rest(&mut alone.submit(number))).collect();
        for answer in &answers {
            assert!(answer.contains("Finished"), "{answer}");
        }
        answers
    });
    &ANSWERS
}
