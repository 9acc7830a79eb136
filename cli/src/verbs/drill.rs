//! `entente drill`: load on a cluster, faults while it runs, and a verdict.

use std::fs;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;

use anyhow::Context;
use clap::{Args, Subcommand, ValueEnum};
use tokio::signal::unix::{SignalKind, signal};

use crate::api_key::ApiKey;
use crate::drill::board::Board;
use crate::drill::place::{Own, Place};
use crate::drill::report::Report;
use crate::drill::run::Drill;
use crate::drill::scenario::Scenario;
use crate::exit::{Missed, Misuse};

/// The verbs of `entente drill`.
#[derive(Debug, Args)]
pub struct DrillArgs {
    #[command(subcommand)]
    verb: DrillVerb,
}

#[derive(Debug, Subcommand)]
enum DrillVerb {
    /// Run one scenario and say whether the cluster kept its promises.
    Run(RunArgs),
}

/// The flags of `entente drill run`.
#[derive(Debug, Args)]
struct RunArgs {
    /// The scenario, YAML.
    file: PathBuf,

    /// Run its short form.
    #[arg(long, env = "ENTENTE_SHORT")]
    short: bool,

    /// Folder of the `entente up` to drill, instead of one that the scenario starts.
    #[arg(long, env = "ENTENTE_DATA_DIR", value_name = "DIR", conflicts_with = "url")]
    data_dir: Option<PathBuf>,

    /// Public API of each coordinator of a cluster elsewhere; commands are the only faults there.
    #[arg(long, env = "ENTENTE_URL", value_name = "URL,…", value_delimiter = ',')]
    url: Vec<String>,

    /// Key of a tenant of the cluster at --url.
    #[arg(long, env = "ENTENTE_API_KEY", value_name = "KEY", hide_env_values = true)]
    api_key: Option<ApiKey>,

    /// Write everything that was measured to this file too.
    #[arg(long, env = "ENTENTE_JSON", value_name = "FILE")]
    json: Option<PathBuf>,

    /// How the report is printed.
    #[arg(short, long, env = "ENTENTE_OUTPUT", value_name = "FORMAT")]
    #[arg(value_enum, default_value = "table")]
    output: Output,
}

/// How the report is printed.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Output {
    /// The checks and the verdict.
    Table,
    /// One JSON object with everything.
    Json,
}

/// Runs the drill and prints what came out.
pub fn run(args: DrillArgs) -> anyhow::Result<()> {
    let DrillVerb::Run(args) = args.verb;
    let name = args.file.display();
    let text = fs::read_to_string(&args.file)
        .map_err(|error| Misuse(format!("cannot read {name}: {error}")))?;
    let scenario = Scenario::parse(&text, args.short)
        .map_err(|error| Misuse(format!("{name} is no scenario: {error}")))?;
    let board = Arc::new(Board::new());
    heed_signals(Arc::clone(&board))?;
    let mut place = args.place(&scenario, &board)?;
    let report = Drill::new(&scenario, &place)?.run(&board, &tell);
    let passed = report.as_ref().is_ok_and(|report| report.passed);
    if let (Place::Own(own), false, false) = (&mut place, passed, board.lock().interrupted) {
        // What went wrong is in there.
        tell(&format!("the cluster's folder is kept: {}", own.keep().display()));
    }
    drop(place);
    args.print(&report?)
}

impl RunArgs {
    fn place(&self, scenario: &Scenario, board: &Board) -> anyhow::Result<Place> {
        if !self.url.is_empty() {
            return Ok(Place::Urls(self.url.clone(), self.api_key.clone()));
        }
        if let Some(data_dir) = &self.data_dir {
            return Ok(Place::DataDir(data_dir.clone()));
        }
        let text = "the scenario starts no cluster: say with --data-dir or --url which one it is";
        let flags = scenario.cluster.as_ref().ok_or(Misuse(text.to_owned()))?;
        tell(&format!("starting a cluster: entente up {flags}"));
        Ok(Place::Own(Own::start(flags, board)?))
    }

    fn print(&self, report: &Report) -> anyhow::Result<()> {
        let json = serde_json::to_string_pretty(report)? + "\n";
        if let Some(path) = &self.json {
            fs::write(path, &json).with_context(|| format!("cannot write {}", path.display()))?;
        }
        let mut stdout = io::stdout().lock();
        match self.output {
            Output::Table => stdout.write_all(report.table().as_bytes())?,
            Output::Json => stdout.write_all(json.as_bytes())?,
        }
        let missed = report.checks.iter().filter(|check| !check.ok).count();
        if missed > 0 { Err(Missed { missed, checks: report.checks.len() }.into()) } else { Ok(()) }
    }
}

/// Progress, for people. A closed standard error is no reason to stop.
fn tell(line: &str) {
    drop(writeln!(io::stderr(), "{line}"));
}

/// Makes a signal an event on the board, so that nothing stays paused or cut behind a drill that
/// is stopped.
fn heed_signals(board: Arc<Board>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let entered = runtime.enter();
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    drop(entered);
    // Ends with the process: it holds nothing but the board.
    thread::spawn(move || {
        runtime.block_on(async {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
                _ = hangup.recv() => {}
            }
        });
        board.tell(|state| state.interrupted = true);
    });
    Ok(())
}
