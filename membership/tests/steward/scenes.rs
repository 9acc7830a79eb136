//! Scenes that are played by hand: every proposal is applied and answered at once.

use std::collections::BTreeSet;
use std::sync::Arc;

use entente_membership::served::{SERVED_MODEL_KEY, ServedModel};
use entente_membership::state::{
    Command, Expect, NodeState, RecordKind, Request, Role, SessionId, State,
};
use entente_membership::steward::{self, Event, Rebalance, Report, Steward, Unsafe};
use entente_proto::ids::{ExpertId, Incarnation, LayerId, ModelDigest, NodeId, Region};
use entente_proto::placement::{ExpertKey, ModelShape};

use crate::world::{SETTINGS, open_session, spec};

/// The expert nodes have the numbers after the coordinator.
const FIRST: NodeId = NodeId(1);
const EXPERTS: u16 = 8;

fn fr() -> Region {
    "fr".parse().unwrap()
}

fn expert(number: u16) -> ExpertKey {
    (LayerId(0), ExpertId(number))
}

struct Scene {
    state: State,
    steward: Steward,
    session: SessionId,
    sequence: u64,
    reports: u64,
    now_ms: u64,
    proposed: Vec<(Expect, Command)>,
}

impl Scene {
    /// A coordinator and some nodes, none of which has registered; the steward leads.
    fn new(nodes: usize, room: Option<usize>, replicas: u16) -> Self {
        let mut specs = vec![spec("a-coordinator", fr(), Role::Coordinator, None)];
        specs
            .extend((0..nodes).map(|n| spec(&format!("expert-{n}"), fr(), Role::ExpertNode, room)));
        let mut state = State::genesis(specs).unwrap();
        let session = open_session(&mut state);
        let steward = Steward::new(SETTINGS);
        let (sequence, reports, now_ms) = (0, 0, 1_000);
        let proposed = Vec::new();
        let mut scene = Self { state, steward, session, sequence, reports, now_ms, proposed };
        let shape = ModelShape { layers: vec![(LayerId(0), EXPERTS)], expert_bytes: 10 };
        let model = ServedModel { digest: ModelDigest([1; 32]), shape, manifest_sha256: None };
        let (kind, key) = (RecordKind::Model, SERVED_MODEL_KEY.to_owned());
        let (value, revision) = (model.encode(), None);
        scene.apply(Expect::default(), Command::SetReplicas(fr(), replicas)).unwrap();
        scene.apply(Expect::default(), Command::PutRecord { kind, key, value, revision }).unwrap();
        scene.on(Event::Leads);
        scene
    }

    fn apply(&mut self, expect: Expect, command: Command) -> entente_membership::state::Outcome {
        self.sequence += 1;
        let (session, sequence, at_ms) = (self.session, self.sequence, self.now_ms);
        let request = Request { session, sequence, at_ms, expect, command };
        let index = self.state.applied_index() + 1;
        let outcome = self.state.apply_entry(index, Some(request)).unwrap().unwrap();
        self.on(Event::Committed(Arc::new(self.state.clone())));
        outcome
    }

    fn on(&mut self, event: Event) {
        let commands = self.steward.on(event, self.now_ms);
        self.carry_out(commands);
    }

    fn carry_out(&mut self, commands: Vec<steward::Command>) {
        for steward::Command::Propose { id, expect, command } in commands {
            self.proposed.push((expect, command.clone()));
            let outcome = Some(self.apply(expect, command));
            self.on(Event::Answered { id, outcome });
        }
    }

    fn register(&mut self, node: NodeId) {
        self.apply(Expect::default(), Command::Register(node)).unwrap();
    }

    fn node(&self, node: NodeId) -> &entente_membership::state::Node {
        self.state.node_by_id(node).unwrap()
    }

    fn report(&mut self, node: NodeId, held: BTreeSet<ExpertKey>, rows: Vec<(ExpertKey, u64)>) {
        self.reports += 1;
        let incarnation = self.node(node).incarnation.unwrap();
        self.on(Event::Report(Report {
            node,
            incarnation,
            sequence: self.reports,
            held: Some(held),
            failed: Vec::new(),
            leaving: false,
            rows,
        }));
    }

    /// Every node holds what it is told, until nothing changes any more.
    fn obey(&mut self, nodes: &[NodeId]) {
        for _ in 0..20 {
            for node in nodes {
                let wanted = self.steward.orders(*node).wanted;
                self.report(*node, wanted, Vec::new());
            }
        }
        assert!(self.steward.progress().is_idle(), "{}", self.steward.progress());
    }

    fn pass(&mut self, ms: u64) {
        self.now_ms += ms;
        self.on(Event::Tick);
    }
}

/// A cluster that is up.
fn up(nodes: u32, room: Option<usize>, replicas: u16) -> (Scene, Vec<NodeId>) {
    let mut scene = Scene::new(nodes as usize, room, replicas);
    let ids: Vec<NodeId> = (0..nodes).map(|n| NodeId(FIRST.0 + n)).collect();
    ids.iter().for_each(|id| scene.register(*id));
    scene.obey(&ids);
    scene.proposed.clear();
    (scene, ids)
}

#[test]
fn the_first_placement_names_founders_that_have_not_registered() {
    let scene = Scene::new(2, None, 2);
    let [(expect, Command::SetPlacement(placement))] = &scene.proposed[..] else {
        panic!("{:?}", scene.proposed)
    };
    assert_eq!(expect.placement_epoch.map(|epoch| epoch.0), Some(0));
    assert_eq!(placement.nodes(), [NodeId(1), NodeId(2)].into());
    assert_eq!(scene.steward.orders(FIRST).wanted.len(), usize::from(EXPERTS));
}

#[test]
fn a_founder_that_never_comes_is_waited_for_and_then_replaced() {
    let mut scene = Scene::new(2, None, 1);
    scene.register(FIRST);
    let share = scene.steward.orders(FIRST).wanted;
    scene.report(FIRST, share.clone(), Vec::new());
    scene.now_ms += SETTINGS.restore_after_ms - 1;
    scene.report(FIRST, share.clone(), Vec::new());
    scene.pass(0);
    assert_eq!(scene.node(NodeId(2)).state, NodeState::Active);
    assert_eq!(scene.steward.orders(FIRST).wanted, share);
    scene.pass(1);
    assert_eq!(scene.node(NodeId(2)).state, NodeState::Down);
    scene.obey(&[FIRST]);
    assert_eq!(scene.state.placement().nodes(), [FIRST].into());
}

#[test]
fn a_node_is_active_once_it_holds_all_that_is_placed_on_it() {
    let mut scene = Scene::new(1, None, 1);
    scene.register(FIRST);
    let mut held: BTreeSet<ExpertKey> = (1..EXPERTS).map(expert).collect();
    scene.report(FIRST, held.clone(), Vec::new());
    assert_eq!(scene.node(FIRST).state, NodeState::Joining);
    held.insert(expert(0));
    scene.report(FIRST, held, Vec::new());
    assert_eq!(scene.node(FIRST).state, NodeState::Active);
    let (expect, _) = scene.proposed.last().unwrap();
    let incarnation = scene.node(FIRST).incarnation.unwrap();
    assert_eq!(expect.incarnation, Some((FIRST, incarnation)));
    assert_eq!(expect.placement_epoch, Some(scene.state.placement_epoch()));
}

#[test]
fn a_node_that_is_silent_is_down_and_its_stream_is_fenced() {
    let (mut scene, ids) = up(2, None, 2);
    let first = scene.node(ids[0]).incarnation.unwrap();
    assert!(!scene.steward.fenced(ids[0], first));
    let unknown = Incarnation(scene.state.incarnations_minted() + 1);
    assert!(!scene.steward.fenced(ids[0], unknown), "it may have been minted a moment ago");
    scene.pass(SETTINGS.down_after_ms - 1);
    assert_eq!(scene.node(ids[0]).state, NodeState::Active);
    scene.pass(1);
    assert_eq!(scene.node(ids[0]).state, NodeState::Down);
    assert!(scene.steward.fenced(ids[0], first));
    scene.register(ids[0]);
    assert!(scene.steward.fenced(ids[0], first));
    assert!(!scene.steward.fenced(ids[0], scene.node(ids[0]).incarnation.unwrap()));
}

#[test]
fn what_nobody_else_holds_is_restored_at_once_and_the_rest_after_a_while() {
    for (replicas, at_once) in [(1, true), (2, false)] {
        let (mut scene, ids) = up(3, None, replicas);
        let before = scene.steward.orders(ids[1]).wanted;
        scene.now_ms += SETTINGS.down_after_ms;
        for id in &ids[1..] {
            let wanted = scene.steward.orders(*id).wanted;
            scene.report(*id, wanted, Vec::new());
        }
        scene.pass(0);
        assert_eq!(scene.node(ids[0]).state, NodeState::Down);
        let loads = scene.steward.orders(ids[1]).wanted.len() > before.len();
        assert_eq!(loads, at_once, "{replicas} replicas");
    }
}

#[test]
fn a_drain_that_the_others_cannot_take_is_refused_with_the_arithmetic() {
    let (mut scene, ids) = up(2, Some(4), 1);
    assert_eq!(
        scene.steward.drain(ids[0]).unwrap_err().to_string(),
        "region fr: 4 experts would be without a replica there; region fr: 1 x 8 experts of 10 \
         bytes need 80 bytes; its 1 nodes have room for 4 experts (40 bytes)"
    );
    let refused = scene.steward.ok_to_stop(&[ids[0]].into()).unwrap_err();
    assert_eq!(refused, Unsafe::Lost { region: fr(), experts: 4, refused: None });
}

#[test]
fn a_node_that_is_drained_is_emptied_first_and_dismissed_then() {
    let (mut scene, ids) = up(2, None, 2);
    let both: BTreeSet<NodeId> = ids.iter().copied().collect();
    assert_eq!(scene.steward.ok_to_stop(&[ids[0]].into()), Ok(()));
    assert!(scene.steward.ok_to_stop(&both).is_err());
    let commands = scene.steward.drain(ids[0]).unwrap();
    scene.carry_out(commands);
    assert_eq!(scene.node(ids[0]).state, NodeState::Draining);
    scene.obey(&ids);
    let orders = scene.steward.orders(ids[0]);
    assert!(orders.dismissed && orders.wanted.is_empty());
    let degraded = scene.steward.progress().to_string();
    assert_eq!(degraded, "degraded: region fr: 2 replicas need 2 nodes, it has 1");
}

#[test]
fn a_rebalance_copies_the_expert_that_is_hot_and_what_it_did_stays() {
    let (mut scene, ids) = up(3, None, 1);
    assert_eq!(scene.steward.plan(None).unwrap().loads, 0);
    let holder = scene.state.placement().replicas(expert(3)).next().unwrap();
    let held = scene.steward.orders(holder).wanted;
    scene.report(holder, held, vec![(expert(3), 10_000)]);
    let plan = scene.steward.plan(None).unwrap();
    assert!(plan.lines[0].contains("by the load of 10000 rows"), "{:?}", plan.lines);
    assert!(plan.loads > 0);
    assert_eq!(scene.steward.rebalance(Rebalance::ToPlan), Ok(plan.clone()));
    scene.pass(1);
    scene.obey(&ids);
    assert_eq!(**scene.state.placement(), plan.placement);
    assert_eq!(scene.state.placement().replicas(expert(3)).count(), 2);
    let epoch = scene.state.placement_epoch();
    scene.pass(1);
    assert_eq!(scene.state.placement_epoch(), epoch);
}

#[test]
fn an_operator_may_order_one_more_replica_where_there_is_room() {
    let (mut scene, ids) = up(2, Some(5), 1);
    let has = |scene: &Scene, node| scene.state.placement().experts_of(node);
    let extra = has(&scene, ids[1]).into_iter().next().unwrap();
    let what = Rebalance::Replica { expert: extra, node: ids[0] };
    assert_eq!(scene.steward.rebalance(what).unwrap().loads, 1);
    scene.pass(1);
    scene.obey(&ids);
    assert!(has(&scene, ids[0]).contains(&extra) && has(&scene, ids[1]).contains(&extra));
    let refused = scene.steward.rebalance(what).unwrap_err().to_string();
    assert_eq!(refused, "node 1 cannot take the replica: its memory is full");
}
