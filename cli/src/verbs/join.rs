//! `entente join`: makes this machine a member of a cluster, by a token.
//!
//! It gets a certificate and writes that and a configuration. Nothing is started. In a folder that
//! has a configuration already only the certificate is new: so a process comes back whose
//! certificate expired while it was switched off.

use std::io::{self, Read, Write};

use anyhow::Context;
use clap::Args;
use entente_membership::enrolment::{self, JoinError, Joined};
use entente_membership::state::Role;
use entente_membership::token::Text;
use entente_proto::ids::NodeName;

use crate::exit::{Failure, Misuse};
use crate::provision::{Folder, MachineArgs, Process};

/// Longest token that is read from standard input.
const TOKEN_LEN_MAX: u64 = 8 << 10;

/// The flags of `entente join`.
#[derive(Debug, Args)]
pub struct JoinArgs {
    /// The token, as `entente token create` printed it; `-` reads it from standard input, so that
    /// nobody sees it in a list of processes.
    #[arg(env = "ENTENTE_TOKEN", hide_env_values = true)]
    token: String,

    /// What the process is called; as the token says if absent.
    #[arg(long, env = "ENTENTE_NAME", value_name = "NAME")]
    name: Option<NodeName>,

    #[command(flatten)]
    machine: MachineArgs,
}

/// Joins.
pub fn run(args: JoinArgs) -> anyhow::Result<()> {
    let token = token(&args.token)?;
    let name = args.name.clone().or_else(|| token.name.clone());
    let name = name.ok_or_else(|| Misuse("--name: the token does not say one".to_owned()))?;
    // All that can be found to be wrong is found before the token is used up.
    if let Some(model) = args.machine.model.as_ref().filter(|model| !model.is_dir()) {
        return Err(Misuse(format!("--model {}: there is no such folder", model.display())).into());
    }
    let folder = Folder::open(&args.machine.dir)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let joined = runtime.block_on(enrolment::join(&token, &name));
    runtime.shutdown_background();
    let joined = joined.map_err(|error| match error {
        JoinError::Refused(reason) => anyhow::Error::from(Failure::Refused(reason)),
        JoinError::Nobody(_) => Failure::Unreachable(error.to_string()).into(),
        error => error.into(),
    })?;
    let written = settle(&folder, &args.machine, token.role, joined)?;
    tell(&folder, token.role, written)
}

fn settle(
    folder: &Folder,
    machine: &MachineArgs,
    role: Role,
    joined: Joined,
) -> anyhow::Result<bool> {
    let Joined { identity, chain_pem, key_pem, ca_pem, roster, contacts } = joined;
    let pair = format!("{chain_pem}{key_pem}");
    let region = identity.region;
    let process = Process {
        name: identity.node,
        region,
        role,
        roster,
        contacts,
        joins: true,
        leaf_life_s: None,
    };
    folder.settle(&process, machine, &ca_pem, &pair)
}

fn token(text: &str) -> anyhow::Result<Text> {
    let mut read = String::new();
    if text == "-" {
        let mut stdin = io::stdin().lock().take(TOKEN_LEN_MAX);
        stdin.read_to_string(&mut read).context("cannot read the token")?;
    }
    let text = if text == "-" { &read } else { text };
    text.parse().map_err(|error| Misuse(format!("{error}")).into())
}

/// What comes next, for a person.
fn tell(folder: &Folder, role: Role, written: bool) -> anyhow::Result<()> {
    let config = folder.config(role);
    let what = if written { "a certificate and a configuration" } else { "another certificate" };
    writeln!(
        io::stderr(),
        "This machine has {what}. Start it:\n\n  entente {} --config {}",
        role.name(),
        config.display()
    )?;
    Ok(())
}
