//! Nodes of two kernel classes, whose rows differ in a bit: which class computes what.

use super::*;
use crate::pace::Work;

const GPU: &str = "bf16/cuda-sm90/1";
const CPU: &str = "bf16/avx2/3";
/// Experts of the layer.
const EXPERTS: u16 = 8;

/// Live nodes in fr, `0..cpus` with processors and the `gpus` after them with devices, and experts
/// where `placed` has them.
fn mixed(cpus: u32, gpus: u32, placed: impl Fn(u16) -> Vec<u32>) -> ClusterView {
    let mut view = view(cpus + gpus, 0, EXPERTS, 1);
    view.model.kernel_class = KernelClass(CPU.to_owned());
    let mut placement = Placement::new();
    for expert in 0..EXPERTS {
        for node in placed(expert) {
            placement.add((LAYER, ExpertId(expert)), NodeId(node));
        }
    }
    view.placement = Arc::new(placement);
    for (id, node) in &mut view.nodes {
        let is_gpu = id.0 >= cpus;
        node.kernel_class = KernelClass(if is_gpu { GPU } else { CPU }.to_owned());
        node.rank = u16::from(!is_gpu);
    }
    view
}

/// Whether the node computes on a device.
fn is_gpu(view: &ClusterView, node: NodeId) -> bool {
    view.nodes[&node].kernel_class.is_of_device()
}

/// The answer of a healthy node of a class: devices give every byte another last bit.
fn compute_on(view: &ClusterView, node: NodeId, frame: &Dispatch) -> Answer {
    let mut answer = compute(frame);
    if is_gpu(view, node) {
        let flip = |rows: Bytes| rows.iter().map(|byte| byte ^ 1).collect::<Vec<u8>>().into();
        answer.result = answer.result.map(flip);
    }
    answer
}

/// The bytes of each slot, as the first class computes them where the expert is placed on both.
fn expected_of(view: &ClusterView, job: &Job) -> Vec<Vec<u8>> {
    let size = job.row_bytes();
    let slots = job.choices.iter().enumerate();
    let slot = |(i, choice): (usize, &Choice)| {
        let mut row = vec![0.0; job.hidden];
        job.dtype.decode(&job.rows[i / job.top_k * size..][..size], &mut row);
        let mut bytes = Vec::new();
        job.dtype.encode(&expert(choice.expert, &row), &mut bytes);
        let on_gpu = view.placement.replicas((LAYER, choice.expert)).any(|n| is_gpu(view, n));
        bytes.iter().map(|byte| byte ^ u8::from(on_gpu)).collect()
    };
    slots.map(slot).collect()
}

fn parts_of(exchange: &Exchange) -> Vec<Vec<u8>> {
    exchange.parts().into_iter().map(|(_, row)| row.to_vec()).collect()
}

/// Rows of one policy, so that each node gets one frame; in no hurry.
fn of_one_owner() -> Job {
    let mut job = job(&mut Random(7), 12, EXPERTS.into(), 2, Dtype::Bf16);
    job.owner_of_row.fill(0);
    Job { deadline_us: 5 * DEADLINE_US, ..job }
}

struct Run {
    view: ClusterView,
    pace: Pace,
    exchange: Exchange,
    slots: u64,
}

impl Run {
    fn start(view: ClusterView) -> (Self, Vec<(NodeId, Dispatch)>) {
        let (mut pace, mut ids) = (Pace::new(), ExchangeIds::new());
        let job = of_one_owner();
        let slots = job.choices.len() as u64;
        let (exchange, commands) = Exchange::start(job, &view, &mut pace, &mut ids, 0);
        (Self { view, pace, exchange, slots }, sends(commands))
    }

    fn answer(&mut self, node: NodeId, answer: Answer, now_us: u64) -> Vec<(NodeId, Dispatch)> {
        sends(self.exchange.on_answer(&self.view, &mut self.pace, node, answer, now_us))
    }

    fn tick(&mut self, now_us: u64) -> Vec<(NodeId, Dispatch)> {
        sends(self.exchange.on_tick(&self.view, &mut self.pace, now_us))
    }

    fn until_us(&self) -> u64 {
        let Status::Waiting { until_us } = self.exchange.status() else { panic!("it is over") };
        until_us
    }

    fn crossed(&mut self) -> u64 {
        self.pace.take_work().crossed
    }
}

fn nodes(frames: &[(NodeId, Dispatch)]) -> Vec<u32> {
    frames.iter().map(|(node, _)| node.0).collect()
}

#[test]
fn rows_go_to_one_class_while_it_has_a_replica_and_are_counted_once_it_has_none() {
    let (mut run, frames) = Run::start(mixed(2, 2, |_| vec![0, 1, 2, 3]));
    assert_eq!(BTreeSet::from_iter(nodes(&frames)), [2, 3].into());
    let mut again = Vec::new();
    for (node, frame) in frames.into_iter().filter(|(node, _)| node.0 == 2) {
        again.extend(run.answer(node, refuse(&frame, Refusal::Draining), 10));
    }
    assert!(!again.is_empty() && nodes(&again).iter().all(|node| *node == 3), "{again:?}");
    assert_eq!(run.crossed(), 0);
    run.view.node_down(NodeId(3));
    let Run { view, pace, exchange, .. } = &mut run;
    let last = sends(exchange.on_link_down(view, pace, NodeId(3), 20));
    assert_eq!(BTreeSet::from_iter(nodes(&last)), [0, 1].into());
    assert_eq!(run.crossed(), run.slots);
}

#[test]
fn a_busy_replica_is_waited_for_before_another_class_is_asked_but_not_for_ever() {
    let (mut run, mut frames) = Run::start(mixed(1, 1, |_| vec![0, 1]));
    let (mut now_us, mut refusals) = (0, 0);
    loop {
        assert_eq!(frames.len(), 1);
        let (node, frame) = frames.remove(0);
        if node == NodeId(0) {
            break;
        }
        assert_eq!(run.crossed(), 0);
        refusals += 1;
        frames = run.answer(node, refuse(&frame, Refusal::Busy), now_us);
        if frames.is_empty() {
            now_us = run.until_us();
            frames = run.tick(now_us);
        }
    }
    assert_eq!(run.crossed(), run.slots);
    assert!(refusals > 5 && now_us < 150_000, "after {refusals} refusals, at {now_us} us");
}

#[test]
fn a_late_row_is_hedged_in_its_class_and_in_another_only_once_it_is_overdue() {
    let placed = |_| vec![0, 1];
    let (mut run, frames) = Run::start(mixed(1, 1, placed));
    // Nothing is measured yet, so late and overdue are one moment, and the only replica hangs.
    let hedged = run.tick(run.until_us());
    assert_eq!((nodes(&frames), nodes(&hedged)), (vec![1], vec![0]));
    assert_eq!(run.crossed(), run.slots);

    let view = mixed(1, 1, placed);
    let (mut pace, mut ids) = (Pace::new(), ExchangeIds { blocks: 1 });
    for (node, rank) in [(NodeId(0), 1), (NodeId(1), 0)] {
        for id in 0..64 {
            pace.on_sent(ExchangeId(id), (node, rank), 8, 0);
            let result = Ok(Bytes::new());
            pace.on_answer(node, &Answer { exchange: ExchangeId(id), fence: None, result }, 3_000);
        }
    }
    pace.earn(100_000);
    let job = of_one_owner();
    let (mut exchange, frames) = Exchange::start(job, &view, &mut pace, &mut ids, 0);
    assert_eq!(nodes(&sends(frames)), [1]);
    // Late, and there would be budget enough.
    assert_eq!(sends(exchange.on_tick(&view, &mut pace, 10_000)), []);
    assert_eq!(nodes(&sends(exchange.on_tick(&view, &mut pace, 60_000))), [0]);
}

#[test]
fn nodes_with_processors_are_not_late_by_the_measure_of_devices() {
    let mut pace = Pace::new();
    let (slow, fast) = ((NodeId(0), 1), (NodeId(1), 0));
    for (node, time_us) in [(slow, 200_000), (fast, 1_000)] {
        for id in 0..64 {
            pace.on_sent(ExchangeId(id), node, 8, 0);
            let result = Ok(Bytes::new());
            pace.on_answer(
                node.0,
                &Answer { exchange: ExchangeId(id), fence: None, result },
                time_us,
            );
        }
    }
    let patience = |pace: &mut Pace, node| pace.on_sent(ExchangeId(99), node, 8, 0);
    assert_eq!(patience(&mut pace, slow).hedge_at_us, 200_000);
    assert!(patience(&mut pace, fast).hedge_at_us < 10_000);
}

/// One exchange among nodes that refuse, break and are busy. Of each class the first node that
/// holds an expert is busy at times and otherwise well.
fn among_faults(seed: u64) -> Work {
    let mut random = Random(seed);
    let on_gpu: Vec<bool> = (0..EXPERTS).map(|_| random.one_in(2)).collect();
    let more: Vec<u32> = (0..EXPERTS).map(|_| random.place(2) as u32).collect();
    // Nodes 0 and 3 stay.
    let view = mixed(3, 3, |expert| {
        let (gpu, more) = (on_gpu[usize::from(expert)], more[usize::from(expert)]);
        if gpu { vec![0, 1 + more, 3, 4 + more] } else { vec![0, 1 + more] }
    });
    let (mut pace, mut ids, mut now_us) = (Pace::new(), ExchangeIds::new(), 0);
    let rows = 1 + random.place(30);
    let job = job(&mut random, rows, EXPERTS.into(), 2, Dtype::Bf16);
    let expected = expected_of(&view, &job);
    let mut busy = BTreeMap::from([(NodeId(0), 5), (NodeId(3), 5)]);
    let (mut view, (mut exchange, commands)) =
        (view.clone(), Exchange::start(job, &view, &mut pace, &mut ids, now_us));
    let mut travelling = sends(commands);
    while exchange.status() != Status::Done {
        let commands = if travelling.is_empty() {
            let Status::Waiting { until_us } = exchange.status() else {
                panic!("seed {seed}: {:?}", exchange.status())
            };
            now_us = until_us;
            exchange.on_tick(&view, &mut pace, now_us)
        } else {
            let (node, frame) = travelling.swap_remove(random.place(travelling.len()));
            let left = busy.get_mut(&node);
            match (random.place(4), left) {
                (0, Some(left @ 1..)) => {
                    *left -= 1;
                    let answer = refuse(&frame, Refusal::Busy);
                    exchange.on_answer(&view, &mut pace, node, answer, now_us)
                }
                (0, None) => {
                    let answer = refuse(&frame, Refusal::Draining);
                    exchange.on_answer(&view, &mut pace, node, answer, now_us)
                }
                (1, None) => {
                    view.node_down(node);
                    travelling.retain(|(to, _)| *to != node);
                    exchange.on_link_down(&view, &mut pace, node, now_us)
                }
                _ => {
                    let answer = compute_on(&view, node, &frame);
                    exchange.on_answer(&view, &mut pace, node, answer, now_us)
                }
            }
        };
        travelling.extend(sends(commands));
    }
    assert_eq!(parts_of(&exchange), expected, "seed {seed}");
    pace.take_work()
}

#[test]
fn faults_change_no_bit_while_a_replica_of_the_first_class_is_left() {
    let mut retried = 0;
    for seed in 0..400 {
        let work = among_faults(seed);
        assert_eq!(work.crossed, 0, "seed {seed}: {work:?}");
        retried += work.retried;
    }
    assert!(retried > 1_000, "only {retried} rows were sent again");
}
