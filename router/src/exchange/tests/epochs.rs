//! Epochs that move and starts that end while frames are out.

use super::storm::Storm;
use super::*;
use crate::view::Committed;

/// What a node that has seen later commits says.
pub(super) fn ahead(fence: Fence, by: u64) -> Fence {
    Fence {
        membership_epoch: MembershipEpoch(fence.membership_epoch.0 + by),
        placement_epoch: PlacementEpoch(fence.placement_epoch.0 + by),
        ..fence
    }
}

/// What the cluster has committed, as the view has it.
fn committed(view: &ClusterView) -> Committed {
    let member = |(id, node): (&NodeId, &NodeView)| (*id, node.member.clone());
    Committed {
        membership_epoch: view.membership_epoch,
        placement_epoch: view.placement_epoch,
        members: view.nodes.iter().map(member).collect(),
        placement: view.placement.clone(),
    }
}

/// Commits that a node takes traffic, or no more.
fn set_serving(view: &mut ClusterView, id: NodeId, serves: bool) {
    let mut committed = committed(view);
    committed.membership_epoch.0 += 1;
    committed.members.get_mut(&id).unwrap().serves = serves;
    assert!(view.follow(committed));
}

/// Commits a placement.
fn place(view: &mut ClusterView, placement: Placement) {
    let mut committed = committed(view);
    committed.placement_epoch.0 += 1;
    committed.placement = Arc::new(placement);
    assert!(view.follow(committed));
}

impl Storm {
    /// The cluster commits something: a node is taken out or back in, or experts are placed anew.
    pub(super) fn commit(&mut self) {
        let home: Vec<NodeId> = self.view.nodes.keys().copied().filter(|id| id.0 < 100).collect();
        if self.random.one_in(2) {
            let id = home[self.random.place(home.len())];
            let serves = self.view.nodes[&id].member.serves;
            set_serving(&mut self.view, id, !serves);
        } else {
            let mut placement = Placement::new();
            for (expert, _) in self.view.placement.clone().iter() {
                for _ in 0..1 + self.random.place(3) {
                    placement.add(expert, home[self.random.place(home.len())]);
                }
            }
            place(&mut self.view, placement);
        }
        self.tell();
    }

    pub(super) fn serve_all(&mut self) {
        let nodes: Vec<NodeId> = self.view.nodes.keys().copied().collect();
        nodes.into_iter().for_each(|id| set_serving(&mut self.view, id, true));
        self.tell();
    }

    fn tell(&mut self) {
        let commands = self.exchange.on_view_changed(&self.view, &mut self.pace, self.now_us);
        self.send(commands);
    }
}

/// An exchange of four rows on two nodes that hold everything, or on one.
fn start(nodes: u32) -> (ClusterView, Exchange, Vec<(NodeId, Dispatch)>) {
    let view = view(nodes, 0, 4, nodes as u16);
    let mut job = job(&mut Random(21), 4, 4, 2, Dtype::F32);
    job.owner_of_row.fill(0);
    let (exchange, commands) =
        Exchange::start(job, &view, &mut Pace::new(), &mut ExchangeIds::new(), 0);
    (view, exchange, sends(commands))
}

fn answer(
    exchange: &mut Exchange,
    view: &ClusterView,
    (node, answer): (NodeId, Answer),
) -> Vec<(NodeId, Dispatch)> {
    sends(exchange.on_answer(view, &mut Pace::new(), node, answer, 10))
}

#[test]
fn an_answer_of_a_node_whose_epochs_are_ahead_counts() {
    let (view, mut exchange, frames) = start(1);
    let expected = expected(&exchange.job);
    for (node, frame) in frames {
        let mut ahead_of_us = compute(&frame);
        ahead_of_us.fence = Some(ahead(frame.fence, 1));
        answer(&mut exchange, &view, (node, ahead_of_us));
    }
    assert_eq!(combined(&exchange), expected);
}

#[test]
fn a_node_that_refused_for_its_epoch_is_asked_again_once_the_view_has_moved_on() {
    let refusals = [
        |have: Fence| Refusal::StaleFence(Box::new(ahead(have, 2))),
        |_| Refusal::NotHeld("1 of 2 assignments".to_owned()),
    ];
    for refusal in refusals {
        let (mut view, mut exchange, mut frames) = start(1);
        let expected = expected(&exchange.job);
        let (node, frame) = frames.remove(0);
        let refused = refuse(&frame, refusal(frame.fence));
        assert_eq!(answer(&mut exchange, &view, (node, refused)), []);
        assert_eq!(exchange.on_tick(&view, &mut Pace::new(), 1_000), [], "nobody else is there");

        let placement = (*view.placement).clone();
        place(&mut view, placement);
        let again = sends(exchange.on_view_changed(&view, &mut Pace::new(), 2_000));
        assert_eq!(again[0].1.fence, view.fence(node).unwrap());
        assert_ne!(again[0].1.fence, frame.fence);
        answer(&mut exchange, &view, (node, compute(&again[0].1)));
        assert_eq!(combined(&exchange), expected);
    }
}

#[test]
fn what_is_not_held_here_is_asked_of_the_other_replica_at_once() {
    let (view, mut exchange, frames) = start(2);
    let expected = expected(&exchange.job);
    let mut again = Vec::new();
    for (node, frame) in frames {
        let lacks = refuse(&frame, Refusal::NotHeld("all".to_owned()));
        let reply = if node == NodeId(0) { lacks } else { compute(&frame) };
        again.extend(answer(&mut exchange, &view, (node, reply)));
    }
    assert!(!again.is_empty());
    for (node, frame) in again {
        assert_eq!(node, NodeId(1));
        answer(&mut exchange, &view, (node, compute(&frame)));
    }
    assert_eq!(combined(&exchange), expected);
}

#[test]
fn a_node_that_says_it_was_started_anew_is_not_waited_for() {
    let (view, mut exchange, frames) = start(2);
    let (node, frame) = frames.into_iter().find(|(node, _)| *node == NodeId(0)).unwrap();
    let mut now = frame.fence;
    now.incarnation.0 += 1;
    let fence = Some(now);
    let refusal = Answer { fence, ..refuse(&frame, Refusal::StaleFence(Box::new(now))) };
    let again = answer(&mut exchange, &view, (node, refusal));
    assert!(!again.is_empty() && again.iter().all(|(node, _)| *node == NodeId(1)));
}

#[test]
fn what_is_owed_by_a_node_that_the_cluster_counts_on_no_more_is_asked_of_others_at_once() {
    let (mut view, mut exchange, frames) = start(2);
    let expected = expected(&exchange.job);
    let (lost, kept): (Vec<_>, Vec<_>) =
        frames.into_iter().partition(|(node, _)| *node == NodeId(0));
    set_serving(&mut view, NodeId(0), false);
    let again = sends(exchange.on_view_changed(&view, &mut Pace::new(), 5));
    assert!(!again.is_empty());
    let before = format!("{exchange:?}");
    for (node, frame) in lost {
        answer(&mut exchange, &view, (node, compute(&frame)));
    }
    assert_eq!(format!("{exchange:?}"), before, "an answer of a node that is out left a trace");
    for (node, frame) in kept.into_iter().chain(again) {
        assert_eq!(node, NodeId(1));
        answer(&mut exchange, &view, (node, compute(&frame)));
    }
    assert_eq!(combined(&exchange), expected);
}

#[test]
fn a_replica_that_only_rests_does_not_strand_the_exchange() {
    let (view, mut exchange, mut frames) = start(1);
    let mut pace = Pace::new();
    let mut now_us = 0;
    loop {
        for (node, frame) in std::mem::take(&mut frames) {
            let busy = refuse(&frame, Refusal::Busy);
            frames.extend(sends(exchange.on_answer(&view, &mut pace, node, busy, now_us)));
        }
        let Status::Waiting { until_us } = exchange.status() else { break };
        now_us = until_us;
        frames.extend(sends(exchange.on_tick(&view, &mut pace, now_us)));
    }
    assert_eq!(now_us, DEADLINE_US);
    let failure = Failure::NotTaken { layer: LAYER, last: "a node was busy" };
    assert_eq!(exchange.status(), Status::Failed(failure));
}
