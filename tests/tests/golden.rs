//! Goal: the cluster computes what the reference implementation computes.
//! Method: ask for the log-probability of every prompt token and for the likeliest continuation,
//! and compare with stored outputs of transformers. `--weights f32`, so that nothing but the order
//! of additions differs.

use entente_tests::{Cluster, Golden, http};
use serde_json::{Value, json};

/// Largest difference of a log-probability from the reference.
const TOLERANCE: f64 = 1e-4;

fn floats(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap()).collect()
}

fn score_prompt(url: &str, prompt: Value) -> Value {
    let reply = http::post(
        url,
        &json!({
            "prompt": prompt, "echo": true, "max_tokens": 0, "logprobs": 1,
            "return_token_ids": true,
        }),
    );
    assert_eq!(reply.status, 200, "{}", reply.text);
    reply.json()["choices"][0].clone()
}

fn check_prompts(golden: &Golden, url: &str) {
    for case in &golden.cases {
        let reference = case.prompt_logprobs();
        for prompt in [json!(case.prompt), json!(case.prompt_ids)] {
            let choice = score_prompt(url, prompt);
            assert_eq!(choice["prompt_token_ids"], json!(case.prompt_ids), "{:?}", case.prompt);
            let all = choice["logprobs"]["token_logprobs"].as_array().unwrap();
            assert!(all[0].is_null(), "nothing precedes the first token: {}", all[0]);
            let scores = floats(&Value::Array(all[1..].to_vec()));
            assert_eq!(scores.len(), reference.len(), "{:?}", case.prompt);
            for (at, (ours, theirs)) in scores.iter().zip(&reference).enumerate() {
                let difference = (ours - theirs).abs();
                assert!(
                    difference <= TOLERANCE,
                    "{:?}, token {}: {ours} is {difference:e} from {theirs}",
                    case.prompt,
                    at + 1
                );
            }
        }
    }
}

fn check_greedy(golden: &Golden, url: &str) {
    for case in &golden.cases {
        let reply = http::post(
            url,
            &json!({
                "prompt": case.prompt, "max_tokens": case.greedy_ids.len(), "temperature": 0,
                "ignore_eos": true, "return_token_ids": true,
            }),
        );
        let choice = &reply.json()["choices"][0];
        assert_eq!(choice["token_ids"], json!(case.greedy_ids), "{:?}", case.prompt);
        assert_eq!(choice["finish_reason"], "length", "{:?}", case.prompt);
    }
}

fn check(name: &str) {
    let golden = Golden::load(name);
    assert_eq!(golden.cases.len(), 5);
    let args = ["--model", golden.path(), "--weights", "f32", "--regions", "fr=2,se=2"];
    let cluster = Cluster::start(&args);
    for endpoint in cluster.endpoints() {
        let url = format!("{endpoint}/v1/completions");
        check_prompts(&golden, &url);
        check_greedy(&golden, &url);
    }
}

#[test]
fn mixtral_computes_what_the_reference_computes() {
    check("mixtral");
}

#[test]
fn mistral_with_a_sliding_window_computes_what_the_reference_computes() {
    check("mistral-swa");
}
