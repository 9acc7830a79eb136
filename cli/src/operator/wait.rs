//! Waiting until the cluster has done what it was told: moves go on whether somebody watches or not.

use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

use crate::exit::{Failure, Interrupted};

/// Whether to wait, and for how long.
#[derive(Debug, Clone, Copy, Args)]
pub struct WaitArgs {
    /// Return as soon as the cluster has accepted it.
    #[arg(long, env = "ENTENTE_NO_WAIT")]
    pub no_wait: bool,

    /// Wait at most so many seconds; without it until it is done. It goes on in any case.
    #[arg(long, env = "ENTENTE_TIMEOUT_S", value_name = "S")]
    timeout_s: Option<u64>,
}

impl WaitArgs {
    /// Waits for `done`. `goes_on` is what a person should know who stops waiting before.
    pub async fn until<T>(
        self,
        done: impl Future<Output = anyhow::Result<T>>,
        goes_on: &str,
    ) -> anyhow::Result<T> {
        let out_of_time = async {
            match self.timeout_s {
                Some(seconds) => tokio::time::sleep(Duration::from_secs(seconds)).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            // What is done in the last moment is done.
            biased;
            done = done => done,
            _ = tokio::signal::ctrl_c() => {
                // Nobody has to read it; the exit code says the same.
                let _ = writeln!(io::stderr(), "\n{goes_on}");
                Err(Interrupted.into())
            }
            () = out_of_time => Err(Failure::Pending(goes_on.to_owned()).into()),
        }
    }
}

/// How many are left: a bar on a terminal, a line for each change anywhere else.
#[derive(Debug)]
pub struct Countdown {
    what: String,
    total: u64,
    left: u64,
    bar: Option<ProgressBar>,
}

impl Countdown {
    /// Counts down from `total`.
    pub fn new(what: String, total: u64) -> Self {
        let bar = io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{prefix} {bar:40} {pos} of {len}")
                .expect("the template is valid");
            ProgressBar::new(total).with_style(style).with_prefix(what.clone())
        });
        let countdown = Self { what, total, left: total, bar };
        countdown.show();
        countdown
    }

    /// So many are left; a number that rises is one that something else has added.
    pub fn left(&mut self, left: u64) {
        if left != self.left {
            (self.left, self.total) = (left, self.total.max(left));
            self.show();
        }
    }

    fn show(&self) {
        match &self.bar {
            Some(bar) => {
                bar.set_length(self.total);
                bar.set_position(self.total - self.left);
            }
            // Progress is a courtesy: a closed standard error is no reason to stop.
            None => drop(writeln!(io::stderr(), "{}: {} left", self.what, self.left)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_done_is_returned_and_what_is_not_is_pending() {
        let wait = WaitArgs { no_wait: false, timeout_s: Some(0) };
        assert_eq!(wait.until(async { Ok(7) }, "it goes on").await.unwrap(), 7);
        let late = std::future::pending::<anyhow::Result<()>>();
        let error = wait.until(late, "it goes on").await.unwrap_err();
        assert!(
            matches!(error.downcast_ref(), Some(Failure::Pending(text)) if text == "it goes on")
        );
    }
}
