//! Steps that decode are graphs on a device, and nobody can tell from an answer.

use std::path::Path;

use entente_coordinator::config::{Config, EngineConfig, Speculation};
use entente_coordinator::engine::{EngineError, Event, Request};
use entente_cuda_emulator::stand_in::{self, Launches};
use entente_model::kernels::{DeviceError, DeviceId};
use tokio::sync::mpsc;

use crate::setup::*;

/// An engine that has all of a golden checkpoint on a device.
fn engine(model: &str, speculation: Speculation) -> Engine {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(model);
    let roster = roster(&[listener()], 1);
    let bounds = EngineConfig { kv_cache_mib: Some(8), speculation, ..EngineConfig::default() };
    let config = config(&roster, Transport::Inproc, bounds);
    Engine::start(&Config { model, device: DeviceId::Cuda(0), ..config })
}

/// Requests of many lengths: some begin within a block of the cache and end some blocks later, one
/// gets to the next split of attention. Half of them draw at random, some want scores.
fn requests() -> Vec<Request> {
    let lens =
        [(2, 40), (17, 3), (250, 20), (5, 33), (40, 1), (31, 24), (3, 50), (16, 18), (60, 9)];
    let request = |(number, (prompt, max_tokens)): (u32, (u32, usize))| {
        let mut request = request(number);
        request.prompt = (0..prompt).map(|i| 3 + (i * 7 + number * 31) % 200).collect();
        request.stop.max_tokens = max_tokens;
        request.logprobs = number.is_multiple_of(3).then_some(2);
        request.prompt_logprobs = None;
        request
    };
    (0..).zip(lens).map(request).collect()
}

fn submit(engine: &Engine, request: Request) -> mpsc::Receiver<Event> {
    engine.started.api.engine.submit(request).unwrap()
}

/// Each request by itself.
fn alone(engine: &Engine) -> Vec<String> {
    requests().into_iter().map(|request| rest(&mut submit(engine, request))).collect()
}

/// Each request joins when the one before it has got somewhere, and most leave while others go on.
fn staggered(engine: &Engine) -> Vec<String> {
    let mut all: Vec<(mpsc::Receiver<Event>, String)> = Vec::new();
    for request in requests() {
        let mut events = submit(engine, request);
        let first = events.blocking_recv();
        all.push((events, format!("{:?}\n", first.unwrap())));
    }
    all.into_iter().map(|(mut events, heard)| heard + &rest(&mut events)).collect()
}

fn launches() -> Launches {
    stand_in::load().launches().expect("the emulator counts")
}

/// What was launched meanwhile.
fn launched<T>(act: impl FnOnce() -> T) -> (T, Launches) {
    let before = launches();
    let outcome = act();
    let after = launches();
    let (kernels, graphs) = (after.kernels - before.kernels, after.graphs - before.graphs);
    (outcome, Launches { kernels, graphs })
}

fn check_graphs_change_nothing(model: &str) {
    let emulator = stand_in::load();
    // A driver that captures nothing, beside which everything else is as ever.
    emulator.plant("no-graphs");
    let (want, without) = launched(|| alone(&engine(model, Speculation::Off)));
    assert!(want.iter().all(|heard| heard.contains("Finished")), "{want:?}");
    assert_eq!(without.graphs, 0);
    emulator.plant("");
    for speculation in [Speculation::Off, Speculation::Auto] {
        let engine = engine(model, speculation);
        for round in 0..2 {
            let (have, with) = launched(|| staggered(&engine));
            assert!(have == want, "round {round}: {have:#?} and not {want:#?}");
            assert!(with.graphs > 0 && with.kernels < without.kernels / 4, "{with:?}, {without:?}");
        }
    }
}

#[test]
fn answers_of_a_mixture_are_the_bits_of_steps_without_graphs() {
    check_graphs_change_nothing("mixtral");
}

#[test]
fn answers_of_dense_layers_with_a_window_are_the_bits_of_steps_without_graphs() {
    check_graphs_change_nothing("mistral-swa");
}

#[test]
fn a_step_of_dense_layers_is_one_graph_and_one_with_experts_one_more_than_it_has_layers() {
    stand_in::load();
    for (model, segments) in [("mistral-swa", 1), ("mixtral", 4)] {
        let engine = engine(model, Speculation::Off);
        let generate = |max_tokens: usize| {
            let mut request = request(0);
            request.stop.max_tokens = max_tokens;
            (request.logprobs, request.prompt_logprobs) = (None, None);
            rest(&mut submit(&engine, request))
        };
        // The first token comes of the prompt's step, the second of a step whose shape is new.
        assert_eq!(launched(|| generate(2)).1.graphs, 0, "{model}");
        let (_, few) = launched(|| generate(10));
        let (_, many) = launched(|| generate(30));
        assert_eq!((few.graphs, many.graphs), (9 * segments, 29 * segments), "{model}");
        if segments == 1 {
            assert_eq!(few.kernels, many.kernels, "those of the prompt");
        }
    }
}

#[test]
fn a_device_that_is_lost_at_the_launch_of_a_graph_ends_the_engine() {
    let emulator = stand_in::load();
    let engine = engine("mistral-swa", Speculation::Off);
    let mut request = request(0);
    (request.logprobs, request.prompt_logprobs) = (None, None);
    // More than can be heard before the device is gone.
    request.stop.max_tokens = 3_000;
    let mut events = submit(&engine, request);
    for _ in 0..5 {
        let event = events.blocking_recv();
        assert!(matches!(event, Some(Event::Token { .. })), "{event:?}");
    }
    let (heard, with) = launched(|| {
        emulator.plant("lost");
        loop {
            match events.blocking_recv() {
                Some(Event::Token { .. }) => {}
                other => return other,
            }
        }
    });
    assert_eq!(with.kernels, 0, "only graphs were launched");
    let Some(Event::Failed(EngineError::Device(DeviceError::Lost(reason)))) = heard else {
        panic!("{heard:?}");
    };
    assert!(reason.contains("cuGraphLaunch"), "{reason}");
}
