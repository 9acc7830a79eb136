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
//! - `reader` and `writer`: the file system.
//!
//! Invariants:
//! - nothing of a part is used before its checksum was compared, and nothing of a file before its
//!   table was: a disk that forgets is an error with a name, never another answer;
//! - the bytes do not depend on the instruction set or the threads of the machine that packed;
//! - a folder is complete or absent: it is written under another name and renamed.
//!
//! Why parts are read rather than mapped, and why BLAKE3, is in `docs/decisions/0012`.

mod parts;
mod reader;
mod table;
mod writer;

pub(crate) use reader::Packed;
pub use writer::{Imported, import};

use crate::ModelError;
use crate::checkpoint::{Checkpoint, Storage};
use crate::weights::Progress;

/// The file that makes a folder a packed one.
pub(crate) const WEIGHTS_FILE: &str = "weights.entente";

/// Compares every part of a packed folder with its checksum, and gives their number. `progress`
/// counts parts.
///
/// # Errors
/// The first part that differs, by name; and a checkpoint that is not packed, since nothing in it
/// has a checksum.
pub fn verify(checkpoint: &Checkpoint, progress: &dyn Progress) -> Result<u64, ModelError> {
    match checkpoint.storage() {
        Storage::Packed(packed) => packed.verify(progress),
        Storage::Tensors(_) => {
            let reason = format!("is not packed (no {WEIGHTS_FILE}): it has no checksums");
            Err(ModelError::file(checkpoint.dir(), reason))
        }
    }
}
