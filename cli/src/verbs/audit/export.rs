//! `entente audit export`.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use entente_audit::export;
use entente_audit::record::Record;
use entente_proto::ids::TenantName;

use super::source::LogArgs;

/// The flags of `entente audit export`.
#[derive(Debug, Args)]
pub struct ExportArgs {
    #[command(flatten)]
    logs: LogArgs,

    /// Only records of this tenant, with the certificates and statements of nodes.
    #[arg(long, env = "ENTENTE_TENANT", value_name = "NAME")]
    tenant: Option<TenantName>,

    /// Only as far as a witness has cosigned the log.
    #[arg(long, env = "ENTENTE_AUDIT_COSIGNED")]
    cosigned: bool,

    /// The file to write; standard output when absent.
    #[arg(long, env = "ENTENTE_AUDIT_FILE", value_name = "FILE")]
    file: Option<PathBuf>,
}

/// Writes it.
pub fn run(args: ExportArgs) -> anyhow::Result<()> {
    let source = args.logs.one()?;
    let source = if args.cosigned { source.cosigned()? } else { source };
    let wanted = |_: u64, record: &Record| match (&args.tenant, record) {
        (None, _) | (Some(_), Record::Certificate(_) | Record::Statement(_)) => true,
        (Some(_), Record::Admin(_)) => false,
        (Some(tenant), _) => record.tenant() == Some(tenant),
    };
    let mut to: Box<dyn Write> = match &args.file {
        None => Box::new(io::stdout().lock()),
        Some(path) => {
            let file = File::create(path);
            Box::new(file.with_context(|| format!("cannot write {}", path.display()))?)
        }
    };
    let mut buffered = BufWriter::new(&mut to);
    let count = export::write(&source.folder(), &source.checkpoint, wanted, &mut buffered)?;
    buffered.flush()?;
    let selection = if args.tenant.is_some() { "; verify it with --selection" } else { "" };
    writeln!(io::stderr(), "{count} records of {}{selection}", source.checkpoint.origin)?;
    Ok(())
}
