//! Goal: no row of a request leaves the regions that it may be in, whatever breaks.
//! Method: a cluster of two countries, in which every expert node of one is killed, paused and slowed
//! under requests that may be nowhere else; then what the nodes of the other country have counted.

use entente_tests::cluster::run;
use entente_tests::{Cluster, http};
use serde_json::{Value, json};

const DRILL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/drills/residency-fr-only.yaml");
const ROWS: &str = "entente_expert_rows_total";

/// The samples of one metric of a process: what is between braces, and the value.
fn samples(process: &Value, metric: &str) -> Vec<(String, f64)> {
    let text = http::get(process["metrics"].as_str().unwrap()).text;
    let sample = |line: &str| {
        let (labels, value) = line.strip_prefix(metric)?.strip_prefix('{')?.split_once("} ")?;
        Some((labels.to_owned(), value.parse().unwrap()))
    };
    text.lines().filter_map(sample).collect()
}

fn processes<'a>(cluster: &'a Cluster, role: &str, region: &str) -> Vec<&'a Value> {
    let all = cluster.file()["processes"].as_array().unwrap().iter();
    all.filter(|process| process["role"] == role && process["region"] == region).collect()
}

#[test]
fn rows_that_may_be_in_one_country_only_never_reach_another_while_all_its_nodes_fail() {
    let cluster =
        Cluster::start(&["--regions", "fr=2,se=2", "--replicas", "2", "--link", "fr-se=0ms"]);
    let drilled = run(&["drill", "run", DRILL, "--data-dir", cluster.data_dir()]);
    assert_eq!(drilled.code(), Some(0), "{}\n{}", drilled.stdout, drilled.stderr);

    let sent = samples(processes(&cluster, "coordinator", "fr")[0], ROWS);
    assert!(matches!(&sent[..], [(label, rows)] if label == "region=\"fr\"" && *rows > 0.0));
    let computed = |node: &&Value| samples(node, ROWS).iter().map(|(_, rows)| rows).sum::<f64>();
    let in_fr: f64 = processes(&cluster, "expert-node", "fr").iter().map(computed).sum();
    assert!(in_fr > 0.0, "whoever was restarted has computed something since");
    for node in processes(&cluster, "expert-node", "se") {
        let name = &node["name"];
        assert_eq!(samples(node, ROWS), [("region=\"se\"".to_owned(), 0.0)], "{name}");
        let refused = samples(node, "entente_refused_frames_total");
        assert!(
            refused.iter().all(|(_, frames)| *frames == 0.0),
            "{name} was sent frames: {refused:?}"
        );
    }
}

#[test]
fn a_request_is_served_refused_or_told_the_right_entry_by_each_country() {
    let cluster = Cluster::start(&["--regions", "fr=1,se=1"]);
    let endpoint = |region: &str| cluster.file()["endpoints"][region].as_str().unwrap();
    let ask = |region: &str, residency: &[&str]| {
        let body = json!({ "prompt": "a", "max_tokens": 1, "residency": residency });
        let reply = http::post(&format!("{}/v1/completions", endpoint(region)), &body);
        (reply.status, reply.json()["error"].clone())
    };
    for region in ["fr", "se"] {
        assert_eq!(ask(region, &[region]).0, 200);
        assert_eq!(ask(region, &["fr", "se"]).0, 200);
        let (status, error) = ask(region, &["de"]);
        assert_eq!((status, &error["code"]), (403, &json!("residency_unsatisfiable")));
    }
    let (status, error) = ask("fr", &["se"]);
    assert_eq!((status, &error["code"]), (421, &json!("wrong_entry_region")));
    assert!(error["message"].as_str().unwrap().contains(endpoint("se")), "{error}");
    // The same, explained without asking.
    let request = r#"{"residency": ["se", "de"]}"#;
    let at = ["--data-dir", cluster.data_dir(), "-o", "json"];
    let test = ["residency", "test", "--tenant", "local", "--request", request];
    let explained = run(&[&test[..], &at].concat());
    assert_eq!(explained.code(), Some(0), "{}", explained.stderr);
    let rows: Value = serde_json::from_str(&explained.stdout).unwrap();
    let decision = |region: &str| {
        let rows = rows.as_array().unwrap();
        rows.iter().find(|row| row["entry"] == region).unwrap().clone()
    };
    assert_eq!(decision("se")["decision"], "allowed", "{rows}");
    assert_eq!(decision("se")["allowed"], json!(["se"]), "{rows}");
    assert_eq!(decision("fr")["decision"], "wrong_entry_region", "{rows}");
    let reason = decision("fr")["reason"].as_str().unwrap().to_owned();
    assert!(reason.contains(endpoint("se")), "{reason}");
}
