//! Drives exchanges through the links: the shell around [`entente_router::exchanges`].
//!
//! It owns the engine's view of the cluster, since the same events that answer an exchange also
//! tell which nodes are up, and it publishes whether all experts can be reached the moment that
//! changes, also while an exchange waits. All decisions are the router's; this file only has the
//! clock and the links.
//!
//! Invariant: between two steps nothing is in flight. A step finishes what it starts, and where one
//! exchange fails the others of its step are given up with it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use entente_model::kernels::Kernels;
use entente_proto::ids::{LayerId, NodeId, RegionSet};
use entente_proto::link::LinkEvent;
use entente_router::exchange::{Command, Failure, Job, Status};
use entente_router::exchanges::{Exchanges, Ticket};
use entente_router::gate::Choice;
use entente_router::view::ClusterView;
use tokio::sync::watch;

use crate::link::{Bell, Links};
use crate::metrics::Metrics;

/// See the module.
pub struct Exchanger {
    links: Links,
    view: ClusterView,
    exchanges: Exchanges,
    started: Instant,
    deadline_us: u64,
    allowed_regions: RegionSet,
    kernels: Arc<dyn Kernels>,
    /// Memory for the rows of exchanges, used again for the next; as many as were in flight.
    spare: Vec<BytesMut>,
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

/// An exchange that was started, for [`Exchanger::finish`].
#[must_use = "what is started must be finished"]
pub struct InFlight {
    ticket: Ticket,
    /// What the rows are part of.
    buffer: Bytes,
}

impl Exchanger {
    /// An exchanger over these links.
    pub fn new(
        links: Links,
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
            view,
            exchanges: Exchanges::new(),
            started: Instant::now(),
            deadline_us: deadline.as_micros() as u64,
            kernels,
            spare: Vec::new(),
            metrics,
        };
        exchanger.publish();
        exchanger
    }

    fn now_us(&self) -> u64 {
        self.started.elapsed().as_micros() as u64
    }

    /// What ends [`Exchanger::idle`].
    pub fn bell(&self) -> Arc<Bell> {
        self.links.bell()
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
        while let Some((node, event)) = self.links.next(Duration::ZERO) {
            self.take(node, event);
        }
    }

    /// Waits until a link has something to report, and takes it, or until the bell is rung.
    pub fn idle(&mut self) {
        if let Some((node, event)) = self.links.next_unless_rung() {
            self.take(node, event);
        }
    }

    /// Takes one event: keeps the view up to date, and tells the exchanges that it concerns.
    fn take(&mut self, node: NodeId, event: LinkEvent) {
        let now_us = self.now_us();
        let commands = match event {
            LinkEvent::Answer(answer) => self.exchanges.on_answer(&self.view, node, answer, now_us),
            event => match self.note(node, event) {
                None => Vec::new(),
                Some(true) => self.exchanges.on_view_changed(&self.view, now_us),
                Some(false) => {
                    self.metrics.link_breaks.inc_by(u64::from(!self.exchanges.is_empty()));
                    self.exchanges.on_link_down(&self.view, node, now_us)
                }
            },
        };
        self.perform(commands);
    }

    /// Keeps the view up to date. `Some` when the node came (true) or went (false).
    fn note(&mut self, node: NodeId, event: LinkEvent) -> Option<bool> {
        let change = self.change(node, event)?;
        self.publish();
        Some(change)
    }

    fn change(&mut self, node: NodeId, event: LinkEvent) -> Option<bool> {
        match event {
            LinkEvent::Answer(_) => None,
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

    /// Whether nodes compute while this thread does something else: then it pays to have several
    /// exchanges in flight.
    pub fn overlaps(&self) -> bool {
        self.links.are_asynchronous()
    }

    /// Sends `rows` to their experts, without waiting for them.
    pub fn start(&mut self, rows: Rows<'_>) -> InFlight {
        let count = rows.values.len() / rows.hidden;
        let dtype = self.kernels.row_dtype();
        let rows_bytes = rows.values.len() * dtype.size();
        let mut buffer = self.spare.pop().unwrap_or_default();
        // Grows to the largest exchange and stays so: to fill it with zeros first is as much work
        // as to fill it with rows.
        if buffer.len() < rows_bytes {
            buffer.resize(rows_bytes, 0);
        }
        self.kernels.encode_rows(rows.values, &mut buffer[..rows_bytes]);
        let buffer = buffer.freeze();
        let now_us = self.now_us();
        let job = Job {
            layer: rows.layer,
            hidden: rows.hidden,
            dtype,
            rows: buffer.slice(..rows_bytes),
            choices: rows.choices,
            top_k: rows.top_k,
            policies: vec![self.allowed_regions.clone()],
            policy_of_row: vec![0; count],
            deadline_us: now_us + self.deadline_us,
        };
        let (ticket, commands) = self.exchanges.start(job, &self.view, now_us);
        self.perform(commands);
        InFlight { ticket, buffer }
    }

    /// Adds `weight x result` to `out`, `[rows, hidden]`, in ascending expert order. Blocks until
    /// everything came back or the deadline passed; other exchanges go on meanwhile.
    ///
    /// # Errors
    /// When the exchange failed. All others in flight are given up then.
    pub fn finish(&mut self, in_flight: InFlight, out: &mut [f32]) -> Result<(), Failure> {
        let InFlight { ticket, buffer } = in_flight;
        let outcome = loop {
            match self.exchanges.status(&ticket) {
                Some(Status::Waiting { .. }) => self.wait(),
                Some(Status::Done) => break Ok(()),
                Some(Status::Failed(failure)) => break Err(failure),
                None => break Err(Failure::GivenUp),
            }
        };
        if outcome.is_err() {
            self.exchanges.clear();
        }
        if let Some(exchange) = self.exchanges.take(ticket) {
            self.kernels.add_weighted(&exchange.parts(), out);
        }
        // The exchange and its frames are gone by now, unless a link still holds one.
        self.spare.extend(buffer.try_into_mut());
        outcome
    }

    /// Waits for one event, or for the time at which an exchange wants to be woken.
    fn wait(&mut self) {
        let until_us = self.exchanges.wake_us().unwrap_or(0);
        let timeout = Duration::from_micros(until_us.saturating_sub(self.now_us()));
        match self.links.next(timeout) {
            Some((node, event)) => self.take(node, event),
            None => {
                let commands = self.exchanges.on_tick(&self.view, self.now_us());
                self.perform(commands);
            }
        }
    }

    /// Sends what the machines want sent. A link that does not take its frame is one more event.
    fn perform(&mut self, commands: Vec<Command>) {
        let mut commands = VecDeque::from(commands);
        while let Some(Command::Send { node, frame }) = commands.pop_front() {
            let id = frame.exchange;
            self.metrics.frames_sent.inc();
            if self.links.send(node, frame).is_err() {
                let now_us = self.now_us();
                commands.extend(self.exchanges.on_not_sent(&self.view, id, now_us));
            }
        }
        let work = self.exchanges.take_work();
        self.metrics.hedged_rows.inc_by(work.hedged);
        self.metrics.retried_rows.inc_by(work.retried);
    }
}
