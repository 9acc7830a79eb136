//! The session, event by event, and under events in random order.

use super::*;
use entente_proto::ids::{ExpertId, LayerId};

const SETTINGS: Settings = Settings { heartbeat_ms: 100, drain_deadline_ms: 30_000 };
const NODE: NodeId = NodeId(4);
const START: Incarnation = Incarnation(7);

fn key(expert: u16) -> ExpertKey {
    (LayerId(0), ExpertId(expert))
}

fn keys(experts: &[u16]) -> BTreeSet<ExpertKey> {
    experts.iter().map(|e| key(*e)).collect()
}

/// A session and its clock.
struct Node {
    session: Session,
    now_ms: u64,
}

impl Node {
    fn new() -> Self {
        let (session, first) = Session::start(SETTINGS);
        assert_eq!(first, Command::Register);
        Self { session, now_ms: 0 }
    }

    /// A node that is registered and connected.
    fn connected() -> Self {
        let mut node = Self::new();
        node.register(START);
        node.on(Event::Connected);
        node
    }

    /// A node that holds experts 0 to 3, as the placement says, and serves.
    fn serving() -> Self {
        let mut node = Self::connected();
        node.order(1, &[0, 1, 2, 3]);
        node.load(&[0, 1, 2, 3]);
        assert_eq!(node.commit(1, &[0, 1, 2, 3], Some(START)), [Command::Ready]);
        node
    }

    fn on(&mut self, event: Event) -> Vec<Command> {
        self.session.on(event, self.now_ms)
    }

    fn tick_after(&mut self, ms: u64) -> Vec<Command> {
        self.now_ms += ms;
        self.on(Event::Tick)
    }

    fn register(&mut self, incarnation: Incarnation) -> Vec<Command> {
        self.on(Event::Registered { node: NODE, incarnation })
    }

    fn order(&mut self, epoch: u64, wanted: &[u16]) -> Vec<Command> {
        let wanted = Some(keys(wanted));
        let placement_epoch = PlacementEpoch(epoch);
        self.on(Event::Orders(Orders { placement_epoch, wanted, ..Orders::default() }))
    }

    fn commit(&mut self, epoch: u64, placed: &[u16], active: Option<Incarnation>) -> Vec<Command> {
        let (placement_epoch, placed) = (PlacementEpoch(epoch), keys(placed));
        self.on(Event::Committed(Committed { placement_epoch, placed, active }))
    }

    fn load(&mut self, experts: &[u16]) -> Vec<Command> {
        self.on(Event::Loaded { held: keys(experts), failed: BTreeMap::new() })
    }
}

fn reports(commands: &[Command]) -> Vec<&Report> {
    let report = |command| match command {
        &Command::Report(ref report) | &Command::Connect(ref report) => Some(report),
        _ => None,
    };
    commands.iter().filter_map(report).collect()
}

fn report(commands: &[Command]) -> &Report {
    match reports(commands)[..] {
        [report] => report,
        _ => panic!("one report was expected: {commands:?}"),
    }
}

fn loads(commands: &[Command]) -> Option<(&BTreeSet<ExpertKey>, bool)> {
    commands.iter().find_map(|command| match command {
        Command::Load { experts, beside_serving } => Some((experts, *beside_serving)),
        _ => None,
    })
}

#[test]
fn a_node_registers_takes_its_incarnation_and_tells_at_once_that_it_holds_nothing() {
    let mut node = Node::new();
    let commands = node.register(START);
    assert_eq!(commands[0], Command::Adopt(START));
    let Command::Connect(first) = &commands[1] else { panic!("{commands:?}") };
    assert_eq!((first.node, first.incarnation, first.sequence), (NODE, START, 1));
    assert_eq!(first.held, Some(keys(&[])));
    assert_eq!(node.on(Event::Connected), []);
    let second = node.tick_after(100);
    assert_eq!((report(&second).sequence, &report(&second).held), (2, &None));
}

#[test]
fn an_expert_that_has_changed_in_memory_is_taken_out_told_and_got_anew() {
    let mut node = Node::serving();
    let commands = node.on(Event::Spoilt(key(2)));
    assert_eq!(commands[0], Command::Release(keys(&[2])));
    let told = report(&commands);
    assert_eq!(told.held, Some(keys(&[0, 1, 3])));
    assert!(told.failed[&key(2)].contains("changed in memory"), "{:?}", told.failed);
    assert_eq!(loads(&commands), Some((&keys(&[2]), true)));
    // Once is enough, and nothing of it is told again when it is back.
    assert_eq!(node.on(Event::Spoilt(key(2))), []);
    let back = node.load(&[2]);
    assert_eq!(report(&back).held, Some(keys(&[0, 1, 2, 3])));
    assert!(report(&back).failed.is_empty());
}

#[test]
fn what_has_changed_and_cannot_be_got_anew_is_tried_again_like_any_other() {
    let mut node = Node::serving();
    node.on(Event::Spoilt(key(2)));
    let failed = [(key(2), "the disk, too".to_owned())].into();
    let commands = node.on(Event::Loaded { held: keys(&[]), failed });
    assert_eq!(report(&commands).failed, [(key(2), "the disk, too".to_owned())].into());
    assert_eq!(loads(&node.tick_after(LOAD_RETRY_MS - 1)), None);
    assert_eq!(loads(&node.tick_after(1)), Some((&keys(&[2]), true)));
}

#[test]
fn a_registration_that_fails_is_repeated_after_pauses_that_double_up_to_a_second() {
    let mut node = Node::new();
    let mut pauses = Vec::new();
    for _ in 0..6 {
        assert_eq!(node.on(Event::Broken { fenced: false }), []);
        let before = node.now_ms;
        while node.tick_after(100) != [Command::Register] {}
        pauses.push(node.now_ms - before);
    }
    assert_eq!(pauses, [100, 200, 400, 800, 1_000, 1_000]);
}

#[test]
fn what_is_wanted_is_loaded_and_told_and_the_node_is_ready_once_it_is_active() {
    let mut node = Node::connected();
    let commands = node.order(1, &[2, 5]);
    assert_eq!(loads(&commands), Some((&keys(&[2, 5]), false)));
    assert_eq!(loads(&node.order(1, &[2, 5])), None, "it is under way");
    let commands = node.load(&[2, 5]);
    assert_eq!(commands[0], Command::Progress { held: 2, wanted: 2 });
    assert_eq!(report(&commands).held, Some(keys(&[2, 5])));
    assert_eq!(report(&node.tick_after(100)).held, None, "it is as told before");
    assert_eq!(node.commit(1, &[2, 5], None), [], "joining");
    assert_eq!(node.commit(1, &[2, 5], Some(Incarnation(6))), [], "another start is active");
    assert_eq!(node.commit(1, &[2, 5], Some(START)), [Command::Ready]);
    assert_eq!(node.commit(1, &[2, 5], Some(START)), [], "ready once");
}

#[test]
fn a_node_of_which_nothing_is_wanted_is_ready_once_it_is_active() {
    let mut node = Node::connected();
    assert_eq!(node.order(0, &[]), []);
    assert_eq!(node.commit(0, &[], None), []);
    assert_eq!(node.commit(0, &[], Some(START)), [Command::Ready]);
}

#[test]
fn a_node_that_serves_loads_experts_one_by_one() {
    let mut node = Node::serving();
    let commands = node.order(1, &[0, 1, 2, 3, 8, 9]);
    assert_eq!(loads(&commands), Some((&keys(&[8]), true)));
    assert_eq!(loads(&node.load(&[8])), Some((&keys(&[9]), true)));
    assert_eq!(loads(&node.load(&[9])), None);
}

#[test]
fn orders_that_would_release_what_is_placed_are_not_obeyed() {
    let mut node = Node::serving();
    assert_eq!(node.order(1, &[0]), []);
    assert_eq!(node.commit(1, &[0, 1], Some(START)), [Command::Release(keys(&[2, 3]))]);
    assert_eq!(report(&node.tick_after(100)).held, Some(keys(&[0, 1])));
}

#[test]
fn nothing_is_released_before_the_committed_state_is_known() {
    let mut node = Node::connected();
    node.order(1, &[0, 1]);
    node.load(&[0, 1]);
    assert_eq!(node.order(1, &[0]), []);
    assert_eq!(node.commit(1, &[0], None), [Command::Release(keys(&[1]))]);
}

#[test]
fn nothing_is_released_while_orders_and_the_committed_placement_are_of_different_epochs() {
    let mut node = Node::serving();
    assert_eq!(node.order(2, &[0]), [], "the state that the node has seen is old");
    assert_eq!(node.commit(3, &[0], Some(START)), [], "the orders are old");
    assert_eq!(node.order(3, &[0, 1]), [Command::Release(keys(&[2, 3]))]);
}

#[test]
fn an_expert_that_cannot_be_loaded_is_told_once_a_stream_and_tried_again_later() {
    let mut node = Node::connected();
    node.order(1, &[0, 1]);
    let failed = BTreeMap::from([(key(1), "unreadable".to_owned())]);
    let commands = node.on(Event::Loaded { held: keys(&[0]), failed: failed.clone() });
    assert_eq!(report(&commands).failed, failed);
    assert_eq!(loads(&commands), None);
    assert_eq!(report(&node.tick_after(100)).failed, BTreeMap::new());
    node.on(Event::Broken { fenced: false });
    assert_eq!(report(&node.tick_after(200)).failed, failed, "the next leader has not heard");
    node.on(Event::Connected);
    assert_eq!(loads(&node.tick_after(9_000)), None);
    assert_eq!(loads(&node.tick_after(2_000)), Some((&keys(&[1]), false)));
}

#[test]
fn a_fenced_node_registers_anew_and_keeps_what_it_holds() {
    let mut node = Node::serving();
    assert_eq!(node.on(Event::Broken { fenced: true }), []);
    assert_eq!(node.tick_after(50), []);
    assert_eq!(node.tick_after(50), [Command::Register]);
    let commands = node.register(Incarnation(9));
    assert_eq!(commands[0], Command::Adopt(Incarnation(9)));
    assert_eq!(report(&commands).held, Some(keys(&[0, 1, 2, 3])));
    assert_eq!(report(&commands).incarnation, Incarnation(9));
}

#[test]
fn a_stream_that_breaks_is_opened_again_and_told_everything() {
    let mut node = Node::serving();
    node.tick_after(100);
    node.on(Event::Broken { fenced: false });
    let commands = node.tick_after(100);
    assert!(matches!(commands[..], [Command::Connect(_)]), "{commands:?}");
    let first = report(&commands);
    assert_eq!((first.sequence, &first.held), (1, &Some(keys(&[0, 1, 2, 3]))));
}

#[test]
fn a_leader_that_is_silent_is_sought_anew() {
    let mut node = Node::serving();
    for _ in 0..5 {
        report(&node.tick_after(100));
    }
    let commands = node.tick_after(100);
    assert!(matches!(commands[..], [Command::Connect(_)]), "{commands:?}");
    assert_eq!(node.tick_after(1_000), [], "the call is under way");
}

#[test]
fn rows_are_told_once_a_second() {
    let mut node = Node::serving();
    let mut told = 0;
    for _ in 0..50 {
        let commands = node.tick_after(100);
        told += u64::from(report(&commands).with_rows);
        node.order(1, &[0, 1, 2, 3]);
    }
    assert_eq!(told, 5);
}

#[test]
fn a_node_that_leaves_says_so_and_stops_once_an_answer_to_that_dismisses_it() {
    let mut node = Node::serving();
    let dismissal = |sequence| {
        let dismissed = true;
        let placement_epoch = PlacementEpoch(1);
        Event::Orders(Orders { sequence, placement_epoch, dismissed, wanted: None })
    };
    assert_eq!(node.on(dismissal(1)), [], "it does not want to stop");
    let commands = node.on(Event::Leave);
    assert!(report(&commands).leaving);
    let told = report(&commands).sequence;
    assert_eq!(node.on(dismissal(told - 1)), [], "said before the leader could know");
    assert_eq!(node.on(dismissal(told)), [Command::Stop]);
}

#[test]
fn leaving_ends_at_its_deadline_whatever_the_leader_does() {
    let mut node = Node::serving();
    node.on(Event::Leave);
    node.on(Event::Broken { fenced: false });
    assert!(!node.tick_after(29_999).contains(&Command::Stop));
    assert_eq!(node.tick_after(1), [Command::Stop]);
}

#[test]
fn a_node_that_was_never_let_in_leaves_at_once() {
    assert_eq!(Node::new().on(Event::Leave), [Command::Stop]);
}

/// Events in any order, such as no leader would send them.
#[test]
fn whatever_comes_nothing_placed_is_released_and_no_two_things_are_under_way() {
    for seed in 1..=200_u64 {
        let mut random = seed;
        let mut draw = move |below: u64| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random % below
        };
        let mut node = Node::new();
        let (mut placed, mut calls, mut loading) = (None::<BTreeSet<ExpertKey>>, 1, None);
        for _ in 0..500 {
            let some = |draw: &mut dyn FnMut(u64) -> u64| {
                (0..6).filter(|_| draw(2) == 0).map(|e| key(e as u16)).collect::<BTreeSet<_>>()
            };
            node.now_ms += draw(200);
            let placement_epoch = PlacementEpoch(draw(3));
            let event = match draw(7) {
                0 if calls > 0 => Event::Registered { node: NODE, incarnation: START },
                1 if calls > 0 && node.session.start.is_some() => Event::Connected,
                2 => Event::Broken { fenced: draw(2) == 0 },
                3 => {
                    let wanted = Some(some(&mut draw));
                    Event::Orders(Orders { placement_epoch, wanted, ..Orders::default() })
                }
                4 => {
                    let now = some(&mut draw);
                    placed = Some(now.clone());
                    Event::Committed(Committed { placement_epoch, placed: now, active: None })
                }
                5 if loading.is_some() => {
                    let held = loading.take().unwrap_or_default();
                    Event::Loaded { held, failed: BTreeMap::new() }
                }
                _ => Event::Tick,
            };
            if matches!(event, Event::Registered { .. } | Event::Connected | Event::Broken { .. }) {
                calls = 0;
            }
            for command in node.on(event) {
                match command {
                    Command::Register | Command::Connect(_) => {
                        calls += 1;
                        assert_eq!(calls, 1, "seed {seed}: two calls are under way");
                    }
                    Command::Load { experts, .. } => {
                        let before = loading.replace(experts);
                        assert_eq!(before, None, "seed {seed}: two loads are under way");
                    }
                    Command::Release(released) => {
                        let placed = placed.as_ref().expect("nothing is known to be placed");
                        assert!(released.is_disjoint(placed), "seed {seed}: {released:?}");
                    }
                    _ => {}
                }
            }
        }
    }
}
