//! Reads the body of a request, field by field, into what it is used as and nothing in between.
//!
//! Invariants: whatever the body says, no allocation is more than a small multiple of its length,
//! so a list that is too long is refused while it is read and what nobody looks at is not kept. An
//! error names the field. JSON may be nested as deep as `serde_json` allows, 128 levels.
//!
//! What it does not know: which fields there are.

use std::fmt;
use std::marker::PhantomData;

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use serde::Deserialize;
use serde::de::{Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::error::Category;

use super::{ApiError, BODY_LEN_MAX};

/// The bytes of a body, which must be those of a JSON object.
pub fn bytes(body: Result<Bytes, BytesRejection>) -> Result<Bytes, ApiError> {
    let body = body.map_err(|rejection| {
        let message = format!("the body could not be read; it may have {BODY_LEN_MAX} bytes");
        ApiError::new(rejection.status(), "invalid_request_error", message, None)
    })?;
    match body.trim_ascii_start().first() {
        Some(b'{') => Ok(body),
        _ => Err(ApiError::invalid("", "the body is not a JSON object")),
    }
}

/// Reads one type out of a body, naming the field that does not fit or is not there.
pub fn read<'de, T: Deserialize<'de>>(body: &'de [u8]) -> Result<T, ApiError> {
    let mut json = serde_json::Deserializer::from_slice(body);
    let mut track = serde_path_to_error::Track::new();
    let read = T::deserialize(serde_path_to_error::Deserializer::new(&mut json, &mut track));
    let not_json = |error| ApiError::invalid("", format!("the body is not JSON: {error}"));
    match read {
        Ok(value) => json.end().map(|()| value).map_err(not_json),
        Err(error) if error.classify() != Category::Data => Err(not_json(error)),
        Err(error) => Err(misfit(&track.path().to_string(), &error.to_string())),
    }
}

/// A field of the wrong kind, or none at all.
fn misfit(path: &str, error: &str) -> ApiError {
    // Where in the text it is helps nobody whose client wrote the text.
    let reason = error.rsplit_once(" at line ").map_or(error, |(reason, _)| reason);
    // A field that is missing has no path of its own; serde names it between backticks.
    let field = match reason.strip_prefix("missing field `") {
        Some(rest) if path == "." => rest.split('`').next(),
        _ => path.split(['.', '[']).next(),
    };
    // What came instead may be a prompt in the wrong field, and is not told again.
    let reason = match reason.rsplit_once(", expected ") {
        Some((_, expected)) => format!("expected {expected}"),
        None => reason.to_owned(),
    };
    let message = if path == "." { reason } else { format!("{path}: {reason}") };
    ApiError::invalid(field.unwrap_or_default(), message)
}

/// A list of so many values at most.
#[derive(Debug)]
pub struct AtMost<T, const MAX: usize>(pub Vec<T>);

impl<'de, T: Deserialize<'de>, const MAX: usize> Deserialize<'de> for AtMost<T, MAX> {
    fn deserialize<D: Deserializer<'de>>(list: D) -> Result<Self, D::Error> {
        list.deserialize_seq(Bounded::<T, MAX>(PhantomData)).map(Self)
    }
}

struct Bounded<T, const MAX: usize>(PhantomData<T>);

impl<'de, T: Deserialize<'de>, const MAX: usize> Visitor<'de> for Bounded<T, MAX> {
    type Value = Vec<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a list of at most {MAX} values")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<Vec<T>, A::Error> {
        extend(Vec::new(), list, MAX)
    }
}

/// Adds the values of a list that has begun to those that are known, which makes `max` at most.
pub fn extend<'de, T: Deserialize<'de>, A: SeqAccess<'de>>(
    mut values: Vec<T>,
    mut list: A,
    max: usize,
) -> Result<Vec<T>, A::Error> {
    while let Some(value) = list.next_element()? {
        if values.len() == max {
            return Err(A::Error::custom(format_args!("more than {max} values")));
        }
        values.push(value);
    }
    Ok(values)
}

/// A list or an object of which only matters whether anything is in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Anything(pub bool);

impl<'de> Deserialize<'de> for Anything {
    fn deserialize<D: Deserializer<'de>>(value: D) -> Result<Self, D::Error> {
        struct Look;
        impl<'de> Visitor<'de> for Look {
            type Value = Anything;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list or an object")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Anything, A::Error> {
                let mut count = 0_usize;
                while list.next_element::<IgnoredAny>()?.is_some() {
                    count += 1;
                }
                Ok(Anything(count > 0))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Anything, A::Error> {
                let mut count = 0_usize;
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {
                    count += 1;
                }
                Ok(Anything(count > 0))
            }
        }
        value.deserialize_any(Look)
    }
}

/// A text, or a list of at most `MAX` values.
#[derive(Debug, Clone)]
pub enum TextOr<T, const MAX: usize> {
    /// Just a text.
    Text(String),
    /// A list.
    List(Vec<T>),
}

impl<'de, T: Deserialize<'de>, const MAX: usize> Deserialize<'de> for TextOr<T, MAX> {
    fn deserialize<D: Deserializer<'de>>(value: D) -> Result<Self, D::Error> {
        struct Look<T, const MAX: usize>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>, const MAX: usize> Visitor<'de> for Look<T, MAX> {
            type Value = TextOr<T, MAX>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a text or a list of at most {MAX} values")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Self::Value, E> {
                Ok(TextOr::Text(text.to_owned()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<Self::Value, A::Error> {
                extend(Vec::new(), list, MAX).map(TextOr::List)
            }
        }
        value.deserialize_any(Look(PhantomData))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Deserialize)]
    struct Example {
        name: String,
        list: Option<AtMost<u32, 2>>,
        either: Option<TextOr<u32, 2>>,
        anything: Option<Anything>,
    }

    fn param(body: &str) -> String {
        let error = read::<Example>(body.as_bytes()).unwrap_err().body();
        let error: serde_json::Value = serde_json::from_str(&error).unwrap();
        error["error"]["param"].as_str().unwrap_or("none").to_owned()
    }

    #[test]
    fn an_error_names_the_field_that_does_not_fit_or_is_not_there() {
        assert_eq!(param(r#"{"name": 7}"#), "name");
        assert_eq!(param(r#"{"list": []}"#), "name");
        assert_eq!(param(r#"{"name": "a", "list": [1, "b"]}"#), "list");
        assert_eq!(param(r#"{"name": "a", "list": [1, 2, 3]}"#), "list");
        assert_eq!(param(r#"{"name": "a", "either": [1, 2, 3]}"#), "either");
        assert_eq!(param(r#"{"name": "a""#), "none");
        assert_eq!(param(r#"{"name": "a"} {}"#), "none");
    }

    #[test]
    fn an_error_does_not_repeat_what_stood_in_the_wrong_field() {
        let error = read::<Example>(br#"{"name": "a", "list": ["my, expected text"]}"#);
        let body = error.unwrap_err().body();
        assert!(body.contains("list[0]: expected u32") && !body.contains("my"), "{body}");
    }

    #[test]
    fn a_body_is_read_to_its_last_field() {
        let read = read::<Example>(br#"{"list": [1, 2], "unknown": [{}], "name": "a"}"#).unwrap();
        assert_eq!((read.name.as_str(), read.list.map(|list| list.0)), ("a", Some(vec![1, 2])));
    }

    #[test]
    fn what_is_only_looked_at_tells_empty_from_full() {
        let read = |text: &str| read::<Example>(text.as_bytes()).unwrap();
        let anything = |text| read(text).anything.map(|anything| anything.0);
        assert_eq!(anything(r#"{"name": "a"}"#), None);
        assert_eq!(anything(r#"{"name": "a", "anything": {}}"#), Some(false));
        assert_eq!(anything(r#"{"name": "a", "anything": [[1], 2]}"#), Some(true));
        assert!(matches!(read(r#"{"name": "a", "either": "b"}"#).either, Some(TextOr::Text(_))));
    }
}
