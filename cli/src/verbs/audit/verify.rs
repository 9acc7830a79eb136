//! `entente audit verify`.

use std::io::{self, Write};
use std::path::PathBuf;

use clap::Args;
use entente_audit::verify::{self, Cosigned, Notary, Verified};
use entente_coordinator::ledger::notary::{ByAuthority, ByCertificate};
use entente_tls::Roots;
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

    /// The public key of a witness that must have cosigned it, or a file with it; may be repeated.
    #[arg(
        long = "witness-key",
        env = "ENTENTE_AUDIT_WITNESS_KEY",
        value_name = "KEY",
        value_delimiter = ','
    )]
    witness_keys: Vec<String>,

    /// The CAs that the cluster had, as PEM: certificates in the log must be theirs. Without it they
    /// are taken for what they say.
    #[arg(long, env = "ENTENTE_AUDIT_CA", value_name = "FILE")]
    ca: Option<PathBuf>,

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
    /// What each witness whose key was given has cosigned.
    cosigned: Vec<Witnessed>,
}

#[derive(Debug, Serialize)]
struct Witnessed {
    witness: String,
    /// Records under the checkpoint that it cosigned.
    size: u64,
    /// Seconds since 1970, by its clock.
    time_s: u64,
}

#[derive(Debug, Serialize)]
struct Silent {
    request: String,
    node: String,
}

/// Checks, and prints what was checked.
pub fn run(args: VerifyArgs) -> anyhow::Result<()> {
    let key = read_key(&args.key)?;
    let notary: Box<dyn Notary> = match &args.ca {
        Some(file) => Box::new(ByAuthority(Roots::load(file)?)),
        None => Box::new(ByCertificate),
    };
    let verified = verify::path(&args.path, &key, &*notary, args.selection)?;
    let mut witnesses = Vec::new();
    for witness in &args.witness_keys {
        let witness = verify::cosigned(&args.path, &verified, &key, &read_key(witness)?)?;
        witnesses.push(witness);
    }
    let answer = Answer::new(verified, witnesses);
    let text = match args.output {
        Output::Table => answer.table(args.selection),
        Output::Json => serde_json::to_string_pretty(&answer)?,
    };
    writeln!(io::stdout().lock(), "{text}")?;
    Ok(())
}

impl From<Cosigned> for Witnessed {
    fn from(Cosigned { name, size, time_s }: Cosigned) -> Self {
        Self { witness: name, size, time_s }
    }
}

impl Answer {
    fn new(verified: Verified, witnesses: Vec<Cosigned>) -> Self {
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
            cosigned: witnesses.into_iter().map(Witnessed::from).collect(),
        }
    }

    fn table(&self, selection: bool) -> String {
        let Self { origin, size, records, unsigned, statements, silent, cosigned } = self;
        let mut text = format!("verified: {records} of {size} records of {origin}");
        text += &format!("\n{statements} statements of nodes agree with them");
        for Witnessed { witness, size, time_s } in cosigned {
            text += &format!("\n{witness} cosigned its first {size} records at {time_s} s");
        }
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
