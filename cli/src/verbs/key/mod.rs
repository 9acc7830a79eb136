//! `entente key`: the keys by which tenants use the public API.
//!
//! A key's secret is shown when it is made and never again. A tenant has two live keys at most: the
//! one in use, and its successor until every client has changed over.

mod create;
mod list;
mod revoke;
mod rotate;
pub mod view;

use clap::Subcommand;

/// What can be done with keys.
#[derive(Debug, Subcommand)]
pub enum KeyVerb {
    /// Make a key and print it, once.
    Create(create::CreateArgs),
    /// Make a key's successor and print it, once; the key itself is good for a while yet.
    Rotate(rotate::RotateArgs),
    /// Make a key good for nothing, at once.
    Revoke(revoke::RevokeArgs),
    /// List keys; their secrets are nowhere.
    Ls(list::LsArgs),
}

/// Does it.
pub fn run(verb: KeyVerb) -> anyhow::Result<()> {
    match verb {
        KeyVerb::Create(args) => create::run(args),
        KeyVerb::Rotate(args) => rotate::run(args),
        KeyVerb::Revoke(args) => revoke::run(args),
        KeyVerb::Ls(args) => list::run(args),
    }
}
