//! The steward against small simulated clusters, through its public door.
//!
//! One seed decides everything that happens. `ENTENTE_SIM_SEED=n` runs one seed and tells what
//! happens, `ENTENTE_SIM_SEEDS=n` runs that many.

#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod machine;
mod scenes;
mod trouble;
mod world;

use world::World;

const SEEDS: u64 = 200;

fn setting(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

#[test]
fn no_seed_takes_the_last_replica_away_and_all_clusters_come_to_rest() -> Result<(), String> {
    let seeds = match setting("ENTENTE_SIM_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..setting("ENTENTE_SIM_SEEDS").unwrap_or(SEEDS),
    };
    let mut total = world::Counts::default();
    for seed in seeds.clone() {
        let counts = World::new(seed).run().map_err(|error| format!("seed {seed}: {error}"))?;
        total += counts;
    }
    println!("seeds {seeds:?}: {total:?}");
    // A run in which nothing happens proves nothing.
    if seeds.end - seeds.start >= SEEDS && total.least() < SEEDS {
        return Err(format!("too little happened: {total:?}"));
    }
    Ok(())
}
