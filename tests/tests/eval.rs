//! Goal: the bundled model is right about what it was trained for, measured through a running
//! cluster, and no expert of it is idle.

use std::collections::BTreeMap;

use entente_tests::cluster::run;
use entente_tests::{Cluster, http};
use serde_json::Value;

const ACCURACY_MIN: f64 = 0.97;

/// Least share of a layer's routed rows that any of its experts must get.
const SHARE_MIN: f64 = 0.02;

#[test]
fn the_phrasebook_translates_held_out_expressions_with_every_expert() {
    let cluster = Cluster::start(&[]);
    let end = run(&["eval", "--data-dir", cluster.data_dir(), "-o", "json"]);
    assert_eq!(end.code(), Some(0), "{}", end.stderr);
    let report: Value = serde_json::from_str(&end.stdout).unwrap();
    let accuracy = report["accuracy"].as_f64().unwrap();
    assert!(accuracy >= ACCURACY_MIN, "{}", end.stdout);
    assert!(report["total"].as_u64().unwrap() >= 500, "{}", end.stdout);
    assert_eq!(report["directions"].as_object().unwrap().len(), 6, "{}", end.stdout);
    println!("accuracy {accuracy} of {}", report["total"]);
    check_shares(cluster.http());
}

fn accuracy(weights: &str) -> f64 {
    let cluster = Cluster::start(&["--regions", "fr=1", "--weights", weights]);
    let end = run(&["eval", "--data-dir", cluster.data_dir(), "-o", "json"]);
    assert_eq!(end.code(), Some(0), "{}", end.stderr);
    let report: Value = serde_json::from_str(&end.stdout).unwrap();
    report["accuracy"].as_f64().unwrap()
}

#[test]
fn quantised_weights_cost_the_phrasebook_little() {
    let bf16 = accuracy("bf16");
    for (weights, loss_max) in [("q8", 0.003), ("fp8", 0.005), ("q4", 0.015)] {
        let quantised = accuracy(weights);
        println!("{weights} {quantised}, bf16 {bf16}");
        assert!(bf16 - quantised <= loss_max, "{weights} {quantised}, bf16 {bf16}");
    }
}

/// Reads `entente_gate_rows_total{expert="E",layer="L"} N`.
fn check_shares(base: &str) {
    let mut layers: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for line in http::get(&format!("{base}/metrics")).text.lines() {
        let Some(rest) = line.strip_prefix("entente_gate_rows_total{") else { continue };
        let (labels, count) = rest.split_once("} ").unwrap();
        let layer = labels.split(',').find(|label| label.starts_with("layer=")).unwrap();
        layers.entry(layer.to_owned()).or_default().push(count.parse().unwrap());
    }
    assert_eq!(layers.len(), 4, "layers of the phrasebook");
    for (layer, counts) in layers {
        // An expert that was never chosen has no line at all.
        assert_eq!(counts.len(), 8, "experts of {layer}");
        let total: f64 = counts.iter().sum();
        let least = counts.iter().copied().fold(f64::INFINITY, f64::min) / total;
        println!("{layer}: least used expert has {:.1} %", 100.0 * least);
        assert!(least >= SHARE_MIN, "{layer}: {counts:?}");
    }
}
