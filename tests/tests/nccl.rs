//! Goal: rows travel from GPU to GPU by NCCL where that was asked for, and whatever befalls it costs no
//! request and no bit.
//! Method: clusters in which coordinator and expert nodes find an emulated CUDA driver, and beside it a
//! library that does between processes of one machine what NCCL does.

use std::fs;
use std::path::PathBuf;
use std::sync::mpsc;
use std::thread;

use entente_tests::cluster::STOP_DEADLINE;
use entente_tests::process::{Signal, wait_for, wait_gone};
use entente_tests::{Cluster, Gpus, http};
use serde_json::{Value, json};

/// Enough for a step, a cache of some megabytes, and lanes.
const MEMORY_BYTES: u64 = 192 << 20;

const LINKS: &str = "entente_nccl_links";
const OPENED: &str = "entente_nccl_opened_total";
const SENT: &str = "entente_nccl_sent_bytes_total";
const RECEIVED: &str = "entente_nccl_received_bytes_total";
const FAILURES: &str = "entente_nccl_failures_total";

fn start(gpus: &Gpus, nodes: usize) -> Cluster {
    let regions = format!("fr={nodes}");
    let expert = |number: usize| format!(",fr-expert-{number}=cuda:{number}");
    let devices = (1..=nodes).map(expert).collect::<String>();
    let devices = format!("fr-coordinator=cuda:0{devices}");
    let replicas = nodes.to_string();
    let args = ["--nccl", "--regions", &regions, "--replicas", &replicas, "--device", &devices];
    let cluster = Cluster::try_start_in(gpus.variables(), &args);
    cluster.unwrap_or_else(|end| panic!("{args:?} did not start: {end:#?}"))
}

fn metric(cluster: &Cluster, name: &str) -> f64 {
    http::metric(cluster.http(), name)
}

fn wait_until(cluster: &Cluster, what: &str, done: impl Fn() -> bool) {
    let end = wait_for(STOP_DEADLINE, || done().then_some(()));
    assert!(end.is_some(), "{what}:\n{}", log(cluster, "fr-coordinator"));
}

fn log(cluster: &Cluster, name: &str) -> String {
    fs::read_to_string(PathBuf::from(cluster.data_dir()).join(format!("logs/{name}.log"))).unwrap()
}

fn pid(cluster: &Cluster, name: &str) -> u64 {
    let mut processes = cluster.file()["processes"].as_array().unwrap().iter();
    processes.find(|process| process["name"] == name).unwrap()["pid"].as_u64().unwrap()
}

fn translation(word: &str) -> Value {
    json!({
        "prompt": format!("Translate to Swedish: {word}"), "max_tokens": 16, "ignore_eos": true,
        "temperature": 0.8, "seed": 7, "logprobs": 0, "return_token_ids": true,
    })
}

/// Tokens and their log-probabilities of some streams, in which `disturb` acts once each has begun.
fn ask_while(cluster: &Cluster, disturb: impl FnOnce()) -> Vec<Vec<Value>> {
    let url = &format!("{}/v1/completions", cluster.http());
    let (begun, beginnings) = mpsc::channel();
    let words = ["vingt-trois", "quarante et un", "soixante-douze", "cent trois"];
    thread::scope(|scope| {
        let run = |word| {
            let begun = begun.clone();
            scope.spawn(move || {
                let mut stream = http::stream(url, &translation(word));
                let first = stream.next().unwrap();
                begun.send(()).unwrap();
                let choice = |chunk: Value| {
                    let choice = &chunk["choices"][0];
                    json!([choice["token_ids"], choice["logprobs"], choice["finish_reason"]])
                };
                std::iter::once(first).chain(stream).map(choice).collect()
            })
        };
        let streams: Vec<_> = words.map(run).into();
        streams.iter().for_each(|_| beginnings.recv().unwrap());
        disturb();
        streams.into_iter().map(|stream| stream.join().unwrap()).collect()
    })
}

/// Chunks are cut where time cuts them; what they say is one thing.
fn said(answers: &[Vec<Value>]) -> Vec<Vec<String>> {
    let flat = |value: &Value| match value {
        Value::Array(values) => values.iter().map(Value::to_string).collect(),
        Value::Null => Vec::new(),
        Value::Object(fields) => fields["token_logprobs"]
            .as_array()
            .map(|values| values.iter().map(Value::to_string).collect())
            .unwrap_or_default(),
        value => vec![value.to_string()],
    };
    let answer = |chunks: &Vec<Value>| {
        (0..3).flat_map(|part| chunks.iter().flat_map(move |chunk| flat(&chunk[part]))).collect()
    };
    answers.iter().map(answer).collect()
}

#[test]
fn a_killed_node_changes_no_answer_and_its_rows_travel_by_nccl_again_when_it_is_back() {
    let gpus = Gpus::new(3, MEMORY_BYTES, "");
    let cluster = start(&gpus, 2);
    wait_until(&cluster, "lanes to both nodes", || metric(&cluster, LINKS) == 2.0);
    let undisturbed = said(&ask_while(&cluster, || ()));
    assert!(undisturbed.iter().all(|said| said.last().is_some_and(|end| end == "\"length\"")));
    assert!(metric(&cluster, SENT) > 0.0 && metric(&cluster, RECEIVED) > 0.0);

    let opened = metric(&cluster, OPENED);
    let process = cluster.process("fr-expert-1");
    let disturbed = ask_while(&cluster, || {
        process.signal(Signal::KILL);
        assert!(wait_gone(STOP_DEADLINE, &[process]).is_empty(), "it survived SIGKILL");
    });
    assert_eq!(said(&disturbed), undisturbed);
    let is_back = || metric(&cluster, OPENED) > opened && metric(&cluster, LINKS) == 2.0;
    wait_until(&cluster, "lanes to the node that is back", is_back);
    let sent = metric(&cluster, SENT);
    assert_eq!(said(&ask_while(&cluster, || ())), undisturbed);
    assert!(metric(&cluster, SENT) > sent);
}

/// With one replica: what hangs in a lane is asked of the same node again, over the network.
#[test]
fn lanes_that_hang_cost_a_deadline_and_no_request() {
    let gpus = Gpus::new(2, MEMORY_BYTES, "");
    let cluster = start(&gpus, 1);
    wait_until(&cluster, "lanes", || metric(&cluster, LINKS) == 1.0);
    let undisturbed = said(&ask_while(&cluster, || ()));
    let (pid, opened) = (pid(&cluster, "fr-expert-1"), metric(&cluster, OPENED));
    let disturbed = ask_while(&cluster, || gpus.break_in(pid, "nccl-hangs"));
    // If no row went to it since, one does now.
    let after = ask_while(&cluster, || ());
    assert_eq!([said(&disturbed), said(&after)], [undisturbed.clone(), undisturbed.clone()]);
    assert!(metric(&cluster, FAILURES) > 0.0, "{}", log(&cluster, "fr-coordinator"));
    gpus.break_in(pid, "");
    let is_back = || metric(&cluster, OPENED) > opened && metric(&cluster, LINKS) == 1.0;
    wait_until(&cluster, "lanes that work again", is_back);
    assert_eq!(said(&ask_while(&cluster, || ())), undisturbed);
}

#[test]
fn without_the_library_rows_travel_over_the_network_and_a_sentence_says_why() {
    let gpus = Gpus::without_nccl(2, MEMORY_BYTES);
    let cluster = start(&gpus, 1);
    let answers = said(&ask_while(&cluster, || ()));
    assert!(answers.iter().all(|said| said.last().is_some_and(|end| end == "\"length\"")));
    assert_eq!(metric(&cluster, OPENED), 0.0);
    for name in ["fr-coordinator", "fr-expert-1"] {
        let log = log(&cluster, name);
        let sentence = "NCCL is not installed (libnccl.so.2 is not found)";
        assert!(log.contains(sentence), "{name}: {log}");
    }
}
