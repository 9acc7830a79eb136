//! `entente bench`: how fast things are, beside how fast they could be.
//!
//! [`kernels`], [`device`] and [`engine`] measure the machine's limits in the same run, since a shared machine
//! changes from one minute to the next and only ratios last. [`exchange`] measures a bare echo of
//! the same bytes beside the real link. [`serve`] asks a running cluster over its public API.
//!
//! Each prints a table for people, or with `-o json` one object for scripts.

mod cluster;
mod device;
mod engine;
mod exchange;
mod kernels;
mod limits;
mod quality;
mod relay;
mod serve;

use std::io::{self, Write};

use clap::{Args, Subcommand, ValueEnum};
use comfy_table::Table;
use entente_model::kernels::DeviceId;
use serde::Serialize;

use crate::logging::LogArgs;

/// The verbs of `entente bench`.
#[derive(Debug, Args)]
pub struct BenchArgs {
    #[command(subcommand)]
    verb: BenchVerb,

    /// How the report is printed.
    #[arg(short, long, global = true, env = "ENTENTE_OUTPUT", value_name = "FORMAT")]
    #[arg(value_enum, default_value = "table")]
    output: Output,
}

#[derive(Debug, Subcommand)]
enum BenchVerb {
    /// Every kernel at 1 to 512 rows beside memory bandwidth and multiply peak; with --device beside
    /// the device's own copies and a large product by cuBLAS.
    Kernels(kernels::KernelsArgs),
    /// Prefill and decode of a checkpoint, in this process or over local nodes.
    Engine(engine::EngineArgs),
    /// One exchange through the real link, beside bare TCP and TLS echoes of the same bytes.
    Exchange(exchange::ExchangeArgs),
    /// How far weight formats move a model's predictions from those of bf16.
    Quality(quality::QualityArgs),
    /// Open-loop load on a running cluster.
    Serve(serve::ServeArgs),
}

/// How the report is printed.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Output {
    /// Columns for people.
    Table,
    /// One JSON object.
    Json,
}

/// What a bench found.
trait Report: Serialize {
    /// The columns for people.
    fn table(&self) -> Table;
    /// Lines under the columns.
    fn notes(&self) -> Vec<String>;
}

/// Measures and prints.
pub fn run(args: BenchArgs, logging: &LogArgs) -> anyhow::Result<()> {
    match args.verb {
        BenchVerb::Kernels(kernels) => match kernels.device {
            DeviceId::Cpu => print(&kernels::run(&kernels)?, args.output),
            DeviceId::Cuda(ordinal) => print(&device::run(ordinal, &kernels)?, args.output),
        },
        BenchVerb::Engine(engine) => print(&engine::run(&engine, logging)?, args.output),
        BenchVerb::Exchange(exchange) => print(&exchange::run(&exchange)?, args.output),
        BenchVerb::Quality(quality) => print(&quality::run(&quality, logging)?, args.output),
        BenchVerb::Serve(serve) => print(&serve::run(&serve)?, args.output),
    }
}

fn print(report: &impl Report, output: Output) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    match output {
        Output::Json => writeln!(stdout, "{}", serde_json::to_string_pretty(report)?)?,
        Output::Table => {
            writeln!(stdout, "{}", report.table().trim_fmt())?;
            for note in report.notes() {
                writeln!(stdout, "{note}")?;
            }
        }
    }
    Ok(())
}
