//! Times and moments, as the file writes them.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::Deserialize;
use serde::de::{self, Deserializer, Visitor};

/// A stretch of time, in the file a number of seconds or `300ms`, `2.5s`, `1m`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span(pub Duration);

impl FromStr for Span {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.trim();
        let units = [("ms", 1e-3), ("s", 1.0), ("m", 60.0), ("", 1.0)];
        let (number, unit_s) = units
            .iter()
            .find_map(|(unit, seconds)| Some((text.strip_suffix(unit)?, seconds)))
            .expect("every text ends with nothing");
        let number: Option<f64> = number.trim().parse().ok();
        number
            .and_then(|number| Duration::try_from_secs_f64(number * unit_s).ok())
            .map(Self)
            .ok_or(format!("{text:?} is no time, such as 300ms, 2.5s or 1m"))
    }
}

/// A point of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// So long after the first request was sent.
    After(Duration),
    /// Once so many tokens have arrived, over all requests.
    Tokens(u64),
}

impl FromStr for Moment {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.trim().strip_suffix("tokens") {
            Some(count) => count
                .trim()
                .parse()
                .map(Self::Tokens)
                .map_err(|_| format!("{text:?} is no number of tokens, such as 400 tokens")),
            None => text.parse().map(|Span(span)| Self::After(span)),
        }
    }
}

/// Lets a type be read from a text or a number, by way of its text.
macro_rules! from_text_or_number {
    ($type:ty, $expecting:literal) => {
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                struct Text;
                impl Visitor<'_> for Text {
                    type Value = $type;

                    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                        f.write_str($expecting)
                    }

                    fn visit_str<E: de::Error>(self, text: &str) -> Result<$type, E> {
                        text.parse().map_err(E::custom)
                    }

                    fn visit_u64<E: de::Error>(self, number: u64) -> Result<$type, E> {
                        self.visit_str(&number.to_string())
                    }

                    fn visit_f64<E: de::Error>(self, number: f64) -> Result<$type, E> {
                        self.visit_str(&number.to_string())
                    }
                }
                deserializer.deserialize_any(Text)
            }
        }
    };
}

from_text_or_number!(Span, "a time, such as 300ms, 2.5s or 1m");
from_text_or_number!(Moment, "a time, such as 2.5s, or a number of tokens, such as 400 tokens");
