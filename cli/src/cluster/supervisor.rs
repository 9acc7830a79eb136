//! Owns the child processes: starts them, hears what they say, and sees to it that they end.
//!
//! Each child has one task that owns it. The task reads the child's status lines and reports its
//! end; nobody else touches the process, so a pid is never signalled after it was given to another.
//! A child that has ended may be started again under its number; whether it should be is not decided
//! here.
//!
//! A child is stopped by letting go of its standard input, which is also what the kernel does if
//! this process dies: one way to stop, exercised every time. A child that does not follow within
//! [`STOP_DEADLINE`] is killed. Coordinators go first, so that what they are still answering can
//! use its experts to the end.

use std::fs::File;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::Context;
use command_fds::{CommandFdExt, FdMapping};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use super::plan::{Member, Role};
use crate::logging::LogArgs;
use crate::status::Status;

/// How long a child may take to stop before it is killed. Longer than a coordinator lets running
/// requests go on.
const STOP_DEADLINE: Duration = Duration::from_secs(15);

/// Where a child finds its first listener, as the socket activation protocol has it.
const LISTEN_FD: i32 = 3;

/// Events that may wait to be read; a child that says more waits itself.
const EVENTS_LEN_MAX: usize = 64;

/// One child to start.
#[derive(Debug)]
pub struct Launch<'a> {
    /// Who it is.
    pub member: &'a Member,
    /// The configuration that was written for it.
    pub config: PathBuf,
    /// The file that takes its standard error.
    pub log: PathBuf,
    /// The sockets that it will serve, in the order in which it expects them.
    pub listeners: Vec<TcpListener>,
}

/// What happened to a child.
#[derive(Debug)]
pub enum Event {
    /// It told its status.
    Said(Status),
    /// It ended; nothing follows, unless it is started again.
    Exited(ExitStatus),
}

/// Children that are stopped together.
#[derive(Debug)]
struct Group {
    owners: JoinSet<()>,
    // Dropping the sender is the order to stop.
    stop: watch::Sender<()>,
}

/// The children, counted in the order in which they were started. Dropping it kills them.
#[derive(Debug)]
pub struct Supervisor {
    pids: Vec<u32>,
    coordinators: Group,
    others: Group,
    reports: mpsc::Sender<(usize, Event)>,
    events: mpsc::Receiver<(usize, Event)>,
}

impl Supervisor {
    /// A supervisor without children.
    pub fn new() -> Self {
        let (reports, events) = mpsc::channel(EVENTS_LEN_MAX);
        let group = || Group { owners: JoinSet::new(), stop: watch::channel(()).0 };
        Self { pids: Vec::new(), coordinators: group(), others: group(), reports, events }
    }

    /// Starts one more child of the program `exe`.
    pub fn start(
        &mut self,
        exe: &Path,
        launch: Launch<'_>,
        logging: &LogArgs,
    ) -> anyhow::Result<()> {
        let pid = self.spawn(self.pids.len(), exe, launch, logging)?;
        self.pids.push(pid);
        Ok(())
    }

    /// Starts the child of this number again, which has ended.
    pub fn restart(
        &mut self,
        index: usize,
        exe: &Path,
        launch: Launch<'_>,
        logging: &LogArgs,
    ) -> anyhow::Result<()> {
        self.pids[index] = self.spawn(index, exe, launch, logging)?;
        Ok(())
    }

    fn spawn(
        &mut self,
        index: usize,
        exe: &Path,
        launch: Launch<'_>,
        logging: &LogArgs,
    ) -> anyhow::Result<u32> {
        let name = launch.member.name.clone();
        let group = match launch.member.role {
            Role::Coordinator => &mut self.coordinators,
            Role::ExpertNode | Role::Witness => &mut self.others,
        };
        let mut child = command(exe, launch, logging)?
            .spawn()
            .with_context(|| format!("cannot start {name} from {}", exe.display()))?;
        let pid = child.id().context("a child that was just started has a pid")?;
        let (reports, stop) = (self.reports.clone(), group.stop.subscribe());
        group.owners.spawn(async move {
            listen(index, &mut child, &reports, stop).await;
            match end(&mut child).await {
                Ok(status) => drop(reports.send((index, Event::Exited(status))).await),
                Err(error) => tracing::warn!(%name, %error, "cannot wait for the process"),
            }
        });
        Ok(pid)
    }

    /// The pid of each child.
    pub fn pids(&self) -> &[u32] {
        &self.pids
    }

    /// The next event of any child.
    pub async fn next(&mut self) -> (usize, Event) {
        self.events.recv().await.expect("the supervisor itself holds a sender")
    }

    /// Stops every child and returns when all have ended.
    pub async fn stop(self) {
        // Owners report to nobody from here on, and never wait to do so.
        drop(self.events);
        self.coordinators.stop().await;
        self.others.stop().await;
    }
}

impl Group {
    async fn stop(mut self) {
        drop(self.stop);
        while self.owners.join_next().await.is_some() {}
    }
}

fn command(exe: &Path, launch: Launch<'_>, logging: &LogArgs) -> anyhow::Result<Command> {
    let log = File::options()
        .create(true)
        .append(true)
        .open(&launch.log)
        .with_context(|| format!("cannot write {}", launch.log.display()))?;
    let fds = (LISTEN_FD..).zip(launch.listeners);
    let fds: Vec<FdMapping> =
        fds.map(|(child_fd, socket)| FdMapping { parent_fd: socket.into(), child_fd }).collect();
    let mut command = Command::new(exe);
    command
        .arg(launch.member.role.to_string())
        .arg("--config")
        .arg(&launch.config)
        .arg("--supervised")
        .args(logging.to_flags())
        .env("LISTEN_FDS", fds.len().to_string())
        .env_remove("LISTEN_PID")
        .env_remove("LISTEN_FDS_FIRST_FD")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(log)
        // Ctrl-C in a terminal goes to a whole process group; children must be stopped in order.
        .process_group(0)
        .kill_on_drop(true);
    command.fd_mappings(fds).context("cannot hand over the listeners")?;
    Ok(command)
}

/// Passes on what a child says, until it closes its output or has to stop.
async fn listen(
    index: usize,
    child: &mut Child,
    reports: &mpsc::Sender<(usize, Event)>,
    mut stop: watch::Receiver<()>,
) {
    let Some(stdout) = child.stdout.take() else { return };
    let mut lines = BufReader::new(stdout).lines();
    loop {
        let line = tokio::select! {
            line = lines.next_line() => line,
            _ = stop.changed() => return,
        };
        let Ok(Some(line)) = line else { return };
        match serde_json::from_str(&line) {
            Ok(status) => drop(reports.send((index, Event::Said(status))).await),
            Err(error) => tracing::warn!(%line, %error, "a process said what is no status"),
        }
    }
}

/// Lets go of a child and waits for its end, which comes by force if it must.
async fn end(child: &mut Child) -> std::io::Result<ExitStatus> {
    drop(child.stdin.take());
    match tokio::time::timeout(STOP_DEADLINE, child.wait()).await {
        Ok(status) => status,
        Err(_) => {
            tracing::warn!(pid = child.id(), "the process did not stop in time and is killed");
            child.start_kill()?;
            child.wait().await
        }
    }
}
