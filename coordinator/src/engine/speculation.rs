//! Guesses what a sequence says next, and decides how many guesses are worth computing.
//!
//! Text repeats itself: a quoted passage, a name, a loop. Prompt lookup (Saxena 2023) takes what
//! followed the longest earlier occurrence of a sequence's last tokens as a *draft*. The draft's
//! rows are computed beside the sequence's own row, and verification draws a token from each as if
//! it had been reached one by one: as long as draw and draft agree, the next row was right too.
//!
//! Which drafts are tried can never show in an answer, so the decision may rest on estimates:
//!
//! - **Hits.** Every drawn token is compared with what the lookup said, drafted or not. So the hit
//!   rate of a sequence is known without having paid for a row, and follows it into a loop and out
//!   again.
//! - **Cost.** The time of a step is a line over its rows, fitted to recent steps that only decoded.
//!   One row more costs almost a step's share when it brings experts of its own from memory, little
//!   when the experts are there already, and its full share when the multipliers are the limit.
//!
//! Draft rows are taken, the likeliest first, as far as tokens a second are expected to grow. A full
//! step, whose time grows in proportion to its rows, therefore gets none without a rule of its own.
//!
//! Pure: tokens, hits and times in, draft lengths out. What it does not know: blocks, logits,
//! sampling, clocks.

/// Tokens that an earlier occurrence must share with the end; one alone says next to nothing.
const MATCH_LEN_MIN: usize = 2;
/// Longer occurrences are not told apart; the latest of them counts.
const MATCH_LEN_MAX: usize = 8;
/// Tokens that are searched: some microseconds for each sequence and step.
const LOOKBACK_MAX: usize = 16_384;
/// Weight of one more observation in a sequence's hit rate: a loop is recognised in a few tokens.
const SEQUENCE_WEIGHT: f64 = 1.0 / 8.0;
/// The same over all sequences, which is where new ones begin.
const PRIOR_WEIGHT: f64 = 1.0 / 256.0;
/// Gains below this are not told from noise.
const GAIN_MIN: f64 = 1.05;

/// What followed the latest of the longest earlier occurrences of the last tokens: `len_max` tokens,
/// or none without such an occurrence.
pub fn lookup(tokens: &[u32], len_max: usize) -> Vec<u32> {
    let tokens = &tokens[tokens.len().saturating_sub(LOOKBACK_MAX)..];
    let Some((last, mut before)) = tokens.split_last() else { return Vec::new() };
    let (mut longest, mut follows) = (MATCH_LEN_MIN - 1, None);
    while longest < MATCH_LEN_MAX
        && let Some(at) = before.iter().rposition(|token| token == last)
    {
        let len = common_end_len(&tokens[..=at], tokens);
        if len > longest {
            (longest, follows) = (len, Some(at + 1));
        }
        before = &before[..at];
    }
    // If less follows than is wanted, then the end overlaps its occurrence: a loop, which goes on.
    follows.map_or(Vec::new(), |at| tokens[at..].iter().copied().cycle().take(len_max).collect())
}

fn common_end_len(a: &[u32], b: &[u32]) -> usize {
    let pairs = a.iter().rev().zip(b.iter().rev());
    pairs.take(MATCH_LEN_MAX).take_while(|(a, b)| a == b).count()
}

/// How often the lookup was right lately, in [0, 1].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HitRate(pub f64);

impl HitRate {
    fn observe(&mut self, hit: bool, weight: f64) {
        self.0 += (f64::from(hit) - self.0) * weight;
    }
}

/// A draft that could be computed.
#[derive(Debug, Clone, Copy)]
pub struct Candidate {
    /// How sure each of its tokens is, given that those before it were right.
    pub hit_rate: HitRate,
    /// Its length.
    pub len: usize,
}

/// Decides for one engine. See the module.
#[derive(Debug)]
pub struct Speculator {
    draft_tokens_max: usize,
    prior: HitRate,
    cost: StepCost,
}

impl Speculator {
    /// Drafts of up to `draft_tokens_max` tokens; 0 turns speculation off.
    pub fn new(draft_tokens_max: usize) -> Self {
        Self { draft_tokens_max, prior: HitRate(0.5), cost: StepCost::default() }
    }

    /// Longest draft of one sequence.
    pub fn draft_tokens_max(&self) -> usize {
        self.draft_tokens_max
    }

    /// What to expect of a sequence that nothing is known of.
    pub fn prior(&self) -> HitRate {
        self.prior
    }

    /// Learns whether the lookup was right about a token of the sequence with this hit rate.
    pub fn observe_token(&mut self, hit_rate: &mut HitRate, hit: bool) {
        hit_rate.observe(hit, SEQUENCE_WEIGHT);
        self.prior.observe(hit, PRIOR_WEIGHT);
    }

    /// Learns how long a step took in which every sequence decoded.
    pub fn observe_step(&mut self, rows: usize, seconds: f64) {
        self.cost.observe(rows as f64, seconds);
    }

    /// How many tokens of each candidate to compute in a step that has `rows` rows without them,
    /// one for each decoding sequence, and room for `rows_free` more.
    pub fn choose(&self, candidates: &[Candidate], rows: usize, rows_free: usize) -> Vec<usize> {
        let mut lens = vec![0; candidates.len()];
        let mut drafts = Vec::new();
        for depth in 1..=self.draft_tokens_max {
            let deep = candidates.iter().enumerate().filter(|(_, c)| c.len >= depth);
            // A token counts if all before it were right too.
            drafts.extend(deep.map(|(at, c)| (c.hit_rate.0.powi(depth as i32), at)));
        }
        // Stable, so that of equals the one nearer to its sequence's end comes first.
        drafts.sort_by(|a, b| b.0.total_cmp(&a.0));
        let mut tokens = rows as f64;
        let (mut best, mut count) = (GAIN_MIN * tokens / self.cost.seconds(rows as f64), 0);
        for (at, (probability, _)) in drafts.iter().enumerate().take(rows_free) {
            tokens += probability;
            let speed = tokens / self.cost.seconds((rows + at + 1) as f64);
            if speed > best {
                (best, count) = (speed, at + 1);
            }
        }
        drafts[..count].iter().for_each(|(_, at)| lens[*at] += 1);
        lens
    }
}

/// The time of a step as a line over its rows: a least squares fit in which older steps count ever
/// less. While all steps have as many rows, the slope is a prior one, low enough to try drafts that
/// are likely to be right and so to find out.
#[derive(Debug, Default)]
struct StepCost {
    rows: f64,
    seconds: f64,
    variance: f64,
    covariance: f64,
}

/// Weight of one more step.
const STEP_WEIGHT: f64 = 1.0 / 64.0;
/// The prior: a step takes as long as if it had so many rows more.
const ROWS_AT_NO_COST: f64 = 8.0;
/// How many squared rows of variance the prior slope is worth.
const PRIOR_VARIANCE: f64 = 0.05;
/// A step that took so many times what was expected was held up by something else.
const HELD_UP: f64 = 3.0;

impl StepCost {
    fn observe(&mut self, rows: f64, seconds: f64) {
        if self.rows == 0.0 {
            (self.rows, self.seconds) = (rows, seconds);
            return;
        }
        let seconds = seconds.min(HELD_UP * self.seconds(rows));
        let (rows_off, seconds_off) = (rows - self.rows, seconds - self.seconds);
        self.rows += STEP_WEIGHT * rows_off;
        self.seconds += STEP_WEIGHT * seconds_off;
        let kept = 1.0 - STEP_WEIGHT;
        self.variance = kept * (self.variance + STEP_WEIGHT * rows_off * rows_off);
        self.covariance = kept * (self.covariance + STEP_WEIGHT * rows_off * seconds_off);
    }

    /// Relative only until the first step was observed.
    fn seconds(&self, rows: f64) -> f64 {
        if self.rows == 0.0 {
            return rows + ROWS_AT_NO_COST;
        }
        let prior = self.seconds / (self.rows + ROWS_AT_NO_COST);
        let fitted = (self.covariance + PRIOR_VARIANCE * prior) / (self.variance + PRIOR_VARIANCE);
        // Rows are never free, and a step of more rows is never dearer than steps of one row each.
        let slope = fitted.clamp(prior / 4.0, self.seconds / self.rows);
        self.seconds + slope * (rows - self.rows)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(hit_rate: f64) -> Candidate {
        Candidate { hit_rate: HitRate(hit_rate), len: 16 }
    }

    /// A speculator that has seen steps of all row counts up to 33 take what `seconds` says.
    fn trained(seconds: impl Fn(f64) -> f64) -> Speculator {
        let mut speculator = Speculator::new(16);
        for step in 0..1_000 {
            let rows = 1 + step * 7 % 33;
            speculator.observe_step(rows, seconds(rows as f64));
        }
        speculator
    }

    #[test]
    fn the_longest_match_wins_and_the_latest_of_equals() {
        assert_eq!(lookup(&[1, 2, 3, 50, 9, 2, 3, 60, 1, 2, 3], 2), [50, 9]);
        assert_eq!(lookup(&[2, 3, 50, 2, 3, 60, 2, 3], 1), [60]);
    }

    #[test]
    fn a_match_of_one_token_or_of_none_gives_no_draft() {
        assert!(lookup(&[5, 3, 50, 6, 3], 4).is_empty());
        assert!(lookup(&[1], 4).is_empty());
        assert!(lookup(&[], 4).is_empty());
    }

    #[test]
    fn a_loop_goes_on_for_as_long_as_the_draft() {
        assert_eq!(lookup(&[9, 7, 7, 7], 5), [7; 5]);
        assert_eq!(lookup(&[1, 2, 3, 1, 2, 3, 1], 5), [2, 3, 1, 2, 3]);
    }

    #[test]
    fn what_lies_further_back_than_the_bound_is_not_found() {
        let mut tokens = vec![1, 2, 3];
        tokens.extend(10..10 + LOOKBACK_MAX as u32);
        tokens.extend([1, 2]);
        assert!(lookup(&tokens, 1).is_empty());
        tokens.splice(100..103, [1, 2, 3]);
        assert_eq!(lookup(&tokens, 1), [3]);
    }

    #[test]
    fn a_sure_draft_is_taken_whole_where_rows_are_cheap_and_an_unlikely_one_not_at_all() {
        let speculator = trained(|rows| 10.0 + rows);
        assert_eq!(speculator.choose(&[candidate(1.0)], 1, 100), [16]);
        assert_eq!(speculator.choose(&[candidate(0.05)], 1, 100), [0]);
        let [some] = speculator.choose(&[candidate(0.7)], 1, 100)[..] else { panic!() };
        assert!((1..16).contains(&some), "{some}");
    }

    #[test]
    fn nothing_is_drafted_where_time_is_proportional_to_rows() {
        let speculator = trained(|rows| 0.01 * rows);
        assert_eq!(speculator.choose(&[candidate(0.99); 8], 8, 100), [0; 8]);
    }

    #[test]
    fn the_surer_sequence_gets_more_and_the_room_is_kept() {
        let speculator = trained(|rows| 10.0 + 0.1 * rows);
        let lens = speculator.choose(&[candidate(0.6), candidate(0.95)], 2, 10);
        assert_eq!(lens.iter().sum::<usize>(), 10);
        assert!(lens[0] < lens[1], "{lens:?}");
        assert_eq!(speculator.choose(&[candidate(1.0)], 1, 0), [0]);
    }

    #[test]
    fn a_step_that_was_held_up_does_not_end_speculation() {
        let mut speculator = trained(|rows| 10.0 + rows);
        speculator.observe_step(17, 10_000.0);
        assert!(speculator.choose(&[candidate(1.0)], 1, 100)[0] > 8);
    }

    #[test]
    fn an_untrained_speculator_tries_a_little() {
        let [len] = Speculator::new(16).choose(&[candidate(0.5)], 1, 100)[..] else { panic!() };
        assert!((1..=4).contains(&len), "{len}");
    }

    #[test]
    fn the_hit_rate_follows_a_sequence_into_a_loop_and_out_again() {
        let mut speculator = Speculator::new(16);
        let mut rate = speculator.prior();
        (0..16).for_each(|_| speculator.observe_token(&mut rate, true));
        assert!(rate.0 > 0.9, "{rate:?}");
        (0..16).for_each(|_| speculator.observe_token(&mut rate, false));
        assert!(rate.0 < 0.2, "{rate:?}");
    }
}
