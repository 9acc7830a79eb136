//! The exchange against simulated nodes that are slow, busy, broken, restarted and lying.

mod classes;
mod epochs;
mod hedging;
mod storm;

use std::collections::BTreeSet;
use std::sync::Arc;

use entente_proto::ids::{
    ExpertId, Incarnation, KernelClass, MembershipEpoch, ModelDigest, PlacementEpoch, Region,
};
use entente_proto::placement::{ModelShape, Placement, PlacementNode};
use entente_sim::Random;

use super::*;
use crate::placement;
use crate::view::{Member, Model, NodeView};

pub(crate) const LAYER: LayerId = LayerId(2);
pub(crate) const DEADLINE_US: u64 = 1_000_000;
pub(crate) const STRANDED_MAX_US: u64 = 200_000;

pub(crate) fn region(code: &str) -> Region {
    code.parse().unwrap()
}

/// The kernels of everybody here.
fn class() -> KernelClass {
    KernelClass("f32/test/1".to_owned())
}

/// A view of live nodes `0..fr` in fr (home) and `100..100 + se` in se.
pub(crate) fn view(fr: u32, se: u32, experts: u16, replicas: u16) -> ClusterView {
    let nodes: Vec<PlacementNode> = (0..fr)
        .map(|id| (id, "fr"))
        .chain((100..100 + se).map(|id| (id, "se")))
        .map(|(id, code)| PlacementNode {
            id: NodeId(id),
            region: region(code),
            memory_bytes: None,
        })
        .collect();
    let shape = ModelShape { layers: vec![(LAYER, experts)], expert_bytes: 1 };
    let placement = placement::plan(&nodes, &shape, replicas).unwrap();
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
        home: region("fr"),
        model: Model {
            digest: ModelDigest([1; 32]),
            kernel_class: class(),
            layers: [(LAYER, experts)].into(),
        },
        membership_epoch: MembershipEpoch(1),
        placement_epoch: PlacementEpoch(1),
        nodes: nodes.iter().map(live).collect(),
        placement: Arc::new(placement),
    }
}

/// A job of random rows through random experts.
pub(crate) fn job(
    random: &mut Random,
    rows: usize,
    experts: usize,
    top_k: usize,
    dtype: Dtype,
) -> Job {
    let hidden = 3;
    let values: Vec<f32> = (0..rows * hidden).map(|_| random.value()).collect();
    let mut bytes = Vec::new();
    dtype.encode(&values, &mut bytes);
    let mut choices = Vec::new();
    for _ in 0..rows {
        let mut pool: Vec<usize> = (0..experts).collect();
        let mut chosen: Vec<usize> =
            (0..top_k).map(|_| pool.swap_remove(random.place(pool.len()))).collect();
        chosen.sort_unstable();
        choices.extend(
            chosen
                .into_iter()
                .map(|expert| Choice { expert: ExpertId(expert as u16), weight: random.value() }),
        );
    }
    Job {
        layer: LAYER,
        hidden,
        dtype,
        rows: bytes.into(),
        choices,
        top_k,
        owners: Arc::new(Owners {
            policies: vec![[region("fr")].into(), [region("fr"), region("se")].into()],
            owners: vec![(RequestId(10), 0), (RequestId(11), 1)],
        }),
        owner_of_row: (0..rows).map(|_| random.place(2) as u16).collect(),
        stranded_max_us: STRANDED_MAX_US,
        deadline_us: DEADLINE_US,
    }
}

/// What the simulated experts compute: any function will do that tells experts and rows apart.
fn expert(id: ExpertId, row: &[f32]) -> Vec<f32> {
    let factor = 1.0 + f32::from(id.0);
    row.iter().enumerate().map(|(i, x)| (x * factor).sin() * factor + i as f32).collect()
}

/// The answer of a healthy node.
pub(crate) fn compute(frame: &Dispatch) -> Answer {
    let size = frame.hidden * frame.dtype.size();
    let mut row = vec![0.0; frame.hidden];
    let mut rows = Vec::new();
    for assignment in &frame.assignments {
        let start = usize::from(assignment.row) * size;
        frame.dtype.decode(&frame.rows[start..start + size], &mut row);
        frame.dtype.encode(&expert(assignment.expert, &row), &mut rows);
    }
    Answer { exchange: frame.exchange, fence: Some(frame.fence), result: Ok(rows.into()) }
}

pub(crate) fn refuse(frame: &Dispatch, refusal: Refusal) -> Answer {
    Answer { exchange: frame.exchange, fence: Some(frame.fence), result: Err(refusal) }
}

/// The sums, computed without nodes, frames or retries.
pub(crate) fn expected(job: &Job) -> Vec<u32> {
    let rows = job.owner_of_row.len();
    let mut values = vec![0.0; rows * job.hidden];
    job.dtype.decode(&job.rows, &mut values);
    let mut sums = vec![0.0_f32; rows * job.hidden];
    for (i, choice) in job.choices.iter().enumerate() {
        let at = i / job.top_k * job.hidden;
        let mut encoded = Vec::new();
        job.dtype.encode(&expert(choice.expert, &values[at..at + job.hidden]), &mut encoded);
        let mut output = vec![0.0; job.hidden];
        job.dtype.decode(&encoded, &mut output);
        for (sum, value) in sums[at..].iter_mut().zip(&output) {
            *sum += choice.weight * value;
        }
    }
    sums.iter().map(|v| v.to_bits()).collect()
}

pub(crate) fn combined(exchange: &Exchange) -> Vec<u32> {
    let (hidden, top_k) = (exchange.job.hidden, exchange.job.top_k);
    let mut sums = vec![0.0_f32; exchange.job.owner_of_row.len() * hidden];
    let mut output = vec![0.0; hidden];
    for (i, (weight, row)) in exchange.parts().into_iter().enumerate() {
        exchange.job.dtype.decode(row, &mut output);
        for (sum, value) in sums[i / top_k * hidden..].iter_mut().zip(&output) {
            *sum += weight * value;
        }
    }
    sums.iter().map(|v| v.to_bits()).collect()
}

pub(crate) fn sends(commands: Vec<Command>) -> Vec<(NodeId, Dispatch)> {
    commands.into_iter().map(|Command::Send { node, frame, .. }| (node, frame)).collect()
}

/// Lets every node answer in `time_us`, so that there is a p95.
fn warm(pace: &mut Pace, view: &ClusterView, time_us: u64) {
    for node in view.nodes.keys() {
        for id in 0..64 {
            let exchange = ExchangeId(id);
            pace.on_sent(exchange, (*node, 0), 8, 0);
            pace.on_answer(
                *node,
                &Answer { exchange, fence: None, result: Ok(Bytes::new()) },
                time_us,
            );
        }
    }
}

#[test]
fn a_row_goes_to_a_node_once_and_work_is_even() {
    let mut random = Random(1);
    let view = view(2, 0, 8, 2);
    let mut job = job(&mut random, 32, 8, 4, Dtype::F32);
    job.owner_of_row.fill(0);
    let (_, commands) = Exchange::start(job, &view, &mut Pace::new(), &mut ExchangeIds::new(), 0);
    let frames = sends(commands);
    assert_eq!(frames.len(), 2);
    for (_, frame) in frames {
        assert_eq!((frame.row_count(), frame.assignments.len()), (32, 64));
    }
}

#[test]
fn only_what_a_lost_node_owes_is_sent_again() {
    let mut random = Random(2);
    let mut view = view(3, 0, 8, 2);
    let job = job(&mut random, 16, 8, 2, Dtype::Bf16);
    let expected = expected(&job);
    let (mut exchange, commands) =
        Exchange::start(job, &view, &mut Pace::new(), &mut ExchangeIds::new(), 0);
    let (lost, kept): (Vec<_>, Vec<_>) =
        sends(commands).into_iter().partition(|(node, _)| *node == NodeId(1));
    view.node_down(NodeId(1));
    let again = sends(exchange.on_link_down(&view, &mut Pace::new(), NodeId(1), 10));
    let slots = |frames: &[(NodeId, Dispatch)]| -> usize {
        frames.iter().map(|(_, frame)| frame.assignments.len()).sum()
    };
    assert_eq!(slots(&again), slots(&lost));
    for (node, frame) in kept.into_iter().chain(again) {
        assert_ne!(node, NodeId(1));
        exchange.on_answer(&view, &mut Pace::new(), node, compute(&frame), 20);
    }
    assert_eq!(combined(&exchange), expected);
}

#[test]
fn a_busy_node_is_asked_again_after_a_pause_when_nobody_else_can() {
    let mut random = Random(3);
    let view = view(1, 0, 4, 1);
    let mut job = job(&mut random, 1, 4, 2, Dtype::F32);
    job.owner_of_row.fill(0);
    let (mut exchange, commands) =
        Exchange::start(job, &view, &mut Pace::new(), &mut ExchangeIds::new(), 0);
    let (node, frame) = sends(commands).remove(0);
    assert_eq!(
        exchange.on_answer(&view, &mut Pace::new(), node, refuse(&frame, Refusal::Busy), 100),
        []
    );
    let Status::Waiting { until_us } = exchange.status() else { panic!("must wait") };
    assert_eq!(exchange.on_tick(&view, &mut Pace::new(), until_us - 1), []);
    let again = sends(exchange.on_tick(&view, &mut Pace::new(), until_us));
    assert_eq!(again[0].1.rows, frame.rows, "a retry sends the same bytes");
}

#[test]
fn without_a_replica_the_exchange_waits_for_one_and_then_fails_without_naming_experts() {
    let mut random = Random(4);
    let mut view = view(1, 1, 4, 1);
    view.node_down(NodeId(0));
    let job = job(&mut random, 4, 4, 2, Dtype::F32);
    let (mut exchange, commands) =
        Exchange::start(job, &view, &mut Pace::new(), &mut ExchangeIds::new(), 0);
    assert_eq!(commands, [], "the nodes of the other region are not asked");
    assert_eq!(exchange.status(), Status::Waiting { until_us: STRANDED_MAX_US });
    view.nodes.get_mut(&NodeId(0)).unwrap().linked = Some(Incarnation(1));
    assert_ne!(exchange.on_view_changed(&view, &mut Pace::new(), 10), []);
    view.node_down(NodeId(0));
    exchange.on_link_down(&view, &mut Pace::new(), NodeId(0), 20);
    exchange.on_tick(&view, &mut Pace::new(), 19 + STRANDED_MAX_US);
    assert_eq!(exchange.status(), Status::Waiting { until_us: 20 + STRANDED_MAX_US });
    exchange.on_tick(&view, &mut Pace::new(), 20 + STRANDED_MAX_US);
    let Status::Failed(failure) = exchange.status() else { panic!("must fail") };
    assert_eq!(
        failure.to_string(),
        "layer 2: no permitted replica is left for some rows (last: a link broke)"
    );
}

#[test]
fn a_silent_node_fails_the_exchange_at_the_deadline_only() {
    let view = view(1, 0, 4, 1);
    let job = job(&mut Random(5), 4, 4, 2, Dtype::F32);
    let (mut exchange, _) =
        Exchange::start(job, &view, &mut Pace::new(), &mut ExchangeIds::new(), 0);
    exchange.on_tick(&view, &mut Pace::new(), DEADLINE_US - 1);
    assert_eq!(exchange.status(), Status::Waiting { until_us: DEADLINE_US });
    exchange.on_tick(&view, &mut Pace::new(), DEADLINE_US);
    let owing = Failure::Deadline { layer: LAYER, node: NodeId(0) };
    assert_eq!(exchange.status(), Status::Failed(owing));
}

#[test]
fn rows_that_may_not_stay_at_home_are_refused_before_anything_is_sent() {
    let view = view(1, 1, 4, 1);
    let mut job = job(&mut Random(6), 4, 4, 2, Dtype::F32);
    Arc::make_mut(&mut job.owners).policies[1] = [region("se")].into();
    let (exchange, commands) =
        Exchange::start(job, &view, &mut Pace::new(), &mut ExchangeIds::new(), 0);
    assert_eq!(commands, []);
    let failure = Failure::NotPermitted { layer: LAYER, home: region("fr") };
    assert_eq!(exchange.status(), Status::Failed(failure));
}

#[test]
fn an_exchange_too_big_for_one_frame_is_split() {
    use entente_proto::frame::{HIDDEN_MAX, ROWS_MAX};
    let view = view(1, 0, 4, 1);
    let mut random = Random(7);
    let mut many = job(&mut random, ROWS_MAX + 1, 4, 2, Dtype::Bf16);
    many.owner_of_row.fill(0);
    let mut wide = job(&mut random, 130, 4, 2, Dtype::F32);
    wide.owner_of_row.fill(0);
    wide.hidden = HIDDEN_MAX;
    wide.rows = vec![0; 130 * HIDDEN_MAX * 4].into();
    // 256 KiB a row: 128 rows of answer fit into a frame, 260 are to come.
    for (job, frames) in [(many, 2), (wide, 3)] {
        let expected = expected(&job);
        let (mut exchange, commands) =
            Exchange::start(job, &view, &mut Pace::new(), &mut ExchangeIds::new(), 0);
        let sent = sends(commands);
        assert_eq!(sent.len(), frames);
        for (node, frame) in sent {
            let wire = entente_proto::wire::Dispatch::from(frame.clone());
            assert!(Dispatch::try_from(wire).as_ref() == Ok(&frame), "out of bounds");
            exchange.on_answer(&view, &mut Pace::new(), node, compute(&frame), 1);
        }
        assert!(combined(&exchange) == expected);
    }
}

#[test]
fn an_impossible_job_fails_instead_of_panicking() {
    let view = view(1, 0, 4, 1);
    type Spoil = fn(&mut Job);
    let cases: [Spoil; 5] = [
        |j| j.rows = j.rows.slice(1..),
        |j| j.choices.truncate(1),
        |j| j.owner_of_row[0] = 9,
        |j| Arc::make_mut(&mut j.owners).owners[1].1 = 9,
        |j| j.hidden = 0,
    ];
    for spoil in cases {
        let mut job = job(&mut Random(8), 4, 4, 2, Dtype::F32);
        spoil(&mut job);
        let (exchange, _) =
            Exchange::start(job, &view, &mut Pace::new(), &mut ExchangeIds::new(), 0);
        assert!(matches!(exchange.status(), Status::Failed(Failure::Impossible { .. })));
    }
}

#[test]
fn a_name_tells_which_exchange_it_belongs_to() {
    let view = view(1, 0, 4, 1);
    let mut ids = ExchangeIds::new();
    let mut start = || {
        let job = job(&mut Random(9), 4, 4, 2, Dtype::F32);
        let (exchange, commands) = Exchange::start(job, &view, &mut Pace::new(), &mut ids, 0);
        (exchange, sends(commands)[0].1.exchange)
    };
    let ((first, id), (second, _)) = (start(), start());
    assert_eq!(Exchange::number_of(id), first.number());
    assert_ne!(Exchange::number_of(id), second.number());
}

#[test]
fn the_placement_of_the_test_view_is_complete() {
    let view = view(3, 2, 8, 2);
    assert_ne!(*view.placement, Placement::new());
    assert_eq!(view.missing(&[region("fr")].into()), None);
}

#[test]
fn each_frame_tells_whose_its_assignments_are_and_what_is_repeated_is_its_owners() {
    for seed in 0..50 {
        let (view, mut random) = (view(3, 0, 8, 2), Random(seed));
        let job = job(&mut random, 12, 8, 2, Dtype::F32);
        let (owners, mut pace, mut now_us) = (job.owners.clone(), Pace::new(), 0);
        let (mut exchange, mut commands) =
            Exchange::start(job, &view, &mut pace, &mut ExchangeIds::new(), now_us);
        let mut lost = [0; 2];
        while exchange.status() != Status::Done {
            let Some(Command::Send { node, frame, shares }) = commands.pop() else {
                let Status::Waiting { until_us } = exchange.status() else { panic!("seed {seed}") };
                now_us = until_us;
                commands = exchange.on_tick(&view, &mut pace, now_us);
                continue;
            };
            let slots = exchange.in_flight[&frame.exchange].slots.clone();
            let owned = slots.iter().map(|slot| exchange.job.owner_of(*slot as usize));
            let owned: Vec<u16> = owned.collect();
            let told =
                shares.iter().flat_map(|(owner, n)| std::iter::repeat_n(*owner, *n as usize));
            assert!(told.eq(owned.iter().copied()), "seed {seed}");
            let request = |(owner, n): &(u16, u32)| (owners.owners[usize::from(*owner)].0, *n);
            assert_eq!(frame.requests, shares.iter().map(request).collect::<Vec<_>>());
            let mut answer = compute(&frame);
            if random.one_in(3) {
                answer = refuse(&frame, Refusal::Busy);
                owned.iter().for_each(|owner| lost[usize::from(*owner)] += 1);
            }
            commands.extend(exchange.on_answer(&view, &mut pace, node, answer, now_us));
        }
        let repeats = pace.take_repeats();
        let retried = [0, 1].map(|owner| repeats.get(&owner).map_or(0, |r| r.retried));
        assert_eq!(retried, lost, "seed {seed}");
        assert_eq!(retried.iter().sum::<u64>(), pace.take_work().retried, "seed {seed}");
    }
}
