//! Goal: many streams at once neither disturb nor delay each other, and one whose reader leaves
//! costs nothing any more.

use std::thread;
use std::time::Duration;

use entente_tests::process::wait_for;
use entente_tests::{Cluster, Golden, http};
use serde_json::{Value, json};

const STREAMS: usize = 64;

/// How soon an abandoned request must have given back what it held.
const RELEASE_DEADLINE: Duration = Duration::from_secs(3);

fn cluster(golden: &Golden) -> Cluster {
    Cluster::start(&["--model", golden.path(), "--weights", "f32", "--regions", "fr=2"])
}

fn request(golden: &Golden, number: usize) -> Value {
    let case = &golden.cases[number % golden.cases.len()];
    let tail = number / golden.cases.len();
    let mut request = json!({
        "prompt": format!("{} {tail}", case.prompt), "max_tokens": 4 + (number * 7) % 60,
        "temperature": 0, "ignore_eos": true, "return_token_ids": true,
        "stream_options": {"include_usage": true},
    });
    if number % 3 == 1 {
        request["temperature"] = json!(1.1);
        request["top_k"] = json!(40);
        request["seed"] = json!(1_000 + number);
    }
    request
}

/// What a client is left with when the stream has ended.
#[derive(Debug, Default, PartialEq)]
struct Outcome {
    text: String,
    token_ids: Vec<Value>,
    finish_reason: Value,
    usage: Value,
}

fn read(url: &str, request: &Value) -> Outcome {
    let mut outcome = Outcome::default();
    for chunk in http::stream(url, request) {
        outcome.text.push_str(http::chunk_text(&chunk));
        if chunk["usage"].is_object() {
            outcome.usage = chunk["usage"].clone();
        }
        let choice = &chunk["choices"][0];
        outcome.token_ids.extend(choice["token_ids"].as_array().into_iter().flatten().cloned());
        if !choice["finish_reason"].is_null() {
            outcome.finish_reason = choice["finish_reason"].clone();
        }
    }
    outcome
}

#[test]
fn each_of_64_concurrent_streams_equals_its_solo_run() {
    let golden = Golden::load("mixtral");
    let cluster = cluster(&golden);
    let url = format!("{}/v1/completions", cluster.http());
    let requests: Vec<Value> = (0..STREAMS).map(|number| request(&golden, number)).collect();
    let solo: Vec<Outcome> = requests.iter().map(|request| read(&url, request)).collect();
    let together: Vec<Outcome> = thread::scope(|scope| {
        let url = &url;
        let start = |request| scope.spawn(move || read(url, request));
        let running: Vec<_> = requests.iter().map(start).collect();
        running.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    for (number, (solo, together)) in solo.iter().zip(&together).enumerate() {
        let tokens = requests[number]["max_tokens"].as_u64().unwrap();
        assert_eq!(solo, together, "request {number}");
        assert_eq!(solo.token_ids.len() as u64, tokens, "request {number}");
        assert_eq!(solo.usage["completion_tokens"], tokens, "request {number}");
        assert_eq!(solo.finish_reason, "length", "request {number}");
    }
    assert_idle(cluster.http());
}

/// Nothing runs and nothing is held.
fn assert_idle(base: &str) {
    let held = || {
        ["entente_requests_running", "entente_requests_waiting", "entente_kv_blocks_used"]
            .map(|name| http::metric(base, name))
    };
    let idle = wait_for(RELEASE_DEADLINE, || (held() == [0.0; 3]).then_some(()));
    assert!(idle.is_some(), "running, waiting, blocks: {:?}", held());
}

#[test]
fn a_client_that_disconnects_frees_its_slot_and_its_cache() {
    let golden = Golden::load("mixtral");
    let cluster = cluster(&golden);
    let url = format!("{}/v1/completions", cluster.http());
    // Drawn at random: text that loops would be guessed, and be over before anybody looks.
    let endless = json!({
        "prompt": "a", "max_tokens": 4_000, "temperature": 1.5, "seed": 1, "ignore_eos": true
    });

    let mut stream = http::stream(&url, &endless);
    stream.next().expect("a first chunk");
    assert!(http::metric(cluster.http(), "entente_requests_running") >= 1.0);
    assert!(http::metric(cluster.http(), "entente_kv_blocks_used") >= 1.0);
    drop(stream);
    assert_idle(cluster.http());

    // The same without a stream: the answer would only come at the end, which nobody waits for.
    let abandoned = http::abandon(&url, &endless);
    let running = || http::metric(cluster.http(), "entente_requests_running") >= 1.0;
    assert!(wait_for(RELEASE_DEADLINE, || running().then_some(())).is_some(), "it did not start");
    drop(abandoned);
    assert_idle(cluster.http());
    let generated = http::metric(cluster.http(), "entente_generation_tokens_total");
    assert!(generated < 8_000.0, "{generated} tokens were generated for nobody");
}

#[test]
fn an_echoed_prompt_is_streamed_also_when_nothing_is_generated() {
    let golden = Golden::load("mixtral");
    let cluster = cluster(&golden);
    let url = format!("{}/v1/completions", cluster.http());
    let prompt = &golden.cases[0].prompt;
    for logprobs in [Value::Null, json!(1)] {
        let body = json!({"prompt": prompt, "max_tokens": 0, "echo": true, "logprobs": logprobs});
        let text: String =
            http::stream(&url, &body).map(|chunk| http::chunk_text(&chunk).to_owned()).collect();
        assert_eq!(text, *prompt, "logprobs {logprobs}");
    }
}
