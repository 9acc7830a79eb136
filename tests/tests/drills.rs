//! Goal: a drill says what happened, also when that is bad, and leaves nothing broken behind.
//! Method: scenarios that must miss, that cannot be run, and that are interrupted, on a real cluster
//! with one copy of each expert. Those that must pass are in `tests/drills/` and run by xtask.

use std::fs;
use std::path::Path;
use std::process::Stdio;

use entente_tests::cluster::{STOP_DEADLINE, entente, run};
use entente_tests::process::{Process, Signal, wait_for};
use entente_tests::{Cluster, http};
use serde_json::Value;

/// The only copy of some experts does not answer for longer than a request may wait. That is less
/// than it takes the leader to miss the node and have its experts loaded elsewhere, about a second.
const MISS: &str = "
name: too long
proves: That a miss is one.
load: {streams: 4, requests: 20, max_tokens: 16, deadline: 500ms}
faults:
  - at: 500ms
    action: {pause: {for: 2500ms}}
    target: fr-expert-1
expect: {failed_max: 0, identical: true}
";

/// Pauses a process and would leave it so for long.
const ENDLESS: &str = "
name: endless
proves: Nothing, as it is interrupted.
load: {streams: 1, duration: 10m, max_tokens: 16}
faults:
  - {at: 100ms, action: {pause: {for: 10m}}, target: fr-expert-1}
expect: {}
";

fn write(folder: &Path, text: &str) -> String {
    let path = folder.join("scenario.yaml");
    fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

/// Whether the process is stopped by a signal: the letter after its name in `/proc/<pid>/stat`.
fn is_paused(cluster: &Cluster, name: &str) -> bool {
    let entries = cluster.file()["processes"].as_array().unwrap();
    let pid = &entries.iter().find(|entry| entry["name"] == name).unwrap()["pid"];
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    stat.rsplit_once(") ").unwrap().1.starts_with('T')
}

#[test]
fn a_wrong_scenario_is_refused_with_the_key_and_its_line() {
    let dir = tempfile::tempdir().unwrap();
    let file = write(dir.path(), &MISS.replace("requests:", "request:"));
    let refused = run(&["drill", "run", &file]);
    assert_eq!(refused.code(), Some(2), "{}", refused.stderr);
    assert!(refused.stderr.contains("`request`"), "{}", refused.stderr);
    assert!(refused.stderr.contains("line 4"), "{}", refused.stderr);
}

#[test]
fn a_drill_that_misses_says_so_and_one_that_is_interrupted_undoes_what_it_did() {
    let dir = tempfile::tempdir().unwrap();
    let cluster = Cluster::start(&["--regions", "fr=2", "--replicas", "1"]);
    let at = ["--data-dir", cluster.data_dir()];

    let file = write(dir.path(), MISS);
    let missed = run(&[&["drill", "run", &file, "-o", "json"], &at[..]].concat());
    assert_eq!(missed.code(), Some(8), "{}", missed.stderr);
    let report: Value = serde_json::from_str(&missed.stdout).unwrap();
    let verdicts: Vec<(&str, bool)> = report["checks"]
        .as_array()
        .unwrap()
        .iter()
        .map(|check| (check["check"].as_str().unwrap(), check["ok"].as_bool().unwrap()))
        .collect();
    assert_eq!(
        verdicts[..3],
        [("strikes", true), ("failed requests", false), ("outputs that differ", true),],
        "{report:#}"
    );
    let failure = &report["failures"][0];
    assert!(failure["error"].as_str().unwrap().contains("time"), "{failure}");
    assert!(failure["after"].as_str().unwrap().contains("pause fr-expert-1"), "{failure}");
    assert_eq!(report["passed"], false);

    let file = write(dir.path(), ENDLESS);
    let mut drill = entente(&[&["drill", "run", &file], &at[..]].concat())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let paused = wait_for(STOP_DEADLINE, || is_paused(&cluster, "fr-expert-1").then_some(()));
    Process::find(drill.id().into()).unwrap().signal(Signal::INT);
    let status = wait_for(STOP_DEADLINE, || drill.try_wait().unwrap());
    assert!(paused.is_some(), "the drill paused nobody");
    assert_eq!(status.and_then(|status| status.code()), Some(130));
    assert!(!is_paused(&cluster, "fr-expert-1"));
    assert_eq!(http::get(&format!("{}/livez", cluster.http())).status, 200);
}
