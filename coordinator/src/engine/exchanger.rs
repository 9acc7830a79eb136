//! Drives one exchange at a time through the links: the shell around
//! [`entente_router::exchange`].
//!
//! It owns the engine's view of the cluster, since the same events that answer an exchange also
//! tell which nodes are up, and it publishes whether all experts can be reached the moment that
//! changes, also while an exchange waits. All decisions are the router's; this file only has the clock and
//! the links.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use entente_proto::frame::Dtype;
use entente_proto::ids::{LayerId, NodeId, RegionSet};
use entente_proto::link::LinkEvent;
use entente_router::exchange::{Command, Exchange, ExchangeIds, Failure, Job, Status};
use entente_router::gate::Choice;
use entente_router::view::ClusterView;
use tokio::sync::watch;

use crate::link::{Bell, Links};
use crate::metrics::Metrics;

/// See the module.
pub struct Exchanger {
    links: Links,
    view: ClusterView,
    ids: ExchangeIds,
    started: Instant,
    deadline_us: u64,
    allowed_regions: RegionSet,
    row_dtype: Dtype,
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
    /// An exchanger over these links.
    pub fn new(
        links: Links,
        view: ClusterView,
        row_dtype: Dtype,
        deadline: Duration,
        metrics: Arc<Metrics>,
    ) -> Self {
        let waiting = Readiness::Waiting("expert nodes are being connected".into());
        let exchanger = Self {
            readiness: watch::Sender::new(waiting),
            allowed_regions: [view.home].into(),
            links,
            view,
            ids: ExchangeIds::new(),
            started: Instant::now(),
            deadline_us: deadline.as_micros() as u64,
            row_dtype,
            encoded: BytesMut::new(),
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
            self.note(node, event);
        }
    }

    /// Waits until a link has something to report, and takes it, or until the bell is rung.
    pub fn idle(&mut self) {
        if let Some((node, event)) = self.links.next_unless_rung() {
            self.note(node, event);
        }
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
        self.encoded.resize(rows.values.len() * self.row_dtype.size(), 0);
        self.row_dtype.encode_into(rows.values, &mut self.encoded);
        let now_us = self.now_us();
        let job = Job {
            layer: rows.layer,
            hidden: rows.hidden,
            dtype: self.row_dtype,
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
        exchange.combine(out);
        Ok(())
    }

    /// Waits for one event, or for the time at which the exchange wants to be woken.
    fn wait(&mut self, exchange: &mut Exchange, until_us: u64) {
        let timeout = Duration::from_micros(until_us.saturating_sub(self.now_us()));
        let received = self.links.next(timeout);
        let now_us = self.now_us();
        let commands = match received {
            Some((node, LinkEvent::Answer(answer))) => {
                exchange.on_answer(&self.view, node, answer, now_us)
            }
            Some((node, event)) => match self.note(node, event) {
                None => Vec::new(),
                Some(true) => exchange.on_view_changed(&self.view, now_us),
                Some(false) => {
                    self.metrics.link_breaks.inc();
                    exchange.on_link_down(&self.view, node, now_us)
                }
            },
            None => exchange.on_tick(&self.view, now_us),
        };
        self.perform(exchange, commands);
    }

    /// Sends what the machine wants sent. A link that does not take its frame is one more event.
    fn perform(&mut self, exchange: &mut Exchange, commands: Vec<Command>) {
        let mut commands = std::collections::VecDeque::from(commands);
        while let Some(Command::Send { node, frame }) = commands.pop_front() {
            let id = frame.exchange;
            self.metrics.frames_sent.inc();
            if self.links.send(node, frame).is_err() {
                commands.extend(exchange.on_not_sent(&self.view, id, self.now_us()));
            }
        }
    }
}
