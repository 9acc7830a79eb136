//! Processes by pid, told apart from later ones that were given the same number.

use std::fs;
use std::time::{Duration, Instant};

pub use rustix::process::Signal;
use rustix::process::{Pid, kill_process};

/// How often a condition is looked at that nothing reports.
pub const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// A process that was alive when this value was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    pid: i32,
    started: String,
}

impl Process {
    /// The process `pid`, if it is running.
    pub fn find(pid: u64) -> Option<Self> {
        let pid = i32::try_from(pid).ok()?;
        let (_, started) = state(pid)?;
        Some(Self { pid, started })
    }

    /// Whether it still runs. A process that ended and was not waited for does not.
    pub fn is_alive(&self) -> bool {
        state(self.pid).is_some_and(|(state, started)| state != "Z" && started == self.started)
    }

    /// Sends a signal, unless the process has ended.
    pub fn signal(&self, signal: Signal) {
        if self.is_alive() {
            let pid = Pid::from_raw(self.pid).unwrap();
            kill_process(pid, signal).unwrap();
        }
    }
}

/// State letter and start time, fields 3 and 22 of `/proc/<pid>/stat`.
fn state(pid: i32) -> Option<(String, String)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may hold anything; the fields are counted from its end.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    Some((fields.next()?.to_owned(), fields.nth(18)?.to_owned()))
}

/// Waits until `done` gives something; `None` when the deadline passes first.
pub fn wait_for<T>(deadline: Duration, mut done: impl FnMut() -> Option<T>) -> Option<T> {
    let start = Instant::now();
    loop {
        if let Some(value) = done() {
            return Some(value);
        }
        if start.elapsed() > deadline {
            return None;
        }
        std::thread::sleep(POLL_INTERVAL);
    }
}

/// Waits until none of the processes runs; gives those that still do after the deadline.
pub fn wait_gone(deadline: Duration, processes: &[Process]) -> Vec<Process> {
    let alive = || -> Vec<Process> { processes.iter().filter(|p| p.is_alive()).cloned().collect() };
    wait_for(deadline, || alive().is_empty().then(Vec::new)).unwrap_or_else(alive)
}
