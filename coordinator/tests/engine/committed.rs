//! What is committed changes under a running engine: nodes vanish and come back as other starts,
//! are taken out, and replicas move. No request fails, and no answer changes.

use std::net::TcpListener;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use entente_coordinator::config::EngineConfig;
use entente_membership::state::{Command, NodeState, State};
use entente_proto::ids::NodeId;
use entente_proto::placement::Placement;
use tokio::sync::watch;

use crate::setup::*;

/// A cluster whose nodes have registered, and an engine that follows what is committed.
pub struct Live {
    pub state: State,
    states: watch::Sender<Arc<State>>,
    pub nodes: Vec<Option<Node>>,
    pub engine: Engine,
}

impl Live {
    pub fn start(transport: Transport, nodes: usize, replicas: u16, wait: Duration) -> Self {
        let listeners: Vec<TcpListener> = (0..nodes).map(|_| listener()).collect();
        let roster = roster(&listeners, replicas);
        let mut state = found(&roster);
        for (number, listener) in listeners.iter().enumerate() {
            register(&mut state, number, listener);
            state.apply(Command::SetState(id(number), NodeState::Active)).unwrap();
        }
        let numbered = listeners.into_iter().enumerate();
        let nodes = numbered
            .map(|(number, listener)| Some(Node::start(&state, number, listener)))
            .collect();
        let states = watch::Sender::new(Arc::new(state.clone()));
        let request_wait_max_ms = wait.as_millis() as u64;
        let bounds = EngineConfig { request_wait_max_ms, ..EngineConfig::default() };
        let engine = Engine::follow(&config(&roster, transport, bounds), states.subscribe());
        engine.wait_until_ready();
        Self { state, states, nodes, engine }
    }

    fn commit(&mut self, command: Command) {
        self.state.apply(command).unwrap();
        self.publish();
    }

    fn publish(&self) {
        self.states.send_replace(Arc::new(self.state.clone()));
    }

    /// The node is no more, and the cluster has noticed.
    pub fn lose(&mut self, number: usize) {
        self.nodes[number] = None;
        self.commit(Command::SetState(id(number), NodeState::Down));
    }

    /// The node comes back on another port, registers, and is committed to take traffic.
    pub fn bring_back(&mut self, number: usize) {
        self.bring_back_with(number, (**self.state.placement()).clone());
    }

    /// The same with what another placement says that it holds.
    fn bring_back_with(&mut self, number: usize, placement: Placement) {
        let listener = listener();
        register(&mut self.state, number, &listener);
        self.publish();
        let mut state = self.state.clone();
        state.apply(Command::SetPlacement(placement)).unwrap();
        self.nodes[number] = Some(Node::start(&state, number, listener));
        self.commit(Command::SetState(id(number), NodeState::Active));
    }

    /// Waits until the engine works by the placement that was committed last.
    fn wait_until_followed(&self) {
        let committed = self.state.placement_epoch().0 as i64;
        let began = Instant::now();
        while self.engine.started.api.metrics.cluster.placement_epoch.get() != committed {
            assert!(began.elapsed() < PATIENCE, "the engine does not follow");
            thread::yield_now();
        }
    }

    /// Waits until the engine holds a step.
    pub fn wait_until_held(&self) {
        let began = Instant::now();
        while self.engine.started.api.metrics.step_waiting.get() == 0 {
            assert!(began.elapsed() < PATIENCE, "no step waits");
            thread::sleep(Duration::from_millis(1));
        }
    }
}

fn id(number: usize) -> NodeId {
    NodeId(number as u32)
}

fn register(state: &mut State, number: usize, listener: &TcpListener) {
    let address = listener.local_addr().unwrap().to_string();
    let (memory_bytes, kernel_class, device) = (None, String::new(), None);
    let node = id(number);
    state
        .apply(Command::RegisterWith { node, address, memory_bytes, kernel_class, device })
        .unwrap();
}

pub fn finish(running: Vec<Running>) -> Vec<String> {
    running.into_iter().map(Running::finish).collect()
}

crate::over_networks! {
    the_last_replica_of_an_expert_may_vanish_and_come_back_as_another_start,
    what_does_not_come_back_in_time_is_told_to_each_request_after_its_own_wait,
    a_client_that_leaves_while_its_step_waits_is_forgotten,
    a_node_that_is_committed_down_is_not_used_although_it_answers,
    replicas_that_move_under_load_change_nothing,
}

fn the_last_replica_of_an_expert_may_vanish_and_come_back_as_another_start(transport: Transport) {
    let mut live = Live::start(transport, 2, 1, PATIENCE);
    let mut running = live.engine.begin_all();
    // A later one waits with them.
    let last = running.len() - 1;
    drop(running.remove(last));
    live.lose(1);
    live.wait_until_held();
    let generated = live.engine.started.api.metrics.generation_tokens.get();
    assert!(generated < u64::from(REQUESTS) * TOKENS as u64, "all had ended before");
    let mut late = live.engine.submit(last as u32);
    live.bring_back(1);
    let mut answers = finish(running);
    answers.push(rest(&mut late));
    assert!(answers == reference());
    assert_eq!(live.engine.started.api.metrics.step_waiting.get(), 0);
}

fn what_does_not_come_back_in_time_is_told_to_each_request_after_its_own_wait(
    transport: Transport,
) {
    const WAIT: Duration = Duration::from_millis(400);
    let mut live = Live::start(transport, 2, 1, WAIT);
    let running = live.engine.begin_all();
    let lost = Instant::now();
    live.lose(1);
    live.wait_until_held();
    thread::sleep(WAIT / 2);
    let (submitted, mut late) = (Instant::now(), live.engine.submit(0));
    for answer in finish(running) {
        assert!(
            answer.contains("Failed(Unavailable(\"waited 400 ms for experts; layer "),
            "{answer}"
        );
    }
    assert!(lost.elapsed() >= WAIT, "given up after {:?}", lost.elapsed());
    let answer = rest(&mut late);
    assert!(
        answer.starts_with("Failed(Unavailable(\"waited 400 ms for experts; layer "),
        "{answer}"
    );
    assert!(submitted.elapsed() >= WAIT, "given up after {:?}", submitted.elapsed());
    live.bring_back(1);
    assert!(live.engine.answers() == reference());
}

fn a_client_that_leaves_while_its_step_waits_is_forgotten(transport: Transport) {
    let mut live = Live::start(transport, 2, 1, PATIENCE);
    drop(live.nodes[1].take());
    let (leaves, mut stays) = (live.engine.submit(0), live.engine.submit(1));
    live.wait_until_held();
    drop(leaves);
    let metrics = &live.engine.started.api.metrics;
    let left = || metrics.finished.with_label_values(&["disconnect"]).get();
    let began = Instant::now();
    while left() == 0 {
        assert!(began.elapsed() < PATIENCE, "nobody noticed that a client left");
        thread::sleep(Duration::from_millis(1));
    }
    live.lose(1);
    live.bring_back(1);
    assert_eq!(rest(&mut stays), reference()[1]);
}

fn a_node_that_is_committed_down_is_not_used_although_it_answers(transport: Transport) {
    let mut live = Live::start(transport, 2, 1, PATIENCE);
    let running = live.engine.begin_all();
    live.commit(Command::SetState(id(1), NodeState::Down));
    live.wait_until_held();
    let generated = || live.engine.started.api.metrics.generation_tokens.get();
    let before = generated();
    thread::sleep(Duration::from_millis(100));
    assert_eq!(generated(), before, "a step was computed without the node");

    // The same process registers anew, as one does that was only cut off for a while.
    live.commit(Command::Register(id(1)));
    let incarnation = live.state.node(&name(1)).unwrap().incarnation.unwrap();
    live.nodes[1].as_ref().unwrap().handle.adopt(incarnation);
    live.commit(Command::SetState(id(1), NodeState::Active));
    assert!(finish(running) == reference());
}

fn replicas_that_move_under_load_change_nothing(transport: Transport) {
    const MOVES: usize = 30;
    // Two nodes hold everything; the third holds nothing, as one that has let go of its replicas
    // before the commit that says so is known here.
    let mut live = Live::start(transport, 3, 3, PATIENCE);
    let everything = live.state.placement().clone();
    live.lose(2);
    live.bring_back_with(2, Placement::new());

    let mut all: Vec<_> = (0..REQUESTS).map(|number| live.engine.submit(number)).collect();
    let ended = |live: &Live| {
        let generated = live.engine.started.api.metrics.generation_tokens.get();
        generated == u64::from(REQUESTS) * TOKENS as u64
    };
    let mut moves = 0;
    while moves < MOVES && !ended(&live) {
        let mut placement = Placement::new();
        for (n, (expert, _)) in everything.iter().enumerate() {
            placement.add(expert, id((n + moves) % 2));
            if (n + moves).is_multiple_of(3) {
                placement.add(expert, id(2));
            }
        }
        live.commit(Command::SetPlacement(placement));
        live.wait_until_followed();
        moves += 1;
    }
    assert!(moves >= 3, "all ended after {moves} moves");
    let answers: Vec<String> = all.iter_mut().map(rest).collect();
    assert!(answers == reference());
}

/// A step that finds no replica is given up after 50 ms. What is committed right then must not be
/// taken for something that the attempt knew already.
#[test]
fn a_commit_at_the_moment_when_a_step_is_given_up_is_noticed() {
    const ROUNDS: usize = 30;
    let mut live = Live::start(Transport::Stream, 2, 1, PATIENCE);
    let mut running = live.engine.begin_all();
    let everything = (**live.state.placement()).clone();
    for round in 0..ROUNDS {
        live.commit(Command::SetPlacement(Placement::new()));
        thread::sleep(Duration::from_micros(49_500 + 100 * round as u64));
        live.commit(Command::SetPlacement(everything.clone()));
        running.iter_mut().for_each(|running| running.hear(1));
    }
    assert!(finish(running) == reference());
}
