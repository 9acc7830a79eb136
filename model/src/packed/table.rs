//! The table of a packed file, checked so that nothing behind it can be out of place.
//!
//! Layout of the file, all numbers little-endian:
//!
//! ```text
//! 0    magic "ENTENTEW"    8  version u32   12  zero u32
//! 16   table offset u64   24  table length u64
//! 32   BLAKE3 of the table         64  BLAKE3 of bytes 0..64         96..4096  zeros
//! 4096 the parts, each at the next multiple of 4096, in the order of the architecture
//! ...  the table (`entente.v1.PackedTable`), at the next multiple of 4096, to the end of the file
//! ```
//!
//! The table comes last because checksums are known last. Parts begin at pages, so that a reader
//! may map them or read past the page cache; there is exactly one place where each may be, which
//! leaves no room for hidden bytes or for two names of one range.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use entente_proto::ids::ModelDigest;
use entente_proto::wire::{self, PackedEncoding};
use prost::Message;

use super::parts::{self, Part};
use crate::ModelError;
use crate::config::Architecture;
use crate::kernels::{Layout, Line, PANELS_VERSION, SourceDtype, WeightFormat};

const MAGIC: [u8; 8] = *b"ENTENTEW";
/// Raised whenever this page or the meaning of the table changes.
const VERSION: u32 = 1;
/// Bytes of the first page that say something.
pub(crate) const FRAME_BYTES: usize = 96;
/// What parts and table begin at multiples of.
pub(crate) const ALIGNMENT: u64 = 4_096;
/// Longest table that is read, in bytes; that of DeepSeek-V3 takes two million.
const TABLE_BYTES_MAX: u64 = 64 << 20;

/// How a tensor is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Encoding {
    /// Row-major.
    Rows(SourceDtype),
    /// For the kernels.
    Panels(Layout),
}

/// Every encoding and its number in files.
const ENCODINGS: [(Encoding, PackedEncoding); 9] = [
    (Encoding::Rows(SourceDtype::F32), PackedEncoding::RowsF32),
    (Encoding::Rows(SourceDtype::F16), PackedEncoding::RowsF16),
    (Encoding::Rows(SourceDtype::Bf16), PackedEncoding::RowsBf16),
    (Encoding::Panels(Layout::F32), PackedEncoding::PanelsF32),
    (Encoding::Panels(Layout::Bf16Widened), PackedEncoding::PanelsBf16Widened),
    (Encoding::Panels(Layout::Bf16), PackedEncoding::PanelsBf16),
    (Encoding::Panels(Layout::Q8), PackedEncoding::PanelsQ8),
    (Encoding::Panels(Layout::Q4), PackedEncoding::PanelsQ4),
    (Encoding::Panels(Layout::Fp8), PackedEncoding::PanelsFp8),
];

impl Encoding {
    /// How norms are stored.
    pub const NORM: Self = Self::Rows(SourceDtype::F32);

    /// Its number in files.
    fn number(self) -> PackedEncoding {
        let entry = ENCODINGS.iter().find(|(encoding, _)| *encoding == self);
        entry.map_or(PackedEncoding::Unspecified, |(_, number)| *number)
    }

    /// Bytes of a tensor; absent if no memory could hold them.
    fn bytes(self, [rows, columns]: [usize; 2]) -> Option<usize> {
        match self {
            Self::Rows(dtype) => rows.checked_mul(columns)?.checked_mul(dtype.size()),
            Self::Panels(layout) => layout.matrix_bytes(rows, columns),
        }
    }
}

/// A tensor of a part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Stored {
    pub encoding: Encoding,
    /// Rows and columns; outputs and inputs of a matrix.
    pub shape: [usize; 2],
    /// Bytes, counted from the start of the part; the start is that of a line.
    pub range: Range<usize>,
}

/// A part of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Where it begins in the file.
    pub offset: u64,
    /// Bytes, whole lines.
    pub len: usize,
    pub checksum: [u8; 32],
    pub tensors: Vec<Stored>,
}

/// What a packed file holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Table {
    pub format: WeightFormat,
    pub model_digest: ModelDigest,
    pub architecture_digest: [u8; 32],
    pub parts: BTreeMap<Part, Entry>,
}

/// The first page of a file whose table is at `offset`.
pub(crate) fn frame(table: &[u8], offset: u64) -> [u8; FRAME_BYTES] {
    let mut frame = [0; FRAME_BYTES];
    frame[..8].copy_from_slice(&MAGIC);
    frame[8..12].copy_from_slice(&VERSION.to_le_bytes());
    frame[16..24].copy_from_slice(&offset.to_le_bytes());
    frame[24..32].copy_from_slice(&(table.len() as u64).to_le_bytes());
    frame[32..64].copy_from_slice(blake3::hash(table).as_bytes());
    let checksum = blake3::hash(&frame[..64]);
    frame[64..].copy_from_slice(checksum.as_bytes());
    frame
}

/// Whether a file that begins like this is one of ours, of whatever version.
pub(crate) fn is_ours(start: &[u8]) -> bool {
    start.starts_with(&MAGIC)
}

/// Where the table of a file of `file_len` bytes is, and its checksum.
pub(crate) fn parse_frame(
    path: &Path,
    frame: &[u8; FRAME_BYTES],
    file_len: u64,
) -> Result<(Range<u64>, [u8; 32]), ModelError> {
    let refuse = |field: &str, reason: String| Err(ModelError::field(path, field, reason));
    let number = |at: usize| u64::from_le_bytes(*frame[at..].first_chunk().expect("inside"));
    if !is_ours(frame) {
        return refuse("magic", "this is no file of packed weights".to_owned());
    }
    // Before the checksum: another version may keep it elsewhere.
    let version = number(8);
    if version != u64::from(VERSION) {
        let reason = format!("is {version}, this program reads {VERSION}; import again");
        return refuse("version", reason);
    }
    if blake3::hash(&frame[..64]).as_bytes() != &frame[64..] {
        return refuse("header", "differs from its checksum; import again".to_owned());
    }
    let (offset, len) = (number(16), number(24));
    if len > TABLE_BYTES_MAX {
        return refuse("table", format!("{len} bytes, at most {TABLE_BYTES_MAX} are allowed"));
    }
    match offset.checked_add(len) {
        Some(end) if end == file_len => {
            let checksum = *frame[32..].first_chunk().expect("inside");
            Ok((offset..end, checksum))
        }
        Some(end) if end > file_len => {
            refuse("table", format!("ends at byte {end} of {file_len}: the file is truncated"))
        }
        _ => refuse("table", format!("{offset} + {len} bytes is not the file's end, {file_len}")),
    }
}

impl Table {
    /// As it is written to the file.
    pub fn encode(&self) -> Vec<u8> {
        let tensor = |tensor: &Stored| wire::PackedTensor {
            encoding: tensor.encoding.number().into(),
            // Sizes of an architecture are far smaller than this type.
            rows: tensor.shape[0] as u32,
            columns: tensor.shape[1] as u32,
        };
        let part = |entry: &Entry| wire::PackedPart {
            offset: entry.offset,
            length_bytes: entry.len as u64,
            checksum: entry.checksum.to_vec().into(),
            tensors: entry.tensors.iter().map(tensor).collect(),
        };
        wire::PackedTable {
            weights: self.format.name().to_owned(),
            panels_version: PANELS_VERSION,
            model_digest: self.model_digest.0.to_vec().into(),
            architecture_digest: self.architecture_digest.to_vec().into(),
            parts: self.parts.values().map(part).collect(),
        }
        .encode_to_vec()
    }

    /// Checks a table that begins at `offset` of its file, against the architecture beside it.
    pub fn parse(
        path: &Path,
        bytes: &[u8],
        offset: u64,
        arch: &Architecture,
        architecture_digest: [u8; 32],
    ) -> Result<Self, ModelError> {
        let refuse = |field: &str, reason: String| ModelError::field(path, field, reason);
        let raw = wire::PackedTable::decode(bytes)
            .map_err(|error| refuse("table", format!("malformed: {error}")))?;
        if raw.panels_version != PANELS_VERSION {
            let reason = format!(
                "is {}, this program reads {PANELS_VERSION}; import again",
                raw.panels_version
            );
            return Err(refuse("panels_version", reason));
        }
        let format = WeightFormat::ALL.into_iter().find(|format| format.name() == raw.weights);
        let format = format.ok_or_else(|| {
            let have: String = raw.weights.chars().take(20).collect();
            refuse("weights", format!("unknown format {have:?}"))
        })?;
        let digest = |field, bytes: &[u8]| {
            <[u8; 32]>::try_from(bytes)
                .map_err(|_| refuse(field, format!("{} bytes, expected 32", bytes.len())))
        };
        if digest("architecture_digest", &raw.architecture_digest)? != architecture_digest {
            let reason = "config.json beside it describes another model; import again";
            return Err(refuse("architecture_digest", reason.to_owned()));
        }
        Ok(Self {
            format,
            model_digest: ModelDigest(digest("model_digest", &raw.model_digest)?),
            architecture_digest,
            parts: parse_parts(path, &raw.parts, offset, arch, format)?,
        })
    }
}

/// Gives each part its name, and checks that each is where it must be.
fn parse_parts(
    path: &Path,
    raw: &[wire::PackedPart],
    table_offset: u64,
    arch: &Architecture,
    format: WeightFormat,
) -> Result<BTreeMap<Part, Entry>, ModelError> {
    let refuse = |field: &str, reason: String| Err(ModelError::field(path, field, reason));
    let wanted = parts::all(arch).count();
    if raw.len() != wanted {
        return refuse("parts", format!("{}, but the model has {wanted}", raw.len()));
    }
    let mut parts = BTreeMap::new();
    let mut place = ALIGNMENT;
    for (part, raw) in parts::all(arch).zip(raw) {
        if raw.offset != place {
            let reason = format!("begins at byte {}, expected {place}", raw.offset);
            return refuse(&format!("{part}: offset"), reason);
        }
        let entry = parse_part(raw, &part.tensors(arch), format).map_err(|(field, reason)| {
            ModelError::field(path, &format!("{part}: {field}"), reason)
        })?;
        let end = raw.offset.checked_add(raw.length_bytes).filter(|end| *end <= table_offset);
        let Some(end) = end else {
            let reason = format!(
                "{} bytes from {} reach beyond the table at {table_offset}",
                raw.length_bytes, raw.offset
            );
            return refuse(&format!("{part}: length_bytes"), reason);
        };
        // The end lies in a file, and those end far below the largest number.
        place = end.next_multiple_of(ALIGNMENT);
        parts.insert(part, entry);
    }
    if place != table_offset {
        return refuse("table", format!("begins at byte {table_offset}, expected {place}"));
    }
    Ok(parts)
}

/// What the names of encodings begin with on the wire.
const ENCODING_PREFIX: &str = "PACKED_ENCODING_";

/// The name of an encoding in a manifest.
pub(crate) fn name_of(encoding: Encoding) -> String {
    let name = encoding.number().as_str_name();
    name.strip_prefix(ENCODING_PREFIX).unwrap_or(name).to_lowercase()
}

/// Checks what a manifest says of a part, by the rules for a part of a file.
pub(super) fn parse_named(
    encodings: &[String],
    length_bytes: u64,
    checksum: [u8; 32],
    wanted: &[(parts::Use, [usize; 2])],
    format: WeightFormat,
) -> Result<Entry, (String, String)> {
    let tensor = |(name, (_, [rows, columns])): (&String, &(parts::Use, [usize; 2]))| {
        let name = format!("{ENCODING_PREFIX}{}", name.to_uppercase());
        let encoding = PackedEncoding::from_str_name(&name).unwrap_or_default();
        // Sizes of an architecture are far smaller than this type.
        let (rows, columns) = (*rows as u32, *columns as u32);
        wire::PackedTensor { encoding: encoding.into(), rows, columns }
    };
    if encodings.len() != wanted.len() {
        let reason = format!("{}, expected {}", encodings.len(), wanted.len());
        return Err(("tensors".to_owned(), reason));
    }
    let raw = wire::PackedPart {
        offset: 0,
        length_bytes,
        checksum: checksum.to_vec().into(),
        tensors: encodings.iter().zip(wanted).map(tensor).collect(),
    };
    parse_part(&raw, wanted, format)
}

/// Checks what a part says of itself; an error is the field and the reason.
fn parse_part(
    raw: &wire::PackedPart,
    wanted: &[(parts::Use, [usize; 2])],
    format: WeightFormat,
) -> Result<Entry, (String, String)> {
    if raw.tensors.len() != wanted.len() {
        let reason = format!("{}, expected {}", raw.tensors.len(), wanted.len());
        return Err(("tensors".to_owned(), reason));
    }
    let mut tensors = Vec::with_capacity(wanted.len());
    let mut len = 0_usize;
    for (number, ((what, shape), raw)) in wanted.iter().zip(&raw.tensors).enumerate() {
        let refuse = |reason: String| (format!("tensor {number}"), reason);
        let have = [raw.rows as usize, raw.columns as usize];
        if have != *shape {
            return Err(refuse(format!("shape {have:?}, expected {shape:?}")));
        }
        let encoding = ENCODINGS
            .iter()
            .find(|(encoding, number)| {
                *number as i32 == raw.encoding && parts::allowed(*what, *encoding, format)
            })
            .map(|(encoding, _)| *encoding)
            .ok_or_else(|| {
                let name = format.name();
                refuse(format!("encoding {} is not one of {what:?} in {name}", raw.encoding))
            })?;
        // What no memory could hold cannot be compared with a length either.
        let end = encoding.bytes(*shape).and_then(|bytes| len.checked_add(bytes));
        let next = end.and_then(|end| end.checked_next_multiple_of(size_of::<Line>()));
        let (Some(end), Some(next)) = (end, next) else {
            return Err(refuse(format!("shape {shape:?} overflows")));
        };
        tensors.push(Stored { encoding, shape: *shape, range: len..end });
        len = next;
    }
    if raw.length_bytes != len as u64 {
        let reason = format!("is {}, but the tensors have {len}", raw.length_bytes);
        return Err(("length_bytes".to_owned(), reason));
    }
    let checksum = <[u8; 32]>::try_from(&raw.checksum[..]).map_err(|_| {
        ("checksum".to_owned(), format!("{} bytes, expected 32", raw.checksum.len()))
    })?;
    Ok(Entry { offset: raw.offset, len, checksum, tensors })
}
