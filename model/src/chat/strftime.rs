//! Dates as chat templates write them: the part of C's `strftime` that they use, in UTC and
//! English.

use std::fmt::Write;

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
/// 1970-01-01 was a Thursday.
const WEEKDAYS: [&str; 7] =
    ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
/// Seconds since 1970 at the end of the year 9999.
const SECONDS_MAX: u64 = 253_402_300_799;

/// Formats `now_s`, seconds since 1970-01-01 UTC.
pub(super) fn strftime(format: &str, now_s: u64) -> Result<String, String> {
    let now_s = now_s.min(SECONDS_MAX);
    let (days, second) = (now_s / 86_400, now_s % 86_400);
    let (year, month, day) = civil(days);
    let (month_name, weekday) = (MONTHS[month - 1], WEEKDAYS[(days % 7) as usize]);
    let mut text = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            text.push(c);
            continue;
        }
        let written = match chars.next() {
            Some('Y') => write!(text, "{year:04}"),
            Some('m') => write!(text, "{month:02}"),
            Some('d') => write!(text, "{day:02}"),
            Some('B') => write!(text, "{month_name}"),
            Some('b') => write!(text, "{}", &month_name[..3]),
            Some('A') => write!(text, "{weekday}"),
            Some('a') => write!(text, "{}", &weekday[..3]),
            Some('H') => write!(text, "{:02}", second / 3_600),
            Some('M') => write!(text, "{:02}", second / 60 % 60),
            Some('S') => write!(text, "{:02}", second % 60),
            Some('%') => write!(text, "%"),
            other => {
                return Err(format!("strftime_now: unknown directive %{}", other.unwrap_or(' ')));
            }
        };
        written.map_err(|error| error.to_string())?;
    }
    Ok(text)
}

/// Year, month and day of a day counted from 1970-01-01. Source: H. Hinnant, "chrono-compatible
/// low-level date algorithms", `civil_from_days`, for days that are not negative.
fn civil(days: u64) -> (u64, usize, u64) {
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    // Months are counted from March, so that the leap day comes last.
    let from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    (year_of_era + era * 400 + u64::from(month <= 2), month as usize, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_moments_are_written_as_date_writes_them() {
        let long = "%A %d %B %Y %H:%M:%S (%a %b %m) 100%%";
        let moments = [
            (0, "Thursday 01 January 1970 00:00:00 (Thu Jan 01) 100%"),
            (951_782_400, "Tuesday 29 February 2000 00:00:00 (Tue Feb 02) 100%"),
            (1_709_251_199, "Thursday 29 February 2024 23:59:59 (Thu Feb 02) 100%"),
            (4_107_542_400, "Monday 01 March 2100 00:00:00 (Mon Mar 03) 100%"),
        ];
        for (now_s, text) in moments {
            assert_eq!(strftime(long, now_s).unwrap(), text);
        }
        assert!(strftime("%Q", 0).unwrap_err().contains("%Q"));
        assert!(strftime("%", 0).is_err());
        assert!(strftime("%Y", u64::MAX).unwrap().starts_with("9999"));
    }
}
