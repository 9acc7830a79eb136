//! The coordinator's end of a connection whose rows travel by NCCL: how it is made, and the two threads
//! that put rows into its lanes and take answers from them.
//!
//! ```text
//!   engine ── heads ── TLS ══► node        engine ◄══ TLS ── heads ── node
//!     └─ rows ──► a thread ── lane ══►        └─ heads with rows ──► a thread ◄══ lane
//!                                                                      └─ answer ──► mailbox
//! ```
//!
//! Such a connection is a second one to the node, made while the first one serves, and takes its place
//! when both ends have joined. So nothing waits for NCCL, and a node whose NCCL does not work is one
//! like any other. When a lane fails its connection breaks, and all that connections do when they
//! break happens: what was in flight is asked anew, over the network.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use bytes::Bytes;
use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};
use entente_expert_node::Nccl;
use entente_model::kernels::cuda::nccl::{Lane, NcclError, Rank};
use entente_proto::ids::NodeId;
use entente_proto::link::{LinkEvent, LinkEvents};
use entente_proto::stream::Framed;
use entente_proto::wire;
use prometheus::{IntCounter, IntGauge};
use rustls::ClientConfig;

use super::checked_answer;
use super::connection::Broken;
use super::links::{Arrival, Mailbox};

/// Frames, or answers, that wait for their lane. A few frames a node are in flight, so this is ample.
const QUEUE_LEN_MAX: usize = 256;

/// First pause before lanes are opened, or opened again; doubles up to [`RETRY_MAX`].
const RETRY_MIN: Duration = Duration::from_millis(200);
/// Longest pause. Where NCCL is not to be had this is how often a node is asked.
const RETRY_MAX: Duration = Duration::from_secs(60);
/// Lanes that lived so long do not count as a failure when they end.
const LIFE_MIN: Duration = Duration::from_secs(60);

/// What it takes to reach a node by NCCL too.
#[derive(Clone)]
pub struct ByNccl {
    /// This process's device and site.
    pub nccl: Nccl,
    /// How the connection is secured, and whose certificate is expected.
    pub tls: Arc<ClientConfig>,
    /// What is counted.
    pub metrics: NcclMetrics,
}

/// What is counted of NCCL.
#[derive(Clone)]
pub struct NcclMetrics {
    /// Links whose rows travel by NCCL now.
    pub links: IntGauge,
    /// Pairs of lanes that were opened since the start.
    pub opened: IntCounter,
    /// Attempts to open lanes that failed, and connections with lanes that broke.
    pub failures: IntCounter,
    /// Bytes of rows sent.
    pub sent_bytes: IntCounter,
    /// Bytes of rows received.
    pub received_bytes: IntCounter,
}

/// When to try next, by what became of the last attempts.
pub(crate) struct Retry {
    pause: Duration,
    opened: Option<Instant>,
    /// Whether it was said why rows travel over the network.
    told: bool,
}

impl Retry {
    pub(crate) fn new() -> Self {
        Self { pause: RETRY_MIN, opened: None, told: false }
    }

    pub(crate) fn pause(&self) -> Duration {
        self.pause
    }

    /// Lanes are open; what that is worth shows later.
    pub(crate) fn opened(&mut self) {
        (self.opened, self.told) = (Some(Instant::now()), false);
    }

    /// Whether a failure is news: only the first of many is.
    pub(crate) fn is_news(&mut self) -> bool {
        !std::mem::replace(&mut self.told, true)
    }

    /// The connection ended, with its lanes if it had any.
    pub(crate) fn ended(&mut self) {
        match self.opened.take() {
            Some(opened) if opened.elapsed() >= LIFE_MIN => self.pause = RETRY_MIN,
            // Each try may have kept requests waiting, so there are fewer than of those that open
            // nothing.
            Some(_) => self.pause = (self.pause * 4).min(RETRY_MAX),
            None => {}
        }
    }

    /// Nothing came of an attempt.
    pub(crate) fn failed(&mut self) {
        self.pause = (self.pause * 2).min(RETRY_MAX);
    }
}

/// The engine's ends of the queues to the threads of a pair of lanes. Dropping it ends both.
pub(crate) struct Lanes {
    rows: Sender<Bytes>,
    answers: Sender<(wire::Combine, usize)>,
    closed: Arc<AtomicBool>,
    links: IntGauge,
}

impl Drop for Lanes {
    fn drop(&mut self) {
        self.closed.store(true, Ordering::Release);
        self.links.dec();
    }
}

impl Lanes {
    /// Has rows follow their head, which was given to the socket.
    pub(crate) fn send(&self, rows: Bytes) -> Result<(), Broken> {
        self.rows.try_send(rows).map_err(|error| crowded(&error))
    }

    /// Has the rows of an answer fetched, whose head has come.
    pub(crate) fn fetch(&self, answer: wire::Combine, rows_len: usize) -> Result<(), Broken> {
        self.answers.try_send((answer, rows_len)).map_err(|error| crowded(&error))
    }

    /// Starts both threads for lanes that are open.
    fn start(lanes: [Lane; 2], by: &ByNccl, place: Place) -> io::Result<Self> {
        let [to_node, from_node] = lanes;
        let (rows, rows_waiting) = bounded(QUEUE_LEN_MAX);
        let (answers, answers_waiting) = bounded(QUEUE_LEN_MAX);
        let closed = Arc::new(AtomicBool::new(false));
        let serving = Serving { by: by.clone(), place, closed: Arc::clone(&closed) };
        by.metrics.links.inc();
        // From here on what is counted is undone, and what was started ends.
        let lanes = Self { rows, answers, closed, links: by.metrics.links.clone() };
        let sending = serving.clone();
        spawn("nccl-rows", move || sending.ended(sending.send_all(to_node, &rows_waiting)))?;
        spawn("nccl-answers", move || {
            serving.ended(serving.fetch_all(from_node, &answers_waiting))
        })?;
        by.metrics.opened.inc();
        Ok(lanes)
    }
}

fn crowded<T>(error: &TrySendError<T>) -> Broken {
    Broken::Nccl(match error {
        TrySendError::Full(_) => "too many frames wait for it".to_owned(),
        TrySendError::Disconnected(_) => "it has ended".to_owned(),
    })
}

fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> io::Result<()> {
    thread::Builder::new().name(name.to_owned()).spawn(run).map(drop)
}

/// Where what the threads have goes.
#[derive(Clone)]
pub(crate) struct Place {
    pub(crate) mailbox: Arc<Mailbox>,
    pub(crate) node: NodeId,
    /// The connection that the lanes belong to.
    pub(crate) connection: u64,
}

/// What both threads need.
#[derive(Clone)]
struct Serving {
    by: ByNccl,
    place: Place,
    closed: Arc<AtomicBool>,
}

impl Serving {
    fn send_all(&self, mut lane: Lane, waiting: &Receiver<Bytes>) -> Result<(), NcclError> {
        let given_up = || self.closed.load(Ordering::Acquire);
        for rows in waiting {
            lane.send(&rows, &self.by.nccl.patience(&given_up))?;
            self.by.metrics.sent_bytes.inc_by(rows.len() as u64);
        }
        Ok(())
    }

    fn fetch_all(
        &self,
        mut lane: Lane,
        waiting: &Receiver<(wire::Combine, usize)>,
    ) -> Result<(), NcclError> {
        let given_up = || self.closed.load(Ordering::Acquire);
        for (message, rows_len) in waiting {
            let rows = lane.receive(rows_len, &self.by.nccl.patience(&given_up))?.into();
            self.by.metrics.received_bytes.inc_by(rows_len as u64);
            let answer = checked_answer(Framed { message, rows }.into_wire());
            self.place.mailbox.on_event(self.place.node, LinkEvent::Answer(answer));
        }
        Ok(())
    }

    /// Tells the engine of a failure, unless it has given the lanes up itself.
    fn ended(&self, outcome: Result<(), NcclError>) {
        let Err(error) = outcome else { return };
        if self.closed.swap(true, Ordering::AcqRel) {
            return;
        }
        let Place { mailbox, node, connection } = &self.place;
        let reason = Broken::Nccl(error.to_string()).to_string();
        mailbox.put(*node, Arrival::Lost { connection: *connection, reason });
    }
}

/// Agrees with the node at the other end on lanes, and opens them. `say` and `hear` write to it and read
/// from it; `given_up` turns true when nobody wants it any more.
///
/// # Errors
/// The node does not want that, or NCCL fails.
pub(crate) fn open(
    by: &ByNccl,
    place: Place,
    mut say: impl FnMut(&wire::NcclRequest) -> io::Result<()>,
    mut hear: impl FnMut() -> io::Result<wire::NcclReply>,
    given_up: &(dyn Fn() -> bool + Sync),
) -> Result<Lanes, Broken> {
    let failed = |error: NcclError| Broken::Nccl(error.to_string());
    let mut hear = || match hear() {
        Ok(wire::NcclReply { refused }) if refused.is_empty() => Ok(()),
        Ok(wire::NcclReply { refused }) => Err(Broken::Nccl(format!("the node says: {refused}"))),
        Err(error) => Err(Broken::Greeting(error)),
    };
    let (request, ids) = by.nccl.request().map_err(failed)?;
    say(&request).map_err(Broken::Greeting)?;
    hear()?;
    let lanes = by.nccl.open(ids, Rank::First, given_up).map_err(failed)?;
    hear()?;
    Ok(Lanes::start(lanes, by, place)?)
}
