//! The steward against small simulated clusters, through its public door; [`entente_sim`] says which.

#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod machine;
mod scenes;
mod trouble;
mod world;

use world::{Counts, World};

#[test]
fn no_seed_takes_the_last_replica_away_and_all_clusters_come_to_rest() -> Result<(), String> {
    entente_sim::clean(Counts::NAMES, |seed| Ok(World::new(seed).run()?.numbers()))
}
