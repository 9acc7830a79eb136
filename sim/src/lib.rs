//! What simulations and randomised tests share: where their randomness comes from, which seeds they
//! run, and when a planted bug counts as caught.
//!
//! One seed decides everything that happens in a run. `ENTENTE_SIM_SEED=n` runs one seed,
//! `ENTENTE_SIM_SEEDS=n` that many, and `ENTENTE_SIM_HOURS=n` fresh ones for so long.
//!
//! What this crate does not know: what is simulated. It is for tests only.

#![allow(clippy::print_stdout)]

use std::env;
use std::fmt::Debug;
use std::ops::Range;
use std::panic::{UnwindSafe, catch_unwind, set_hook};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// How many seeds run where nothing else is asked for.
pub const SEEDS: u64 = 200;

/// SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): all that a simulation needs of randomness. It is
/// written out here, as the seeds that docs/failure-model.md names must mean the same for ever.
#[derive(Debug, Clone)]
pub struct Random(pub u64);

impl Random {
    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number below `bound`; 0 where there is none.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.bits() % bound.max(1)
    }

    /// A place in something of this length; 0 where it is empty.
    pub fn place(&mut self, len: usize) -> usize {
        self.below(len as u64) as usize
    }

    /// True once in `n` times.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    /// One of these; nothing where there is none.
    pub fn pick<T: Copy>(&mut self, of: &[T]) -> Option<T> {
        of.get(self.place(of.len())).copied()
    }

    /// A value from -1 to 1.
    pub fn value(&mut self) -> f32 {
        self.below(2_000_001) as f32 / 1e6 - 1.0
    }
}

fn setting(name: &str) -> Option<u64> {
    env::var(name).ok()?.parse().ok()
}

/// Whether one seed is run, to see what happens in it.
pub fn is_looked_at() -> bool {
    setting("ENTENTE_SIM_SEED").is_some()
}

/// The seeds that are to run.
fn seeds() -> Range<u64> {
    match setting("ENTENTE_SIM_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..setting("ENTENTE_SIM_SEEDS").unwrap_or(SEEDS),
    }
}

/// Turns a panic of `run` into an error.
///
/// # Errors
/// Those of `run`, and its panics.
pub fn unwound<T>(run: impl FnOnce() -> Result<T, String> + UnwindSafe) -> Result<T, String> {
    catch_unwind(run).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        Err(format!("panic: {}", text.unwrap_or_default()))
    })
}

/// Lets panics that are caught print nothing, unless one seed is looked at.
pub fn quiet() {
    if !is_looked_at() {
        set_hook(Box::new(|_| {}));
    }
}

/// Runs all seeds and adds up what each counted, under the names in `counted`.
///
/// # Errors
/// The first seed that fails, and seeds in which too little of something happened: a run in which
/// nothing happens proves nothing.
pub fn clean<const N: usize>(
    counted: [&str; N],
    run: impl Fn(u64) -> Result<[u64; N], String>,
) -> Result<(), String> {
    let (seeds, mut totals) = (seeds(), [0; N]);
    for seed in seeds.clone() {
        let counts = run(seed).map_err(|error| format!("seed {seed}: {error}"))?;
        totals.iter_mut().zip(counts).for_each(|(total, count)| *total += count);
    }
    println!("seeds {seeds:?}: {counted:?}: {totals:?}");
    if seeds.end - seeds.start >= SEEDS && totals.iter().any(|total| *total < SEEDS) {
        return Err(format!("too little happened: {counted:?}: {totals:?}"));
    }
    Ok(())
}

/// Runs seeds that nobody ran before for `ENTENTE_SIM_HOURS`; none where that is not set.
///
/// # Errors
/// The first seed that fails.
pub fn fresh<T>(run: impl Fn(u64) -> Result<T, String>) -> Result<(), String> {
    let Some(hours) = setting("ENTENTE_SIM_HOURS") else { return Ok(()) };
    let end = Instant::now() + Duration::from_secs(hours * 3_600);
    let clock = SystemTime::now().duration_since(UNIX_EPOCH);
    let first = clock.map_or(1 << 20, |now| now.as_secs() << 20);
    let mut seed = first;
    while Instant::now() < end {
        run(seed).map_err(|error| format!("seed {seed}: {error}"))?;
        seed += 1;
    }
    println!("{} seeds from {first}", seed - first);
    Ok(())
}

/// Requires that a planted bug breaks some seed of [`SEEDS`], and prints its line of the table in
/// docs/failure-model.md.
///
/// # Errors
/// No seed fails.
pub fn caught<T>(bug: impl Debug, run: impl Fn(u64) -> Result<T, String>) -> Result<(), String> {
    let found = (0..SEEDS).find_map(|seed| run(seed).err().map(|error| (seed, error)));
    let Some((seed, error)) = found else {
        return Err(format!("{bug:?} was not caught in {SEEDS} seeds"));
    };
    println!("{bug:?} | {} | {error}", seed + 1);
    Ok(())
}

/// A test for each planted bug: `planted! { run, Bug, name_of_the_test: NameOfTheBug, … }`, where
/// `run` takes a seed and perhaps a bug.
#[macro_export]
macro_rules! planted {
    ($run:ident, $bugs:ident, $($name:ident: $bug:ident),+ $(,)?) => {$(
        #[test]
        fn $name() -> Result<(), String> {
            $crate::quiet();
            $crate::caught($bugs::$bug, |seed| $run(seed, Some($bugs::$bug)))
        }
    )+};
}
