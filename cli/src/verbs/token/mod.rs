//! `entente token`: how a new machine is let in.
//!
//! A token is good for one process: it gets a certificate of one region and role by it (`entente
//! join`). What the cluster keeps is written through the log like everything that operators change,
//! so every coordinator knows a token at once, and only one of them can use it up.

mod create;
mod list;
mod revoke;

use clap::Subcommand;

/// What can be done with tokens.
#[derive(Debug, Subcommand)]
pub enum TokenVerb {
    /// Make a token by which one process of a region and role may join; it is shown once.
    Create(create::CreateArgs),
    /// List tokens that were not used yet.
    Ls(list::LsArgs),
    /// Take a token back.
    Revoke(revoke::RevokeArgs),
}

/// Does it.
pub fn run(verb: TokenVerb) -> anyhow::Result<()> {
    match verb {
        TokenVerb::Create(args) => create::run(args),
        TokenVerb::Ls(args) => list::run(args),
        TokenVerb::Revoke(args) => revoke::run(args),
    }
}
