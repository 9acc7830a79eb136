//! A cluster on machines of their own, each an address of loopback and a folder: what an operator
//! does with `entente init`, `entente token create`, `entente join` and one process a machine.

use std::fs::{self, File};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;

use crate::cluster::{Finished, entente, run};
use crate::http;
use crate::process::{Process, Signal, wait_for, wait_gone};

/// Longest that anything of this may take on a small, busy machine.
const DEADLINE: Duration = Duration::from_secs(120);

/// All machines; dropping it ends what runs on them.
#[derive(Debug)]
pub struct Machines {
    dir: TempDir,
    founder: PathBuf,
    model: String,
    running: Vec<Running>,
}

#[derive(Debug)]
struct Running {
    name: String,
    child: Child,
}

/// An address of this host with a port that was free a moment ago.
pub fn free_address(host: &str) -> String {
    TcpListener::bind((host, 0)).unwrap().local_addr().unwrap().to_string()
}

impl Machines {
    /// Founds a cluster in these regions, the first coordinator on `host`, and starts that one.
    /// `flags` are further ones of `entente init`.
    ///
    /// # Panics
    /// When it does not come about.
    pub fn found(regions: &str, host: &str, model: &str, flags: &[&str]) -> Self {
        let dir = tempfile::Builder::new().prefix("entente-test-").tempdir().unwrap();
        let name = format!("{}-coordinator", &regions[..2]);
        let founder = dir.path().join(&name);
        let (listen, http) = (free_address(host), free_address(host));
        let model = model.to_owned();
        let mut machines = Self { dir, founder: founder.clone(), model, running: Vec::new() };
        let machine = machines.machine(&founder, &listen, &http);
        let found = ["init", "--cluster", "production", "--regions", regions];
        let end = run(&[&found[..], flags, &borrowed(&machine)].concat());
        assert_eq!(end.code(), Some(0), "{end:#?}");
        machines.start(&name, "coordinator");
        machines.wait("the founder answers", || machines.attempt(&["raft", "status"]).ok());
        machines
    }

    /// Makes a token, joins by it on `host`, and starts what joined.
    pub fn join(&mut self, region: &str, role: &str, name: &str, host: &str) {
        let token = self.token(region, role);
        let end = self.try_join(&token, name, host);
        assert_eq!(end.code(), Some(0), "{end:#?}");
        self.start(name, role);
    }

    /// A new token.
    pub fn token(&self, region: &str, role: &str) -> String {
        let made = self.verb(&["token", "create", "--region", region, "--role", role]);
        made["token"].as_str().unwrap().to_owned()
    }

    /// Joins by a token and starts nothing.
    pub fn try_join(&self, token: &str, name: &str, host: &str) -> Finished {
        let folder = self.dir.path().join(name);
        let machine = self.machine(&folder, &free_address(host), &free_address(host));
        run(&[&["join", token, "--name", name], &borrowed(&machine)[..]].concat())
    }

    fn machine(&self, folder: &Path, listen: &str, http: &str) -> Vec<String> {
        let folder = folder.to_str().unwrap();
        let flags = ["--dir", folder, "--listen", listen, "--http", http, "--model", &self.model];
        let host = listen.rsplit_once(':').map_or(listen, |(host, _)| host);
        let more = ["--weights", "f32", "--metrics", &free_address(host)];
        flags.iter().chain(&more).map(|flag| (*flag).to_owned()).collect()
    }

    /// Starts the process of a machine.
    pub fn start(&mut self, name: &str, role: &str) {
        let folder = self.dir.path().join(name);
        let config = folder.join(format!("{role}.toml"));
        let log = File::create(folder.join("log")).unwrap();
        let child = entente(&[role, "--config", config.to_str().unwrap()])
            .env("ENTENTE_THREADS", "1")
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        self.running.push(Running { name: name.to_owned(), child });
    }

    /// Tells a process to leave, and waits until it has.
    pub fn stop(&mut self, name: &str) {
        let at = self.running.iter().position(|running| running.name == name).unwrap();
        let mut running = self.running.remove(at);
        Process::find(u64::from(running.child.id())).unwrap().signal(Signal::TERM);
        let ended = wait_for(DEADLINE, || running.child.try_wait().unwrap());
        let status = ended.unwrap_or_else(|| panic!("{name} does not end: {}", self.log(name)));
        assert!(status.success(), "{name}: {status}: {}", self.log(name));
    }

    /// What an operator's verb prints as JSON.
    pub fn verb(&self, words: &[&str]) -> Value {
        self.attempt(words).unwrap_or_else(|end| panic!("{words:?}: {end:#?}"))
    }

    /// The same for one that may fail.
    ///
    /// # Errors
    /// How it ended.
    pub fn attempt(&self, words: &[&str]) -> Result<Value, Box<Finished>> {
        let folder = self.founder.to_str().unwrap();
        let end = run(&[words, &["--data-dir", folder, "-o", "json"]].concat());
        match end.code() {
            Some(0) => Ok(serde_json::from_str(&end.stdout).unwrap()),
            _ => Err(Box::new(end)),
        }
    }

    /// A file of a machine.
    pub fn file(&self, name: &str, path: &str) -> PathBuf {
        self.dir.path().join(name).join(path)
    }

    /// The public API of a coordinator.
    pub fn http(&self, name: &str) -> String {
        self.listens(name, "coordinator", "http")
    }

    /// Where a process shows its metrics.
    pub fn metrics(&self, name: &str, role: &str) -> String {
        let key = if role == "coordinator" { "http" } else { "metrics_listen" };
        format!("{}/metrics", self.listens(name, role, key))
    }

    fn listens(&self, name: &str, role: &str, key: &str) -> String {
        let config = fs::read_to_string(self.file(name, &format!("{role}.toml"))).unwrap();
        let line = config.lines().find_map(|line| line.strip_prefix(&format!("{key} = ")));
        format!("http://{}", line.unwrap().trim_matches('"'))
    }

    /// Makes a tenant that may use these regions, and shows its key to these coordinators.
    pub fn show_key(&self, regions: &str, coordinators: &[&str]) {
        self.verb(&["tenant", "create", "test", "--allow", regions]);
        let made = self.verb(&["key", "create", "--tenant", "test"]);
        let key = made["key"].as_str().unwrap();
        coordinators.iter().for_each(|name| http::show_key(&self.http(name), key));
    }

    /// Waits for something; the logs of all say why it does not come.
    pub fn wait<T>(&self, what: &str, done: impl FnMut() -> Option<T>) -> T {
        wait_for(DEADLINE, done).unwrap_or_else(|| {
            let logs = self.running.iter().map(|r| format!("{}: {}\n", r.name, self.log(&r.name)));
            panic!("it does not come about that {what}\n{}", logs.collect::<String>())
        })
    }

    fn log(&self, name: &str) -> String {
        fs::read_to_string(self.file(name, "log")).unwrap_or_default()
    }
}

fn borrowed(words: &[String]) -> Vec<&str> {
    words.iter().map(String::as_str).collect()
}

impl Drop for Machines {
    fn drop(&mut self) {
        let processes = self.running.iter().map(|r| Process::find(u64::from(r.child.id())));
        let processes: Vec<Process> = processes.flatten().collect();
        for running in &mut self.running {
            // One that has ended already needs no more.
            let _ = running.child.kill();
            let _ = running.child.wait();
        }
        let left = wait_gone(DEADLINE, &processes);
        if !std::thread::panicking() {
            assert!(left.is_empty(), "these are left: {left:?}");
        }
    }
}
