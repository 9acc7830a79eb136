//! Drives exchanges through the links: the shell around [`entente_router::exchanges`].
//!
//! It owns the [`Cluster`], since the same events that answer an exchange also tell which nodes are
//! up, and takes what was committed the moment that it is rung for, also while an exchange waits.
//! All decisions are the router's; this file only has the clock.
//!
//! Invariant: between two steps nothing is in flight. A step finishes what it starts, and where one
//! exchange fails the others of its step are given up with it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use entente_model::kernels::Kernels;
use entente_proto::ids::{LayerId, NodeId, Region};
use entente_proto::link::LinkEvent;
use entente_router::exchange::{Command, Failure, Job, Owners, Status};
use entente_router::exchanges::{Exchanges, Ticket};
use entente_router::gate::Choice;
use tokio::sync::watch;

use super::cluster::{Cluster, Readiness};
use super::tally::{Epochs, StepTally};
use crate::link::Bell;
use crate::metrics::Metrics;

/// How long nobody may be left for some rows before their step is given up. A link that flickers is
/// back before that; while the engine waits for longer it should hear of its clients.
const STRANDED_MAX: Duration = Duration::from_millis(50);

/// See the module.
pub struct Exchanger {
    cluster: Cluster,
    exchanges: Exchanges,
    started: Instant,
    deadline_us: u64,
    kernels: Arc<dyn Kernels>,
    /// Memory for the rows of exchanges, used again for the next; as many as were in flight.
    spare: Vec<BytesMut>,
    /// Whose the rows of the step are that is computed, and where they went.
    owners: Arc<Owners>,
    owner_of_row: Vec<u16>,
    tally: StepTally,
    metrics: Arc<Metrics>,
}

/// Rows of one MoE layer with the experts that the gate chose for them.
pub struct Rows {
    /// The layer.
    pub layer: LayerId,
    /// Values of a row.
    pub hidden: usize,
    /// `[count, hidden]`, as they travel.
    pub buffer: RowBuffer,
    /// `count x top_k`, each row's in ascending expert order.
    pub choices: Vec<Choice>,
    /// Choices of a row.
    pub top_k: usize,
    /// Which of the step's rows the first of these is.
    pub first_row: usize,
    /// How many there are.
    pub count: usize,
}

/// Memory for rows on their way to experts.
pub struct RowBuffer {
    /// May be longer than what the rows take: it grows to the largest exchange and stays so.
    bytes: BytesMut,
    rows_bytes: usize,
}

impl RowBuffer {
    /// Where the rows go; what lay there before is to be overwritten.
    pub fn rows(&mut self) -> &mut [u8] {
        &mut self.bytes[..self.rows_bytes]
    }
}

/// An exchange that was started, for [`Exchanger::finish`].
#[must_use = "what is started must be finished"]
pub struct InFlight {
    ticket: Ticket,
    /// What the rows are part of.
    buffer: Bytes,
}

impl Exchanger {
    /// Exchanges with the nodes of this cluster.
    pub fn new(
        cluster: Cluster,
        kernels: Arc<dyn Kernels>,
        deadline: Duration,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self {
            cluster,
            exchanges: Exchanges::new(),
            started: Instant::now(),
            deadline_us: deadline.as_micros() as u64,
            kernels,
            spare: Vec::new(),
            owners: Arc::default(),
            owner_of_row: Vec::new(),
            tally: StepTally::default(),
            metrics,
        }
    }

    fn now_us(&self) -> u64 {
        self.started.elapsed().as_micros() as u64
    }

    /// The region whose nodes are used.
    pub fn home(&self) -> Region {
        self.cluster.view().home
    }

    /// What was committed last, as far as it is followed.
    pub fn epochs(&self) -> Epochs {
        let view = self.cluster.view();
        Epochs { membership: view.membership_epoch, placement: view.placement_epoch }
    }

    /// Says whose the rows of the next step are: which of `owners` each row belongs to.
    pub fn begin_step(&mut self, owners: Owners, owner_of_row: Vec<u16>) {
        (self.owners, self.owner_of_row) = (Arc::new(owners), owner_of_row);
        self.tally = StepTally::default();
    }

    /// Where the rows of the step went, by the number of their owner.
    pub fn end_step(&mut self) -> StepTally {
        std::mem::take(&mut self.tally)
    }

    /// What ends [`Exchanger::idle`].
    pub fn bell(&self) -> Arc<Bell> {
        self.cluster.bell()
    }

    /// Whether every expert has a live replica that this coordinator may use.
    pub fn readiness(&self) -> watch::Receiver<Readiness> {
        self.cluster.readiness()
    }

    /// Says that nothing can be served any more, and why.
    pub fn withdraw(&self, why: String) {
        self.cluster.withdraw(why);
    }

    /// Counts the times that something became possible which was not; see [`Cluster::changes`].
    pub fn changes(&self) -> u64 {
        self.cluster.changes()
    }

    /// Takes what links have reported and what was committed, without waiting.
    pub fn absorb(&mut self) {
        self.follow();
        while let Some((node, event)) = self.cluster.next_at_once() {
            self.take(node, event);
        }
    }

    /// Waits for something to take: a link has something to report, something was committed. Ends
    /// without it when the time is over or the bell was rung.
    pub fn idle(&mut self, timeout: Option<Duration>) {
        if let Some((node, event)) = self.cluster.next(timeout) {
            self.take(node, event);
        }
        self.follow();
    }

    /// Takes what was committed, if that is news, and tells the exchanges.
    fn follow(&mut self) {
        let Some(given_up) = self.cluster.follow() else { return };
        let (now_us, view) = (self.now_us(), self.cluster.view());
        let mut commands = Vec::new();
        for node in given_up {
            commands.extend(self.exchanges.on_link_down(view, node, now_us));
        }
        commands.extend(self.exchanges.on_view_changed(view, now_us));
        self.perform(commands);
    }

    /// Takes one event: keeps the view up to date, and tells the exchanges that it concerns.
    fn take(&mut self, node: NodeId, event: LinkEvent) {
        let now_us = self.now_us();
        let Self { cluster, exchanges, .. } = self;
        let commands = match event {
            LinkEvent::Answer(answer) => exchanges.on_answer(cluster.view(), node, answer, now_us),
            LinkEvent::Up { info, certificate_sha256 }
                if cluster.node_up(node, &info, certificate_sha256) =>
            {
                exchanges.on_view_changed(cluster.view(), now_us)
            }
            LinkEvent::Up { .. } => Vec::new(),
            LinkEvent::Down(reason) => {
                self.metrics.link_breaks.inc_by(u64::from(!exchanges.is_empty()));
                cluster.node_down(node, &reason);
                exchanges.on_link_down(cluster.view(), node, now_us)
            }
        };
        self.perform(commands);
    }

    /// Whether nodes compute while this thread does something else: then it pays to have several
    /// exchanges in flight.
    pub fn overlaps(&self) -> bool {
        self.cluster.overlaps()
    }

    /// Memory for `values` values as they travel, for [`Exchanger::start`].
    pub fn buffer(&mut self, values: usize) -> RowBuffer {
        let rows_bytes = values * self.kernels.row_dtype().size();
        let mut bytes = self.spare.pop().unwrap_or_default();
        // To fill it with zeros first is as much work as to fill it with rows.
        if bytes.len() < rows_bytes {
            bytes.resize(rows_bytes, 0);
        }
        RowBuffer { bytes, rows_bytes }
    }

    /// Sends `rows` to their experts, without waiting for them.
    pub fn start(&mut self, rows: Rows) -> InFlight {
        let RowBuffer { bytes, rows_bytes } = rows.buffer;
        let buffer = bytes.freeze();
        let now_us = self.now_us();
        let job = Job {
            layer: rows.layer,
            hidden: rows.hidden,
            dtype: self.kernels.row_dtype(),
            rows: buffer.slice(..rows_bytes),
            choices: rows.choices,
            top_k: rows.top_k,
            owners: self.owners.clone(),
            owner_of_row: self.owner_of_row[rows.first_row..][..rows.count].to_vec(),
            stranded_max_us: STRANDED_MAX.as_micros() as u64,
            deadline_us: now_us + self.deadline_us,
        };
        let (ticket, commands) = self.exchanges.start(job, self.cluster.view(), now_us);
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

    /// Waits for one event, for a commit, or for the time at which an exchange wants to be woken.
    fn wait(&mut self) {
        let until_us = self.exchanges.wake_us().unwrap_or(0);
        let timeout = Duration::from_micros(until_us.saturating_sub(self.now_us()));
        if let Some((node, event)) = self.cluster.next(Some(timeout)) {
            self.take(node, event);
        } else if self.now_us() >= until_us {
            let commands = self.exchanges.on_tick(self.cluster.view(), self.now_us());
            self.perform(commands);
        }
        self.follow();
    }

    /// Sends what the machines want sent. A link that does not take its frame is one more event.
    fn perform(&mut self, commands: Vec<Command>) {
        let mut commands = VecDeque::from(commands);
        while let Some(Command::Send { node, frame, shares }) = commands.pop_front() {
            let id = frame.exchange;
            self.metrics.frames_sent.inc();
            // Before it is known whether the link takes the frame: one that breaks on the way may
            // have carried rows.
            if let Some(peer) = self.cluster.peer(node) {
                peer.rows.inc_by(frame.assignments.len() as u64);
                self.tally.sent(&peer.touched, &shares);
            }
            if self.cluster.send(node, frame).is_err() {
                let now_us = self.now_us();
                commands.extend(self.exchanges.on_not_sent(self.cluster.view(), id, now_us));
            }
        }
        let work = self.exchanges.take_work();
        self.metrics.hedged_rows.inc_by(work.hedged);
        self.metrics.retried_rows.inc_by(work.retried);
        self.metrics.crossed_rows.inc_by(work.crossed);
        self.tally.repeated(self.exchanges.take_repeats());
    }
}
