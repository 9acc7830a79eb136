//! `cargo xtask`: what a person would otherwise type, in the order in which they would type it.
//!
//! - `cargo xtask test` sets up what the checks need and runs all of them ([`checks`]).
//! - `cargo xtask sim --hours N` simulates clusters with fresh seeds for so long.
//! - `cargo xtask fuzz --seconds N` runs each fuzz target for so long ([`fuzz`]).
//! - `cargo xtask cuda` compiles the CUDA kernels, for which no GPU is needed ([`cuda`]).
//! - `cargo xtask tidy` runs the house rules alone ([`tidy`]).
//! - `cargo xtask limits` writes the table of all bounds ([`limits`]).
//!
//! It depends on nothing but the standard library, so that it is built in seconds and can set up a
//! machine that has only Rust and a C compiler.

// A tool at a prompt speaks by printing.
#![allow(clippy::print_stdout, clippy::print_stderr)]

mod checks;
mod cuda;
mod fuzz;
mod limits;
mod setup;
mod shell;
mod tidy;

use std::process::ExitCode;

const USAGE: &str = "\
usage: cargo xtask COMMAND

  setup   install what the checks need, where it is missing
  test    set up what is missing, then run every check and every test
  sim     --hours N: simulate clusters of voters with fresh seeds for so long
  fuzz    --seconds N: run each fuzz target for so long
  cuda    compile the CUDA kernels; registers, shared memory and spills of each
  tidy    check the house rules: sizes, essays, left-overs, docs/limits.md
  limits  write docs/limits.md anew from the sources";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match arguments[..] {
        ["setup"] => setup::run_all(),
        ["test"] => checks::test(),
        ["sim", "--hours", hours] => checks::sim(hours),
        ["fuzz", "--seconds", seconds] => fuzz::run_all(seconds),
        ["cuda"] => cuda::run(),
        ["tidy"] => tidy::run(),
        ["limits"] => limits::write(),
        _ => Err(USAGE.to_owned()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
