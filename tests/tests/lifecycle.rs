//! Goal: a cluster on one machine starts as a whole and ends as a whole, whatever ends it, and says
//! on standard output and in `cluster.json` exactly what scripts rely on.

use std::collections::BTreeSet;
use std::fs;
use std::process::Stdio;
use std::time::Duration;

use entente_tests::cluster::{STOP_DEADLINE, entente, run};
use entente_tests::process::{Process, Signal, wait_for, wait_gone};
use entente_tests::{Cluster, Golden, config, http};

const PROMPT: &str = "Translate to Swedish: vingt-trois";
const ANSWER: &str = "tjugotre\n";

#[test]
fn once_prints_the_answer_and_nothing_else() {
    let data = tempfile::tempdir().unwrap();
    let data = data.path().to_str().unwrap();
    let end = run(&["up", "--once", PROMPT, "--http", "127.0.0.1:0", "--data-dir", data]);
    assert_eq!(end.code(), Some(0), "{end:#?}");
    assert_eq!(end.stdout, ANSWER, "{}", end.stderr);
    assert!(!fs::exists(format!("{data}/cluster.json")).unwrap(), "cluster.json was left");
}

#[test]
fn flags_may_come_from_the_environment() {
    let golden = Golden::load("mixtral");
    let data = tempfile::tempdir().unwrap();
    let output = entente(&["up"])
        .env("ENTENTE_MODEL", golden.path())
        .env("ENTENTE_REGIONS", "se=1")
        .env("ENTENTE_ONCE", "a")
        .env("ENTENTE_MAX_TOKENS", "3")
        .env("ENTENTE_HTTP", "127.0.0.1:0")
        .env("ENTENTE_DATA_DIR", data.path())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(data.path().join("logs/se-expert-1.log").is_file());
    assert!(!data.path().join("logs/fr-expert-1.log").exists());
}

#[test]
fn a_ready_cluster_shows_and_publishes_what_runs() {
    let cluster = Cluster::start(&[]);
    let file = cluster.file();
    let keys: BTreeSet<&str> = file.as_object().unwrap().keys().map(String::as_str).collect();
    let known =
        ["http", "endpoints", "control", "api_key", "audit_keys", "processes", "witness_keys"];
    assert_eq!(keys, BTreeSet::from(known));
    assert_eq!(file["http"], file["endpoints"]["fr"]);
    let processes = file["processes"].as_array().unwrap();
    let shape = |p: &serde_json::Value| {
        ["name", "role", "region"].map(|key| p[key].as_str().unwrap().to_owned()).join(" ")
    };
    assert_eq!(
        processes.iter().map(shape).collect::<Vec<_>>(),
        [
            "fr-coordinator coordinator fr",
            "fr-expert-1 expert-node fr",
            "fr-expert-2 expert-node fr",
            "se-coordinator coordinator se",
            "se-expert-1 expert-node se",
            "se-expert-2 expert-node se",
            "witness witness de",
        ]
    );
    for endpoint in cluster.endpoints() {
        for path in ["/livez", "/health", "/readyz"] {
            assert_eq!(http::get(&format!("{endpoint}{path}")).status, 200, "{endpoint}{path}");
        }
        let models = http::get(&format!("{endpoint}/v1/models")).json();
        assert_eq!(models["data"][0]["id"], "phrasebook");
    }

    let stdout = wait_for(Duration::from_secs(30), || {
        let stdout = cluster.stdout();
        stdout.ends_with(ANSWER).then_some(stdout)
    });
    let stdout = stdout.unwrap_or_else(|| panic!("no first answer: {}", cluster.stdout()));
    for column in ["NAME", "ROLE", "REGION", "PID", "ADDRESS", "EXPERTS", "MEMORY"] {
        assert!(stdout.contains(column), "{column} is missing: {stdout}");
    }
    for process in processes {
        let row = stdout.lines().find(|line| line.contains(process["name"].as_str().unwrap()));
        let row = row.unwrap_or_else(|| panic!("{process} is missing: {stdout}"));
        assert!(row.contains(&process["pid"].to_string()), "{row}");
        assert!(row.contains(process["address"].as_str().unwrap()), "{row}");
        assert!(row.ends_with("MiB"), "{row}");
        // 4 layers of 8 experts, spread evenly over the two nodes of the region.
        let experts = if process["role"] == "expert-node" { "16" } else { "0" };
        assert!(row.split_whitespace().any(|cell| cell == experts), "{row}");
    }
    check_curl_line(&stdout);

    assert_eq!(cluster.stop(Signal::INT).code(), Some(0));
}

fn check_curl_line(stdout: &str) {
    let line = stdout.lines().find(|line| line.starts_with("curl ")).unwrap();
    let output = std::process::Command::new("sh").args(["-c", line]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && text.contains("tjugotre"), "{line}\n{text}");
}

#[test]
fn no_process_is_left_after_sigterm() {
    let golden = Golden::load("mixtral");
    let cluster = Cluster::start(&["--model", golden.path(), "--regions", "fr=2"]);
    assert_eq!(cluster.stop(Signal::TERM).code(), Some(0));
}

#[test]
fn no_process_is_left_after_the_parent_is_killed() {
    let golden = Golden::load("mixtral");
    let cluster = Cluster::start(&["--model", golden.path(), "--regions", "fr=2,se=1"]);
    assert_eq!(cluster.processes().len(), 6);
    assert_eq!(cluster.stop(Signal::KILL).code(), None);
}

#[test]
fn no_process_is_left_when_it_is_interrupted_while_starting() {
    let data = tempfile::tempdir().unwrap();
    // A long answer, so that it is not over before the children were counted.
    let golden = Golden::load("mixtral");
    let mut up = entente(&["up", "--http", "127.0.0.1:0", "--once", PROMPT, "--model"])
        .args([golden.path(), "--max-tokens", "4000", "--data-dir"])
        .arg(data.path())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let parent = u64::from(up.id());
    let children = || Some(children_of(parent)).filter(|children| children.len() == 7);
    let children = wait_for(STOP_DEADLINE, children).expect("seven children");
    Process::find(parent).unwrap().signal(Signal::INT);
    let status = wait_for(STOP_DEADLINE, || up.try_wait().unwrap()).expect("it stops");
    assert_eq!(status.code(), Some(130));
    assert_eq!(wait_gone(STOP_DEADLINE, &children), []);
}

fn children_of(parent: u64) -> Vec<Process> {
    let list = fs::read_to_string(format!("/proc/{parent}/task/{parent}/children"));
    let list = list.unwrap_or_default();
    list.split_whitespace().filter_map(|pid| Process::find(pid.parse().unwrap())).collect()
}

#[test]
fn a_process_that_ends_by_itself_is_started_again_on_its_address() {
    let cluster = Cluster::start(&["--regions", "se=1"]);
    let file = || -> serde_json::Value {
        let text = fs::read_to_string(format!("{}/cluster.json", cluster.data_dir())).unwrap();
        serde_json::from_str(&text).unwrap()
    };
    let entry = |name: &str| {
        let processes = file()["processes"].as_array().unwrap().clone();
        processes.into_iter().find(|process| process["name"] == name).unwrap()
    };
    for name in ["se-expert-1", "se-coordinator"] {
        let before = entry(name);
        cluster.process(name).signal(Signal::KILL);
        let after = wait_for(STOP_DEADLINE, || {
            let now = entry(name);
            (now["pid"] != before["pid"]).then_some(now)
        });
        let after = after.unwrap_or_else(|| panic!("{name} is not back: {}", cluster.stderr()));
        assert_eq!(after["address"], before["address"]);
        let ready = wait_for(STOP_DEADLINE, || {
            let back = format!("a process is back name={name}");
            cluster.stderr().contains(&back).then_some(())
        });
        assert!(ready.is_some(), "{name} is not ready: {}", cluster.stderr());
    }
    let end = run(&["chat", "--data-dir", cluster.data_dir(), PROMPT]);
    assert_eq!((end.code(), end.stdout.as_str()), (Some(0), ANSWER), "{}", end.stderr);
    let started_again = Process::find(entry("se-expert-1")["pid"].as_u64().unwrap()).unwrap();
    assert_eq!(cluster.stop(Signal::TERM).code(), Some(0));
    assert_eq!(wait_gone(STOP_DEADLINE, &[started_again]), []);
}

#[test]
fn a_data_directory_in_use_is_refused() {
    let golden = Golden::load("mixtral");
    let cluster = Cluster::start(&["--model", golden.path(), "--regions", "fr=1"]);
    let end =
        run(&["up", "--http", "127.0.0.1:0", "--once", "x", "--data-dir", cluster.data_dir()]);
    assert_eq!(end.code(), Some(1), "{end:#?}");
    assert!(end.stderr.contains("in use"), "{}", end.stderr);
    assert_eq!(http::get(&format!("{}/readyz", cluster.http())).status, 200);
}

#[test]
fn a_child_that_fails_at_the_start_is_named_with_the_end_of_its_log() {
    let golden = Golden::load("mixtral");
    let broken = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(&golden.dir).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), broken.path().join(entry.file_name())).unwrap();
    }
    fs::write(broken.path().join("tokenizer.json"), "{}").unwrap();
    let model = broken.path().to_str().unwrap();
    let end = Cluster::try_start(&["--model", model]).expect_err("it started");
    assert_eq!(end.code(), Some(1));
    for part in ["coordinator ended during the start", "exit status: 1", "tokenizer.json"] {
        assert!(end.stderr.contains(part), "{part:?} is missing: {}", end.stderr);
    }
}

#[test]
fn chat_finds_the_cluster_by_its_data_directory() {
    let cluster = Cluster::start(&["--regions", "se=1"]);
    let end = run(&["chat", "--data-dir", cluster.data_dir(), PROMPT]);
    assert_eq!((end.code(), end.stdout.as_str()), (Some(0), ANSWER), "{}", end.stderr);
    let key = cluster.api_key().unwrap();
    let end = run(&["chat", "--url", cluster.http(), "--api-key", key, PROMPT]);
    assert_eq!((end.code(), end.stdout.as_str()), (Some(0), ANSWER), "{}", end.stderr);
    let end = run(&["chat", "--url", cluster.http(), PROMPT]);
    assert!(end.code() == Some(1) && end.stderr.contains("401"), "{end:#?}");
    let nowhere = tempfile::tempdir().unwrap();
    let end = run(&["chat", "--data-dir", nowhere.path().to_str().unwrap(), PROMPT]);
    assert_eq!(end.code(), Some(2), "{end:#?}");
    assert!(end.stderr.contains("no cluster is running"), "{}", end.stderr);
}

#[test]
fn an_expert_node_without_certificates_listens_on_loopback_only() {
    let dir = tempfile::tempdir().unwrap();
    let file = config::write(dir.path(), "fr-expert-1", r#"listen = "0.0.0.0:0""#);
    let end = run(&["expert-node", "--config", &file]);
    assert_eq!(end.code(), Some(1), "{end:#?}");
    assert!(end.stderr.contains("the section [tls] is needed"), "{}", end.stderr);
}

#[test]
fn a_device_that_is_not_there_is_one_sentence_and_an_exit_code_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let file = config::write(dir.path(), "fr-expert-1", r#"listen = "127.0.0.1:0""#);
    let end = run(&["expert-node", "--config", &file, "--device", "cuda:4096"]);
    assert_eq!(end.code(), Some(9), "{end:#?}");
    let errors: Vec<&str> = end.stderr.lines().filter(|l| l.starts_with("error: ")).collect();
    assert!(matches!(errors[..], [error] if error.starts_with("error: cuda:4096: ")), "{end:#?}");

    let end = run(&["up", "--regions", "fr=1", "--device", "fr-expert-2=cuda:0"]);
    assert_eq!(end.code(), Some(2), "{end:#?}");
    assert!(end.stderr.contains("no process fr-expert-2 that computes"), "{}", end.stderr);
}

#[test]
fn an_expert_node_of_a_running_cluster_answers_nobody_without_a_certificate() {
    use std::io::{Read, Write};

    let golden = Golden::load("mixtral");
    let cluster = Cluster::start(&["--model", golden.path(), "--regions", "fr=1"]);
    let processes = cluster.file()["processes"].as_array().unwrap().clone();
    let node = processes.iter().find(|process| process["role"] == "expert-node").unwrap();
    // The beginnings of both protocols, in plain text.
    for begin in ["ENTENTE1", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"] {
        let mut peer = std::net::TcpStream::connect(node["address"].as_str().unwrap()).unwrap();
        peer.set_read_timeout(Some(STOP_DEADLINE)).unwrap();
        peer.write_all(begin.as_bytes()).unwrap();
        let mut answer = Vec::new();
        // The connection ends, and not by our own patience.
        if let Err(error) = peer.read_to_end(&mut answer) {
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        }
        assert!(answer.is_empty(), "{begin:?} was answered with {answer:?}");
    }
}
