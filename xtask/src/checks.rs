//! Everything that must hold before a change lands, cheapest first, the tests last.
//!
//! The order has a second reason: the summary of the tests ends the output, where people and
//! machines look for it.

use crate::shell::{become_command, command, root, run};
use crate::{cuda, fuzz, setup, tidy};

/// What the default build leaves out and the checks must not.
const FEATURES: &str = "--features entente/etcd";

/// How long each fuzz target runs here; what that misses, longer runs by hand are for.
const FUZZ_SECONDS: &str = "30";

/// Runs every check; the first that fails ends the run.
pub fn test() -> Result<(), String> {
    setup::run_all()?;
    run(&mut command("cargo fmt --all --check"))?;
    tidy::run()?;
    cuda::run()?;
    // Advisories are left out: they need a database from the network, and a new advisory must not
    // break an old commit.
    run(&mut command("cargo deny --locked check bans licenses sources"))?;
    // What a user builds, without any feature; it shares no step with what follows.
    run(&mut command("cargo check --locked --release"))?;
    // One profile and one set of features for all that follows, so that dependencies are built once.
    let all = |verb: &str, rest: &str| {
        command(&format!("cargo {verb} --locked --release --workspace {FEATURES} {rest}"))
    };
    run(&mut all("clippy", "--all-targets -- --deny warnings"))?;
    run(all("doc", "--no-deps").env("RUSTDOCFLAGS", "--deny warnings"))?;
    // The binary is built together with the tests: alone it would ask for other features of shared
    // dependencies, and these would be built twice.
    run(&mut all("build", "--bins --tests"))?;
    run(&mut all("test", "--doc --quiet"))?;
    drills()?;
    fuzz::run_all(FUZZ_SECONDS)?;
    Err(become_command(&mut all("nextest run", "")))
}

/// The short form of every drill, each on a cluster of its own.
fn drills() -> Result<(), String> {
    let folder = "tests/drills";
    let entries = root().join(folder).read_dir().map_err(|error| format!("{folder}: {error}"))?;
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut names: Vec<String> = names.filter(|name| name.ends_with(".yaml")).collect();
    names.sort();
    for name in names {
        let line = format!("target/release/entente --log warn drill run {folder}/{name} --short");
        run(&mut command(&line))?;
    }
    Ok(())
}

/// Simulates clusters of voters for so many hours. The first seed that breaks an invariant ends
/// the run and is named; `ENTENTE_SIM_SEED` runs it again.
pub fn sim(hours: &str) -> Result<(), String> {
    hours.parse::<u32>().map_err(|error| format!("--hours {hours}: {error}"))?;
    run(command(
        "cargo test --locked --release -p entente-membership --test sim hours -- --nocapture",
    )
    .env("ENTENTE_SIM_HOURS", hours))
}
