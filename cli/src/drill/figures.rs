//! What a run shows, from when every piece of every answer arrived. Pure.
//!
//! Times are milliseconds since the first request of their run.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

use crate::stats::{median, quantile};

/// Gaps that are needed to say what is usual.
const USUAL_LEN_MIN: usize = 20;

/// One answer, or what there was of it.
#[derive(Debug, Clone, Default)]
pub struct Answer {
    /// Which of the scenario's requests it answers.
    pub request: usize,
    /// Which server was asked.
    pub server: usize,
    /// When the request was due.
    pub began_ms: f64,
    /// When the answer ended.
    pub ended_ms: f64,
    /// When pieces arrived, and their tokens.
    pub pieces: Vec<(f64, usize)>,
    /// The tokens.
    pub token_ids: Vec<u64>,
    /// The text.
    pub text: String,
    /// Why it is not whole.
    pub error: Option<String>,
}

/// One strike as it happened.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Struck {
    /// Which fault, from 0.
    pub fault: usize,
    /// Which of its strikes, from 0.
    pub number: usize,
    /// What was done.
    pub action: String,
    /// To whom.
    pub targets: Vec<String>,
    /// When.
    pub at_ms: f64,
    /// How long it was to last.
    pub lasts_ms: f64,
    /// How long after that the cluster was ready again; absent when it was not, or nobody looked.
    pub recovery_ms: Option<f64>,
    /// The servers whose streams it can touch; all when it is empty.
    pub servers_near: Vec<usize>,
    /// The servers whose process it ended.
    pub servers_ended: Vec<usize>,
    /// When these processes were back.
    pub back_ms: Option<f64>,
    /// How the stream fared that it held up for longest.
    pub longest_stall: Option<Stall>,
    /// Why it could not be done.
    pub error: Option<String>,
}

impl Struck {
    /// The time in which its effects are looked for.
    fn span(&self, window_ms: f64) -> (f64, f64) {
        (self.at_ms, self.at_ms + self.lasts_ms + window_ms)
    }
}

impl fmt::Display for Struck {
    /// One line: when, what, to whom.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:8.3} s  {}", self.at_ms / 1e3, self.action)?;
        self.targets.iter().try_for_each(|target| write!(f, " {target}"))
    }
}

/// Median, 99th percentile and greatest of some values.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Spread {
    /// The value in the middle.
    pub p50: f64,
    /// The value that 1 in 100 exceeds.
    pub p99: f64,
    /// The greatest.
    pub max: f64,
    /// How many values there are.
    pub count: usize,
}

impl Spread {
    /// Of these values, in their unit; nothing of none.
    pub fn of(values: &[f64]) -> Option<Self> {
        let max = values.iter().copied().reduce(f64::max)?;
        Some(Self { p50: median(values), p99: quantile(values, 0.99), max, count: values.len() })
    }
}

/// Gaps between pieces of one answer, from when to when.
fn gaps(answer: &Answer) -> impl Iterator<Item = (f64, f64)> {
    answer.pieces.windows(2).map(|pair| (pair[0].0, pair[1].0))
}

/// The median gap of what no strike can have disturbed; nothing when there is too little of that.
pub fn usual_gap_ms(answers: &[Answer], strikes: &[Struck], window_ms: f64) -> Option<f64> {
    let spans: Vec<(f64, f64)> = strikes.iter().map(|strike| strike.span(window_ms)).collect();
    let quiet = |gap: &(f64, f64)| spans.iter().all(|span| !overlaps(*gap, *span));
    let quiet = answers.iter().flat_map(gaps).filter(quiet);
    let lengths: Vec<f64> = quiet.map(|(from, to)| to - from).collect();
    (lengths.len() >= USUAL_LEN_MIN).then(|| median(&lengths))
}

fn overlaps(a: (f64, f64), b: (f64, f64)) -> bool {
    a.0 < b.1 && b.0 < a.1
}

/// How one stream fared around one strike.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Stall {
    /// How much longer than usual it waited for a token.
    pub added_ms: f64,
    /// When that wait began, counted from the strike; negative for one that was under way.
    pub began_ms: f64,
}

/// How the streams fared around a strike: of every answer that was under way near it when it
/// struck, the longest gap that touches the strike's span, less the usual gap. An answer without a
/// piece before the strike, or without one after it, has no such gap; one of another region would
/// only make the figure look better.
pub fn stalls(answers: &[Answer], strike: &Struck, window_ms: f64, usual_ms: f64) -> Vec<Stall> {
    let near = &strike.servers_near;
    let stall = |answer: &Answer| {
        let (first, last) = (answer.pieces.first()?.0, answer.pieces.last()?.0);
        let is_near = near.is_empty() || near.contains(&answer.server);
        let under_way = first < strike.at_ms && strike.at_ms < last && is_near;
        let touching = gaps(answer).filter(|gap| overlaps(*gap, strike.span(window_ms)));
        let (from, to) = touching.max_by(|a, b| (a.1 - a.0).total_cmp(&(b.1 - b.0)))?;
        let added_ms = (to - from - usual_ms).max(0.0);
        under_way.then_some(Stall { added_ms, began_ms: from - strike.at_ms })
    };
    answers.iter().filter_map(stall).collect()
}

/// The added stalls of all streams around all strikes.
pub fn added_stalls_ms(
    answers: &[Answer],
    strikes: &[Struck],
    window_ms: f64,
    usual_ms: f64,
) -> Vec<f64> {
    let of = |strike| stalls(answers, strike, window_ms, usual_ms);
    strikes.iter().flat_map(of).map(|stall| stall.added_ms).collect()
}

/// Moments of an undisturbed run to look at as if something had struck there: as many as there
/// were strikes, spread evenly.
pub fn placebos(answers: &[Answer], count: usize) -> Vec<Struck> {
    let end_ms = answers.iter().map(|answer| answer.ended_ms).fold(0.0, f64::max);
    let at = |number: usize| end_ms * (number + 1) as f64 / (count + 1) as f64;
    (0..count).map(|number| Struck { at_ms: at(number), ..Struck::default() }).collect()
}

/// Tokens a second that arrived from one time to another.
pub fn tokens_s(answers: &[Answer], from_ms: f64, to_ms: f64) -> Option<f64> {
    let pieces = answers.iter().flat_map(|answer| &answer.pieces);
    let within = pieces.filter(|(at_ms, _)| (from_ms..to_ms).contains(at_ms));
    let tokens: usize = within.map(|(_, tokens)| tokens).sum();
    (to_ms > from_ms).then(|| tokens as f64 / (to_ms - from_ms) * 1e3)
}

/// Throughput before the first strike, and from then to the end of the last one's span. The first
/// third of what was before is left out, in which all streams begin at once.
pub fn throughput_tokens_s(
    answers: &[Answer],
    strikes: &[Struck],
    window_ms: f64,
) -> Option<(f64, f64)> {
    let first_ms = strikes.iter().map(|strike| strike.at_ms).reduce(f64::min)?;
    let last_ms = strikes.iter().map(|strike| strike.span(window_ms).1).reduce(f64::max)?;
    let before = tokens_s(answers, first_ms / 3.0, first_ms)?;
    let after = tokens_s(answers, first_ms, last_ms)?;
    (before > 0.0).then_some((before, after))
}

/// How answers differ from those of the undisturbed run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Differences {
    /// Answers that were compared.
    pub compared: usize,
    /// Those that are not the same, in text or tokens.
    pub different: usize,
    /// Tokens that are not there, over all answers.
    pub tokens_missing: usize,
    /// Tokens that are there beyond the end.
    pub tokens_extra: usize,
}

/// Compares whole answers with the undisturbed answer to the same request.
pub fn differences(answers: &[Answer], undisturbed: &[Answer]) -> Differences {
    let undisturbed: BTreeMap<usize, &Answer> =
        undisturbed.iter().map(|answer| (answer.request, answer)).collect();
    let mut found = Differences::default();
    for answer in answers.iter().filter(|answer| answer.error.is_none()) {
        let Some(expected) = undisturbed.get(&answer.request) else { continue };
        let same = answer.text == expected.text && answer.token_ids == expected.token_ids;
        let (len, expected_len) = (answer.token_ids.len(), expected.token_ids.len());
        found.compared += 1;
        found.different += usize::from(!same);
        found.tokens_missing += expected_len.saturating_sub(len);
        found.tokens_extra += len.saturating_sub(expected_len);
    }
    found
}

/// Whether an answer ended because a strike had ended the very process that was giving it, which
/// nothing can survive: what was in its memory is gone.
pub fn lost_its_server(answer: &Answer, strikes: &[Struck]) -> bool {
    let took = |strike: &Struck| {
        strike.servers_ended.contains(&answer.server)
            && strike.at_ms <= answer.ended_ms
            && strike.back_ms.is_none_or(|back_ms| answer.began_ms <= back_ms)
    };
    answer.error.is_some() && strikes.iter().any(took)
}

/// The last strike before a time, and how long before.
pub fn strike_before(strikes: &[Struck], ms: f64) -> Option<(&Struck, f64)> {
    let earlier = strikes.iter().filter(|strike| strike.at_ms <= ms);
    let last = earlier.max_by(|a, b| a.at_ms.total_cmp(&b.at_ms))?;
    Some((last, ms - last.at_ms))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An answer with a piece of one token at each time.
    fn answer(times_ms: &[f64]) -> Answer {
        Answer {
            began_ms: times_ms[0] - 5.0,
            ended_ms: times_ms[times_ms.len() - 1],
            pieces: times_ms.iter().map(|at_ms| (*at_ms, 1)).collect(),
            token_ids: (0..times_ms.len() as u64).collect(),
            ..Answer::default()
        }
    }

    fn strike(at_ms: f64, lasts_ms: f64) -> Struck {
        Struck { at_ms, lasts_ms, ..Struck::default() }
    }

    #[test]
    fn the_added_stall_is_the_longest_gap_that_touches_the_span_less_the_usual_one() {
        // Gaps of 10 ms, but for 90 ms from 40 on and 300 ms from 150 on.
        let stalled = answer(&[10.0, 20.0, 30.0, 40.0, 130.0, 140.0, 150.0, 450.0, 460.0]);
        let stall = |strikes: &[Struck], window_ms| {
            added_stalls_ms(std::slice::from_ref(&stalled), strikes, window_ms, 10.0)
        };
        assert_eq!(stall(&[strike(45.0, 0.0)], 20.0), [80.0]);
        // The span ends just when the long gap begins, and just after.
        assert_eq!(stall(&[strike(45.0, 0.0)], 105.0), [80.0]);
        assert_eq!(stall(&[strike(45.0, 0.0)], 106.0), [290.0]);
        assert_eq!(stall(&[strike(45.0, 100.0)], 6.0), [290.0]);
        let longest = stalls(std::slice::from_ref(&stalled), &strike(45.0, 0.0), 106.0, 10.0);
        assert_eq!(longest, [Stall { added_ms: 290.0, began_ms: 105.0 }]);
        // Never less than nothing, and one figure for each strike.
        assert_eq!(stall(&[strike(15.0, 0.0), strike(200.0, 0.0)], 1.0), [0.0, 290.0]);
    }

    #[test]
    fn a_stream_that_was_not_under_way_has_no_stall() {
        let streams = [answer(&[10.0, 20.0]), answer(&[40.0, 90.0])];
        assert_eq!(added_stalls_ms(&streams, &[strike(30.0, 0.0)], 50.0, 5.0), [0.0; 0]);
        assert_eq!(added_stalls_ms(&streams, &[strike(45.0, 0.0)], 50.0, 5.0), [45.0]);
        let near = |server| Struck { servers_near: vec![server], ..strike(45.0, 0.0) };
        assert_eq!(added_stalls_ms(&streams, &[near(1), near(0)], 50.0, 5.0), [45.0]);
    }

    #[test]
    fn the_usual_gap_is_that_of_what_no_strike_touches() {
        let mut times: Vec<f64> = (0..30).map(|n| f64::from(n) * 10.0).collect();
        times.extend((1..60).map(|n| 290.0 + f64::from(n) * 100.0));
        let streams = [answer(&times)];
        let struck = strike(290.0, 6_000.0);
        assert_eq!(usual_gap_ms(&streams, std::slice::from_ref(&struck), 0.0), Some(10.0));
        assert_eq!(usual_gap_ms(&streams, &[], 0.0), Some(100.0));
        assert_eq!(usual_gap_ms(&streams[..0], &[], 0.0), None);
    }

    #[test]
    fn throughput_is_compared_with_what_it_was_before_the_first_strike() {
        // A token every 10 ms for 300 ms, then one every 20 ms.
        let mut times: Vec<f64> = (0..30).map(|n| f64::from(n) * 10.0).collect();
        times.extend((0..50).map(|n| 300.0 + f64::from(n) * 20.0));
        let streams = [answer(&times)];
        let strikes = [strike(300.0, 0.0), strike(600.0, 100.0)];
        assert_eq!(throughput_tokens_s(&streams, &strikes, 300.0), Some((100.0, 50.0)));
        assert_eq!(throughput_tokens_s(&streams, &[], 300.0), None);
        assert_eq!(throughput_tokens_s(&streams, &[strike(0.0, 0.0)], 300.0), None);
    }

    #[test]
    fn every_way_in_which_an_answer_can_differ_is_counted() {
        let right = answer(&[1.0, 2.0, 3.0]);
        let undisturbed = [right.clone(), Answer { request: 1, ..right.clone() }];
        let count = |answer: Answer| differences(&[answer], &undisturbed);
        let compared = Differences { compared: 1, ..Differences::default() };
        let different = Differences { different: 1, ..compared };
        assert_eq!(count(Answer { request: 1, ..right.clone() }), compared);
        assert_eq!(count(Answer { text: "x".into(), ..right.clone() }), different);
        assert_eq!(count(Answer { token_ids: vec![0, 1, 7], ..right.clone() }), different);
        let short = Answer { token_ids: vec![0, 1], ..right.clone() };
        assert_eq!(count(short), Differences { tokens_missing: 1, ..different });
        let long = Answer { token_ids: vec![0, 1, 2, 2], ..right.clone() };
        assert_eq!(count(long), Differences { tokens_extra: 1, ..different });
        // A failure is counted as one, not as a difference.
        let failed = Answer { error: Some("gone".into()), token_ids: vec![], ..right };
        assert_eq!(count(failed), Differences::default());
    }

    #[test]
    fn only_what_ran_on_an_ended_server_is_lost_with_it() {
        let failed = |server, began_ms, ended_ms| Answer {
            server,
            began_ms,
            ended_ms,
            error: Some("broken".into()),
            ..Answer::default()
        };
        let strikes =
            [Struck { servers_ended: vec![1], back_ms: Some(900.0), ..strike(500.0, 0.0) }];
        assert!(lost_its_server(&failed(1, 100.0, 500.0), &strikes));
        assert!(lost_its_server(&failed(1, 600.0, 610.0), &strikes));
        assert!(!lost_its_server(&failed(0, 100.0, 500.0), &strikes));
        assert!(!lost_its_server(&failed(1, 100.0, 499.0), &strikes));
        assert!(!lost_its_server(&failed(1, 901.0, 950.0), &strikes));
        assert_eq!(strike_before(&strikes, 499.0).map(|(_, ms)| ms), None);
        assert_eq!(strike_before(&strikes, 620.0).map(|(_, ms)| ms), Some(120.0));
    }
}
