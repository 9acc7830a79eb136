//! The coordinator's part of a model on a device: the emulator of one, which runs the same kernels
//! and shows what they compute, not how fast.

use std::path::Path;

use entente_coordinator::config::{Config, EngineConfig};
use entente_coordinator::engine::sampler::ScoredToken;
use entente_coordinator::engine::{Event, Request};
use entente_cuda_emulator::stand_in;
use entente_model::kernels::{DeviceId, WeightFormat};
use safetensors::SafeTensors;
use tokio::sync::mpsc;

use crate::setup::*;

/// Largest difference of a log-probability from the reference, which has more bits.
const TOLERANCE: f32 = 2e-2;
/// What is likelier than the next by so much must be the reference's choice.
const MARGIN: f32 = 0.05;
const TOKENS: usize = 24;

/// What a request hears.
#[derive(Debug, Default, PartialEq)]
struct Heard {
    prompt: Vec<ScoredToken>,
    tokens: Vec<ScoredToken>,
}

impl Heard {
    /// To the end, which must be a good one.
    fn all(events: &mut mpsc::Receiver<Event>) -> Self {
        let mut heard = Self::default();
        loop {
            match events.blocking_recv() {
                Some(Event::Prompt(scores)) => heard.prompt.extend(scores.into_iter().flatten()),
                Some(Event::Token { score, .. }) => heard.tokens.extend(score),
                Some(Event::Finished { .. }) => return heard,
                other => panic!("{other:?}"),
            }
        }
    }
}

/// Prompts of several lengths: shorter than a block of the cache, longer than a window and a tile.
fn prompts() -> Vec<Vec<u32>> {
    let prompt = |len: u32| (0..len).map(|i| 3 + (i * 7 + len * 31) % 200).collect();
    [2, 17, 40, 150].map(prompt).into()
}

fn submit(engine: &Engine, prompt: &[u32]) -> mpsc::Receiver<Event> {
    let mut request = Request { prompt: prompt.to_vec(), ..request(0) };
    request.stop.max_tokens = TOKENS;
    engine.started.api.engine.submit(request).unwrap()
}

/// The requests one after the other.
fn alone(engine: &Engine) -> Vec<Heard> {
    prompts().iter().map(|prompt| Heard::all(&mut submit(engine, prompt))).collect()
}

/// All requests at once.
fn together(engine: &Engine) -> Vec<Heard> {
    let mut all: Vec<_> = prompts().iter().map(|prompt| submit(engine, prompt)).collect();
    all.iter_mut().map(Heard::all).collect()
}

/// The same on a device, which has little memory.
fn on_device(config: Config) -> Config {
    stand_in::load();
    let engine = EngineConfig { kv_cache_mib: Some(8), ..config.engine };
    Config { device: DeviceId::Cuda(0), engine, ..config }
}

/// A prompt with what the reference implementation makes of it, in f32.
struct Case {
    prompt: Vec<u32>,
    /// Log-probability of each token but the first.
    scores: Vec<f32>,
    greedy: Vec<u32>,
}

fn golden(dir: &Path) -> Vec<Case> {
    let text = std::fs::read_to_string(dir.join("expected.json")).unwrap();
    let expected: serde_json::Value = serde_json::from_str(&text).unwrap();
    let bytes = std::fs::read(dir.join("expected.safetensors")).unwrap();
    let logits = SafeTensors::deserialize(&bytes).unwrap();
    let ids = |value: &serde_json::Value| -> Vec<u32> {
        value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
    };
    let case = |(number, case): (usize, &serde_json::Value)| {
        let prompt = ids(&case["prompt_ids"]);
        let logits = logits.tensor(&format!("logits.{number}")).unwrap();
        let vocab = logits.shape()[1];
        let words = logits.data().as_chunks::<4>().0.iter();
        let logits: Vec<f32> = words.map(|word| f32::from_le_bytes(*word)).collect();
        let rows = logits.chunks_exact(vocab).zip(&prompt[1..]);
        let scores = rows.map(|(row, id)| row[*id as usize] - log_sum_exp(row)).collect();
        Case { prompt, scores, greedy: ids(&case["greedy_ids"]) }
    };
    expected["cases"].as_array().unwrap().iter().enumerate().map(case).collect()
}

fn log_sum_exp(row: &[f32]) -> f32 {
    let sum: f64 = row.iter().map(|logit| f64::from(*logit).exp()).sum();
    sum.ln() as f32
}

/// The tokens whose margin says that rounding did not choose them.
fn check_greedy(heard: &Heard, greedy: impl Iterator<Item = u32>) {
    for (at, (have, want)) in heard.tokens.iter().zip(greedy).enumerate() {
        if have.token.id != want {
            let margin = have.top[0].logprob - have.top[1].logprob;
            assert!(margin <= MARGIN, "token {at} is {have:?} and not {want}");
            // From here on they are different texts.
            return;
        }
    }
}

/// How far the log-probabilities of a prompt are from others, the smallest difference first.
fn deviations(heard: &Heard, want: impl ExactSizeIterator<Item = f32>) -> Vec<f32> {
    assert_eq!(heard.prompt.len(), want.len());
    let have = heard.prompt.iter().map(|score| score.token.logprob);
    let mut deviations: Vec<f32> = have.zip(want).map(|(have, want)| (have - want).abs()).collect();
    deviations.sort_by(f32::total_cmp);
    deviations
}

fn median(deviations: &[f32]) -> f32 {
    deviations[deviations.len() / 2]
}

/// An engine in whose process everything is computed on the device, experts too, beside one on the
/// processor. Those two round in the same places and differ in the order of sums, which now and then
/// rounds a value the other way or, where two experts are as good, chooses the other one: later
/// tokens see that. The reference is not rounded at all. So what holds of most tokens is asked; and
/// of weights in fp8, which are others than the reference's, that both engines make the same of them.
fn check_against_reference(model: &str, weights: WeightFormat) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(model);
    let cases = golden(&dir);
    let roster = roster(&[listener()], 1);
    let inproc = config(&roster, Transport::Inproc, EngineConfig::default());
    let cpu = Config { model: dir, weights, ..inproc };
    let engine = Engine::start(&on_device(cpu.clone()));
    assert_eq!(engine.started.kernel_class.0, format!("{}/cuda-sm90/1", weights.name()));
    let cpu = Engine::start(&cpu);
    for (number, case) in cases.iter().enumerate() {
        let heard = Heard::all(&mut submit(&engine, &case.prompt));
        let rounded = Heard::all(&mut submit(&cpu, &case.prompt));
        let scores = rounded.prompt.iter().map(|score| score.token.logprob);
        let from_cpu = median(&deviations(&heard, scores));
        assert!(from_cpu <= TOLERANCE, "case {number}: {from_cpu} from the processor");
        if weights == WeightFormat::Fp8 {
            check_greedy(&heard, rounded.tokens.iter().map(|score| score.token.id));
            continue;
        }
        let from_reference = median(&deviations(&heard, case.scores.iter().copied()));
        assert!(from_reference <= TOLERANCE, "case {number}: {from_reference} from the reference");
        check_greedy(&heard, case.greedy.iter().copied());
    }
}

#[test]
fn mixtral_computes_what_the_reference_computes() {
    check_against_reference("mixtral", WeightFormat::Bf16);
}

#[test]
fn mistral_with_dense_layers_and_a_window_computes_what_the_reference_computes() {
    check_against_reference("mistral-swa", WeightFormat::Bf16);
}

#[test]
fn mixtral_in_fp8_computes_what_a_processor_computes() {
    check_against_reference("mixtral", WeightFormat::Fp8);
}

#[test]
fn mistral_in_fp8_computes_what_a_processor_computes() {
    check_against_reference("mistral-swa", WeightFormat::Fp8);
}

#[test]
fn a_rows_logits_in_fp8_are_the_same_bits_in_any_company_and_chunk() {
    let roster = roster(&[listener()], 1);
    let start = |bounds| {
        let config = config(&roster, Transport::Inproc, bounds);
        Engine::start(&on_device(Config { weights: WeightFormat::Fp8, ..config }))
    };
    let want = alone(&start(EngineConfig::default()));
    for step_rows_max in [512, 29] {
        let engine = start(EngineConfig { step_rows_max, ..EngineConfig::default() });
        assert!(together(&engine) == want, "{step_rows_max} rows");
    }
}

#[test]
fn a_rows_logits_are_the_same_bits_in_any_company_chunk_and_micro_batch() {
    let listeners = vec![listener()];
    let roster = roster(&listeners, 1);
    let state = found(&roster);
    let nodes = listeners.into_iter().map(|listener| Node::start(&state, 0, listener));
    let _nodes: Vec<Node> = nodes.collect();
    let start = |bounds| Engine::start(&on_device(config(&roster, Transport::Stream, bounds)));
    let whole = start(EngineConfig::default());
    let want = alone(&whole);
    assert!(together(&whole) == want, "all requests at once");
    for (step_rows_max, micro_batch_rows_min) in [(512, 1), (29, 128), (7, 2)] {
        let bounds =
            EngineConfig { step_rows_max, micro_batch_rows_min, ..EngineConfig::default() };
        let engine = start(bounds);
        assert!(together(&engine) == want, "{step_rows_max} rows, {micro_batch_rows_min} a half");
    }
}
