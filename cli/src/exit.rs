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
  3    the cluster refused; the same request again is refused again
  4    no quorum: voters answer, but none leads; serving goes on, changes wait
  5    not the leader: somebody leads, but cannot be reached from here
  6    no voter can be reached
  7    the time is up, and what was asked for may still come about
  8    a drill ran to its end and missed something that it requires
  9    the device to compute on, such as a GPU, cannot be used or has failed
  130  interrupted before there was a result";

/// The caller asked for something that cannot be: exit code 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Misuse(pub String);

/// A drill ran to its end and the cluster did not keep what it requires: exit code 8.
#[derive(Debug, thiserror::Error)]
#[error("{missed} of {checks} checks missed")]
pub struct Missed {
    /// Checks that missed.
    pub missed: usize,
    /// Checks in all.
    pub checks: usize,
}

/// The device that a node was to compute on cannot be used, or failed while it served: exit code 9.
/// The text names the device and the cause.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct DeviceFailed(pub String);

/// A signal came before there was a result: exit code 130.
#[derive(Debug, thiserror::Error)]
#[error("interrupted")]
pub struct Interrupted;

/// What was asked of a cluster did not come about: exit codes 3 to 7. The text names the cause and
/// what can be done about it.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// By the cluster, for a reason that stays.
    #[error("refused: {0}")]
    Refused(String),
    /// There is no majority of voters.
    #[error("no quorum: {0}")]
    NoQuorum(String),
    /// The leader is somewhere else.
    #[error("not the leader: {0}")]
    NotLeader(String),
    /// No voter answers at all.
    #[error("unreachable: {0}")]
    Unreachable(String),
    /// It was not seen to be done in time.
    #[error("not known to be done: {0}")]
    Pending(String),
}

impl Failure {
    fn code(&self) -> u8 {
        match self {
            Self::Refused(_) => 3,
            Self::NoQuorum(_) => 4,
            Self::NotLeader(_) => 5,
            Self::Unreachable(_) => 6,
            Self::Pending(_) => 7,
        }
    }
}

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
    if let Some(failure) = error.downcast_ref::<Failure>() {
        failure.code()
    } else if error.is::<Misuse>() {
        2
    } else if error.is::<Missed>() {
        8
    } else if error.is::<DeviceFailed>() {
        9
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
        assert_eq!(code(&Missed { missed: 1, checks: 2 }.into()), 8);
        assert_eq!(code(&DeviceFailed("cuda:0: it is lost".into()).into()), 9);
        assert_eq!(code(&Interrupted.into()), 130);
        let refused = Err::<(), _>(Failure::Refused("the last replica".into())).context("drain");
        assert_eq!(code(&refused.unwrap_err()), 3);
    }
}
