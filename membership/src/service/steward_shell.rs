//! The task that owns the [`Steward`]: it tells it the time, what is committed and what nodes
//! report, and proposes what it wants.
//!
//! It acts only while this voter leads, and after everything that earlier leaders committed is
//! applied here. What it proposes is proposed here and nowhere else, under a session of this
//! leadership, so that it ends with it. What is asked of it at another time gets no answer, which
//! the caller takes for "not the leader".

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use entente_proto::ids::{Incarnation, NodeId};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};

use super::shared::Shared;
use crate::raft::Status;
use crate::state::{self, Applied, Expect, Outcome, RefusedCode, Request, SessionId, State};
use crate::steward::{
    Command, Event, NodeHealth, Orders, PlanError, Proposal, Rebalance, Report, Settings, Steward,
    Unsafe,
};

/// What waits for the steward; more is refused.
const ASKS_MAX: usize = 1_024;
/// Proposals on their way; more are refused.
const PROPOSALS_MAX: usize = 512;
/// How long a proposal may take before its outcome counts as unknown.
const PROPOSAL_MAX: Duration = Duration::from_secs(5);
/// Between two ticks.
const TICK: Duration = Duration::from_millis(100);

/// What is asked of the steward.
pub(super) enum Ask {
    Report(Report, oneshot::Sender<Heard>),
    Propose(Expect, Box<state::Command>, oneshot::Sender<Option<Outcome>>),
    Nodes(oneshot::Sender<Nodes>),
    OkToStop(BTreeSet<NodeId>, oneshot::Sender<Result<(), Unsafe>>),
    Drain(NodeId, oneshot::Sender<Result<(), Unsafe>>),
    Plan(Option<u16>, oneshot::Sender<Result<Proposal, PlanError>>),
    Rebalance(Rebalance, oneshot::Sender<Result<Proposal, PlanError>>),
}

/// What comes of a report.
pub(super) enum Heard {
    /// The node does this, in the state that it was decided on.
    Orders(Orders, Arc<State>),
    /// This start of the node counts no more.
    Fenced,
}

/// What is known of the nodes.
pub(super) struct Nodes {
    pub(super) health: BTreeMap<NodeId, NodeHealth>,
    pub(super) progress: String,
    pub(super) replicas_left: usize,
    pub(super) state: Arc<State>,
}

/// The door to the steward. Cheap to clone.
#[derive(Clone)]
pub(super) struct StewardHandle(mpsc::Sender<Ask>);

impl StewardHandle {
    /// `None`: this voter does not lead.
    pub(super) async fn ask<T>(&self, ask: impl FnOnce(oneshot::Sender<T>) -> Ask) -> Option<T> {
        let (answer, answered) = oneshot::channel();
        self.0.send(ask(answer)).await.ok()?;
        answered.await.ok()
    }
}

pub(super) fn channel() -> (StewardHandle, mpsc::Receiver<Ask>) {
    let (sender, asks) = mpsc::channel(ASKS_MAX);
    (StewardHandle(sender), asks)
}

/// Runs until the service stops.
pub(super) async fn run(shared: Shared, settings: Settings, mut asks: mpsc::Receiver<Ask>) {
    let mut shell = Shell {
        state: shared.state.clone(),
        steward: Steward::new(settings),
        began: Instant::now(),
        session: SessionId(0),
        sequence: 0,
        answers: JoinSet::new(),
        shared,
    };
    let mut status = shell.shared.status.clone();
    loop {
        tokio::select! {
            // First of all: what is asked of a leader may be older than its knowing that it is one.
            biased;
            term = leadership(&mut status) => {
                let Some(term) = term else { return };
                if shell.begin(term).await {
                    shell.lead(term, &mut asks).await;
                }
            }
            // Nobody is told anything; the end of the channel says it.
            ask = asks.recv() => match ask {
                Some(ask) => drop(ask),
                None => return,
            },
        }
    }
}

/// The term in which this voter leads, once it does.
async fn leadership(status: &mut watch::Receiver<Status>) -> Option<u64> {
    status.wait_for(|status| status.is_leader).await.ok().map(|status| status.term)
}

/// Others have opened so many sessions that ours was closed. Leading begins again, with another.
fn expired(outcome: Option<&Outcome>) -> bool {
    matches!(outcome, Some(Err(refused)) if refused.code == RefusedCode::SessionExpired)
}

struct Shell {
    shared: Shared,
    state: watch::Receiver<Arc<State>>,
    steward: Steward,
    began: Instant,
    /// Of this leadership.
    session: SessionId,
    sequence: u64,
    answers: JoinSet<(Asker, Option<Outcome>)>,
}

/// Who wants to know what became of a proposal.
enum Asker {
    Steward(u64),
    Handler(oneshot::Sender<Option<Outcome>>),
}

impl Shell {
    /// Waits until the state here is as new as anything committed, and opens a session. False if
    /// leadership is lost meanwhile.
    async fn begin(&mut self, term: u64) -> bool {
        let leads = |status: &Status| status.is_leader && status.term == term;
        while leads(&self.shared.status()) {
            let request =
                self.request(SessionId(0), 0, Expect::default(), state::Command::OpenSession);
            // The session's entry is of this term, so all earlier ones are applied with it.
            let opened = timeout(PROPOSAL_MAX, self.shared.owner.propose(request)).await;
            if let Ok(Some(Ok((_, Ok(Applied::Session(session)))))) = opened {
                (self.session, self.sequence) = (session, 0);
                return true;
            }
            sleep(self.shared.tick).await;
        }
        false
    }

    async fn lead(&mut self, term: u64, asks: &mut mpsc::Receiver<Ask>) {
        tracing::info!(term, "this voter leads");
        let mut status = self.shared.status.clone();
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let state = self.state.borrow_and_update().clone();
        self.event(Event::Committed(state));
        self.event(Event::Leads);
        loop {
            tokio::select! {
                _ = status.wait_for(|status| !status.is_leader || status.term != term) => break,
                _ = tick.tick() => self.event(Event::Tick),
                changed = self.state.changed() => match changed {
                    Ok(()) => self.catch_up(true),
                    Err(_) => break,
                },
                Some(Ok((asker, outcome))) = self.answers.join_next() => {
                    if expired(outcome.as_ref()) {
                        break;
                    }
                    self.answered(asker, outcome);
                }
                ask = asks.recv() => match ask {
                    Some(ask) => self.ask(ask),
                    None => break,
                },
            }
        }
        tracing::info!(term, "this voter leads no more");
        self.answers = JoinSet::new();
        self.event(Event::Follows);
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn event(&mut self, event: Event) {
        let now_ms = self.now_ms();
        let commands = self.steward.on(event, now_ms);
        self.perform(commands);
    }

    /// A state is told before anything that rests on it.
    fn catch_up(&mut self, seen: bool) {
        if seen || self.state.has_changed().unwrap_or(false) {
            let state = self.state.borrow_and_update().clone();
            self.event(Event::Committed(state));
        }
    }

    fn answered(&mut self, asker: Asker, outcome: Option<Outcome>) {
        self.catch_up(false);
        match asker {
            Asker::Steward(id) => self.event(Event::Answered { id, outcome }),
            Asker::Handler(answer) => drop(answer.send(outcome)),
        }
    }

    fn perform(&mut self, commands: Vec<Command>) {
        for Command::Propose { id, expect, command } in commands {
            self.propose(Asker::Steward(id), expect, command);
        }
    }

    /// Sequences rise in the order in which the owner gets the requests, as this is the one task
    /// that has the session.
    fn propose(&mut self, asker: Asker, expect: Expect, command: state::Command) {
        self.sequence += 1;
        let request = self.request(self.session, self.sequence, expect, command);
        let full = self.answers.len() >= PROPOSALS_MAX;
        let proposed = if full { None } else { self.shared.owner.submit(request) };
        self.answers.spawn(async move {
            let Some(proposed) = proposed else { return (asker, None) };
            match timeout(PROPOSAL_MAX, proposed).await {
                Ok(Ok(Ok((_, outcome)))) => (asker, Some(outcome)),
                _ => (asker, None),
            }
        });
    }

    fn request(
        &self,
        session: SessionId,
        sequence: u64,
        expect: Expect,
        command: state::Command,
    ) -> Request {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let at_ms = u64::try_from(since.as_millis()).unwrap_or(u64::MAX);
        Request { session, sequence, at_ms, expect, command }
    }

    /// Whoever asked may have gone; then the answer is dropped.
    fn ask(&mut self, ask: Ask) {
        self.catch_up(false);
        match ask {
            Ask::Report(report, answer) => {
                let (node, incarnation) = (report.node, report.incarnation);
                self.event(Event::Report(report));
                let _ = answer.send(self.heard(node, incarnation));
            }
            Ask::Propose(expect, command, answer) => {
                self.propose(Asker::Handler(answer), expect, *command);
            }
            Ask::Nodes(answer) => drop(answer.send(self.nodes())),
            Ask::OkToStop(nodes, answer) => drop(answer.send(self.steward.ok_to_stop(&nodes))),
            Ask::Drain(node, answer) => {
                let drained = self.steward.drain(node).map(|commands| self.perform(commands));
                let _ = answer.send(drained);
            }
            Ask::Plan(replicas, answer) => drop(answer.send(self.steward.plan(replicas))),
            Ask::Rebalance(what, answer) => {
                let _ = answer.send(self.steward.rebalance(what));
                self.event(Event::Tick);
            }
        }
    }

    fn heard(&self, node: NodeId, incarnation: Incarnation) -> Heard {
        if self.steward.fenced(node, incarnation) {
            return Heard::Fenced;
        }
        Heard::Orders(self.steward.orders(node), self.state.borrow().clone())
    }

    fn nodes(&self) -> Nodes {
        let progress = self.steward.progress();
        Nodes {
            health: self.steward.node_reports(self.now_ms()),
            progress: progress.to_string(),
            replicas_left: progress.replicas_left(),
            state: self.state.borrow().clone(),
        }
    }
}
