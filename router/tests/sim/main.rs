//! A discrete-event simulator over the exchange machine: one coordinator with several exchanges in
//! flight, nodes that compute a function of row and expert, and all that may happen in between, in
//! virtual time. [`entente_sim`] says which seeds run.

#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod bugs;
mod nodes;
mod world;

use std::panic::AssertUnwindSafe;

use bugs::Bug;
use entente_sim::planted;
use world::{Report, World};

fn run(seed: u64, bug: Option<Bug>) -> Result<Report, String> {
    entente_sim::unwound(AssertUnwindSafe(|| World::new(seed, bug).run()))
}

#[test]
fn no_seed_changes_a_bit_of_a_sum_or_sends_more_than_it_must() -> Result<(), String> {
    entente_sim::quiet();
    entente_sim::clean(Report::NAMES, |seed| Ok(run(seed, None)?.numbers()))
}

#[test]
fn one_seed_replays_exactly() {
    for seed in 0..20 {
        assert_eq!(run(seed, None), run(seed, None), "seed {seed}");
    }
    assert_ne!(run(0, None), run(1, None));
}

#[test]
fn hours_of_fresh_seeds_change_no_bit() -> Result<(), String> {
    entente_sim::quiet();
    entente_sim::fresh(|seed| run(seed, None))
}

planted! {
    run, Bug,
    a_sum_in_order_of_arrival_is_caught: ArrivalOrder,
    an_accepted_answer_of_a_stale_start_is_caught: StaleFenceAccepted,
    an_accepted_answer_of_a_wrong_length_is_caught: WrongLengthAccepted,
    an_answer_that_counts_twice_is_caught: RepeatCounted,
    an_accepted_answer_of_another_exchange_is_caught: OtherExchangeAccepted,
    sending_all_rows_again_is_caught: AllSentAgain,
    a_forgotten_hedge_budget_is_caught: BudgetForgotten,
}
