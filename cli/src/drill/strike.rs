//! Does to a cluster what a fault says, and undoes it.
//!
//! A process is found by its name just before it is signalled, because whoever looks after it may
//! have started it again. What needs more than a signal is done by the operator verbs of this very
//! program, so that a drill can do no more than an operator could.

use std::io::{Read, Seek};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use entente_membership::state::State;
use entente_proto::ids::NodeName;
use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process, test_kill_process};

use super::board::Board;
use super::control::Control;
use super::place::Place;
use super::scenario::Action;
use super::stale::Sleeper;
use super::watch::POLL_INTERVAL;
use crate::cluster::relay::control;
use crate::cluster::relay::rule::Change;
use crate::cluster::relay::traffic::Traffic;

/// How long a command may take, and a process that was told to end.
const COMMAND_DEADLINE: Duration = Duration::from_secs(120);

/// Bytes of a command's output that an error quotes.
const OUTPUT_SHOWN: u64 = 4 << 10;

/// Something that was done and has to be undone.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Undo {
    Resume(Pid),
    Link(String),
}

/// Strikes one cluster; dropping it undoes what is still done.
pub struct Striker<'a> {
    place: &'a Place,
    board: &'a Board,
    control: Option<&'a Control>,
    /// What was committed before the first strike.
    before: Option<Arc<State>>,
    undo: Mutex<Vec<Undo>>,
}

impl<'a> Striker<'a> {
    /// Nothing is done yet.
    pub fn new(place: &'a Place, board: &'a Board, control: Option<&'a Control>) -> Self {
        let before = control.and_then(Control::state);
        Self { place, board, control, before, undo: Mutex::default() }
    }

    /// Does `action` to each of `names`, and undoes it when its time is over.
    pub fn act(&self, action: &Action, names: &[NodeName]) -> anyhow::Result<()> {
        let undos = self.begin(action, names)?;
        let lasts = action.lasts();
        // What has no end of its own is undone when the drill ends.
        if lasts > Duration::ZERO {
            let cut = matches!(action, Action::Cut { .. }).then(|| action.changes(names));
            let before = cut.as_ref().map(|words| self.bytes_over(words)).transpose()?;
            self.board.wait_for(lasts, |state| state.interrupted);
            if let (Some(words), Some(before)) = (cut, before) {
                let passed = self.bytes_over(&words)?.saturating_sub(before);
                self.board.tell(|state| *state.cut_bytes.get_or_insert(0) += passed);
            }
            undos.iter().try_for_each(|undo| self.undo(undo))?;
        }
        Ok(())
    }

    fn begin(&self, action: &Action, names: &[NodeName]) -> anyhow::Result<Vec<Undo>> {
        let pids = names.iter().map(|name| self.pid(name)).collect::<anyhow::Result<Vec<_>>>()?;
        let signal = |signal| {
            let send = |pid: &Pid| signal_process(*pid, signal);
            pids.iter().try_for_each(send)
        };
        match action {
            Action::KillLeader {} if names.is_empty() => bail!("no leader answers"),
            Action::Kill {} | Action::KillLeader {} => signal(Signal::KILL)?,
            Action::Term {} => signal(Signal::TERM)?,
            Action::Restart {} => {
                signal(Signal::TERM)?;
                pids.iter().try_for_each(|pid| self.wait_until_gone(*pid))?;
            }
            Action::Pause { .. } => {
                let undos: Vec<Undo> = pids.iter().copied().map(Undo::Resume).collect();
                self.remember(&undos);
                signal(Signal::STOP)?;
                return Ok(undos);
            }
            Action::Resume {} => pids.iter().try_for_each(|pid| self.undo(&Undo::Resume(*pid)))?,
            Action::Drain {} => {
                for name in names {
                    self.verb(&["node", "drain", name.as_str()])?;
                }
            }
            Action::Slow { .. }
            | Action::Disconnect { .. }
            | Action::Cut { .. }
            | Action::CutOneWay { .. }
            | Action::Heal { .. } => return self.change_links(action.changes(names)),
            Action::SendStale { exchanges, proposals } => {
                names.iter().try_for_each(|name| self.send_stale(name, *exchanges, *proposals))?;
            }
            Action::Exec { command, fails, says } => {
                self.exec(command, names, *fails, says.as_deref())?;
            }
        }
        Ok(Vec::new())
    }

    fn pid(&self, name: &NodeName) -> anyhow::Result<Pid> {
        let pid = i32::try_from(self.place.process(name)?.pid).ok().and_then(Pid::from_raw);
        pid.with_context(|| format!("cluster.json gives no pid for {name}"))
    }

    fn wait_until_gone(&self, pid: Pid) -> anyhow::Result<()> {
        let start = Instant::now();
        while test_kill_process(pid) != Err(Errno::SRCH) {
            if start.elapsed() > COMMAND_DEADLINE || self.board.lock().interrupted {
                bail!("process {} did not end", pid.as_raw_nonzero());
            }
            self.board.wait_for(POLL_INTERVAL, |state| state.interrupted);
        }
        Ok(())
    }

    fn remember(&self, undos: &[Undo]) {
        self.undo.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(undos);
    }

    fn undo(&self, undo: &Undo) -> anyhow::Result<()> {
        self.undo.lock().unwrap_or_else(PoisonError::into_inner).retain(|other| other != undo);
        match undo {
            // A process that has ended meanwhile is not paused any more.
            Undo::Resume(pid) => match kill_process(*pid, Signal::CONT) {
                Err(Errno::SRCH) => Ok(()),
                other => other.context("cannot resume the process"),
            },
            Undo::Link(word) => control::set(self.data_dir()?, vec![word.clone()]).map(drop),
        }
    }

    fn change_links(&self, words: Vec<String>) -> anyhow::Result<Vec<Undo>> {
        let held = control::list(self.data_dir()?)?;
        let mut undos = Vec::new();
        for word in &words {
            let link = word.parse::<Change>().map_err(anyhow::Error::msg)?.link.to_string();
            let said = held.iter().find(|(other, _)| *other == link);
            let before = said.map_or("clear", |(_, effect)| effect.as_str());
            undos.push(Undo::Link(format!("{link}={before}")));
        }
        self.remember(&undos);
        control::set(self.data_dir()?, words)?;
        Ok(undos)
    }

    /// Bytes that have passed, both ways, over the links that these words are about.
    fn bytes_over(&self, words: &[String]) -> anyhow::Result<u64> {
        let change = |word: &String| word.parse::<Change>().map_err(anyhow::Error::msg);
        let changes = words.iter().map(change).collect::<anyhow::Result<Vec<_>>>()?;
        let processes = self.place.processes()?;
        let end = |name: &NodeName| {
            let process = processes.iter().find(|process| process.name == *name)?;
            Some((process.region, name.clone()))
        };
        let traffic = control::traffic(self.data_dir()?)?;
        let is_on = |one: &&Traffic| {
            let ends = end(&one.dialler).zip(end(&one.target));
            ends.is_some_and(|(a, b)| changes.iter().any(|change| change.link.joins(&a, &b)))
        };
        Ok(traffic.iter().filter(is_on).map(Traffic::bytes).sum())
    }

    fn send_stale(&self, name: &NodeName, exchanges: u64, proposals: u64) -> anyhow::Result<()> {
        let control = self.control.context("the cluster's members are fixed")?;
        let believed = self.before.as_deref().context("nothing was committed before")?;
        let sleeper = Sleeper::new(control, believed, (self.data_dir()?, name))?;
        let sent = sleeper.send(exchanges, proposals)?;
        self.board.tell(|state| *state.stale.get_or_insert_default() += sent);
        Ok(())
    }

    fn data_dir(&self) -> anyhow::Result<&Path> {
        self.place.data_dir().context("the cluster does not run here: there is no --data-dir")
    }

    /// Runs an operator verb of this program.
    fn verb(&self, words: &[&str]) -> anyhow::Result<()> {
        let data_dir = self.data_dir()?;
        let mut command = Command::new(std::env::current_exe()?);
        command.args(words).arg("--data-dir").arg(data_dir);
        let (code, output) = self.finish(command)?;
        if code == Some(0) { Ok(()) } else { bail!("`{}`: {output}", words.join(" ")) }
    }

    fn exec(
        &self,
        text: &str,
        names: &[NodeName],
        fails: bool,
        says: Option<&str>,
    ) -> anyhow::Result<()> {
        let names: Vec<&str> = names.iter().map(NodeName::as_str).collect();
        let path = |path: Option<&Path>| path.map_or_else(String::new, |p| p.display().to_string());
        let text = text
            .replace("{target}", &names.join(" "))
            .replace("{data-dir}", &path(self.place.data_dir()))
            .replace("{entente}", &path(std::env::current_exe().ok().as_deref()));
        let mut command = Command::new("sh");
        command.args(["-c", &text]);
        let (code, output) = self.finish(command)?;
        if (code == Some(0)) == fails {
            bail!("`{text}` ended with {code:?}: {output}");
        }
        match says {
            Some(says) if !output.contains(says) => bail!("`{text}` says no {says:?}: {output}"),
            _ => Ok(()),
        }
    }

    /// Runs a command to its end, which comes by force if it must; its exit code, and the begin of
    /// what it wrote.
    fn finish(&self, mut command: Command) -> anyhow::Result<(Option<i32>, String)> {
        let mut output = tempfile::tempfile()?;
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output.try_clone()?);
        let mut child = command.spawn().with_context(|| format!("cannot run {command:?}"))?;
        let start = Instant::now();
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break status;
            }
            if start.elapsed() > COMMAND_DEADLINE || self.board.lock().interrupted {
                child.kill()?;
                child.wait()?;
                bail!("{command:?} was not done in {:?}", start.elapsed());
            }
            self.board.wait_for(POLL_INTERVAL, |state| state.interrupted);
        };
        let mut text = Vec::new();
        output.rewind()?;
        output.take(OUTPUT_SHOWN).read_to_end(&mut text)?;
        Ok((status.code(), String::from_utf8_lossy(&text).trim().to_owned()))
    }
}

impl Drop for Striker<'_> {
    fn drop(&mut self) {
        let undos = std::mem::take(self.undo.get_mut().unwrap_or_else(PoisonError::into_inner));
        for undo in undos {
            if let Err(error) = self.undo(&undo) {
                tracing::warn!("{undo:?} was not possible: {error:#}");
            }
        }
    }
}

fn signal_process(pid: Pid, signal: Signal) -> anyhow::Result<()> {
    let number = pid.as_raw_nonzero();
    kill_process(pid, signal).with_context(|| format!("cannot send {signal:?} to process {number}"))
}
