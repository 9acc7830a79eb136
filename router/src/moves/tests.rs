//! Moves between random placements, with loads that fail and nodes that are lost.

use entente_sim::Random;

use super::*;
use crate::placement::{self, ModelShape, PlacementNode};

const LOADS_MAX: usize = 2;

fn fr() -> Region {
    "fr".parse().unwrap()
}

fn node(room: Option<usize>, ready: BTreeSet<ExpertKey>) -> MoveNode {
    let (loading, releasing) = Default::default();
    MoveNode {
        region: fr(),
        room,
        ready,
        loading,
        releasing,
        up: true,
        serves: true,
        takes_new: true,
    }
}

/// A random move, and the steps that wait to be carried out.
struct Run {
    random: Random,
    moves: Moves,
    steps: Vec<Step>,
    /// Ready replicas that each expert may not fall below.
    floor: BTreeMap<ExpertKey, usize>,
    seed: u64,
}

impl Run {
    /// From one placement of a random cluster to another one, on nodes that are nearly full.
    fn start(seed: u64) -> Self {
        let mut random = Random(seed);
        let (count, replicas) = (3 + random.place(3) as u32, 1 + random.place(2) as u16);
        let shape = ModelShape {
            layers: vec![(LayerId(0), 2 + random.place(7) as u16), (LayerId(3), 4)],
            expert_bytes: 10,
        };
        let total = shape.expert_count() * u64::from(replicas);
        let room = total.div_ceil(u64::from(count)) + 1 + random.place(3) as u64;
        let mut place = || {
            let mut ids: Vec<u32> = (0..count).collect();
            let nodes: Vec<PlacementNode> = (0..count)
                .map(|_| PlacementNode {
                    id: NodeId(ids.swap_remove(random.place(ids.len()))),
                    region: fr(),
                    memory_bytes: Some(10 * room - 10 * random.place(2) as u64),
                })
                .collect();
            // Another name for each node is another placement of the same experts.
            let placement = placement::plan(&nodes, &shape, replicas).unwrap();
            let turn = random.place(count as usize) as u32;
            let mut turned = Placement::new();
            for (expert, on) in placement.iter() {
                for node in on {
                    turned.add(expert, NodeId((node.0 + turn + u32::from(expert.1.0)) % count));
                }
            }
            turned
        };
        let (committed, target) = (place(), place());
        let most = |id| committed.experts_of(id).len().max(target.experts_of(id).len());
        let nodes: BTreeMap<NodeId, MoveNode> = (0..count)
            .map(NodeId)
            .map(|id| (id, node(Some(most(id) + usize::from(id.0 == 0)), committed.experts_of(id))))
            .collect();
        let floor = committed.iter().map(|(e, on)| (e, on.len())).collect();
        let (moves, steps) = Moves::start(nodes, committed, target, true, LOADS_MAX, 10);
        Self { random, moves, steps, floor, seed }
    }

    /// Carries out any one of the steps. Loads fail now and then if `fail_one_in` says so.
    fn step(&mut self, fail_one_in: Option<u64>) {
        let step = self.steps.swap_remove(self.random.place(self.steps.len()));
        let fails = fail_one_in.is_some_and(|n| self.random.one_in(n));
        let steps = match step {
            Step::Load { node, expert } if fails => self.moves.on_load_failed(node, expert),
            Step::Load { node, expert } => self.moves.on_loaded(node, expert),
            Step::Commit { .. } => self.moves.on_committed(),
            Step::Release { node, expert } => {
                let named = self.moves.committed.replicas(expert).any(|other| other == node);
                assert!(!named, "seed {}: released while placed", self.seed);
                self.moves.on_released(node, expert)
            }
        };
        self.steps.extend(steps);
        self.check();
    }

    /// A node dies; what it alone held is gone, and no fault of the move. Nor is a commit that is on
    /// its way and names it.
    fn lose(&mut self, node: NodeId) {
        self.steps.retain(|step| {
            !matches!(step, Step::Load { node: n, .. } | Step::Release { node: n, .. } if *n == node)
        });
        let steps = self.moves.on_node_down(node);
        self.steps.extend(steps);
        let moves = &self.moves;
        for (expert, floor) in &mut self.floor {
            for placement in moves.committing.iter().chain([&moves.committed]) {
                *floor = (*floor).min(ready(moves, placement, *expert));
            }
        }
        self.check();
    }

    /// What must hold at every moment.
    fn check(&self) {
        let (moves, seed) = (&self.moves, self.seed);
        for (id, node) in &moves.nodes {
            assert!(moves.held(*id) <= node.room.unwrap(), "seed {seed}: memory of {id}");
            let loading = moves.loading.iter().filter(|(other, _)| other == id).count();
            assert!(loading <= LOADS_MAX, "seed {seed}: {loading} loads on {id}");
        }
        let commits = self.steps.iter().filter(|step| matches!(step, Step::Commit { .. })).count();
        assert!(commits <= 1, "seed {seed}: {commits} commits in flight");
        for (expert, floor) in &self.floor {
            let wanted = moves.target.replicas(*expert).count().min(*floor);
            let have = ready(moves, &moves.committed, *expert);
            assert!(have >= wanted, "seed {seed}: {have} of {wanted} replicas of {expert:?}");
        }
    }
}

/// Replicas of a placement that are ready.
fn ready(moves: &Moves, placement: &Placement, expert: ExpertKey) -> usize {
    placement.replicas(expert).filter(|node| moves.is_ready(*node, expert)).count()
}

#[test]
fn a_move_reaches_its_target_and_no_expert_is_ever_without_its_replicas() {
    let mut done = 0;
    for seed in 0..400 {
        let mut run = Run::start(seed);
        run.check();
        for n in 0.. {
            assert!(n < 2_000, "seed {seed}: goes on for ever");
            if run.steps.is_empty() {
                break;
            }
            run.step(None);
        }
        match run.moves.progress() {
            Progress::Done => {
                assert_eq!(run.moves.committed, run.moves.target, "seed {seed}");
                done += 1;
            }
            Progress::Stuck(Stuck::NoHeadroom { held, room, .. }) => {
                assert_eq!(held, room, "seed {seed}: refused though there is room");
            }
            other => panic!("seed {seed}: {other:?}"),
        }
    }
    assert!(done > 300, "only {done} of 400 moves got to their end");
}

#[test]
fn failed_loads_and_lost_nodes_take_nothing_else_away() {
    for seed in 0..400 {
        let mut run = Run::start(seed);
        let loss = run.random.place(20);
        for n in 0.. {
            assert!(n < 2_000, "seed {seed}: goes on for ever");
            if n == loss {
                let lost = NodeId(run.random.place(run.moves.nodes.len()) as u32);
                run.lose(lost);
            }
            if run.steps.is_empty() {
                break;
            }
            run.step(Some(6));
        }
        let progress = run.moves.progress();
        assert!(!matches!(progress, Progress::Moving { .. }), "seed {seed}: {progress:?}");
    }
}

#[test]
fn full_nodes_that_swap_are_refused_with_the_arithmetic() {
    let expert = |n| (LayerId(0), ExpertId(n));
    let (mut now, mut target) = (Placement::new(), Placement::new());
    for n in 0..2 {
        now.add(expert(n), NodeId(n.into()));
        target.add(expert(n), NodeId(1 - u32::from(n)));
    }
    let nodes = |room| -> BTreeMap<NodeId, MoveNode> {
        [0, 1].map(|n| (NodeId(n), node(Some(room), now.experts_of(NodeId(n))))).into()
    };
    let (moves, steps) = Moves::start(nodes(1), now.clone(), target.clone(), true, 1, 700);
    assert_eq!(steps, []);
    let Progress::Stuck(stuck) = moves.progress() else { panic!("must be stuck") };
    assert_eq!(
        stuck.to_string(),
        "2 replicas are left to load, and no node has room for one more: node 1 holds 1 experts of \
         the 1 that fit; moving needs 700 bytes more"
    );
    let (_, steps) = Moves::start(nodes(2), now, target, true, 1, 700);
    assert_eq!(steps.len(), 2, "with room for one more each, both load");
}

#[test]
fn an_expert_keeps_its_name_while_the_nodes_of_its_target_are_missing_or_fail() {
    let (unknown, fails) = ((LayerId(0), ExpertId(0)), (LayerId(0), ExpertId(1)));
    let (mut now, mut target) = (Placement::new(), Placement::new());
    for expert in [unknown, fails] {
        now.add(expert, NodeId(0));
    }
    target.add(unknown, NodeId(9));
    target.add(fails, NodeId(1));
    let nodes = [(0, [unknown, fails].into()), (1, BTreeSet::new())];
    let nodes = nodes.map(|(id, ready)| (NodeId(id), node(None, ready))).into();
    let (mut moves, mut steps) = Moves::start(nodes, now.clone(), target, true, 1, 700);
    while let Some(step) = steps.pop() {
        assert_eq!(step, Step::Load { node: NodeId(1), expert: fails });
        steps.extend(moves.on_load_failed(NodeId(1), fails));
    }
    assert_eq!(moves.committed(), &now);
    assert_eq!(moves.on_node_down(NodeId(0)), [], "its placement is what it comes back to");
    let Progress::Stuck(stuck) = moves.progress() else { panic!("must be stuck") };
    assert_eq!(stuck.to_string(), "2 replicas are left to load, and node 9 is down");
}

#[test]
fn a_node_may_stop_if_every_expert_is_ready_elsewhere_in_its_region() {
    let (shared, alone) = ((LayerId(0), ExpertId(0)), (LayerId(0), ExpertId(1)));
    let mut placement = Placement::new();
    let mut nodes = BTreeMap::new();
    for id in [0, 1] {
        placement.add(shared, NodeId(id));
        nodes.insert(NodeId(id), node(None, [shared].into()));
    }
    let lost = |nodes: &_, placement: &_| -> Vec<ExpertKey> {
        lost_without(&[NodeId(0)].into(), nodes, placement).into_iter().map(|(_, e)| e).collect()
    };
    assert_eq!(lost(&nodes, &placement), []);
    assert_eq!(lost_without(&[NodeId(0), NodeId(1)].into(), &nodes, &placement).len(), 1);
    placement.add(alone, NodeId(0));
    nodes.get_mut(&NodeId(0)).unwrap().ready.insert(alone);
    assert_eq!(lost(&nodes, &placement), [alone]);
    nodes.get_mut(&NodeId(1)).unwrap().region = "se".parse().unwrap();
    assert_eq!(lost(&nodes, &placement), [shared, alone]);
}

#[test]
fn a_placement_that_somebody_else_made_is_committed_again_before_anything_is_released() {
    let (kept, surplus) = ((LayerId(0), ExpertId(0)), (LayerId(0), ExpertId(1)));
    let mut placement = Placement::new();
    placement.add(kept, NodeId(0));
    let nodes: BTreeMap<_, _> = [(NodeId(0), node(None, [kept, surplus].into()))].into();
    let start =
        |sealed| Moves::start(nodes.clone(), placement.clone(), placement.clone(), sealed, 1, 10);
    let release = [Step::Release { node: NodeId(0), expert: surplus }];
    assert_eq!(start(true).1, release);
    let (mut moves, steps) = start(false);
    assert_eq!(steps, [Step::Commit { placement: placement.clone() }]);
    assert_eq!(moves.on_committed(), release);
}

#[test]
fn an_expert_that_nobody_serves_is_committed_without_waiting_for_other_loads() {
    let (lost, slow) = ((LayerId(0), ExpertId(0)), (LayerId(0), ExpertId(1)));
    let (mut now, mut target) = (Placement::new(), Placement::new());
    now.add(lost, NodeId(0));
    now.add(slow, NodeId(1));
    for expert in [lost, slow] {
        target.add(expert, NodeId(1));
        target.add(expert, NodeId(2));
    }
    let nodes = [(1, [slow].into()), (2, BTreeSet::new())];
    let mut nodes: BTreeMap<_, _> = nodes.map(|(id, ready)| (NodeId(id), node(None, ready))).into();
    // What a node holds before coordinators use it saves nobody.
    let joining = MoveNode { serves: false, ..node(None, [lost].into()) };
    nodes.insert(NodeId(2), joining);
    let (mut moves, steps) = Moves::start(nodes, now, target, true, 9, 10);
    assert_eq!(steps.len(), 2, "{steps:?}");
    let steps = moves.on_loaded(NodeId(1), lost);
    let [Step::Commit { placement }] = &steps[..] else { panic!("{steps:?}") };
    let named: Vec<NodeId> = placement.replicas(lost).collect();
    assert_eq!(named, [NodeId(0), NodeId(1)], "the lost one may come back, the joining one waits");
}

#[test]
fn what_was_on_its_way_before_takes_memory_and_is_waited_for() {
    let [old, new] = [0, 1].map(|n| (LayerId(0), ExpertId(n)));
    let mut target = Placement::new();
    target.add(new, NodeId(0));
    let busy = MoveNode { loading: [old].into(), ..node(Some(1), BTreeSet::new()) };
    let (mut moves, steps) =
        Moves::start([(NodeId(0), busy)].into(), Placement::new(), target, true, 9, 10);
    assert_eq!(steps, [], "there is room for one");
    assert_eq!(moves.on_loaded(NodeId(0), old), [Step::Release { node: NodeId(0), expert: old }]);
    assert_eq!(moves.on_released(NodeId(0), old), [Step::Load { node: NodeId(0), expert: new }]);
}
