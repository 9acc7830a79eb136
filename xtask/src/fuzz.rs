//! Builds and runs the fuzz targets of `fuzz/` with the stable compiler.
//!
//! The instrumentation is LLVM's own, asked for by flags that stable rustc passes on, and the
//! fuzzer is the library that the targets are linked with; so nothing has to be installed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::shell::{command, output, root, run};

/// The targets, each a binary of `fuzz/`.
const TARGETS: [&str; 6] =
    ["exchange-frame", "http-body", "safetensors-header", "config", "log-record", "receipt"];

/// How many run beside each other.
const JOBS: usize = 2;

/// Counters at every edge, and the values of every comparison, so that the fuzzer sees what is new
/// and what an input is compared with.
const INSTRUMENTATION: &str = "-Cpasses=sancov-module \
    -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
    -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares \
    -Ccodegen-units=1 --cfg fuzzing";

/// Runs every target for so many seconds. What one finds is kept, so that the next run begins there.
///
/// # Errors
/// The first target that found something; its input and how to run it again are printed.
pub fn run_all(seconds: &str) -> Result<(), String> {
    seconds.parse::<u32>().map_err(|error| format!("--seconds {seconds}: {error}"))?;
    let host = output(&mut command("rustc --print host-tuple"))?;
    let host = host.trim();
    // What is fuzzed is built from what is tested: the project's own lock file, to which cargo adds
    // the fuzzer's few crates.
    fs::copy(root().join("Cargo.lock"), root().join("fuzz/Cargo.lock"))
        .map_err(|error| format!("fuzz/Cargo.lock: {error}"))?;
    // With a target given, build scripts and procedural macros are left uninstrumented.
    let line = format!(
        "cargo build --release --manifest-path fuzz/Cargo.toml --target {host} --target-dir \
         target/fuzz"
    );
    run(command(&line).env("RUSTFLAGS", INSTRUMENTATION))?;
    let binaries = root().join("target/fuzz").join(host).join("release");
    for targets in TARGETS.chunks(JOBS) {
        let started: Vec<Run> = targets
            .iter()
            .map(|target| Run::start(&binaries, target, seconds))
            .collect::<Result<_, _>>()?;
        started.into_iter().try_for_each(Run::finish)?;
    }
    Ok(())
}

/// A target that runs.
struct Run {
    target: &'static str,
    child: Child,
    log: PathBuf,
}

impl Run {
    fn start(binaries: &Path, target: &'static str, seconds: &str) -> Result<Self, String> {
        let corpus = root().join("target/fuzz/corpus").join(target);
        let cannot = |error| format!("{}: {error}", corpus.display());
        fs::create_dir_all(&corpus).map_err(cannot)?;
        let log = corpus.with_extension("log");
        let file = fs::File::create(&log).map_err(cannot)?;
        let child = Command::new(binaries.join(target))
            .arg(&corpus)
            .args([&format!("-max_total_time={seconds}"), "-timeout=10", "-rss_limit_mb=2048"])
            .args(["-max_len=65536", "-print_final_stats=1"])
            .arg(format!("-artifact_prefix={}-", corpus.display()))
            .env("ENTENTE_FUZZ_SEEDS", &corpus)
            .stdout(Stdio::null())
            .stderr(file)
            .spawn()
            .map_err(|error| format!("cannot run the fuzz target {target}: {error}"))?;
        Ok(Self { target, child, log })
    }

    fn finish(mut self) -> Result<(), String> {
        let status = self.child.wait().map_err(|error| format!("{}: {error}", self.target))?;
        let log = fs::read(&self.log).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let executed =
            log.lines().find_map(|line| line.strip_prefix("stat::number_of_executed_units:"));
        println!("# fuzz {}: {} inputs, {status}", self.target, executed.unwrap_or("?").trim());
        if status.success() {
            return Ok(());
        }
        let tail: Vec<&str> = log.lines().rev().take(40).collect();
        println!("{}", tail.into_iter().rev().collect::<Vec<_>>().join("\n"));
        Err(format!("the fuzz target {} found something; see {}", self.target, self.log.display()))
    }
}
