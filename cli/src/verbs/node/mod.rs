//! `entente node`: the members of a cluster.
//!
//! To take a machine out of service: `node drain` moves what is placed on it elsewhere, then it can
//! be stopped; `node decommission` takes a stopped one out for good. `node cordon` only keeps
//! further replicas off it.

mod cordon;
mod decommission;
mod drain;
mod list;
mod ok_to_stop;
mod row;
mod show;
#[cfg(test)]
pub use row::testing;

use clap::Subcommand;

/// What can be done with members.
#[derive(Debug, Subcommand)]
pub enum NodeVerb {
    /// List the members and what is placed on them.
    Ls(list::LsArgs),
    /// Show one member and the experts that are placed on it.
    Show(show::ShowArgs),
    /// Put no further replicas on a node; those that are there stay.
    Cordon(cordon::CordonArgs),
    /// Let a node take replicas again; also calls off its drain.
    Uncordon(cordon::CordonArgs),
    /// Move away all that is placed on a node, so that it can be stopped.
    Drain(drain::DrainArgs),
    /// Say whether nodes may stop without leaving an expert without a replica in their region.
    OkToStop(ok_to_stop::OkToStopArgs),
    /// Take a stopped node out of the cluster for good.
    Decommission(decommission::DecommissionArgs),
}

/// Does it.
pub fn run(verb: NodeVerb) -> anyhow::Result<()> {
    match verb {
        NodeVerb::Ls(args) => list::run(args),
        NodeVerb::Show(args) => show::run(args),
        NodeVerb::Cordon(args) => cordon::run(args, true),
        NodeVerb::Uncordon(args) => cordon::run(args, false),
        NodeVerb::Drain(args) => drain::run(args),
        NodeVerb::OkToStop(args) => ok_to_stop::run(args),
        NodeVerb::Decommission(args) => decommission::run(args),
    }
}
