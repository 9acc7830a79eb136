//! Goal: an operator makes tenants and keys, keys open the API for as long as they are live and for
//! what they are for, and secrets are shown once and are nowhere else.
//! Method: the verbs against a running cluster, and its public API with what they printed.

use std::path::{Path, PathBuf};
use std::time::Duration;

use entente_tests::cluster::{Finished, run};
use entente_tests::process::{Signal, wait_for};
use entente_tests::{Cluster, Golden, http};
use serde_json::{Value, json};

/// Runs a verb against the cluster and reads the JSON that it prints.
fn verb(cluster: &Cluster, args: &[&str]) -> Value {
    let end = attempt(cluster, args);
    assert_eq!(end.code(), Some(0), "{args:?}: {}", end.stderr);
    serde_json::from_str(&end.stdout).unwrap()
}

fn attempt(cluster: &Cluster, args: &[&str]) -> Finished {
    run(&[args, &["--data-dir", cluster.data_dir(), "-o", "json"]].concat())
}

/// Status of a completion with this key.
fn ask(url: &str, key: &str) -> http::Reply {
    http::show_key(url, key);
    http::post(&format!("{url}/v1/completions"), &json!({"prompt": "a", "max_tokens": 2}))
}

/// The reply once it has this status. What is agreed on reaches a coordinator that does not lead
/// with the leader's next message, which may be after the verb has ended.
fn ask_until(status: u16, url: &str, key: &str) -> http::Reply {
    let agreed = || Some(ask(url, key)).filter(|reply| reply.status == status);
    let reply = wait_for(Duration::from_secs(20), agreed);
    reply.unwrap_or_else(|| panic!("{url} does not answer {status}"))
}

#[test]
fn keys_are_made_rotated_and_revoked_and_only_live_ones_open_the_api() {
    let golden = Golden::load("mixtral");
    let args = ["--model", golden.path(), "--regions", "fr=1,se=1"];
    let cluster = Cluster::start(&args);
    let made = verb(&cluster, &["tenant", "create", "tax-office", "--allow", "fr,se"]);
    assert_eq!(made["allowed"], json!(["fr", "se"]));
    let taken = attempt(&cluster, &["tenant", "create", "tax-office"]);
    assert!(taken.code() == Some(3) && taken.stderr.contains("already"), "{taken:#?}");

    let first = verb(&cluster, &["key", "create", "--tenant", "tax-office", "--label", "ci"]);
    let (id, key) = (first["id"].as_str().unwrap(), first["key"].as_str().unwrap());
    assert!(key.starts_with(&format!("mk_{id}_")), "{key}");
    // Both coordinators know it: it is agreed on, not told to one.
    for url in cluster.endpoints() {
        ask_until(200, &url, key);
    }
    let url = cluster.http();
    let second = verb(&cluster, &["key", "rotate", id]);
    let next = second["key"].as_str().unwrap();
    assert_eq!(second["replaces"]["id"], id);
    ask_until(200, url, next);
    assert_eq!(ask(url, key).status, 200);
    let third = attempt(&cluster, &["key", "create", "--tenant", "tax-office"]);
    assert!(third.code() == Some(3) && third.stderr.contains("2 live keys"), "{third:#?}");

    verb(&cluster, &["key", "revoke", id]);
    let refused = ask_until(401, url, key);
    assert_eq!(refused.json()["error"]["code"], "invalid_api_key");
    assert_eq!(ask(url, next).status, 200);
    let keys = verb(&cluster, &["key", "ls", "--tenant", "tax-office"]);
    let states: Vec<&str> =
        keys.as_array().unwrap().iter().map(|key| key["state"].as_str().unwrap()).collect();
    assert_eq!(states, ["revoked", "live"]);

    verb(&cluster, &["tenant", "set", "tax-office", "--concurrent", "0"]);
    let refused = ask_until(429, url, next);
    assert_eq!(refused.json()["error"]["code"], "rate_limit_exceeded");
    verb(&cluster, &["tenant", "delete", "tax-office", "--yes"]);
    ask_until(401, url, next);

    let folder = PathBuf::from(cluster.data_dir());
    let secrets =
        [key, next].map(|key| key.rsplit_once(id).map_or(&key[20..], |(_, rest)| &rest[1..]));
    for secret in secrets {
        assert_nowhere(&folder, secret.as_bytes());
        assert!(!http::get(&format!("{url}/metrics")).text.contains(secret));
    }
}

/// No file of this folder has these bytes in it.
fn assert_nowhere(folder: &Path, secret: &[u8]) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            assert_nowhere(&path, secret);
        } else if let Ok(bytes) = std::fs::read(&path) {
            let found = bytes.windows(secret.len()).any(|window| window == secret);
            assert!(!found, "a secret is in {}", path.display());
        }
    }
}

#[test]
fn an_open_cluster_answers_whoever_asks_and_is_refused_beyond_loopback() {
    let golden = Golden::load("mixtral");
    let cluster = Cluster::start(&["--model", golden.path(), "--regions", "fr=1", "--open"]);
    assert_eq!(ask(cluster.http(), "none").status, 200);
    assert!(!cluster.stdout().contains("authorization"), "{}", cluster.stdout());
    assert_eq!(cluster.stop(Signal::TERM).code(), Some(0));
    let dir = tempfile::tempdir().unwrap();
    let data_dir = dir.path().to_str().unwrap();
    let end = run(&["up", "--open", "--http", "0.0.0.0:0", "--data-dir", data_dir]);
    assert!(end.code() == Some(2) && end.stderr.contains("loopback"), "{end:#?}");
}
