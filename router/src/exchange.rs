//! One exchange: the rows of one layer on their way through their experts, as a state machine.
//!
//! Events in (an answer, a broken link, time), commands out (send this frame to that node). Each
//! (row, expert) pair is a **slot**. A slot is *missing*, *in flight* in one or more frames, or
//! *answered*. When the last frame that carries an unanswered slot comes to nothing, the slot is
//! missing again, and missing slots are planned on the replicas that are left. While every frame
//! that carries a slot is late, another replica is asked as well (a *hedge*, within the budget of
//! [`Pace`]). Nothing else is ever sent again.
//!
//! ```text
//!              plan                    valid answer
//!   missing ─────────► in flight ───────────────────► answered
//!      ▲                   │
//!      └───────────────────┘  link down, not sent, refused, answer of a wrong length
//! ```
//!
//! How a replica is chosen: permitted by the row's policy, live, and not out of favour; of those
//! one that is not suspected of being slow, of the kernel class that comes first, with the fewest
//! slots of this exchange, then the lowest id. For a replica of an earlier class that only rests,
//! slots wait. A node falls out of favour in two ways:
//! - it *rests* for a while after something that may pass (busy, not sent, link broken);
//! - it is *excluded under its fence* after something that will not (draining, stale fence, expert
//!   not held, nonsense). A restarted node has another fence, and so has every node once the view
//!   has moved on to another epoch: then it is asked again.
//!
//! Epochs may move while frames are out, here and at the nodes. That changes no row: an answer
//! counts if it comes from the start of the node that was asked, with the model that was asked for.
//! What a start owes that is not live any more is asked of others at once.
//!
//! Rows that nobody is left for make the exchange *stranded*. It waits a little for a node to come
//! up and then fails with [`Failure::NoReplica`], so that its owner may do something better than
//! wait. It never makes do with less than every slot.

mod frames;
mod standing;
#[cfg(test)]
pub(crate) mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use entente_proto::frame::{Answer, Dispatch, Dtype, Refusal};
use entente_proto::ids::{ExchangeId, Fence, LayerId, NodeId, RegionSet, RequestId};

use crate::gate::Choice;
use crate::pace::{Pace, Patience};
use crate::view::ClusterView;
use standing::Standing;

/// Whose rows are computed, and where they may go: the same for all exchanges of a step.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Owners {
    /// The different sets of regions that may see rows.
    pub policies: Vec<RegionSet>,
    /// What rows may belong to: the request that nodes are told, and which of `policies` binds it.
    /// Several owners may be of one request.
    pub owners: Vec<(RequestId, u16)>,
}

/// What one exchange has to get computed.
#[derive(Debug, Clone)]
pub struct Job {
    /// The layer.
    pub layer: LayerId,
    /// Values of a row.
    pub hidden: usize,
    /// How rows are written, there and back.
    pub dtype: Dtype,
    /// All rows, `[rows, hidden]`, encoded once: a retry sends these same bytes.
    pub rows: Bytes,
    /// The experts of each row, `[rows, top_k]`, those of a row in ascending order.
    pub choices: Vec<Choice>,
    /// Experts of a row.
    pub top_k: usize,
    /// Whose the rows may be.
    pub owners: Arc<Owners>,
    /// Which of the owners each row belongs to.
    pub owner_of_row: Vec<u16>,
    /// How long nobody may be left for some row before the exchange fails, in microseconds.
    pub stranded_max_us: u64,
    /// When the exchange fails in any case, in microseconds on the caller's clock.
    pub deadline_us: u64,
}

impl Job {
    fn row_bytes(&self) -> usize {
        self.hidden * self.dtype.size()
    }

    /// What makes the job impossible to carry out, if anything does.
    fn flaw(&self) -> Option<&'static str> {
        let Owners { policies, owners } = &*self.owners;
        let rows = self.owner_of_row.len();
        let flaws = [
            (self.hidden == 0 || self.top_k == 0, "hidden and top_k must not be 0"),
            (self.rows.len() != rows * self.row_bytes(), "rows have another length"),
            (self.choices.len() != rows * self.top_k, "choices have another length"),
            (
                self.owner_of_row.iter().any(|o| usize::from(*o) >= owners.len()),
                "a row has no owner",
            ),
            (
                owners.iter().any(|(_, p)| usize::from(*p) >= policies.len()),
                "an owner of rows has no policy",
            ),
        ];
        flaws.into_iter().find(|(bad, _)| *bad).map(|(_, what)| what)
    }

    fn owner_of(&self, slot: usize) -> u16 {
        self.owner_of_row[slot / self.top_k]
    }

    /// Which of the owners' policies binds the row of a slot.
    fn policy_of(&self, slot: usize) -> u16 {
        self.owners.owners[usize::from(self.owner_of(slot))].1
    }

    fn regions(&self, policy: u16) -> &RegionSet {
        &self.owners.policies[usize::from(policy)]
    }
}

/// Something that the owner of an exchange must do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Send the frame to the node. If that is not possible at once, tell [`Exchange::on_not_sent`].
    Send {
        /// The node.
        node: NodeId,
        /// The frame.
        frame: Dispatch,
        /// How many of the frame's assignments are each owner's, in their order.
        shares: Vec<(u16, u32)>,
    },
}

/// How far an exchange is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Status {
    /// Answers are outstanding.
    Waiting {
        /// When [`Exchange::on_tick`] must be called, if nothing happens before.
        until_us: u64,
    },
    /// Every slot is answered; [`Exchange::parts`] may be called.
    Done,
    /// The exchange is over without a result.
    Failed(Failure),
}

/// Why an exchange failed. Names no expert: expert choices reveal text.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// A bug of the caller.
    #[error("layer {layer}: impossible exchange: {what}")]
    Impossible {
        /// The layer.
        layer: LayerId,
        /// What is wrong with the job.
        what: &'static str,
    },
    /// A row's policy keeps it out of the only region whose nodes may be used.
    #[error("layer {layer}: the policy of a row does not allow region {home}")]
    NotPermitted {
        /// The layer.
        layer: LayerId,
        /// The coordinator's own region.
        home: entente_proto::ids::Region,
    },
    /// Nobody is left who may and can compute some of the rows.
    #[error("layer {layer}: no permitted replica is left for some rows (last: {last})")]
    NoReplica {
        /// The layer.
        layer: LayerId,
        /// What happened to the last frame that came to nothing.
        last: &'static str,
    },
    /// Replicas are there, and none has taken some of the rows in time.
    #[error("layer {layer}: deadline passed before a replica took some rows (last: {last})")]
    NotTaken {
        /// The layer.
        layer: LayerId,
        /// What happened to the last frame that came to nothing.
        last: &'static str,
    },
    /// A node did not answer in time.
    #[error("layer {layer}: deadline passed while waiting for node {node}")]
    Deadline {
        /// The layer.
        layer: LayerId,
        /// A node that owes an answer.
        node: NodeId,
    },
    /// Another exchange of the same step failed.
    #[error("given up with another exchange of its step")]
    GivenUp,
}

/// Hands out the names of frames. Each exchange gets a block of its own, so that an answer tells by
/// its number which exchange it belongs to, and no number comes twice while a coordinator lives.
#[derive(Debug, Default)]
pub struct ExchangeIds {
    blocks: u64,
}

/// Frames that one exchange may send, retries included: the width of a block of names.
const FRAMES_MAX: u64 = 1 << 16;

impl ExchangeIds {
    /// Starts at the first block.
    pub fn new() -> Self {
        Self::default()
    }

    fn block(&mut self) -> u64 {
        self.blocks += 1;
        self.blocks * FRAMES_MAX
    }
}

/// A frame that was sent and not answered.
#[derive(Debug)]
struct InFlight {
    node: NodeId,
    fence: Fence,
    /// Bytes that a valid answer has.
    answer_len: usize,
    /// When it is late.
    patience: Patience,
    /// The slots of the frame's assignments, in order.
    slots: Vec<u32>,
}

/// Where one (row, expert) pair stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Slot {
    Missing,
    /// In this many frames.
    InFlight(u8),
    /// In `answers[answer]`, as the row `position`.
    Answered {
        answer: u32,
        position: u32,
    },
}

/// The state machine of one exchange. One task owns it.
#[derive(Debug)]
pub struct Exchange {
    job: Job,
    /// The first name of this exchange's block.
    block: u64,
    frames_sent: u64,
    in_flight: BTreeMap<ExchangeId, InFlight>,
    /// One for each choice of the job.
    slots: Vec<Slot>,
    unanswered: usize,
    answers: Vec<Bytes>,
    standing: Standing,
    /// When a resting node may be asked for what is missing, or a frame is late.
    wake_us: Option<u64>,
    /// Since when nobody is left for some rows.
    stranded_since_us: Option<u64>,
    /// What happened to the last frame that came to nothing.
    last_trouble: &'static str,
    failure: Option<Failure>,
}

impl Exchange {
    /// Starts an exchange: the commands send every row on its way, as far as nodes are live.
    pub fn start(
        job: Job,
        view: &ClusterView,
        pace: &mut Pace,
        ids: &mut ExchangeIds,
        now_us: u64,
    ) -> (Self, Vec<Command>) {
        let layer = job.layer;
        let shut_out = |policy: &RegionSet| !policy.contains(&view.home);
        let failure = match job.flaw() {
            Some(what) => Some(Failure::Impossible { layer, what }),
            None if job.owners.policies.iter().any(shut_out) => {
                Some(Failure::NotPermitted { layer, home: view.home })
            }
            None => None,
        };
        let mut exchange = Self {
            block: ids.block(),
            frames_sent: 0,
            in_flight: BTreeMap::new(),
            slots: vec![Slot::Missing; job.choices.len()],
            unanswered: job.choices.len(),
            answers: Vec::new(),
            standing: Standing::default(),
            wake_us: None,
            stranded_since_us: None,
            last_trouble: "none is live",
            failure,
            job,
        };
        pace.earn(exchange.slots.len());
        let commands = exchange.plan(view, pace, now_us);
        (exchange, commands)
    }

    /// What the names of all frames of this exchange have in common, and those of no other.
    pub fn number(&self) -> u64 {
        self.block / FRAMES_MAX
    }

    /// The number of the exchange that a frame of this name would belong to.
    pub fn number_of(id: ExchangeId) -> u64 {
        id.0 / FRAMES_MAX
    }

    /// How far the exchange is.
    pub fn status(&self) -> Status {
        if let Some(failure) = &self.failure {
            return Status::Failed(failure.clone());
        }
        if self.unanswered == 0 {
            return Status::Done;
        }
        let wake_us = self.wake_us.unwrap_or(u64::MAX);
        let stranded_us = self.stranded_until_us().unwrap_or(u64::MAX);
        Status::Waiting { until_us: wake_us.min(stranded_us).min(self.job.deadline_us) }
    }

    /// Takes an answer of `node`. What was not asked for (an unknown name, another node) is dropped,
    /// and so are rows of another start of the node or of another model; its epochs may be ahead of
    /// the frame's. What is refused or malformed makes its slots missing again.
    pub fn on_answer(
        &mut self,
        view: &ClusterView,
        pace: &mut Pace,
        node: NodeId,
        answer: Answer,
        now_us: u64,
    ) -> Vec<Command> {
        pace.on_answer(node, &answer, now_us);
        let Some(sent) = self.in_flight.get(&answer.exchange) else { return Vec::new() };
        let fence = sent.fence;
        let ours = |theirs: Fence| is_same_start(&theirs, &fence);
        let counts = match &answer.result {
            Ok(_) => answer.fence.is_some_and(ours),
            // A node that has been started anew says so.
            Err(Refusal::StaleFence(_)) => true,
            Err(_) => answer.fence.is_none_or(ours),
        };
        if sent.node != node || !counts {
            return Vec::new();
        }
        match answer.result {
            Ok(rows) if rows.len() == sent.answer_len => {
                self.keep(answer.exchange, rows);
                return Vec::new();
            }
            Ok(_) => {
                self.last_trouble = "an answer had a wrong length";
                self.standing.exclude(node, fence);
            }
            Err(refusal) => {
                self.last_trouble = name(&refusal);
                match refusal {
                    Refusal::Busy | Refusal::Expired => self.standing.rest(node, now_us),
                    Refusal::Draining
                    | Refusal::StaleFence(_)
                    | Refusal::NotHeld(_)
                    | Refusal::RegionRefused(_)
                    | Refusal::Invalid(_) => self.standing.exclude(node, fence),
                }
            }
        }
        self.give_up(pace, answer.exchange);
        self.plan(view, pace, now_us)
    }

    /// Takes note that the link to `node` broke: nothing in flight to it will be answered. The view
    /// must know already.
    pub fn on_link_down(
        &mut self,
        view: &ClusterView,
        pace: &mut Pace,
        node: NodeId,
        now_us: u64,
    ) -> Vec<Command> {
        pace.on_link_down(node);
        let lost: Vec<ExchangeId> = self
            .in_flight
            .iter()
            .filter(|(_, sent)| sent.node == node)
            .map(|(id, _)| *id)
            .collect();
        if lost.is_empty() {
            return Vec::new();
        }
        self.last_trouble = "a link broke";
        self.standing.rest(node, now_us);
        lost.into_iter().for_each(|id| self.give_up(pace, id));
        self.plan(view, pace, now_us)
    }

    /// Takes note that a frame could not be handed to its link.
    pub fn on_not_sent(
        &mut self,
        view: &ClusterView,
        pace: &mut Pace,
        id: ExchangeId,
        now_us: u64,
    ) -> Vec<Command> {
        pace.on_not_sent(id);
        let Some(sent) = self.in_flight.get(&id) else { return Vec::new() };
        self.last_trouble = "a link was down or full";
        self.standing.rest(sent.node, now_us);
        self.give_up(pace, id);
        self.plan(view, pace, now_us)
    }

    /// Takes note that nodes came up, that the cluster counts on others now, or that epochs moved.
    pub fn on_view_changed(
        &mut self,
        view: &ClusterView,
        pace: &mut Pace,
        now_us: u64,
    ) -> Vec<Command> {
        let is_over = |sent: &InFlight| {
            view.fence(sent.node).is_none_or(|fence| !is_same_start(&fence, &sent.fence))
        };
        let lost: Vec<ExchangeId> =
            self.in_flight.iter().filter(|(_, sent)| is_over(sent)).map(|(id, _)| *id).collect();
        if !lost.is_empty() {
            self.last_trouble = "the cluster counts on a node no more";
        }
        lost.into_iter().for_each(|id| self.give_up(pace, id));
        self.plan(view, pace, now_us)
    }

    /// Takes note of the time; due when [`Status::Waiting`] says so, harmless at any other time.
    pub fn on_tick(&mut self, view: &ClusterView, pace: &mut Pace, now_us: u64) -> Vec<Command> {
        self.plan(view, pace, now_us)
    }

    /// What combines to the result: for each row in order, in ascending order of experts, a weight
    /// and the expert's output as it came. The sum of a row is `weight * output` added one by one
    /// in f32, multiplied and added in two steps; whoever owns the vector units does that.
    ///
    /// # Panics
    /// If the exchange is not [`Status::Done`]: a sum that lacks a part is a wrong token.
    pub fn parts(&self) -> Vec<(f32, &[u8])> {
        assert!(self.status() == Status::Done, "combined before every row was answered");
        let row_bytes = self.job.row_bytes();
        let part = |(slot, choice): (&Slot, &Choice)| {
            let &Slot::Answered { answer, position } = slot else { return None };
            let start = position as usize * row_bytes;
            Some((choice.weight, &self.answers[answer as usize][start..start + row_bytes]))
        };
        self.slots.iter().zip(&self.job.choices).filter_map(part).collect()
    }

    /// Keeps the rows of a valid answer. The first one for a slot counts.
    fn keep(&mut self, id: ExchangeId, rows: Bytes) {
        let Some(sent) = self.in_flight.remove(&id) else { return };
        let answer = self.answers.len() as u32;
        let before = self.unanswered;
        for (position, slot) in sent.slots.into_iter().enumerate() {
            let slot = &mut self.slots[slot as usize];
            if let Slot::InFlight(_) = *slot {
                *slot = Slot::Answered { answer, position: position as u32 };
                self.unanswered -= 1;
            }
        }
        // An answer that another one forestalled need not be held in memory.
        if self.unanswered < before {
            self.answers.push(rows);
        }
    }

    /// Makes the slots of a frame missing again, but for those that another frame carries too.
    fn give_up(&mut self, pace: &mut Pace, id: ExchangeId) {
        let Some(sent) = self.in_flight.remove(&id) else { return };
        for i in sent.slots {
            let slot = &mut self.slots[i as usize];
            *slot = match *slot {
                Slot::InFlight(frames @ 2..) => Slot::InFlight(frames - 1),
                Slot::InFlight(_) => {
                    pace.count_retried(self.job.owner_of(i as usize));
                    Slot::Missing
                }
                other => other,
            };
        }
    }

    fn fail(&mut self, failure: Failure) {
        self.failure = Some(failure);
        self.in_flight.clear();
    }

    /// Sends what is missing to whoever may and can compute it now.
    fn plan(&mut self, view: &ClusterView, pace: &mut Pace, now_us: u64) -> Vec<Command> {
        if self.unanswered == 0 || self.failure.is_some() {
            return Vec::new();
        }
        pace.blame_overdue(now_us);
        let (groups, left) = self.assign(view, pace, now_us);
        self.stranded_since_us = match self.stranded_since_us {
            _ if !left.iter().any(|slot| self.is_stranded(view, *slot)) => None,
            since => since.or(Some(now_us)),
        };
        if let Some(failure) = self.hopeless(now_us) {
            self.fail(failure);
            return Vec::new();
        }
        let mut commands = self.frames(view, pace, groups, now_us);
        let groups = self.hedge(view, pace, now_us);
        commands.extend(self.frames(view, pace, groups, now_us));
        let rested_us = (!left.is_empty()).then(|| self.standing.next_return_us(now_us)).flatten();
        self.wake_us = rested_us.into_iter().chain(self.next_late_us(now_us)).min();
        commands
    }

    /// When to stop waiting for a replica that is not there.
    fn stranded_until_us(&self) -> Option<u64> {
        Some(self.stranded_since_us?.saturating_add(self.job.stranded_max_us))
    }

    /// Why nothing can come of the exchange any more, if so.
    fn hopeless(&self, now_us: u64) -> Option<Failure> {
        let (layer, last) = (self.job.layer, self.last_trouble);
        if self.stranded_until_us().is_some_and(|until_us| now_us >= until_us) {
            return Some(Failure::NoReplica { layer, last });
        }
        let any_missing = self.slots.contains(&Slot::Missing);
        let out_of_frames = any_missing && self.frames_sent >= FRAMES_MAX / 2;
        if now_us < self.job.deadline_us && !out_of_frames {
            return None;
        }
        let owing = self.in_flight.values().next().map(|sent| sent.node);
        Some(match owing {
            Some(node) if !any_missing => Failure::Deadline { layer, node },
            _ if self.stranded_since_us.is_some() => Failure::NoReplica { layer, last },
            _ => Failure::NotTaken { layer, last },
        })
    }

    /// When the next frame will be late, or overdue.
    fn next_late_us(&self, now_us: u64) -> Option<u64> {
        let times = |sent: &InFlight| [sent.patience.hedge_at_us, sent.patience.overdue_at_us];
        self.in_flight.values().flat_map(times).filter(|at| *at > now_us).min()
    }
}

/// Whether two fences name the same start of a node with the same model: epochs do not change what
/// it computes.
fn is_same_start(a: &Fence, b: &Fence) -> bool {
    (a.incarnation, a.model_digest) == (b.incarnation, b.model_digest)
}

/// A refusal in words that are ours: a node's own text may say anything.
fn name(refusal: &Refusal) -> &'static str {
    match refusal {
        Refusal::Busy => "a node was busy",
        Refusal::Draining => "a node was draining",
        Refusal::StaleFence(_) => "a node has another fence",
        Refusal::NotHeld(_) => "a node does not hold what is placed on it",
        Refusal::RegionRefused(_) => "a node refused rows of a region",
        Refusal::Invalid(_) => "a node called a frame invalid",
        Refusal::Expired => "a frame waited too long at a node",
    }
}
