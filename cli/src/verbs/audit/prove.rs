//! `entente audit prove`.

use std::fs;
use std::io::{self, Write};
use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use entente_audit::merkle;
use entente_audit::proof::Proof;
use entente_audit::record::Record;
use entente_proto::ids::RequestId;

use super::source::{LogArgs, Source};
use crate::exit::Misuse;

/// The flags of `entente audit prove`.
#[derive(Debug, Args)]
pub struct ProveArgs {
    #[command(flatten)]
    logs: LogArgs,

    /// The request, as the header `x-entente-receipt` named it.
    request: RequestId,

    /// Under the latest checkpoint that a witness has cosigned.
    #[arg(long, env = "ENTENTE_AUDIT_COSIGNED")]
    cosigned: bool,

    /// The file to write; standard output when absent.
    #[arg(long, env = "ENTENTE_AUDIT_FILE", value_name = "FILE")]
    file: Option<PathBuf>,
}

/// Writes it.
pub fn run(args: ProveArgs) -> anyhow::Result<()> {
    for source in args.logs.all()? {
        let source = if args.cosigned { source.cosigned()? } else { source };
        let Some(proof) = find(&source, args.request)? else { continue };
        return match &args.file {
            None => Ok(io::stdout().lock().write_all(proof.to_text().as_bytes())?),
            Some(path) => fs::write(path, proof.to_text())
                .with_context(|| format!("cannot write {}", path.display())),
        };
    }
    let text = format!("no signed record is of request {}", args.request);
    Err(Misuse(text).into())
}

/// Looks through a log from its end: what is asked for is seldom old.
fn find(source: &Source, request: RequestId) -> anyhow::Result<Option<Proof>> {
    let (folder, size) = (source.folder(), source.checkpoint.tree.size);
    for bundle in (0..size.div_ceil(entente_audit::tile::WIDTH)).rev() {
        for (at, bytes) in folder.bundle(bundle)?.into_iter().enumerate() {
            let is_it = Record::decode(&bytes).is_ok_and(|r| r.request() == Some(request));
            if is_it {
                let index = bundle * entente_audit::tile::WIDTH + at as u64;
                let path = merkle::inclusion(&folder, index, size)?;
                let note = source.checkpoint.note.clone();
                return Ok(Some(Proof { extra: Some(bytes), index, path, note }));
            }
        }
    }
    Ok(None)
}
