//! Log lines: always on standard error, as text for people or as JSON for collectors.

use std::io::IsTerminal;

use clap::{Args, ValueEnum};
use tracing_subscriber::EnvFilter;

use crate::exit::Misuse;

/// How a log line is written.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum LogFormat {
    /// One readable line an event.
    Text,
    /// One JSON object a line.
    Json,
}

/// The flags that every verb takes.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Logging")]
pub struct LogArgs {
    /// How log lines on standard error are written.
    #[arg(long, global = true, env = "ENTENTE_LOG_FORMAT", value_name = "FORMAT")]
    #[arg(value_enum, default_value = "text")]
    pub log_format: LogFormat,

    /// Which log lines are written: a level, or a filter such as `info,entente_router=debug`.
    #[arg(long, global = true, env = "ENTENTE_LOG", value_name = "LEVEL", default_value = "info")]
    pub log: String,
}

impl LogArgs {
    /// The same flags for a child process.
    pub fn to_flags(&self) -> [String; 2] {
        let format = match self.log_format {
            LogFormat::Text => "text",
            LogFormat::Json => "json",
        };
        [format!("--log-format={format}"), format!("--log={}", self.log)]
    }
}

/// Installs the subscriber for the life of the process.
pub fn init(args: &LogArgs) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(&args.log)
        .map_err(|error| Misuse(format!("--log {:?} is not a filter: {error}", args.log)))?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    match args.log_format {
        LogFormat::Text => builder.init(),
        LogFormat::Json => builder.json().init(),
    }
    Ok(())
}
