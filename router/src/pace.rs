//! How fast nodes answer, and what follows from it: when to ask a second replica, whom to ask last,
//! and how much extra work that may cost.
//!
//! One value lives as long as its coordinator and is lent to each exchange. What it decides:
//! - A frame that is out for longer than the **p95** of recent ones may be *hedged*: its rows go to
//!   a second replica as well. That is extra work, so it is paid from a budget of one row for every
//!   [`ROWS_PER_HEDGED_ROW`] that are sent.
//! - A frame that is out for several times as long is *overdue*: its node is **suspect** at once, is
//!   asked last, and the rows are asked of another replica whatever the budget says. What that
//!   takes too much is owed, and paid back before the next hedge.
//! - A suspect node is left alone until it has answered what it owes, then for a pause that doubles
//!   each time; a timely answer clears it. Suspicion is local; only a commit changes membership.
//!
//! The p95 is that of the fastest node of the same kernel class, by size of frame, so that a node that
//! is always slow counts as slow instead of setting the measure, and one with a processor is not held
//! against one with a GPU. Everything is of a fixed size, and times come in as data:
//! the same events give the same decisions.
//!
//! What it does not know: experts, policies, which replicas there are.

use std::collections::BTreeMap;

use entente_proto::frame::Answer;
use entente_proto::ids::{ExchangeId, NodeId};

/// Rows that must be sent for one that may be hedged: 5 % extra work.
pub const ROWS_PER_HEDGED_ROW: u64 = 20;
/// Most hedged rows that can be saved up.
const SAVED_ROWS_MAX: i64 = 4_096;
/// Shortest wait before a hedge. Below it the clock of the waiting thread decides, not the node.
const HEDGE_MIN_US: u64 = 2_000;
/// An overdue frame is out for this many times the p95 ...
const OVERDUE_FACTOR: u64 = 4;
/// ... and at least for so long: the scheduler of a busy machine takes some milliseconds at times.
const OVERDUE_MIN_US: u64 = 25_000;
/// When a frame is overdue while nothing has been measured: weights may have to come from disk.
const OVERDUE_UNMEASURED_US: u64 = 1_000_000;
/// First pause of a node that was overdue; doubles each time, up to [`PAUSE_MAX_US`].
const PAUSE_MIN_US: u64 = 50_000;
/// Longest pause of a node that was overdue.
const PAUSE_MAX_US: u64 = 6_400_000;
/// Frames without an answer that are remembered; past it the oldest is forgotten.
const OUTSTANDING_MAX: usize = 1_024;
/// Answers that a p95 is taken from.
const WINDOW_LEN: usize = 64;
/// Answers after which a p95 is worked out anew.
const REFRESH_LEN: usize = 8;
/// Size classes: a frame of n rows is in class log2(n).
const CLASSES: usize = 17;

/// The last answer times of one node and size class.
#[derive(Debug, Clone, Default)]
struct Window {
    /// A ring once it is full.
    times_us: Vec<u64>,
    next: usize,
    since_refresh: usize,
    p95_us: Option<u64>,
}

impl Window {
    fn add(&mut self, time_us: u64) {
        match self.times_us.get_mut(self.next) {
            Some(oldest) => *oldest = time_us,
            None => self.times_us.push(time_us),
        }
        self.next = (self.next + 1) % WINDOW_LEN;
        self.since_refresh += 1;
        if self.since_refresh >= REFRESH_LEN {
            self.since_refresh = 0;
            let mut sorted = self.times_us.clone();
            sorted.sort_unstable();
            self.p95_us = sorted.get(sorted.len() * 95 / 100).copied();
        }
    }
}

/// What is known of one node.
#[derive(Debug, Clone, Default)]
struct Record {
    windows: [Window; CLASSES],
    /// Times in a row that the node was overdue.
    strikes: u32,
    paused_until_us: u64,
    /// Overdue frames that it has not answered.
    owed: usize,
    /// Of its kernel class: nodes are measured by the fastest of their own.
    rank: u16,
}

/// A frame on its way.
#[derive(Debug, Clone)]
struct Sent {
    node: NodeId,
    class: usize,
    sent_us: u64,
    patience: Patience,
    /// Whether the node was blamed for it.
    overdue: bool,
}

/// How long to wait for one frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Patience {
    /// When a second replica may be asked, if the budget allows it.
    pub(crate) hedge_at_us: u64,
    /// When a second replica is asked in any case.
    pub(crate) overdue_at_us: u64,
}

/// Work that exchanges caused, in (row, expert) pairs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Work {
    /// Sent for the first time.
    pub sent: u64,
    /// Asked of a second replica while the first still owed an answer.
    pub hedged: u64,
    /// Sent again because the first attempt came to nothing.
    pub retried: u64,
    /// Given to a replica of another kernel class than the one that the expert's rows belong to.
    pub crossed: u64,
}

/// Work that had to be done more than once for one owner of rows, in (row, expert) pairs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Repeats {
    /// See [`Work::hedged`].
    pub hedged: u64,
    /// See [`Work::retried`].
    pub retried: u64,
}

/// See the module. One task owns it, beside its exchanges.
#[derive(Debug, Clone, Default)]
pub struct Pace {
    nodes: BTreeMap<NodeId, Record>,
    /// Ascending, and therefore in the order in which they were sent.
    outstanding: BTreeMap<ExchangeId, Sent>,
    /// Hedged rows that may be sent, times [`ROWS_PER_HEDGED_ROW`]; negative while some are owed.
    saved: i64,
    work: Work,
    /// By the number that an owner has in its step; empty as long as all goes well.
    repeats: BTreeMap<u16, Repeats>,
}

fn class_of(rows: usize) -> usize {
    (rows.max(1).ilog2() as usize).min(CLASSES - 1)
}

impl Pace {
    /// Nothing measured, nothing saved, nobody suspect.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes an answer, also one that no exchange waits for any more. A refusal says nothing about
    /// how fast rows are computed.
    pub fn on_answer(&mut self, node: NodeId, answer: &Answer, now_us: u64) {
        let ours = self.outstanding.get(&answer.exchange).is_some_and(|sent| sent.node == node);
        if !ours {
            return;
        }
        self.blame_overdue(now_us);
        let Some(sent) = self.forget(answer.exchange) else { return };
        if answer.result.is_err() {
            return;
        }
        let record = self.nodes.entry(node).or_default();
        record.windows[sent.class].add(now_us.saturating_sub(sent.sent_us));
        if !sent.overdue {
            (record.strikes, record.paused_until_us) = (0, 0);
        }
    }

    /// Takes note that the link to a node broke: what it owes will not be answered.
    pub fn on_link_down(&mut self, node: NodeId) {
        self.outstanding.retain(|_, sent| sent.node != node);
        if let Some(record) = self.nodes.get_mut(&node) {
            record.owed = 0;
        }
    }

    /// Work since the last call.
    pub fn take_work(&mut self) -> Work {
        std::mem::take(&mut self.work)
    }

    /// Whose work was done more than once since the last call.
    pub fn take_repeats(&mut self) -> BTreeMap<u16, Repeats> {
        std::mem::take(&mut self.repeats)
    }

    /// Takes note of a frame that leaves, and says how long to wait for it.
    pub(crate) fn on_sent(
        &mut self,
        id: ExchangeId,
        (node, rank): (NodeId, u16),
        rows: usize,
        now_us: u64,
    ) -> Patience {
        let class = class_of(rows);
        self.nodes.entry(node).or_default().rank = rank;
        let patience = match self.p95_us(rank, class) {
            Some(p95_us) => {
                let overdue_us = p95_us.saturating_mul(OVERDUE_FACTOR).max(OVERDUE_MIN_US);
                Patience {
                    hedge_at_us: now_us.saturating_add(p95_us.max(HEDGE_MIN_US)),
                    overdue_at_us: now_us.saturating_add(overdue_us),
                }
            }
            None => {
                let at = now_us.saturating_add(OVERDUE_UNMEASURED_US);
                Patience { hedge_at_us: at, overdue_at_us: at }
            }
        };
        if self.outstanding.len() >= OUTSTANDING_MAX
            && let Some((oldest, _)) = self.outstanding.first_key_value()
        {
            let oldest = *oldest;
            self.forget(oldest);
        }
        let sent = Sent { node, class, sent_us: now_us, patience, overdue: false };
        self.outstanding.insert(id, sent);
        patience
    }

    /// Takes note that a frame never left.
    pub(crate) fn on_not_sent(&mut self, id: ExchangeId) {
        self.forget(id);
    }

    fn forget(&mut self, id: ExchangeId) -> Option<Sent> {
        let sent = self.outstanding.remove(&id)?;
        if sent.overdue
            && let Some(record) = self.nodes.get_mut(&sent.node)
        {
            record.owed = record.owed.saturating_sub(1);
        }
        Some(sent)
    }

    /// Makes the nodes suspect that owe an answer for too long. Several frames that are overdue at
    /// one moment are one strike.
    pub(crate) fn blame_overdue(&mut self, now_us: u64) {
        for sent in self.outstanding.values_mut() {
            if sent.overdue || now_us < sent.patience.overdue_at_us {
                continue;
            }
            sent.overdue = true;
            let record = self.nodes.entry(sent.node).or_default();
            if record.owed == 0 && now_us >= record.paused_until_us {
                let pause_us = (PAUSE_MIN_US << record.strikes.min(16)).min(PAUSE_MAX_US);
                record.strikes += 1;
                record.paused_until_us = now_us.saturating_add(pause_us);
            }
            record.owed += 1;
        }
    }

    /// Whether the node should be asked only if nobody else can be.
    pub(crate) fn is_suspect(&self, node: NodeId, now_us: u64) -> bool {
        self.nodes
            .get(&node)
            .is_some_and(|record| record.owed > 0 || now_us < record.paused_until_us)
    }

    /// Takes note of rows that are sent for the first time, which earns hedges.
    pub(crate) fn earn(&mut self, rows: usize) {
        self.work.sent += rows as u64;
        let most = SAVED_ROWS_MAX * ROWS_PER_HEDGED_ROW as i64;
        self.saved = self.saved.saturating_add(rows as i64).min(most);
    }

    /// Takes note of a row of `owner` that has to be sent again.
    pub(crate) fn count_retried(&mut self, owner: u16) {
        self.work.retried += 1;
        self.repeats.entry(owner).or_default().retried += 1;
    }

    /// Takes note of a row of `owner` that is hedged, and paid for.
    pub(crate) fn count_hedged(&mut self, owner: u16) {
        self.repeats.entry(owner).or_default().hedged += 1;
    }

    /// Takes note of a row that is given to a replica, which may be of another kernel class than it
    /// should be.
    pub(crate) fn count_crossed(&mut self, is_crossed: bool) {
        self.work.crossed += u64::from(is_crossed);
    }

    /// Pays for hedged rows. Unless they are overdue, false when too little is saved.
    pub(crate) fn pay(&mut self, rows: usize, overdue: bool) -> bool {
        let cost = (rows as i64).saturating_mul(ROWS_PER_HEDGED_ROW as i64);
        if !overdue && cost > self.saved {
            return false;
        }
        self.saved = self.saved.saturating_sub(cost);
        self.work.hedged += rows as u64;
        true
    }

    /// The p95 of the node of a kernel class that answers frames of the size class fastest. While
    /// nothing is known of the size, it is told from a neighbour: time grows no faster than the number
    /// of rows.
    fn p95_us(&self, rank: u16, class: usize) -> Option<u64> {
        let alike = || self.nodes.values().filter(|record| record.rank == rank);
        let fastest =
            |class: usize| alike().filter_map(|record| record.windows[class].p95_us).min();
        let from_smaller = |smaller: usize| Some(fastest(smaller)? << (class - smaller));
        fastest(class)
            .or_else(|| (0..class).rev().find_map(from_smaller))
            .or_else(|| (class + 1..CLASSES).find_map(fastest))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

    const FAST: NodeId = NodeId(1);
    const SLOW: NodeId = NodeId(2);

    fn answer(id: u64) -> Answer {
        Answer { exchange: ExchangeId(id), fence: None, result: Ok(Bytes::new()) }
    }

    /// Lets a node answer `count` frames of `rows` rows after `time_us` each.
    fn answers(pace: &mut Pace, node: NodeId, rows: usize, time_us: u64, count: u64) {
        for id in 0..count {
            pace.on_sent(ExchangeId(id), (node, 0), rows, 0);
            pace.on_answer(node, &answer(id), time_us);
        }
    }

    #[test]
    fn the_wait_before_a_hedge_is_the_p95_of_the_fastest_node() {
        let mut pace = Pace::new();
        answers(&mut pace, SLOW, 8, 20_000, 64);
        answers(&mut pace, FAST, 8, 9_000, 4);
        answers(&mut pace, FAST, 8, 4_000, 60);
        let patience = pace.on_sent(ExchangeId(100), (SLOW, 0), 8, 1_000);
        assert_eq!(patience.hedge_at_us - 1_000, 9_000, "4 of 64 are more than 5 %");
        assert_eq!(patience.overdue_at_us - 1_000, 36_000);
    }

    #[test]
    fn an_unknown_size_is_told_from_its_neighbours() {
        let mut pace = Pace::new();
        let wait =
            |pace: &mut Pace, rows| pace.on_sent(ExchangeId(99), (FAST, 0), rows, 0).hedge_at_us;
        assert_eq!(wait(&mut pace, 8), OVERDUE_UNMEASURED_US);
        answers(&mut pace, FAST, 8, 3_000, 8);
        assert_eq!(wait(&mut pace, 32), 12_000, "four times the rows, four times the time");
        assert_eq!(wait(&mut pace, 1), 3_000, "fewer rows take no longer");
    }

    #[test]
    fn a_node_that_owes_is_suspect_until_it_has_answered_and_paused() {
        let mut pace = Pace::new();
        answers(&mut pace, SLOW, 8, 3_000, 8);
        let mut now_us = 0;
        for (round, pause_us) in [(100, PAUSE_MIN_US), (101, 2 * PAUSE_MIN_US)] {
            let at = pace.on_sent(ExchangeId(round), (SLOW, 0), 8, now_us).overdue_at_us;
            pace.blame_overdue(at - 1);
            assert!(!pace.is_suspect(SLOW, at - 1));
            pace.blame_overdue(at);
            assert!(pace.is_suspect(SLOW, at + PAUSE_MAX_US), "it still owes an answer");
            pace.on_answer(SLOW, &answer(round), at + 1);
            assert!(pace.is_suspect(SLOW, at + pause_us - 1));
            assert!(!pace.is_suspect(SLOW, at + pause_us));
            now_us = at + pause_us;
        }
        pace.on_sent(ExchangeId(102), (SLOW, 0), 8, now_us);
        pace.on_answer(SLOW, &answer(102), now_us + 1);
        assert_eq!(pace.nodes[&SLOW].strikes, 0, "a timely answer clears it");
    }

    #[test]
    fn hedges_are_paid_from_what_was_sent_and_overdue_ones_may_be_owed() {
        let mut pace = Pace::new();
        pace.earn(199);
        assert!(!pace.pay(10, false), "10 rows cost 200");
        pace.earn(1);
        assert!(pace.pay(10, false));
        assert!(!pace.pay(1, false), "everything is spent");
        assert!(pace.pay(5, true), "an overdue frame is asked for again in any case");
        pace.earn(119);
        assert!(!pace.pay(1, false), "100 are owed");
        pace.earn(1);
        assert!(pace.pay(1, false));
        assert_eq!(pace.take_work(), Work { sent: 320, hedged: 16, retried: 0, crossed: 0 });
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut pace = Pace::new();
        for id in 0..3 * OUTSTANDING_MAX as u64 {
            pace.on_sent(ExchangeId(id), (FAST, 0), 1, 0);
            pace.blame_overdue(2 * OVERDUE_UNMEASURED_US);
        }
        assert_eq!(pace.outstanding.len(), OUTSTANDING_MAX);
        assert_eq!(pace.nodes[&FAST].owed, OUTSTANDING_MAX);
        pace.on_link_down(FAST);
        assert!(pace.outstanding.is_empty() && pace.nodes[&FAST].owed == 0);
    }
}
