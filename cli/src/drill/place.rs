//! The cluster that a drill is about: one that it starts itself, that of a data directory, or one
//! of which only addresses are known.
//!
//! `cluster.json` is read anew each time, because whoever looks after the processes writes it again
//! when one of them was restarted.

use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use entente_proto::ids::{NodeName, Region};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use super::board::Board;
use crate::api_key::ApiKey;
use crate::client::Client;
use crate::cluster::data_dir::{ClusterFile, ProcessEntry};
use crate::cluster::plan::Role;
use crate::cluster::report::log_tail;
use crate::exit::Interrupted;

/// How long a cluster may take to be ready, and to stop.
const START_DEADLINE: Duration = Duration::from_secs(180);
const STOP_DEADLINE: Duration = Duration::from_secs(30);

/// How often a condition is looked at that nothing reports.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Counts the answers that a coordinator has given; `up` asks one question of its own at first.
const FINISHED: &str = "entente_requests_finished_total";

/// Where a cluster is.
#[derive(Debug)]
pub enum Place {
    /// It was started for this drill.
    Own(Own),
    /// It runs on this machine.
    DataDir(PathBuf),
    /// It runs elsewhere, and this key opens it.
    Urls(Vec<String>, Option<ApiKey>),
}

/// An `entente up` of this drill's own; dropping it stops it.
#[derive(Debug)]
pub struct Own {
    up: Child,
    data_dir: PathBuf,
    // Taken out when the folder is to outlive the drill.
    folder: Option<TempDir>,
}

/// A coordinator as clients see it.
#[derive(Debug, Clone)]
pub struct Server {
    /// Its name, where that is known.
    pub name: Option<NodeName>,
    /// Its region, likewise.
    pub region: Option<Region>,
    /// Its public API.
    pub client: Client,
}

impl Place {
    /// The folder of the cluster, where it has one.
    pub fn data_dir(&self) -> Option<&Path> {
        match self {
            Self::Own(own) => Some(&own.data_dir),
            Self::DataDir(data_dir) => Some(data_dir),
            Self::Urls(..) => None,
        }
    }

    /// The processes as they are now; none of a cluster that runs elsewhere.
    pub fn processes(&self) -> anyhow::Result<Vec<ProcessEntry>> {
        self.data_dir().map_or(Ok(Vec::new()), |dir| Ok(ClusterFile::read(dir)?.processes))
    }

    /// The process of this name as it is now.
    pub fn process(&self, name: &NodeName) -> anyhow::Result<ProcessEntry> {
        let mut processes = self.processes()?.into_iter();
        processes
            .find(|process| process.name == *name)
            .with_context(|| format!("cluster.json does not name {name}"))
    }

    /// Every coordinator.
    pub fn servers(&self) -> anyhow::Result<Vec<Server>> {
        let Some(dir) = self.data_dir() else {
            let Self::Urls(urls, key) = self else { return Ok(Vec::new()) };
            let server = |url: &String| {
                let client = Client::connect(url, key.as_ref())?;
                Ok(Server { name: None, region: None, client })
            };
            return urls.iter().map(server).collect();
        };
        let file = ClusterFile::read(dir)?;
        let name = |region: Region| {
            let mut all = file.processes.iter();
            let found = all.find(|one| one.region == region && one.role == Role::Coordinator);
            found.map(|process| process.name.clone())
        };
        let server = |(region, url): (&Region, &String)| {
            let client = Client::connect(url, file.api_key.as_ref())?;
            Ok(Server { name: name(*region), region: Some(*region), client })
        };
        file.endpoints.iter().map(server).collect()
    }
}

impl Own {
    /// Starts `entente up` with these flags in a folder of its own and waits until it has answered
    /// its own first question.
    pub fn start(flags: &str, board: &Board) -> anyhow::Result<Self> {
        let folder = tempfile::Builder::new().prefix("entente-drill-").tempdir()?;
        let data_dir = folder.path().join("data");
        let output = |name: &str| File::create(folder.path().join(name));
        let exe = std::env::current_exe().context("cannot find this program's own file")?;
        let up = Command::new(exe)
            .args(["up", "--http", "127.0.0.1:0", "--data-dir"])
            .arg(&data_dir)
            .args(flags.split_whitespace())
            .stdin(Stdio::null())
            .stdout(output("stdout")?)
            .stderr(output("stderr")?)
            // Ctrl-C in a terminal is for the drill, which has to undo what it did first.
            .process_group(0)
            .spawn()
            .context("cannot start the cluster")?;
        let mut own = Self { up, data_dir, folder: Some(folder) };
        own.wait_until_ready(board)?;
        Ok(own)
    }

    fn wait_until_ready(&mut self, board: &Board) -> anyhow::Result<()> {
        let start = Instant::now();
        while start.elapsed() < START_DEADLINE {
            if let Some(status) = self.up.try_wait()? {
                bail!("the cluster did not start ({status}):{}", log_tail(&self.stderr()));
            }
            if self.has_answered() {
                return Ok(());
            }
            if board.wait_for(POLL_INTERVAL, |state| state.interrupted) {
                bail!(Interrupted);
            }
        }
        bail!("the cluster was not ready in {START_DEADLINE:?}:{}", log_tail(&self.stderr()))
    }

    fn stderr(&self) -> PathBuf {
        self.data_dir.with_file_name("stderr")
    }

    /// Whether the cluster is ready and done with the question of its own.
    fn has_answered(&self) -> bool {
        let Ok(file) = ClusterFile::read(&self.data_dir) else { return false };
        let answered = || {
            let (_, text) = Client::connect(&file.http, file.api_key.as_ref())?.get("/metrics")?;
            Ok::<_, anyhow::Error>(metric(&text, FINISHED) >= 1.0)
        };
        answered().unwrap_or(false)
    }

    /// Leaves the folder where it is, for people to look into; says where.
    pub fn keep(&mut self) -> PathBuf {
        self.folder.take().map_or_else(PathBuf::new, TempDir::keep)
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        let pid = i32::try_from(self.up.id()).ok().and_then(Pid::from_raw);
        if let (Some(pid), Ok(None)) = (pid, self.up.try_wait()) {
            // Not waited for, so the pid is still its own.
            let _ = kill_process(pid, Signal::TERM);
        }
        let start = Instant::now();
        while start.elapsed() < STOP_DEADLINE {
            match self.up.try_wait() {
                Ok(None) => thread::sleep(POLL_INTERVAL),
                _ => return,
            }
        }
        // Its children end with it.
        let _ = self.up.kill();
        let _ = self.up.wait();
    }
}

/// The value of a metric in Prometheus' text format, added up over its labels; 0 when it is not
/// there.
pub fn metric(text: &str, name: &str) -> f64 {
    let samples = text.lines().filter_map(|line| line.rsplit_once(' '));
    let of_name = samples.filter(|(sample, _)| sample.split('{').next() == Some(name));
    of_name.filter_map(|(_, value)| value.parse::<f64>().ok()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_metric_is_added_up_over_its_labels() {
        let text = "# HELP a_total Text.\na_total{x=\"1\"} 2\na_total{x=\"2\"} 3\na_total_b 9\nc 1";
        assert_eq!(
            [metric(text, "a_total"), metric(text, "c"), metric(text, "d")],
            [5.0, 1.0, 0.0]
        );
    }
}
