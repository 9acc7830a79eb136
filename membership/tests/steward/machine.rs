//! An expert node that obeys its orders, late, and not always with success.

use std::collections::BTreeSet;

use entente_membership::state::{Applied, Command, Expect};
use entente_membership::steward::{Orders, Report};
use entente_proto::ids::{Incarnation, NodeId, Region};
use entente_proto::placement::ExpertKey;

use crate::world::{Checked, Mail, World};

/// The stream on which a node reports and gets its orders.
#[derive(Debug, Clone)]
pub struct Stream {
    pub number: u64,
    pub leader: usize,
    /// When the last orders, and the last report, on their way arrive: a stream keeps its order.
    pub orders_ms: u64,
    reports_ms: u64,
    /// What was last said to be held.
    said: Option<BTreeSet<ExpertKey>>,
}

#[derive(Debug, Clone)]
pub struct Machine {
    pub id: NodeId,
    pub region: Region,
    pub room: Option<usize>,
    pub is_alive: bool,
    pub is_paused: bool,
    pub incarnation: Option<Incarnation>,
    pub stream: Option<Stream>,
    pub held: BTreeSet<ExpertKey>,
    pub leaving: bool,
    /// When it last lost what it held, or the right to serve it.
    pub lost_ms: Option<u64>,
    loading: Option<(u64, ExpertKey)>,
    loads: u64,
    wanted: BTreeSet<ExpertKey>,
    placed: (u64, BTreeSet<ExpertKey>),
    failed: Vec<ExpertKey>,
    sequence: u64,
}

impl Machine {
    pub fn new(id: NodeId, region: Region, room: Option<usize>) -> Self {
        Self {
            id,
            region,
            room,
            is_alive: false,
            is_paused: false,
            incarnation: None,
            stream: None,
            held: BTreeSet::new(),
            leaving: false,
            lost_ms: None,
            loading: None,
            loads: 0,
            wanted: BTreeSet::new(),
            placed: (0, BTreeSet::new()),
            failed: Vec::new(),
            sequence: 0,
        }
    }

    /// The process ends, with all that it had in memory.
    pub fn die(&mut self, now_ms: u64) {
        let (loads, lost_ms) = (self.loads, Some(now_ms));
        *self = Self { loads, lost_ms, ..Self::new(self.id, self.region, self.room) };
    }

    fn report(&mut self, incarnation: Incarnation) -> Option<Report> {
        let stream = self.stream.as_mut()?;
        let held = (stream.said.as_ref() != Some(&self.held)).then(|| self.held.clone());
        stream.said = Some(self.held.clone());
        self.sequence += 1;
        Some(Report {
            node: self.id,
            incarnation,
            sequence: self.sequence,
            held,
            failed: std::mem::take(&mut self.failed),
            leaving: self.leaving,
            rows: Vec::new(),
        })
    }
}

impl World {
    pub fn to_node(&mut self, mail: Mail) -> Checked {
        match mail {
            Mail::Start { node } => {
                let Some(machine) = self.machines.get_mut(&node) else { return Ok(()) };
                if !machine.is_alive {
                    machine.is_alive = true;
                    self.post(50, Mail::Register { node });
                }
            }
            Mail::Resume { node } => {
                let Some(machine) = self.machines.get_mut(&node) else { return Ok(()) };
                machine.is_paused = false;
            }
            Mail::Register { node } => self.register(node),
            Mail::Beat { node, stream } => self.beat(node, stream),
            Mail::StreamEnds { node, stream } if self.is_open(node, stream) => self.reopen(node),
            Mail::Fenced { node, stream } if self.is_open(node, stream) => {
                let Some(machine) = self.machines.get_mut(&node) else { return Ok(()) };
                machine.stream = None;
                machine.incarnation = None;
                self.post(100, Mail::Register { node });
            }
            Mail::Orders { node, stream, orders } if self.is_open(node, stream) => {
                return self.obey(node, orders);
            }
            Mail::Seen { node, placed, epoch } => {
                let Some(machine) = self.machines.get_mut(&node) else { return Ok(()) };
                if machine.is_alive && machine.placed.0 < epoch {
                    machine.placed = (epoch, placed);
                }
            }
            Mail::Loaded { node, load } => return self.loaded(node, load),
            _ => {}
        }
        Ok(())
    }

    fn is_open(&self, node: NodeId, stream: u64) -> bool {
        let machine = self.machines.get(&node).filter(|machine| machine.is_alive);
        machine.and_then(|machine| machine.stream.as_ref()).is_some_and(|s| s.number == stream)
    }

    fn register(&mut self, node: NodeId) {
        let Some(machine) = self.machines.get(&node).filter(|machine| machine.is_alive) else {
            return;
        };
        if machine.incarnation.is_some() {
            return;
        }
        // Only a leader that knows of it takes a registration.
        let leads = self.leader.is_some_and(|leader| self.leading[leader] == Some(self.term));
        if !leads || machine.is_paused {
            self.post(100, Mail::Register { node });
            return;
        }
        let outcome = self.commit(Expect::default(), Command::Register(node));
        let Ok(Applied::Registered(incarnation)) = outcome else { return };
        if let Some(machine) = self.machines.get_mut(&node) {
            machine.incarnation = Some(incarnation);
        }
        self.reopen(node);
    }

    /// Opens a stream to whoever leads; what was said on the last one counts no more.
    pub fn reopen(&mut self, node: NodeId) {
        let Some(leader) = self.leader else { return };
        self.streams += 1;
        let number = self.streams;
        let Some(machine) = self.machines.get_mut(&node) else { return };
        machine.stream = Some(Stream { number, leader, orders_ms: 0, reports_ms: 0, said: None });
        self.post(100, Mail::Beat { node, stream: number });
    }

    /// The process of a steward that leads no more ends its streams.
    pub fn end_streams(&mut self, leader: usize) {
        let of_it =
            |m: &&crate::machine::Machine| m.stream.as_ref().is_some_and(|s| s.leader == leader);
        let streams: Vec<(NodeId, u64)> = self
            .machines
            .values()
            .filter(of_it)
            .filter_map(|machine| Some((machine.id, machine.stream.as_ref()?.number)))
            .collect();
        for (node, stream) in streams {
            self.post(100, Mail::StreamEnds { node, stream });
        }
    }

    fn beat(&mut self, node: NodeId, stream: u64) {
        if !self.is_open(node, stream) {
            return;
        }
        self.post_at(self.now_ms + 100, Mail::Beat { node, stream });
        let Some(machine) = self.machines.get_mut(&node) else { return };
        let Some(incarnation) = machine.incarnation.filter(|_| !machine.is_paused) else { return };
        let Some(leader) = machine.stream.as_ref().map(|stream| stream.leader) else { return };
        if self.leading[leader].is_none() {
            // The process answers that it does not lead.
            self.post(100, Mail::StreamEnds { node, stream });
            return;
        }
        let Some(report) = machine.report(incarnation) else { return };
        let slow = if self.troubled && self.random.one_in(50) { 900 } else { 40 };
        let after_ms = 1 + self.random.below(slow);
        let Some(Stream { reports_ms, .. }) = &mut machine.stream else { return };
        *reports_ms = (*reports_ms).max(self.now_ms + after_ms);
        let at_ms = *reports_ms;
        let mail = Mail::Report { leader, stream, report };
        if self.troubled && self.random.one_in(20) {
            // Once more, and much later.
            let again_ms = at_ms + self.random.below(2_000);
            self.post_at(again_ms, mail.clone());
        }
        self.post_at(at_ms, mail);
        self.load(node);
    }

    /// Releases first, then loads.
    fn obey(&mut self, node: NodeId, orders: Orders) -> Checked {
        let before = self.served();
        let Some(machine) = self.machines.get_mut(&node) else { return Ok(()) };
        if machine.is_paused {
            return Ok(());
        }
        let count = machine.held.len();
        let placed = &machine.placed.1;
        machine.held.retain(|expert| orders.wanted.contains(expert) || placed.contains(expert));
        self.counts.releases += (count - machine.held.len()) as u64;
        if machine.loading.is_some_and(|(_, expert)| !orders.wanted.contains(&expert)) {
            machine.loading = None;
        }
        machine.wanted = orders.wanted;
        let leaves = orders.dismissed && machine.leaving;
        self.loses_nothing(&before, "an order")?;
        if leaves {
            self.stopped(node);
        } else {
            self.load(node);
        }
        Ok(())
    }

    /// Begins to load something that is missing.
    fn load(&mut self, node: NodeId) {
        let Some(machine) = self.machines.get_mut(&node) else { return };
        if machine.loading.is_some() {
            return;
        }
        let missing: Vec<ExpertKey> = machine.wanted.difference(&machine.held).copied().collect();
        let Some(expert) = self.random.pick(&missing) else { return };
        machine.loads += 1;
        machine.loading = Some((machine.loads, expert));
        let load = machine.loads;
        let slow = if self.troubled && self.random.one_in(20) { 3_000 } else { 100 };
        self.post(slow, Mail::Loaded { node, load });
    }

    fn loaded(&mut self, node: NodeId, load: u64) -> Checked {
        let fails = self.troubled && self.random.one_in(10);
        let Some(machine) = self.machines.get_mut(&node) else { return Ok(()) };
        let Some((_, expert)) = machine.loading.take_if(|(number, _)| *number == load) else {
            return Ok(());
        };
        if fails {
            machine.failed.push(expert);
            self.counts.failures += 1;
            return Ok(());
        }
        self.counts.loads += 1;
        machine.held.insert(expert);
        if machine.room.is_some_and(|room| machine.held.len() > room) {
            return Err(format!("node {node} holds {} experts", machine.held.len()));
        }
        self.load(node);
        Ok(())
    }
}
