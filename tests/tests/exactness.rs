//! Goal: where and with whom a request is computed never shows in its answer.
//! Method: sixteen mixed requests are answered once by the smallest cluster, one after the other.
//! Every other cluster must write the very same bytes, alone and all at once: tokens, text, and
//! every digit of every log-probability.

use entente_tests::cluster::run;
use entente_tests::{Cluster, Golden, http};
use serde_json::{Value, json};

/// What the answers are compared with: one expert node, one request at a time.
const REFERENCE: &[&str] = &["--regions", "fr=1"];

/// Sixteen requests that differ in prompt, length, sampling and kind.
fn requests(golden: &Golden) -> Vec<(&'static str, Value)> {
    let mut requests = Vec::new();
    for (number, case) in golden.cases.iter().enumerate() {
        requests.push((
            "/v1/completions",
            json!({
                "prompt": case.prompt_ids, "echo": true, "max_tokens": 0, "logprobs": 3,
                "return_token_ids": true,
            }),
        ));
        requests.push((
            "/v1/completions",
            json!({
                "prompt": case.prompt, "max_tokens": 8 + 5 * number, "temperature": 0,
                "ignore_eos": true, "logprobs": 2, "return_token_ids": true,
            }),
        ));
        requests.push((
            "/v1/completions",
            json!({
                "prompt": case.prompt, "max_tokens": 40 - 6 * number, "temperature": 0.9,
                "top_p": 0.95, "seed": number, "logprobs": 0, "return_token_ids": true,
            }),
        ));
    }
    // Longer than one step takes, so that it is split into chunks beside the others.
    let long: Vec<u32> =
        golden.cases.iter().flat_map(|case| &case.prompt_ids).copied().cycle().take(900).collect();
    requests.push((
        "/v1/completions",
        json!({
            "prompt": long, "echo": true, "max_tokens": 4, "temperature": 0, "logprobs": 0,
            "return_token_ids": true,
        }),
    ));
    requests
}

fn addressed(endpoint: &str, requests: &[(&str, Value)]) -> Vec<(String, Value)> {
    let address = |(path, body): &(&str, Value)| (format!("{endpoint}{path}"), body.clone());
    requests.iter().map(address).collect()
}

fn alone(endpoint: &str, requests: &[(&str, Value)]) -> Vec<String> {
    addressed(endpoint, requests)
        .iter()
        .map(|(url, body)| http::post(url, body).choices())
        .collect()
}

fn together(endpoint: &str, requests: &[(&str, Value)]) -> Vec<String> {
    http::post_all(&addressed(endpoint, requests)).iter().map(http::Reply::choices).collect()
}

/// Says which requests differ and where first; the answers themselves are too long to read.
fn assert_same(what: &str, reference: &[String], answers: &[String]) {
    assert_eq!(reference.len(), answers.len());
    let differences: Vec<String> = reference
        .iter()
        .zip(answers)
        .enumerate()
        .filter(|(_, (reference, answer))| reference != answer)
        .map(|(number, (reference, answer))| {
            let at = reference.bytes().zip(answer.bytes()).take_while(|(a, b)| a == b).count();
            let near = |text: &str| {
                String::from_utf8_lossy(&text.as_bytes()[at.saturating_sub(40)..])
                    .chars()
                    .take(80)
                    .collect::<String>()
            };
            format!("request {number}, byte {at}:\n  {}\n  {}", near(reference), near(answer))
        })
        .collect();
    assert!(differences.is_empty(), "{what}:\n{}", differences.join("\n"));
}

fn check(model: &str, weights: &str, clusters: &[&[&str]]) {
    let golden = Golden::load(model);
    let requests = requests(&golden);
    assert_eq!(requests.len(), 16);
    let start = |args: &[&str]| {
        let model = ["--model", golden.path(), "--weights", weights];
        Cluster::start(&[&model, args].concat())
    };

    let smallest = start(REFERENCE);
    let reference = alone(smallest.http(), &requests);
    let batch = together(smallest.http(), &requests);
    assert_same(&format!("{REFERENCE:?}, together"), &reference, &batch);
    drop(smallest);
    for args in clusters {
        let cluster = start(args);
        for endpoint in cluster.endpoints() {
            let what = format!("{args:?} at {endpoint}");
            assert_same(&format!("{what}, alone"), &reference, &alone(&endpoint, &requests));
            assert_same(&format!("{what}, together"), &reference, &together(&endpoint, &requests));
        }
    }
}

#[test]
fn answers_do_not_depend_on_the_number_of_nodes() {
    check(
        "mixtral",
        "f32",
        &[&["--regions", "fr=2"], &["--regions", "fr=4"], &["--regions", "fr=2,se=2"]],
    );
}

#[test]
fn answers_do_not_depend_on_packing_the_model_before() {
    let golden = Golden::load("mixtral");
    let requests = requests(&golden);
    let dir = tempfile::tempdir().unwrap();
    for weights in ["f32", "bf16", "q8", "fp8", "q4"] {
        let out = dir.path().join(weights);
        let out = out.to_str().unwrap();
        let import = ["model", "import", golden.path(), "--weights", weights, "--out", out];
        let end = run(&import);
        assert_eq!(end.code(), Some(0), "{end:#?}");
        let end = run(&["model", "verify", out]);
        assert_eq!(end.code(), Some(0), "{end:#?}");
        let answers = |model| {
            let args = ["--model", model, "--weights", weights, "--regions", "fr=2"];
            let cluster = Cluster::start(&args);
            alone(cluster.http(), &requests)
        };
        assert_same(&format!("{weights}, packed"), &answers(golden.path()), &answers(out));
    }
}

#[test]
fn answers_do_not_depend_on_replicas() {
    check(
        "mixtral",
        "f32",
        &[
            &["--regions", "fr=2", "--replicas", "2"],
            &["--regions", "fr=4", "--replicas", "2"],
            &["--regions", "fr=2,se=2", "--replicas", "2"],
        ],
    );
}

#[test]
fn answers_do_not_depend_on_the_transport() {
    check(
        "mixtral",
        "f32",
        &[
            &["--regions", "fr=1", "--transport", "inproc"],
            &["--regions", "fr=2", "--transport", "inproc"],
            &["--regions", "fr=4", "--transport", "inproc", "--replicas", "2"],
            &["--regions", "fr=2,se=2", "--transport", "inproc"],
            &["--regions", "fr=2,se=2", "--transport", "grpc"],
        ],
    );
}

#[test]
fn answers_do_not_depend_on_placement_with_16_bit_weights_either() {
    check(
        "mixtral",
        "bf16",
        &[
            &["--regions", "fr=2"],
            &["--regions", "fr=2,se=2", "--replicas", "2"],
            &["--regions", "fr=4", "--transport", "inproc"],
        ],
    );
}

#[test]
fn answers_do_not_depend_on_placement_with_quantised_weights_either() {
    for weights in ["q8", "fp8", "q4"] {
        check(
            "mixtral",
            weights,
            &[&["--regions", "fr=2,se=2"], &["--regions", "fr=4", "--transport", "inproc"]],
        );
    }
}

#[test]
fn answers_do_not_depend_on_the_number_of_threads() {
    check("mixtral", "bf16", &[&["--regions", "fr=2", "--threads", "3"]]);
}

#[test]
fn answers_of_a_dense_model_do_not_depend_on_company() {
    check(
        "mistral-swa",
        "f32",
        &[
            &["--regions", "fr=2"],
            &["--regions", "fr=4", "--replicas", "2"],
            &["--regions", "fr=2,se=2"],
            &["--regions", "fr=2,se=2", "--transport", "inproc"],
        ],
    );
}
