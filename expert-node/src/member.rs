//! A node of a live cluster: it registers, tells that it lives and what it holds, and holds what it
//! is wanted to hold.
//!
//! ```text
//!   Client: register, heartbeats, committed state ──┐             ┌──► calls, reports
//!   loader: an expert is in memory ─────────────────┼──► Session ─┼──► loader: load these
//!   scrubber: an expert has changed in memory ──────┤             │
//!   clock, a signal ────────────────────────────────┘             └──► NodeHandle: hold, release, adopt
//! ```
//!
//! [`session`] decides; this is the shell that carries it out. One task owns the session, the stream
//! to the leader and the load that is under way, so nothing here is locked and no event is of an
//! earlier stream.

mod calls;
mod loader;
mod message;
mod restore;
mod session;

use std::future::{Future, pending};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use entente_membership::client::{Client, ClientError};
use entente_membership::net::Reason;
use entente_membership::state::State;
use entente_model::kernels::DeviceError;
use entente_proto::ids::{MembershipEpoch, NodeName, PlacementEpoch};
use entente_proto::placement::ExpertKey;
use entente_proto::wire;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, MissedTickBehavior, interval};
use tonic::Status;

use crate::Error;
use crate::node::NodeHandle;
use calls::{Answer, Stream, next_orders};
use loader::Outcome;
pub(crate) use loader::{Loader, Purpose};
pub(crate) use restore::Restorer;
pub(crate) use session::Settings;
use session::{Command, Event, Report, Session};

/// What a member is made of.
pub(crate) struct Member {
    pub(crate) name: NodeName,
    pub(crate) node: NodeHandle,
    pub(crate) client: Client,
    /// The committed state, whenever there is a newer one.
    pub(crate) states: watch::Receiver<Option<Arc<State>>>,
    /// What is said at each registration.
    pub(crate) registration: wire::RegisterRequest,
    pub(crate) loader: Arc<Loader>,
    pub(crate) settings: Settings,
    /// Experts that have changed in memory.
    pub(crate) spoilt: mpsc::Receiver<ExpertKey>,
}

/// Who is told how it goes.
pub(crate) struct Told<P, R> {
    /// Experts held and wanted.
    pub(crate) progress: P,
    /// Once the node holds what it should and takes traffic.
    pub(crate) ready: R,
    /// Once the node has an incarnation: from here on peers may be greeted.
    pub(crate) registered: oneshot::Sender<()>,
}

impl Member {
    /// Lives until `stop` resolves, or until the cluster lets the node go after `leave` did; for no
    /// longer than the drain deadline.
    ///
    /// # Errors
    /// The cluster refuses this node for good: it serves another model, or the node was removed.
    pub(crate) async fn run<P: Fn(u64, u64), R: FnOnce()>(
        self,
        told: Told<P, R>,
        leave: impl Future<Output = ()>,
        stop: impl Future<Output = ()>,
    ) -> Result<(), Error> {
        let (mut leave, mut stop) = (pin!(leave), pin!(stop));
        let mut leaving = false;
        let mut states = self.states.clone();
        let mut tick = interval(Duration::from_millis(self.settings.heartbeat_ms));
        tick.set_missed_tick_behavior(MissedTickBehavior::Skip);
        let (mut session, first) = Session::start(self.settings);
        let mut shell = Shell::new(self, told);
        shell.carry_out(first);
        let began = Instant::now();
        loop {
            let event = tokio::select! {
                () = &mut stop => return Ok(()),
                () = &mut leave, if !leaving => {
                    leaving = true;
                    Event::Leave
                }
                answer = done(&mut shell.call) => shell.answered(answer)?,
                orders = next_orders(&mut shell.stream) => shell.heard(orders),
                outcome = done(&mut shell.loading) => shell.loaded(outcome),
                state = next_state(&mut states) => shell.committed(&state),
                Some(expert) = shell.member.spoilt.recv() => Event::Spoilt(expert),
                _ = tick.tick() => Event::Tick,
            };
            let now_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
            for command in session.on(event, now_ms) {
                if command == Command::Stop {
                    return Ok(());
                }
                shell.carry_out(command);
            }
        }
    }
}

/// Something under way, whose end is an event.
type Pending<T> = Option<Pin<Box<dyn Future<Output = T> + Send>>>;

/// Waits for its end, for ever if nothing is under way.
async fn done<T>(under_way: &mut Pending<T>) -> T {
    let Some(future) = under_way else { return pending().await };
    let outcome = future.await;
    *under_way = None;
    outcome
}

async fn next_state(states: &mut watch::Receiver<Option<Arc<State>>>) -> Arc<State> {
    while states.changed().await.is_ok() {
        if let Some(state) = &*states.borrow_and_update() {
            return state.clone();
        }
    }
    pending().await
}

/// Carries commands out and makes events of what comes of them.
struct Shell<P, R> {
    member: Member,
    progress: P,
    ready: Option<R>,
    registered: Option<oneshot::Sender<()>>,
    call: Pending<Result<Answer, ClientError>>,
    stream: Option<Box<Stream>>,
    loading: Pending<Outcome>,
}

impl<P: Fn(u64, u64), R: FnOnce()> Shell<P, R> {
    fn new(member: Member, told: Told<P, R>) -> Self {
        let Told { progress, ready, registered } = told;
        let (ready, registered) = (Some(ready), Some(registered));
        Self { member, progress, ready, registered, call: None, stream: None, loading: None }
    }

    fn carry_out(&mut self, command: Command) {
        match command {
            Command::Register => {
                let request = self.member.registration.clone();
                self.call = Some(Box::pin(calls::register(self.member.client.clone(), request)));
            }
            Command::Connect(report) => {
                self.stream = None;
                let first = self.message(&report);
                self.call = Some(Box::pin(calls::connect(self.member.client.clone(), first)));
            }
            Command::Report(report) => self.report(&report),
            Command::Load { experts, beside_serving } => {
                let loader = self.member.loader.clone();
                let purpose = if beside_serving { Purpose::Serving } else { Purpose::Starting };
                self.loading = Some(Box::pin(loader.load_or_restore(experts, purpose)));
            }
            Command::Release(experts) => {
                tracing::info!(experts = experts.len(), "released");
                self.member.node.release(&experts);
            }
            Command::Adopt(incarnation) => {
                tracing::info!(%incarnation, "registered");
                self.member.node.adopt(incarnation);
                if let Some(registered) = self.registered.take() {
                    // Nobody waits for it only when the node is about to end.
                    let _ = registered.send(());
                }
            }
            Command::Progress { held, wanted } => (self.progress)(held, wanted),
            Command::Ready => self.ready.take().into_iter().for_each(|ready| ready()),
            // The loop ends before it comes to this.
            Command::Stop => {}
        }
    }

    fn message(&self, report: &Report) -> wire::HeartbeatReport {
        let rows = if report.with_rows { self.member.node.take_rows() } else { Vec::new() };
        message::report(report, &rows)
    }

    fn report(&mut self, report: &Report) {
        let message = self.message(report);
        if let Some(stream) = &mut self.stream {
            stream.report(message);
        }
    }

    /// A node that was never let in cannot go on; one that was goes on serving whatever it is told.
    fn answered(&mut self, answer: Result<Answer, ClientError>) -> Result<Event, Error> {
        match answer {
            Ok(Answer::Registered(node, incarnation)) => {
                Ok(Event::Registered { node, incarnation })
            }
            Ok(Answer::Connected(stream)) => {
                self.stream = Some(stream);
                Ok(Event::Connected)
            }
            Err(error) => {
                let fenced = error.reason() == Some(Reason::Fenced);
                if matches!(error, ClientError::Status(_)) && self.registered.is_some() {
                    return Err(error.into());
                }
                tracing::warn!(%error, fenced, "no leader hears this node; it serves on");
                Ok(Event::Broken { fenced })
            }
        }
    }

    fn heard(&mut self, orders: Result<wire::HeartbeatOrders, Status>) -> Event {
        let orders = orders.and_then(|orders| {
            let epochs = (orders.membership_epoch, orders.placement_epoch);
            self.member.node.saw(MembershipEpoch(epochs.0), PlacementEpoch(epochs.1));
            message::orders(orders).map_err(|error| Status::invalid_argument(error.to_string()))
        });
        match orders {
            Ok(orders) => Event::Orders(orders),
            Err(status) => {
                self.stream = None;
                let fenced = Reason::of(&status) == Some(Reason::Fenced);
                let reason = status.message();
                tracing::info!(reason, fenced, "the stream to the leader ended");
                Event::Broken { fenced }
            }
        }
    }

    fn loaded(&self, outcome: Outcome) -> Event {
        let Outcome { loaded, failed, device } = outcome;
        // A device that is full serves on with what it holds.
        if let Some(error) = device.filter(|e| !matches!(e, DeviceError::OutOfMemory { .. })) {
            self.member.node.health().fail(error);
        }
        for ((layer, expert), reason) in &failed {
            tracing::warn!(%layer, %expert, reason, "an expert was not loaded");
        }
        let held = loaded.keys().copied().collect();
        self.member.node.hold(loaded);
        Event::Loaded { held, failed }
    }

    fn committed(&self, state: &State) -> Event {
        Event::Committed(message::committed(state, &self.member.name))
    }
}
