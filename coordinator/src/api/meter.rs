//! How much of its quota a tenant has left. Pure: time comes in as milliseconds of some steady clock.
//!
//! Tokens are a bucket that holds a minute's worth and fills evenly. A request takes what it may need
//! at most, its prompt and all the tokens it may be answered with, and gives back what it did not use.
//! A request that may need more than a full bucket is taken when the bucket is full, and the tenant
//! then waits until its debt is paid: so a long answer is never impossible, and the average holds.
//!
//! Invariants: over any time the tokens used are at most those that flowed in, and one bucket or one
//! request more; as many requests run as were let in and have not left.
//!
//! What it does not know: who the tenant is, HTTP, clocks.

/// What a tenant may have; not limited where absent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// Tokens in a minute.
    pub tokens_per_minute: Option<u64>,
    /// Requests at once.
    pub concurrent_max: Option<u32>,
    /// Answers at once, of which a request may want several: as many as the engine would work on and
    /// queue for one tenant, so that nobody fills the way to it.
    pub answers_max: Option<u32>,
}

/// What a request may need at most.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Need {
    /// Tokens of its prompts and its answers.
    pub tokens: u64,
    /// Answers.
    pub answers: u32,
}

/// Why a request may not begin now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Exceeded {
    /// Too many run already.
    #[error("{concurrent_max} requests of this tenant run already, which is as many as may")]
    Requests {
        /// The bound.
        concurrent_max: u32,
    },
    /// Too many answers are under way.
    #[error("so many answers of this tenant are under way that not more than {answers_max} may be")]
    Answers {
        /// The bound.
        answers_max: u32,
    },
    /// Not enough tokens are left.
    #[error("the tenant's quota of {tokens_per_minute} tokens a minute is used up")]
    Tokens {
        /// The quota.
        tokens_per_minute: u64,
        /// When there will be enough, if nothing else is asked for meanwhile.
        retry_ms: u64,
    },
}

/// What is left, for those who ask.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Left {
    /// The limits.
    pub limits: Limits,
    /// Tokens in the bucket; 0 while there is a debt.
    pub tokens: u64,
    /// Until the bucket is full.
    pub full_in_ms: u64,
    /// Requests that may still begin.
    pub requests: u32,
}

/// Parts of a token: as many as a minute has milliseconds, so that a quota of one token a minute
/// fills by one part each millisecond, and nothing is ever rounded.
const PARTS: i64 = 60_000;

/// How long to wait when no waiting helps: the quota is nothing.
const NEVER_MS: u64 = 60_000;

/// See the module.
#[derive(Debug)]
pub struct Meter {
    limits: Limits,
    /// Parts of tokens in the bucket at `at_ms`; below zero is a debt.
    level: i64,
    at_ms: u64,
    running: u32,
    answers: u32,
}

impl Meter {
    /// Nothing runs, and the bucket is full.
    pub fn new(limits: Limits, now_ms: u64) -> Self {
        Self { limits, level: capacity(limits), at_ms: now_ms, running: 0, answers: 0 }
    }

    /// Goes on with other limits. A bucket keeps what is in it, as far as it holds that much; where
    /// there was no limit before, it is full.
    pub fn set_limits(&mut self, limits: Limits, now_ms: u64) {
        self.fill(now_ms);
        let had_limit = self.limits.tokens_per_minute.is_some();
        self.level = if had_limit { self.level.min(capacity(limits)) } else { capacity(limits) };
        self.limits = limits;
    }

    /// Lets a request in, or changes nothing.
    pub fn enter(&mut self, need: Need, now_ms: u64) -> Result<(), Exceeded> {
        if let Some(concurrent_max) = self.limits.concurrent_max.filter(|max| self.running >= *max)
        {
            return Err(Exceeded::Requests { concurrent_max });
        }
        let answers = self.answers.saturating_add(need.answers);
        if let Some(answers_max) = self.limits.answers_max.filter(|max| answers > *max) {
            return Err(Exceeded::Answers { answers_max });
        }
        if let Some(tokens_per_minute) = self.limits.tokens_per_minute {
            self.fill(now_ms);
            let needed = parts(need.tokens).min(capacity(self.limits));
            if self.level < needed || needed == 0 {
                let retry_ms = self.until(needed, tokens_per_minute);
                return Err(Exceeded::Tokens { tokens_per_minute, retry_ms });
            }
            self.level -= parts(need.tokens);
        }
        self.answers = answers;
        self.running += 1;
        Ok(())
    }

    /// A request that was let in has ended and did not need so many of its tokens; its answers have
    /// ended all.
    pub fn leave(&mut self, unused: Need, now_ms: u64) {
        self.fill(now_ms);
        let level = self.level.saturating_add(parts(unused.tokens));
        self.level = level.min(capacity(self.limits));
        self.answers = self.answers.saturating_sub(unused.answers);
        self.running = self.running.saturating_sub(1);
    }

    /// What is left at `now_ms`.
    pub fn left(&mut self, now_ms: u64) -> Left {
        self.fill(now_ms);
        let full = capacity(self.limits);
        Left {
            limits: self.limits,
            tokens: u64::try_from(self.level / PARTS).unwrap_or(0),
            full_in_ms: self.limits.tokens_per_minute.map_or(0, |quota| self.until(full, quota)),
            requests: self.limits.concurrent_max.map_or(0, |max| max.saturating_sub(self.running)),
        }
    }

    fn fill(&mut self, now_ms: u64) {
        let passed_ms = now_ms.saturating_sub(self.at_ms);
        let flow = self.limits.tokens_per_minute.unwrap_or(0).saturating_mul(passed_ms);
        let flow = i64::try_from(flow).unwrap_or(i64::MAX);
        self.level = self.level.saturating_add(flow).min(capacity(self.limits));
        self.at_ms = self.at_ms.max(now_ms);
    }

    /// Milliseconds until the bucket holds so many parts.
    fn until(&self, level: i64, tokens_per_minute: u64) -> u64 {
        match u64::try_from(level.saturating_sub(self.level)) {
            _ if tokens_per_minute == 0 => NEVER_MS,
            Ok(missing) => missing.div_ceil(tokens_per_minute),
            Err(_) => 0,
        }
    }
}

/// Parts of tokens that a bucket holds.
fn capacity(limits: Limits) -> i64 {
    parts(limits.tokens_per_minute.unwrap_or(0))
}

fn parts(tokens: u64) -> i64 {
    // Half of what an i64 holds is beyond every quota, and leaves room to subtract.
    i64::try_from(tokens).unwrap_or(i64::MAX).saturating_mul(PARTS).min(i64::MAX / 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(tokens_per_minute: u64) -> Limits {
        Limits { tokens_per_minute: Some(tokens_per_minute), ..Limits::default() }
    }

    fn tokens(tokens: u64) -> Need {
        Need { tokens, answers: 1 }
    }

    #[test]
    fn a_bucket_holds_a_minutes_worth_and_fills_evenly() {
        let mut meter = Meter::new(limits(60), 0);
        assert_eq!(meter.enter(tokens(50), 0), Ok(()));
        let refused = meter.enter(tokens(11), 0).unwrap_err();
        assert_eq!(refused, Exceeded::Tokens { tokens_per_minute: 60, retry_ms: 1_000 });
        assert_eq!(
            meter.enter(tokens(11), 999).unwrap_err(),
            Exceeded::Tokens { tokens_per_minute: 60, retry_ms: 1 }
        );
        assert_eq!(meter.enter(tokens(11), 1_000), Ok(()));
        assert_eq!(meter.left(1_500).tokens, 0);
        assert_eq!((meter.left(31_000).tokens, meter.left(31_000).full_in_ms), (30, 30_000));
        assert_eq!(meter.left(10_000_000).tokens, 60, "never more than it holds");
    }

    #[test]
    fn what_was_not_used_is_given_back_and_never_more_than_the_bucket_holds() {
        let mut meter = Meter::new(limits(60), 0);
        meter.enter(tokens(60), 0).unwrap();
        assert!(meter.enter(tokens(1), 0).is_err());
        meter.leave(tokens(45), 0);
        assert_eq!(meter.left(0).tokens, 45);
        meter.enter(tokens(40), 0).unwrap();
        meter.leave(tokens(1_000), 0);
        assert_eq!(meter.left(0).tokens, 60);
    }

    #[test]
    fn more_than_a_full_bucket_is_taken_when_it_is_full_and_paid_off_afterwards() {
        let mut meter = Meter::new(limits(60), 0);
        meter.enter(tokens(10), 0).unwrap();
        let refused = meter.enter(tokens(90), 0).unwrap_err();
        assert_eq!(refused, Exceeded::Tokens { tokens_per_minute: 60, retry_ms: 10_000 });
        meter.enter(tokens(90), 10_000).unwrap();
        assert_eq!(meter.left(10_000).tokens, 0);
        let refused = meter.enter(tokens(1), 10_000).unwrap_err();
        assert_eq!(refused, Exceeded::Tokens { tokens_per_minute: 60, retry_ms: 31_000 });
        meter.enter(tokens(1), 41_000).unwrap();
    }

    #[test]
    fn a_quota_of_nothing_is_nothing_and_no_quota_is_no_bound() {
        let mut meter = Meter::new(limits(0), 0);
        assert!(meter.enter(tokens(1), 0).is_err() && meter.enter(tokens(0), u64::MAX).is_err());
        let mut meter = Meter::new(Limits::default(), 0);
        for _ in 0..1_000 {
            meter.enter(tokens(u64::MAX), 0).unwrap();
        }
    }

    #[test]
    fn so_many_run_at_once_and_a_refused_one_costs_nothing() {
        let limits = Limits { concurrent_max: Some(2), ..limits(60) };
        let mut meter = Meter::new(limits, 0);
        meter.enter(tokens(10), 0).unwrap();
        meter.enter(tokens(10), 0).unwrap();
        assert_eq!(meter.enter(tokens(10), 0), Err(Exceeded::Requests { concurrent_max: 2 }));
        assert_eq!((meter.left(0).tokens, meter.left(0).requests), (40, 0));
        meter.leave(tokens(0), 0);
        assert_eq!(meter.left(0).requests, 1);
        assert!(meter.enter(tokens(50), 0).is_err(), "too many tokens, and it does not run");
        assert_eq!(meter.left(0).requests, 1);
        meter.enter(tokens(10), 0).unwrap();
    }

    #[test]
    fn so_many_answers_are_under_way_at_once_however_they_are_asked_for() {
        let mut meter = Meter::new(Limits { answers_max: Some(5), ..Limits::default() }, 0);
        let answers = |answers| Need { tokens: 1, answers };
        meter.enter(answers(3), 0).unwrap();
        assert_eq!(meter.enter(answers(3), 0), Err(Exceeded::Answers { answers_max: 5 }));
        meter.enter(answers(2), 0).unwrap();
        meter.leave(answers(3), 0);
        meter.enter(answers(3), 0).unwrap();
        assert!(meter.enter(answers(u32::MAX), 0).is_err());
    }

    #[test]
    fn other_limits_hold_at_once_and_make_no_tokens() {
        let mut meter = Meter::new(Limits::default(), 0);
        meter.set_limits(limits(60), 5_000);
        assert_eq!(meter.left(5_000).tokens, 60, "the bucket begins full");
        meter.enter(tokens(60), 5_000).unwrap();
        meter.set_limits(limits(600), 5_000);
        assert_eq!(meter.left(5_000).tokens, 0);
        assert_eq!(meter.left(6_000).tokens, 10);
        meter.set_limits(limits(6), 65_000);
        assert_eq!(meter.left(65_000).tokens, 6);
    }

    #[test]
    fn over_any_time_no_more_is_used_than_flowed_in_and_one_bucket() {
        for seed in 1..=50_u64 {
            let mut draw = seed;
            let mut random = |below: u64| {
                draw = draw.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(seed | 1);
                (draw >> 33) % below
            };
            let quota = 1 + random(1_000);
            let mut meter = Meter::new(limits(quota), 0);
            let (mut now_ms, mut used, mut held) = (0, 0, Vec::new());
            for _ in 0..2_000 {
                now_ms += random(500);
                let wanted = 1 + random(quota);
                if meter.enter(tokens(wanted), now_ms).is_ok() {
                    held.push(wanted);
                }
                if random(2) == 0
                    && let Some(taken) = held.pop()
                {
                    let unused = random(taken + 1);
                    used += taken - unused;
                    meter.leave(tokens(unused), now_ms);
                }
            }
            // What is held still counts as used.
            let taken = used + held.iter().sum::<u64>();
            let most = quota + quota * now_ms / 60_000;
            assert!(taken <= most, "seed {seed}: {taken} of {most}");
            assert!(taken * 3 > most, "seed {seed}: only {taken} of {most}, which tests nothing");
        }
    }
}
