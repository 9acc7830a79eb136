//! Several exchanges of one coordinator in flight at once, and which event is for which of them.
//!
//! An answer belongs to the exchange that its name says; what happens to a node concerns all. The
//! exchanges know nothing of one another: each retries and waits by itself, so one may complete
//! while another asks a second replica.
//!
//! Invariant: an answer to an exchange that was taken or given up finds nobody and is dropped, so
//! nothing of a failed step can reach the next one.

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use entente_proto::frame::Answer;
use entente_proto::ids::{ExchangeId, NodeId};

use crate::exchange::{Command, Exchange, ExchangeIds, Job, Status};
use crate::view::ClusterView;

/// Stands for an exchange that was started. Not cloneable: an exchange is finished once.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "an exchange that nobody finishes stays in flight"]
pub struct Ticket(u64);

/// See the module.
#[derive(Debug, Default)]
pub struct Exchanges {
    ids: ExchangeIds,
    /// By the number that all names of an exchange's frames share.
    in_flight: BTreeMap<u64, Exchange>,
}

impl Exchanges {
    /// Nothing in flight.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether nothing is in flight.
    pub fn is_empty(&self) -> bool {
        self.in_flight.is_empty()
    }

    /// Starts one more exchange; see [`Exchange::start`].
    pub fn start(&mut self, job: Job, view: &ClusterView, now_us: u64) -> (Ticket, Vec<Command>) {
        let (exchange, commands) = Exchange::start(job, view, &mut self.ids, now_us);
        let number = exchange.number();
        self.in_flight.insert(number, exchange);
        (Ticket(number), commands)
    }

    /// How far the exchange is; none when it was given up.
    pub fn status(&self, ticket: &Ticket) -> Option<Status> {
        self.in_flight.get(&ticket.0).map(Exchange::status)
    }

    /// When [`Exchanges::on_tick`] must be called, if nothing happens before: the earliest moment
    /// at which any exchange wants it.
    pub fn wake_us(&self) -> Option<u64> {
        let wakes = self.in_flight.values().filter_map(|exchange| match exchange.status() {
            Status::Waiting { until_us } => Some(until_us),
            Status::Done | Status::Failed(_) => None,
        });
        wakes.min()
    }

    /// Hands an exchange over, whatever its status; none when it was given up.
    pub fn take(&mut self, ticket: Ticket) -> Option<Exchange> {
        self.in_flight.remove(&ticket.0)
    }

    /// Gives up whatever is in flight.
    pub fn clear(&mut self) {
        self.in_flight.clear();
    }

    /// Gives an answer to the exchange that it is for.
    pub fn on_answer(
        &mut self,
        view: &ClusterView,
        node: NodeId,
        answer: Answer,
        now_us: u64,
    ) -> Vec<Command> {
        let Some(exchange) = self.owner(answer.exchange) else { return Vec::new() };
        exchange.on_answer(view, node, answer, now_us)
    }

    /// A frame could not be handed to its link.
    pub fn on_not_sent(&mut self, view: &ClusterView, id: ExchangeId, now_us: u64) -> Vec<Command> {
        let Some(exchange) = self.owner(id) else { return Vec::new() };
        exchange.on_not_sent(view, id, now_us)
    }

    /// The link to `node` broke. The view must know already.
    pub fn on_link_down(&mut self, view: &ClusterView, node: NodeId, now_us: u64) -> Vec<Command> {
        self.all(|exchange| exchange.on_link_down(view, node, now_us))
    }

    /// Nodes came up or epochs moved.
    pub fn on_view_changed(&mut self, view: &ClusterView, now_us: u64) -> Vec<Command> {
        self.all(|exchange| exchange.on_view_changed(view, now_us))
    }

    /// Time passed. Harmless for exchanges that do not wait for it.
    pub fn on_tick(&mut self, view: &ClusterView, now_us: u64) -> Vec<Command> {
        self.all(|exchange| exchange.on_tick(view, now_us))
    }

    fn owner(&mut self, id: ExchangeId) -> Option<&mut Exchange> {
        self.in_flight.get_mut(&Exchange::number_of(id))
    }

    fn all(&mut self, tell: impl FnMut(&mut Exchange) -> Vec<Command>) -> Vec<Command> {
        self.in_flight.values_mut().flat_map(tell).collect()
    }
}
