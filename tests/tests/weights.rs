//! Goal: weights are what the manifest says, wherever a node got them from and however long it holds
//! them.
//! Method: real clusters, of which one node has no weights in its model folder, or has a byte of its
//! memory changed from outside.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use entente_tests::cluster::{STOP_DEADLINE, run};
use entente_tests::process::{Signal, wait_for, wait_gone};
use entente_tests::{Cluster, Golden, http};
use serde_json::{Value, json};
use tempfile::TempDir;

/// What parts of a packed file begin at multiples of.
const ALIGNMENT: usize = 4_096;

fn cli(args: &[&str]) {
    let end = run(args);
    assert_eq!(end.code(), Some(0), "{args:?}: {end:#?}");
}

/// The checkpoint with its manifest, and a folder that has the manifest and no weights.
fn folders(golden: &Golden) -> (TempDir, String, String) {
    let dir = tempfile::tempdir().unwrap();
    let folder = |name: &str| {
        let path = dir.path().join(name);
        fs::create_dir(&path).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let (whole, thin) = (folder("whole"), folder("thin"));
    for entry in fs::read_dir(&golden.dir).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, Path::new(&whole).join(path.file_name().unwrap())).unwrap();
    }
    cli(&["model", "manifest", &whole, "--weights", "f32"]);
    cli(&["model", "verify", &whole]);
    for file in ["config.json", "manifest.json"] {
        fs::copy(Path::new(&whole).join(file), Path::new(&thin).join(file)).unwrap();
    }
    (dir, whole, thin)
}

fn node(cluster: &Cluster, name: &str) -> Value {
    let end = run(&["node", "ls", "-o", "json", "--data-dir", cluster.data_dir()]);
    assert_eq!(end.code(), Some(0), "{end:#?}");
    let listed: Value = serde_json::from_str(&end.stdout).unwrap();
    let nodes = listed["nodes"].as_array().unwrap();
    nodes.iter().find(|node| node["name"] == name).unwrap().clone()
}

/// Waits until a node is as it should be.
fn wait_for_node(cluster: &Cluster, name: &str, is_so: impl Fn(&Value) -> bool) {
    let now = || Some(node(cluster, name)).filter(|node| is_so(node));
    let end = wait_for(STOP_DEADLINE, now);
    assert!(end.is_some(), "{}\n{}", node(cluster, name), log(cluster, name));
}

fn log(cluster: &Cluster, name: &str) -> String {
    let file = PathBuf::from(cluster.data_dir()).join(format!("logs/{name}.log"));
    fs::read_to_string(file).unwrap()
}

/// Changes a node's configuration and kills it; it is started again with that.
fn restart(cluster: &Cluster, name: &str, edit: impl FnOnce(String) -> String) {
    let file = PathBuf::from(cluster.data_dir()).join(format!("{name}.toml"));
    fs::write(&file, edit(fs::read_to_string(&file).unwrap())).unwrap();
    let process = cluster.process(name);
    process.signal(Signal::KILL);
    assert!(wait_gone(STOP_DEADLINE, &[process]).is_empty(), "{name} survived SIGKILL");
}

fn pid_now(cluster: &Cluster, name: &str) -> u64 {
    let file = fs::read(PathBuf::from(cluster.data_dir()).join("cluster.json")).unwrap();
    let file: Value = serde_json::from_slice(&file).unwrap();
    let mut processes = file["processes"].as_array().unwrap().iter();
    processes.find(|process| process["name"] == name).unwrap()["pid"].as_u64().unwrap()
}

fn answers(cluster: &Cluster, golden: &Golden) -> Vec<String> {
    let ask = |case: &entente_tests::golden::Case| {
        let body = json!({
            "prompt": case.prompt, "max_tokens": 24, "temperature": 0.0, "logprobs": 0,
        });
        http::post(&format!("{}/v1/completions", cluster.http()), &body).choices()
    };
    golden.cases.iter().map(ask).collect()
}

#[test]
fn a_node_without_weights_is_given_them_by_peers_and_the_answers_stay_the_same() {
    let golden = Golden::load("mixtral");
    let (_dir, whole, thin) = folders(&golden);
    let model = ["--model", &whole, "--weights", "f32", "--regions", "fr=3", "--replicas", "2"];
    let cluster = Cluster::start(&model);
    let before = answers(&cluster, &golden);
    let first = node(&cluster, "fr-expert-3");
    restart(&cluster, "fr-expert-3", |toml| toml.replace(&whole, &thin));
    wait_for_node(&cluster, "fr-expert-3", |node| {
        let is_new = node["incarnation"].as_u64() > first["incarnation"].as_u64();
        is_new && node["state"] == "active" && node["held"].as_u64() > Some(0)
    });
    let told = log(&cluster, "fr-expert-3");
    assert!(told.contains("restored from a peer"), "{told}");
    assert_eq!(answers(&cluster, &golden), before);

    // What the lost node held is made anew on the others, of which one has no weights of its own.
    restart(&cluster, "fr-expert-1", |toml| toml.replace(&whole, "/nowhere"));
    wait_for_node(&cluster, "fr-expert-3", |node| node["placed"] == 24 && node["held"] == 24);
    assert_eq!(answers(&cluster, &golden), before);
}

/// Where bytes lie in the memory of a process that it may write to.
fn find(pid: u64, bytes: &[u8]) -> Vec<u64> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let memory = File::open(format!("/proc/{pid}/mem")).unwrap();
    let mut found = Vec::new();
    for line in maps.lines().filter(|line| line.contains(" rw-p ")) {
        let range = line.split(' ').next().unwrap().split_once('-').unwrap();
        let [start, end] = [range.0, range.1].map(|at| u64::from_str_radix(at, 16).unwrap());
        let mut held = vec![0; usize::try_from(end - start).unwrap()];
        if memory.read_exact_at(&mut held, start).is_ok() {
            // Weights begin at lines.
            let places = held.chunks(64).enumerate().filter(|(_, line)| *line == bytes);
            found.extend(places.map(|(line, _)| start + 64 * line as u64));
        }
    }
    found
}

/// The first line of an expert in a packed file, by the order and the sizes in the manifest.
fn first_line_of(packed: &str, part: &str) -> Vec<u8> {
    let text = fs::read(Path::new(packed).join("manifest.json")).unwrap();
    let manifest: Value = serde_json::from_slice(&text).unwrap();
    let mut offset = ALIGNMENT;
    for entry in manifest["parts"].as_array().unwrap() {
        if entry["part"] == part {
            let file = fs::read(Path::new(packed).join("weights.entente")).unwrap();
            return file[offset..offset + 64].to_vec();
        }
        let len = usize::try_from(entry["bytes"].as_u64().unwrap()).unwrap();
        offset = (offset + len).next_multiple_of(ALIGNMENT);
    }
    panic!("the manifest has no {part}")
}

#[test]
fn a_byte_that_changes_in_memory_is_found_and_the_replica_is_got_anew() {
    let golden = Golden::load("mixtral");
    let dir = tempfile::tempdir().unwrap();
    let packed = dir.path().join("packed");
    let packed = packed.to_str().unwrap();
    cli(&["model", "import", golden.path(), "--weights", "f32", "--out", packed]);
    let model = ["--model", packed, "--weights", "f32", "--regions", "fr=2", "--replicas", "2"];
    let cluster = Cluster::start(&model);
    let before = answers(&cluster, &golden);
    let (first, killed) = (node(&cluster, "fr-expert-1"), pid_now(&cluster, "fr-expert-1"));
    restart(&cluster, "fr-expert-1", |toml| format!("scrub_interval_s = 1\n{toml}"));
    wait_for_node(&cluster, "fr-expert-1", |node| {
        let is_new = node["incarnation"].as_u64() > first["incarnation"].as_u64();
        is_new && node["state"] == "active" && node["held"] == 24
    });
    let pid = wait_for(STOP_DEADLINE, || {
        Some(pid_now(&cluster, "fr-expert-1")).filter(|pid| *pid != killed)
    });
    let pid = pid.expect("cluster.json names the process that runs now");

    let line = first_line_of(packed, "expert 5 of layer 1");
    let places = find(pid, &line);
    assert_eq!(places.len(), 1, "the expert is in memory once");
    let memory = File::options().write(true).open(format!("/proc/{pid}/mem")).unwrap();
    memory.write_all_at(&[line[7] ^ 0x40], places[0] + 7).unwrap();
    assert!(find(pid, &line).is_empty(), "the byte was not changed");

    let back = wait_for(STOP_DEADLINE, || Some(()).filter(|()| !find(pid, &line).is_empty()));
    let told = log(&cluster, "fr-expert-1");
    assert!(back.is_some(), "it was not loaded anew: {told}");
    assert!(told.contains("weights have changed in memory"), "{told}");
    wait_for_node(&cluster, "fr-expert-1", |node| node["held"] == 24);
    assert_eq!(answers(&cluster, &golden), before);
    let voters = ["fr-coordinator", "witness-1", "witness-2"].map(|name| log(&cluster, name));
    let heard = voters.iter().any(|log| log.contains("weights have changed in memory"));
    assert!(heard, "no voter was told: {voters:#?}");
}
