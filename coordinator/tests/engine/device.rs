//! The coordinator's part of a model on a device: the emulator of one, which runs the same kernels
//! and shows what they compute, not how fast.

use std::path::Path;

use entente_coordinator::config::{Config, EngineConfig};
use entente_coordinator::engine::sampler::{Choice, ScoredToken, choose};
use entente_coordinator::engine::{Event, Request};
use entente_cuda_emulator::stand_in;
use entente_model::kernels::cuda::{Buffer, Device, Draw, Staging, Stream};
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

/// Rows of logits that are easily told apart from their likeliest token wrongly.
fn hard_rows(vocab: usize) -> Vec<Vec<f32>> {
    let spread = |i: usize| (i * 7_919 % 1_009) as f32 * 0.01 - 5.0;
    let row = |make: &dyn Fn(usize) -> f32| (0..vocab).map(make).collect();
    let (nan, least) = (f32::NAN, f32::NEG_INFINITY);
    vec![
        row(&spread),
        // Equals all over, of which the first counts, also where it is a zero of the other sign.
        row(&|i| (spread(i) * 0.5).round()),
        row(&|i| if i % 3 == 2 { 0.0 } else { -0.0 }),
        row(&|_| 1.5),
        // What is no logit, and what is the least.
        row(&|i| if i % 2 == 0 { nan } else { spread(i) }),
        row(&|i| if i + 1 == vocab { f32::INFINITY } else { nan }),
        row(&|i| if i < vocab / 2 { nan } else { least }),
        row(&|_| least),
        row(&|_| nan),
        row(&|i| -1e38 - spread(i) * 1e36),
        row(&|i| f32::from_bits(i as u32 % 97)),
    ]
}

/// Ways to choose a token: the likeliest, and draws among all or few that fall near borders too.
fn choices() -> Vec<Choice> {
    let mut choices = vec![Choice::Likeliest];
    for (temperature, weight_min) in
        [(1.0_f32, 0.0), (0.3, 0.0), (2.0, 0.05), (1e-6, 0.0), (1e-40, 0.5)]
    {
        let scale = 1.0 / temperature;
        let draw = |uniform| Choice::Draw { scale, weight_min, uniform };
        let last = 1.0 - f64::EPSILON / 2.0;
        choices.extend([0.0, 1e-9, 0.1, 0.25, 0.5, 0.77, 0.999_999, last].map(draw));
    }
    choices
}

fn words(choice: Choice) -> [u64; 2] {
    let draw = match choice {
        Choice::Likeliest => Draw::Likeliest,
        Choice::Draw { scale, weight_min, uniform } => Draw::Weighed { scale, weight_min, uniform },
    };
    draw.words()
}

#[test]
fn a_token_is_the_one_that_the_processor_chooses_of_the_same_logits() {
    let emulator = stand_in::load();
    let device = Device::open_cached(0, None).unwrap();
    let stream = Stream::new(&device).unwrap();
    let mut staging = Staging::new(&device).unwrap();
    // Less than a lane's first, a lane, a block; more than the blocks that are summed side by side.
    for (seed, vocab) in [1, 31, 256, 1_025, 5_000, 70_001].into_iter().enumerate() {
        println!("order {seed}, {vocab} tokens");
        emulator.set_seed(seed as u64);
        // All rows and choices where that is quick.
        let step = if vocab > 10_000 { 7 } else { 1 };
        let cases: Vec<(Vec<f32>, Choice)> = hard_rows(vocab)
            .into_iter()
            .flat_map(|row| choices().into_iter().map(move |choice| (row.clone(), choice)))
            .step_by(step)
            .collect();
        let mut logits = Buffer::new(&device, cases.len() * vocab).unwrap();
        let mut draws = Buffer::new(&device, cases.len()).unwrap();
        let mut tokens = Buffer::new(&device, cases.len()).unwrap();
        let fill = |to: &mut [f32]| {
            to.chunks_exact_mut(vocab)
                .zip(&cases)
                .for_each(|(to, case)| to.copy_from_slice(&case.0));
        };
        staging.upload(&stream, logits.view_mut(), fill).unwrap();
        let fill = |to: &mut [[u64; 2]]| {
            to.iter_mut().zip(&cases).for_each(|(to, case)| *to = words(case.1));
        };
        staging.upload(&stream, draws.view_mut(), fill).unwrap();
        stream.draw(logits.view(), vocab, draws.view(), tokens.view_mut()).unwrap();
        let have = staging.download(&stream, tokens.view(), <[u32]>::to_vec).unwrap();
        for (number, (have, (row, choice))) in have.into_iter().zip(&cases).enumerate() {
            assert_eq!(have, choose(row, *choice), "case {number} of {vocab} tokens: {choice:?}");
        }
    }
}

/// The tokens that a request draws, and no scores.
fn tokens(events: &mut mpsc::Receiver<Event>) -> Vec<u32> {
    let mut tokens = Vec::new();
    loop {
        match events.blocking_recv() {
            Some(Event::Token { id, score: None, .. }) => tokens.push(id),
            Some(Event::Finished { .. }) => return tokens,
            other => panic!("{other:?}"),
        }
    }
}

/// Of who wants no scores the device chooses the tokens; of who does, the processor, which gets all
/// logits. Drafts are verified by either.
#[test]
fn tokens_are_the_same_whether_logits_leave_the_device_or_not() {
    let roster = roster(&[listener()], 1);
    let config = config(&roster, Transport::Inproc, EngineConfig::default());
    let engine = Engine::start(&on_device(config));
    let submit = |(number, prompt): (u32, &Vec<u32>), logprobs: Option<usize>| {
        // The greedy and the drawn, some of which are filtered.
        let mut request = Request { prompt: prompt.clone(), logprobs, ..request(number) };
        request.sampling.min_p = if number == 1 { 0.01 } else { 0.0 };
        request.sampling.top_k = if number == 3 { 40 } else { 0 };
        request.prompt_logprobs = None;
        request.stop.max_tokens = TOKENS;
        engine.started.api.engine.submit(request).unwrap()
    };
    // Both kinds in the same steps.
    let prompts = [prompts(), prompts()].concat();
    let both = |request| [submit(request, None), submit(request, Some(0))];
    let mut all: Vec<_> = (0..).zip(&prompts).map(both).collect();
    for [alone, scored] in &mut all {
        let scored =
            Heard::all(scored).tokens.iter().map(|score| score.token.id).collect::<Vec<_>>();
        assert_eq!(tokens(alone), scored);
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
