//! Exit codes, and how a failure is told.
//!
//! The codes are part of the interface: scripts branch on them, so a number never changes meaning.

use std::io::Write;
use std::process::ExitCode;

/// The table of exit codes as `--help` shows it.
pub const HELP: &str = "\
Exit codes:
  0    done, or stopped by a signal after a clean start
  1    failed while running; standard error says why
  2    the command line or a configuration file is wrong
  3    a drill ran to its end and missed something that it requires
  130  interrupted before there was a result";

/// The caller asked for something that cannot be: exit code 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Misuse(pub String);

/// A drill ran to its end and the cluster did not keep what it requires: exit code 3.
#[derive(Debug, thiserror::Error)]
#[error("{missed} of {checks} checks missed")]
pub struct Missed {
    /// Checks that missed.
    pub missed: usize,
    /// Checks in all.
    pub checks: usize,
}

/// A signal came before there was a result: exit code 130.
#[derive(Debug, thiserror::Error)]
#[error("interrupted")]
pub struct Interrupted;

/// Turns the result of a verb into an exit code, and tells a failure with all its causes.
pub fn report(result: anyhow::Result<()>) -> ExitCode {
    let Err(error) = result else { return ExitCode::SUCCESS };
    // Nothing can be told when standard error is closed; the code still says that it failed.
    let mut stderr = std::io::stderr().lock();
    let _ = writeln!(stderr, "error: {error}");
    for cause in error.chain().skip(1) {
        let _ = writeln!(stderr, "  because: {cause}");
    }
    ExitCode::from(code(&error))
}

fn code(error: &anyhow::Error) -> u8 {
    if error.is::<Misuse>() {
        2
    } else if error.is::<Missed>() {
        3
    } else if error.is::<Interrupted>() {
        130
    } else {
        1
    }
}

#[cfg(test)]
mod tests {
    use anyhow::Context;

    use super::*;

    #[test]
    fn the_code_survives_added_context() {
        let misuse = Err::<(), _>(Misuse("no such region".into())).context("reading a.toml");
        assert_eq!(code(&misuse.unwrap_err()), 2);
        assert_eq!(code(&anyhow::anyhow!("the disk is full")), 1);
        assert_eq!(code(&Missed { missed: 1, checks: 2 }.into()), 3);
        assert_eq!(code(&Interrupted.into()), 130);
    }
}
