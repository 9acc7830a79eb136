//! The packed form of a checkpoint: its weights as the kernels of one format keep them, in one file
//! beside copies of the small files, so that starting is reading.
//!
//! A folder that [`import`] writes is used like the checkpoint that it was made from. Its weights
//! are cut into **parts**: the embedding, the norm and head, each layer of the coordinator, each
//! expert. A part is one range of the file with one checksum. A process reads the ranges that it
//! holds and no other, several at a time, straight into the memory that it multiplies from; to
//! restore a lost replica is to read one range.
//!
//! - `parts`: which parts an architecture has, of which tensors, and how weights become parts;
//! - `table`: where they are in the file, and the rules that a file must keep;
//! - `manifest`: what each part is, for those who did not pack it themselves;
//! - `reader` and `writer`: the file system.
//!
//! Invariants:
//! - nothing of a part is used before its checksum was compared, and nothing of a file before its
//!   table was: a disk that forgets is an error with a name, never another answer;
//! - the bytes do not depend on the instruction set or the threads of the machine that packed;
//! - a folder is complete or absent: it is written under another name and renamed.
//!
//! Why parts are read rather than mapped, and why BLAKE3, is in `docs/decisions/0012`.

mod manifest;
mod parts;
mod reader;
mod table;
mod writer;

pub use manifest::{Arriving, MANIFEST_FILE, Manifest, sha256};
pub(crate) use reader::Packed;
pub use writer::{Imported, import};

use crate::ModelError;
use crate::checkpoint::{Checkpoint, Storage};
use crate::kernels::{Kernels, WeightFormat};
use crate::weights::Progress;

/// The file that makes a folder a packed one.
pub(crate) const WEIGHTS_FILE: &str = "weights.entente";

/// The manifest of a checkpoint in the format of `kernels`. What is packed is read and compared with
/// its checksums, anything else is packed. `progress` counts parts.
///
/// # Errors
/// What is wrong with a file, and a packed form of another format than that of `kernels`.
pub fn manifest(
    checkpoint: &Checkpoint,
    kernels: &dyn Kernels,
    progress: &dyn Progress,
) -> Result<Manifest, ModelError> {
    match checkpoint.storage() {
        Storage::Packed(packed) => {
            packed.require_format(kernels.format())?;
            packed.manifest(checkpoint.dir(), progress)
        }
        Storage::Tensors(_) => writer::manifest(checkpoint, kernels, progress),
    }
}

/// Compares all weights of a checkpoint with its manifest, or with the checksums of an import that
/// has none, and gives the number of parts. `kernels` must be of the format of either. `progress`
/// counts parts.
///
/// # Errors
/// The first part that differs, by name; and a checkpoint with neither, since nothing is known of
/// what it should hold.
pub fn verify(
    checkpoint: &Checkpoint,
    kernels: &dyn Kernels,
    progress: &dyn Progress,
) -> Result<u64, ModelError> {
    let expected = checkpoint.manifest(kernels.format());
    if let (Storage::Tensors(_), None) = (checkpoint.storage(), expected) {
        let reason =
            format!("has neither {WEIGHTS_FILE} nor {MANIFEST_FILE}: nothing is known of it");
        return Err(ModelError::file(checkpoint.dir(), reason));
    }
    let found = manifest(checkpoint, kernels, progress)?;
    match expected {
        Some(expected) => expected.compare(&found),
        None => Ok(found.parts()),
    }
}

/// The format of a folder that serves one only: that of its packed file, or of its manifest.
pub fn format(checkpoint: &Checkpoint) -> Option<WeightFormat> {
    match checkpoint.storage() {
        Storage::Packed(packed) => Some(packed.format()),
        Storage::Tensors(_) => checkpoint.any_manifest().map(|manifest| manifest.format()),
    }
}
