//! Lengths of time as an operator writes them.

use std::str::FromStr;
use std::time::Duration;

/// A length of time: `90d`, `12h`, `30m` or `45s`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lifetime(pub Duration);

impl FromStr for Lifetime {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let units = [('d', 86_400), ('h', 3_600), ('m', 60), ('s', 1)];
        let read = |(unit, seconds): (char, u64)| {
            let count: u64 = text.strip_suffix(unit)?.parse().ok()?;
            Some(Self(Duration::from_secs(count.checked_mul(seconds)?)))
        };
        let found = units.into_iter().find_map(read);
        found.ok_or_else(|| format!("{text:?} is no length of time, such as 90d, 12h, 30m or 45s"))
    }
}

impl Lifetime {
    /// The moment so long after `now_ms`, in ms since 1970.
    pub fn after(self, now_ms: u64) -> u64 {
        now_ms.saturating_add(u64::try_from(self.0.as_millis()).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_and_a_unit_is_a_length_of_time_and_nothing_else_is() {
        let seconds = |text: &str| text.parse().map(|Lifetime(time)| time.as_secs());
        assert_eq!(["2d", "1h", "5m", "0s"].map(seconds), [Ok(172_800), Ok(3_600), Ok(300), Ok(0)]);
        for bad in ["", "d", "1", "-1h", "1.5h", "1w", "18446744073709551615d"] {
            assert!(seconds(bad).is_err(), "{bad:?}");
        }
        assert_eq!(Lifetime(Duration::from_secs(2)).after(500), 2_500);
    }
}
