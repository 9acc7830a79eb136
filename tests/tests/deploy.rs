//! Goal: what is in `deploy/` fits the program that it deploys.
//! Method: parse it, and hold its names against those in the code.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn text(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap()
}

fn yaml(path: &str) -> Value {
    serde_saphyr::from_str(&text(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The names of metrics in an expression.
fn metrics(expression: &str) -> BTreeSet<&str> {
    let words = expression.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    words.filter_map(|word| word.strip_prefix("entente_")).collect()
}

/// The files in which metrics have their names.
const NAMING: [&str; 3] =
    ["coordinator/src/metrics.rs", "expert-node/src/http.rs", "membership/src/metrics.rs"];

/// What stands in quotes behind each `job=` of an expression.
fn jobs(expression: &str) -> impl Iterator<Item = &str> {
    expression.split("job=\"").skip(1).filter_map(|rest| rest.split('"').next())
}

#[test]
fn alerts_are_about_metrics_and_jobs_that_there_are() {
    let code = NAMING.map(text).concat();
    let alerts = yaml("deploy/prometheus/alerts.yml");
    let config = yaml("deploy/prometheus/prometheus.yml");
    let scraped: BTreeSet<_> = config["scrape_configs"]
        .as_array()
        .unwrap()
        .iter()
        .map(|job| job["job_name"].as_str().unwrap())
        .collect();
    let rules = alerts["groups"][0]["rules"].as_array().unwrap();
    assert!(rules.len() > 5);
    for rule in rules {
        let expression = rule["expr"].as_str().unwrap();
        for name in metrics(expression) {
            let words = [format!("\"{name}\""), format!("\"entente_{name}\"")];
            let is_shown = words.iter().any(|word| code.contains(word));
            assert!(is_shown, "{} reads {name}", rule["alert"]);
        }
        for job in jobs(expression) {
            assert!(scraped.contains(job), "{} is about {job}", rule["alert"]);
        }
        assert!(rule["annotations"]["summary"].is_string(), "{rule}");
    }
}

#[test]
fn prometheus_scrapes_machines_and_ports_that_the_compose_file_has() {
    let compose = yaml("deploy/container/compose.yaml");
    let config = yaml("deploy/prometheus/prometheus.yml");
    for job in config["scrape_configs"].as_array().unwrap() {
        for group in job["static_configs"].as_array().unwrap() {
            for target in group["targets"].as_array().unwrap() {
                let (host, port) = target.as_str().unwrap().split_once(':').unwrap();
                let service = &compose["services"][host];
                assert!(service.is_object(), "{host}");
                // A coordinator shows metrics at its public port, others where they are told to.
                let shown = match job["job_name"].as_str().unwrap() {
                    "coordinator" => &service["ports"][0],
                    _ => &service["environment"]["ENTENTE_METRICS"],
                };
                let is_there = shown.as_str().is_some_and(|at| at.ends_with(&format!(":{port}")));
                assert!(is_there, "{host} shows metrics at {shown}, not at {port}");
            }
        }
    }
}

#[test]
fn containers_are_not_root_and_write_to_their_volume_only() {
    let compose = yaml("deploy/container/compose.yaml");
    let services = compose["services"].as_object().unwrap();
    let ours = services.iter().filter(|(name, _)| *name != "prometheus");
    for (name, service) in ours {
        assert_eq!(service["read_only"], true, "{name}");
        assert_eq!(service["user"], "10001:10001", "{name}");
        let role = service["command"][0].as_str().unwrap();
        let config = format!("/var/lib/entente/{role}.toml");
        assert_eq!(service["command"][2], config, "{name}");
        let data = format!("{name}:/var/lib/entente");
        assert_eq!(service["volumes"][0], data, "{name}");
        assert!(compose["volumes"].get(name).is_some(), "{name} has no volume");
    }
    assert!(text("deploy/container/Containerfile").contains("\nUSER 10001:10001\n"));
}

#[test]
fn the_unit_waits_longer_than_a_drain_and_hears_that_a_role_is_ready() {
    let unit = text("deploy/systemd/entente@.service");
    let value = |key: &str| {
        let line = unit.lines().find_map(|line| line.strip_prefix(&format!("{key}=")));
        line.unwrap_or_else(|| panic!("{key} is missing")).to_owned()
    };
    assert_eq!(value("Type"), "notify");
    assert_eq!(value("ProtectSystem"), "strict");
    let stop_s: u64 = value("TimeoutStopSec").parse().unwrap();
    // As long as the configuration does not say otherwise.
    let code = text("expert-node/src/config.rs");
    let line = code.lines().find_map(|line| line.strip_prefix("const DRAIN_DEADLINE_MS: u64 = "));
    let drain_ms: u64 = line.unwrap().trim_end_matches(';').replace('_', "").parse().unwrap();
    assert!(stop_s * 1_000 > drain_ms, "{stop_s} s, and a drain may take {drain_ms} ms");
}
