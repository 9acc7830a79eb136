//! How a node lives in a cluster that raft agrees on: what to call, what to report, what to load and
//! what to let go. Pure; events in, commands out.
//!
//! ```text
//!             ┌──────────── fenced ─────────────┐
//!             ▼                                 │
//!   Call(Register) ──► Call(Connect) ──► Streaming: reports out, orders in
//!        ▲  ▲              ▲   │                │
//!        │  └── fenced ────┼───┤ fails          │ breaks, or is silent
//!        │ fails           └───┴──── Pause ◄────┘
//!        └── Pause
//! ```
//!
//! Invariants:
//! - nothing is released that the latest committed placement seen names for this node, nor while
//!   orders and that placement are of different epochs: one of the two is news, and nobody knows
//!   which; but an expert whose weights have changed is released at once, and got anew;
//! - whatever the control plane does, what is held stays held and goes on serving;
//! - at most one call and one load are under way.
//!
//! What it does not know: clocks, sockets, threads, files, weights, and who leads.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use entente_proto::ids::{Incarnation, NodeId, PlacementEpoch};
use entente_proto::placement::ExpertKey;

use crate::scrub::SPOILT;

/// Heartbeats without orders after which the leader is taken to be gone and sought anew. A stream
/// does not end when its other end is stopped or cut off.
const SILENT_HEARTBEATS: u64 = 5;
/// Longest pause between two attempts. They begin a heartbeat apart and double.
const PAUSE_MS_MAX: u64 = 1_000;
/// Attempts begin a heartbeat apart again after this long without trouble.
const CALM_MS: u64 = 10_000;
/// How often rows are reported.
const ROWS_MS: u64 = 1_000;
/// After this long an expert that could not be loaded, and is still wanted, is tried again.
const LOAD_RETRY_MS: u64 = 10_000;
/// Experts that are loaded at once before the node serves. Once it does they come one by one, so
/// that loading takes as little as possible from computing.
const LOADS_AT_ONCE: usize = 16;

/// What the operator may choose.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Settings {
    pub(crate) heartbeat_ms: u64,
    /// How long leaving may take.
    pub(crate) drain_deadline_ms: u64,
}

/// What the leader wants.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Orders {
    /// Of the report that they answer.
    pub(crate) sequence: u64,
    pub(crate) placement_epoch: PlacementEpoch,
    /// Absent when as before on this stream.
    pub(crate) wanted: Option<BTreeSet<ExpertKey>>,
    pub(crate) dismissed: bool,
}

/// What the cluster has agreed on about this node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Committed {
    pub(crate) placement_epoch: PlacementEpoch,
    /// What the placement names for this node.
    pub(crate) placed: BTreeSet<ExpertKey>,
    /// The start that takes traffic, if the node does.
    pub(crate) active: Option<Incarnation>,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Event {
    Registered {
        node: NodeId,
        incarnation: Incarnation,
    },
    /// The stream to the leader is open, and the report that it began with is sent.
    Connected,
    Orders(Orders),
    /// The call failed, or the stream ended. Fenced: this start is no longer the latest.
    Broken {
        fenced: bool,
    },
    Committed(Committed),
    /// A load has ended, well for some experts and badly for others.
    Loaded {
        held: BTreeSet<ExpertKey>,
        failed: BTreeMap<ExpertKey, String>,
    },
    /// The weights of an expert in memory are no longer what they should be.
    Spoilt(ExpertKey),
    /// A heartbeat is due.
    Tick,
    /// The node wants to stop.
    Leave,
}

/// A heartbeat.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Report {
    pub(crate) node: NodeId,
    pub(crate) incarnation: Incarnation,
    pub(crate) sequence: u64,
    /// Absent when as in the last report of this stream.
    pub(crate) held: Option<BTreeSet<ExpertKey>>,
    /// Those not yet reported on this stream.
    pub(crate) failed: BTreeMap<ExpertKey, String>,
    pub(crate) leaving: bool,
    /// Rows computed since the last time belong in it.
    pub(crate) with_rows: bool,
}

/// What to do. Each call ends with `Registered`, `Connected` or `Broken`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Command {
    Register,
    /// Opens a stream to the leader, in place of any other, with this for a beginning.
    Connect(Report),
    Report(Report),
    /// Ends with `Loaded`.
    Load {
        experts: BTreeSet<ExpertKey>,
        beside_serving: bool,
    },
    Release(BTreeSet<ExpertKey>),
    /// The node is this start now, and greets its peers again.
    Adopt(Incarnation),
    /// How many of the experts wanted are there.
    Progress {
        held: u64,
        wanted: u64,
    },
    /// The node serves, for the first time.
    Ready,
    Stop,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Call {
    Register,
    Connect,
}

#[derive(Debug)]
enum Phase {
    Calling,
    Pausing { until_ms: u64, then: Call },
    Streaming { heard_ms: u64 },
}

#[derive(Debug)]
struct Leaving {
    deadline_ms: u64,
    /// The first report of this stream that said so. An earlier one may have been answered with a
    /// dismissal that the leader did not mean to be taken.
    told: Option<u64>,
}

#[derive(Debug)]
struct Failed {
    reason: String,
    /// When it is tried again.
    retry_ms: u64,
    told: bool,
}

/// The machine.
#[derive(Debug)]
pub(crate) struct Session {
    settings: Settings,
    phase: Phase,
    start: Option<(NodeId, Incarnation)>,
    /// Reports on the stream that is open or being opened.
    sequence: u64,
    /// What is held is not as the last of these reports said.
    held_changed: bool,
    committed: Option<Committed>,
    wanted: Option<BTreeSet<ExpertKey>>,
    wanted_epoch: PlacementEpoch,
    held: BTreeSet<ExpertKey>,
    failed: BTreeMap<ExpertKey, Failed>,
    loading: bool,
    ready: bool,
    leaving: Option<Leaving>,
    pause_ms: u64,
    trouble_ms: u64,
    rows_ms: u64,
}

impl Session {
    /// A node that has just started and holds nothing, and its first command.
    pub(crate) fn start(settings: Settings) -> (Self, Command) {
        let session = Self {
            settings,
            phase: Phase::Calling,
            start: None,
            sequence: 0,
            held_changed: true,
            committed: None,
            wanted: None,
            wanted_epoch: PlacementEpoch::default(),
            held: BTreeSet::new(),
            failed: BTreeMap::new(),
            loading: false,
            ready: false,
            leaving: None,
            pause_ms: settings.heartbeat_ms,
            trouble_ms: 0,
            rows_ms: 0,
        };
        (session, Command::Register)
    }

    /// Takes one event at `now_ms` of a clock that never goes back.
    pub(crate) fn on(&mut self, event: Event, now_ms: u64) -> Vec<Command> {
        let mut out = Vec::new();
        match event {
            Event::Registered { node, incarnation } => {
                self.start = Some((node, incarnation));
                out.push(Command::Adopt(incarnation));
                self.connect(now_ms, &mut out);
            }
            Event::Connected => self.phase = Phase::Streaming { heard_ms: now_ms },
            Event::Orders(orders) => self.ordered(orders, now_ms, &mut out),
            Event::Broken { fenced } => self.broken(fenced, now_ms),
            Event::Committed(committed) => self.committed = Some(committed),
            Event::Loaded { held, failed } => self.loaded(held, failed, now_ms, &mut out),
            Event::Spoilt(expert) => self.spoilt(expert, now_ms, &mut out),
            Event::Tick => self.tick(now_ms, &mut out),
            Event::Leave => self.leave(now_ms, &mut out),
        }
        self.settle(now_ms, &mut out);
        out
    }

    /// The other end of a new stream knows nothing of what was said on the last.
    fn connect(&mut self, now_ms: u64, out: &mut Vec<Command>) {
        self.phase = Phase::Calling;
        (self.sequence, self.held_changed) = (0, true);
        self.failed.values_mut().for_each(|failed| failed.told = false);
        if let Some(leaving) = &mut self.leaving {
            leaving.told = None;
        }
        if let Some(start) = self.start {
            out.push(Command::Connect(self.next_report(start, now_ms)));
        }
    }

    fn ordered(&mut self, orders: Orders, now_ms: u64, out: &mut Vec<Command>) {
        if let Phase::Streaming { heard_ms } = &mut self.phase {
            *heard_ms = now_ms;
        }
        self.wanted_epoch = orders.placement_epoch;
        if orders.wanted.is_some() {
            self.wanted = orders.wanted;
        }
        let told = self.leaving.as_ref().and_then(|leaving| leaving.told);
        if orders.dismissed && told.is_some_and(|told| orders.sequence >= told) {
            out.push(Command::Stop);
        }
    }

    /// Nothing is tried again at once: whoever is fenced again and again, because another process
    /// has the same certificate, must not fill the log with registrations.
    fn broken(&mut self, fenced: bool, now_ms: u64) {
        if now_ms.saturating_sub(self.trouble_ms) > CALM_MS {
            self.pause_ms = self.settings.heartbeat_ms;
        }
        let then = if fenced || self.start.is_none() { Call::Register } else { Call::Connect };
        self.phase = Phase::Pausing { until_ms: now_ms + self.pause_ms, then };
        self.pause_ms = (self.pause_ms * 2).clamp(self.settings.heartbeat_ms, PAUSE_MS_MAX);
        self.trouble_ms = now_ms;
    }

    fn loaded(
        &mut self,
        held: BTreeSet<ExpertKey>,
        failed: BTreeMap<ExpertKey, String>,
        now_ms: u64,
        out: &mut Vec<Command>,
    ) {
        self.loading = false;
        self.failed.retain(|key, _| !held.contains(key));
        let retry_ms = now_ms.saturating_add(LOAD_RETRY_MS);
        let failed = failed.into_iter();
        self.failed
            .extend(failed.map(|(key, reason)| (key, Failed { reason, retry_ms, told: false })));
        self.held.extend(held);
        self.held_changed = true;
        if let Some(wanted) = &self.wanted {
            let held = self.held.intersection(wanted).count() as u64;
            out.push(Command::Progress { held, wanted: wanted.len() as u64 });
        }
        self.report(now_ms, out);
    }

    /// It serves no more from here on, the leader hears why, and it is got anew like any other that
    /// is missing.
    fn spoilt(&mut self, expert: ExpertKey, now_ms: u64, out: &mut Vec<Command>) {
        if !self.held.remove(&expert) {
            return;
        }
        self.held_changed = true;
        let failed = Failed { reason: SPOILT.to_owned(), retry_ms: now_ms, told: false };
        self.failed.insert(expert, failed);
        out.push(Command::Release(BTreeSet::from([expert])));
        self.report(now_ms, out);
    }

    fn tick(&mut self, now_ms: u64, out: &mut Vec<Command>) {
        if self.leaving.as_ref().is_some_and(|leaving| now_ms >= leaving.deadline_ms) {
            return out.push(Command::Stop);
        }
        let silence_ms = SILENT_HEARTBEATS * self.settings.heartbeat_ms;
        match self.phase {
            Phase::Pausing { until_ms, then: Call::Register } if now_ms >= until_ms => {
                self.phase = Phase::Calling;
                out.push(Command::Register);
            }
            Phase::Pausing { until_ms, then: Call::Connect } if now_ms >= until_ms => {
                self.connect(now_ms, out);
            }
            Phase::Streaming { heard_ms } if now_ms.saturating_sub(heard_ms) > silence_ms => {
                self.connect(now_ms, out);
            }
            Phase::Streaming { .. } => self.report(now_ms, out),
            Phase::Calling | Phase::Pausing { .. } => {}
        }
    }

    /// A node that nobody knows has nobody to wait for.
    fn leave(&mut self, now_ms: u64, out: &mut Vec<Command>) {
        if self.start.is_none() {
            return out.push(Command::Stop);
        }
        if self.leaving.is_none() {
            let deadline_ms = now_ms + self.settings.drain_deadline_ms;
            self.leaving = Some(Leaving { deadline_ms, told: None });
        }
        self.report(now_ms, out);
    }

    /// Reports, if there is a stream to do it on.
    fn report(&mut self, now_ms: u64, out: &mut Vec<Command>) {
        if let (Phase::Streaming { .. }, Some(start)) = (&self.phase, self.start) {
            out.push(Command::Report(self.next_report(start, now_ms)));
        }
    }

    fn next_report(&mut self, (node, incarnation): (NodeId, Incarnation), now_ms: u64) -> Report {
        self.sequence += 1;
        let sequence = self.sequence;
        let held = std::mem::take(&mut self.held_changed).then(|| self.held.clone());
        let untold = self.failed.iter_mut().filter(|(_, failed)| !failed.told);
        let failed = untold.map(|(key, failed)| {
            failed.told = true;
            (*key, failed.reason.clone())
        });
        let failed = failed.collect();
        if let Some(leaving) = &mut self.leaving {
            leaving.told.get_or_insert(sequence);
        }
        let leaving = self.leaving.is_some();
        let with_rows = now_ms.saturating_sub(self.rows_ms) >= ROWS_MS;
        if with_rows {
            self.rows_ms = now_ms;
        }
        Report { node, incarnation, sequence, held, failed, leaving, with_rows }
    }

    /// What follows from all that is known now.
    fn settle(&mut self, now_ms: u64, out: &mut Vec<Command>) {
        let Some(wanted) = &self.wanted else { return };
        self.failed.retain(|key, failed| wanted.contains(key) && now_ms < failed.retry_ms);
        if !self.loading {
            let at_once = if self.ready { 1 } else { LOADS_AT_ONCE };
            let missing =
                wanted.difference(&self.held).filter(|key| !self.failed.contains_key(key));
            let experts: BTreeSet<ExpertKey> = missing.take(at_once).copied().collect();
            if !experts.is_empty() {
                self.loading = true;
                out.push(Command::Load { experts, beside_serving: self.ready });
            }
        }
        let Some(committed) = &self.committed else { return };
        if committed.placement_epoch == self.wanted_epoch {
            let needed = |key: &&ExpertKey| wanted.contains(key) || committed.placed.contains(key);
            let (kept, released) = self.held.iter().partition::<BTreeSet<ExpertKey>, _>(needed);
            if !released.is_empty() {
                self.held = kept;
                self.held_changed = true;
                out.push(Command::Release(released));
            }
        }
        self.ready_once(out);
    }

    /// It becomes active only once it is decided what it holds, which may be nothing.
    fn ready_once(&mut self, out: &mut Vec<Command>) {
        let (Some(wanted), Some(committed)) = (&self.wanted, &self.committed) else { return };
        let active = committed.active.is_some()
            && committed.active == self.start.map(|(_, incarnation)| incarnation);
        let holds = wanted.is_subset(&self.held) && committed.placed.is_subset(&self.held);
        if !self.ready && active && holds {
            self.ready = true;
            out.push(Command::Ready);
        }
    }
}
