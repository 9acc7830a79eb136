//! Goal: guessing tokens never shows in an answer.
//! Method: the same requests go to an engine that never guesses, one after the other, and to one
//! that does, all at once. Tokens, texts, log-probabilities and ends must be the same bits, while
//! the metrics say that guesses were computed, and that some were right and some wrong.

// Everything here is a test, which clippy sees in #[test] functions only.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use entente_coordinator::config::{ApiConfig, EngineConfig, Speculation, Transport};
use entente_coordinator::engine::origin::Origin;
use entente_coordinator::engine::output::StopConditions;
use entente_coordinator::engine::sampler::Sampling;
use entente_coordinator::engine::{Event, Readiness, Request};
use entente_coordinator::{Config, Started, start};
use entente_membership::roster::{Roster, RosterNode};
use entente_model::kernels::{BLOCK_LEN, DeviceId, WeightFormat};
use tokio::runtime::Runtime;
use tokio::sync::mpsc::Receiver;

const CHECKPOINT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/mixtral");
const PATIENCE: Duration = Duration::from_secs(60);
/// Positions of the prompts and answers below fit one by one into the smallest cache, not together.
const ANSWER_LEN: usize = 150;

/// An engine with its only expert node in the same process.
fn engine(runtime: &Runtime, weights: WeightFormat, engine: EngineConfig) -> Started {
    let node = RosterNode {
        name: "fr-expert-1".parse().unwrap(),
        region: "fr".parse().unwrap(),
        address: "127.0.0.1:1".to_owned(),
    };
    let config = Config {
        name: "fr-coordinator".parse().unwrap(),
        region: "fr".parse().unwrap(),
        http: "127.0.0.1:0".to_owned(),
        model: CHECKPOINT.into(),
        weights,
        threads: Some(1),
        device: DeviceId::Cpu,
        transport: Transport::Inproc,
        served_model_name: None,
        tls: None,
        api: ApiConfig::default(),
        engine,
        audit: None,
        nccl: None,
        membership: None,
        cluster: Roster::new("test".to_owned(), 1, vec![node]).unwrap(),
    };
    runtime.block_on(async {
        let started = start(&config, |_, _| {}).await.unwrap();
        let mut readiness = started.api.engine.readiness();
        readiness.wait_for(|now| *now == Readiness::Ready).await.unwrap();
        started
    })
}

fn speculation(speculation: Speculation, kv_cache_mib: usize) -> EngineConfig {
    EngineConfig { speculation, kv_cache_mib: Some(kv_cache_mib), ..EngineConfig::default() }
}

/// Greedy and sampled requests whose prompts repeat a phrase, each once with an end by length and
/// once by stop conditions, with lengths on both sides of a block's border.
fn requests(stop: &StopConditions) -> Vec<Request> {
    let request = |number: usize| Request {
        origin: Arc::new(Origin::anonymous("fr".parse().unwrap())),
        prompt: (0..2 * BLOCK_LEN + number).map(|i| 100 + (i % (5 + number)) as u32).collect(),
        sampling: Sampling {
            temperature: [0.0, 0.3, 1.0][number % 3],
            top_p: 0.9,
            top_k: 40,
            min_p: 0.0,
            seed: number as u64,
        },
        stop: StopConditions { max_tokens: ANSWER_LEN - number, ..stop.clone() },
        logprobs: Some(number % 2),
        prompt_logprobs: number.is_multiple_of(4).then_some(1),
    };
    (0..9).map(request).collect()
}

/// Everything that a client hears, with every digit.
fn heard(mut events: Receiver<Event>, runtime: &Runtime) -> Vec<String> {
    let all = async {
        let mut all = Vec::new();
        while let Some(event) = events.recv().await {
            all.push(format!("{event:?}"));
        }
        all
    };
    runtime.block_on(async { tokio::time::timeout(PATIENCE, all).await.unwrap() })
}

/// Answers without speculation, one after the other, and with it, all at once; what the second
/// engine counted is left to the caller to judge.
fn compare(weights: WeightFormat, kv_cache_mib: usize, stop: &StopConditions) -> Started {
    let runtime = Runtime::new().unwrap();
    let off = engine(&runtime, weights, speculation(Speculation::Off, 64));
    let submit = |engine: &Started, request| engine.api.engine.submit(request).unwrap();
    let expected: Vec<_> =
        requests(stop).into_iter().map(|r| heard(submit(&off, r), &runtime)).collect();
    assert_eq!(off.api.metrics.draft_tokens.get(), 0);

    let on = engine(&runtime, weights, speculation(Speculation::Auto, kv_cache_mib));
    // Alone, which leaves room for drafts, then in company.
    for (number, request) in requests(stop).into_iter().enumerate() {
        assert_eq!(heard(submit(&on, request), &runtime), expected[number], "request {number}");
    }
    let together: Vec<_> = requests(stop).into_iter().map(|r| submit(&on, r)).collect();
    for (number, events) in together.into_iter().enumerate() {
        assert_eq!(heard(events, &runtime), expected[number], "request {number} in company");
    }
    on
}

/// Right and wrong guesses were both verified, and the metrics that a client sees say so.
fn assert_some_right_and_some_wrong(engine: &Started) {
    let text = engine.api.metrics.render();
    let value = |name: &str| -> u64 {
        let line = text.lines().find(|line| line.starts_with(name)).unwrap();
        line.rsplit(' ').next().unwrap().parse().unwrap()
    };
    let drafted = value("entente_speculation_draft_tokens_total ");
    let accepted = value("entente_speculation_accepted_tokens_total ");
    assert!(0 < accepted && accepted < drafted, "{accepted} of {drafted}");
}

#[test]
fn answers_are_the_same_with_and_without_speculation() {
    for weights in [WeightFormat::F32, WeightFormat::Bf16] {
        let on = compare(weights, 64, &StopConditions::default());
        assert_some_right_and_some_wrong(&on);
    }
}

#[test]
fn stop_strings_and_end_tokens_end_an_answer_at_the_same_token() {
    // Tokens that these prompts lead to now and then, so that answers end within drafts.
    let stop = StopConditions {
        max_tokens: 0,
        strings: vec!["the".to_owned(), "an".to_owned()],
        token_ids: (0..1024).step_by(41).collect(),
    };
    let on = compare(WeightFormat::F32, 64, &stop);
    assert!(on.api.metrics.finished.with_label_values(&["stop"]).get() > 0, "nothing was stopped");
}

#[test]
fn answers_are_the_same_when_blocks_run_out_while_guessing() {
    // 85 blocks, of which nine requests would like more than a hundred.
    let on = compare(WeightFormat::F32, 1, &StopConditions::default());
    assert!(on.api.metrics.preemptions.get() > 0, "nobody was set back");
    assert_some_right_and_some_wrong(&on);
}

#[test]
fn a_client_that_leaves_while_guessing_leaves_no_block_behind() {
    let runtime = Runtime::new().unwrap();
    let on = engine(&runtime, WeightFormat::F32, speculation(Speculation::Auto, 64));
    let endless = || {
        let mut request = requests(&StopConditions::default()).remove(0);
        request.stop.max_tokens = 2_000;
        on.api.engine.submit(request).unwrap()
    };
    let mut events = endless();
    runtime.block_on(async {
        while on.api.metrics.accepted_tokens.get() == 0 {
            events.recv().await.unwrap();
        }
    });
    drop(events);
    // Gauges follow the events of a step, so they are waited for.
    let metrics = &on.api.metrics;
    let deadline = Instant::now() + PATIENCE;
    while metrics.kv_blocks_used.get() > 0 || metrics.requests_running.get() > 0 {
        assert!(Instant::now() < deadline, "blocks are left");
        std::thread::yield_now();
    }
    assert_eq!(metrics.finished.with_label_values(&["disconnect"]).get(), 1);
}
