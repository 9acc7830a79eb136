//! Goal: every request leaves a record that its tenant can have, that anybody can check offline, and
//! that expert nodes vouch for; and nothing in it says what was asked.
//! Method: a running cluster, its public API, and the verbs of `entente audit` on its files.

use std::path::{Path, PathBuf};
use std::time::Duration;

use entente_audit::report::Month;
use entente_audit::witness::Witness;
use entente_tests::cluster::run;
use entente_tests::process::{Signal, wait_for};
use entente_tests::{Cluster, Golden, http};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(20);
/// A prompt that is nowhere but in the request.
const CANARY: &str = "a canary sat in the mine";

/// Runs a verb of `entente audit` and reads the JSON that it prints.
fn audit(args: &[&str]) -> Value {
    let end = run(&[&["audit"], args].concat());
    assert_eq!(end.code(), Some(0), "{args:?}: {}", end.stderr);
    serde_json::from_str(&end.stdout).unwrap()
}

fn verify(path: &Path, key: &str) -> (Option<i32>, String) {
    let end = run(&["audit", "verify", path.to_str().unwrap(), "--key", key, "-o", "json"]);
    (end.code(), end.stdout + &end.stderr)
}

fn receipt(url: &str, id: &str) -> Value {
    let url = format!("{url}/v1/receipts/{id}");
    let found = wait_for(SOON, || Some(http::get(&url)).filter(|reply| reply.status == 200));
    found.expect("the receipt is there soon").json()
}

/// Whether any file of this folder has these bytes in it.
fn is_in(folder: &Path, bytes: &[u8]) -> bool {
    std::fs::read_dir(folder).unwrap().any(|entry| {
        let path = entry.unwrap().path();
        if path.is_dir() {
            return is_in(&path, bytes);
        }
        std::fs::read(path).is_ok_and(|file| file.windows(bytes.len()).any(|part| part == bytes))
    })
}

#[test]
fn a_request_leaves_a_receipt_that_verifies_offline_and_that_its_nodes_vouch_for() {
    let golden = Golden::load("mixtral");
    let cluster = Cluster::start(&["--model", golden.path(), "--regions", "fr=2,se=1"]);
    let (url, data_dir) = (cluster.http().to_owned(), PathBuf::from(cluster.data_dir()));
    let key = cluster.file()["audit_keys"]["fr-coordinator"].as_str().unwrap().to_owned();
    let folder = data_dir.join("audit/fr-coordinator");

    let body = json!({"prompt": CANARY, "max_tokens": 4, "n": 2});
    let answer = http::post(&format!("{url}/v1/completions"), &body);
    assert_eq!(answer.status, 200, "{}", answer.text);
    let id = answer.json()["id"].as_str().unwrap().replace("cmpl-", "");
    let receipt = receipt(&url, &id);
    let record = &receipt["record"];
    assert_eq!((&record["id"], &record["decision"]), (&json!(id), &json!("served")));
    assert_eq!((&record["tenant"], receipt["key"].as_str()), (&json!("local"), Some(&*key)));
    let regions = record["nodes"].as_array().unwrap().iter().map(|node| &node["region"]);
    assert!(
        regions.clone().count() > 0 && regions.clone().all(|region| region == "fr"),
        "{record}"
    );

    // One file, one key, no cluster.
    let file = data_dir.join("it.tlog-proof");
    let proof = receipt["proof"].as_str().unwrap();
    std::fs::write(&file, proof).unwrap();
    assert_eq!(verify(&file, &key).0, Some(0));
    std::fs::write(&file, proof.replacen("index ", "index 1", 1)).unwrap();
    assert_eq!(verify(&file, &key).0, Some(1), "a proof of another index");
    let other = cluster.file()["audit_keys"]["se-coordinator"].as_str().unwrap();
    assert_eq!(verify(&file, other).0, Some(1), "another log's key");

    // The nodes have signed, and agree with the record.
    let all_signed = wait_for(SOON, || {
        let (code, text) = verify(&folder, &key);
        assert_eq!(code, Some(0), "{text}");
        let said: Value = serde_json::from_str(&text).unwrap();
        (said["statements"].as_u64() > Some(0) && said["silent"] == json!([])).then_some(said)
    });
    assert!(all_signed.is_some(), "{:?}", verify(&folder, &key));
    // The voters have agreed on what the log holds.
    let committed = || http::metric(&url, "entente_audit_committed_records");
    assert!(wait_for(SOON, || (committed() >= 1.0).then_some(())).is_some());

    let month = Month::of(record["ended_ms"].as_u64().unwrap()).to_string();
    let dir = data_dir.to_str().unwrap();
    let report = audit(&["report", "--data-dir", dir, "--tenant", "local", "--month", &month]);
    assert_eq!(report["regions"], json!(["fr"]), "{report}");
    assert!(!is_in(&data_dir.join("audit"), CANARY.as_bytes()));
    assert!(!is_in(&data_dir.join("raft"), CANARY.as_bytes()));
}

/// Records under the latest checkpoint of a coordinator's log.
fn tree_size(folder: &Path) -> u64 {
    let checkpoint = std::fs::read_to_string(folder.join("checkpoint")).unwrap_or_default();
    checkpoint.lines().nth(1).map_or(0, |size| size.parse().unwrap())
}

#[test]
fn requests_without_a_key_are_counted_and_do_not_fill_the_log() {
    // As many as `membership::allowance` has written down at once, and some time for more of them.
    const WRITTEN_MAX: u64 = 1_024 + 60;
    const FLOOD: u64 = 2_000;
    let golden = Golden::load("mixtral");
    let cluster = Cluster::start(&["--model", golden.path(), "--regions", "fr=1"]);
    let url = cluster.http().to_owned();
    let mine = cluster.api_key().unwrap().to_owned();
    let folder = Path::new(cluster.data_dir()).join("audit/fr-coordinator");
    let refused = || {
        let text = http::get(&format!("{url}/metrics")).text;
        let series = "entente_refused_requests_total{reason=\"invalid_api_key\"} ";
        text.lines().find_map(|line| line.strip_prefix(series)).unwrap().parse::<u64>().unwrap()
    };
    assert_eq!(refused(), 0);
    http::show_key(&url, "mk_0_none");
    let ask = || http::post(&format!("{url}/v1/completions"), &json!({"prompt": "a"}));
    assert!((0..FLOOD).all(|_| ask().status == 401));
    assert_eq!(refused(), FLOOD);
    // What somebody with a key does is recorded as ever, behind all that came before it.
    http::show_key(&url, &mine);
    let body = json!({"prompt": "a", "max_tokens": 2});
    let served = http::post(&format!("{url}/v1/completions"), &body);
    assert_eq!(served.status, 200, "{}", served.text);
    receipt(&url, &served.json()["id"].as_str().unwrap().replace("cmpl-", ""));
    let size = tree_size(&folder);
    assert!((1_000..=WRITTEN_MAX).contains(&size), "{size} records");
}

#[test]
fn what_is_refused_is_recorded_and_an_export_cannot_be_changed() {
    let golden = Golden::load("mixtral");
    let cluster = Cluster::start(&["--model", golden.path(), "--regions", "fr=1"]);
    let (url, data_dir) = (cluster.http().to_owned(), cluster.data_dir().to_owned());
    let key = cluster.file()["audit_keys"]["fr-coordinator"].as_str().unwrap().to_owned();
    let mine = cluster.api_key().unwrap().to_owned();
    let ask = |body: Value| http::post(&format!("{url}/v1/completions"), &body).status;
    assert_eq!(ask(json!({"prompt": "a", "max_tokens": 2})), 200);
    assert_eq!(ask(json!({"prompt": "a", "residency": ["de"]})), 403);
    http::show_key(&url, "mk_0_none");
    assert_eq!(ask(json!({"prompt": "a"})), 401);
    http::show_key(&url, &mine);

    let tail = || run(&["audit", "tail", "--data-dir", &data_dir, "-n", "100"]).stdout;
    let there = wait_for(SOON, || {
        let text = tail();
        let codes = ["residency_unsatisfiable", "invalid_api_key", r#""decision":"served""#];
        codes.iter().all(|code| text.contains(code)).then_some(())
    });
    assert!(there.is_some(), "{}", tail());
    let file = Path::new(&data_dir).join("export.jsonl");
    let to = file.to_str().unwrap();
    let end = run(&["audit", "export", "--data-dir", &data_dir, "--file", to]);
    assert_eq!(end.code(), Some(0), "{end:#?}");
    assert_eq!(verify(&file, &key).0, Some(0));
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, text.replace(r#""status":401"#, r#""status":400"#)).unwrap();
    let (code, said) = verify(&file, &key);
    assert!(code == Some(1) && said.contains("is not what was signed"), "{said}");
    let without: Vec<&str> =
        text.lines().filter(|line| !line.contains("invalid_api_key")).collect();
    std::fs::write(&file, without.join("\n") + "\n").unwrap();
    let (code, said) = verify(&file, &key);
    assert!(code == Some(1) && said.contains("it is missing"), "{said}");
}

#[test]
fn a_witness_cosigns_what_the_cluster_has_agreed_on_and_verify_wants_its_line() {
    let golden = Golden::load("mixtral");
    let cluster = Cluster::start(&["--model", golden.path(), "--regions", "fr=1,se=1"]);
    let (url, dir) = (cluster.http().to_owned(), cluster.data_dir().to_owned());
    let key_in = |keys: &str, name: &str| cluster.file()[keys][name].as_str().unwrap().to_owned();
    let key = key_in("audit_keys", "fr-coordinator");
    let witness = key_in("witness_keys", "witness");
    let body = json!({"prompt": "a", "max_tokens": 2});
    let answer = http::post(&format!("{url}/v1/completions"), &body);
    assert_eq!(answer.status, 200, "{}", answer.text);
    let id = answer.json()["id"].as_str().unwrap().replace("cmpl-", "");
    // Before somebody asks for a receipt nothing may be signed yet.
    receipt(&url, &id);

    let file = Path::new(&dir).join("export.jsonl");
    let verify = |path: &Path, witness: &str| {
        let path = path.to_str().unwrap();
        let end = run(&["audit", "verify", path, "--key", &key, "--witness-key", witness]);
        (end.code(), end.stdout + &end.stderr)
    };
    let exported = || {
        let to = file.to_str().unwrap();
        let log = ["audit", "export", "--data-dir", &dir, "--node", "fr-coordinator"];
        assert_eq!(run(&[&log[..], &["--file", to]].concat()).code(), Some(0));
        let (code, said) = verify(&file, &witness);
        assert!(code == Some(0) || said.contains("has not signed it"), "{said}");
        let has_it = std::fs::read_to_string(&file).unwrap().contains(&id);
        (code == Some(0) && has_it).then_some(said)
    };
    let said = wait_for(SOON, exported).expect("the export is cosigned soon");
    assert!(said.contains("local/witness/witness cosigned its first"), "{said}");
    let folder = Path::new(&dir).join("audit/fr-coordinator");
    assert_eq!(verify(&folder, &witness).0, Some(0));
    let ca = format!("{dir}/tls/ca.pem");
    let by_ca = ["audit", "verify", file.to_str().unwrap(), "--key", &key, "--ca", &ca];
    assert_eq!(run(&by_ca).code(), Some(0), "its certificates are of the cluster's CAs");
    let proof = receipt(&url, &id)["proof"].as_str().unwrap().to_owned();
    let proof_file = Path::new(&dir).join("it.tlog-proof");
    std::fs::write(&proof_file, &proof).unwrap();
    assert_eq!(verify(&proof_file, &witness).0, Some(0));

    // A witness that is silent holds up neither requests nor checkpoints, and catches up later.
    let silent = cluster.process("witness");
    silent.signal(Signal::STOP);
    let metric = |name: &str| http::metric(&url, name);
    let before = metric("entente_audit_committed_records");
    assert_eq!(http::post(&format!("{url}/v1/completions"), &body).status, 200);
    let committed = || Some(metric("entente_audit_committed_records")).filter(|now| *now > before);
    let committed = wait_for(SOON, committed).expect("it is committed without the witness");
    silent.signal(Signal::CONT);
    let cosigned = || metric("entente_audit_cosigned_records") >= committed;
    assert!(wait_for(SOON, || cosigned().then_some(())).is_some(), "it does not catch up");

    // A key that is not the witness's, and a proof without its line.
    let (code, said) = verify(&proof_file, &other_key(&witness));
    assert!(code == Some(1) && said.contains("local/witness/witness+"), "{said}");
    let lines = proof.lines().filter(|line| !line.contains("— local/witness/"));
    let without: String = lines.map(|line| format!("{line}\n")).collect();
    std::fs::write(&proof_file, without).unwrap();
    let (code, said) = verify(&proof_file, &witness);
    assert!(code == Some(1) && said.contains("has not signed it"), "{said}");
}

/// A key of the same name whose private half nobody here has.
fn other_key(key: &str) -> String {
    let dir = tempfile::tempdir().unwrap();
    let name = key.split('+').next().unwrap();
    Witness::open(dir.path(), name).unwrap().verifier().to_string()
}
