//! The manifest of a model: `manifest.json`, which says of each part of the weights, as the kernels
//! of one format keep them, what its SHA-256 is.
//!
//! It lies beside a packed file, beside a checkpoint as it was published, or in a folder that has
//! no weights at all. What a process loads is compared with it wherever it came from: read from the
//! packed file, packed from the checkpoint, or sent by a peer. Packing gives the same bytes on every
//! machine, so one manifest serves all of them, and its own SHA-256 is what a cluster agrees on.
//!
//! Invariants:
//! - a manifest has one spelling: a file that is written otherwise is refused, so equal manifests
//!   are equal bytes;
//! - a [`Manifest`] that exists fits the architecture beside it, part by part;
//! - memory for what a peer sends is taken by what the manifest says, not by what the peer says.
//!
//! What it does not know: who made it. Whoever may write the file may name other weights; that all
//! processes of a cluster have the same one is the cluster's affair.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use entente_proto::ids::{ExpertId, LayerId, ModelDigest};
use entente_proto::placement::ExpertKey;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::parts::{self, Part, Piece, Restore};
use super::table::{self, Entry, Stored};
use crate::ModelError;
use crate::checkpoint::digest_of_architecture;
use crate::config::Architecture;
use crate::json::read_optional;
use crate::kernels::{
    Activation, DeviceError, GatedFfn, Line, Lines, PANELS_VERSION, WeightFormat,
};
use crate::weights::CoordinatorWeights;

/// The name of the file.
pub const MANIFEST_FILE: &str = "manifest.json";
/// Raised whenever the meaning of the file changes.
const VERSION: u32 = 1;
/// Longest manifest that is read, in bytes; that of DeepSeek-V3 has four million.
const MANIFEST_BYTES_MAX: u64 = 64 << 20;
/// Bytes that are hashed between two looks at whether to go on.
const PIECE_BYTES: usize = 1 << 20;

/// What the weights of a model are in one format.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    path: PathBuf,
    format: WeightFormat,
    model_digest: ModelDigest,
    architecture_digest: [u8; 32],
    /// BLAKE3 of the table of the packed file: who has that table has the checksums of all parts.
    table_blake3: [u8; 32],
    parts: BTreeMap<Part, Record>,
}

/// A part of the weights.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Record {
    /// Bytes, whole lines.
    pub len: usize,
    pub tensors: Vec<Stored>,
    pub sha256: [u8; 32],
}

/// The file. Fields and parts are in this order.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Text {
    version: u32,
    model_digest: String,
    architecture_digest: String,
    weights: String,
    panels_version: u32,
    table_blake3: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    parts: Vec<TextPart>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct TextPart {
    part: String,
    tensors: Vec<String>,
    bytes: u64,
    sha256: String,
}

impl Manifest {
    /// What was packed: the table of its file, and the SHA-256 of each of its parts.
    pub(super) fn of(dir: &Path, table: &table::Table, sha256: &BTreeMap<Part, [u8; 32]>) -> Self {
        let record = |(part, entry): (&Part, &Entry)| {
            let sha256 = sha256.get(part).copied().expect("every part of the table was hashed");
            (*part, Record { len: entry.len, tensors: entry.tensors.clone(), sha256 })
        };
        Self {
            path: dir.join(MANIFEST_FILE),
            format: table.format,
            model_digest: table.model_digest,
            architecture_digest: table.architecture_digest,
            table_blake3: blake3::hash(&table.encode()).into(),
            parts: table.parts.iter().map(record).collect(),
        }
    }

    /// Reads the manifest of a folder, if it has one.
    pub(crate) fn open(dir: &Path, arch: &Architecture) -> Result<Option<Self>, ModelError> {
        let path = dir.join(MANIFEST_FILE);
        let Some(bytes) = read_optional(&path, MANIFEST_BYTES_MAX)? else { return Ok(None) };
        let manifest = Self::parse(path, &bytes, arch)?;
        if manifest.encode().as_bytes() != bytes {
            let reason = "is written otherwise than `entente model` writes it";
            return Err(ModelError::file(&manifest.path, reason));
        }
        Ok(Some(manifest))
    }

    fn parse(path: PathBuf, bytes: &[u8], arch: &Architecture) -> Result<Self, ModelError> {
        let refuse = |field: &str, reason: String| ModelError::field(&path, field, reason);
        let text: Text = serde_json::from_slice(bytes)
            .map_err(|error| ModelError::file(&path, format!("is no manifest: {error}")))?;
        if (text.version, text.panels_version) != (VERSION, PANELS_VERSION) {
            let (have, panels) = (text.version, text.panels_version);
            let reason = format!(
                "is {have} with panels {panels}, this program reads {VERSION} with {PANELS_VERSION}"
            );
            return Err(refuse("version", reason));
        }
        let format = WeightFormat::ALL.into_iter().find(|format| format.name() == text.weights);
        let format =
            format.ok_or_else(|| refuse("weights", format!("unknown: {:.20}", text.weights)))?;
        let digest = |field: &str, text: &str| {
            from_hex(text).ok_or_else(|| refuse(field, "is not 64 hexadecimal digits".to_owned()))
        };
        let architecture_digest = digest("architecture_digest", &text.architecture_digest)?;
        if architecture_digest != digest_of_architecture(arch) {
            let reason = "config.json beside it describes another model".to_owned();
            return Err(refuse("architecture_digest", reason));
        }
        let (model_digest, table_blake3) = (
            ModelDigest(digest("model_digest", &text.model_digest)?),
            digest("table_blake3", &text.table_blake3)?,
        );
        let parts = parse_parts(&path, &text.parts, arch, format)?;
        Ok(Self { path, format, model_digest, architecture_digest, table_blake3, parts })
    }

    /// As it is written to the file: one line for each part.
    fn encode(&self) -> String {
        let head = Text {
            version: VERSION,
            model_digest: hex(&self.model_digest.0),
            architecture_digest: hex(&self.architecture_digest),
            weights: self.format.name().to_owned(),
            panels_version: PANELS_VERSION,
            table_blake3: hex(&self.table_blake3),
            parts: Vec::new(),
        };
        let json = "strings and whole numbers are always JSON";
        let head = serde_json::to_string(&head).expect(json);
        let part = |(part, record): (&Part, &Record)| {
            let line = TextPart {
                part: part.to_string(),
                tensors: record.tensors.iter().map(|t| table::name_of(t.encoding)).collect(),
                bytes: record.len as u64,
                sha256: hex(&record.sha256),
            };
            serde_json::to_string(&line).expect(json)
        };
        let parts: Vec<String> = self.parts.iter().map(part).collect();
        format!("{},\"parts\":[\n{}\n]}}\n", head.trim_end_matches('}'), parts.join(",\n"))
    }

    /// Writes it into its folder, in the place of an earlier one.
    ///
    /// # Errors
    /// What the file system says.
    pub fn write(&self) -> Result<(), ModelError> {
        self.write_into(self.path.parent().unwrap_or(Path::new(".")))
    }

    /// Writes it into another folder.
    ///
    /// # Errors
    /// What the file system says.
    pub fn write_into(&self, dir: &Path) -> Result<(), ModelError> {
        let path = dir.join(MANIFEST_FILE);
        let failed = |error| ModelError::io(&path, error);
        let mut file = tempfile::Builder::new()
            .prefix(".manifest-")
            .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666))
            .tempfile_in(dir)
            .map_err(failed)?;
        file.write_all(self.encode().as_bytes()).map_err(failed)?;
        file.as_file().sync_all().map_err(failed)?;
        file.persist(&path).map(drop).map_err(|error| failed(error.error))
    }

    /// SHA-256 of the file, which names all weights of the model at once.
    pub fn sha256(&self) -> [u8; 32] {
        Sha256::digest(self.encode()).into()
    }

    /// The format in which the weights are what it says.
    pub fn format(&self) -> WeightFormat {
        self.format
    }

    /// The model that it speaks of.
    pub fn model_digest(&self) -> ModelDigest {
        self.model_digest
    }

    /// SHA-256 of an expert; absent if the model does not have it.
    pub fn expert(&self, (layer, expert): ExpertKey) -> Option<[u8; 32]> {
        self.parts.get(&Part::Expert(layer, expert)).map(|record| record.sha256)
    }

    /// Bytes of memory that an expert's matrices take.
    pub(crate) fn expert_bytes(&self, layer: LayerId, expert: ExpertId) -> u64 {
        let record = self.parts.get(&Part::Expert(layer, expert));
        record.map_or(0, |record| parts::matrix_bytes(&record.tensors))
    }

    /// How many parts there are.
    pub(super) fn parts(&self) -> u64 {
        self.parts.len() as u64
    }

    /// Compares what was found, part by part.
    pub(super) fn compare(&self, found: &Self) -> Result<u64, ModelError> {
        let other = self.parts.iter().find(|(part, record)| found.parts.get(part) != Some(record));
        match other {
            Some((part, _)) => Err(self.differs(*part)),
            None => Ok(self.parts()),
        }
    }

    /// Refuses a packed file with another table: none of its checksums is known here.
    pub(super) fn require_table(&self, table_blake3: [u8; 32]) -> Result<(), ModelError> {
        if self.table_blake3 == table_blake3 {
            return Ok(());
        }
        let reason = "is not that of the packed file beside it; import again";
        Err(ModelError::field(&self.path, "table_blake3", reason))
    }

    /// Refuses a checkpoint of another model.
    pub(crate) fn require_model(&self, digest: ModelDigest) -> Result<(), ModelError> {
        if self.model_digest == digest {
            return Ok(());
        }
        let reason = "the checkpoint beside it is another model";
        Err(ModelError::field(&self.path, "model_digest", reason))
    }

    /// Compares an expert that was loaded.
    pub(crate) fn check(&self, key: ExpertKey, ffn: &GatedFfn) -> Result<(), ModelError> {
        let have = sha256(ffn, |_| ()).map_err(ModelError::Device)?;
        match self.expert(key) {
            Some(want) if want == have => Ok(()),
            _ => Err(self.differs(Part::Expert(key.0, key.1))),
        }
    }

    /// Compares what a coordinator has loaded.
    pub(crate) fn check_coordinator(
        &self,
        arch: &Architecture,
        weights: &CoordinatorWeights,
    ) -> Result<(), ModelError> {
        for part in parts::coordinator(arch) {
            let mut hash = Sha256::new();
            for Piece { bytes, .. } in parts::pieces(weights, part) {
                hash.update(&bytes);
                let filled = bytes.len().next_multiple_of(size_of::<Line>());
                hash.update(&[0; size_of::<Line>()][..filled - bytes.len()]);
            }
            let sha256: [u8; 32] = hash.finalize().into();
            if self.parts.get(&part).is_none_or(|record| record.sha256 != sha256) {
                return Err(self.differs(part));
            }
        }
        Ok(())
    }

    pub(super) fn differs(&self, part: Part) -> ModelError {
        let reason = "the weights are others: their SHA-256 differs";
        ModelError::field(&self.path, &part.to_string(), reason)
    }

    /// Makes room for an expert that somebody sends who need not be believed. Absent if the model
    /// does not have it.
    pub fn receive(
        self: &Arc<Self>,
        activation: Activation,
        (layer, expert): ExpertKey,
    ) -> Option<Arriving> {
        let part = Part::Expert(layer, expert);
        let len = self.parts.get(&part)?.len;
        let lines = Lines::zeroed(len / size_of::<Line>());
        let (manifest, hash) = (self.clone(), Sha256::new());
        Some(Arriving { manifest, part, activation, lines, filled: 0, hash })
    }
}

fn parse_parts(
    path: &Path,
    texts: &[TextPart],
    arch: &Architecture,
    format: WeightFormat,
) -> Result<BTreeMap<Part, Record>, ModelError> {
    let wanted = parts::all(arch).count();
    if texts.len() != wanted {
        let reason = format!("{}, but the model has {wanted}", texts.len());
        return Err(ModelError::field(path, "parts", reason));
    }
    let mut records = BTreeMap::new();
    for (part, text) in parts::all(arch).zip(texts) {
        let refuse = |field: &str, reason: &str| {
            ModelError::field(path, &format!("{part}: {field}"), reason)
        };
        if text.part != part.to_string() {
            return Err(refuse("part", &format!("found {:.40}", text.part)));
        }
        let sha256 = from_hex(&text.sha256).ok_or_else(|| refuse("sha256", "is not 64 digits"))?;
        let entry =
            table::parse_named(&text.tensors, text.bytes, sha256, &part.tensors(arch), format)
                .map_err(|(field, reason)| refuse(&field, &reason))?;
        records.insert(part, Record { len: entry.len, tensors: entry.tensors, sha256 });
    }
    Ok(records)
}

/// SHA-256 of an expert as it lies in memory, of the process or of a device. `between` is called
/// after each piece with the number of its bytes, so that whoever is in no hurry can take a rest.
///
/// # Errors
/// The device is lost.
pub fn sha256(ffn: &GatedFfn, mut between: impl FnMut(usize)) -> Result<[u8; 32], DeviceError> {
    let mut hash = Sha256::new();
    for piece in ffn.pieces(PIECE_BYTES) {
        let piece = piece?;
        hash.update(&piece);
        between(piece.len());
    }
    Ok(hash.finalize().into())
}

/// An expert on its way here, not to be used before all of it has come and has been compared.
pub struct Arriving {
    manifest: Arc<Manifest>,
    part: Part,
    activation: Activation,
    lines: Lines,
    filled: usize,
    hash: Sha256,
}

impl Arriving {
    /// Takes the next bytes.
    ///
    /// # Errors
    /// There are more than the expert has.
    pub fn push(&mut self, piece: &[u8]) -> Result<(), ModelError> {
        let room = self.lines.as_bytes_mut().get_mut(self.filled..);
        let room = room.and_then(|room| room.get_mut(..piece.len()));
        room.ok_or_else(|| self.manifest.differs(self.part))?.copy_from_slice(piece);
        self.hash.update(piece);
        self.filled += piece.len();
        Ok(())
    }

    /// The expert, once all of it is there, in memory of the process.
    ///
    /// # Errors
    /// It is not the one that the manifest names.
    pub fn finish(self) -> Result<GatedFfn, ModelError> {
        let record = &self.manifest.parts[&self.part];
        let sha256: [u8; 32] = self.hash.finalize().into();
        if self.filled != record.len || sha256 != record.sha256 {
            return Err(self.manifest.differs(self.part));
        }
        Ok(Restore::new(self.lines, &record.tensors).ffn(self.activation))
    }
}

/// Lower-case hexadecimal digits.
fn hex(bytes: &[u8; 32]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn from_hex(text: &str) -> Option<[u8; 32]> {
    let digits: &[u8; 64] = text.as_bytes().try_into().ok()?;
    let digit = |byte: u8| char::from(byte).to_digit(16);
    let mut bytes = [0; 32];
    for (byte, [high, low]) in bytes.iter_mut().zip(digits.as_chunks().0) {
        // Two digits make at most 255.
        *byte = (digit(*high)? * 16 + digit(*low)?) as u8;
    }
    Some(bytes)
}
