//! What a person sees of a cluster: progress while it loads, the table when it is ready, and the
//! end of a log when something went wrong.

use std::fs::File;
use std::io::{self, IsTerminal, Read, Seek, SeekFrom, Write};
use std::path::Path;

use comfy_table::{Table, presets};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use super::data_dir::ProcessEntry;
use super::plan::Member;

/// Lines of a log that an error message quotes.
const LOG_LINES_SHOWN: usize = 12;

/// Bytes from the end of a log that are looked at for these lines.
const LOG_BYTES_READ: u64 = 8 << 10;

/// A table without borders, which people read and `awk` does too.
pub fn columns<const N: usize>(header: [&str; N]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header);
    table
}

/// Progress of loading: a bar a process on a terminal, a line a process anywhere else.
#[derive(Debug)]
pub struct Progress {
    names: Vec<String>,
    bars: Option<(MultiProgress, Vec<ProgressBar>)>,
}

impl Progress {
    /// Shows every process as not started.
    pub fn new(members: &[Member]) -> Self {
        let names: Vec<String> = members.iter().map(|member| member.name.to_string()).collect();
        let width = names.iter().map(String::len).max().unwrap_or_default();
        let bars = io::stderr().is_terminal().then(|| {
            let all = MultiProgress::new();
            let style = ProgressStyle::with_template("{prefix} {bar:40} {percent:>3} % {msg}")
                .expect("the template is valid");
            let bar = |name: &String| {
                all.add(ProgressBar::new(1).with_style(style.clone()))
                    .with_prefix(format!("{name:width$}"))
            };
            let bars = names.iter().map(bar).collect();
            (all, bars)
        });
        Self { names, bars }
    }

    /// The process has done this much of its loading.
    pub fn loading(&self, index: usize, done: u64, total: u64) {
        if let Some((_, bars)) = &self.bars {
            bars[index].set_length(total.max(1));
            bars[index].set_position(done);
        }
    }

    /// The process answers.
    pub fn ready(&self, index: usize, weights_bytes: u64) {
        let size = mebibytes(weights_bytes);
        match &self.bars {
            Some((_, bars)) => {
                bars[index].set_position(bars[index].length().unwrap_or(1));
                bars[index].abandon_with_message(format!("{size} of weights"));
            }
            // Progress is a courtesy: a closed standard error is no reason to stop.
            None => drop(writeln!(io::stderr(), "{}: ready, {size} of weights", self.names[index])),
        }
    }
}

/// The table of processes; `experts` are those that each one holds, in the same order.
pub fn process_table(processes: &[ProcessEntry], experts: &[usize]) -> String {
    let mut table = columns(["NAME", "ROLE", "REGION", "PID", "ADDRESS", "EXPERTS", "MEMORY"]);
    for (process, experts) in processes.iter().zip(experts) {
        table.add_row([
            process.name.to_string(),
            process.role.to_string(),
            process.region.to_string(),
            process.pid.to_string(),
            process.address.to_string(),
            experts.to_string(),
            resident_bytes(process.pid).map_or("-".into(), mebibytes),
        ]);
    }
    table.trim_fmt()
}

fn mebibytes(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

/// Resident memory of a process; nothing when it is gone or the system has no `/proc`.
fn resident_bytes(pid: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kibibytes: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    kibibytes.checked_mul(1024)
}

/// The last lines of a log, each indented, for the message about the process that wrote it.
pub fn log_tail(path: &Path) -> String {
    let text = read_tail(path).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    let shown = &lines[lines.len().saturating_sub(LOG_LINES_SHOWN)..];
    shown.iter().map(|line| format!("\n    {line}")).collect()
}

fn read_tail(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let len = file.metadata()?.len();
    file.seek(SeekFrom::Start(len.saturating_sub(LOG_BYTES_READ)))?;
    let mut bytes = Vec::new();
    file.take(LOG_BYTES_READ).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_end_of_a_long_log_is_quoted() {
        let log = tempfile::NamedTempFile::new().unwrap();
        let text: String = (0..5_000).map(|line| format!("line {line}\n")).collect();
        std::fs::write(log.path(), text).unwrap();
        let tail = log_tail(log.path());
        assert_eq!(tail.lines().filter(|line| !line.is_empty()).count(), LOG_LINES_SHOWN);
        assert!(tail.ends_with("\n    line 4999"), "{tail}");
    }

    #[test]
    fn this_process_has_a_memory() {
        assert!(resident_bytes(std::process::id()).unwrap() > 0);
    }
}
