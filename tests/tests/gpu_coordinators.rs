//! Goal: a coordinator computes its part of the model on a GPU, and one that loses it harms nobody
//! else.
//! Method: a cluster of two countries, in one of which the coordinator finds an emulated CUDA driver:
//! kernels are the project's own, the device is the processor. The bundled model has been trained, so
//! that rounding in another order chooses no other token.

use std::fs;
use std::path::Path;

use entente_tests::cluster::{STOP_DEADLINE, entente};
use entente_tests::process::{wait_for, wait_gone};
use entente_tests::{Cluster, Gpus, config, http};
use serde_json::json;

/// Enough for what a step takes, and for a cache of some megabytes.
const MEMORY_BYTES: u64 = 160 << 20;

/// With these processes of fr on GPUs.
fn start(gpus: &Gpus, devices: &str, args: &[&str]) -> Cluster {
    let usual = ["--no-restart", "--regions", "fr=1,se=1", "--device", devices];
    let args = [&usual, args].concat();
    let cluster = Cluster::try_start_in(gpus.variables(), &args);
    cluster.unwrap_or_else(|end| panic!("{args:?} did not start: {end:#?}"))
}

fn ask(endpoint: &str) -> Vec<String> {
    let words = ["vingt-trois", "quarante et un", "soixante-douze", "cent trois"];
    let request = |word: &&str| {
        let prompt = format!("Translate to Swedish: {word}");
        let request = json!({ "prompt": prompt, "max_tokens": 12, "temperature": 0 });
        (format!("{endpoint}/v1/completions"), request)
    };
    let replies = http::post_all(&words.iter().map(request).collect::<Vec<_>>());
    let text =
        |reply: &http::Reply| reply.json()["choices"][0]["text"].as_str().unwrap().to_owned();
    replies.iter().map(text).collect()
}

fn pid(cluster: &Cluster, name: &str) -> u64 {
    let mut processes = cluster.file()["processes"].as_array().unwrap().iter();
    processes.find(|process| process["name"] == name).unwrap()["pid"].as_u64().unwrap()
}

#[test]
fn a_coordinator_on_a_gpu_answers_like_one_on_a_processor() {
    let gpus = Gpus::new(1, MEMORY_BYTES, "");
    let cluster = start(&gpus, "fr-coordinator=cuda:0", &[]);
    let [fr, se] = cluster.endpoints().try_into().unwrap();
    let metrics = http::get(&format!("{fr}/metrics")).text;
    let device = "entente_device_info{device=\"cuda:0\",kernel_class=\"bf16/cuda-sm";
    assert!(metrics.contains(device), "{metrics}");
    assert_eq!(ask(&fr), ask(&se));
}

#[test]
fn a_coordinator_that_loses_its_gpu_says_so_and_harms_nobody_else() {
    let gpus = Gpus::new(1, MEMORY_BYTES, "");
    let cluster = start(&gpus, "fr-coordinator=cuda:0", &[]);
    let [fr, se] = cluster.endpoints().try_into().unwrap();
    let answers = ask(&se);
    let process = cluster.process("fr-coordinator");
    gpus.break_in(pid(&cluster, "fr-coordinator"), "lost");
    let request = json!({ "prompt": "Translate to Swedish: douze", "max_tokens": 12 });
    let reply = http::post(&format!("{fr}/v1/completions"), &request);
    assert_eq!(reply.status, 503, "{}", reply.text);
    assert!(reply.text.contains("cannot go on: the device is lost: "), "{}", reply.text);
    assert!(wait_gone(STOP_DEADLINE, &[process]).is_empty(), "it lives: {}", cluster.stderr());
    let log = Path::new(cluster.data_dir()).join("logs/fr-coordinator.log");
    let log = fs::read_to_string(log).unwrap();
    assert!(log.contains("error: cuda:0: the device is lost: "), "{log}");
    let ended =
        wait_for(STOP_DEADLINE, || cluster.stderr().contains("exit status: 9").then_some(()));
    assert!(ended.is_some(), "{}", cluster.stderr());
    assert_eq!(ask(&se), answers);
}

#[test]
fn a_country_on_gpus_answers_like_one_on_processors_in_fp8_too() {
    let gpus = Gpus::new(2, MEMORY_BYTES, "");
    let devices = "fr-coordinator=cuda:0,fr-expert-1=cuda:1";
    let cluster = start(&gpus, devices, &["--weights", "fp8"]);
    let [fr, se] = cluster.endpoints().try_into().unwrap();
    let metrics = http::get(&format!("{fr}/metrics")).text;
    let device = "entente_device_info{device=\"cuda:0\",kernel_class=\"fp8/cuda-sm";
    assert!(metrics.contains(device), "{metrics}");
    assert_eq!(ask(&fr), ask(&se));
}

#[test]
fn a_coordinator_whose_device_cannot_be_used_says_why_in_a_sentence() {
    let dir = tempfile::tempdir().unwrap();
    let file = config::write(dir.path(), "fr-coordinator", r#"http = "127.0.0.1:0""#);
    let cases = [
        (Gpus::new(0, MEMORY_BYTES, ""), "cuda:0: the device is not available: "),
        (Gpus::new(1, 8 << 20, ""), "cuda:0: out of device memory: "),
    ];
    for (gpus, sentence) in cases {
        let mut coordinator = entente(&["coordinator", "--device", "cuda:0", "--config", &file]);
        let end = coordinator.envs(gpus.variables().iter().cloned()).output().unwrap();
        let stderr = String::from_utf8(end.stderr).unwrap();
        assert_eq!(end.status.code(), Some(9), "{stderr}");
        assert!(stderr.contains(&format!("error: {sentence}")), "{stderr}");
    }
}
