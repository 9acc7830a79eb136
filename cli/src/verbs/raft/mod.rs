//! `entente raft`: the voters of a cluster.
//!
//! A voter is added as a learner first (`raft add`), which gets the log and has no vote; once it has
//! caught up it is promoted. The voters refuse what would cost the group its majority.

mod change;
mod leader;
mod snapshot;
mod status;

use clap::Subcommand;

/// What can be done with the raft group.
#[derive(Debug, Subcommand)]
pub enum RaftVerb {
    /// Show what each voter knows: who leads, and how far its log is.
    Status(status::StatusArgs),
    /// Add a member as a learner: it gets the log and has no vote yet.
    Add(change::ChangeArgs),
    /// Give a learner that has caught up its vote.
    Promote(change::ChangeArgs),
    /// Take a voter or a learner out of the group.
    Remove(change::RemoveArgs),
    /// Let another voter lead.
    TransferLeader(leader::TransferArgs),
    /// Let the leader take a snapshot and shorten its log.
    Snapshot(snapshot::SnapshotArgs),
}

/// Does it.
pub fn run(verb: RaftVerb) -> anyhow::Result<()> {
    match verb {
        RaftVerb::Status(args) => status::run(args),
        RaftVerb::Add(args) => change::add(args),
        RaftVerb::Promote(args) => change::promote(args),
        RaftVerb::Remove(args) => change::remove(args),
        RaftVerb::TransferLeader(args) => leader::run(args),
        RaftVerb::Snapshot(args) => snapshot::run(args),
    }
}
