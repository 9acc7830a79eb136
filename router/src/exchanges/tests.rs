//! Two exchanges in flight, with answers in any order, lost links and retries.

use entente_proto::frame::{Dispatch, Dtype, Refusal};
use entente_proto::ids::Incarnation;
use entente_sim::Random;

use super::*;
use crate::exchange::Failure;
use crate::exchange::tests::{
    DEADLINE_US, LAYER, combined, compute, expected, job, refuse, sends, view,
};

/// Two exchanges among a few nodes, and what is on its way.
struct Two {
    random: Random,
    view: ClusterView,
    exchanges: Exchanges,
    tickets: [Ticket; 2],
    expected: [Vec<u32>; 2],
    travelling: Vec<(NodeId, Dispatch)>,
    now_us: u64,
}

impl Two {
    fn start(seed: u64, nodes: u32, replicas: u16) -> Self {
        let mut random = Random(seed);
        let view = view(nodes, 0, 8, replicas);
        let mut exchanges = Exchanges::new();
        let mut travelling = Vec::new();
        let started = [9, 8].map(|rows| {
            let mut job = job(&mut random, rows, 8, 2, Dtype::Bf16);
            job.owner_of_row.fill(0);
            let expected = expected(&job);
            let (ticket, commands) = exchanges.start(job, &view, 0);
            travelling.extend(sends(commands));
            (ticket, expected)
        });
        let [(first, first_sum), (second, second_sum)] = started;
        let (tickets, expected) = ([first, second], [first_sum, second_sum]);
        Self { random, view, exchanges, tickets, expected, travelling, now_us: 0 }
    }

    fn statuses(&self) -> [Status; 2] {
        [0, 1].map(|which| self.exchanges.status(&self.tickets[which]).unwrap())
    }

    /// The frames of one of the two that are on their way.
    fn frames_of(&self, which: usize) -> Vec<(NodeId, Dispatch)> {
        let of = |frame: &Dispatch| Exchange::number_of(frame.exchange) == self.tickets[which].0;
        self.travelling.iter().filter(|(_, frame)| of(frame)).cloned().collect()
    }

    fn answer(&mut self, node: NodeId, answer: Answer) {
        let commands = self.exchanges.on_answer(&self.view, node, answer, self.now_us);
        self.travelling.extend(sends(commands));
    }

    /// Some frame, of either exchange, is answered, refused or lost with its link.
    fn event(&mut self) {
        if self.travelling.is_empty() {
            self.now_us = self.exchanges.wake_us().unwrap();
            let commands = self.exchanges.on_tick(&self.view, self.now_us);
            return self.travelling.extend(sends(commands));
        }
        let at = self.random.place(self.travelling.len());
        let (node, frame) = self.travelling.swap_remove(at);
        match self.random.place(6) {
            0 => self.restart(node),
            1 => self.answer(node, refuse(&frame, Refusal::Busy)),
            2 => {
                let id = frame.exchange;
                let commands = self.exchanges.on_not_sent(&self.view, id, self.now_us);
                self.travelling.extend(sends(commands));
            }
            _ => self.answer(node, compute(&frame)),
        }
    }

    /// The node dies with whatever is out to it, and comes back.
    fn restart(&mut self, node: NodeId) {
        self.travelling.retain(|(to, _)| *to != node);
        let was = self.view.fence(node).unwrap().incarnation;
        self.view.node_down(node);
        let commands = self.exchanges.on_link_down(&self.view, node, self.now_us);
        self.travelling.extend(sends(commands));
        self.view.nodes.get_mut(&node).unwrap().linked = Some(Incarnation(was.0 + 1));
        let commands = self.exchanges.on_view_changed(&self.view, self.now_us);
        self.travelling.extend(sends(commands));
    }

    /// Both sums are what they are without nodes, frames and company.
    fn check(mut self, seed: u64) {
        for (ticket, expected) in self.tickets.into_iter().zip(self.expected) {
            let exchange = self.exchanges.take(ticket).unwrap();
            assert_eq!(combined(&exchange), expected, "seed {seed}");
        }
        assert!(self.exchanges.is_empty());
    }
}

#[test]
fn two_exchanges_end_with_their_own_sums_however_their_events_interleave() {
    for seed in 0..1_000 {
        let mut two = Two::start(seed, 3, 2);
        let mut events = 0;
        while two.statuses() != [Status::Done, Status::Done] {
            two.event();
            events += 1;
            assert!(events < 1_000, "seed {seed}: no progress");
        }
        two.check(seed);
    }
}

#[test]
fn a_link_that_dies_with_both_out_is_retried_by_both() {
    let mut two = Two::start(1, 2, 2);
    let dead = NodeId(1);
    let lost: Vec<usize> = [0, 1]
        .map(|which| two.frames_of(which).iter().filter(|(node, _)| *node == dead).count())
        .into();
    assert_eq!(lost, [1, 1], "both have a frame at the node that dies");
    two.travelling.retain(|(node, _)| *node != dead);
    two.view.node_down(dead);
    let again = sends(two.exchanges.on_link_down(&two.view, dead, 10));
    let numbers: Vec<u64> =
        again.iter().map(|(_, frame)| Exchange::number_of(frame.exchange)).collect();
    assert_eq!(numbers, [two.tickets[0].0, two.tickets[1].0]);
    for (node, frame) in again.into_iter().chain(std::mem::take(&mut two.travelling)) {
        assert_ne!(node, dead);
        two.answer(node, compute(&frame));
    }
    two.check(1);
}

#[test]
fn one_completes_while_the_other_retries() {
    let mut two = Two::start(2, 1, 1);
    let (node, busy) = two.frames_of(0).remove(0);
    let (_, good) = two.frames_of(1).remove(0);
    two.answer(node, refuse(&busy, Refusal::Busy));
    two.answer(node, compute(&good));
    let [Status::Waiting { until_us }, Status::Done] = two.statuses() else {
        panic!("{:?}", two.statuses())
    };
    assert_eq!(two.exchanges.wake_us(), Some(until_us));
    let again = sends(two.exchanges.on_tick(&two.view, until_us));
    assert_eq!(again.len(), 1, "only the one that was refused is sent again");
    two.answer(node, compute(&again[0].1));
    two.check(2);
}

#[test]
fn answers_to_what_was_given_up_find_nobody() {
    let mut two = Two::start(3, 2, 1);
    let late = two.travelling.clone();
    two.exchanges.clear();
    assert_eq!(two.exchanges.status(&two.tickets[0]), None);
    let mut random = Random(4);
    let mut next = job(&mut random, 3, 8, 2, Dtype::Bf16);
    next.owner_of_row.fill(0);
    let (ticket, commands) = two.exchanges.start(next, &two.view, 0);
    let before = format!("{:?}", two.exchanges.in_flight);
    for (node, frame) in &late {
        assert_eq!(two.exchanges.on_answer(&two.view, *node, compute(frame), 5), []);
    }
    assert_eq!(format!("{:?}", two.exchanges.in_flight), before, "a late answer left a trace");
    for (node, frame) in sends(commands) {
        two.answer(node, compute(&frame));
    }
    assert_eq!(two.exchanges.status(&ticket), Some(Status::Done));
}

#[test]
fn each_fails_at_its_own_deadline() {
    let view = view(1, 0, 8, 1);
    let mut exchanges = Exchanges::new();
    let mut random = Random(5);
    let [early, late] = [DEADLINE_US, 2 * DEADLINE_US].map(|deadline_us| {
        let job = job(&mut random, 2, 8, 2, Dtype::F32);
        let job = Job { deadline_us, owner_of_row: vec![0; 2], ..job };
        exchanges.start(job, &view, 0).0
    });
    assert_eq!(exchanges.wake_us(), Some(DEADLINE_US));
    exchanges.on_tick(&view, DEADLINE_US);
    let owing = Failure::Deadline { layer: LAYER, node: NodeId(0) };
    assert_eq!(exchanges.status(&early), Some(Status::Failed(owing)));
    assert_eq!(exchanges.wake_us(), Some(2 * DEADLINE_US));
    assert!(matches!(exchanges.status(&late), Some(Status::Waiting { .. })));
}
