//! What the state machine accepts, what it refuses, and what it looks like as bytes.

use entente_proto::ids::{ExpertId, LayerId};

use super::*;

fn spec(name: &str) -> NodeSpec {
    NodeSpec {
        name: name.parse().unwrap(),
        region: "fr".parse().unwrap(),
        site: String::new(),
        role: Role::ExpertNode,
        address: "127.0.0.1:1".to_owned(),
        memory_bytes: None,
        kernel_class: String::new(),
        device: None,
    }
}

fn coordinator(name: &str) -> NodeSpec {
    NodeSpec { role: Role::Coordinator, ..spec(name) }
}

fn founded() -> State {
    let mut state = State::new();
    state.apply(Command::Found(vec![spec("b"), spec("a")])).unwrap();
    state
}

fn placed_on(id: u32) -> Command {
    let mut placement = Placement::new();
    placement.add((LayerId(0), ExpertId(0)), NodeId(id));
    Command::SetPlacement(placement)
}

fn put(key: &str, value: &'static str, revision: Option<u64>) -> Command {
    let (kind, value) = (RecordKind::Tenant, Bytes::from_static(value.as_bytes()));
    Command::PutRecord { kind, key: key.to_owned(), value, revision }
}

/// A state behind the log's door, with the index that comes next.
struct Log(State);

impl Log {
    fn apply(&mut self, request: Request) -> Outcome {
        let index = self.0.applied_index() + 1;
        self.0.apply_entry(index, Some(request)).unwrap().unwrap()
    }

    fn session(&mut self) -> SessionId {
        match self.apply(request(SessionId(0), 0, Command::OpenSession)) {
            Ok(Applied::Session(session)) => session,
            other => panic!("no session but {other:?}"),
        }
    }
}

fn request(session: SessionId, sequence: u64, command: Command) -> Request {
    Request { session, sequence, at_ms: 1_000, expect: Expect::default(), command }
}

#[test]
fn a_cluster_is_founded_with_active_nodes_numbered_by_name_at_epoch_1() {
    let state = founded();
    let got: Vec<_> = state.nodes().map(|n| (n.id.0, n.spec.name.as_str(), n.state)).collect();
    assert_eq!(got, [(0, "a", NodeState::Active), (1, "b", NodeState::Active)]);
    assert_eq!(state.membership_epoch(), MembershipEpoch(1));
    assert_eq!(state.placement_epoch(), PlacementEpoch(0));
}

#[test]
fn founding_coordinators_and_witnesses_become_voters_in_order_of_name() {
    let mut state = State::new();
    let witness = NodeSpec { role: Role::Witness, ..spec("c") };
    state.apply(Command::Found(vec![witness, spec("b"), coordinator("a")])).unwrap();
    let got: Vec<_> = state.voters().map(|(id, voter)| (id.0, voter.node.0)).collect();
    assert_eq!(got, [(1, 0), (2, 2)]);
    assert_eq!(state.apply(Command::MintVoter(NodeId(0))), Ok(Applied::Voter(VoterId(3))));
    let refused = state.apply(Command::MintVoter(NodeId(1))).unwrap_err();
    assert_eq!(refused.code, RefusedCode::DoesNotVote);
}

#[test]
fn each_change_raises_one_epoch_by_one() {
    let mut state = founded();
    assert_eq!(state.apply(placed_on(1)), Ok(Applied::Placement(PlacementEpoch(1))));
    assert_eq!(state.apply(Command::AddNode(spec("c"))), Ok(Applied::Added(NodeId(2))));
    let active = Command::SetState(NodeId(2), NodeState::Active);
    assert_eq!(state.apply(active), Ok(Applied::Membership(MembershipEpoch(3))));
}

#[test]
fn an_incarnation_is_never_handed_out_twice() {
    let mut state = founded();
    let minted = [0, 1, 0].map(|id| state.apply(Command::Register(NodeId(id))).unwrap());
    let expected = [1, 2, 3].map(|i| Applied::Registered(Incarnation(i)));
    assert_eq!(minted, expected);
    assert_eq!(state.nodes[&NodeId(0)].state, NodeState::Joining);
}

#[test]
fn what_is_refused_names_the_cause_and_changes_nothing() {
    let mut state = founded();
    state.apply(placed_on(0)).unwrap();
    state.apply(Command::SetState(NodeId(0), NodeState::Down)).unwrap();
    state.apply(Command::SetState(NodeId(1), NodeState::Down)).unwrap();
    state.apply(Command::SetState(NodeId(1), NodeState::Removed)).unwrap();
    state.apply(Command::AddNode(coordinator("c"))).unwrap();
    state.apply(Command::AddNode(spec("d"))).unwrap();
    state.apply(Command::Cordon(NodeId(3), true)).unwrap();
    let long = "x".repeat(TEXT_LEN_MAX + 1);
    let device = NodeDevice {
        name: "GPU".to_owned(),
        uuid: long.clone(),
        memory_bytes: 1,
        bandwidth_bytes_s: 0,
    };
    let with_device = NodeSpec { device: Some(device.clone()), ..spec("e") };
    let registered = Command::RegisterWith {
        node: NodeId(0),
        address: "h:1".to_owned(),
        memory_bytes: None,
        kernel_class: String::new(),
        device: Some(device),
    };
    let cases = [
        (Command::Found(Vec::new()), "founded already"),
        (Command::AddNode(spec("b")), "node b is, or was, a member already"),
        (Command::AddNode(NodeSpec { site: long, ..spec("e") }), "site has 261 bytes"),
        (Command::AddNode(with_device), "UUID of its device has 261 bytes"),
        (registered, "UUID of its device has 261 bytes"),
        (Command::Register(NodeId(9)), "node 9 is not a member"),
        (Command::Register(NodeId(1)), "cannot become Joining"),
        (Command::SetState(NodeId(0), NodeState::Active), "is Down and cannot become Active"),
        (Command::SetState(NodeId(0), NodeState::Removed), "has 1 replicas placed on it"),
        (placed_on(1), "names node 1"),
        (placed_on(2), "names node 2"),
        (placed_on(9), "names node 9"),
        (placed_on(3), "node d takes no new replicas: Joining, cordoned: true"),
        (put("", "v", None), "the key of a record has 0 bytes"),
        (put("k", "v", Some(7)), "\"k\" is at revision 0, not 7"),
        (Command::SetReplicas("fr".parse().unwrap(), 17), "more than 16 replicas"),
    ];
    for (command, cause) in cases {
        let before = state.clone();
        let refused = state.apply(command).unwrap_err().to_string();
        assert!(refused.contains(cause), "{refused} does not say {cause}");
        assert_eq!(state, before);
    }
    let early = State::new().apply(Command::Register(NodeId(0))).unwrap_err();
    assert_eq!(early.code, RefusedCode::NotFounded);
}

#[test]
fn a_placement_may_keep_a_replica_where_it_could_not_put_one() {
    let mut state = founded();
    state.apply(placed_on(0)).unwrap();
    state.apply(Command::SetState(NodeId(0), NodeState::Down)).unwrap();
    assert_eq!(state.apply(placed_on(0)), Ok(Applied::Placement(PlacementEpoch(2))));
}

#[test]
fn a_repeated_command_is_applied_once_and_told_the_same() {
    let mut log = Log(founded());
    let session = log.session();
    let accepted = log.apply(request(session, 1, Command::Register(NodeId(0))));
    assert_eq!(accepted, Ok(Applied::Registered(Incarnation(1))));
    assert_eq!(log.apply(request(session, 1, Command::Register(NodeId(0)))), accepted);
    let refused = log.apply(request(session, 2, put("k", "v", Some(1))));
    log.apply(request(session, 2, Command::Register(NodeId(0)))).unwrap_err();
    assert_eq!(log.apply(request(session, 2, put("k", "v", None))), refused);
    assert_eq!(log.0.incarnations_minted(), 1);
    let past = log.apply(request(session, 1, Command::Register(NodeId(0)))).unwrap_err();
    assert_eq!(past.code, RefusedCode::Superseded);
}

#[test]
fn a_forgotten_session_is_refused_rather_than_applied_again() {
    let mut log = Log(founded());
    let first = log.session();
    log.apply(request(first, 1, Command::Register(NodeId(0)))).unwrap();
    for _ in 0..session::SESSIONS_MAX {
        log.session();
    }
    let late = log.apply(request(first, 1, Command::Register(NodeId(0)))).unwrap_err();
    assert_eq!(late.code, RefusedCode::SessionExpired);
    assert_eq!(log.0.incarnations_minted(), 1);
}

#[test]
fn a_fenced_command_is_refused() {
    let mut log = Log(founded());
    let session = log.session();
    log.apply(request(session, 1, Command::Register(NodeId(0)))).unwrap();
    log.apply(request(session, 2, Command::Register(NodeId(0)))).unwrap();
    let cases = [
        (
            Expect { incarnation: Some((NodeId(0), Incarnation(1))), ..Expect::default() },
            "incarnation 1 of node 0 is fenced; its latest is 2",
        ),
        (
            Expect { membership_epoch: Some(MembershipEpoch(2)), ..Expect::default() },
            "decided on membership epoch 2; it is 3 now",
        ),
        (
            Expect { placement_epoch: Some(PlacementEpoch(1)), ..Expect::default() },
            "decided on placement epoch 1; it is 0 now",
        ),
    ];
    for (sequence, (expect, cause)) in (3..).zip(cases) {
        let command = Command::SetState(NodeId(0), NodeState::Active);
        let stale = Request { expect, ..request(session, sequence, command) };
        assert_eq!(log.apply(stale).unwrap_err().to_string(), cause);
    }
    let expect = Expect {
        incarnation: Some((NodeId(0), Incarnation(2))),
        membership_epoch: Some(MembershipEpoch(3)),
        placement_epoch: Some(PlacementEpoch(0)),
    };
    let command = Command::SetState(NodeId(0), NodeState::Active);
    log.apply(Request { expect, ..request(session, 9, command) }).unwrap();
}

#[test]
fn whoever_wakes_up_two_epochs_late_changes_nothing_with_10_000_proposals() {
    let mut log = Log(founded());
    let session = log.session();
    let slept = Expect {
        incarnation: None,
        membership_epoch: Some(log.0.membership_epoch()),
        placement_epoch: None,
    };
    let before = Some((NodeId(0), Incarnation(1)));
    for (sequence, command) in
        [Command::Register(NodeId(0)), Command::Register(NodeId(0)), placed_on(1)]
            .into_iter()
            .enumerate()
    {
        log.apply(request(session, sequence as u64 + 1, command)).unwrap();
    }
    let awake = log.0.clone();
    for sequence in 10..10_010 {
        let command = match sequence % 4 {
            0 => Command::SetState(NodeId(0), NodeState::Active),
            1 => Command::Cordon(NodeId(1), true),
            2 => placed_on(0),
            _ => put("tenant", "late", None),
        };
        // Half of them are of the coordinator that slept, half of a start of a node that is over.
        let node = Expect { incarnation: before, ..Expect::default() };
        let expect = if sequence % 8 < 4 { slept } else { node };
        let outcome = log.apply(Request { expect, ..request(session, sequence, command) });
        assert!(outcome.is_err(), "proposal {sequence}");
    }
    assert_ne!(log.0.encode(), awake.encode());
    assert_eq!(log.0.agreed_sha256(), awake.agreed_sha256());
    log.apply(request(session, 10_010, Command::Cordon(NodeId(1), true))).unwrap();
    assert_ne!(log.0.agreed_sha256(), awake.agreed_sha256());
}

#[test]
fn entries_are_applied_one_by_one() {
    let mut state = founded();
    state.apply_entry(1, None).unwrap();
    for index in [1, 3] {
        assert_eq!(state.apply_entry(index, None), Err(OutOfOrder { index, applied: 1 }));
    }
}

#[test]
fn the_state_marks_its_hash_now_and_then() {
    let (mut one, mut other) = (founded(), founded());
    other.apply(Command::Register(NodeId(0))).unwrap();
    for index in 1..=5 * MARK_INTERVAL {
        one.apply_entry(index, None).unwrap();
        other.apply_entry(index, None).unwrap();
    }
    let indices: Vec<_> = one.marks().map(|mark| mark.index / MARK_INTERVAL).collect();
    assert_eq!(indices, [2, 3, 4, 5]);
    assert!(one.marks().zip(other.marks()).all(|(a, b)| a.sha256 != b.sha256));
}

/// A state in which every list has something.
fn full() -> State {
    let mut log = Log(State::new());
    let specs = vec![coordinator("c"), spec("a"), spec("b")];
    log.0.apply(Command::Found(specs)).unwrap();
    let session = log.session();
    let commands = [
        placed_on(1),
        Command::Register(NodeId(0)),
        Command::RegisterWith {
            node: NodeId(1),
            address: "10.0.0.1:7".to_owned(),
            memory_bytes: Some(1 << 40),
            kernel_class: "bf16/cuda-sm90/1".to_owned(),
            device: Some(NodeDevice {
                name: "GPU".to_owned(),
                uuid: "GPU-1".to_owned(),
                memory_bytes: 1 << 41,
                bandwidth_bytes_s: 3_350_000_000_000,
            }),
        },
        Command::Cordon(NodeId(1), true),
        Command::SetReplicas("se".parse().unwrap(), 2),
        put("k", "v", None),
        put("l", "w", Some(0)),
        Command::DeleteRecord { kind: RecordKind::Tenant, key: "k".to_owned(), revision: None },
        Command::MintVoter(NodeId(2)),
        Command::AddNode(spec("d")),
        put("k", "v", Some(77)),
    ];
    for (sequence, command) in (1..).zip(commands) {
        let request = request(session, sequence, command);
        let again = Request::decode(&request.encode()).unwrap();
        assert_eq!(again, request);
        let _ = log.apply(again);
    }
    log.0.retire_voter(VoterId(1));
    while log.0.applied_index() < MARK_INTERVAL {
        log.0.apply_entry(log.0.applied_index() + 1, None).unwrap();
    }
    log.0
}

#[test]
fn a_snapshot_is_the_state_that_it_was_taken_of() {
    let state = full();
    assert_eq!(State::unseal(&state.seal()), Ok(state));
}

#[test]
fn a_snapshot_with_any_byte_changed_is_refused() {
    let sealed = full().seal();
    for position in 0..sealed.len() {
        let mut spoilt = sealed.to_vec();
        spoilt[position] ^= 1 << (position % 8);
        assert!(State::unseal(&spoilt).is_err(), "a change of byte {position} went unnoticed");
    }
}

#[test]
fn a_state_in_another_encoding_is_refused() {
    let mut bytes = full().encode();
    // The first element again, with the values that it has: the same state, other bytes.
    let first_len = 1 + usize::from(bytes[0]);
    bytes.extend_from_within(..first_len);
    assert_eq!(State::decode(&bytes), Err(codec::Malformed::NotCanonical));
}
