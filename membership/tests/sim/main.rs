//! A discrete-event simulator over the pure cores: whole clusters in one thread, in virtual time.
//!
//! One seed decides everything that happens. `ENTENTE_SIM_SEED=n` runs one seed,
//! `ENTENTE_SIM_SEEDS=n` that many, and `ENTENTE_SIM_HOURS=n` fresh ones for so long.

#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod bugs;
mod oracle;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};

use bugs::Bug;
use world::{Report, World};

const SEEDS: u64 = 200;

fn setting(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// A run that panics is caught too: raft-rs panics when a disk has lost what it acknowledged.
fn run(seed: u64, bug: Option<Bug>) -> Result<Report, String> {
    catch_unwind(AssertUnwindSafe(|| World::new(seed, bug).run())).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        Err(format!("panic: {}", text.unwrap_or_default()))
    })
}

fn quiet() {
    if setting("ENTENTE_SIM_SEED").is_none() {
        std::panic::set_hook(Box::new(|_| {}));
    }
}

#[test]
fn no_seed_breaks_an_invariant() -> Result<(), String> {
    quiet();
    let seeds = match setting("ENTENTE_SIM_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..setting("ENTENTE_SIM_SEEDS").unwrap_or(SEEDS),
    };
    let mut total = [0; 5];
    for seed in seeds.clone() {
        let report = run(seed, None).map_err(|error| format!("seed {seed}: {error}"))?;
        let Report { events, operations, entries, snapshots_installed, group_changes, .. } = report;
        let numbers = [events, operations, entries, snapshots_installed, group_changes];
        total.iter_mut().zip(numbers).for_each(|(sum, number)| *sum += number);
    }
    println!("seeds {seeds:?}: events, operations, entries, snapshots, changes: {total:?}");
    // A run in which nothing happens proves nothing.
    if seeds.end - seeds.start >= SEEDS && total.iter().any(|sum| *sum < SEEDS) {
        return Err(format!("too little happened: {total:?}"));
    }
    Ok(())
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
    quiet();
    let Some(hours) = setting("ENTENTE_SIM_HOURS") else { return Ok(()) };
    let end = std::time::Instant::now() + std::time::Duration::from_secs(hours * 3_600);
    let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let first = clock.map_or(1 << 20, |now| now.as_secs() << 20);
    let mut seed = first;
    while std::time::Instant::now() < end {
        run(seed, None).map_err(|error| format!("seed {seed}: {error}"))?;
        seed += 1;
    }
    println!("{} seeds from {first}", seed - first);
    Ok(())
}

/// Each bug is caught within [`SEEDS`] seeds. The table that this prints is in
/// docs/failure-model.md.
fn caught(bug: Bug) -> Result<(), String> {
    quiet();
    let found = (0..SEEDS).find_map(|seed| run(seed, Some(bug)).err().map(|error| (seed, error)));
    match found {
        Some((seed, error)) => {
            println!("{bug:?} | {} | {error}", seed + 1);
            Ok(())
        }
        None => Err(format!("{bug:?} was not caught in {SEEDS} seeds")),
    }
}

macro_rules! planted {
    ($($name:ident: $bug:ident),+ $(,)?) => {$(
        #[test]
        fn $name() -> Result<(), String> {
            caught(Bug::$bug)
        }
    )+};
}

planted! {
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
