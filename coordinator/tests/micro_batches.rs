//! Steps cut into micro-batches, over real links: nobody can tell from an answer, also not when
//! nodes die with exchanges of both halves out.

// Everything here is a test, which clippy sees in #[test] functions only.
#![allow(clippy::unwrap_used)]

use std::net::{SocketAddr, TcpListener};
use std::time::Duration;

use entente_coordinator::Started;
use entente_coordinator::config::{Config, EngineConfig, Transport};
use entente_coordinator::engine::output::StopConditions;
use entente_coordinator::engine::sampler::Sampling;
use entente_coordinator::engine::{Event, Readiness, Request};
use entente_expert_node::{ExpertNode, serve};
use entente_membership::roster::{Roster, RosterNode};
use entente_model::kernels::WeightFormat;
use tokio::runtime::Runtime;
use tokio::sync::mpsc;

const CHECKPOINT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/mixtral");
const NODES: usize = 2;
const PATIENCE: Duration = Duration::from_secs(20);

/// An expert node on a runtime of its own; dropping that closes its sockets, and nothing is said.
struct Node(Option<Runtime>);

impl Node {
    fn start(roster: &Roster, number: usize, listener: TcpListener) -> Self {
        let (_, spec) = roster.nodes().nth(number).unwrap();
        let mut config = entente_expert_node::Config::new(
            spec.name.clone(),
            spec.region,
            spec.address.clone(),
            CHECKPOINT.into(),
            WeightFormat::Bf16,
            roster.clone(),
        );
        config.threads = Some(1);
        let node = ExpertNode::load(&config, &()).unwrap();
        listener.set_nonblocking(true).unwrap();
        let runtime = Runtime::new().unwrap();
        let listener = {
            let _inside = runtime.enter();
            tokio::net::TcpListener::from_std(listener).unwrap()
        };
        runtime.spawn(async move { serve(node, listener, None, std::future::pending()).await });
        Self(Some(runtime))
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

/// A coordinator, its nodes, and the runtime that its links need.
struct Cluster {
    started: Started,
    nodes: Vec<Node>,
    roster: Roster,
    runtime: Runtime,
}

impl Cluster {
    fn start(transport: Transport, micro_batch_rows_min: usize, replicas: u16) -> Self {
        let listener = |_| TcpListener::bind("127.0.0.1:0").unwrap();
        let listeners: Vec<TcpListener> = (0..NODES).map(listener).collect();
        let spec = |(number, listener): (usize, &TcpListener)| RosterNode {
            name: format!("fr-expert-{}", number + 1).parse().unwrap(),
            region: "fr".parse().unwrap(),
            address: listener.local_addr().unwrap().to_string(),
        };
        let specs = listeners.iter().enumerate().map(spec).collect();
        let roster = Roster::new("test".to_owned(), replicas, specs).unwrap();
        let nodes = if transport == Transport::Inproc {
            Vec::new()
        } else {
            let numbered = listeners.into_iter().enumerate();
            numbered.map(|(number, listener)| Node::start(&roster, number, listener)).collect()
        };
        let config = Config {
            name: "fr-coordinator".parse().unwrap(),
            region: "fr".parse().unwrap(),
            http: "127.0.0.1:0".to_owned(),
            model: CHECKPOINT.into(),
            weights: WeightFormat::Bf16,
            threads: Some(1),
            transport,
            served_model_name: None,
            engine: EngineConfig {
                micro_batch_rows_min,
                exchange_deadline_ms: 1_000,
                ..EngineConfig::default()
            },
            tls: None,
            cluster: roster.clone(),
        };
        let runtime = Runtime::new().unwrap();
        let started = runtime.block_on(entente_coordinator::start(&config, |_, _| {})).unwrap();
        let cluster = Self { started, nodes, roster, runtime };
        cluster.wait_until_ready();
        cluster
    }

    fn wait_until_ready(&self) {
        let mut readiness = self.started.api.engine.readiness();
        let ready = readiness.wait_for(|now| *now == Readiness::Ready);
        let in_time = self.runtime.block_on(async { tokio::time::timeout(PATIENCE, ready).await });
        assert!(in_time.is_ok_and(|ready| ready.is_ok()), "not ready in time");
    }

    fn kill(&mut self, number: usize) {
        drop(self.nodes.remove(number));
    }

    fn submit(&self, number: u32) -> mpsc::Receiver<Event> {
        self.started.api.engine.submit(request(number)).unwrap()
    }

    /// All requests at once: their steps have prompts, decodes and both in one.
    fn answers(&self) -> Vec<String> {
        let mut all: Vec<_> = (0..REQUESTS).map(|number| self.submit(number)).collect();
        all.iter_mut().map(rest).collect()
    }
}

const REQUESTS: u32 = 6;
/// Enough that all are still running when each has begun.
const TOKENS: usize = 200;

fn request(number: u32) -> Request {
    let temperature = if number.is_multiple_of(2) { 0.0 } else { 0.8 };
    Request {
        prompt: (0..20 + 17 * number).map(|i| 3 + (i * 7 + number * 31) % 200).collect(),
        sampling: Sampling { temperature, top_p: 1.0, top_k: 0, min_p: 0.0, seed: number.into() },
        stop: StopConditions { max_tokens: TOKENS, ..StopConditions::default() },
        logprobs: Some(2),
        prompt_logprobs: Some(1),
    }
}

/// Whatever a request hears from here on, every digit of it.
fn rest(events: &mut mpsc::Receiver<Event>) -> String {
    let mut heard = String::new();
    while let Some(event) = events.blocking_recv() {
        heard += &format!("{event:?}\n");
    }
    heard
}

fn reference() -> Vec<String> {
    let alone = Cluster::start(Transport::Inproc, 1, 1);
    let answers: Vec<String> =
        (0..REQUESTS).map(|number| rest(&mut alone.submit(number))).collect();
    for answer in &answers {
        assert!(answer.contains("Finished"), "{answer}");
    }
    answers
}

macro_rules! over_networks {
    ($($check:ident),+ $(,)?) => {
        mod grpc { $(#[test] fn $check() { super::$check(super::Transport::Grpc); })+ }
        mod stream { $(#[test] fn $check() { super::$check(super::Transport::Stream); })+ }
    };
}

over_networks! {
    answers_are_the_bits_of_a_step_in_one_piece,
    a_node_that_dies_with_both_halves_out_changes_nothing,
    a_failed_step_leaves_nothing_behind_for_the_next,
}

fn answers_are_the_bits_of_a_step_in_one_piece(transport: Transport) {
    let reference = reference();
    for rows_min in [1, 13] {
        let cluster = Cluster::start(transport, rows_min, 1);
        assert!(cluster.answers() == reference, "micro-batches of {rows_min} rows and more");
    }
}

fn a_node_that_dies_with_both_halves_out_changes_nothing(transport: Transport) {
    let reference = reference();
    let mut cluster = Cluster::start(transport, 1, 2);
    let mut all: Vec<_> = (0..REQUESTS).map(|number| cluster.submit(number)).collect();
    let mut begun: Vec<String> = Vec::new();
    for events in &mut all {
        // The scores of the prompt come first, then some tokens.
        let heard = (0..5).map(|_| format!("{:?}\n", events.blocking_recv().unwrap()));
        begun.push(heard.collect());
    }
    cluster.kill(1);
    let generated = cluster.started.api.metrics.generation_tokens.get();
    assert!(generated < u64::from(REQUESTS) * TOKENS as u64 / 2, "{generated} tokens were there");
    for (begun, events) in begun.iter_mut().zip(&mut all) {
        *begun += &rest(events);
    }
    assert!(begun == reference);
}

fn a_failed_step_leaves_nothing_behind_for_the_next(transport: Transport) {
    let reference = reference();
    let mut cluster = Cluster::start(transport, 1, 1);
    let (_, spec) = cluster.roster.nodes().nth(1).unwrap();
    let address: SocketAddr = spec.address.parse().unwrap();
    let mut running: Vec<_> = (0..REQUESTS).map(|number| cluster.submit(number)).collect();
    running[0].blocking_recv().unwrap();
    cluster.kill(1);
    for events in &mut running {
        let heard = rest(events);
        assert!(heard.contains("Failed(Unavailable("), "{heard}");
    }
    let listener = TcpListener::bind(address).unwrap();
    let again = Node::start(&cluster.roster, 1, listener);
    cluster.nodes.push(again);
    cluster.wait_until_ready();
    assert!(cluster.answers() == reference);
}
