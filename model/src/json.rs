//! Reading the small JSON files of a checkpoint folder, with errors that name file and field.
//!
//! The files come from anywhere, so each is read with a bound on its size and each number is asked
//! for with the range that the caller can live with. A field that is `null` counts as absent, as it
//! does for Hugging Face.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::ModelError;

/// Reads a file that must not be longer than `bytes_max`.
pub(crate) fn read_bounded(file: &Path, bytes_max: u64) -> Result<Vec<u8>, ModelError> {
    let mut bytes = Vec::new();
    let handle = File::open(file).map_err(|e| ModelError::io(file, e))?;
    // Reading one byte more than allowed tells a file that is too long, also one that grows.
    handle
        .take(bytes_max.saturating_add(1))
        .read_to_end(&mut bytes)
        .map_err(|e| ModelError::io(file, e))?;
    if bytes.len() as u64 > bytes_max {
        return Err(ModelError::file(file, format!("longer than {bytes_max} bytes")));
    }
    Ok(bytes)
}

/// As [`read_bounded`], with absence as an answer rather than an error.
pub(crate) fn read_optional(file: &Path, bytes_max: u64) -> Result<Option<Vec<u8>>, ModelError> {
    match read_bounded(file, bytes_max) {
        Err(ModelError::Io { source, .. }) if source.kind() == ErrorKind::NotFound => Ok(None),
        other => other.map(Some),
    }
}

/// A JSON object of a file, or one nested in it.
pub(crate) struct Fields {
    file: PathBuf,
    prefix: String,
    map: Map<String, Value>,
}

impl Fields {
    /// Parses the bytes of `file`, which must hold one object.
    pub fn parse(file: &Path, bytes: &[u8]) -> Result<Self, ModelError> {
        match serde_json::from_slice(bytes) {
            Ok(Value::Object(map)) => {
                Ok(Self { file: file.to_owned(), prefix: String::new(), map })
            }
            Ok(_) => Err(ModelError::file(file, "not a JSON object")),
            Err(error) => Err(ModelError::file(file, format!("not valid JSON: {error}"))),
        }
    }

    /// The file, for errors about more than one field.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// An error about a field of this object.
    pub fn error(&self, name: &str, reason: impl Into<String>) -> ModelError {
        ModelError::field(&self.file, &format!("{}{name}", self.prefix), reason)
    }

    /// The field, unless it is absent or `null`.
    pub fn value(&self, name: &str) -> Option<&Value> {
        self.map.get(name).filter(|value| !value.is_null())
    }

    /// Whether the field is not there at all, not even as `null`.
    pub fn is_absent(&self, name: &str) -> bool {
        !self.map.contains_key(name)
    }

    /// Turns the absence of a field into an error.
    pub fn require<T>(&self, name: &str, value: Option<T>) -> Result<T, ModelError> {
        value.ok_or_else(|| self.error(name, "missing"))
    }

    /// A whole number within `range`.
    pub fn whole(
        &self,
        name: &str,
        range: RangeInclusive<usize>,
    ) -> Result<Option<usize>, ModelError> {
        let Some(value) = self.value(name) else { return Ok(None) };
        let number = value.as_u64().and_then(|number| usize::try_from(number).ok());
        match number.filter(|number| range.contains(number)) {
            Some(number) => Ok(Some(number)),
            None => {
                let expected = format!("a whole number from {} to {}", range.start(), range.end());
                Err(self.unexpected(name, value, &expected))
            }
        }
    }

    /// A finite number within `range`.
    pub fn number(
        &self,
        name: &str,
        range: RangeInclusive<f64>,
    ) -> Result<Option<f64>, ModelError> {
        let Some(value) = self.value(name) else { return Ok(None) };
        match value.as_f64().filter(|number| range.contains(number)) {
            Some(number) => Ok(Some(number)),
            None => {
                let expected = format!("a number from {:e} to {:e}", range.start(), range.end());
                Err(self.unexpected(name, value, &expected))
            }
        }
    }

    /// `true` or `false`.
    pub fn flag(&self, name: &str) -> Result<Option<bool>, ModelError> {
        self.typed(name, "true or false", Value::as_bool)
    }

    /// A string.
    pub fn text(&self, name: &str) -> Result<Option<&str>, ModelError> {
        self.typed(name, "a string", Value::as_str)
    }

    /// A list of whatever.
    pub fn list(&self, name: &str) -> Result<Option<&Vec<Value>>, ModelError> {
        self.typed(name, "a list", Value::as_array)
    }

    /// A nested object.
    pub fn object(&self, name: &str) -> Result<Option<Fields>, ModelError> {
        let map = self.typed(name, "an object", Value::as_object)?;
        Ok(map.map(|map| Self {
            file: self.file.clone(),
            prefix: format!("{}{name}.", self.prefix),
            map: map.clone(),
        }))
    }

    /// Token ids: one, or a list of them; each below `vocab`.
    pub fn token_ids(&self, name: &str, vocab: usize) -> Result<Option<Vec<u32>>, ModelError> {
        let Some(value) = self.value(name) else { return Ok(None) };
        let id = |value: &Value| {
            let id = u32::try_from(value.as_u64()?).ok()?;
            ((id as usize) < vocab).then_some(id)
        };
        let ids = match value {
            Value::Array(values) => values.iter().map(id).collect(),
            single => id(single).map(|id| vec![id]),
        };
        let expected = || format!("a token id below {vocab}, or a list of them");
        ids.map(Some).ok_or_else(|| self.unexpected(name, value, &expected()))
    }

    fn typed<'a, T>(
        &'a self,
        name: &str,
        expected: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, ModelError> {
        let Some(value) = self.value(name) else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| self.unexpected(name, value, expected))
    }

    fn unexpected(&self, name: &str, value: &Value, expected: &str) -> ModelError {
        self.error(name, format!("{}, expected {expected}", excerpt(value)))
    }
}

/// A JSON value for an error message, shortened.
pub(crate) fn excerpt(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}
