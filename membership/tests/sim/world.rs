//! The world around the voters: disks, a network, clients, an operator and misfortune, all in
//! virtual time from one seed.

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

const MS: u64 = 1_000;
const TICK: u64 = 20 * MS;
const TROUBLE_ENDS: u64 = 9_000 * MS;
const END: u64 = 15_000 * MS;
const CLIENTS: usize = 4;
const EXPERT_NODES: u32 = 3;
const NODES_MAX: u64 = 8;
const CLIENT_TIMEOUT: u64 = 300 * MS;

enum Input {
    Message(Box<wire::RaftEnvelope>),
    Tick,
    Propose { client: usize, attempt: u64, request: Request },
    Read { client: usize, attempt: u64 },
    Churn,
}

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

#[derive(Clone)]
enum Task {
    Write(Request, u64),
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

    // ---- voters -------------------------------------------------------------------------------

    fn restart(&mut self, id: u64) -> Result<(), String> {
        let (bug, genesis, cluster) = (self.bug, self.genesis.clone(), self.cluster);
        let seed = self.random.next_u64();
        let machine = self.machine(id);
        if machine.voter.is_some() {
            return Ok(());
        }
        let first = machine.start == 0;
        machine.start += 1;
        if !first {
            machine.durable = bugs::reopened(bug, id, machine.durable.clone(), &genesis);
        }
        let raft = Config { id, heartbeat_ticks: 2, election_ticks: 8, seed };
        let settings = Settings { raft, cluster, snapshot_entries: 24, snapshot_keep: 6 };
        let voter = Voter::open(settings, machine.durable.clone());
        let voter = voter.map_err(|error| format!("{id} does not start: {error}"))?;
        machine.voter = Some(voter);
        let start = machine.start;
        self.after(TICK, Event::Tick { node: id, start });
        self.pump(id)
    }

    fn crash(&mut self, id: u64) {
        let (bug, lucky) = (self.bug, self.chance(50));
        let machine = self.machine(id);
        if machine.voter.take().is_none() {
            return;
        }
        // A batch that the disk was writing is there entirely or not at all.
        if let Some(batch) = machine.writing.pop_front().filter(|_| lucky) {
            machine.durable.absorb(&batch);
        }
        if bug == Some(Bug::SkipFsync)
            && let Some(earlier) = machine.earlier.pop_front()
        {
            machine.durable = earlier;
        }
        machine.writing.clear();
        machine.inbox.clear();
        machine.reads.clear();
        machine.earlier.clear();
        machine.paused = false;
        // A blink, in which what was asked before is still on its way, or a while.
        let delay = if self.chance(50) { self.below(30 * MS) } else { self.below(2_000 * MS) };
        self.after(delay, Event::Restart { node: id });
    }

    fn input(&mut self, id: u64, input: Input) -> Result<(), String> {
        let waits_for_disk = self.bug != Some(Bug::AckBeforePersist);
        let machine = self.machine(id);
        if machine.voter.is_none() {
            return Ok(());
        }
        if machine.paused || (waits_for_disk && !machine.writing.is_empty()) {
            // Ticks that nobody saw are gone; a bounded inbox drops what does not fit.
            if !matches!(input, Input::Tick) && machine.inbox.len() < 256 {
                machine.inbox.push_back(input);
            }
            return Ok(());
        }
        self.process(id, input)?;
        self.pump(id)
    }

    fn drain(&mut self, id: u64) -> Result<(), String> {
        loop {
            let machine = self.machine(id);
            if machine.paused || !machine.writing.is_empty() || machine.voter.is_none() {
                return Ok(());
            }
            let Some(input) = machine.inbox.pop_front() else { return Ok(()) };
            self.process(id, input)?;
            self.pump(id)?;
        }
    }

    fn process(&mut self, id: u64, input: Input) -> Result<(), String> {
        let bug = self.bug;
        let machine = self.machine(id);
        let Some(voter) = &mut machine.voter else { return Ok(()) };
        let fatal = |error: voter::VoterError| format!("{id} stops: {error}");
        match input {
            Input::Message(envelope) => {
                voter.receive(*envelope).map_err(fatal)?;
            }
            Input::Tick => voter.tick().map_err(fatal)?,
            Input::Propose { client, attempt, request } => {
                self.propose(id, client, attempt, request)
            }
            Input::Read { client, attempt } => {
                let now = match bug {
                    Some(Bug::ReadAnywhere) => true,
                    Some(Bug::ReadWithoutIndex) => voter.is_leader(),
                    _ => false,
                };
                if now {
                    self.serve_read(id, client, attempt);
                } else {
                    match voter.read() {
                        Ok(number) => {
                            machine.reads.insert(number, (client, attempt));
                        }
                        Err(_) => {
                            let event = Event::NotLeader { client, attempt, leader: None };
                            self.after(5 * MS, event);
                        }
                    }
                }
            }
            Input::Churn => self.churn(id),
        }
        Ok(())
    }

    fn propose(&mut self, id: u64, client: usize, attempt: u64, mut request: Request) {
        let bug = self.bug;
        if bug == Some(Bug::StaleFenceAccepted) {
            request.expect = Expect::default();
        }
        if bug == Some(Bug::DedupeForgotten) && request.session.0 != 0 {
            // Every try is its own command: a sequence that no other try has.
            let wish = self.oracle.tries[&(request.session.0, request.sequence)];
            self.leaked += 1;
            request.sequence = request.sequence * 1_000_000 + self.leaked;
            self.oracle.tries.insert((request.session.0, request.sequence), wish);
        }
        let Some(voter) = &mut self.machine(id).voter else { return };
        let result = voter.propose(&request);
        let predicted = voter.state().revision() + 1;
        match result {
            Ok(()) if bug == Some(Bug::AnswerBeforeCommit) => {
                if matches!(request.command, Command::PutRecord { .. }) {
                    let outcome = Ok(Applied::Revision(predicted));
                    self.client_answered(client, attempt, &outcome);
                }
            }
            Err(NotProposed::NotLeader { leader }) => {
                let delay = MS + self.below(10 * MS);
                self.after(delay, Event::NotLeader { client, attempt, leader });
            }
            _ => {}
        }
    }

    fn pump(&mut self, id: u64) -> Result<(), String> {
        loop {
            let Some(voter) = &mut self.machine(id).voter else { return Ok(()) };
            let ready = voter.ready().map_err(|error| format!("{id} stops: {error}"))?;
            let Some(ready) = ready else { return Ok(()) };
            self.send(ready.messages)?;
            if let Some(batch) = ready.batch {
                self.oracle.appends(&batch)?;
                let slow = self.machine(id).slow_disk;
                let latency =
                    if slow { 20 * MS + self.below(80 * MS) } else { 100 + self.below(4 * MS) };
                let machine = self.machine(id);
                machine.writing.push_back(batch);
                let start = machine.start;
                self.after(latency, Event::DiskDone { node: id, start });
                if self.bug != Some(Bug::AckBeforePersist) {
                    return Ok(());
                }
            }
            self.persisted(id)?;
        }
    }

    fn disk_done(&mut self, id: u64, start: u64) -> Result<(), String> {
        let machine = self.machine(id);
        if machine.start != start || machine.voter.is_none() {
            return Ok(());
        }
        let Some(batch) = machine.writing.pop_front() else { return Ok(()) };
        machine.earlier.push_back(machine.durable.clone());
        if machine.earlier.len() > 3 {
            machine.earlier.pop_front();
        }
        machine.durable.absorb(&batch);
        if self.bug == Some(Bug::AckBeforePersist) {
            return Ok(());
        }
        self.persisted(id)?;
        self.pump(id)?;
        self.drain(id)
    }

    fn persisted(&mut self, id: u64) -> Result<(), String> {
        let Some(voter) = &mut self.machine(id).voter else { return Ok(()) };
        let (before, group) = (voter.state().applied_index(), voter.group().clone());
        let done = voter.persisted().map_err(|error| format!("{id} stops: {error}"))?;
        let voter = self.machines[&id].voter.as_ref().expect("it was just there");
        self.oracle.leads(id, voter)?;
        let machines = &self.machines;
        let holds = |holder: u64, index: u64, term: u64| {
            machines.get(&holder).is_some_and(|machine| {
                let durable = &machine.durable;
                durable.snapshot.index >= index
                    || durable.entries.iter().any(|e| e.index == index && e.term == term)
            })
        };
        let before = if done.installed { voter.state().applied_index() } else { before };
        self.oracle.applies(voter, before, [&group, voter.group()], holds)?;
        if group != *voter.group() && !done.installed {
            self.report.group_changes += 1;
        }
        self.report.snapshots_installed += u64::from(done.installed);
        self.report.entries = self.report.entries.max(voter.state().applied_index());
        self.finish(id, done)
    }

    fn finish(&mut self, id: u64, done: Done) -> Result<(), String> {
        self.send(done.messages)?;
        for answer in &done.answers {
            if !self.oracle.answers(answer)? {
                continue;
            }
            if let Ok(Applied::Voter(voter)) = answer.outcome {
                self.provide_machine(voter.0);
            }
        }
        for answer in done.answers {
            let Some(wish) = self.oracle.tries.get(&(answer.session.0, answer.sequence)) else {
                continue;
            };
            let wish = *wish;
            let waiting = self.clients.iter().position(|client| match &client.task {
                Some(Task::Write(_, number)) => *number == wish,
                _ => false,
            });
            if let Some(client) = waiting {
                let attempt = self.clients[client].attempt;
                self.client_answered(client, attempt, &answer.outcome);
            }
        }
        for number in done.reads {
            if let Some((client, attempt)) = self.machine(id).reads.remove(&number) {
                self.serve_read(id, client, attempt);
            }
        }
        Ok(())
    }

    /// An empty machine for a minted voter, which waits to be taken in as a learner.
    fn provide_machine(&mut self, id: u64) {
        if self.machines.contains_key(&id) {
            return;
        }
        self.machines.insert(id, Machine::default());
        self.after(MS, Event::Restart { node: id });
    }

    // ---- the network --------------------------------------------------------------------------

    fn send(&mut self, messages: Vec<wire::RaftEnvelope>) -> Result<(), String> {
        for envelope in messages {
            if let Some(message) = &envelope.message {
                self.oracle.sends(message)?;
            }
            let (from, to) = (envelope.from, envelope.to);
            if !self.machines.contains_key(&to) || self.cut.contains(&(from, to)) {
                continue;
            }
            if self.chance(self.loss_percent) {
                continue;
            }
            let copies = if self.chance(2) { 2 } else { 1 };
            for _ in 0..copies {
                let mut envelope = envelope.clone();
                let troubled = self.now < TROUBLE_ENDS;
                let snapshot = envelope.message.as_mut().and_then(|m| m.snapshot.as_mut());
                if let Some(snapshot) = snapshot.filter(|_| troubled)
                    && self.random.next_u32().is_multiple_of(3)
                {
                    bugs::damaged(self.bug, snapshot);
                }
                // Now and then one takes so long that later ones overtake it.
                let late = self.chance(3);
                let delay = 500 + self.below(if late { 400 * MS } else { 8 * MS });
                self.after(delay, Event::Input { to, input: Input::Message(Box::new(envelope)) });
            }
        }
        Ok(())
    }

    // ---- clients ------------------------------------------------------------------------------

    fn client_step(&mut self, client: usize, attempt: u64) {
        if self.clients[client].attempt != attempt {
            return;
        }
        if self.clients[client].task.is_none() {
            let task = self.next_task(client);
            self.clients[client].started = self.now;
            self.clients[client].task = Some(task);
        } else {
            // No answer: the outcome is unknown, so the same request goes to somebody else.
            let ids: Vec<u64> = self.machines.keys().copied().collect();
            let target = ids[self.below(ids.len() as u64) as usize];
            self.clients[client].target = target;
        }
        self.clients[client].attempt += 1;
        let attempt = self.clients[client].attempt;
        let to = self.clients[client].target;
        let input = match self.clients[client].task.clone() {
            Some(Task::Write(request, _)) => Input::Propose { client, attempt, request },
            Some(Task::Read(_)) => Input::Read { client, attempt },
            None => return,
        };
        let delay = 200 + self.below(4 * MS);
        self.after(delay, Event::Input { to, input });
        self.after(CLIENT_TIMEOUT, Event::Client { client, attempt });
    }

    fn client_redirected(&mut self, client: usize, attempt: u64, leader: Option<u64>) {
        if self.clients[client].attempt != attempt {
            return;
        }
        let count = self.machines.len() as u64;
        let guess = 1 + self.below(count);
        let target = leader.filter(|id| self.machines.contains_key(id)).unwrap_or(guess);
        self.clients[client].target = if self.machines.contains_key(&target) { target } else { 1 };
        self.clients[client].attempt += 1;
        let attempt = self.clients[client].attempt;
        let delay = 5 * MS + self.below(20 * MS);
        self.after(delay, Event::Client { client, attempt });
    }

    fn next_task(&mut self, client: usize) -> Task {
        let session = self.clients[client].session;
        if session == 0 {
            return self.wish(client, Wish::Open, Command::OpenSession, Expect::default());
        }
        let key = format!("k{}", self.below(3));
        match self.below(100) {
            0..35 => Task::Read(key),
            35..70 => {
                let value = format!("v{}", self.wishes);
                let wish = Wish::Put { key: key.clone(), value: value.clone() };
                let (kind, value) = (RecordKind::Policy, Bytes::from(value.into_bytes()));
                let command = Command::PutRecord { kind, key, value, revision: None };
                self.wish(client, wish, command, Expect::default())
            }
            70..85 => {
                let node = self.expert_node();
                self.wish(client, Wish::Register(node), Command::Register(node), Expect::default())
            }
            85..97 => self.fenced(client),
            _ if self.machines.len() as u64 >= NODES_MAX => Task::Read(key),
            _ => {
                let command = Command::MintVoter(NodeId(0));
                self.wish(client, Wish::Mint, command, Expect::default())
            }
        }
    }

    /// A node, in one of its starts, reports; often it has been started again since.
    fn fenced(&mut self, client: usize) -> Task {
        let node = self.expert_node();
        let starts = self.clients[client].registered.get(&node).cloned().unwrap_or_default();
        let Some(last) = starts.last().copied() else {
            return Task::Read("k0".to_owned());
        };
        let old = starts[self.below(starts.len() as u64) as usize];
        let incarnation = if self.chance(50) { last } else { old };
        let state = if self.chance(50) { NodeState::Active } else { NodeState::Down };
        let expect = Expect { incarnation: Some((node, incarnation)), ..Expect::default() };
        let command = Command::SetState(node, state);
        self.wish(client, Wish::Fenced(node, incarnation), command, expect)
    }

    fn expert_node(&mut self) -> NodeId {
        let voters = self.genesis.snapshot.group.voters.len() as u32;
        NodeId(voters + self.below(EXPERT_NODES.into()) as u32)
    }

    fn wish(&mut self, client: usize, wish: Wish, command: Command, expect: Expect) -> Task {
        self.wishes += 1;
        let number = self.wishes;
        let who = &mut self.clients[client];
        who.sequence += 1;
        // A session is opened under a sequence that tells this client from the others.
        let sequence = if wish == Wish::Open { number } else { who.sequence };
        let session = if wish == Wish::Open { SessionId(0) } else { SessionId(who.session) };
        self.oracle.wishes.insert(number, wish);
        self.oracle.tries.insert((session.0, sequence), number);
        let at_ms = self.now / MS;
        Task::Write(Request { session, sequence, at_ms, expect, command }, number)
    }

    fn client_answered(&mut self, client: usize, attempt: u64, outcome: &Outcome) {
        let (now, who) = (self.now, &mut self.clients[client]);
        let Some(Task::Write(request, _)) = who.task.clone() else { return };
        if who.attempt != attempt {
            return;
        }
        match (outcome, &request.command) {
            (Ok(Applied::Session(session)), _) => who.session = session.0,
            (Ok(Applied::Registered(incarnation)), Command::Register(node)) => {
                who.registered.entry(*node).or_default().push(*incarnation);
            }
            (Ok(Applied::Revision(revision)), Command::PutRecord { .. }) => {
                let (start, revision) = (who.started, *revision);
                self.oracle.history.push(Operation { start, end: now, revision, is_write: true });
            }
            _ => {}
        }
        self.client_done(client);
    }

    fn serve_read(&mut self, id: u64, client: usize, attempt: u64) {
        let (now, who) = (self.now, &self.clients[client]);
        let Some(Task::Read(key)) = who.task.clone() else { return };
        if who.attempt != attempt {
            return;
        }
        let start = who.started;
        let Some(voter) = &self.machines[&id].voter else { return };
        let revision = voter.state().revision();
        let record = voter.state().record(RecordKind::Policy, &key);
        let value = record.map(|record| String::from_utf8(record.value.to_vec()).unwrap());
        self.oracle.seen.push(Seen { key, value, revision });
        self.oracle.history.push(Operation { start, end: now, revision, is_write: false });
        self.client_done(client);
    }

    fn client_done(&mut self, client: usize) {
        let who = &mut self.clients[client];
        who.task = None;
        who.done += 1;
        who.attempt += 1;
        who.started = self.now;
        let attempt = self.clients[client].attempt;
        let target = if self.chance(30) { Some(1 + self.below(3)) } else { None };
        if let Some(target) = target {
            self.clients[client].target = target;
        }
        let delay = 2 * MS + self.below(30 * MS);
        self.after(delay, Event::Client { client, attempt });
    }

    // ---- misfortune ---------------------------------------------------------------------------

    fn trouble(&mut self) -> Result<(), String> {
        if self.now >= TROUBLE_ENDS {
            self.cut.clear();
            self.loss_percent = 0;
            for machine in self.machines.values_mut() {
                machine.slow_disk = false;
            }
            return Ok(());
        }
        let ids: Vec<u64> = self.machines.keys().copied().collect();
        // Leaders have more to lose.
        let leads = |id: &&u64| self.machines[*id].voter.as_ref().is_some_and(Voter::is_leader);
        let leader = ids.iter().find(leads).copied();
        let any = ids[self.below(ids.len() as u64) as usize];
        let one = leader.filter(|_| self.chance(40)).unwrap_or(any);
        let other = ids[self.below(ids.len() as u64) as usize];
        match self.below(13) {
            0..3 => self.crash(one),
            3 => {
                for id in ids {
                    if self.chance(60) {
                        self.crash(id);
                    }
                }
            }
            4 => self.split(&ids),
            5 => {
                self.cut.insert((one, other));
            }
            6 => {
                self.cut.clear();
                self.loss_percent = 2;
            }
            7 => {
                self.machine(one).paused = true;
                let delay = 100 * MS + self.below(1_500 * MS);
                self.after(delay, Event::Resume { node: one });
            }
            8 => {
                let slow = &mut self.machine(one).slow_disk;
                *slow = !*slow;
            }
            9 => self.loss_percent = 15,
            _ => {
                // The operator tries everyone; only the leader can.
                for to in ids {
                    self.after(MS, Event::Input { to, input: Input::Churn });
                }
            }
        }
        let delay = 50 * MS + self.below(500 * MS);
        self.after(delay, Event::Trouble);
        Ok(())
    }

    fn split(&mut self, ids: &[u64]) {
        let side: BTreeSet<u64> =
            ids.iter().copied().filter(|_| self.random.next_u32().is_multiple_of(2)).collect();
        for a in ids {
            for b in ids {
                if side.contains(a) != side.contains(b) {
                    self.cut.insert((*a, *b));
                }
            }
        }
    }

    fn churn(&mut self, id: u64) {
        let dice = self.below(100);
        let pick = self.random.next_u64();
        let ids: Vec<u64> = self.machines.keys().copied().collect();
        let Some(voter) = &mut self.machine(id).voter else { return };
        if !voter.is_leader() {
            return;
        }
        let group = voter.group().clone();
        let nth = |set: &BTreeSet<u64>| set.iter().nth(pick as usize % set.len().max(1)).copied();
        let outside: BTreeSet<u64> = ids.into_iter().filter(|id| !group.contains(*id)).collect();
        let change = match (nth(&group.learners), nth(&group.voters), nth(&outside)) {
            (Some(learner), Some(remove), _) if dice < 50 => {
                Change::Replace { promote: learner, remove }
            }
            (Some(learner), _, _) => Change::Promote(learner),
            (None, Some(remove), _) if group.voters.len() > 3 && dice < 40 => {
                Change::Remove(remove)
            }
            (None, Some(to), None) => {
                // A refusal is an answer too.
                let _ = voter.transfer_leader(to);
                return;
            }
            (_, _, Some(joins)) => Change::AddLearner(joins),
            _ => return,
        };
        let _ = voter.change(change);
    }
}
