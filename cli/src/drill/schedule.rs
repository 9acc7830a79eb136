//! When which fault strikes. Pure: told the time and the tokens that were seen, it says who is due.
//!
//! Invariant: a fault strikes again only after the strike before is over, and never before its
//! time; different faults do not wait for each other.

use super::scenario::Moment;

/// How far a run is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Now {
    /// Since the first request was sent.
    pub ms: u64,
    /// Tokens that have arrived, over all requests.
    pub tokens: u64,
}

/// When a fault strikes, and how often.
#[derive(Debug, Clone, Copy)]
pub struct Timing {
    /// The first time.
    pub at: Moment,
    /// From one strike to the next; of no account for a single one.
    pub every: Option<Moment>,
    /// Strikes in all.
    pub strikes: usize,
}

/// One strike that is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Due {
    /// Which fault, from 0.
    pub fault: usize,
    /// Which of its strikes, from 0.
    pub number: usize,
}

#[derive(Debug)]
struct Course {
    timing: Timing,
    next: Moment,
    struck: usize,
    busy: bool,
}

/// All faults of a run.
#[derive(Debug)]
pub struct Schedule(Vec<Course>);

impl Schedule {
    /// Nothing has struck yet.
    pub fn new(timings: impl IntoIterator<Item = Timing>) -> Self {
        let course = |timing: Timing| Course { timing, next: timing.at, struck: 0, busy: false };
        Self(timings.into_iter().map(course).collect())
    }

    /// A strike whose time has come, which is under way from here on.
    pub fn due(&mut self, now: Now) -> Option<Due> {
        let fault = self.0.iter().position(|course| course.waits() && course.has_come(now))?;
        let course = &mut self.0[fault];
        let number = course.struck;
        course.next = course.after(now);
        course.struck += 1;
        course.busy = true;
        Some(Due { fault, number })
    }

    /// The strike of this fault that was under way is over.
    pub fn over(&mut self, fault: usize) {
        self.0[fault].busy = false;
    }

    /// When the next strike is due by the clock, in ms; none when all depends on something else.
    pub fn next_ms(&self) -> Option<u64> {
        let times = self.0.iter().filter(|course| course.waits());
        times.filter_map(|course| course.next.ms()).min()
    }

    /// At how many tokens the next strike is due; none when none waits for tokens.
    pub fn next_tokens(&self) -> Option<u64> {
        let waiting = self.0.iter().filter(|course| course.waits());
        waiting.filter_map(|course| course.next.tokens()).min()
    }
}

impl Course {
    fn waits(&self) -> bool {
        !self.busy && self.struck < self.timing.strikes
    }

    fn has_come(&self, now: Now) -> bool {
        match self.next {
            Moment::After(_) => self.next.ms().is_some_and(|ms| ms <= now.ms),
            Moment::Tokens(tokens) => tokens <= now.tokens,
        }
    }

    /// The time of the strike after one that is due now. Counted from when that one was to be, so
    /// that being late does not add up, unless the two are not counted in the same unit.
    fn after(&self, now: Now) -> Moment {
        match (self.next, self.timing.every.unwrap_or(self.next)) {
            (Moment::After(at), Moment::After(every)) => Moment::After(at.saturating_add(every)),
            (Moment::Tokens(at), Moment::Tokens(every)) => Moment::Tokens(at.saturating_add(every)),
            (Moment::Tokens(_), Moment::After(every)) => {
                Moment::After(std::time::Duration::from_millis(now.ms).saturating_add(every))
            }
            (Moment::After(_), Moment::Tokens(every)) => {
                Moment::Tokens(now.tokens.saturating_add(every))
            }
        }
    }
}

impl Moment {
    fn ms(self) -> Option<u64> {
        match self {
            Self::After(span) => Some(u64::try_from(span.as_millis()).unwrap_or(u64::MAX)),
            Self::Tokens(_) => None,
        }
    }

    fn tokens(self) -> Option<u64> {
        match self {
            Self::After(_) => None,
            Self::Tokens(tokens) => Some(tokens),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(faults: &[(&str, &str, usize)]) -> Schedule {
        Schedule::new(faults.iter().map(|(at, every, strikes)| Timing {
            at: at.parse().unwrap(),
            every: Some(every.parse().unwrap()),
            strikes: *strikes,
        }))
    }

    fn due(schedule: &mut Schedule, ms: u64, tokens: u64) -> Option<(usize, usize)> {
        schedule.due(Now { ms, tokens }).map(|due| (due.fault, due.number))
    }

    #[test]
    fn a_fault_strikes_when_its_time_has_come_and_not_before() {
        let mut faults = schedule(&[("2s", "1s", 1), ("50 tokens", "1s", 1)]);
        assert_eq!((faults.next_ms(), faults.next_tokens()), (Some(2_000), Some(50)));
        assert_eq!(due(&mut faults, 1_999, 49), None);
        assert_eq!(due(&mut faults, 1_999, 50), Some((1, 0)));
        assert_eq!(due(&mut faults, 2_000, 50), Some((0, 0)));
        assert_eq!((due(&mut faults, 9_000, 900), faults.next_ms()), (None, None));
    }

    #[test]
    fn a_strike_waits_until_the_one_before_is_over() {
        let mut faults = schedule(&[("1s", "1s", 3)]);
        assert_eq!(due(&mut faults, 1_000, 0), Some((0, 0)));
        assert_eq!((due(&mut faults, 5_000, 0), faults.next_ms()), (None, None));
        faults.over(0);
        assert_eq!(due(&mut faults, 5_000, 0), Some((0, 1)));
        faults.over(0);
        assert_eq!(due(&mut faults, 5_000, 0), Some((0, 2)));
        faults.over(0);
        assert_eq!(due(&mut faults, 50_000, 0), None);
    }

    #[test]
    fn being_late_does_not_add_up() {
        let mut faults = schedule(&[("1s", "1s", 3)]);
        assert!(due(&mut faults, 1_700, 0).is_some());
        faults.over(0);
        assert_eq!(faults.next_ms(), Some(2_000));
    }

    #[test]
    fn strikes_may_be_counted_in_tokens_and_followed_by_the_clock() {
        let mut faults = schedule(&[("10 tokens", "2s", 2), ("1s", "30 tokens", 2)]);
        assert_eq!(due(&mut faults, 400, 12), Some((0, 0)));
        assert_eq!(due(&mut faults, 1_000, 12), Some((1, 0)));
        faults.over(0);
        faults.over(1);
        assert_eq!((faults.next_ms(), due(&mut faults, 2_399, 41)), (Some(2_400), None));
        assert_eq!(due(&mut faults, 2_399, 42), Some((1, 1)));
        assert_eq!(due(&mut faults, 2_400, 42), Some((0, 1)));
    }
}
