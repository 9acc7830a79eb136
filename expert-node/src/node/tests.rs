//! What changes while frames come: the experts held, the epochs seen.

use std::sync::atomic::AtomicUsize;
use std::sync::mpsc::channel;

use entente_membership::roster::{Roster, RosterNode};
use entente_model::kernels::{self, WeightFormat};
use entente_proto::frame::{Assignment, Dtype};
use entente_proto::ids::{ExchangeId, ExpertId, LayerId, RequestId};

use super::*;

const CHECKPOINT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/mixtral");
const HIDDEN: usize = 64;
const EXPERTS: u16 = 8;
const PATIENCE: Duration = Duration::from_secs(20);

/// One node that holds everything.
fn load() -> NodeHandle {
    let (name, region): (NodeName, Region) = ("solo".parse().unwrap(), "fr".parse().unwrap());
    let address = "127.0.0.1:1".to_owned();
    let listed = RosterNode { name: name.clone(), region, address: address.clone() };
    let roster = Roster::new("test".to_owned(), 1, vec![listed]).unwrap();
    let mut config =
        Config::new(name, region, address, CHECKPOINT.into(), WeightFormat::F32, roster);
    config.threads = Some(1);
    ExpertNode::load(&config, &()).unwrap()
}

/// Four rows of layer 0, each through four experts that differ from frame to frame.
fn frame(node: &NodeHandle, number: u64) -> Dispatch {
    let value = |i: usize| ((i as f32 + number as f32) * 0.37).sin();
    let values: Vec<f32> = (0..4 * HIDDEN).map(value).collect();
    let mut rows = Vec::new();
    Dtype::F32.encode(&values, &mut rows);
    let expert = |row: u16, n: u16| ExpertId((row * 3 + n * 2 + number as u16) % EXPERTS);
    let assignments = (0..4)
        .flat_map(|row| (0..4).map(move |n| Assignment { row, expert: expert(row, n) }))
        .collect();
    Dispatch {
        exchange: ExchangeId(number),
        fence: node.info().fence,
        layer: LayerId(0),
        allowed_regions: ["fr".parse().unwrap()].into(),
        deadline_ms: 20_000,
        dtype: Dtype::F32,
        hidden: HIDDEN,
        assignments,
        requests: vec![(RequestId(number.into()), 16)],
        rows: rows.into(),
    }
}

fn ask(node: &NodeHandle, frame: Dispatch, waits: bool) -> Answer {
    let (answers, received) = channel();
    let reply: Reply = Box::new(move |answer| answers.send(answer).unwrap());
    if waits {
        node.compute(frame, reply)
    } else {
        node.submit(frame, reply)
    }
    received.recv_timeout(PATIENCE).unwrap()
}

#[test]
fn frames_get_the_same_bits_or_not_held_while_experts_are_loaded_and_released_200_times() {
    let node = load();
    let frames: Vec<Dispatch> = (0..8).map(|number| frame(&node, number)).collect();
    let expected: Vec<Answer> = frames.iter().map(|f| ask(&node, f.clone(), true)).collect();
    assert!(expected.iter().all(|answer| answer.result.is_ok()));
    let checkpoint = Checkpoint::open(CHECKPOINT.as_ref()).unwrap();
    let kernels = kernels::select(WeightFormat::F32, 1).unwrap();
    let (done, computed) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for sender in 0..2 {
            let (node, frames, expected, done, computed) =
                (&node, &frames, &expected, &done, &computed);
            scope.spawn(move || {
                for (frame, expected) in frames.iter().zip(expected).cycle() {
                    if done.load(Ordering::Relaxed) {
                        return;
                    }
                    let answer = ask(node, frame.clone(), sender == 0);
                    match answer.result {
                        Ok(_) => {
                            assert_eq!(&answer, expected);
                            computed.fetch_add(1, Ordering::Relaxed);
                        }
                        Err(refusal) => assert!(matches!(refusal, Refusal::NotHeld(_))),
                    }
                }
            });
        }
        for turn in 0..200_u16 {
            let some = (0..3).map(|n| (LayerId(0), ExpertId((turn + n * 2) % EXPERTS))).collect();
            node.release(&some);
            let asked = ask(&node, frames[usize::from(turn % 8)].clone(), true);
            assert!(matches!(asked.result, Err(Refusal::NotHeld(_))), "turn {turn}: {asked:?}");
            node.hold(load_experts(&checkpoint, kernels.as_ref(), &some, &()).unwrap());
            let at = usize::from(turn % 8);
            assert_eq!(ask(&node, frames[at].clone(), true), expected[at], "turn {turn}");
            let (before, since) = (computed.load(Ordering::Relaxed), Instant::now());
            while computed.load(Ordering::Relaxed) == before {
                assert!(since.elapsed() < PATIENCE, "turn {turn}: nobody else gets an answer");
                std::thread::yield_now();
            }
        }
        done.store(true, Ordering::Relaxed);
    });
}

#[test]
fn a_frame_is_computed_though_its_experts_are_released_before_its_turn() {
    let node = load();
    let asked = frame(&node, 1);
    let expected = ask(&node, asked.clone(), true);
    let (answers, received) = channel();
    let (inner, all) = (node.clone(), node.info().experts);
    let first = answers.clone();
    // The thread that computes the first frame answers it from here: the next one is admitted and
    // waits, and is computed when everything is released.
    let reply: Reply = Box::new(move |answer| {
        first.send(answer).unwrap();
        inner.submit(asked, Box::new(move |answer| answers.send(answer).unwrap()));
        inner.release(&all);
    });
    node.submit(frame(&node, 0), reply);
    received.recv_timeout(PATIENCE).unwrap();
    assert_eq!(received.recv_timeout(PATIENCE).unwrap(), expected);
    assert_eq!(node.info().experts, BTreeSet::new());
}

#[test]
fn ten_thousand_frames_that_are_two_epochs_old_are_all_refused_and_change_nothing() {
    let node = load();
    let old = frame(&node, 0);
    let (membership, placement) = (old.fence.membership_epoch, old.fence.placement_epoch);
    node.saw(MembershipEpoch(membership.0 + 1), PlacementEpoch(placement.0 + 2));
    let before = node.info();
    node.take_rows();
    for _ in 0..10_000 {
        let answer = ask(&node, old.clone(), true);
        assert_eq!(answer.result, Err(Refusal::StaleFence(Box::new(before.fence))));
    }
    assert_eq!(node.info(), before);
    assert_eq!(node.take_rows(), []);
}

#[test]
fn a_frame_from_a_sender_that_is_ahead_is_computed_and_makes_older_ones_stale() {
    let node = load();
    let old = frame(&node, 0);
    let mut ahead = old.clone();
    ahead.fence.placement_epoch.0 += 2;
    assert!(ask(&node, ahead.clone(), true).result.is_ok());
    assert_eq!(node.info().fence, ahead.fence);
    assert!(matches!(ask(&node, old, true).result, Err(Refusal::StaleFence(_))));
}

#[test]
fn a_refused_frame_raises_no_epoch() {
    let node = load();
    let before = node.info();
    let mut bad = frame(&node, 0);
    bad.fence.membership_epoch.0 += 5;
    bad.hidden += 1;
    assert!(matches!(ask(&node, bad, true).result, Err(Refusal::Invalid(_))));
    assert_eq!(node.info(), before);
}

#[test]
fn rows_are_counted_for_each_expert_until_they_are_taken() {
    let node = load();
    let asked = frame(&node, 0);
    let mut expected: BTreeMap<ExpertKey, u64> = BTreeMap::new();
    for assignment in &asked.assignments {
        *expected.entry((LayerId(0), assignment.expert)).or_default() += 1;
    }
    assert!(ask(&node, asked, true).result.is_ok());
    assert_eq!(node.take_rows(), expected.into_iter().collect::<Vec<_>>());
    assert_eq!(node.take_rows(), []);
}

/// The golden checkpoint with a manifest of f32 weights.
#[test]
fn a_node_whose_device_failed_refuses_before_it_looks_at_what_it_holds() {
    let node = load();
    let good = frame(&node, 0);
    assert!(ask(&node, good.clone(), true).result.is_ok());
    node.health().fail(DeviceError::Lost("first".to_owned()));
    node.health().fail(DeviceError::Lost("second".to_owned()));
    assert_eq!(ask(&node, good.clone(), true).result, Err(Refusal::Draining));
    assert_eq!(ask(&node, good, false).result, Err(Refusal::Draining));
    assert_eq!(node.health().failure(), Some(DeviceError::Lost("first".to_owned())));
}

fn named() -> (tempfile::TempDir, Checkpoint, Arc<dyn kernels::Kernels>) {
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(CHECKPOINT).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
    }
    let kernels = kernels::select(WeightFormat::F32, 1).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let manifest = entente_model::packed::manifest(&checkpoint, &*kernels, &()).unwrap();
    manifest.write().unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    (dir, checkpoint, kernels)
}

#[test]
fn an_expert_in_memory_that_is_not_the_one_of_the_manifest_is_found_and_no_other() {
    let (_dir, checkpoint, kernels) = named();
    let node = |name: &str| {
        let (name, region) = (name.parse().unwrap(), "fr".parse().unwrap());
        ExpertNode::empty(&name, region, &checkpoint, kernels.clone()).unwrap()
    };
    let key = |expert| (LayerId(0), ExpertId(expert));
    let all: BTreeSet<ExpertKey> = (0..EXPERTS).map(key).collect();
    let load = || load_experts(&checkpoint, &*kernels, &all, &()).unwrap();
    let (sound, spoilt) = (node("sound"), node("spoilt"));
    sound.hold(load());
    let mut experts = load();
    // What memory holds for expert 5 is something else: the weights of expert 6.
    let bytes =
        |ffn: &GatedFfn| ffn.pieces(64).map(|piece| piece.unwrap()).collect::<Vec<_>>().concat();
    let six = bytes(&experts[&key(6)]);
    let other = load().remove(&key(6)).unwrap();
    assert_eq!(bytes(&other), six);
    experts.insert(key(5), other);
    spoilt.hold(experts);

    let (sender, told) = channel();
    let watch = |node: &NodeHandle| {
        let sender = sender.clone();
        let spoilt = move |key| sender.send(key).unwrap();
        crate::scrub::start(node.clone(), Duration::from_millis(40), spoilt).unwrap()
    };
    let _scrubs = [watch(&sound), watch(&spoilt)];
    assert_eq!(told.recv_timeout(PATIENCE), Ok(key(5)));
    assert_eq!(told.recv_timeout(PATIENCE), Ok(key(5)), "it is still there");
    let counts = spoilt.counters().read();
    assert!(counts.spoilt >= 2 && counts.scrubbed > u64::from(EXPERTS), "{counts:?}");
    let counts = sound.counters().read();
    assert!(counts.scrubbed > 0 && counts.spoilt == 0, "{counts:?}");
}

#[test]
fn a_scrub_ends_with_its_owner_and_holds_no_node_back() {
    let node = load();
    let scrub = crate::scrub::start(node.clone(), Duration::from_secs(3_600), |_| ()).unwrap();
    let alive = Arc::downgrade(&node.0);
    drop((scrub, node));
    let until = Instant::now() + PATIENCE;
    while alive.strong_count() > 0 {
        assert!(Instant::now() < until, "the node lives on");
        std::thread::sleep(Duration::from_millis(1));
    }
}
