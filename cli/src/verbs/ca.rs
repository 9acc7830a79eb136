//! `entente ca`: what is done with the key of a CA at hand and without a cluster.
//!
//! A new region needs a CA, and so does one whose old CA is to go. And when everything was switched
//! off for longer than certificates live, nobody can ask anybody for another one: then whoever has
//! the key issues it here.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use clap::{Args, Subcommand, ValueEnum};
use entente_membership::enrolment::write_private;
use entente_proto::identity::{Identity, Role};
use entente_proto::ids::{NodeName, Region};
use entente_tls::Authority;

use crate::provision::{expect_absent, private_dir};

/// Life of a CA: a rotation is planned, not waited for.
pub const LIFE: Duration = Duration::from_secs(10 * 365 * 24 * 3_600);

/// What can be done with CAs.
#[derive(Debug, Subcommand)]
pub enum CaVerb {
    /// Make a CA for a region; prints its certificate, which belongs into every `ca.pem`.
    Create(CreateArgs),
    /// Issue a certificate with its key, both in one file.
    Issue(IssueArgs),
}

/// The flags of `entente ca create`.
#[derive(Debug, Args)]
pub struct CreateArgs {
    /// Folder of CAs: `<region>.pem` and `<region>.key` are written there.
    #[arg(long, env = "ENTENTE_CA_DIR", value_name = "DIR")]
    ca_dir: PathBuf,

    /// The cluster's name.
    #[arg(long, env = "ENTENTE_CLUSTER", value_name = "NAME")]
    cluster: NodeName,

    /// The region that it is to speak for.
    #[arg(long, env = "ENTENTE_REGION", value_name = "CC")]
    region: Region,
}

/// The flags of `entente ca issue`.
#[derive(Debug, Args)]
pub struct IssueArgs {
    /// Folder of CAs.
    #[arg(long, env = "ENTENTE_CA_DIR", value_name = "DIR")]
    ca_dir: PathBuf,

    /// The region of the process, and of the CA.
    #[arg(long, env = "ENTENTE_REGION", value_name = "CC")]
    region: Region,

    /// What it is.
    #[arg(long, env = "ENTENTE_ROLE", value_enum)]
    role: LeafRole,

    /// What it is called.
    #[arg(long, env = "ENTENTE_NAME", value_name = "NAME")]
    name: NodeName,

    /// Days for which the certificate is valid.
    #[arg(long, env = "ENTENTE_DAYS", value_name = "N", default_value_t = 1)]
    #[arg(value_parser = clap::value_parser!(u64).range(1..=90))]
    days: u64,

    /// The file that is written, and replaced if it is there: `tls/<name>.pem` of a process.
    #[arg(long, env = "ENTENTE_OUT", value_name = "FILE")]
    out: PathBuf,
}

/// What a certificate can be for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum LeafRole {
    /// Serves a model, and votes.
    Coordinator,
    /// Holds experts.
    ExpertNode,
    /// Votes, and does nothing else.
    Witness,
    /// Gives orders to the cluster from the command line.
    Operator,
}

impl From<LeafRole> for Role {
    fn from(role: LeafRole) -> Self {
        match role {
            LeafRole::Coordinator => Self::Coordinator,
            LeafRole::ExpertNode => Self::Expert,
            LeafRole::Witness => Self::Witness,
            LeafRole::Operator => Self::Operator,
        }
    }
}

/// Does it.
pub fn run(verb: CaVerb) -> anyhow::Result<()> {
    match verb {
        CaVerb::Create(args) => create(&args),
        CaVerb::Issue(args) => issue(&args),
    }
}

fn create(args: &CreateArgs) -> anyhow::Result<()> {
    private_dir(&args.ca_dir)?;
    let authority = Authority::new(&args.cluster, args.region, LIFE)?;
    write(&args.ca_dir, &authority)?;
    io::stdout().lock().write_all(authority.certificate_pem().as_bytes())?;
    Ok(())
}

fn issue(args: &IssueArgs) -> anyhow::Result<()> {
    let [certificate, key] = files(&args.ca_dir, args.region);
    let text = |path: &Path| {
        fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
    };
    let authority = Authority::from_pem(&text(&certificate)?, &text(&key)?)?;
    let identity = Identity {
        cluster: authority.domain().cluster.clone(),
        region: args.region,
        role: args.role.into(),
        node: args.name.clone(),
    };
    let issued = authority.issue(&identity, Duration::from_secs(args.days * 24 * 3_600))?;
    let pair = format!("{}{}", issued.certificate_pem, issued.key_pem);
    write_private(&args.out, &pair)
        .with_context(|| format!("cannot write {}", args.out.display()))?;
    tracing::info!(%identity, out = %args.out.display(), "issued");
    Ok(())
}

/// Writes a CA and its key where no other one is.
pub fn write(ca_dir: &Path, authority: &Authority) -> anyhow::Result<()> {
    let [certificate, key] = files(ca_dir, authority.domain().region);
    expect_absent(&certificate)?;
    expect_absent(&key)?;
    let cannot = || format!("cannot write to {}", ca_dir.display());
    write_private(&key, &authority.key_pem()).with_context(cannot)?;
    write_private(&certificate, authority.certificate_pem()).with_context(cannot)
}

fn files(ca_dir: &Path, region: Region) -> [PathBuf; 2] {
    ["pem", "key"].map(|extension| ca_dir.join(format!("{region}.{extension}")))
}
