//! `entente link`: changes the network between the processes of one `entente up --link`.

use std::io::{self, Write};
use std::path::PathBuf;

use clap::{Args, Subcommand};
use serde::Serialize;

use crate::cluster::columns;
use crate::cluster::relay::control;
use crate::cluster::relay::rule::Change;
use crate::operator::Output;

/// What can be done with links.
#[derive(Debug, Subcommand)]
pub enum LinkVerb {
    /// Change links, also for what is connected; prints what holds afterwards.
    Set(SetArgs),
    /// Print what holds.
    Ls(LsArgs),
    /// Print what has passed between the processes, by who dialled whom.
    Traffic(LsArgs),
}

/// The flags of all.
#[derive(Debug, Args)]
pub struct LsArgs {
    /// Folder of the `entente up` whose links these are.
    #[arg(long, env = "ENTENTE_DATA_DIR", value_name = "DIR", default_value = ".entente")]
    data_dir: PathBuf,

    /// How the answer is written to standard output.
    #[arg(short, long, env = "ENTENTE_OUTPUT", value_enum, default_value = "table")]
    output: Output,
}

/// The flags of `entente link set`.
#[derive(Debug, Args)]
pub struct SetArgs {
    #[command(flatten)]
    common: LsArgs,

    /// Such as fr-se=30ms, fr-se=1mbit, fr-se=cut, 'fr->se=cut', fr-expert-1=slow:20, fr-se=clear.
    #[arg(required = true, value_name = "LINK=EFFECT")]
    links: Vec<String>,
}

/// The answer as JSON has it.
#[derive(Debug, Serialize)]
struct Row {
    link: String,
    effect: String,
}

/// Asks the relay.
pub fn run(verb: LinkVerb) -> anyhow::Result<()> {
    let (args, links) = match verb {
        LinkVerb::Traffic(args) => return print_traffic(&args),
        LinkVerb::Ls(args) => {
            let links = control::list(&args.data_dir)?;
            (args, links)
        }
        LinkVerb::Set(SetArgs { common, links }) => {
            // What is no word at all is a mistake on this command line.
            for link in &links {
                link.parse::<Change>().map_err(crate::exit::Misuse)?;
            }
            let links = control::set(&common.data_dir, links)?;
            (common, links)
        }
    };
    let rows: Vec<Row> = links.into_iter().map(|(link, effect)| Row { link, effect }).collect();
    let text = match args.output {
        Output::Json => serde_json::to_string_pretty(&rows)?,
        Output::Table => {
            let mut table = columns(["LINK", "EFFECT"]);
            for row in rows {
                table.add_row([row.link, row.effect]);
            }
            table.trim_fmt()
        }
    };
    writeln!(io::stdout().lock(), "{text}")?;
    Ok(())
}

/// Prints all pairs as JSON, as a table those that have tried to speak to each other.
fn print_traffic(args: &LsArgs) -> anyhow::Result<()> {
    let traffic = control::traffic(&args.data_dir)?;
    let text = match args.output {
        Output::Json => serde_json::to_string_pretty(&traffic)?,
        Output::Table => {
            let mut table =
                columns(["DIALLER", "TARGET", "CONNECTIONS", "REFUSED", "BYTES THERE", "BACK"]);
            for one in traffic.iter().filter(|one| one.connections + one.refused > 0) {
                let counts = [one.connections, one.refused, one.bytes_there, one.bytes_back];
                let names = [&one.dialler, &one.target].map(ToString::to_string);
                table.add_row(names.into_iter().chain(counts.map(|count| count.to_string())));
            }
            table.trim_fmt()
        }
    };
    writeln!(io::stdout().lock(), "{text}")?;
    Ok(())
}
