//! A discrete-event simulator over the pure cores: whole clusters in one thread, in virtual time.
//! [`entente_sim`] says which seeds run.

#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod bugs;
mod oracle;
mod world;

use std::panic::AssertUnwindSafe;

use bugs::Bug;
use entente_sim::planted;
use world::{Report, World};

/// A run that panics is caught too: raft-rs panics when a disk has lost what it acknowledged.
fn run(seed: u64, bug: Option<Bug>) -> Result<Report, String> {
    entente_sim::unwound(AssertUnwindSafe(|| World::new(seed, bug).run()))
}

#[test]
fn no_seed_breaks_an_invariant() -> Result<(), String> {
    entente_sim::quiet();
    entente_sim::clean(Report::NAMES, |seed| Ok(run(seed, None)?.numbers()))
}

#[test]
fn one_seed_replays_exactly() {
    for seed in 0..10 {
        assert_eq!(run(seed, None), run(seed, None), "seed {seed}");
    }
    assert_ne!(run(0, None), run(1, None));
}

#[test]
fn hours_of_fresh_seeds_break_no_invariant() -> Result<(), String> {
    entente_sim::quiet();
    entente_sim::fresh(|seed| run(seed, None))
}

planted! {
    run, Bug,
    a_skipped_fsync_is_caught: SkipFsync,
    a_forgotten_vote_is_caught: VoteForgotten,
    an_acknowledgement_before_it_is_durable_is_caught: AckBeforePersist,
    an_answer_before_the_commit_is_caught: AnswerBeforeCommit,
    a_truncated_tail_is_caught: TailTruncated,
    an_empty_disk_under_an_old_number_is_caught: EmptyDiskOldNumber,
    a_group_of_one_is_caught: GroupOfOne,
    an_accepted_stale_fence_is_caught: StaleFenceAccepted,
    a_forgotten_session_is_caught: DedupeForgotten,
    an_epoch_that_goes_back_is_caught: EpochGoesBack,
    a_reused_incarnation_is_caught: IncarnationReused,
    an_unverified_snapshot_is_caught: SnapshotNotVerified,
    a_read_from_any_voter_is_caught: ReadAnywhere,
    a_read_without_read_index_is_caught: ReadWithoutIndex,
    forgotten_group_changes_are_caught: ChangesForgotten,
}
