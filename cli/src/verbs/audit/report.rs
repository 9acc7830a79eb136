//! `entente audit report`.

use std::fs;
use std::io::{self, Write};
use std::path::PathBuf;

use anyhow::Context;
use clap::{Args, ValueEnum};
use entente_audit::record::Record;
use entente_audit::report::{Gatherer, Month};
use entente_audit::verify;
use entente_coordinator::ledger::notary::ByCertificate;
use entente_proto::ids::TenantName;

use super::source::LogArgs;

/// The flags of `entente audit report`.
#[derive(Debug, Args)]
pub struct ReportArgs {
    #[command(flatten)]
    logs: LogArgs,

    /// Whose requests.
    #[arg(long, env = "ENTENTE_TENANT", value_name = "NAME")]
    tenant: TenantName,

    /// The month, such as 2026-11, in UTC.
    #[arg(long, env = "ENTENTE_MONTH", value_name = "YYYY-MM")]
    month: Month,

    /// How it is written.
    #[arg(long, env = "ENTENTE_AUDIT_FORMAT", value_enum, default_value = "json")]
    format: Format,

    /// The file to write; standard output when absent.
    #[arg(long, env = "ENTENTE_AUDIT_FILE", value_name = "FILE")]
    file: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Format {
    /// Everything, for programs.
    Json,
    /// The locations table.
    Csv,
    /// A page for people.
    Html,
}

/// Verifies the logs, then writes what they say.
pub fn run(args: ReportArgs) -> anyhow::Result<()> {
    let mut gatherer = Gatherer::new(args.tenant, args.month);
    for source in args.logs.all()? {
        verify::folder(&source.root, &source.verifier, &ByCertificate).with_context(|| {
            format!("the log {} is not what was signed", source.checkpoint.origin)
        })?;
        for entry in source.folder().records() {
            let (index, bytes) = entry?;
            let record = Record::decode(&bytes)
                .map_err(|reason| anyhow::anyhow!("record {index}: {reason}"))?;
            gatherer.add(&source.checkpoint.origin, &record);
        }
    }
    let report = gatherer.end();
    let text = match args.format {
        Format::Json => serde_json::to_string_pretty(&report)? + "\n",
        Format::Csv => report.csv(),
        Format::Html => report.html(),
    };
    match &args.file {
        None => Ok(io::stdout().lock().write_all(text.as_bytes())?),
        Some(path) => {
            fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
        }
    }
}
