//! A coordinator, its links and its nodes, in virtual time, and what must be true of them.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use bytes::Bytes;
use entente_proto::frame::{Answer, Dispatch, Dtype};
use entente_proto::ids::{
    ExchangeId, ExpertId, Incarnation, KernelClass, LayerId, MembershipEpoch, ModelDigest, NodeId,
    PlacementEpoch, RegionSet, RequestId,
};
use entente_proto::placement::{ModelShape, Placement, PlacementNode};
use entente_router::exchange::{Command, Exchange, Job, Owners, Status};
use entente_router::exchanges::{Exchanges, Ticket};
use entente_router::gate::Choice;
use entente_router::pace::ROWS_PER_HEDGED_ROW;
use entente_router::placement;
use entente_router::view::{ClusterView, Member, Model, NodeView};
use entente_sim::Random;

use crate::bugs::{self, Bug};
use crate::nodes::{Node, output};

const HIDDEN: usize = 3;
const TOP_K: usize = 3;
const LAYERS: u16 = 3;
/// Exchanges of a run, and how many of them are in flight at once.
const JOBS: u64 = 60;
const LANES: usize = 2;
/// Long enough for every fault to pass.
const DEADLINE_US: u64 = 60_000_000;
/// Longer ago, and an answer to an earlier exchange is not remembered.
const OPEN_MAX: usize = 64;

type Checked = Result<(), String>;

/// What came of a run.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    exchanges: u64,
    retried: u64,
    hedged: u64,
    links: u64,
    stale: u64,
    repeated: u64,
    /// Of everything that happened, in order.
    trace: u64,
}

impl Report {
    pub const NAMES: [&str; 6] = ["exchanges", "retried", "hedged", "links", "stale", "repeated"];

    pub fn numbers(&self) -> [u64; 6] {
        [self.exchanges, self.retried, self.hedged, self.links, self.stale, self.repeated]
    }
}

#[derive(Debug, Clone)]
enum Mail {
    /// A frame arrives at a node.
    Frame {
        node: NodeId,
        link: u64,
        frame: Dispatch,
    },
    /// An answer arrives at the coordinator.
    Answer {
        node: NodeId,
        link: u64,
        answer: Answer,
    },
    LinkUp {
        node: NodeId,
    },
    Wake,
    Trouble,
}

/// An exchange that is in flight, with the result that it must have.
struct Running {
    ticket: Ticket,
    /// What the names of its frames have in common.
    number: u64,
    job: Job,
    expected: Vec<u32>,
    /// Row numbers by content.
    rows: BTreeMap<Vec<u8>, usize>,
    /// Slots with their outputs, as valid answers brought them.
    arrived: Vec<(usize, Bytes)>,
    answered: BTreeSet<usize>,
}

pub struct World {
    random: Random,
    bug: Option<Bug>,
    /// Nodes are healthy but for one that is slow: there is much to hedge, and little budget.
    is_calm: bool,
    now_us: u64,
    view: ClusterView,
    nodes: BTreeMap<NodeId, Node>,
    exchanges: Exchanges,
    running: Vec<Running>,
    started: u64,
    begun: u64,
    experts: u16,
    queue: BTreeMap<(u64, u64), Mail>,
    mails: u64,
    alarm_us: Option<u64>,
    incarnations: u64,
    links: u64,
    /// Frames that were sent, by name, until they are answered or lost, and some after that.
    sent: BTreeMap<ExchangeId, (NodeId, Dispatch)>,
    slots: u64,
    sent_slots: u64,
    lost_slots: u64,
    report: Report,
    hasher: DefaultHasher,
}

impl World {
    pub fn new(seed: u64, bug: Option<Bug>) -> Self {
        let mut random = Random(seed);
        let is_calm = random.one_in(3);
        let count = 3 + random.below(3) as u32;
        let experts = 4 + random.below(6) as u16;
        let view = view(&mut random, count, experts);
        let pace = |random: &mut Random| 300 + random.below(700);
        let mut nodes: BTreeMap<NodeId, Node> =
            view.nodes.keys().map(|id| (*id, Node::new(pace(&mut random)))).collect();
        if let Some(slow) = nodes.values_mut().next().filter(|_| is_calm) {
            slow.pace_us = 15_000;
        }
        Self {
            random,
            bug,
            is_calm,
            now_us: 0,
            view,
            nodes,
            exchanges: Exchanges::new(),
            running: Vec::new(),
            started: 0,
            begun: 0,
            experts,
            queue: BTreeMap::new(),
            mails: 0,
            alarm_us: None,
            incarnations: 1,
            links: 0,
            sent: BTreeMap::new(),
            slots: 0,
            sent_slots: 0,
            lost_slots: 0,
            report: Report::default(),
            hasher: DefaultHasher::new(),
        }
    }

    pub fn run(mut self) -> Result<Report, String> {
        if !self.is_calm {
            self.post(3_000, Mail::Trouble);
        }
        self.fill_lanes()?;
        while !self.running.is_empty() {
            let Some(((at_us, _), mail)) = self.queue.pop_first() else {
                return Err("nothing happens any more".to_owned());
            };
            self.now_us = at_us;
            self.deliver(mail)?;
            self.finish()?;
            self.fill_lanes()?;
            self.set_alarm();
        }
        self.check_work()?;
        self.report.trace = self.hasher.finish();
        Ok(self.report)
    }

    /// Wakes up when the exchanges want it; earlier alarms that are set already do no harm.
    fn set_alarm(&mut self) {
        let Some(wake_us) = self.exchanges.wake_us() else { return };
        if self.alarm_us.is_none_or(|alarm_us| wake_us < alarm_us) {
            self.alarm_us = Some(wake_us);
            self.post_at(wake_us, Mail::Wake);
        }
    }

    fn post(&mut self, within_us: u64, mail: Mail) {
        let at_us = self.now_us + 1 + self.random.below(within_us);
        self.post_at(at_us, mail);
    }

    fn post_at(&mut self, at_us: u64, mail: Mail) {
        self.mails += 1;
        self.queue.insert((at_us.max(self.now_us), self.mails), mail);
    }

    fn trace(&mut self, what: impl Hash) {
        (self.now_us, what).hash(&mut self.hasher);
    }

    fn deliver(&mut self, mail: Mail) -> Checked {
        match mail {
            Mail::Frame { node, link, frame } => {
                self.at_node(node, link, &frame);
                Ok(())
            }
            Mail::Answer { node, link, answer } => self.answered(node, link, answer),
            Mail::LinkUp { node } => self.link_up(node),
            Mail::Wake => {
                self.alarm_us = None;
                let commands = self.exchanges.on_tick(&self.view, self.now_us);
                self.carry_out(commands)
            }
            Mail::Trouble => self.trouble(),
        }
    }

    /// Starts exchanges until all lanes are busy.
    fn fill_lanes(&mut self) -> Checked {
        while self.running.len() < LANES && self.started < JOBS {
            self.started += 1;
            let layer = LayerId((self.started % u64::from(LAYERS)) as u16);
            let job = job(&mut self.random, layer, self.experts, self.now_us + DEADLINE_US);
            self.slots += job.choices.len() as u64;
            let size = HIDDEN * job.dtype.size();
            let rows =
                job.rows.chunks(size).enumerate().map(|(i, row)| (row.to_vec(), i)).collect();
            let (ticket, number, commands) = self.begin(&job);
            let (expected, arrived, answered) = (expected(&job), Vec::new(), BTreeSet::new());
            let running = Running { ticket, number, job, expected, rows, arrived, answered };
            self.running.push(running);
            self.carry_out(commands)?;
        }
        Ok(())
    }

    /// Numbers exchanges as they do it themselves, in the order in which they are started.
    fn begin(&mut self, job: &Job) -> (Ticket, u64, Vec<Command>) {
        if self.bug == Some(Bug::BudgetForgotten) {
            // Rows that nobody can compute are sent nowhere, and earn as many hedges.
            let mut nowhere = self.view.clone();
            nowhere.nodes.values_mut().for_each(|node| node.linked = None);
            for _ in 0..ROWS_PER_HEDGED_ROW {
                let (ticket, _) = self.exchanges.start(job.clone(), &nowhere, self.now_us);
                self.exchanges.take(ticket);
                self.begun += 1;
            }
        }
        let (ticket, commands) = self.exchanges.start(job.clone(), &self.view, self.now_us);
        self.begun += 1;
        (ticket, self.begun, commands)
    }

    /// All over again.
    fn begin_again(&mut self) -> Checked {
        for mut running in std::mem::take(&mut self.running) {
            let (ticket, number, commands) = self.begin(&running.job);
            self.exchanges.take(std::mem::replace(&mut running.ticket, ticket));
            running.number = number;
            self.running.push(running);
            self.carry_out(commands)?;
        }
        Ok(())
    }

    /// Puts frames on their links.
    fn carry_out(&mut self, commands: Vec<Command>) -> Checked {
        for Command::Send { node, frame, .. } in commands {
            self.trace((node.0, frame.exchange.0, frame.assignments.len()));
            self.sent_slots += frame.assignments.len() as u64;
            if self.view.nodes[&node].member.region != self.view.home {
                return Err(format!("a frame left for node {node}, which is abroad"));
            }
            self.check_unanswered(&frame)?;
            self.sent.insert(frame.exchange, (node, frame.clone()));
            if !self.is_calm && self.random.one_in(60) {
                self.lost_slots += frame.assignments.len() as u64;
                let commands = self.exchanges.on_not_sent(&self.view, frame.exchange, self.now_us);
                self.carry_out(commands)?;
                continue;
            }
            let link = self.nodes[&node].link;
            self.post(200, Mail::Frame { node, link, frame });
        }
        Ok(())
    }

    /// What is answered is not asked again.
    fn check_unanswered(&self, frame: &Dispatch) -> Checked {
        let number = Exchange::number_of(frame.exchange);
        for running in self.running.iter().filter(|r| r.number == number) {
            if running.slots_of(frame).iter().any(|slot| running.answered.contains(slot)) {
                return Err("a row was sent again that is answered".to_owned());
            }
        }
        Ok(())
    }

    /// A node takes a frame and answers after a while, and so may what it was before.
    fn at_node(&mut self, id: NodeId, link: u64, frame: &Dispatch) {
        let Some(node) = self.nodes.get(&id).filter(|node| node.link == link) else { return };
        let answer = node.answer(&mut self.random, frame, !self.is_calm);
        let late = node.answer_of_zombie(frame);
        let busy_us = node.pace_us + node.hangs_until_us.saturating_sub(self.now_us);
        let jitter_us = self.random.below(400);
        let at_us = self.now_us + busy_us + jitter_us;
        if let Some(answer) = late {
            self.report.stale += 1;
            self.post(2 * busy_us, Mail::Answer { node: id, link, answer });
        }
        if !self.is_calm && self.random.one_in(20) {
            self.report.repeated += 1;
            let again_us = at_us + self.random.below(20_000);
            let mail = Mail::Answer { node: id, link, answer: answer.clone() };
            self.post_at(again_us, mail);
        }
        self.post_at(at_us, Mail::Answer { node: id, link, answer });
    }

    fn answered(&mut self, node: NodeId, link: u64, answer: Answer) -> Checked {
        if self.nodes[&node].link != link {
            return Ok(());
        }
        self.trace((node.0, answer.exchange.0, answer.result.is_ok()));
        let live = |frame: &&Dispatch| {
            self.running.iter().any(|r| r.number == Exchange::number_of(frame.exchange))
        };
        let of_node = self.sent.values().filter(|(to, _)| *to == node).map(|(_, frame)| frame);
        let open: Vec<&Dispatch> = of_node.filter(live).collect();
        let answer = bugs::seen(self.bug, answer, &open);
        self.note(node, &answer);
        let commands = self.exchanges.on_answer(&self.view, node, answer, self.now_us);
        self.carry_out(commands)
    }

    /// Keeps by itself what has arrived, to compare.
    fn note(&mut self, node: NodeId, answer: &Answer) {
        let Some((to, frame)) = self.sent.get(&answer.exchange) else { return };
        let fits = *to == node && answer.fence == Some(frame.fence);
        let number = Exchange::number_of(answer.exchange);
        let Some(running) = self.running.iter_mut().find(|r| r.number == number).filter(|_| fits)
        else {
            return;
        };
        let slots = running.slots_of(frame);
        match &answer.result {
            Ok(rows) if rows.len() == frame.answer_len() => {
                let size = HIDDEN * running.job.dtype.size();
                for (i, slot) in slots.into_iter().enumerate() {
                    running.arrived.push((slot, rows.slice(i * size..(i + 1) * size)));
                    running.answered.insert(slot);
                }
            }
            _ => self.lost_slots += slots.len() as u64,
        }
    }

    /// Compares what is done with what it must be.
    fn finish(&mut self) -> Checked {
        let mut i = 0;
        while i < self.running.len() {
            match self.exchanges.status(&self.running[i].ticket) {
                Some(Status::Done) => {}
                Some(Status::Failed(failure)) => return Err(format!("failed: {failure}")),
                _ => {
                    i += 1;
                    continue;
                }
            }
            let running = self.running.remove(i);
            let exchange = self.exchanges.take(running.ticket).ok_or("the exchange is gone")?;
            let parts = exchange.parts().into_iter().map(|(_, row)| row).enumerate().collect();
            let added = bugs::added(self.bug, parts, &running.arrived);
            if sum(&running.job, &added) != running.expected {
                return Err("a sum has other bits".to_owned());
            }
            self.report.exchanges += 1;
            while self.sent.len() > OPEN_MAX {
                self.sent.pop_first();
            }
        }
        Ok(())
    }

    /// No row was sent but once, in place of one that was lost, or as a hedge; and where nothing
    /// was overdue, hedges kept to their budget.
    fn check_work(&mut self) -> Checked {
        let work = self.exchanges.take_work();
        (self.report.retried, self.report.hedged) = (work.retried, work.hedged);
        let Self { slots, sent_slots, lost_slots, .. } = *self;
        if sent_slots > slots + work.retried + work.hedged || work.retried > lost_slots {
            return Err(format!(
                "{sent_slots} sent for {slots}, with {lost_slots} lost and {} hedged",
                work.hedged
            ));
        }
        if self.is_calm && work.hedged * ROWS_PER_HEDGED_ROW > slots {
            return Err(format!("{} of {slots} were hedged", work.hedged));
        }
        Ok(())
    }
}

/// What goes wrong.
impl World {
    fn trouble(&mut self) -> Checked {
        self.post(12_000, Mail::Trouble);
        let ids: Vec<NodeId> = self.nodes.keys().copied().collect();
        let id = ids[self.random.below(ids.len() as u64) as usize];
        let kind = self.random.below(6);
        self.trace((id.0, kind));
        match kind {
            0 | 1 => self.link_down(id, false),
            2 => self.link_down(id, true),
            3 => {
                let until_us = self.now_us + self.random.below(60_000);
                let node = self.nodes.get_mut(&id).ok_or("a node is gone")?;
                node.hangs_until_us = until_us;
                Ok(())
            }
            4 => {
                let node = self.nodes.get_mut(&id).ok_or("a node is gone")?;
                node.is_draining = true;
                // It stops once it is empty, and comes back.
                self.link_down_later(id)
            }
            _ => {
                self.view.placement_epoch.0 += 1;
                let commands = self.exchanges.on_view_changed(&self.view, self.now_us);
                self.carry_out(commands)
            }
        }
    }

    fn link_down_later(&mut self, id: NodeId) -> Checked {
        if self.random.one_in(2) { Ok(()) } else { self.link_down(id, true) }
    }

    /// A link breaks, with all that travels on it; perhaps because the node was started again, and
    /// perhaps is what was there before still there.
    fn link_down(&mut self, id: NodeId, restarts: bool) -> Checked {
        if self.view.nodes[&id].linked.is_none() {
            return Ok(());
        }
        self.links += 1;
        self.report.links += 1;
        let is_zombie = self.random.one_in(2);
        let link = self.links;
        let node = self.nodes.get_mut(&id).ok_or("a node is gone")?;
        node.link = link;
        if restarts {
            self.incarnations += 1;
            node.zombie = is_zombie.then_some(node.incarnation);
            node.incarnation = Incarnation(self.incarnations);
            node.is_draining = false;
        }
        let lost = self.sent.values().filter(|(to, _)| *to == id).map(|(_, frame)| frame);
        self.lost_slots += lost.map(|frame| frame.assignments.len() as u64).sum::<u64>();
        self.view.node_down(id);
        self.post(30_000, Mail::LinkUp { node: id });
        let commands = self.exchanges.on_link_down(&self.view, id, self.now_us);
        self.carry_out(commands)?;
        if self.bug == Some(Bug::AllSentAgain) {
            self.begin_again()?;
        }
        Ok(())
    }

    fn link_up(&mut self, id: NodeId) -> Checked {
        let incarnation = self.nodes[&id].incarnation;
        if let Some(node) = self.view.nodes.get_mut(&id) {
            node.linked = Some(incarnation);
        }
        let commands = self.exchanges.on_view_changed(&self.view, self.now_us);
        self.carry_out(commands)
    }
}

impl Running {
    /// The slots that a frame carries: its rows are known by their content.
    fn slots_of(&self, frame: &Dispatch) -> Vec<usize> {
        let size = HIDDEN * frame.dtype.size();
        let slot = |assignment: &entente_proto::frame::Assignment| {
            let start = usize::from(assignment.row) * size;
            let row = *self.rows.get(&frame.rows[start..start + size])?;
            let choices = &self.job.choices[row * TOP_K..(row + 1) * TOP_K];
            let k = choices.iter().position(|choice| choice.expert == assignment.expert)?;
            Some(row * TOP_K + k)
        };
        frame.assignments.iter().filter_map(slot).collect()
    }
}

/// A view of live nodes of two regions; the coordinator is in the first.
fn view(random: &mut Random, count: u32, experts: u16) -> ClusterView {
    let node = |id: u32| PlacementNode {
        id: NodeId(id),
        region: if id < count { "fr" } else { "se" }.parse().unwrap(),
        memory_bytes: None,
    };
    let nodes: Vec<PlacementNode> = (0..count + 2).map(node).collect();
    let layers = (0..LAYERS).map(|layer| (LayerId(layer), experts)).collect();
    let replicas = 2 - u16::from(random.one_in(4));
    let shape = ModelShape { layers, expert_bytes: 1 };
    let placement: Placement = placement::plan(&nodes, &shape, replicas).unwrap();
    let live = |node: &PlacementNode| {
        let name = format!("{}-expert-{}", node.region, node.id).parse().unwrap();
        let member = Member {
            name,
            region: node.region,
            serves: true,
            incarnation: None,
            kernel_class: class(),
        };
        (node.id, NodeView { member, linked: Some(Incarnation(1)), kernel_class: class(), rank: 0 })
    };
    ClusterView {
        home: "fr".parse().unwrap(),
        membership_epoch: MembershipEpoch(1),
        placement_epoch: PlacementEpoch(1),
        model: Model {
            digest: ModelDigest([1; 32]),
            kernel_class: class(),
            layers: (0..LAYERS).map(|layer| (LayerId(layer), experts)).collect(),
        },
        nodes: nodes.iter().map(live).collect(),
        placement: Arc::new(placement),
    }
}

/// The kernels of everybody here.
fn class() -> KernelClass {
    KernelClass("f32/test/1".to_owned())
}

/// Random rows through random experts.
fn job(random: &mut Random, layer: LayerId, experts: u16, deadline_us: u64) -> Job {
    let rows = 4 + random.below(20) as usize;
    let dtype = if random.one_in(2) { Dtype::F32 } else { Dtype::Bf16 };
    let values: Vec<f32> = (0..rows * HIDDEN).map(|_| random.value()).collect();
    let mut bytes = Vec::new();
    dtype.encode(&values, &mut bytes);
    let mut choices = Vec::new();
    for _ in 0..rows {
        let mut pool: Vec<u16> = (0..experts).collect();
        let mut chosen: Vec<u16> = (0..TOP_K)
            .map(|_| pool.swap_remove(random.below(pool.len() as u64) as usize))
            .collect();
        chosen.sort_unstable();
        let choice = |expert| Choice { expert: ExpertId(expert), weight: random.value() };
        choices.extend(chosen.into_iter().map(choice));
    }
    let regions =
        |codes: &[&str]| -> RegionSet { codes.iter().map(|c| c.parse().unwrap()).collect() };
    Job {
        layer,
        hidden: HIDDEN,
        dtype,
        rows: bytes.into(),
        choices,
        top_k: TOP_K,
        owners: Arc::new(Owners {
            policies: vec![regions(&["fr"]), regions(&["fr", "se"])],
            owners: vec![(RequestId(10), 0), (RequestId(11), 1)],
        }),
        owner_of_row: (0..rows).map(|_| random.below(2) as u16).collect(),
        deadline_us,
        stranded_max_us: deadline_us,
    }
}

/// The sums, computed without nodes, frames or retries.
fn expected(job: &Job) -> Vec<u32> {
    let size = HIDDEN * job.dtype.size();
    let out = |(slot, choice): (usize, &Choice)| {
        let row = &job.rows[slot / TOP_K * size..(slot / TOP_K + 1) * size];
        output(job.dtype, job.layer, choice.expert, HIDDEN, row)
    };
    let outputs: Vec<Vec<u8>> = job.choices.iter().enumerate().map(out).collect();
    let parts: Vec<(usize, &[u8])> = outputs.iter().map(|row| &row[..]).enumerate().collect();
    sum(job, &parts)
}

/// `weight * output`, added one by one in the order given.
fn sum(job: &Job, parts: &[(usize, &[u8])]) -> Vec<u32> {
    let mut sums = vec![0.0_f32; job.owner_of_row.len() * HIDDEN];
    let mut values = [0.0; HIDDEN];
    for (slot, row) in parts {
        job.dtype.decode(row, &mut values);
        let weight = job.choices[*slot].weight;
        for (sum, value) in sums[slot / TOP_K * HIDDEN..].iter_mut().zip(&values) {
            *sum += weight * value;
        }
    }
    sums.iter().map(|sum| sum.to_bits()).collect()
}
