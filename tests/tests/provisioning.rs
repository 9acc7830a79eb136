//! Goal: an operator brings a cluster up on machines of its own from nothing, replaces one of them,
//! and certificates are renewed while it serves.
//! Method: what the runbook says, with the built binary, a folder and an address of loopback for each
//! machine.

use std::collections::BTreeSet;
use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use entente_tests::machines::Machines;
use entente_tests::{Golden, http};
use serde_json::{Value, json};

const REFUSED: Option<i32> = Some(3);

fn completion(url: &str) -> http::Reply {
    let body = json!({ "prompt": "a b c", "max_tokens": 16, "temperature": 0.0, "logprobs": 0 });
    http::post(&format!("{url}/v1/completions"), &body)
}

fn is_ready(url: &str) -> bool {
    let address = url.trim_start_matches("http://");
    std::net::TcpStream::connect(address).is_ok()
        && http::get(&format!("{url}/readyz")).status == 200
}

fn node(machines: &Machines, name: &str) -> Option<Value> {
    let listed = machines.attempt(&["node", "ls"]).ok()?;
    listed["nodes"].as_array().unwrap().iter().find(|node| node["name"] == name).cloned()
}

fn wait_for_state(machines: &Machines, name: &str, state: &str) {
    machines.wait(&format!("{name} is {state}"), || {
        node(machines, name).filter(|node| node["state"] == state)
    });
}

fn votes(machines: &Machines, count: usize) {
    machines.wait(&format!("{count} vote"), || {
        let status = machines.attempt(&["raft", "status"]).ok()?;
        let voters = status["voters"].as_array()?;
        (voters.iter().filter(|voter| voter["role"] == "voter").count() == count).then_some(())
    });
}

#[test]
fn a_cluster_is_provisioned_from_nothing_and_a_machine_is_replaced() {
    let golden = Golden::load("mixtral");
    let mut machines = Machines::found("fr,se,de", "127.0.0.2", golden.path(), &[]);
    machines.join("se", "coordinator", "se-coordinator", "127.0.0.3");
    votes(&machines, 2);
    machines.join("de", "witness", "witness", "127.0.0.4");
    votes(&machines, 3);
    for (region, name, host) in [
        ("fr", "fr-expert-1", "127.0.0.5"),
        ("fr", "fr-expert-2", "127.0.0.6"),
        ("se", "se-expert-1", "127.0.0.7"),
    ] {
        machines.join(region, "expert-node", name, host);
    }
    let coordinators = ["fr-coordinator", "se-coordinator"];
    machines.show_key("fr,se", &coordinators);
    let urls = coordinators.map(|name| machines.http(name));
    for url in &urls {
        machines.wait("every expert has a replica", || is_ready(url).then_some(()));
    }
    let before = urls.each_ref().map(|url| completion(url).choices());
    assert_eq!(before[0], before[1]);

    // A token is good for one machine, and what it is for cannot be chosen.
    let token = machines.token("fr", "expert-node");
    let taken = machines.try_join(&token, "fr-expert-1", "127.0.0.8");
    assert_eq!(taken.code(), REFUSED, "{taken:#?}");
    assert_eq!(machines.try_join(&token, "fr-expert-3", "127.0.0.8").code(), Some(0));
    let again = machines.try_join(&token, "fr-expert-4", "127.0.0.9");
    assert_eq!(again.code(), REFUSED, "{again:#?}");
    assert!(again.stderr.contains("no such token"), "{}", again.stderr);
    assert_eq!(machines.verb(&["token", "ls"])["tokens"], json!([]));

    // The new machine takes over from an old one.
    machines.start("fr-expert-3", "expert-node");
    wait_for_state(&machines, "fr-expert-3", "active");
    machines.verb(&["node", "drain", "fr-expert-1"]);
    machines.stop("fr-expert-1");
    wait_for_state(&machines, "fr-expert-1", "down");
    machines.verb(&["node", "decommission", "fr-expert-1", "--yes"]);
    assert_eq!(node(&machines, "fr-expert-1"), None);
    machines.verb(&["experts", "rebalance"]);
    assert!(node(&machines, "fr-expert-3").unwrap()["placed"].as_u64() > Some(0));
    assert_eq!(urls.map(|url| completion(&url).choices()), before);
}

/// How long certificates are renewed under load; `ENTENTE_RENEWAL_TEST_S=300` is the long form.
fn renewal_test() -> Duration {
    let seconds = std::env::var("ENTENTE_RENEWAL_TEST_S").ok();
    Duration::from_secs(seconds.map_or(25, |seconds| seconds.parse().unwrap()))
}

/// When a process's own certificate ends, as it shows it.
fn leaf_ends(url: &str) -> u64 {
    let text = http::get(url).text;
    let series = "entente_certificate_not_after_timestamp_seconds{kind=\"leaf\",region=\"fr\"} ";
    let value = text.lines().find_map(|line| line.strip_prefix(series));
    value.unwrap_or_else(|| panic!("{url}: {text}")).parse().unwrap()
}

#[test]
fn certificates_are_renewed_every_five_seconds_under_load_and_no_request_fails() {
    let golden = Golden::load("mixtral");
    // Certificates that live for ten seconds are renewed every five, the founder's own too.
    let life = ["--certificate-life", "10s"];
    let mut machines = Machines::found("fr", "127.0.0.10", golden.path(), &life);
    machines.join("fr", "witness", "witness", "127.0.0.11");
    machines.join("fr", "expert-node", "fr-expert-1", "127.0.0.12");
    machines.join("fr", "expert-node", "fr-expert-2", "127.0.0.13");
    machines.show_key("fr", &["fr-coordinator"]);
    let url = machines.http("fr-coordinator");
    machines.wait("every expert has a replica", || is_ready(&url).then_some(()));
    let expected = completion(&url).choices();
    let before = node(&machines, "fr-expert-1").unwrap();
    let names = ["fr-coordinator", "witness", "fr-expert-1", "fr-expert-2"];
    let roles = ["coordinator", "witness", "expert-node", "expert-node"];
    let shown = [0, 1, 2, 3].map(|at| machines.metrics(names[at], roles[at]));
    let ends = shown.each_ref().map(|url| leaf_ends(url));
    let (stop, began) = (AtomicBool::new(false), Instant::now());
    let mut seen: BTreeSet<(usize, String)> = BTreeSet::new();
    let asked: u64 = thread::scope(|scope| {
        let ask = || {
            let mut asked = 0;
            while !stop.load(Ordering::Relaxed) {
                assert_eq!(completion(&url).choices(), expected);
                asked += 1;
            }
            asked
        };
        let askers = [(); 3].map(|()| scope.spawn(ask));
        while began.elapsed() < renewal_test() {
            for (at, name) in names.iter().enumerate() {
                let file = machines.file(name, &format!("tls/{name}.pem"));
                seen.insert((at, fs::read_to_string(file).unwrap()));
            }
            thread::sleep(Duration::from_millis(500));
        }
        stop.store(true, Ordering::Relaxed);
        askers.into_iter().map(|asker| asker.join().unwrap()).sum()
    });
    // The one that is there at the start, and one every five seconds; a busy machine is a little late.
    let expected = renewal_test().as_secs() / 7;
    for (at, name) in names.iter().enumerate() {
        let certificates = seen.iter().filter(|(of, _)| *of == at).count() as u64;
        println!("{name}: {certificates} certificates in {:?}", renewal_test());
        assert!(certificates >= expected, "{name}: {certificates}, expected {expected}");
    }
    println!("{asked} requests, none of which failed");
    for (url, before) in shown.iter().zip(ends) {
        assert!(leaf_ends(url) > before, "{url} shows when the first certificate ended");
    }
    let voters = shown[..2].iter().map(|url| http::get(url).text);
    assert!(voters.into_iter().all(|text| text.contains("\nentente_raft_has_leader 1\n")));
    // Nobody had to register again or was given up.
    let after = node(&machines, "fr-expert-1").unwrap();
    assert_eq!(after["incarnation"], before["incarnation"]);
}
