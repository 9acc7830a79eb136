//! What goes wrong, and what must be true once it no longer does.

use std::sync::Arc;

use entente_membership::state::{Command, Node, NodeState, Role};
use entente_membership::steward::{Event, Steward};
use entente_proto::ids::NodeId;

use crate::machine::Machine;
use crate::world::{Checked, Mail, SETTINGS, World, regions, spec};

impl World {
    pub fn trouble(&mut self) -> Checked {
        if !self.troubled {
            return Ok(());
        }
        self.post(1_500, Mail::Trouble);
        let ids: Vec<NodeId> = self.machines.keys().copied().collect();
        let Some(node) = self.random.pick(&ids) else { return Ok(()) };
        match self.random.below(10) {
            0 | 1 => self.crash(node),
            2 => self.elect(),
            3 => self.pause(node),
            4 => self.leave(node),
            5 => self.drain(node)?,
            6 => self.cordon(node),
            7 => {
                let region = regions()[self.random.below(2) as usize];
                let replicas = 1 + self.random.below(2) as u16;
                self.order(Command::SetReplicas(region, replicas));
            }
            8 => self.cut(node),
            _ => self.join(),
        }
        Ok(())
    }

    /// The process is gone, and comes back.
    fn crash(&mut self, node: NodeId) {
        let Some(machine) = self.machines.get_mut(&node).filter(|m| m.is_alive) else { return };
        machine.die(self.now_ms);
        self.counts.crashes += 1;
        let away = if self.random.one_in(3) { 8_000 } else { 1_500 };
        self.post(away, Mail::Start { node });
    }

    fn pause(&mut self, node: NodeId) {
        if let Some(machine) = self.machines.get_mut(&node) {
            machine.is_paused = true;
        }
        self.post(2_500, Mail::Resume { node });
    }

    /// The connection breaks; the node makes another.
    fn cut(&mut self, node: NodeId) {
        let stream = self.machines.get(&node).and_then(|machine| machine.stream.as_ref());
        if let Some(stream) = stream.map(|stream| stream.number) {
            self.post(50, Mail::StreamEnds { node, stream });
        }
    }

    /// SIGTERM; after a while patience ends.
    fn leave(&mut self, node: NodeId) {
        if let Some(machine) = self.machines.get_mut(&node).filter(|m| m.is_alive) {
            machine.leaving = true;
        }
    }

    /// A node that was dismissed has ended, and is started again.
    pub fn stopped(&mut self, node: NodeId) {
        self.counts.drains += 1;
        if let Some(machine) = self.machines.get_mut(&node) {
            machine.die(self.now_ms);
        }
        self.post(3_000, Mail::Start { node });
    }

    fn drain(&mut self, node: NodeId) -> Checked {
        let Some(leader) = self.leader.filter(|leader| self.leading[*leader] == Some(self.term))
        else {
            return Ok(());
        };
        let commands = self.stewards[leader].drain(node).unwrap_or_default();
        for command in commands {
            let entente_membership::steward::Command::Propose { id, expect, command } = command;
            self.propose(leader, id, expect, command);
        }
        Ok(())
    }

    fn cordon(&mut self, node: NodeId) {
        let on = self.random.one_in(2);
        self.order(Command::Cordon(node, on));
    }

    /// A node that no file lists.
    fn join(&mut self) {
        if self.machines.len() >= 10 {
            return;
        }
        let region = regions()[self.random.below(2) as usize];
        let name = format!("{region}-joined-{}", self.machines.len());
        let room = self.machines.values().find(|m| m.region == region).and_then(|m| m.room);
        let spec = spec(&name, region, Role::ExpertNode, room);
        let name = spec.name.clone();
        self.order(Command::AddNode(spec));
        if let Some(id) = self.state.node(&name).map(|node| node.id) {
            self.machines.insert(id, Machine::new(id, region, room));
            self.post(200, Mail::Start { node: id });
        }
    }

    /// Everything works from here on.
    pub fn end_troubles(&mut self) {
        let nodes: Vec<Node> = self.state.nodes().cloned().collect();
        for node in nodes.iter().filter(|node| node.spec.role == Role::ExpertNode) {
            if node.cordoned {
                self.order(Command::Cordon(node.id, false));
            }
            let Some(machine) = self.machines.get_mut(&node.id) else { continue };
            machine.is_paused = false;
            if node.state == NodeState::Draining || machine.leaving {
                machine.die(self.now_ms);
            }
            self.post(200, Mail::Start { node: node.id });
        }
    }

    /// What must be true in the end.
    pub fn rests(&mut self) -> Checked {
        let leader = self.leader.unwrap();
        let progress = self.stewards[leader].progress();
        if !progress.is_idle() || progress.replicas_left() > 0 {
            if self.chatty {
                println!("{:#?}", self.stewards[leader]);
            }
            return Err(format!("does not come to rest: {progress}"));
        }
        for node in self.state.nodes().filter(|node| node.spec.role == Role::ExpertNode) {
            let placed = self.state.placement().experts_of(node.id);
            let machine = &self.machines[&node.id];
            if node.state != NodeState::Active || machine.held != placed {
                return Err(format!(
                    "node {} is {:?}, holds {:?}, has placed {placed:?}",
                    node.id, node.state, machine.held
                ));
            }
        }
        self.has_all_replicas()?;
        if self.last_placed_ms + 20_000 > self.now_ms {
            return Err("experts are still travelling".to_owned());
        }
        self.stays_at_rest()
    }

    fn has_all_replicas(&self) -> Checked {
        for region in regions() {
            let wanted = usize::from(self.state.replicas()[&region]);
            for expert in self.shape.experts() {
                let here = |id: &NodeId| self.machines[id].region == region;
                let count = self.state.placement().replicas(expert).filter(here).count();
                if count < wanted {
                    return Err(format!("{expert:?} has {count} of {wanted} replicas in {region}"));
                }
            }
        }
        Ok(())
    }

    /// Another leader finds nothing to do.
    fn stays_at_rest(&mut self) -> Checked {
        let mut other = Steward::new(SETTINGS);
        let mut commands = other.on(Event::Committed(Arc::clone(&self.state)), 0);
        commands.extend(other.on(Event::Leads, 0));
        for machine in self.machines.values() {
            let report = entente_membership::steward::Report {
                node: machine.id,
                incarnation: machine.incarnation.unwrap(),
                sequence: 1,
                held: Some(machine.held.clone()),
                failed: Vec::new(),
                leaving: false,
                rows: Vec::new(),
            };
            commands.extend(other.on(Event::Report(report), 10));
        }
        commands.extend(other.on(Event::Tick, 20));
        if !commands.is_empty() || !other.progress().is_idle() {
            return Err(format!("a new leader wants {commands:?}, {}", other.progress()));
        }
        Ok(())
    }
}
