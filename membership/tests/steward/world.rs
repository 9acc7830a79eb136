//! A cluster of two possible leaders, a log that both see late, and expert nodes that obey.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use entente_membership::served::{SERVED_MODEL_KEY, ServedModel};
use entente_membership::state::{
    Applied, Command, Expect, NodeSpec, NodeState, Outcome, RecordKind, Request, Role, SessionId,
    State,
};
use entente_membership::steward::{self, Event, Orders, Report, Settings, Steward};
use entente_proto::ids::{LayerId, ModelDigest, NodeId, Region};
use entente_proto::placement::{ExpertKey, ModelShape};
use entente_sim::Random;

use crate::machine::{Machine, Stream};

pub const SETTINGS: Settings =
    Settings { down_after_ms: 1_000, restore_after_ms: 3_000, loads_per_node_max: 2 };
/// Troubles end after so long, and the cluster has as long again to come to rest.
pub const TROUBLE_MS: u64 = 30_000;
pub const REST_MS: u64 = 60_000;
const EXPERT_BYTES: u64 = 10;

pub type Checked = Result<(), String>;

/// Something that is under way.
#[derive(Debug, Clone)]
pub enum Mail {
    Tick,
    Trouble,
    Beat { node: NodeId, stream: u64 },
    Report { leader: usize, stream: u64, report: Report },
    Orders { node: NodeId, stream: u64, orders: Orders },
    StreamEnds { node: NodeId, stream: u64 },
    Fenced { node: NodeId, stream: u64 },
    Propose { leader: usize, term: u64, id: u64, expect: Expect, command: Command },
    Answer { leader: usize, term: u64, id: u64, outcome: Option<Outcome> },
    State { leader: usize, state: Arc<State> },
    Seen { node: NodeId, placed: BTreeSet<ExpertKey>, epoch: u64 },
    Leads { leader: usize, term: u64 },
    Follows { leader: usize, term: u64 },
    Loaded { node: NodeId, load: u64 },
    Register { node: NodeId },
    Start { node: NodeId },
    Resume { node: NodeId },
}

/// What happened in a run.
#[derive(Debug, Clone, Copy, Default)]
pub struct Counts {
    pub commits: u64,
    pub loads: u64,
    pub releases: u64,
    pub failures: u64,
    pub crashes: u64,
    pub leaders: u64,
    pub drains: u64,
}

impl Counts {
    pub const NAMES: [&str; 7] =
        ["commits", "loads", "releases", "failures", "crashes", "leaders", "drains"];

    pub fn numbers(&self) -> [u64; 7] {
        let Self { commits, loads, releases, failures, crashes, leaders, drains } = *self;
        [commits, loads, releases, failures, crashes, leaders, drains]
    }
}

pub struct World {
    pub random: Random,
    pub now_ms: u64,
    pub state: Arc<State>,
    pub machines: BTreeMap<NodeId, Machine>,
    pub stewards: [Steward; 2],
    /// Who leads now by raft, and its term. It hears of it later.
    pub leader: Option<usize>,
    pub term: u64,
    /// The term that each steward believes to lead.
    pub leading: [Option<u64>; 2],
    pub counts: Counts,
    pub shape: ModelShape,
    pub troubled: bool,
    pub chatty: bool,
    queue: BTreeMap<(u64, u64), Mail>,
    mails: u64,
    session: SessionId,
    sequence: u64,
    pub streams: u64,
    /// The last proposal of a placement, to see when things have come to rest.
    pub last_placed_ms: u64,
}

impl World {
    pub fn new(seed: u64) -> Self {
        let mut random = Random(seed);
        let experts = 4 + random.below(5) as u16;
        let shape = ModelShape {
            layers: vec![(LayerId(0), experts), (LayerId(2), 3)],
            expert_bytes: EXPERT_BYTES,
        };
        let (specs, rooms) = founders(&mut random, &shape);
        let mut state = State::genesis(specs).unwrap();
        let mut machines = BTreeMap::new();
        for node in state.nodes().filter(|node| node.spec.role == Role::ExpertNode) {
            let room = rooms[&node.spec.region];
            machines.insert(node.id, Machine::new(node.id, node.spec.region, room));
        }
        let session = open_session(&mut state);
        let mut world = Self {
            random,
            now_ms: 0,
            state: Arc::new(state),
            machines,
            stewards: [Steward::new(SETTINGS), Steward::new(SETTINGS)],
            leader: None,
            term: 0,
            leading: [None; 2],
            counts: Counts::default(),
            shape,
            troubled: true,
            chatty: entente_sim::is_looked_at(),
            queue: BTreeMap::new(),
            mails: 0,
            session,
            sequence: 0,
            streams: 0,
            last_placed_ms: 0,
        };
        world.found();
        world
    }

    /// What the first coordinator does, and the nodes that start soon, or not so soon.
    fn found(&mut self) {
        let model = ServedModel {
            digest: ModelDigest([7; 32]),
            shape: self.shape.clone(),
            manifest_sha256: None,
        };
        for region in regions() {
            let replicas = 1 + self.random.below(2) as u16;
            self.order(Command::SetReplicas(region, replicas));
        }
        let (kind, key) = (RecordKind::Model, SERVED_MODEL_KEY.to_owned());
        let (value, revision) = (model.encode(), Some(0));
        self.order(Command::PutRecord { kind, key, value, revision });
        self.elect();
        let ids: Vec<NodeId> = self.machines.keys().copied().collect();
        for node in ids {
            let late = if self.random.one_in(8) { 6_000 } else { 300 };
            self.post(late, Mail::Start { node });
        }
        self.post(0, Mail::Tick);
        self.post(500, Mail::Trouble);
    }

    pub fn run(mut self) -> Result<Counts, String> {
        self.until(TROUBLE_MS)?;
        // What is under way arrives before the repairs.
        self.troubled = false;
        self.until(TROUBLE_MS + 3_000)?;
        self.end_troubles();
        self.until(TROUBLE_MS + REST_MS)?;
        self.rests()?;
        Ok(self.counts)
    }

    pub fn until(&mut self, end_ms: u64) -> Checked {
        while let Some(((at_ms, _), _)) = self.queue.first_key_value() {
            if *at_ms > end_ms {
                break;
            }
            let Some(((at_ms, _), mail)) = self.queue.pop_first() else { break };
            self.now_ms = at_ms;
            if self.chatty && !matches!(mail, Mail::Tick | Mail::Beat { .. } | Mail::State { .. }) {
                println!("{at_ms:>6} {mail:?}");
            }
            self.deliver(mail).map_err(|error| format!("at {at_ms} ms: {error}"))?;
        }
        self.now_ms = end_ms;
        Ok(())
    }

    /// Sends something that arrives within so many milliseconds.
    pub fn post(&mut self, within_ms: u64, mail: Mail) {
        let at_ms = self.now_ms + 1 + self.random.below(within_ms);
        self.post_at(at_ms, mail);
    }

    pub fn post_at(&mut self, at_ms: u64, mail: Mail) {
        self.mails += 1;
        self.queue.insert((at_ms.max(self.now_ms), self.mails), mail);
    }

    fn deliver(&mut self, mail: Mail) -> Checked {
        match mail {
            Mail::Tick => {
                for leader in 0..2 {
                    self.tell(leader, Event::Tick)?;
                }
                self.post_at(self.now_ms + 100, Mail::Tick);
                Ok(())
            }
            Mail::Trouble => self.trouble(),
            Mail::Report { leader, stream, report } => self.reported(leader, stream, report),
            Mail::Propose { leader, term, id, expect, command } => {
                self.proposed(leader, term, id, expect, command)
            }
            Mail::Answer { leader, term, id, outcome } => {
                if self.leading[leader] == Some(term) {
                    self.tell(leader, Event::Answered { id, outcome })?;
                }
                Ok(())
            }
            Mail::State { leader, state } => self.tell(leader, Event::Committed(state)),
            Mail::Leads { leader, term } => {
                if self.term == term {
                    // What earlier leaders committed is applied first.
                    self.tell(leader, Event::Committed(Arc::clone(&self.state)))?;
                    self.leading[leader] = Some(term);
                    self.tell(leader, Event::Leads)?;
                }
                Ok(())
            }
            Mail::Follows { leader, term } => {
                if self.leading[leader] == Some(term) {
                    self.leading[leader] = None;
                    self.tell(leader, Event::Follows)?;
                    self.end_streams(leader);
                }
                Ok(())
            }
            of_a_node => self.at_node(of_a_node),
        }
    }

    /// Raft chooses a leader, perhaps the same again. The old one hears of it late.
    pub fn elect(&mut self) {
        let old = self.leader.map(|leader| (leader, self.term));
        self.term += 1;
        let leader = self.random.below(2) as usize;
        self.leader = Some(leader);
        self.counts.leaders += 1;
        let mut heard_ms = 0;
        if let Some((old, term)) = old {
            heard_ms = self.random.below(400);
            self.post_at(self.now_ms + heard_ms, Mail::Follows { leader: old, term });
            if old != leader {
                heard_ms = 0;
            }
        }
        let at_ms = self.now_ms + heard_ms + 1 + self.random.below(300);
        self.post_at(at_ms, Mail::Leads { leader, term: self.term });
    }

    /// Gives an event to a steward, and carries out what it wants.
    fn tell(&mut self, leader: usize, event: Event) -> Checked {
        for command in self.stewards[leader].on(event, self.now_ms) {
            let steward::Command::Propose { id, expect, command } = command;
            self.propose(leader, id, expect, command);
        }
        Ok(())
    }

    pub fn propose(&mut self, leader: usize, id: u64, expect: Expect, command: Command) {
        let Some(term) = self.leading[leader] else { return };
        if matches!(command, Command::SetPlacement(_)) {
            self.last_placed_ms = self.now_ms;
        }
        let propose = Mail::Propose { leader, term, id, expect, command };
        if self.troubled && self.random.one_in(20) {
            // It takes so long, or is lost, that nobody waits for its answer.
            self.post_at(self.now_ms + 300, Mail::Answer { leader, term, id, outcome: None });
            if self.random.one_in(2) {
                self.post(1_500, propose);
            }
            return;
        }
        self.post(20, propose);
    }

    /// A proposal is in the log; perhaps one whose leader leads no more.
    fn proposed(
        &mut self,
        leader: usize,
        term: u64,
        id: u64,
        expect: Expect,
        command: Command,
    ) -> Checked {
        let before = matches!(command, Command::SetPlacement(_)).then(|| self.served());
        let outcome = self.commit(expect, command);
        if let Some(before) = before {
            self.counts.commits += u64::from(outcome.is_ok());
            self.loses_nothing(&before, "a commit")?;
        }
        self.post(30, Mail::Answer { leader, term, id, outcome: Some(outcome) });
        Ok(())
    }

    /// Applies a command, and lets everybody hear of it sooner or later.
    pub fn commit(&mut self, expect: Expect, command: Command) -> Outcome {
        let mut state = State::clone(&self.state);
        self.sequence += 1;
        let (session, sequence, at_ms) = (self.session, self.sequence, self.now_ms);
        let request = Request { session, sequence, at_ms, expect, command };
        let lost = match request.command {
            Command::SetState(id, NodeState::Down) | Command::Register(id) => Some(id),
            _ => None,
        };
        let outcome = state.apply_entry(state.applied_index() + 1, Some(request)).unwrap().unwrap();
        self.state = Arc::new(state);
        if let (Some(id), true) = (lost, outcome.is_ok()) {
            self.lose(id);
        }
        for leader in 0..2 {
            let state = Arc::clone(&self.state);
            self.post(50, Mail::State { leader, state });
        }
        if let Ok(Applied::Placement(epoch)) = outcome {
            let ids: Vec<NodeId> = self.machines.keys().copied().collect();
            for node in ids {
                let placed = self.state.placement().experts_of(node);
                self.post(150, Mail::Seen { node, placed, epoch: epoch.0 });
            }
        }
        outcome
    }

    /// An operator's or a coordinator's command, whatever comes of it.
    pub fn order(&mut self, command: Command) {
        let outcome = self.commit(Expect::default(), command);
        if let (true, Err(refused)) = (self.chatty, outcome) {
            println!("{:>6} {refused}", self.now_ms);
        }
    }

    /// A report arrives at the process that the stream goes to.
    fn reported(&mut self, leader: usize, stream: u64, report: Report) -> Checked {
        if self.leading[leader].is_none() {
            return Ok(());
        }
        let node = report.node;
        if self.stewards[leader].fenced(node, report.incarnation) {
            self.post(20, Mail::Fenced { node, stream });
            return Ok(());
        }
        self.tell(leader, Event::Report(report))?;
        let orders = self.stewards[leader].orders(node);
        if let Some(machine) = self.machines.get_mut(&node)
            && let Some(Stream { number, orders_ms, .. }) = &mut machine.stream
            && *number == stream
        {
            let at_ms = (*orders_ms).max(self.now_ms + 1 + self.random.below(60));
            *orders_ms = at_ms;
            self.post_at(at_ms, Mail::Orders { node, stream, orders });
        }
        Ok(())
    }

    /// What has a replica that coordinators can use, by region.
    pub fn served(&self) -> BTreeSet<(Region, ExpertKey)> {
        let mut served = BTreeSet::new();
        for (expert, nodes) in self.state.placement().iter() {
            for node in nodes.iter().filter_map(|id| self.machines.get(id)) {
                if self.is_used(node) && node.held.contains(&expert) {
                    served.insert((node.region, expert));
                }
            }
        }
        served
    }

    /// Coordinators cannot use the node from here on.
    pub fn lose(&mut self, node: NodeId) {
        let now_ms = self.now_ms;
        if let Some(machine) = self.machines.get_mut(&node) {
            machine.lost_ms = Some(now_ms);
        }
    }

    fn is_used(&self, machine: &Machine) -> bool {
        self.state.node_by_id(machine.id).is_some_and(|node| {
            machine.is_alive
                && node.incarnation == machine.incarnation
                && matches!(node.state, NodeState::Active | NodeState::Draining)
        })
    }

    /// Compares what is served with what was before. A replica that a node lost by itself moments
    /// ago, of which the leader could not know, is not its doing.
    pub fn loses_nothing(&self, before: &BTreeSet<(Region, ExpertKey)>, by: &str) -> Checked {
        let knows_ms = SETTINGS.down_after_ms + 500;
        let is_excused = |region: Region, expert: ExpertKey| {
            let named = self.state.placement().replicas(expert);
            let here = named.filter_map(|id| self.machines.get(&id)).filter(|m| m.region == region);
            here.filter_map(|m| m.lost_ms).any(|lost_ms| self.now_ms < lost_ms + knows_ms)
        };
        let after = self.served();
        match before.difference(&after).find(|(region, expert)| !is_excused(*region, *expert)) {
            None => Ok(()),
            Some((region, expert)) => {
                Err(format!("{by} took the last replica of {expert:?} in {region} away"))
            }
        }
    }
}

pub fn regions() -> [Region; 2] {
    ["fr", "se"].map(|code| code.parse().unwrap())
}

/// The members at the start, and how many experts fit on the nodes of each region.
fn founders(
    random: &mut Random,
    shape: &ModelShape,
) -> (Vec<NodeSpec>, BTreeMap<Region, Option<usize>>) {
    let mut specs = Vec::new();
    let mut rooms = BTreeMap::new();
    for region in regions() {
        specs.push(spec(&format!("{region}-coordinator"), region, Role::Coordinator, None));
        let count = 2 + random.below(3);
        let tight = (2 * shape.expert_count()).div_ceil(count) + 1 + random.below(3);
        let room = (!random.one_in(3)).then_some(tight as usize);
        rooms.insert(region, room);
        for n in 0..count {
            let name = format!("{region}-expert-{n}");
            specs.push(spec(&name, region, Role::ExpertNode, room));
        }
    }
    (specs, rooms)
}

pub fn spec(name: &str, region: Region, role: Role, room: Option<usize>) -> NodeSpec {
    NodeSpec {
        name: name.parse().unwrap(),
        region,
        site: String::new(),
        role,
        address: "127.0.0.1:1".to_owned(),
        memory_bytes: room.map(|room| room as u64 * EXPERT_BYTES),
        kernel_class: String::new(),
        device: None,
    }
}

pub fn open_session(state: &mut State) -> SessionId {
    let request = Request {
        session: SessionId(0),
        sequence: 0,
        at_ms: 0,
        expect: Expect::default(),
        command: Command::OpenSession,
    };
    let outcome = state.apply_entry(state.applied_index() + 1, Some(request)).unwrap();
    match outcome {
        Some(Ok(Applied::Session(session))) => session,
        other => panic!("{other:?}"),
    }
}
