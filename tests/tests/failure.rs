//! Goal: losing an expert node loses no answer and changes none.
//! Method: SIGKILL one node of a real cluster, before and in the middle of generations; SIGSTOP one,
//! so that its link stays up and nothing ever comes back.

use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use entente_tests::process::{Signal, wait_for, wait_gone};
use entente_tests::{Cluster, Golden, http};
use serde_json::{Value, json};

/// How soon a lost node must be noticed.
const NOTICE_DEADLINE: Duration = Duration::from_secs(10);
/// How long an exchange waits for an answer by default.
const EXCHANGE_DEADLINE: Duration = Duration::from_secs(10);
/// Hedged rows may be one in so many; what is overdue is hedged at once and paid back later.
const ROWS_PER_HEDGED_ROW: f64 = 20.0;

fn start(golden: &Golden, args: &[&str]) -> Cluster {
    // What is lost stays lost, so that nothing but the rest of the cluster can make up for it.
    let model = ["--no-restart", "--model", golden.path(), "--weights", "f32", "--regions", "fr=2"];
    Cluster::start(&[&model[..], args].concat())
}

fn generation(golden: &Golden, number: usize, max_tokens: usize) -> Value {
    let case = &golden.cases[number % golden.cases.len()];
    json!({
        "prompt": case.prompt, "max_tokens": max_tokens, "ignore_eos": true,
        "temperature": if number.is_multiple_of(2) { 0.0 } else { 0.8 }, "seed": number,
        "logprobs": 0, "return_token_ids": true,
    })
}

fn kill(cluster: &Cluster, name: &str) {
    let process = cluster.process(name);
    process.signal(Signal::KILL);
    assert!(wait_gone(NOTICE_DEADLINE, &[process]).is_empty(), "{name} survived SIGKILL");
}

#[test]
fn a_new_request_is_answered_the_same_after_a_node_is_lost() {
    let golden = Golden::load("mixtral");
    let cluster = start(&golden, &["--replicas", "2"]);
    let url = format!("{}/v1/completions", cluster.http());
    let ask = || -> Vec<String> {
        let numbers = 0..golden.cases.len();
        numbers.map(|n| http::post(&url, &generation(&golden, n, 24)).choices()).collect()
    };
    let before = ask();
    kill(&cluster, "fr-expert-1");
    assert_eq!(before, ask());
    assert_eq!(http::get(&format!("{}/readyz", cluster.http())).status, 200);
    let warning = wait_for(NOTICE_DEADLINE, || {
        let stderr = cluster.stderr();
        stderr.contains("fr-expert-1").then_some(stderr)
    });
    assert!(warning.is_some_and(|text| text.contains("WARN")), "{}", cluster.stderr());
}

#[test]
fn running_generations_go_on_unchanged_when_a_node_is_lost() {
    lose_a_node_in_the_middle("grpc", Signal::KILL);
}

#[test]
fn running_generations_go_on_unchanged_when_a_node_is_lost_behind_a_byte_stream() {
    lose_a_node_in_the_middle("stream", Signal::KILL);
}

#[test]
fn running_generations_go_on_unchanged_when_a_node_hangs() {
    lose_a_node_in_the_middle("grpc", Signal::STOP);
}

#[test]
fn running_generations_go_on_unchanged_when_a_node_hangs_behind_a_byte_stream() {
    lose_a_node_in_the_middle("stream", Signal::STOP);
}

/// Every stream must end as if nothing had happened, and none may wait for the deadline of an
/// exchange: a node that hangs keeps its connection, so nothing but a hedge gets past it.
fn lose_a_node_in_the_middle(transport: &str, signal: Signal) {
    const STREAMS: usize = 8;
    const TOKENS: usize = 300;
    let golden = Golden::load("mixtral");
    let cluster = start(&golden, &["--replicas", "2", "--transport", transport]);
    let url = format!("{}/v1/completions", cluster.http());
    let ids_and_text = |chunks: &mut dyn Iterator<Item = Value>| {
        let mut all = (Vec::new(), String::new(), Vec::new());
        for chunk in chunks {
            let choice = &chunk["choices"][0];
            all.0.extend(choice["token_ids"].as_array().into_iter().flatten().cloned());
            all.1.push_str(http::chunk_text(&chunk));
            let logprobs = choice["logprobs"]["token_logprobs"].as_array();
            all.2.extend(logprobs.into_iter().flatten().cloned());
        }
        all
    };
    let undisturbed: Vec<_> = (0..STREAMS)
        .map(|n| ids_and_text(&mut http::stream(&url, &generation(&golden, n, TOKENS))))
        .collect();

    let (begun, beginnings) = mpsc::channel();
    let (ended, ends) = mpsc::channel();
    let disturbed = thread::scope(|scope| {
        let run = |n| {
            let (begun, ended) = (begun.clone(), ended.clone());
            let (url, body) = (&url, generation(&golden, n, TOKENS));
            scope.spawn(move || {
                let (mut seen, mut last, mut longest) = (0, Instant::now(), Duration::ZERO);
                let mut chunks = http::stream(url, &body).inspect(|_| {
                    seen += 1;
                    longest = longest.max(last.elapsed());
                    last = Instant::now();
                    if seen == 10 {
                        begun.send(()).unwrap();
                    }
                });
                let all = ids_and_text(&mut chunks);
                drop(chunks);
                ended.send(()).unwrap();
                (all, longest)
            })
        };
        let running: Vec<_> = (0..STREAMS).map(run).collect();
        for _ in 0..STREAMS {
            beginnings.recv().unwrap();
        }
        let node = cluster.process("fr-expert-2");
        node.signal(signal);
        let ended = ends.try_iter().count();
        let all = running.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>();
        // A stopped process could not end with its cluster.
        node.signal(Signal::CONT);
        assert!(ended < STREAMS, "all streams had ended before the node was lost");
        all
    });
    for (n, (ours, (theirs, longest))) in undisturbed.iter().zip(&disturbed).enumerate() {
        assert_eq!(ours.0.len(), TOKENS, "stream {n}");
        assert!(*longest < EXCHANGE_DEADLINE / 2, "stream {n} stood still for {longest:?}");
        assert!(ours == theirs, "stream {n} changed:\n{:?}\n{:?}", ours.1, theirs.1);
    }
}

#[test]
fn hedges_of_healthy_nodes_stay_within_their_budget() {
    const STREAMS: usize = 16;
    let golden = Golden::load("mixtral");
    let cluster = start(&golden, &["--replicas", "2"]);
    let url = format!("{}/v1/completions", cluster.http());
    let requests: Vec<(String, Value)> =
        (0..STREAMS).map(|n| (url.clone(), generation(&golden, n, 200))).collect();
    http::post_all(&requests).iter().for_each(|reply| assert_eq!(reply.status, 200));
    let count = |name| http::metric(cluster.http(), name);
    let (hedged, rows) = (count("entente_hedged_rows_total"), count("entente_gate_rows_total"));
    assert!(rows > 0.0, "no rows were counted");
    assert!(hedged <= rows / ROWS_PER_HEDGED_ROW, "{hedged} of {rows} rows were hedged");
}

#[test]
fn what_only_the_lost_node_held_is_loaded_elsewhere_and_nothing_fails() {
    let golden = Golden::load("mixtral");
    let cluster = start(&golden, &["--replicas", "1"]);
    let url = format!("{}/v1/completions", cluster.http());
    let request = generation(&golden, 0, 1_000);
    let text = |chunks: &mut dyn Iterator<Item = Value>| -> Vec<String> {
        chunks.map(|chunk| http::chunk_text(&chunk).to_owned()).collect()
    };
    let undisturbed = text(&mut http::stream(&url, &request)).concat();
    let mut running = http::stream(&url, &request);
    let first = running.next().expect("a first chunk");
    kill(&cluster, "fr-expert-1");
    let disturbed = http::chunk_text(&first).to_owned() + &text(&mut running).concat();
    assert_eq!(undisturbed, disturbed);
    assert_eq!(http::get(&format!("{}/readyz", cluster.http())).status, 200);
}

#[test]
fn experts_that_do_not_come_back_are_told_and_the_coordinator_lives() {
    let golden = Golden::load("mixtral");
    let model = ["--no-restart", "--model", golden.path(), "--regions", "fr=1"];
    let cluster = Cluster::start(&model);
    let url = format!("{}/v1/completions", cluster.http());
    let mut running = http::stream(&url, &generation(&golden, 0, 3_000));
    running.next().expect("a first chunk");
    kill(&cluster, "fr-expert-1");

    // What runs, and what comes meanwhile, is told once the experts have not come back in time.
    let (reply, failure) = thread::scope(|scope| {
        let asked = scope.spawn(|| http::post(&url, &generation(&golden, 0, 4)));
        let failure = running.failure();
        (asked.join().unwrap(), failure)
    });
    assert_eq!(failure["error"]["code"], 503, "{failure}");
    assert_eq!(reply.status, 503, "{}", reply.text);
    let message = reply.json()["error"]["message"].as_str().unwrap().to_owned();
    assert!(message.contains("no permitted replica"), "{message}");
    let readyz = http::get(&format!("{}/readyz", cluster.http()));
    assert_eq!(readyz.status, 503, "{}", readyz.text);
    assert!(readyz.text.contains("expert"), "{}", readyz.text);
    assert_eq!(http::get(&format!("{}/livez", cluster.http())).status, 200);
}
