//! The one thread that owns the voter and its disk.
//!
//! It runs the loop that [`crate::voter`] gives. What waits together is made durable together: one
//! `fsync` for all that came while the last one took place.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use entente_proto::ids::{Incarnation, NodeName};
use entente_proto::wire;
use entente_tls::Credentials;
use tokio::sync::{oneshot, watch};

use super::peers::Peers;
use super::shared::{Directory, Own, Shared};
use super::steward_shell::StewardHandle;
use super::witness::Cosigner;
use super::{Config, ServiceError, config};
use crate::client::Client;
use crate::guard::Guard;
use crate::raft::{Change, NotProposed, Status};
use crate::state::{Command, Outcome, Request, SessionId, State};
use crate::store::{Identity, RedbStore, Store};
use crate::voter::{Answer, Done, Voter};

/// Commands that wait for the thread; more are refused as busy.
const INPUTS_MAX: usize = 1_024;
/// Commands that are taken before what they amount to is made durable.
const BATCH_MAX: usize = 256;
/// Proposals and reads that wait for their answers; more are refused as busy.
const WAITING_MAX: usize = 4_096;

/// What became of a proposal: its entry and its outcome, or why it was not proposed.
pub(super) type Proposed = Result<(u64, Outcome), NotProposed>;

enum Input {
    Deliver(Box<wire::RaftEnvelope>),
    Propose(Box<Request>, oneshot::Sender<Proposed>),
    Change(Change, oneshot::Sender<Result<(), NotProposed>>),
    Transfer(u64, oneshot::Sender<Result<(), NotProposed>>),
    TakeSnapshot(oneshot::Sender<u64>),
    Read(oneshot::Sender<()>),
    Incarnation(Incarnation),
    Wake,
}

/// The door to the thread. Cheap to clone; never blocks.
#[derive(Clone)]
pub(super) struct Owner(SyncSender<Input>);

impl Owner {
    /// Hands a message over, or drops it: raft sends it again.
    pub(super) fn deliver(&self, envelope: wire::RaftEnvelope) {
        let _ = self.0.try_send(Input::Deliver(Box::new(envelope)));
    }

    /// Proposes here. `None`: it may be committed or not.
    pub(super) async fn propose(&self, request: Request) -> Option<Proposed> {
        match self.submit(request) {
            Some(answered) => answered.await.ok(),
            None => Some(Err(NotProposed::Busy)),
        }
    }

    /// The same without waiting; requests are proposed in the order of these calls. `None`: it is
    /// busy.
    pub(super) fn submit(&self, request: Request) -> Option<oneshot::Receiver<Proposed>> {
        let (answer, answered) = oneshot::channel();
        self.0.try_send(Input::Propose(Box::new(request), answer)).ok()?;
        Some(answered)
    }

    pub(super) async fn change(&self, change: Change) -> Result<(), NotProposed> {
        self.ask(|answer| Input::Change(change, answer)).await.unwrap_or(Err(NotProposed::Busy))
    }

    pub(super) async fn transfer(&self, to: u64) -> Result<(), NotProposed> {
        self.ask(|answer| Input::Transfer(to, answer)).await.unwrap_or(Err(NotProposed::Busy))
    }

    /// The index of the snapshot. `None`: the thread has ended or is busy.
    pub(super) async fn take_snapshot(&self) -> Option<u64> {
        self.ask(Input::TakeSnapshot).await
    }

    /// Whether the published state is now no older than this call.
    pub(super) async fn read(&self) -> bool {
        self.ask(Input::Read).await.is_some()
    }

    pub(super) fn set_incarnation(&self, incarnation: Incarnation) {
        let _ = self.0.try_send(Input::Incarnation(incarnation));
    }

    /// Makes it look whether it is to stop; one that is busy looks anyway.
    pub(super) fn wake(&self) {
        let _ = self.0.try_send(Input::Wake);
    }

    async fn ask<T>(&self, input: impl FnOnce(oneshot::Sender<T>) -> Input) -> Option<T> {
        let (answer, answered) = oneshot::channel();
        self.0.try_send(input(answer)).ok()?;
        answered.await.ok()
    }
}

/// What the service is put together from.
pub(super) struct Parts<'a> {
    pub(super) voter: Voter,
    pub(super) store: RedbStore,
    pub(super) config: &'a Config,
    pub(super) credentials: Credentials,
    pub(super) guard: Guard,
    pub(super) beginning: State,
    pub(super) identity: Identity,
    pub(super) name: NodeName,
    pub(super) address: String,
    pub(super) client: Client,
    pub(super) cosigner: Option<Cosigner>,
    pub(super) steward: StewardHandle,
    pub(super) stopping: watch::Receiver<bool>,
}

/// The thread before it runs.
pub(super) struct Thread {
    voter: Voter,
    store: RedbStore,
    inputs: Receiver<Input>,
    tick: Duration,
    peers: Peers,
    waiting: BTreeMap<(SessionId, u64), Vec<oneshot::Sender<Proposed>>>,
    reads: BTreeMap<u64, oneshot::Sender<()>>,
    /// Numbers requests to open a session, which have no number of their own.
    opened: u64,
    led: bool,
    state: watch::Sender<Arc<State>>,
    status: watch::Sender<Status>,
    stopping: watch::Receiver<bool>,
    #[cfg(feature = "etcd")]
    mirrored: Option<super::mirrored::Mirrored>,
}

pub(super) fn prepare(parts: Parts<'_>) -> Result<(Thread, Shared), ServiceError> {
    #[cfg(feature = "etcd")]
    let cluster = parts.credentials.identity().cluster.clone();
    let (sender, inputs) = sync_channel(INPUTS_MAX);
    let (state, states) = watch::channel(Arc::new(parts.voter.state().clone()));
    let (status, statuses) = watch::channel(parts.voter.status());
    let directory = Directory { state: states.clone(), beginning: Arc::new(parts.beginning) };
    let peers = Peers::new(directory.clone(), parts.credentials, parts.config.via.clone());
    let shared = Shared {
        owner: Owner(sender),
        state: states,
        status: statuses,
        client: parts.client,
        cosigner: parts.cosigner.map(Arc::new),
        steward: parts.steward,
        directory,
        guard: parts.guard,
        own: Arc::new(Own { identity: parts.identity, name: parts.name, address: parts.address }),
        tick: parts.config.tick(),
        election: Duration::from_millis(parts.config.election_ms),
        stopping: parts.stopping.clone(),
    };
    let thread = Thread {
        voter: parts.voter,
        store: parts.store,
        inputs,
        tick: parts.config.tick(),
        peers,
        waiting: BTreeMap::new(),
        reads: BTreeMap::new(),
        opened: config::random(),
        led: false,
        state,
        status,
        stopping: parts.stopping,
        #[cfg(feature = "etcd")]
        mirrored: parts
            .config
            .etcd
            .clone()
            .map(|etcd| super::mirrored::Mirrored::start(etcd, &cluster)),
    };
    Ok((thread, shared))
}

impl Thread {
    /// Starts it. The result is how it ended.
    pub(super) fn start(self) -> Result<oneshot::Receiver<Result<(), ServiceError>>, ServiceError> {
        let (end, ended) = oneshot::channel();
        let run = move || {
            // Whoever waited has gone if this cannot be told.
            let _ = end.send(self.run());
        };
        let named = std::thread::Builder::new().name("membership".to_owned());
        named
            .spawn(run)
            .map_err(|error| ServiceError::Disk(format!("no thread for it: {error}")))?;
        Ok(ended)
    }

    fn run(mut self) -> Result<(), ServiceError> {
        let mut next_tick = Instant::now() + self.tick;
        while !*self.stopping.borrow() {
            let wait = next_tick.saturating_duration_since(Instant::now());
            match self.inputs.recv_timeout(wait) {
                Ok(first) => {
                    self.take(first)?;
                    for _ in 1..BATCH_MAX {
                        let Ok(input) = self.inputs.try_recv() else { break };
                        self.take(input)?;
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
            }
            // Ticks that a slow disk or a pause made us miss are not made up for: they would end
            // in elections that nobody needs.
            if Instant::now() >= next_tick {
                next_tick = Instant::now() + self.tick;
                self.voter.tick()?;
                self.forget_those_who_left();
            }
            self.work()?;
        }
        Ok(())
    }

    fn take(&mut self, input: Input) -> Result<(), ServiceError> {
        match input {
            Input::Deliver(envelope) => {
                self.voter.receive(*envelope)?;
            }
            Input::Propose(request, answer) => self.propose(*request, answer),
            Input::Change(change, answer) => drop(answer.send(self.voter.change(change))),
            Input::Transfer(to, answer) => drop(answer.send(self.voter.transfer_leader(to))),
            Input::TakeSnapshot(answer) => drop(answer.send(self.voter.take_snapshot()?)),
            Input::Read(answer) => {
                // One that cannot be asked for now is dropped, which says so.
                if self.reads.len() < WAITING_MAX
                    && let Ok(number) = self.voter.read()
                {
                    self.reads.insert(number, answer);
                }
            }
            Input::Incarnation(incarnation) => self.voter.set_incarnation(incarnation),
            // The loop looks for itself whether it is to stop.
            Input::Wake => {}
        }
        Ok(())
    }

    fn propose(&mut self, mut request: Request, answer: oneshot::Sender<Proposed>) {
        if request.command == Command::OpenSession {
            self.opened = self.opened.wrapping_add(1);
            (request.session, request.sequence) = (SessionId(0), self.opened);
        }
        let proposed = if self.waiting.len() < WAITING_MAX {
            self.voter.propose(&request)
        } else {
            Err(NotProposed::Busy)
        };
        match proposed {
            Ok(()) => {
                let key = (request.session, request.sequence);
                self.waiting.entry(key).or_default().push(answer);
            }
            Err(error) => drop(answer.send(Err(error))),
        }
    }

    /// Does what is to be done until there is nothing more.
    fn work(&mut self) -> Result<(), ServiceError> {
        while let Some(ready) = self.voter.ready()? {
            self.peers.send(ready.messages);
            if let Some(batch) = &ready.batch {
                self.store.persist(batch)?;
            }
            let Done { messages, answers, reads, installed, left, changes } =
                self.voter.persisted()?;
            self.peers.send(messages);
            self.peers.close(&left);
            self.publish();
            self.mirror(changes);
            answers.into_iter().for_each(|answer| self.answer(answer));
            for number in reads {
                self.reads.remove(&number).map(|answer| answer.send(()));
            }
            if installed {
                self.waiting.clear();
            }
        }
        self.publish();
        let leads = self.voter.is_leader();
        if self.led && !leads {
            // The next leader may commit them or not: unknown is the answer, and the client's
            // repetition goes there.
            self.waiting.clear();
        }
        self.led = leads;
        self.mirror(Vec::new());
        Ok(())
    }

    #[cfg(feature = "etcd")]
    fn mirror(&mut self, changes: Vec<State>) {
        if let Some(mirrored) = &mut self.mirrored {
            mirrored.take(changes, self.voter.state(), self.voter.is_leader());
        }
    }

    #[cfg(not(feature = "etcd"))]
    fn mirror(&mut self, _: Vec<State>) {}

    fn answer(&mut self, answer: Answer) {
        let Answer { index, session, sequence, outcome } = answer;
        for waiting in self.waiting.remove(&(session, sequence)).into_iter().flatten() {
            let _ = waiting.send(Ok((index, outcome.clone())));
        }
    }

    fn publish(&self) {
        let state = self.voter.state();
        self.state.send_if_modified(|published| {
            let newer = published.applied_index() != state.applied_index();
            if newer {
                *published = Arc::new(state.clone());
            }
            newer
        });
        let status = self.voter.status();
        self.status.send_if_modified(|published| {
            let newer = *published != status;
            if newer {
                *published = status;
            }
            newer
        });
    }

    /// Those whose deadlines have passed.
    fn forget_those_who_left(&mut self) {
        self.waiting.retain(|_, waiting| {
            waiting.retain(|answer| !answer.is_closed());
            !waiting.is_empty()
        });
        self.reads.retain(|_, answer| !answer.is_closed());
    }
}
