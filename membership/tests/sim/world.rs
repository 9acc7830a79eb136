//! The world around the voters, in virtual time from one seed: a queue of events, taken in order.
//!
//! This file has the queue, the state and the run; what happens to whom is next door: [`machines`]
//! with their disks, the [`network`], [`clients`], and [`trouble`].
//!
//! Invariants:
//! - all that is random comes from the seed, and events of one moment keep their order, so a seed
//!   replays exactly; the trace is a digest of every event taken;
//! - after `TROUBLE_ENDS` nothing new goes wrong, so that by `END` whatever still hangs is a fault.
//!
//! What it does not know: what voters may do. The oracle looks at each step and says so.

mod clients;
mod machines;
mod network;
mod trouble;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use bytes::Bytes;
use entente_membership::log::{Batch, Durable};
use entente_membership::raft::{Change, Config, NotProposed};
use entente_membership::state::codec::sha256;
use entente_membership::state::{
    Applied, Command, Expect, NodeSpec, NodeState, Outcome, RecordKind, Request, Role, SessionId,
};
use entente_membership::voter::{self, ClusterId, Done, Settings, Voter};
use entente_proto::ids::{Incarnation, NodeId};
use entente_proto::wire;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use crate::bugs::{self, Bug};
use crate::oracle::{Operation, Oracle, Seen, Wish};

// Moments and delays are microseconds.
const MS: u64 = 1_000;
const TICK: u64 = 20 * MS;
const TROUBLE_ENDS: u64 = 9_000 * MS;
const END: u64 = 15_000 * MS;
const CLIENTS: usize = 4;
const EXPERT_NODES: u32 = 3;
const NODES_MAX: u64 = 8;
const CLIENT_TIMEOUT: u64 = 300 * MS;

/// What a voter's thread is given to do.
enum Input {
    Message(Box<wire::RaftEnvelope>),
    Tick,
    Propose { client: usize, attempt: u64, request: Box<Request> },
    Read { client: usize, attempt: u64 },
    Churn,
}

/// What the queue holds. `start` and `attempt` tell what was meant for an earlier one.
enum Event {
    Input { to: u64, input: Input },
    Tick { node: u64, start: u64 },
    DiskDone { node: u64, start: u64 },
    Restart { node: u64 },
    Resume { node: u64 },
    Client { client: usize, attempt: u64 },
    NotLeader { client: usize, attempt: u64, leader: Option<u64> },
    Trouble,
}

/// A computer that a voter runs on, or ran.
#[derive(Default)]
struct Machine {
    durable: Durable,
    /// What the disk held before each of the last few batches.
    earlier: VecDeque<Durable>,
    voter: Option<Voter>,
    start: u64,
    /// The batch that the disk is writing; while there is one, nothing else happens.
    writing: VecDeque<Batch>,
    inbox: VecDeque<Input>,
    paused: bool,
    slow_disk: bool,
    reads: BTreeMap<u64, (usize, u64)>,
}

/// What a client wants now; a write with the number of its wish.
#[derive(Clone)]
enum Task {
    Write(Box<Request>, u64),
    Read(String),
}

#[derive(Default)]
struct Client {
    session: u64,
    sequence: u64,
    target: u64,
    attempt: u64,
    started: u64,
    task: Option<Task>,
    registered: BTreeMap<NodeId, Vec<Incarnation>>,
    done: u64,
}

/// What came of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    pub trace: [u8; 32],
    pub events: u64,
    pub operations: u64,
    pub entries: u64,
    pub snapshots_installed: u64,
    pub group_changes: u64,
}

impl Report {
    pub const NAMES: [&str; 5] = ["events", "operations", "entries", "snapshots", "changes"];

    pub fn numbers(&self) -> [u64; 5] {
        let Self { events, operations, entries, snapshots_installed, group_changes, .. } = *self;
        [events, operations, entries, snapshots_installed, group_changes]
    }
}

pub struct World {
    now: u64,
    counter: u64,
    queue: BTreeMap<(u64, u64), Event>,
    random: ChaCha8Rng,
    bug: Option<Bug>,
    cluster: ClusterId,
    genesis: Durable,
    machines: BTreeMap<u64, Machine>,
    clients: Vec<Client>,
    cut: BTreeSet<(u64, u64)>,
    loss_percent: u64,
    oracle: Oracle,
    wishes: u64,
    leaked: u64,
    trace: [u8; 32],
    report: Report,
}

fn spec(name: String, role: Role) -> NodeSpec {
    NodeSpec {
        name: name.parse().unwrap(),
        region: "fr".parse().unwrap(),
        site: "fr-par-1".to_owned(),
        role,
        address: format!("{name}:7000"),
        memory_bytes: None,
        kernel_class: String::new(),
        device: None,
    }
}

impl World {
    pub fn new(seed: u64, bug: Option<Bug>) -> Self {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let founders = if random.next_u32().is_multiple_of(3) { 5 } else { 3 };
        let mut specs: Vec<NodeSpec> =
            (1..=founders).map(|id| spec(format!("a-voter-{id}"), Role::Coordinator)).collect();
        specs.extend((1..=EXPERT_NODES).map(|id| spec(format!("b-expert-{id}"), Role::ExpertNode)));
        let (cluster, genesis) = voter::genesis(specs).unwrap();
        let report = Report {
            trace: [0; 32],
            events: 0,
            operations: 0,
            entries: 0,
            snapshots_installed: 0,
            group_changes: 0,
        };
        let mut world = Self {
            now: 0,
            counter: 0,
            queue: BTreeMap::new(),
            random,
            bug,
            cluster,
            genesis,
            machines: BTreeMap::new(),
            clients: (0..CLIENTS).map(|_| Client { target: 1, ..Client::default() }).collect(),
            cut: BTreeSet::new(),
            loss_percent: 2,
            oracle: Oracle::default(),
            wishes: 0,
            leaked: 0,
            trace: [0; 32],
            report,
        };
        for id in 1..=founders {
            let machine = Machine { durable: world.genesis.clone(), ..Machine::default() };
            world.machines.insert(id, machine);
            world.at(0, Event::Restart { node: id });
        }
        for client in 0..CLIENTS {
            world.at(300 * MS, Event::Client { client, attempt: 0 });
        }
        world.at(1_000 * MS, Event::Trouble);
        world
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.random.next_u64() % bound
    }

    fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    fn at(&mut self, time: u64, event: Event) {
        self.counter += 1;
        self.queue.insert((time, self.counter), event);
    }

    fn after(&mut self, delay: u64, event: Event) {
        self.at(self.now + delay, event);
    }

    /// Runs to the end, or to the first thing that must not be.
    pub fn run(mut self) -> Result<Report, String> {
        let in_time = |now: u64| move |error: String| format!("at {} ms: {error}", now / MS);
        while let Some(((time, number), event)) = self.queue.pop_first() {
            if time > END {
                break;
            }
            self.now = time;
            self.report.events += 1;
            let kind = match &event {
                Event::Input { to, .. } => *to,
                Event::Tick { node, .. } => 100 + node,
                Event::DiskDone { node, .. } => 200 + node,
                Event::Restart { node } => 300 + node,
                Event::Resume { node } => 400 + node,
                Event::Client { client, .. } => 500 + *client as u64,
                Event::NotLeader { client, .. } => 600 + *client as u64,
                Event::Trouble => 700,
            };
            self.note(&[time, number, kind]);
            self.handle(event).map_err(in_time(time))?;
        }
        self.oracle.history_is_linearizable()?;
        self.has_healed()?;
        self.report.operations = self.clients.iter().map(|client| client.done).sum();
        self.report.trace = self.trace;
        Ok(self.report)
    }

    fn note(&mut self, numbers: &[u64]) {
        let mut bytes = self.trace.to_vec();
        bytes.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
        self.trace = sha256(&bytes);
    }

    /// Trouble ended a while ago: somebody leads, and each client gets answers.
    fn has_healed(&self) -> Result<(), String> {
        let stuck = |client: &&Client| self.now - client.started > 4_000 * MS;
        match self.clients.iter().find(stuck) {
            Some(client) => {
                let voters = self.machines.values().filter_map(|machine| machine.voter.as_ref());
                let voters: Vec<_> = voters.map(Voter::status).collect();
                Err(format!("no answer since {} ms: {voters:#?}", client.started / MS))
            }
            None => Ok(()),
        }
    }

    fn handle(&mut self, event: Event) -> Result<(), String> {
        match event {
            Event::Input { to, input } => self.input(to, input),
            Event::Tick { node, start } => {
                let machine = self.machine(node);
                if machine.start != start || machine.voter.is_none() {
                    return Ok(());
                }
                self.after(TICK, Event::Tick { node, start });
                self.input(node, Input::Tick)
            }
            Event::DiskDone { node, start } => self.disk_done(node, start),
            Event::Restart { node } => self.restart(node),
            Event::Resume { node } => {
                self.machine(node).paused = false;
                self.drain(node)
            }
            Event::Client { client, attempt } => {
                self.client_step(client, attempt);
                Ok(())
            }
            Event::NotLeader { client, attempt, leader } => {
                self.client_redirected(client, attempt, leader);
                Ok(())
            }
            Event::Trouble => self.trouble(),
        }
    }

    fn machine(&mut self, id: u64) -> &mut Machine {
        self.machines.get_mut(&id).expect("machines are never taken away")
    }
}
