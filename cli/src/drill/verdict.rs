//! Whether what was measured is what is required. Pure.
//!
//! A figure that is required and could not be measured is a miss: a drill must not pass because
//! nothing was there to be looked at.

use serde::Serialize;

use super::figures::{Differences, Spread};
use super::scenario::{Expect, Limits};
use super::stale::Stale;

/// Everything that a run showed.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Figures {
    /// Requests that were sent.
    pub requests: usize,
    /// Those that failed and should not have.
    pub failed: usize,
    /// Those that failed because a fault ended their coordinator.
    pub failed_with_coordinator: usize,
    /// Strikes that the scenario wants.
    pub strikes: usize,
    /// Strikes that were made.
    pub struck: usize,
    /// How answers differ from the undisturbed ones.
    pub differences: Option<Differences>,
    /// Median gap between pieces where nothing was disturbed.
    pub usual_gap_ms: Option<f64>,
    /// Added stall over streams and strikes.
    pub added_stall_ms: Option<Spread>,
    /// The same figure of the undisturbed run, at moments when nothing happened: what of the stall
    /// is the machine's own.
    pub added_stall_undisturbed_ms: Option<Spread>,
    /// From a strike until the cluster was ready.
    pub recovery_ms: Option<Spread>,
    /// Strikes after which it never was.
    pub never_recovered: usize,
    /// Tokens a second before the first strike and from then on.
    pub tokens_s: Option<(f64, f64)>,
    /// Tokens a second of the undisturbed run, from begin to end.
    pub tokens_s_undisturbed: Option<f64>,
    /// Share of rows asked of a second node in the undisturbed run.
    pub hedged_share_undisturbed: Option<f64>,
    /// The same under faults.
    pub hedged_share: Option<f64>,
    /// Processor time that the machine's host gave to others under faults; see
    /// [`super::watch::stolen_ms`].
    pub stolen_ms: Option<f64>,
    /// What was sent in the name of those that slept.
    pub stale: Option<Stale>,
    /// How often the control plane told of an epoch that was lower than one before.
    pub epochs_back: Option<usize>,
    /// The connections over which nothing may pass, and how many bytes did.
    pub passed_bytes: Vec<(String, Option<u64>)>,
    /// Bytes that passed over links while they were cut.
    pub cut_bytes: Option<u64>,
    /// Replicas that were placed where they had not been before.
    pub moves: Option<u64>,
    /// Changes that the drill itself made and that were acknowledged.
    pub changes: usize,
    /// Those of which it is not known whether they were committed.
    pub changes_unknown: usize,
    /// Acknowledged ones that no order of all changes explains.
    pub changes_out_of_order: usize,
}

/// One line of the verdict.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What is looked at.
    pub check: String,
    /// What it must be.
    pub required: String,
    /// What it is.
    pub measured: String,
    /// Whether that is enough.
    pub ok: bool,
}

/// Compares what was measured with what is required.
pub fn judge(expect: &Expect, figures: &Figures) -> Vec<Check> {
    let mut checks = vec![
        Check {
            check: "strikes".to_owned(),
            required: figures.strikes.to_string(),
            measured: figures.struck.to_string(),
            ok: figures.struck == figures.strikes,
        },
        failed(expect, figures),
    ];
    if expect.identical {
        checks.extend(identical(figures.differences));
    }
    if let Some(limits) = expect.added_stall_ms {
        checks.extend(percentiles("added stall", limits, figures.added_stall_ms));
    }
    if let Some(limits) = expect.recovery_ms {
        // One strike that the cluster never recovered from makes every percentile meaningless.
        let recovered = figures.recovery_ms.filter(|_| figures.never_recovered == 0);
        checks.extend(percentiles("recovery", limits, recovered));
    }
    if let Some(max) = expect.throughput_dip_max {
        let dip = figures.tokens_s.map(|(before, after)| (1.0 - after / before).max(0.0));
        checks.push(share("throughput dip", max, dip));
    }
    if let Some(max) = expect.hedged_share_max {
        checks.push(share("hedged rows, undisturbed", max, figures.hedged_share_undisturbed));
    }
    if expect.epochs_forward {
        let back = figures.epochs_back.map(|count| count as u64);
        checks.push(count("epochs gone back", false, 0, back));
    }
    if expect.changes_linearizable {
        let made = figures.changes > 0;
        let out_of_order = made.then_some(figures.changes_out_of_order as u64);
        checks.push(count("changes out of order", false, 0, out_of_order));
    }
    for (way, bytes) in &figures.passed_bytes {
        checks.push(count(&format!("bytes {way}"), false, 0, *bytes));
    }
    if let Some(max) = expect.cut_bytes_max {
        checks.push(count("bytes over cut links", false, max, figures.cut_bytes));
    }
    // Whoever sends what is stale wants to see it refused.
    if let Some(sent) = figures.stale {
        checks.push(count(
            "stale exchanges refused",
            true,
            sent.exchanges,
            Some(sent.exchanges_refused),
        ));
        checks.push(count(
            "stale proposals refused",
            true,
            sent.proposals,
            Some(sent.proposals_refused),
        ));
        checks.push(count("states changed by them", false, 0, Some(sent.states_changed)));
    }
    if let Some(min) = expect.moves_min {
        checks.push(count("replicas moved", true, min, figures.moves));
    }
    checks
}

fn failed(expect: &Expect, figures: &Figures) -> Check {
    let mut measured = format!("{} of {}", figures.failed, figures.requests);
    if figures.failed_with_coordinator > 0 {
        measured += &format!(", and {} with their coordinator", figures.failed_with_coordinator);
    }
    Check {
        check: "failed requests".to_owned(),
        required: format!("<= {}", expect.failed_max),
        measured,
        ok: figures.failed <= expect.failed_max && figures.requests > 0,
    }
}

fn identical(differences: Option<Differences>) -> [Check; 2] {
    let found = differences.unwrap_or_default();
    let tokens = found.tokens_missing + found.tokens_extra;
    let compared = found.compared > 0;
    let check = |check: &str, measured: String, ok| Check {
        check: check.to_owned(),
        required: "0".to_owned(),
        measured: if compared { measured } else { "nothing to compare".to_owned() },
        ok: ok && compared,
    };
    let different = format!("{} of {}", found.different, found.compared);
    let wrong = format!("{} missing, {} extra", found.tokens_missing, found.tokens_extra);
    [
        check("outputs that differ", different, found.different == 0),
        check("tokens missing or extra", wrong, tokens == 0),
    ]
}

fn percentiles(name: &str, limits: Limits, measured: Option<Spread>) -> Vec<Check> {
    let check = |percentile: &str, limit: Option<f64>, value: Option<f64>| {
        limit.map(|limit| Check {
            check: format!("{name} {percentile}"),
            required: format!("<= {limit} ms"),
            measured: value.map_or("not measured".to_owned(), |value| format!("{value:.1} ms")),
            ok: value.is_some_and(|value| value <= limit),
        })
    };
    let p50 = check("p50", limits.p50, measured.map(|spread| spread.p50));
    let p99 = check("p99", limits.p99, measured.map(|spread| spread.p99));
    p50.into_iter().chain(p99).collect()
}

fn share(name: &str, max: f64, measured: Option<f64>) -> Check {
    let percent = |share: f64| format!("{:.1} %", share * 100.0);
    Check {
        check: name.to_owned(),
        required: format!("<= {}", percent(max)),
        measured: measured.map_or("not measured".to_owned(), percent),
        ok: measured.is_some_and(|share| share <= max),
    }
}

fn count(name: &str, at_least: bool, bound: u64, measured: Option<u64>) -> Check {
    let holds = |value| if at_least { value >= bound } else { value <= bound };
    Check {
        check: name.to_owned(),
        required: format!("{} {bound}", if at_least { ">=" } else { "<=" }),
        measured: measured.map_or("not measured".to_owned(), |value| value.to_string()),
        ok: measured.is_some_and(holds),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXPECT: &str = "
identical: true
added_stall_ms: {p50: 50, p99: 300}
recovery_ms: {p99: 1500}
throughput_dip_max: 0.1
hedged_share_max: 0.05
epochs_forward: true
changes_linearizable: true
cut_bytes_max: 0
moves_min: 100
";

    /// A run that is just good enough.
    fn good() -> Figures {
        Figures {
            requests: 100,
            strikes: 2,
            struck: 2,
            differences: Some(Differences { compared: 100, ..Differences::default() }),
            added_stall_ms: Some(Spread { p50: 50.0, p99: 300.0, max: 900.0, count: 64 }),
            recovery_ms: Some(Spread { p50: 900.0, p99: 1_500.0, max: 1_500.0, count: 2 }),
            tokens_s: Some((100.0, 90.5)),
            hedged_share_undisturbed: Some(0.05),
            epochs_back: Some(0),
            moves: Some(100),
            changes: 1,
            passed_bytes: passed(Some(0)),
            cut_bytes: Some(0),
            stale: Some(REFUSED),
            ..Figures::default()
        }
    }

    fn passed(bytes: Option<u64>) -> Vec<(String, Option<u64>)> {
        vec![("a -> b".to_owned(), bytes)]
    }

    const REFUSED: Stale = Stale {
        exchanges: 9,
        exchanges_refused: 9,
        proposals: 7,
        proposals_refused: 7,
        states_changed: 0,
    };

    fn misses(figures: &Figures) -> Vec<String> {
        let expect: Expect = serde_saphyr::from_str(EXPECT).unwrap();
        let missed = judge(&expect, figures).into_iter().filter(|check| !check.ok);
        missed.map(|check| check.check).collect()
    }

    #[test]
    fn a_run_that_is_just_good_enough_passes() {
        assert_eq!(misses(&good()), [""; 0]);
    }

    #[test]
    fn every_check_can_miss() {
        let difference = |difference| Figures { differences: Some(difference), ..good() };
        let stale = |sent| Figures { stale: Some(sent), ..good() };
        let compared = Differences { compared: 100, ..Differences::default() };
        let spread = Spread { p50: 51.0, p99: 299.0, max: 299.0, count: 1 };
        let late = Spread { p50: 1.0, p99: 1_501.0, max: 1_501.0, count: 1 };
        for (missed, figures) in [
            ("strikes", Figures { struck: 1, ..good() }),
            ("failed requests", Figures { failed: 1, ..good() }),
            ("failed requests", Figures { requests: 0, ..good() }),
            ("outputs that differ", difference(Differences { different: 1, ..compared })),
            ("tokens missing or extra", difference(Differences { tokens_missing: 1, ..compared })),
            ("tokens missing or extra", difference(Differences { tokens_extra: 1, ..compared })),
            ("added stall p50", Figures { added_stall_ms: Some(spread), ..good() }),
            ("recovery p99", Figures { recovery_ms: Some(late), ..good() }),
            ("recovery p99", Figures { never_recovered: 1, ..good() }),
            ("throughput dip", Figures { tokens_s: Some((100.0, 89.0)), ..good() }),
            (
                "hedged rows, undisturbed",
                Figures { hedged_share_undisturbed: Some(0.051), ..good() },
            ),
            ("epochs gone back", Figures { epochs_back: Some(1), ..good() }),
            ("changes out of order", Figures { changes_out_of_order: 1, ..good() }),
            ("bytes a -> b", Figures { passed_bytes: passed(Some(1)), ..good() }),
            ("bytes a -> b", Figures { passed_bytes: passed(None), ..good() }),
            ("bytes over cut links", Figures { cut_bytes: Some(1), ..good() }),
            ("stale exchanges refused", stale(Stale { exchanges_refused: 8, ..REFUSED })),
            ("stale proposals refused", stale(Stale { proposals_refused: 6, ..REFUSED })),
            ("states changed by them", stale(Stale { states_changed: 1, ..REFUSED })),
            ("replicas moved", Figures { moves: Some(99), ..good() }),
        ] {
            assert_eq!(misses(&figures), [missed]);
        }
    }

    #[test]
    fn what_was_not_measured_is_a_miss() {
        let blind = Figures { requests: 1, ..Figures::default() };
        assert_eq!(misses(&blind).len(), 11, "{:?}", misses(&blind));
    }

    #[test]
    fn requests_on_a_coordinator_that_was_killed_are_told_but_not_held_against_it() {
        let figures = Figures { failed_with_coordinator: 3, ..good() };
        let expect: Expect = serde_saphyr::from_str(EXPECT).unwrap();
        let check = judge(&expect, &figures).swap_remove(1);
        assert!(check.ok && check.measured.contains("3 with their coordinator"), "{check:?}");
    }
}
