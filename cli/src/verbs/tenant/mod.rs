//! `entente tenant`: who may use the cluster, in which regions, and how much.
//!
//! A tenant is allowed nothing but what is said: without regions its requests are refused. What may
//! be asked for is told apart from by which keys; those are `entente key`'s.

mod delete;
mod list;
mod set;
mod show;
mod view;

use clap::Subcommand;

/// What can be done with tenants.
#[derive(Debug, Subcommand)]
pub enum TenantVerb {
    /// Make a tenant, without keys.
    Create(set::CreateArgs),
    /// List the tenants.
    Ls(list::LsArgs),
    /// Show one tenant and its keys.
    Show(show::ShowArgs),
    /// Change where a tenant's rows may go and how much it may ask for.
    Set(set::SetArgs),
    /// Take a tenant away with all its keys.
    Delete(delete::DeleteArgs),
}

/// Does it.
pub fn run(verb: TenantVerb) -> anyhow::Result<()> {
    match verb {
        TenantVerb::Create(args) => set::create(args),
        TenantVerb::Ls(args) => list::run(args),
        TenantVerb::Show(args) => show::run(args),
        TenantVerb::Set(args) => set::set(args),
        TenantVerb::Delete(args) => delete::run(args),
    }
}
