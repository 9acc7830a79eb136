//! Clients: each wants one thing at a time, asks again when it hears nothing, and tells the oracle
//! what it was told.

use super::*;

impl World {
    pub(super) fn client_step(&mut self, client: usize, attempt: u64) {
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

    pub(super) fn client_redirected(&mut self, client: usize, attempt: u64, leader: Option<u64>) {
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
                let (kind, value) = (RecordKind::Tenant, Bytes::from(value.into_bytes()));
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
        let request = Request { session, sequence, at_ms, expect, command };
        Task::Write(Box::new(request), number)
    }

    pub(super) fn client_answered(&mut self, client: usize, attempt: u64, outcome: &Outcome) {
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

    pub(super) fn serve_read(&mut self, id: u64, client: usize, attempt: u64) {
        let (now, who) = (self.now, &self.clients[client]);
        let Some(Task::Read(key)) = who.task.clone() else { return };
        if who.attempt != attempt {
            return;
        }
        let start = who.started;
        let Some(voter) = &self.machines[&id].voter else { return };
        let revision = voter.state().revision();
        let record = voter.state().record(RecordKind::Tenant, &key);
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
}
