//! Goal: an operator sees and changes a running cluster from the command line, and what cannot be is
//! refused with an exit code of its own.
//! Method: run the verbs of the built binary against real clusters and read their JSON.

use std::fs;
use std::process::{Child, Stdio};

use entente_tests::cluster::{Finished, STOP_DEADLINE, entente, run};
use entente_tests::process::{Signal, wait_for, wait_gone};
use entente_tests::{Cluster, Golden, http};
use serde_json::{Value, json};

const REFUSED: Option<i32> = Some(3);
const NO_QUORUM: Option<i32> = Some(4);

fn start(golden: &Golden, args: &[&str]) -> Cluster {
    let model = ["--model", golden.path(), "--weights", "f32", "--replicas", "2"];
    Cluster::start(&[&model, args].concat())
}

fn verb(cluster: &Cluster, words: &[&str]) -> Finished {
    run(&[words, &["--data-dir", cluster.data_dir()]].concat())
}

/// What a verb prints as JSON.
fn ask(cluster: &Cluster, words: &[&str]) -> Value {
    let end = verb(cluster, &[words, &["-o", "json"]].concat());
    assert_eq!(end.code(), Some(0), "{words:?}: {end:#?}");
    serde_json::from_str(&end.stdout).unwrap()
}

fn node(cluster: &Cluster, name: &str) -> Value {
    let listed = ask(cluster, &["node", "ls"]);
    let nodes = listed["nodes"].as_array().unwrap();
    nodes.iter().find(|node| node["name"] == name).unwrap().clone()
}

/// Waits until a node is as it should be.
fn wait_for_node(cluster: &Cluster, name: &str, is_so: impl Fn(&Value) -> bool) -> Value {
    let now = || Some(node(cluster, name)).filter(|node| is_so(node));
    wait_for(STOP_DEADLINE, now).unwrap_or_else(|| panic!("{}", node(cluster, name)))
}

/// Waits until all that a node holds is held elsewhere too: a cluster is ready with one replica of
/// each expert, and the second may still be loading.
fn wait_until_it_may_stop(cluster: &Cluster, name: &str) {
    let may_stop = || verb(cluster, &["node", "ok-to-stop", name]).code() == Some(0);
    assert!(wait_for(STOP_DEADLINE, || may_stop().then_some(())).is_some(), "{name} may not stop");
}

fn completion(endpoint: &str) -> String {
    let body = json!({ "prompt": "a b c", "max_tokens": 16, "temperature": 0.0, "logprobs": 0 });
    http::post(&format!("{endpoint}/v1/completions"), &body).choices()
}

#[test]
fn a_drained_node_holds_nothing_and_gets_its_experts_back() {
    let golden = Golden::load("mixtral");
    let cluster = start(&golden, &["--regions", "fr=3"]);
    for name in ["fr-expert-1", "fr-expert-2", "fr-expert-3"] {
        wait_until_it_may_stop(&cluster, name);
    }
    let placed = |name| node(&cluster, name)["placed"].as_u64().unwrap();
    let all: u64 = ["fr-expert-1", "fr-expert-2", "fr-expert-3"].into_iter().map(placed).sum();
    let before = completion(cluster.http());

    let drained = ask(&cluster, &["node", "drain", "fr-expert-1"]);
    assert_eq!(drained["drained"], true);
    assert!(drained["replicas"].as_u64().unwrap() > 0, "{drained}");
    let shown = ask(&cluster, &["node", "show", "fr-expert-1"]);
    assert_eq!((&shown["state"], &shown["placed"]), (&json!("draining"), &json!(0)));
    assert_eq!(placed("fr-expert-2") + placed("fr-expert-3"), all, "a replica is missing");
    assert_eq!(completion(cluster.http()), before);

    ask(&cluster, &["node", "uncordon", "fr-expert-1"]);
    wait_for_node(&cluster, "fr-expert-1", |node| node["state"] == "active");
    ask(&cluster, &["experts", "rebalance"]);
    assert!(placed("fr-expert-1") > 0, "nothing came back");
    assert_eq!(completion(cluster.http()), before);
}

#[test]
fn a_node_that_is_told_to_stop_drains_first_and_comes_back_as_another_incarnation() {
    let golden = Golden::load("mixtral");
    let cluster = start(&golden, &["--regions", "fr=2"]);
    let before = node(&cluster, "fr-expert-2");
    cluster.process("fr-expert-2").signal(Signal::TERM);
    let after = wait_for_node(&cluster, "fr-expert-2", |node| {
        node["incarnation"] != before["incarnation"] && node["state"] == "active"
    });
    assert!(after["incarnation"].as_u64() > before["incarnation"].as_u64());
    assert_eq!(after["address"], before["address"]);
}

#[test]
fn what_would_lose_an_expert_is_refused() {
    let golden = Golden::load("mixtral");
    let cluster = start(&golden, &["--regions", "fr=2"]);
    wait_until_it_may_stop(&cluster, "fr-expert-1");
    let both = verb(&cluster, &["node", "ok-to-stop", "fr-expert-1", "fr-expert-2"]);
    assert_eq!((both.code(), both.stdout.as_str()), (REFUSED, "no\n"), "{both:#?}");
    assert!(both.stderr.contains("region fr: "), "{}", both.stderr);
    let alive = verb(&cluster, &["node", "decommission", "--yes", "fr-expert-1"]);
    assert_eq!(alive.code(), REFUSED, "{alive:#?}");
    assert!(alive.stderr.contains("is not down"), "{}", alive.stderr);
    let unasked = verb(&cluster, &["raft", "remove", "witness-1"]);
    assert_eq!(unasked.code(), Some(2), "{unasked:#?}");
    let plan = ask(&cluster, &["experts", "place", "--dry-run", "--replicas", "1"]);
    assert!(plan["releases"].as_u64().unwrap() > 0, "{plan}");
    let too_many = verb(&cluster, &["experts", "place", "--dry-run", "--replicas", "3"]);
    assert_eq!(too_many.code(), REFUSED, "{too_many:#?}");
}

#[test]
fn changes_wait_for_a_quorum_and_requests_do_not() {
    let golden = Golden::load("mixtral");
    let cluster = start(&golden, &["--regions", "fr=2"]);
    let before = completion(cluster.http());
    let witnesses = ["witness-1", "witness-2"].map(|name| cluster.process(name));
    witnesses.iter().for_each(|process| process.signal(Signal::STOP));
    let cordon = || verb(&cluster, &["node", "cordon", "fr-expert-1", "--call-timeout-s", "2"]);
    // A leader finds out that it is alone when an election timeout has passed.
    let refused = wait_for(STOP_DEADLINE, || Some(cordon()).filter(|end| end.code() == NO_QUORUM));
    let answer = completion(cluster.http());
    witnesses.iter().for_each(|process| process.signal(Signal::CONT));
    let refused = refused.expect("a change was accepted without a quorum");
    assert!(refused.stderr.contains("fewer than 2 of 3 voters"), "{}", refused.stderr);
    assert_eq!(answer, before);
    let healed = wait_for(STOP_DEADLINE, || Some(cordon()).filter(|end| end.code() == Some(0)));
    assert!(healed.is_some(), "the control plane did not come back");
}

#[test]
fn another_voter_leads_when_it_is_told_to() {
    let golden = Golden::load("mixtral");
    let cluster = start(&golden, &["--regions", "fr=2"]);
    let status = || ask(&cluster, &["raft", "status"]);
    let leader = status()["leader"].as_str().unwrap().to_owned();
    let others = ["fr-coordinator", "witness-1", "witness-2"].into_iter();
    let next = others.clone().find(|name| *name != leader).unwrap();
    ask(&cluster, &["raft", "transfer-leader", next]);
    let leads = wait_for(STOP_DEADLINE, || (status()["leader"] == next).then_some(()));
    assert!(leads.is_some(), "{}", status());

    let snapshot = ask(&cluster, &["raft", "snapshot"]);
    assert!(snapshot["index"].as_u64().unwrap() > 1, "{snapshot}");
    let voters = status()["voters"].as_array().unwrap().clone();
    assert_eq!(voters.len(), 3);
    for voter in voters {
        assert_eq!((&voter["role"], &voter["error"]), (&json!("voter"), &Value::Null), "{voter}");
    }
}

#[test]
fn a_region_that_is_cut_off_serves_on_and_heals() {
    let golden = Golden::load("mixtral");
    let links = ["--regions", "fr=2,se=2", "--link", "fr-se=5ms"];
    let cluster = start(&golden, &links);
    let endpoints = cluster.endpoints();
    let before: Vec<String> = endpoints.iter().map(|url| completion(url)).collect();
    let cut = ask(&cluster, &["link", "set", "fr-se=cut", "se-de=cut"]);
    assert_eq!(cut[0], json!({ "link": "de-se", "effect": "cut" }));
    let is_down = |node: &Value| node["state"] == "down";
    // Whoever leads on the other side takes the silent nodes for dead; their coordinator does not.
    wait_for_node(&cluster, "se-expert-1", is_down);
    let during: Vec<String> = endpoints.iter().map(|url| completion(url)).collect();
    assert_eq!(during, before);
    ask(&cluster, &["link", "set", "fr-se=clear", "se-de=clear"]);
    wait_for_node(&cluster, "se-expert-1", |node| node["state"] == "active");
    let after: Vec<String> = endpoints.iter().map(|url| completion(url)).collect();
    assert_eq!(after, before);
}

#[test]
fn a_decommissioned_node_is_gone_for_good() {
    let golden = Golden::load("mixtral");
    let cluster = start(&golden, &["--regions", "fr=3", "--no-restart"]);
    let before = completion(cluster.http());
    ask(&cluster, &["node", "drain", "fr-expert-3"]);
    cluster.process("fr-expert-3").signal(Signal::TERM);
    wait_for_node(&cluster, "fr-expert-3", |node| node["state"] == "down");
    ask(&cluster, &["node", "decommission", "--yes", "fr-expert-3"]);
    let listed = ask(&cluster, &["node", "ls"]);
    let names: Vec<_> = listed["nodes"].as_array().unwrap().iter().map(|n| &n["name"]).collect();
    assert!(!names.contains(&&json!("fr-expert-3")), "{names:?}");
    assert_eq!(ask(&cluster, &["node", "show", "fr-expert-3"])["state"], "removed");
    assert_eq!(completion(cluster.http()), before);
}

/// A process of the cluster that `up` does not know.
struct Stranger(Child);

impl Drop for Stranger {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_voter_that_lost_its_disk_comes_back_under_another_number() {
    let golden = Golden::load("mixtral");
    let cluster = start(&golden, &["--regions", "fr=2", "--no-restart"]);
    let lost = ask(&cluster, &["raft", "remove", "--yes", "witness-2"])["voter"].clone();
    let process = cluster.process("witness-2");
    process.signal(Signal::KILL);
    assert!(wait_gone(STOP_DEADLINE, &[process]).is_empty());

    let file = format!("{}/witness-2.toml", cluster.data_dir());
    let config = fs::read_to_string(&file).unwrap();
    let empty = config.replace("join = false", "join = true").replace("raft/witness-2", "raft/new");
    fs::write(&file, empty).unwrap();
    let mut witness = entente(&["witness", "--config", &file]);
    witness.stdout(Stdio::null()).stderr(Stdio::null());
    let _witness = Stranger(witness.spawn().unwrap());
    // It asks for a number first, and is promoted once it has the log.
    for change in ["add", "promote"] {
        let done =
            || (verb(&cluster, &["raft", change, "witness-2"]).code() == Some(0)).then_some(());
        assert!(wait_for(STOP_DEADLINE, done).is_some(), "raft {change} is refused");
    }
    let voters = ask(&cluster, &["raft", "status"])["voters"].as_array().unwrap().clone();
    let back = voters.iter().find(|voter| voter["name"] == "witness-2").unwrap();
    assert_eq!((voters.len(), &back["role"]), (3, &json!("voter")));
    assert!(back["voter"].as_u64() > lost.as_u64(), "{back}");
}
