//! Steps cut into micro-batches: nobody can tell from an answer, also not when nodes die with
//! exchanges of both halves out.

use std::net::{SocketAddr, TcpListener};

use entente_coordinator::config::EngineConfig;
use entente_membership::roster::Roster;

use crate::setup::*;

const NODES: usize = 2;
const REQUEST_WAIT_MAX_MS: u64 = 500;

/// A coordinator and its nodes, as a roster lists them.
struct Cluster {
    engine: Engine,
    nodes: Vec<Node>,
    roster: Roster,
}

impl Cluster {
    fn start(transport: Transport, micro_batch_rows_min: usize, replicas: u16) -> Self {
        let listeners: Vec<TcpListener> = (0..NODES).map(|_| listener()).collect();
        let roster = roster(&listeners, replicas);
        let state = found(&roster);
        let numbered = listeners.into_iter().enumerate();
        let nodes =
            numbered.map(|(number, listener)| Node::start(&state, number, listener)).collect();
        let bounds = EngineConfig {
            micro_batch_rows_min,
            exchange_deadline_ms: 1_000,
            request_wait_max_ms: REQUEST_WAIT_MAX_MS,
            ..EngineConfig::default()
        };
        Self { engine: Engine::start(&config(&roster, transport, bounds)), nodes, roster }
    }

    fn kill(&mut self, number: usize) {
        drop(self.nodes.remove(number));
    }
}

crate::over_networks! {
    answers_are_the_bits_of_a_step_in_one_piece,
    a_node_that_dies_with_both_halves_out_changes_nothing,
    a_failed_step_leaves_nothing_behind_for_the_next,
}

fn answers_are_the_bits_of_a_step_in_one_piece(transport: Transport) {
    for rows_min in [1, 13] {
        let cluster = Cluster::start(transport, rows_min, 1);
        let answers = cluster.engine.answers();
        assert!(answers == reference(), "micro-batches of {rows_min} rows and more");
    }
}

fn a_node_that_dies_with_both_halves_out_changes_nothing(transport: Transport) {
    let mut cluster = Cluster::start(transport, 1, 2);
    let running = cluster.engine.begin_all();
    cluster.kill(1);
    let generated = cluster.engine.started.api.metrics.generation_tokens.get();
    assert!(generated < u64::from(REQUESTS) * TOKENS as u64 / 2, "{generated} tokens were there");
    let answers: Vec<String> = running.into_iter().map(Running::finish).collect();
    assert!(answers == reference());
}

fn a_failed_step_leaves_nothing_behind_for_the_next(transport: Transport) {
    let mut cluster = Cluster::start(transport, 1, 1);
    let (_, spec) = cluster.roster.nodes().nth(1).unwrap();
    let address: SocketAddr = spec.address.parse().unwrap();
    let running = cluster.engine.begin_all();
    cluster.kill(1);
    let told = format!("waited {REQUEST_WAIT_MAX_MS} ms for experts; layer ");
    for running in running {
        let heard = running.finish();
        assert!(heard.contains("Failed(Unavailable(") && heard.contains(&told), "{heard}");
        assert!(heard.contains("no permitted replica is left for some rows"), "{heard}");
    }
    let listener = TcpListener::bind(address).unwrap();
    cluster.nodes.push(Node::start(&found(&cluster.roster), 1, listener));
    cluster.engine.wait_until_ready();
    assert!(cluster.engine.answers() == reference());
}
