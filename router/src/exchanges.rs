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
use crate::pace::{Pace, Repeats, Work};
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
    /// How fast nodes answer, over all exchanges.
    pace: Pace,
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
        let (exchange, commands) =
            Exchange::start(job, view, &mut self.pace, &mut self.ids, now_us);
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
        let Self { in_flight, pace, .. } = self;
        match in_flight.get_mut(&Exchange::number_of(answer.exchange)) {
            Some(exchange) => exchange.on_answer(view, pace, node, answer, now_us),
            None => {
                // Nobody waits for it any more, but it tells that the node is well.
                pace.on_answer(node, &answer, now_us);
                Vec::new()
            }
        }
    }

    /// A frame could not be handed to its link.
    pub fn on_not_sent(&mut self, view: &ClusterView, id: ExchangeId, now_us: u64) -> Vec<Command> {
        let Self { in_flight, pace, .. } = self;
        let exchange = in_flight.get_mut(&Exchange::number_of(id));
        exchange.map_or(Vec::new(), |exchange| exchange.on_not_sent(view, pace, id, now_us))
    }

    /// The link to `node` broke. The view must know already.
    pub fn on_link_down(&mut self, view: &ClusterView, node: NodeId, now_us: u64) -> Vec<Command> {
        self.pace.on_link_down(node);
        self.all(|exchange, pace| exchange.on_link_down(view, pace, node, now_us))
    }

    /// Nodes came up or epochs moved.
    pub fn on_view_changed(&mut self, view: &ClusterView, now_us: u64) -> Vec<Command> {
        self.all(|exchange, pace| exchange.on_view_changed(view, pace, now_us))
    }

    /// Time passed. Harmless for exchanges that do not wait for it.
    pub fn on_tick(&mut self, view: &ClusterView, now_us: u64) -> Vec<Command> {
        self.all(|exchange, pace| exchange.on_tick(view, pace, now_us))
    }

    /// What was sent more than once since the last call.
    pub fn take_work(&mut self) -> Work {
        self.pace.take_work()
    }

    /// Whose rows those were.
    pub fn take_repeats(&mut self) -> BTreeMap<u16, Repeats> {
        self.pace.take_repeats()
    }

    fn all(
        &mut self,
        mut tell: impl FnMut(&mut Exchange, &mut Pace) -> Vec<Command>,
    ) -> Vec<Command> {
        let Self { in_flight, pace, .. } = self;
        in_flight.values_mut().flat_map(|exchange| tell(exchange, pace)).collect()
    }
}
