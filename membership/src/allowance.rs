//! How much those whom nobody knows can make a process write down. Pure: time comes in.
//!
//! A bucket: [`STRANGERS_MAX`] at once, and one more each [`EVERY_S`] seconds. So whoever tries a few
//! times leaves a trace of each try, and whoever tries without end fills neither a log nor a disk.
//! What was left out is counted, and told with the next that is not.

use std::time::{Duration, Instant};

/// Refusals of those whom nobody knows that are written down at once.
pub const STRANGERS_MAX: u32 = 1_024;
/// Seconds after which one more is.
pub const EVERY_S: u64 = 10;

/// See the module.
#[derive(Debug, Default)]
pub struct Allowance {
    spent: u32,
    /// Until when intervals have been given back.
    counted: Option<Instant>,
    left_out: u64,
}

impl Allowance {
    /// How many were left out since the last that was not, if this one need not be.
    pub fn take(&mut self, now: Instant) -> Option<u64> {
        let counted = *self.counted.get_or_insert(now);
        let intervals = now.saturating_duration_since(counted).as_secs() / EVERY_S;
        self.counted = Some(counted + Duration::from_secs(intervals * EVERY_S));
        self.spent = self.spent.saturating_sub(u32::try_from(intervals).unwrap_or(u32::MAX));
        if self.spent == STRANGERS_MAX {
            self.left_out += 1;
            return None;
        }
        self.spent += 1;
        Some(std::mem::take(&mut self.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_are_all_let_through_and_a_flood_is_counted() {
        let (mut allowance, start) = (Allowance::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        for _ in 0..STRANGERS_MAX {
            assert_eq!(allowance.take(start), Some(0));
        }
        assert_eq!([9, 9, 9].map(|seconds| allowance.take(at(seconds))), [None; 3]);
        assert_eq!([10, 10, 19].map(|s| allowance.take(at(s))), [Some(3), None, None]);
        assert_eq!(allowance.take(at(25)), Some(2));
        // An hour without anybody is not worth more than a full bucket.
        let hour = at(1_000_000);
        let let_through = (0..2 * STRANGERS_MAX).filter(|_| allowance.take(hour).is_some());
        assert_eq!(let_through.count(), STRANGERS_MAX as usize);
    }
}
