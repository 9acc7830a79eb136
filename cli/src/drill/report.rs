//! What a drill tells: a table for people, one JSON object for everything else.

use std::fmt::{self, Write};

use serde::Serialize;

use super::figures::{Answer, Struck, strike_before};
use super::place::Server;
use super::verdict::{Check, Figures};
use crate::cluster::columns;

/// Failures that are listed; the figures count all.
const FAILURES_MAX: usize = 100;

/// Failures that the table shows.
const FAILURES_SHOWN: usize = 5;

/// Everything that came out.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The scenario's name.
    pub scenario: String,
    /// What it proves when it passes.
    pub proves: String,
    /// What names its requests and targets.
    pub seed: u64,
    /// Whether every check is as required.
    pub passed: bool,
    /// The checks.
    pub checks: Vec<Check>,
    /// What was done to the cluster, in order.
    pub strikes: Vec<Struck>,
    /// Requests that failed, the first ones.
    pub failures: Vec<Failure>,
    /// What was measured.
    pub figures: Figures,
}

/// A request that failed, and what had happened before.
#[derive(Debug, Serialize)]
pub struct Failure {
    /// Which of the scenario's requests.
    request: usize,
    /// Who was asked.
    coordinator: Option<String>,
    /// When it was due.
    began_ms: f64,
    /// When it failed.
    failed_ms: f64,
    /// Tokens that had arrived.
    tokens: usize,
    /// Why.
    error: String,
    /// The strike before it failed.
    after: Option<String>,
    /// How long before.
    after_ms: Option<f64>,
}

impl Failure {
    /// Those of `answers` that failed, the first ones first.
    pub fn list(answers: &[Answer], strikes: &[Struck], servers: &[Server]) -> Vec<Self> {
        let mut failed: Vec<&Answer> =
            answers.iter().filter(|answer| answer.error.is_some()).collect();
        failed.sort_by(|a, b| a.ended_ms.total_cmp(&b.ended_ms));
        let failure = |answer: &Answer| {
            let after = strike_before(strikes, answer.ended_ms);
            let name = servers.get(answer.server).and_then(|server| server.name.as_ref());
            Self {
                request: answer.request,
                coordinator: name.map(ToString::to_string),
                began_ms: answer.began_ms,
                failed_ms: answer.ended_ms,
                tokens: answer.token_ids.len(),
                error: answer.error.clone().unwrap_or_default(),
                after: after.map(|(strike, _)| strike.to_string().trim().to_owned()),
                after_ms: after.map(|(_, ms)| ms),
            }
        };
        failed.into_iter().take(FAILURES_MAX).map(failure).collect()
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.failed_ms / 1e3;
        write!(f, "request {} failed at {seconds:.3} s", self.request)?;
        if let Some(name) = &self.coordinator {
            write!(f, " on {name}")?;
        }
        write!(f, " with {} tokens", self.tokens)?;
        if let (Some(after), Some(ms)) = (&self.after, self.after_ms) {
            write!(f, ", {ms:.0} ms after [{after}]")?;
        }
        write!(f, ": {}", self.error)
    }
}

impl Report {
    /// For people.
    pub fn table(&self) -> String {
        let mut table = columns(["CHECK", "REQUIRED", "MEASURED", ""]);
        for check in &self.checks {
            let Check { check, required, measured, ok } = check;
            let ok = if *ok { "ok" } else { "MISS" };
            table.add_row([check, required, measured, ok]);
        }
        let mut text = format!("{}\n{}\n\n{}\n\n", self.scenario, self.proves, table.trim_fmt());
        for note in self.notes() {
            text += &note;
            text.push('\n');
        }
        text += if self.passed { "PASS" } else { "MISS" };
        text.push('\n');
        text
    }

    /// Lines under the table.
    fn notes(&self) -> Vec<String> {
        let figures = &self.figures;
        let mut notes = Vec::new();
        if let Some(usual_ms) = figures.usual_gap_ms {
            let mut line = format!("usual gap {usual_ms:.1} ms");
            for (name, spread) in [
                ("added stall", figures.added_stall_ms),
                ("undisturbed at as many moments", figures.added_stall_undisturbed_ms),
            ] {
                if let Some(s) = spread {
                    let _ = write!(line, "; {name} p50 {:.1} p99 {:.1}", s.p50, s.p99);
                    let _ = write!(line, " max {:.1} ms ({})", s.max, s.count);
                }
            }
            notes.push(line);
        }
        if let Some(ms) = figures.stolen_ms.filter(|ms| *ms > 0.0) {
            notes.push(format!(
                "the host of this machine took {ms:.0} ms of processor time meanwhile, in which \
                 what ran stood still"
            ));
        }
        if let Some((before, after)) = figures.tokens_s {
            notes.push(format!(
                "{before:.0} tok/s before the first strike, {after:.0} from then on"
            ));
        }
        if figures.changes > 0 {
            let (known, unknown) = (figures.changes, figures.changes_unknown);
            notes.push(format!("{known} changes acknowledged, {unknown} of unknown outcome"));
        }
        if let Some(s) = figures.recovery_ms {
            let (p50, p99, max, count) = (s.p50, s.p99, s.max, s.count);
            notes.push(format!("recovery p50 {p50:.0} p99 {p99:.0} max {max:.0} ms ({count})"));
        }
        for strike in self.strikes.iter().filter(|strike| strike.error.is_some()) {
            let error = strike.error.as_deref().unwrap_or_default();
            notes.push(format!("[{}] failed: {error}", strike.to_string().trim()));
        }
        notes.extend(self.failures.iter().take(FAILURES_SHOWN).map(Failure::to_string));
        notes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_told_with_its_error_and_what_was_before() {
        let strikes = [Struck {
            at_ms: 2_000.0,
            action: "kill".into(),
            targets: vec!["fr-expert-1".into()],
            ..Struck::default()
        }];
        let failed = Answer {
            request: 7,
            ended_ms: 2_250.0,
            token_ids: vec![1, 2],
            error: Some("the stream broke".into()),
            ..Answer::default()
        };
        let list = Failure::list(&[Answer::default(), failed], &strikes, &[]);
        let [failure] = &list[..] else { panic!("{list:?}") };
        let text = "request 7 failed at 2.250 s with 2 tokens, 250 ms after [2.000 s  kill \
                    fr-expert-1]: the stream broke";
        assert_eq!(failure.to_string(), text);
    }
}
