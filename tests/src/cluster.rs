//! A running `entente up`.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;

use crate::http;
use crate::process::{Process, Signal, wait_for, wait_gone};

/// Longest that a cluster may take to be ready on a small, busy machine.
const START_DEADLINE: Duration = Duration::from_secs(90);

/// Longest that a cluster may take to stop, running requests included.
pub const STOP_DEADLINE: Duration = Duration::from_secs(30);

/// The binary under test: `ENTENTE_BIN`, or the one beside this test's own executable.
pub fn binary() -> PathBuf {
    let beside = || {
        let test = std::env::current_exe().unwrap();
        test.parent().and_then(Path::parent).unwrap().join("entente")
    };
    let binary = std::env::var_os("ENTENTE_BIN").map_or_else(beside, PathBuf::from);
    let hint = "build it first: cargo build --package entente, with the profile of the tests";
    assert!(binary.is_file(), "there is no {}; {hint}", binary.display());
    binary
}

/// The binary with no environment variable of ours that could change what it does.
pub fn entente(args: &[&str]) -> Command {
    let mut command = Command::new(binary());
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("ENTENTE_") {
            command.env_remove(name);
        }
    }
    command.args(args).stdin(Stdio::null());
    command
}

/// How a process ended, and what it wrote.
#[derive(Debug)]
pub struct Finished {
    /// Its exit status.
    pub status: ExitStatus,
    /// What it wrote to standard output.
    pub stdout: String,
    /// What it wrote to standard error.
    pub stderr: String,
}

impl Finished {
    /// Its exit code; none when a signal ended it.
    pub fn code(&self) -> Option<i32> {
        self.status.code()
    }
}

/// Runs the binary to its end.
pub fn run(args: &[&str]) -> Finished {
    let output = entente(args).output().unwrap();
    Finished {
        status: output.status,
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

/// A running cluster; dropping it stops it and fails the test if a process is left.
#[derive(Debug)]
pub struct Cluster {
    up: Child,
    data_dir: PathBuf,
    file: Value,
    processes: Vec<Process>,
    // Logs and configurations; removed when the cluster has stopped.
    _dir: TempDir,
}

impl Cluster {
    /// Starts a cluster on free ports, in a data directory of its own.
    ///
    /// # Panics
    /// When it is not ready in time; the message holds what it wrote to standard error.
    pub fn start(args: &[&str]) -> Self {
        Self::try_start(args).unwrap_or_else(|end| panic!("{args:?} did not start: {end:#?}"))
    }

    /// As [`Self::start`], for clusters that may refuse.
    pub fn try_start(args: &[&str]) -> Result<Self, Finished> {
        Self::try_start_in(&[], args)
    }

    /// As [`Self::try_start`], with further variables in the environment of every process.
    pub fn try_start_in(env: &[(String, String)], args: &[&str]) -> Result<Self, Finished> {
        let dir = tempfile::Builder::new().prefix("entente-test-").tempdir().unwrap();
        let data_dir = dir.path().join("data");
        let (stdout, stderr) = (dir.path().join("stdout"), dir.path().join("stderr"));
        let data = data_dir.to_str().unwrap();
        let mut up = entente(&["up", "--http", "127.0.0.1:0", "--data-dir", data])
            .args(args)
            // One thread a process: the models are tiny and tests share few cores.
            .env("ENTENTE_THREADS", "1")
            .envs(env.iter().cloned())
            .stdout(File::create(&stdout).unwrap())
            .stderr(File::create(&stderr).unwrap())
            .spawn()
            .unwrap();
        let outcome = wait_for(START_DEADLINE, || {
            let file = read_cluster_file(&data_dir).map(Ok);
            file.or_else(|| up.try_wait().unwrap().map(Err))
        });
        let finished = |status| Finished {
            status,
            stdout: fs::read_to_string(&stdout).unwrap_or_default(),
            stderr: fs::read_to_string(&stderr).unwrap_or_default(),
        };
        match outcome {
            Some(Ok(file)) => {
                let pids = file["processes"].as_array().unwrap().iter();
                let processes =
                    pids.filter_map(|p| Process::find(p["pid"].as_u64().unwrap())).collect();
                let cluster = Self { up, data_dir, file, processes, _dir: dir };
                if let Some(key) = cluster.api_key() {
                    cluster.endpoints().iter().for_each(|url| http::show_key(url, key));
                }
                cluster.wait_for_first_answer();
                Ok(cluster)
            }
            Some(Err(status)) => Err(finished(status)),
            None => {
                up.kill().unwrap();
                let status = up.wait().unwrap();
                panic!("{args:?} was not ready in time: {:#?}", finished(status))
            }
        }
    }

    /// `up` asks a question of its own first, which must not get into the way of a test.
    fn wait_for_first_answer(&self) {
        let answered = || http::metric(self.http(), "entente_requests_finished_total") >= 1.0;
        let answered = wait_for(START_DEADLINE, || answered().then_some(()));
        assert!(answered.is_some(), "the first prompt was not answered: {}", self.stderr());
    }

    /// The parsed `cluster.json`.
    pub fn file(&self) -> &Value {
        &self.file
    }

    /// The folder that the cluster owns.
    pub fn data_dir(&self) -> &str {
        self.data_dir.to_str().unwrap()
    }

    /// URL of the first region's coordinator.
    pub fn http(&self) -> &str {
        self.file["http"].as_str().unwrap()
    }

    /// The key of the tenant that the cluster began with, where it needs one.
    pub fn api_key(&self) -> Option<&str> {
        self.file["api_key"].as_str()
    }

    /// URL of every region's coordinator.
    pub fn endpoints(&self) -> Vec<String> {
        let endpoints = self.file["endpoints"].as_object().unwrap().values();
        endpoints.map(|url| url.as_str().unwrap().to_owned()).collect()
    }

    /// Every child process.
    pub fn processes(&self) -> &[Process] {
        &self.processes
    }

    /// `entente up` itself.
    pub fn parent(&self) -> Process {
        Process::find(u64::from(self.up.id())).unwrap()
    }

    /// The child with this name.
    pub fn process(&self, name: &str) -> Process {
        let entries = self.file["processes"].as_array().unwrap();
        let entry = entries.iter().find(|entry| entry["name"] == name).unwrap();
        Process::find(entry["pid"].as_u64().unwrap()).unwrap()
    }

    /// What `up` wrote to standard output so far.
    pub fn stdout(&self) -> String {
        fs::read_to_string(self.data_dir.with_file_name("stdout")).unwrap()
    }

    /// What `up` wrote to standard error so far.
    pub fn stderr(&self) -> String {
        fs::read_to_string(self.data_dir.with_file_name("stderr")).unwrap()
    }

    /// Sends `up` a signal and waits for its end, and for that of all its children.
    pub fn stop(mut self, signal: Signal) -> ExitStatus {
        self.parent().signal(signal);
        let status = wait_for(STOP_DEADLINE, || self.up.try_wait().unwrap());
        let left = wait_gone(STOP_DEADLINE, &self.processes);
        assert!(left.is_empty(), "after {signal:?} these are left: {left:?}");
        status.unwrap_or_else(|| panic!("`up` did not end after {signal:?}"))
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if let Ok(None) = self.up.try_wait() {
            self.parent().signal(Signal::TERM);
            if wait_for(STOP_DEADLINE, || self.up.try_wait().ok().flatten()).is_none() {
                // Its children end with it.
                let _ = self.up.kill();
                let _ = self.up.wait();
            }
        }
        let left = wait_gone(STOP_DEADLINE, &self.processes);
        left.iter().for_each(|process| process.signal(Signal::KILL));
        if !std::thread::panicking() {
            assert!(left.is_empty(), "these processes were left: {left:?}");
        }
    }
}

fn read_cluster_file(data_dir: &Path) -> Option<Value> {
    let text = fs::read_to_string(data_dir.join("cluster.json")).ok()?;
    Some(serde_json::from_str(&text).expect("cluster.json is written in one step"))
}
