//! The queue and the thread behind it, with kernels that can be told to wait, count and panic.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{LazyLock, Mutex};
use std::time::Duration;

use entente_model::kernels::{
    Activation, GatedFfn, Kernels, Matrix, MatrixSource, SourceDtype, WeightFormat, select,
};
use entente_proto::frame::{Assignment, Dtype};
use entente_proto::ids::{
    ExchangeId, Fence, Incarnation, KernelClass, LayerId, MembershipEpoch, ModelDigest,
    PlacementEpoch, RequestId,
};

use super::*;
use crate::store::ExpertStore;

const HIDDEN: usize = 4;
/// A row that starts with this makes the kernels panic.
const POISON: f32 = 666.0;

/// A row that starts with this makes the device fail, whatever else is asked of it then.
const FATAL: f32 = 667.0;

/// Real kernels that count calls, can be held up, panic at a poisonous row and fail at a
/// fatal one.
struct Fragile {
    real: Arc<dyn Kernels>,
    calls: AtomicUsize,
    held_up: Mutex<()>,
}

impl ExpertKernels for Fragile {
    fn class(&self) -> &KernelClass {
        self.real.class()
    }

    fn format(&self) -> WeightFormat {
        self.real.format()
    }

    fn row_dtype(&self) -> Dtype {
        self.real.row_dtype()
    }

    fn pack(&self, source: MatrixSource<'_>) -> Result<Matrix, DeviceError> {
        self.real.pack(source)
    }

    fn place(&self, matrix: Matrix) -> Result<Matrix, DeviceError> {
        self.real.place(matrix)
    }

    fn gated_ffn_encoded(
        &self,
        x: &[&[u8]],
        groups: &[FfnGroup<'_>],
        y: &mut [u8],
    ) -> Result<(), DeviceError> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        drop(self.held_up.lock());
        let any = |value: f32| x.iter().any(|row| row.starts_with(&value.to_le_bytes()));
        assert!(!any(POISON), "poison, as the test wants it");
        if any(FATAL) {
            return Err(DeviceError::Lost("as the test wants it".to_owned()));
        }
        self.real.gated_ffn_encoded(x, groups, y)
    }
}

/// Two experts in each of two layers, with weights that differ.
static STORE: LazyLock<ExpertStore> = LazyLock::new(|| {
    let real = select(WeightFormat::F32, 1).unwrap();
    let matrix = |seed: usize| {
        let weight = |i| ((i * 7 + seed * 13) % 11) as f32 / 11.0 - 0.4;
        let bytes: Vec<u8> =
            (0..HIDDEN * HIDDEN).map(weight).flat_map(|v: f32| v.to_le_bytes()).collect();
        let (out_features, in_features, dtype) = (HIDDEN, HIDDEN, SourceDtype::F32);
        real.pack(MatrixSource { out_features, in_features, dtype, bytes: &bytes, scales: None })
            .unwrap()
    };
    let expert = |seed| GatedFfn {
        gate: matrix(seed),
        up: matrix(seed + 1),
        down: matrix(seed + 2),
        activation: Activation::SwiGlu,
    };
    let keys = [(0, 0), (0, 1), (1, 0), (1, 1)];
    let store = ExpertStore::default();
    store.hold(
        keys.iter()
            .enumerate()
            .map(|(seed, (layer, id))| ((LayerId(*layer), ExpertId(*id)), expert(seed)))
            .collect(),
        None,
    );
    store
});

fn start() -> (Queue, Arc<Fragile>) {
    let real = select(WeightFormat::F32, 1).unwrap();
    let fragile = Arc::new(Fragile { real, calls: AtomicUsize::new(0), held_up: Mutex::new(()) });
    (Queue::start(fragile.clone(), Arc::default(), Arc::default()).unwrap(), fragile)
}

/// A frame of two rows, both through both experts of the layer.
fn frame(exchange: u64, layer: u16, first_value: f32) -> Dispatch {
    let values: Vec<f32> = (0..2 * HIDDEN).map(|i| first_value + i as f32 * 0.1).collect();
    let mut rows = Vec::new();
    Dtype::F32.encode(&values, &mut rows);
    let pairs = [(0, 0), (0, 1), (1, 1), (1, 0)];
    Dispatch {
        exchange: ExchangeId(exchange),
        fence: Fence {
            membership_epoch: MembershipEpoch(1),
            placement_epoch: PlacementEpoch(1),
            incarnation: Incarnation(1),
            model_digest: ModelDigest([1; 32]),
        },
        layer: LayerId(layer),
        allowed_regions: ["fr".parse().unwrap()].into(),
        deadline_ms: 1_000,
        dtype: Dtype::F32,
        hidden: HIDDEN,
        assignments: pairs.map(|(row, e)| Assignment { row, expert: ExpertId(e) }).to_vec(),
        requests: vec![(RequestId(exchange.into()), 4)],
        rows: rows.into(),
    }
}

fn work(frame: Dispatch, answers: &Sender<Answer>) -> Work {
    let answers = answers.clone();
    let reply = Box::new(move |answer| answers.send(answer).unwrap());
    let experts = STORE.layer(frame.layer);
    Work { frame, experts, due: Instant::now() + Duration::from_secs(60), reply }
}

/// The answer to a frame that is computed on its own.
fn alone(queue: &Queue, frame: Dispatch) -> Answer {
    let (answers, received) = channel();
    assert!(queue.push(work(frame, &answers)).is_ok());
    received.recv_timeout(Duration::from_secs(10)).unwrap()
}

/// Runs `act` while the compute thread is stuck in a frame of its own.
fn while_held_up(queue: &Queue, fragile: &Fragile, act: impl FnOnce()) {
    let before = fragile.calls.load(Ordering::SeqCst);
    let hold = fragile.held_up.lock().unwrap();
    let (answers, received) = channel();
    assert!(queue.push(work(frame(0, 0, 9.0), &answers)).is_ok());
    while fragile.calls.load(Ordering::SeqCst) == before {
        std::thread::yield_now();
    }
    act();
    drop(hold);
    assert!(received.recv_timeout(Duration::from_secs(10)).unwrap().result.is_ok());
}

#[test]
fn waiting_frames_of_a_layer_are_computed_together_with_the_same_bits_as_alone() {
    let (queue, fragile) = start();
    let frames: Vec<Dispatch> =
        (1..=6).map(|i| frame(i, (i % 2) as u16, i as f32 * 0.01)).collect();
    let expected: Vec<Answer> = frames.iter().map(|f| alone(&queue, f.clone())).collect();
    let (answers, received) = channel();
    let before = fragile.calls.load(Ordering::SeqCst);
    while_held_up(&queue, &fragile, || {
        for frame in frames {
            assert!(queue.push(work(frame, &answers)).is_ok());
        }
    });
    let mut got: Vec<Answer> =
        (0..6).map(|_| received.recv_timeout(Duration::from_secs(10)).unwrap()).collect();
    got.sort_by_key(|answer| answer.exchange);
    assert_eq!(got, expected);
    // One call for the frame that held the thread up, and one for each layer.
    assert_eq!(fragile.calls.load(Ordering::SeqCst) - before, 3);
}

#[test]
fn a_frame_that_makes_the_kernels_panic_is_refused_and_no_other() {
    let (queue, fragile) = start();
    let expected = alone(&queue, frame(1, 0, 0.5));
    let (answers, received) = channel();
    while_held_up(&queue, &fragile, || {
        for (id, value) in [(1, 0.5), (2, POISON)] {
            assert!(queue.push(work(frame(id, 0, value), &answers)).is_ok());
        }
    });
    let first = received.recv_timeout(Duration::from_secs(10)).unwrap();
    let second = received.recv_timeout(Duration::from_secs(10)).unwrap();
    assert_eq!(first, expected);
    assert!(matches!(second.result, Err(Refusal::Invalid(_))), "{second:?}");
    assert_eq!(alone(&queue, frame(1, 0, 0.5)), expected, "the node lives on");
}

#[test]
fn a_device_that_fails_is_asked_nothing_more_and_every_frame_is_for_others_to_compute() {
    let (queue, fragile) = start();
    let (answers, received) = channel();
    let before = fragile.calls.load(Ordering::SeqCst);
    while_held_up(&queue, &fragile, || {
        // Two of the layer that fails, one of another layer behind them.
        for (id, layer, value) in [(1, 1, 0.5), (2, 1, FATAL), (3, 0, 0.5)] {
            assert!(queue.push(work(frame(id, layer, value), &answers)).is_ok());
        }
    });
    let refused: Vec<Answer> =
        (0..3).map(|_| received.recv_timeout(Duration::from_secs(10)).unwrap()).collect();
    assert!(refused.iter().all(|a| a.result == Err(Refusal::Draining)), "{refused:?}");
    assert_eq!(alone(&queue, frame(4, 0, 0.5)).result, Err(Refusal::Draining));
    assert_eq!(fragile.calls.load(Ordering::SeqCst) - before, 2, "held up once, failed once");
    let health = queue.0.worker.lock().unwrap().health.clone();
    let failure = health.failure().map(|error| error.to_string());
    assert_eq!(failure.as_deref(), Some("the device is lost: as the test wants it"));
}

#[test]
fn a_frame_whose_deadline_passed_in_the_queue_is_not_computed() {
    let (queue, fragile) = start();
    let (answers, received) = channel();
    let before = fragile.calls.load(Ordering::SeqCst);
    while_held_up(&queue, &fragile, || {
        let late = Work { due: Instant::now(), ..work(frame(1, 1, 0.5), &answers) };
        assert!(queue.push(late).is_ok());
    });
    let answer = received.recv_timeout(Duration::from_secs(10)).unwrap();
    assert_eq!(answer.result, Err(Refusal::Expired));
    assert_eq!(fragile.calls.load(Ordering::SeqCst) - before, 1);
}

#[test]
fn a_full_queue_takes_nothing_and_empties_again() {
    let (queue, fragile) = start();
    let (answers, received) = channel();
    while_held_up(&queue, &fragile, || {
        let taken = (0..2 * QUEUE_LEN_MAX as u64)
            .take_while(|id| queue.push(work(frame(*id, 0, 0.5), &answers)).is_ok());
        assert_eq!(taken.count(), QUEUE_LEN_MAX - 1, "one place is the frame in computation");
    });
    for _ in 0..QUEUE_LEN_MAX - 1 {
        assert!(received.recv_timeout(Duration::from_secs(10)).unwrap().result.is_ok());
    }
    // The last frame is given back just after its answer.
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(queue.idle());
    assert_eq!(*queue.0.load.borrow(), Load::default());
}

#[test]
fn a_caller_that_waits_computes_itself_unless_somebody_does() {
    let (queue, fragile) = start();
    let (answers, received) = channel();
    // The first frame of all: the queue's own thread has not begun to compute anything.
    assert!(queue.push_and_compute(work(frame(1, 0, 0.5), &answers)).is_ok());
    let answered = received.try_recv().expect("answered before the call returned");
    let expected = alone(&queue, frame(1, 0, 0.5));
    assert_eq!(answered, expected);
    while_held_up(&queue, &fragile, || {
        assert!(queue.push_and_compute(work(frame(1, 0, 0.5), &answers)).is_ok());
        assert!(received.try_recv().is_err(), "left to the thread that computes");
    });
    assert_eq!(received.recv_timeout(Duration::from_secs(10)).unwrap(), expected);
}

#[test]
fn a_frame_counts_as_unfinished_until_it_is_answered() {
    let (queue, _fragile) = start();
    let (seen, loads) = channel();
    let load = queue.0.load.clone();
    let reply = Box::new(move |_| seen.send(load.borrow().frames).unwrap());
    let (answers, _) = channel();
    assert!(queue.push(Work { reply, ..work(frame(1, 0, 0.5), &answers) }).is_ok());
    assert_eq!(loads.recv_timeout(Duration::from_secs(10)), Ok(1));
}
