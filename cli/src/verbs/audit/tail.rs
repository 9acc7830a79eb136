//! `entente audit tail`.

use std::io::{self, Write};
use std::time::Duration;

use clap::Args;
use entente_audit::checkpoint::Checkpoint;
use entente_audit::folder::Folder;
use entente_audit::tile::WIDTH;

use super::source::{LogArgs, Source};

/// How often a log is looked at for more.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);

/// The flags of `entente audit tail`.
#[derive(Debug, Args)]
pub struct TailArgs {
    #[command(flatten)]
    logs: LogArgs,

    /// Records of each log.
    #[arg(short = 'n', long, env = "ENTENTE_AUDIT_LINES", default_value_t = 10)]
    lines: u64,

    /// Go on with those that come, until Ctrl-C.
    #[arg(short, long, env = "ENTENTE_AUDIT_FOLLOW")]
    follow: bool,
}

/// Prints a line of JSON for each record.
pub fn run(args: TailArgs) -> anyhow::Result<()> {
    let mut sources = args.logs.all()?;
    for source in &sources {
        let size = source.checkpoint.tree.size;
        print(source, size.saturating_sub(args.lines))?;
    }
    if !args.follow {
        return Ok(());
    }
    loop {
        std::thread::sleep(LOOK_INTERVAL);
        for source in &mut sources {
            let latest = Checkpoint::open(&Folder::note(&source.root)?, &source.verifier)?;
            let from = std::mem::replace(&mut source.checkpoint, latest).tree.size;
            print(source, from)?;
        }
    }
}

/// Prints the signed records of a log from number `from` on.
fn print(source: &Source, from: u64) -> anyhow::Result<()> {
    let (folder, size) = (source.folder(), source.checkpoint.tree.size);
    let mut out = io::stdout().lock();
    for bundle in from / WIDTH..size.div_ceil(WIDTH) {
        for (at, record) in folder.bundle(bundle)?.into_iter().enumerate() {
            if bundle * WIDTH + at as u64 >= from {
                out.write_all(&record)?;
                out.write_all(b"\n")?;
            }
        }
    }
    Ok(out.flush()?)
}
