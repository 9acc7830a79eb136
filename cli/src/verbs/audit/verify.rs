//! `entente audit verify`.

use std::io::{self, Write};
use std::path::PathBuf;

use clap::Args;
use entente_audit::verify::{self, Verified};
use entente_coordinator::ledger::notary::ByCertificate;
use serde::Serialize;

use super::source::read_key;
use crate::operator::Output;

/// Nodes without a statement that the table names at most.
const SILENT_SHOWN: usize = 10;

/// The flags of `entente audit verify`.
#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// A log's folder, an export, or a proof.
    path: PathBuf,

    /// The log's public key, or a file with it. It must come from somewhere else than the log.
    #[arg(long, env = "ENTENTE_AUDIT_KEY", value_name = "KEY")]
    key: String,

    /// Accept an export from which records were left out.
    #[arg(long, env = "ENTENTE_AUDIT_SELECTION")]
    selection: bool,

    /// How the answer is written to standard output.
    #[arg(short, long, env = "ENTENTE_OUTPUT", value_enum, default_value = "table")]
    output: Output,
}

/// The answer as JSON has it.
#[derive(Debug, Serialize)]
struct Answer {
    /// The log.
    origin: String,
    /// Records under the checkpoint.
    size: u64,
    /// Records that were looked at; fewer of a selection.
    records: u64,
    /// Records of the folder that nothing was signed of yet.
    unsigned: u64,
    /// Statements of nodes that agree with the records.
    statements: u64,
    /// Nodes that stated nothing about a request whose rows they were sent.
    silent: Vec<Silent>,
}

#[derive(Debug, Serialize)]
struct Silent {
    request: String,
    node: String,
}

/// Checks, and prints what was checked.
pub fn run(args: VerifyArgs) -> anyhow::Result<()> {
    let key = read_key(&args.key)?;
    let verified = verify::path(&args.path, &key, &ByCertificate, args.selection)?;
    let answer = Answer::from(verified);
    let text = match args.output {
        Output::Table => answer.table(args.selection),
        Output::Json => serde_json::to_string_pretty(&answer)?,
    };
    writeln!(io::stdout().lock(), "{text}")?;
    Ok(())
}

impl From<Verified> for Answer {
    fn from(verified: Verified) -> Self {
        let silent =
            |(request, node): (entente_proto::ids::RequestId, entente_proto::ids::NodeName)| {
                Silent { request: request.to_string(), node: node.to_string() }
            };
        Self {
            origin: verified.checkpoint.origin,
            size: verified.checkpoint.tree.size,
            records: verified.records,
            unsigned: verified.unsigned,
            statements: verified.statements,
            silent: verified.silent.into_iter().map(silent).collect(),
        }
    }
}

impl Answer {
    fn table(&self, selection: bool) -> String {
        let Self { origin, size, records, unsigned, statements, silent } = self;
        let mut text = format!("verified: {records} of {size} records of {origin}");
        text += &format!("\n{statements} statements of nodes agree with them");
        if selection || records < size {
            text += "\nthis is a selection: it says nothing about records that are not in it";
        }
        if *unsigned > 0 {
            text += &format!("\n{unsigned} more are not under a checkpoint yet");
        }
        for Silent { request, node } in silent.iter().take(SILENT_SHOWN) {
            text += &format!("\nno statement: {node} about request {request}");
        }
        if silent.len() > SILENT_SHOWN {
            text += &format!("\nand {} more without a statement", silent.len() - SILENT_SHOWN);
        }
        text
    }
}
