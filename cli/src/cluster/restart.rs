//! When a child that ended by itself is started again. Pure: it is told how long the child lived.
//!
//! What fails at once is likely to fail again, so each such failure doubles the wait; a child that
//! has done its work for a while, or was ready, has deserved a quick return.

use std::time::Duration;

/// The wait after a child that was well.
const DELAY_MIN: Duration = Duration::from_millis(500);
/// The longest wait.
const DELAY_MAX: Duration = Duration::from_secs(10);
/// A child that lived for so long has not failed at its start.
const LIFE_MIN: Duration = Duration::from_secs(10);

/// How one child has fared.
#[derive(Debug, Default)]
pub struct Backoff {
    /// The wait that followed the last failure at the start, while there are only such failures.
    last: Option<Duration>,
}

impl Backoff {
    /// The child is ready: what was before does not count.
    pub fn ready(&mut self) {
        self.last = None;
    }

    /// The child ended after it had lived for so long, ready or not: how long to wait before it is
    /// started again.
    pub fn ended(&mut self, lived: Duration, was_ready: bool) -> Duration {
        if was_ready || lived >= LIFE_MIN {
            self.last = None;
            return DELAY_MIN;
        }
        let delay = self.last.map_or(DELAY_MIN, |last| (last * 2).min(DELAY_MAX));
        self.last = Some(delay);
        delay
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_at_the_start_are_followed_by_longer_and_longer_waits() {
        let mut backoff = Backoff::default();
        let waits: Vec<u128> =
            (0..7).map(|_| backoff.ended(Duration::from_secs(1), false).as_millis()).collect();
        assert_eq!(waits, [500, 1_000, 2_000, 4_000, 8_000, 10_000, 10_000]);
        assert_eq!(backoff.ended(LIFE_MIN, false), DELAY_MIN);
    }

    #[test]
    fn a_child_that_was_ready_comes_back_soon() {
        let mut backoff = Backoff::default();
        backoff.ended(Duration::ZERO, false);
        backoff.ended(Duration::ZERO, false);
        backoff.ready();
        assert_eq!(backoff.ended(Duration::from_secs(1), true), DELAY_MIN);
        assert_eq!(backoff.ended(Duration::ZERO, false), DELAY_MIN);
    }
}
