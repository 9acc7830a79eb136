//! Drives one exchange at a time through the links: the shell around
//! [`entente_router::exchange`].
//!
//! It owns the engine's view of the cluster, since the same events that answer an exchange also
//! tell which nodes are up, and it publishes whether all experts can be reached the moment that
//! changes, also while an exchange waits. All decisions are the router's; this file only has the clock, the
//! links and the inbox.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TrySendError, bounded};
use entente_model::kernels::Kernels;
use entente_proto::ids::{LayerId, NodeId, RegionSet};
use entente_proto::link::{Link, LinkEvent, LinkEvents};
use entente_router::exchange::{Command, Exchange, ExchangeIds, Failure, Job, Status};
use entente_router::gate::Choice;
use entente_router::view::ClusterView;
use tokio::sync::watch;

use crate::metrics::Metrics;

/// Events that wait for the engine. In flight are at most a few frames a node, so this is ample;
/// past it an event is dropped, and the exchange that misses it runs into its deadline.
const INBOX_LEN_MAX: usize = 4_096;

/// What links report, with the node that each is about.
pub type Inbox = Receiver<(NodeId, LinkEvent)>;

/// The sink that links are opened with.
pub struct Mailbox(Sender<(NodeId, LinkEvent)>);

impl LinkEvents for Mailbox {
    fn on_event(&self, node: NodeId, event: LinkEvent) {
        if let Err(TrySendError::Full(_)) = self.0.try_send((node, event)) {
            tracing::error!(node = node.0, "the engine's inbox is full; an event was dropped");
        }
    }
}

/// The inbox of an engine and the sink that fills it.
pub fn mailbox() -> (Arc<Mailbox>, Inbox) {
    let (sender, receiver) = bounded(INBOX_LEN_MAX);
    (Arc::new(Mailbox(sender)), receiver)
}

/// See the module.
pub struct Exchanger {
    links: BTreeMap<NodeId, Box<dyn Link>>,
    inbox: Inbox,
    view: ClusterView,
    ids: ExchangeIds,
    started: Instant,
    deadline_us: u64,
    allowed_regions: RegionSet,
    kernels: Arc<dyn Kernels>,
    /// Memory for the rows of an exchange, used again for the next.
    encoded: BytesMut,
    metrics: Arc<Metrics>,
    readiness: watch::Sender<Readiness>,
}

/// Whether requests could be served now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Readiness {
    /// Every expert has a live replica.
    Ready,
    /// Something is missing; the text says what.
    Waiting(String),
}

/// Rows of one MoE layer with the experts that the gate chose for them.
pub struct Rows<'a> {
    /// The layer.
    pub layer: LayerId,
    /// Values of a row.
    pub hidden: usize,
    /// `[rows, hidden]`.
    pub values: &'a [f32],
    /// `rows x top_k`, each row's in ascending expert order.
    pub choices: Vec<Choice>,
    /// Choices of a row.
    pub top_k: usize,
}

impl Exchanger {
    /// An exchanger whose links fill `inbox`.
    pub fn new(
        links: BTreeMap<NodeId, Box<dyn Link>>,
        inbox: Inbox,
        view: ClusterView,
        kernels: Arc<dyn Kernels>,
        deadline: Duration,
        metrics: Arc<Metrics>,
    ) -> Self {
        let waiting = Readiness::Waiting("expert nodes are being connected".into());
        let exchanger = Self {
            readiness: watch::Sender::new(waiting),
            allowed_regions: [view.home].into(),
            links,
            inbox,
            view,
            ids: ExchangeIds::new(),
            started: Instant::now(),
            deadline_us: deadline.as_micros() as u64,
            kernels,
            encoded: BytesMut::new(),
            metrics,
        };
        exchanger.publish();
        exchanger
    }

    fn now_us(&self) -> u64 {
        self.started.elapsed().as_micros() as u64
    }

    /// The inbox, for waiting on it together with other channels.
    pub fn inbox(&self) -> &Inbox {
        &self.inbox
    }

    /// Whether every expert has a live replica that this coordinator may use.
    pub fn readiness(&self) -> watch::Receiver<Readiness> {
        self.readiness.subscribe()
    }

    fn publish(&self) {
        let now = match self.view.missing(&self.allowed_regions) {
            None => Readiness::Ready,
            Some((layer, _)) => {
                Readiness::Waiting(format!("an expert of layer {layer} has no live replica"))
            }
        };
        self.readiness.send_if_modified(|shown| {
            let changed = *shown != now;
            *shown = now;
            changed
        });
    }

    /// Takes what links have reported, without waiting.
    pub fn absorb(&mut self) {
        while let Ok((node, event)) = self.inbox.try_recv() {
            self.note(node, event);
        }
    }

    /// Takes one event outside an exchange.
    pub fn take(&mut self, node: NodeId, event: LinkEvent) {
        self.note(node, event);
    }

    /// Keeps the view up to date. `Some` when the node came (true) or went (false).
    fn note(&mut self, node: NodeId, event: LinkEvent) -> Option<bool> {
        let change = self.change(node, event)?;
        self.publish();
        Some(change)
    }

    fn change(&mut self, node: NodeId, event: LinkEvent) -> Option<bool> {
        match event {
            LinkEvent::Answer(_) => None, // Nobody waits for it any more.
            LinkEvent::Up(info) => match self.view.node_up(node, &info) {
                Ok(()) => {
                    tracing::info!(node = %info.name, "expert node is up");
                    Some(true)
                }
                Err(mismatch) => {
                    tracing::error!(node = %info.name, %mismatch, "expert node is not usable");
                    None
                }
            },
            LinkEvent::Down(reason) => {
                tracing::warn!(node = node.0, reason, "expert node is down");
                self.view.node_down(node);
                Some(false)
            }
        }
    }

    /// Sends `rows` through their experts and adds `weight x result` to `out`, `[rows, hidden]`,
    /// in ascending expert order. Blocks until everything came back or the deadline passed.
    pub fn exchange(&mut self, rows: Rows<'_>, out: &mut [f32]) -> Result<(), Failure> {
        let count = rows.values.len() / rows.hidden;
        // Takes the allocation of an earlier exchange over; its frames have left by now.
        let dtype = self.kernels.row_dtype();
        self.encoded.resize(rows.values.len() * dtype.size(), 0);
        self.kernels.encode_rows(rows.values, &mut self.encoded);
        let now_us = self.now_us();
        let job = Job {
            layer: rows.layer,
            hidden: rows.hidden,
            dtype,
            rows: self.encoded.split().freeze(),
            choices: rows.choices,
            top_k: rows.top_k,
            policies: vec![self.allowed_regions.clone()],
            policy_of_row: vec![0; count],
            deadline_us: now_us + self.deadline_us,
        };
        let (mut exchange, commands) = Exchange::start(job, &self.view, &mut self.ids, now_us);
        self.perform(&mut exchange, commands);
        loop {
            match exchange.status() {
                Status::Done => break,
                Status::Failed(failure) => return Err(failure),
                Status::Waiting { until_us } => self.wait(&mut exchange, until_us),
            }
        }
        self.kernels.add_weighted(&exchange.parts(), out);
        Ok(())
    }

    /// Waits for one event, or for the time at which the exchange wants to be woken.
    fn wait(&mut self, exchange: &mut Exchange, until_us: u64) {
        let timeout = Duration::from_micros(until_us.saturating_sub(self.now_us()));
        let received = self.inbox.recv_timeout(timeout);
        let now_us = self.now_us();
        let commands = match received {
            Ok((node, LinkEvent::Answer(answer))) => {
                exchange.on_answer(&self.view, node, answer, now_us)
            }
            Ok((node, event)) => match self.note(node, event) {
                None => Vec::new(),
                Some(true) => exchange.on_view_changed(&self.view, now_us),
                Some(false) => {
                    self.metrics.link_breaks.inc();
                    exchange.on_link_down(&self.view, node, now_us)
                }
            },
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                exchange.on_tick(&self.view, now_us)
            }
        };
        self.perform(exchange, commands);
    }

    /// Sends what the machine wants sent. A link that does not take its frame is one more event.
    fn perform(&mut self, exchange: &mut Exchange, commands: Vec<Command>) {
        let mut commands = std::collections::VecDeque::from(commands);
        while let Some(Command::Send { node, frame }) = commands.pop_front() {
            let id = frame.exchange;
            self.metrics.frames_sent.inc();
            let sent = self.links.get(&node).is_some_and(|link| link.send(frame).is_ok());
            if !sent {
                commands.extend(exchange.on_not_sent(&self.view, id, self.now_us()));
            }
        }
    }
}
