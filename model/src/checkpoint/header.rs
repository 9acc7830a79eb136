//! The header of a safetensors file, checked so that nothing behind it can be out of place.
//!
//! Layout of the file: eight bytes, the header's length as a little-endian number; the header, a
//! JSON object from tensor name to `{dtype, shape, data_offsets}`; the tensors. The format allows
//! neither overlaps nor gaps, and asking for exactly that leaves no room for hidden bytes or for
//! two names of one range. Source: the format's description in the safetensors repository.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::Path;

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};

use crate::ModelError;

/// Longest header that is read, in bytes: that of the format's own implementation.
pub(crate) const HEADER_BYTES_MAX: u64 = 100_000_000;

/// Where a tensor lies in its file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    /// The element type as the file spells it.
    pub dtype: String,
    /// Outermost first.
    pub shape: Vec<usize>,
    /// Bytes, counted from the start of the file.
    pub range: Range<usize>,
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct RawEntry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (usize, usize),
}

/// Reads and checks the header of an open file.
pub(crate) fn read(path: &Path, file: &mut File) -> Result<BTreeMap<String, Entry>, ModelError> {
    let io = |error| ModelError::io(path, error);
    let file_len = file.metadata().map_err(io)?.len();
    if file_len < 8 {
        return Err(ModelError::file(path, format!("truncated: {file_len} bytes hold no header")));
    }
    let mut prefix = [0; 8];
    file.read_exact(&mut prefix).map_err(io)?;
    let header_len = u64::from_le_bytes(prefix);
    if header_len > HEADER_BYTES_MAX {
        let reason =
            format!("header of {header_len} bytes, at most {HEADER_BYTES_MAX} are allowed");
        return Err(ModelError::file(path, reason));
    }
    if header_len > file_len - 8 {
        let reason = format!("truncated: header of {header_len} bytes in a file of {file_len}");
        return Err(ModelError::file(path, reason));
    }
    let mut bytes = vec![0; header_len as usize];
    file.read_exact(&mut bytes).map_err(io)?;
    let data_len = usize::try_from(file_len - 8 - header_len)
        .map_err(|_| ModelError::file(path, "larger than the address space"))?;
    parse(path, &bytes, data_len)
}

/// Checks a header in front of `data_len` bytes of tensors.
fn parse(
    path: &Path,
    header: &[u8],
    data_len: usize,
) -> Result<BTreeMap<String, Entry>, ModelError> {
    let raw: UniqueMap<serde_json::Value> = serde_json::from_slice(header)
        .map_err(|e| ModelError::file(path, format!("header is not valid JSON: {e}")))?;
    let mut entries = BTreeMap::new();
    for (name, value) in raw.0 {
        if name == "__metadata__" {
            continue;
        }
        let tensor = |reason: String| ModelError::tensor(path, &name, reason);
        let raw: RawEntry = serde_json::from_value(value)
            .map_err(|e| tensor(format!("malformed header entry: {e}")))?;
        let range = check(&raw, data_len).map_err(tensor)?;
        // The header is part of the file, so this sum is at most the file's length.
        let start = 8 + header.len();
        let range = start + range.start..start + range.end;
        entries.insert(name, Entry { dtype: raw.dtype, shape: raw.shape, range });
    }
    check_coverage(path, &entries, 8 + header.len(), data_len)?;
    Ok(entries)
}

/// Whether the offsets lie in the file and hold exactly what shape and element type call for.
fn check(raw: &RawEntry, data_len: usize) -> Result<Range<usize>, String> {
    let (begin, end) = raw.data_offsets;
    if begin > end || end > data_len {
        return Err(format!("offsets {begin}..{end} are outside the file's {data_len} data bytes"));
    }
    let bits = bits(&raw.dtype).ok_or_else(|| format!("unknown dtype {:?}", raw.dtype))?;
    let want = raw
        .shape
        .iter()
        .try_fold(bits, |product, extent| product.checked_mul(*extent))
        .ok_or_else(|| format!("shape {:?} overflows", raw.shape))?;
    if want % 8 != 0 || want / 8 != end - begin {
        let (have, dtype, shape) = (end - begin, &raw.dtype, &raw.shape);
        return Err(format!("{have} bytes, but {dtype} of shape {shape:?} has {}", want / 8));
    }
    Ok(begin..end)
}

/// Whether the tensors, in order of their offsets, cover the data exactly once.
fn check_coverage(
    path: &Path,
    entries: &BTreeMap<String, Entry>,
    start: usize,
    data_len: usize,
) -> Result<(), ModelError> {
    let mut order: Vec<(&String, &Entry)> = entries.iter().collect();
    order.sort_by_key(|(_, entry)| (entry.range.start, entry.range.end));
    let mut covered = start;
    for (name, entry) in order {
        let begin = entry.range.start;
        if begin < covered {
            let reason = format!("overlaps the tensor before it by {} bytes", covered - begin);
            return Err(ModelError::tensor(path, name, reason));
        }
        if begin > covered {
            let reason = format!("a gap of {} bytes before it", begin - covered);
            return Err(ModelError::tensor(path, name, reason));
        }
        covered = entry.range.end;
    }
    let end = start + data_len;
    if covered != end {
        let reason = format!("{} bytes after the last tensor", end - covered);
        return Err(ModelError::file(path, reason));
    }
    Ok(())
}

/// Bits of one element, for every element type of the format. The narrow ones cannot be computed
/// with, but their tensors must still be found to be in place.
fn bits(dtype: &str) -> Option<usize> {
    Some(match dtype {
        "F4" => 4,
        "F6_E2M3" | "F6_E3M2" => 6,
        "BOOL" | "U8" | "I8" | "F8_E5M2" | "F8_E4M3" | "F8_E8M0" | "F8_E4M3FNUZ"
        | "F8_E5M2FNUZ" => 8,
        "I16" | "U16" | "F16" | "BF16" => 16,
        "I32" | "U32" | "F32" => 32,
        "I64" | "U64" | "F64" | "C64" => 64,
        _ => return None,
    })
}

/// A JSON object whose keys may not repeat; parsers otherwise keep one of them silently.
pub(crate) struct UniqueMap<T>(pub BTreeMap<String, T>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for UniqueMap<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Unique<T>(std::marker::PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Unique<T> {
            type Value = UniqueMap<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Self::Value, A::Error> {
                let mut map = BTreeMap::new();
                while let Some((key, value)) = access.next_entry::<String, T>()? {
                    if map.contains_key(&key) {
                        return Err(serde::de::Error::custom(format!("duplicate key {key:?}")));
                    }
                    map.insert(key, value);
                }
                Ok(UniqueMap(map))
            }
        }
        deserializer.deserialize_map(Unique(std::marker::PhantomData))
    }
}
