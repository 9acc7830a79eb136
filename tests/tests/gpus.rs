//! Goal: expert nodes on GPUs and on processors serve side by side, and whatever befalls a GPU costs
//! its node and no request.
//! Method: real clusters in which some processes find an emulated CUDA driver: kernels are the
//! project's own, the device is the processor.

use std::path::PathBuf;
use std::sync::mpsc;
use std::{fs, thread};

use entente_tests::cluster::{STOP_DEADLINE, entente, run};
use entente_tests::process::{Process, Signal, wait_for, wait_gone};
use entente_tests::{Cluster, Gpus, config, http};
use serde_json::{Value, json};

const GIB: u64 = 1 << 30;
const CROSSED: &str = "entente_crossed_rows_total";

fn start(gpus: &Gpus, args: &[&str]) -> Cluster {
    let cluster = Cluster::try_start_in(gpus.variables(), args);
    cluster.unwrap_or_else(|end| panic!("{args:?} did not start: {end:#?}"))
}

/// Two nodes on GPUs in fr, and more of them as `args` say. What is lost stays lost.
fn mixed(gpus: &Gpus, args: &[&str]) -> Cluster {
    let devices = format!("fr-expert-1={},fr-expert-2={}", gpus.device(0), gpus.device(1));
    start(gpus, &[&["--no-restart", "--device", &devices], args].concat())
}

fn kill(cluster: &Cluster, name: &str) {
    let process = cluster.process(name);
    process.signal(Signal::KILL);
    assert!(wait_gone(STOP_DEADLINE, &[process]).is_empty(), "{name} survived SIGKILL");
}

fn node(cluster: &Cluster, name: &str) -> Value {
    let end = run(&["node", "ls", "-o", "json", "--data-dir", cluster.data_dir()]);
    assert_eq!(end.code(), Some(0), "{end:#?}");
    let listed: Value = serde_json::from_str(&end.stdout).unwrap();
    let nodes = listed["nodes"].as_array().unwrap();
    nodes.iter().find(|node| node["name"] == name).unwrap().clone()
}

fn wait_for_state(cluster: &Cluster, name: &str, state: &str) {
    let now = || Some(()).filter(|()| node(cluster, name)["state"] == state);
    let end = wait_for(STOP_DEADLINE, now);
    assert!(end.is_some(), "{}\n{}", node(cluster, name), log(cluster, name));
}

fn log(cluster: &Cluster, name: &str) -> String {
    fs::read_to_string(PathBuf::from(cluster.data_dir()).join(format!("logs/{name}.log"))).unwrap()
}

fn translation(number: usize) -> Value {
    let words = ["vingt-trois", "quarante et un", "soixante-douze", "cent trois"];
    json!({
        "prompt": format!("Translate to Swedish: {}", words[number % words.len()]),
        "max_tokens": 24, "ignore_eos": true, "temperature": if number < 4 { 0.0 } else { 0.8 },
        "seed": number, "logprobs": 0, "return_token_ids": true,
    })
}

const TRANSLATIONS: usize = 6;

/// What one stream said: tokens, their log-probabilities, how it ended.
#[derive(Debug, Default, PartialEq)]
struct Said {
    ids: Vec<Value>,
    logprobs: Vec<Value>,
    ended: Vec<Value>,
}

impl Said {
    fn take(mut self, chunk: &Value) -> Self {
        let choice = &chunk["choices"][0];
        let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
        self.ids.extend(list(&choice["token_ids"]));
        self.logprobs.extend(list(&choice["logprobs"]["token_logprobs"]));
        self.ended.extend(choice["finish_reason"].as_str().map(Value::from));
        self
    }
}

/// Asks everything in streams, and lets `disturb` act once each of them has begun.
fn ask_while(cluster: &Cluster, disturb: impl FnOnce()) -> Vec<Said> {
    let url = &format!("{}/v1/completions", cluster.http());
    let (begun, beginnings) = mpsc::channel();
    thread::scope(|scope| {
        let run = |number| {
            let begun = begun.clone();
            scope.spawn(move || {
                let mut stream = http::stream(url, &translation(number));
                let first = stream.next().unwrap();
                begun.send(()).unwrap();
                stream.fold(Said::default().take(&first), |said, chunk| said.take(&chunk))
            })
        };
        let streams: Vec<_> = (0..TRANSLATIONS).map(run).collect();
        streams.iter().for_each(|_| beginnings.recv().unwrap());
        disturb();
        streams.into_iter().map(|stream| stream.join().unwrap()).collect()
    })
}

/// Replicas in fr are of one class: whoever is slow or gone there, no bit may change.
#[test]
fn a_killed_gpu_node_changes_no_answer_while_another_has_its_experts() {
    let gpus = Gpus::new(2, GIB, "");
    let cluster = mixed(&gpus, &["--regions", "fr=2,se=2", "--replicas", "2"]);
    let [gpu, processor] = ["fr-expert-1", "se-expert-1"].map(|name| node(&cluster, name));
    assert!(gpu["kernel_class"].as_str().unwrap().starts_with("bf16/cuda-sm"), "{gpu}");
    let memory_bytes = gpu["device"]["memory_bytes"].as_u64().unwrap();
    assert!(memory_bytes >= GIB, "{gpu}");
    assert!(gpu["device"]["uuid"].as_str().unwrap().starts_with("GPU-"), "{gpu}");
    let offered = memory_bytes / 2..memory_bytes;
    assert!(offered.contains(&gpu["memory_bytes"].as_u64().unwrap()), "{gpu}");
    assert!(!processor["kernel_class"].as_str().unwrap().contains("cuda"), "{processor}");
    assert!(processor["device"].is_null() && processor["memory_bytes"].is_null(), "{processor}");

    for endpoint in cluster.endpoints() {
        let message = json!({ "role": "user", "content": "Translate to Swedish: vingt-trois" });
        let body = json!({ "messages": [message], "max_tokens": 24, "temperature": 0 });
        let reply = http::post(&format!("{endpoint}/v1/chat/completions"), &body).json();
        assert_eq!(reply["choices"][0]["message"]["content"], "tjugotre", "{endpoint}: {reply}");
    }
    let undisturbed = ask_while(&cluster, || ());
    let disturbed = ask_while(&cluster, || kill(&cluster, "fr-expert-1"));
    assert_eq!(disturbed, undisturbed);
    wait_for_state(&cluster, "fr-expert-1", "down");
    assert_eq!(ask_while(&cluster, || ()), undisturbed);
    assert_eq!(http::metric(cluster.http(), CROSSED), 0.0);
}

#[test]
fn processors_take_over_what_no_gpu_is_left_for_and_that_is_counted() {
    let gpus = Gpus::new(2, GIB, "");
    let cluster = mixed(&gpus, &["--regions", "fr=3", "--replicas", "3"]);
    let mut answers = ask_while(&cluster, || kill(&cluster, "fr-expert-1"));
    answers.extend(ask_while(&cluster, || kill(&cluster, "fr-expert-2")));
    let crossed = http::metric(cluster.http(), CROSSED);
    answers.extend(ask_while(&cluster, || ()));
    assert!(answers.iter().all(|said| said.ended == ["length"]), "{answers:#?}");
    assert!(http::metric(cluster.http(), CROSSED) > crossed);
    wait_for_state(&cluster, "fr-expert-1", "down");
    wait_for_state(&cluster, "fr-expert-2", "down");
}

#[test]
fn a_gpu_that_is_lost_while_it_serves_ends_its_node_with_a_sentence_and_no_request() {
    let gpus = Gpus::new(2, GIB, "");
    let cluster = mixed(&gpus, &["--regions", "fr=2", "--replicas", "2"]);
    let undisturbed = ask_while(&cluster, || ());
    let process: Process = cluster.process("fr-expert-1");
    let pid = pid(&cluster, "fr-expert-1");
    assert_eq!(ask_while(&cluster, || gpus.break_in(pid, "lost")), undisturbed);
    // If no row went to it since, one does now.
    assert_eq!(ask_while(&cluster, || ()), undisturbed);
    assert!(wait_gone(STOP_DEADLINE, &[process]).is_empty(), "it lives: {}", cluster.stderr());
    let log = log(&cluster, "fr-expert-1");
    assert!(log.contains("error: cuda:0: the device is lost: "), "{log}");
    let told = || cluster.stderr().contains("exit status: 9").then_some(());
    assert!(wait_for(STOP_DEADLINE, told).is_some(), "{}", cluster.stderr());
    wait_for_state(&cluster, "fr-expert-1", "down");
    assert_eq!(ask_while(&cluster, || ()), undisturbed);
}

fn pid(cluster: &Cluster, name: &str) -> u64 {
    let mut processes = cluster.file()["processes"].as_array().unwrap().iter();
    processes.find(|process| process["name"] == name).unwrap()["pid"].as_u64().unwrap()
}

#[test]
fn experts_are_placed_by_the_memory_that_a_device_has() {
    // Room for 14 of the 32 experts, and for what the kernels need.
    let gpus = Gpus::new(1, 3 << 20, "");
    let cluster = start(&gpus, &["--regions", "fr=2", "--device", "fr-expert-1=cuda:0"]);
    let placed = ["fr-expert-1", "fr-expert-2"].map(|name| node(&cluster, name)["placed"].clone());
    assert_eq!(placed, [14, 18], "{}", node(&cluster, "fr-expert-1"));
    assert!(ask_while(&cluster, || ()).iter().all(|said| said.ended == ["length"]));
}

#[test]
fn a_device_that_cannot_serve_is_one_sentence_and_an_exit_code_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let own = "listen = \"127.0.0.1:0\"\ndevice = \"cuda:0\"";
    let file = config::write(dir.path(), "fr-expert-1", own);
    let cases = [
        (Gpus::new(1, 128 << 10, ""), "out of device memory: "),
        (Gpus::new(1, GIB, "wrong-architecture"), "cuda:0: the device's architecture "),
        (Gpus::new(0, GIB, ""), "cuda:0: the device is not available: "),
    ];
    for (gpus, sentence) in cases {
        let mut node = entente(&["expert-node", "--config", &file]);
        let end = node.envs(gpus.variables().iter().cloned()).output().unwrap();
        let stderr = String::from_utf8(end.stderr).unwrap();
        assert_eq!(end.status.code(), Some(9), "{stderr}");
        let errors: Vec<&str> = stderr.lines().filter_map(|l| l.strip_prefix("error: ")).collect();
        assert!(matches!(errors[..], [error] if error.starts_with(sentence)), "{stderr}");
    }
}
