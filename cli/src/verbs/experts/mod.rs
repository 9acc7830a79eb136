//! `entente experts`: which expert is where, and moving them.
//!
//! A move loads the new replica, commits, and only then releases the old one; it goes on whether
//! somebody waits for it or not.

mod list;
mod load;
mod moves;
mod place;

use clap::Subcommand;

/// What can be done with experts.
#[derive(Debug, Subcommand)]
pub enum ExpertsVerb {
    /// List experts and the nodes that hold them.
    Ls(list::LsArgs),
    /// Make one more replica of one expert on one node.
    Load(load::LoadArgs),
    /// Show the placement that would be chosen now with its arithmetic; without --dry-run move to it.
    Place(place::PlaceArgs),
    /// Move to the placement that would be chosen now.
    Rebalance(moves::RebalanceArgs),
}

/// Does it.
pub fn run(verb: ExpertsVerb) -> anyhow::Result<()> {
    match verb {
        ExpertsVerb::Ls(args) => list::run(args),
        ExpertsVerb::Load(args) => load::run(args),
        ExpertsVerb::Place(args) => place::run(args),
        ExpertsVerb::Rebalance(args) => moves::run(args),
    }
}
