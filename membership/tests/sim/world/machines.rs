//! Machines: a voter on each, the disk that it waits for, and what a crash leaves of both.

use super::*;

impl World {
    pub(super) fn restart(&mut self, id: u64) -> Result<(), String> {
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
        let settings = Settings {
            raft,
            cluster,
            snapshot_entries: 24,
            snapshot_keep: 6,
            tells_changes: false,
        };
        let voter = Voter::open(settings, machine.durable.clone());
        let voter = voter.map_err(|error| format!("{id} does not start: {error}"))?;
        machine.voter = Some(voter);
        let start = machine.start;
        self.after(TICK, Event::Tick { node: id, start });
        self.pump(id)
    }

    pub(super) fn crash(&mut self, id: u64) {
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

    pub(super) fn input(&mut self, id: u64, input: Input) -> Result<(), String> {
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

    pub(super) fn drain(&mut self, id: u64) -> Result<(), String> {
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
                self.propose(id, client, attempt, *request)
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

    pub(super) fn disk_done(&mut self, id: u64, start: u64) -> Result<(), String> {
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
}
