//! An engine whose device fails.

use std::ops::Range;

use entente_membership::roster::{Roster, RosterNode};
use entente_model::kernels::{self, WeightFormat};
use entente_model::{Architecture, Checkpoint};
use entente_proto::ids::KernelClass;
use entente_router::view::{ClusterView, Model};

use super::cluster::{Cluster, committed};
use super::trunk::{Answers, Trunk, Wanted};
use super::*;
use crate::link::Links;

const CHECKPOINT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/mixtral");
const PATIENCE: Duration = Duration::from_secs(20);

/// A device that is lost when it is first asked for something.
struct Lost(KernelClass);

fn lost() -> DeviceError {
    DeviceError::Lost("it fell off the bus".to_owned())
}

impl Trunk for Lost {
    fn class(&self) -> &KernelClass {
        &self.0
    }

    fn begin(&mut self, _: &[Chunk], _: &[Range<usize>]) -> Result<(), DeviceError> {
        Err(lost())
    }

    fn attend(&mut self, _: usize, _: Range<usize>) -> Result<(), DeviceError> {
        Err(lost())
    }

    fn feed_forward(&mut self, _: usize, _: Range<usize>) -> Result<(), DeviceError> {
        Err(lost())
    }

    fn route(&mut self, _: usize, _: Range<usize>, _: &mut [u8]) -> Result<&[f32], DeviceError> {
        Err(lost())
    }

    fn add(&mut self, _: Range<usize>, _: &[f32]) -> Result<(), DeviceError> {
        Err(lost())
    }

    fn logits(&mut self, _: &[Wanted], _: &mut Answers) -> Result<(), DeviceError> {
        Err(lost())
    }
}

fn home() -> Region {
    "fr".parse().unwrap()
}

/// An exchanger that reaches nobody.
fn exchanger(checkpoint: &Checkpoint, kernels: Arc<dyn Kernels>) -> Exchanger {
    let node = RosterNode {
        name: "fr-expert-1".parse().unwrap(),
        region: home(),
        address: "127.0.0.1:1".to_owned(),
    };
    let roster = Roster::new("test".to_owned(), 1, vec![node]).unwrap();
    let state = entente_expert_node::found(&roster, checkpoint, WeightFormat::Bf16).unwrap();
    let model = Model {
        digest: checkpoint.digest(),
        kernel_class: kernels.class().clone(),
        layers: checkpoint.architecture().moe_layers().collect(),
    };
    let view = ClusterView::new(home(), model, committed(&state));
    let metrics = Arc::new(Metrics::new());
    let cluster = Cluster::fixed(Links::new().unwrap(), view, metrics.clone());
    Exchanger::new(cluster, kernels, PATIENCE, metrics)
}

fn engine() -> EngineHandle {
    let checkpoint = Checkpoint::open(CHECKPOINT.as_ref()).unwrap();
    let architecture: &Architecture = checkpoint.architecture();
    let kernels = kernels::select(WeightFormat::Bf16, 1).unwrap();
    let metrics = Arc::new(Metrics::new());
    let parts = Parts {
        scheduler: SchedulerConfig {
            step_rows_max: 64,
            prefill_rows_beside_decode_max: 64,
            running_max: 4,
            waiting_max: 4,
            tenant_waiting_max: 4,
            blocks: 64,
        },
        draft_tokens_max: 0,
        forward: Forward::new(
            architecture,
            Box::new(Lost(kernels.class().clone())),
            128,
            metrics.clone(),
        ),
        exchanger: exchanger(&checkpoint, kernels.clone()),
        kernels,
        tokenizer: Arc::new(Tokenizer::open(CHECKPOINT.as_ref(), architecture).unwrap()),
        request_wait_max: PATIENCE,
        closings: None,
        metrics,
    };
    Engine::start(parts).unwrap()
}

fn request() -> Request {
    Request {
        origin: Arc::new(Origin {
            allowed: [home()].into_iter().collect(),
            ..Origin::anonymous(home())
        }),
        prompt: vec![1, 2, 3],
        sampling: Sampling { temperature: 0.0, top_p: 1.0, top_k: 0, min_p: 0.0, seed: 0 },
        stop: StopConditions { max_tokens: 4, ..StopConditions::default() },
        logprobs: None,
        prompt_logprobs: None,
    }
}

/// Why a request is not served.
async fn refused(engine: &EngineHandle) -> String {
    let mut events = engine.submit(request()).unwrap();
    let event = tokio::time::timeout(PATIENCE, events.recv()).await.unwrap();
    let Some(Event::Failed(error)) = event else { panic!("{event:?}") };
    error.to_string()
}

#[tokio::test]
async fn a_lost_device_ends_the_engine_and_everybody_is_told() {
    let engine = engine();
    let told = "the server cannot go on: the device is lost: it fell off the bus";
    assert_eq!(refused(&engine).await, told);
    let mut failure = engine.failure();
    let failed = tokio::time::timeout(PATIENCE, failure.wait_for(Option::is_some)).await;
    assert_eq!(*failed.unwrap().unwrap(), Some(lost()));
    let waiting = Readiness::Waiting("the device is lost: it fell off the bus".to_owned());
    assert_eq!(*engine.readiness().borrow(), waiting);
    assert_eq!(refused(&engine).await, told, "whoever comes later is told as well");
}
