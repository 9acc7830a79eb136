//! Writes the packed form of a checkpoint.
//!
//! Invariants: a folder appears complete, under its own name, after everything in it has reached
//! the disk; what is replaced is a packed folder or an empty one; memory holds the coordinator's
//! weights, then one expert at a time.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::{self, File, Permissions};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

use super::WEIGHTS_FILE;
use super::manifest::Manifest;
use super::parts::{self, Part, Piece};
use super::table::{self, Entry, Stored, Table};
use crate::ModelError;
use crate::checkpoint::{Checkpoint, Storage, digest_of_architecture};
use crate::kernels::{Kernels, Line};
use crate::weights::{CoordinatorWeights, Progress, load_expert};
use sha2::{Digest, Sha256};

/// The small files of a checkpoint that are read by a coordinator; those that exist are copied.
const DOCUMENTS: [&str; 5] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
];

/// What [`import`] wrote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Imported {
    /// Bytes of the packed weights.
    pub weights_bytes: u64,
    /// Ranges that can be read by themselves.
    pub parts: u64,
    /// What they are, as it was written beside them.
    pub manifest: Manifest,
}

/// Packs `checkpoint` as `kernels` keep weights, into the folder `out`, which can then be used in
/// its place. `progress` counts parts.
///
/// # Errors
/// When `out` holds anything but an earlier import, when `checkpoint` is packed already, and when a
/// file cannot be read or written; `out` is then as it was.
pub fn import(
    checkpoint: &Checkpoint,
    kernels: &dyn Kernels,
    out: &Path,
    progress: &dyn Progress,
) -> Result<Imported, ModelError> {
    if let Storage::Packed(_) = checkpoint.storage() {
        let reason = "is packed already; import the checkpoint that it was made from";
        return Err(ModelError::file(checkpoint.dir(), reason));
    }
    refuse_foreign(out)?;
    let out = std::path::absolute(out).map_err(|e| ModelError::io(out, e))?;
    let parent = out.parent().ok_or_else(|| ModelError::file(&out, "is no folder to write"))?;
    fs::create_dir_all(parent).map_err(|e| ModelError::io(parent, e))?;
    // Removed when something fails below; others may read it, as any new folder.
    let dir = tempfile::Builder::new()
        .prefix(".importing-")
        .permissions(Permissions::from_mode(0o777))
        .tempdir_in(parent)
        .map_err(|e| ModelError::io(parent, e))?;
    for name in DOCUMENTS {
        copy(&checkpoint.dir().join(name), &dir.path().join(name))?;
    }
    let mut writer = Writer::create(dir.path().join(WEIGHTS_FILE))?;
    writer.parts(checkpoint, kernels, progress)?;
    let imported = writer.finish(checkpoint, kernels, dir.path())?;
    imported.manifest.write()?;
    sync(dir.path())?;
    replace(dir, &out)?;
    sync(parent)?;
    Ok(imported)
}

/// The manifest of a checkpoint as it was published: what [`import`] would write, without writing
/// the weights. `progress` counts parts.
pub(super) fn manifest(
    checkpoint: &Checkpoint,
    kernels: &dyn Kernels,
    progress: &dyn Progress,
) -> Result<Manifest, ModelError> {
    let mut writer = Writer::to_nowhere();
    writer.parts(checkpoint, kernels, progress)?;
    Ok(writer.finish(checkpoint, kernels, checkpoint.dir())?.manifest)
}

/// Refuses to write where there is something that no import wrote.
fn refuse_foreign(out: &Path) -> Result<(), ModelError> {
    let mut entries = match fs::read_dir(out) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries.map_err(|e| ModelError::io(out, e))?,
    };
    let mut start = [0; 8];
    let mut ours = || File::open(out.join(WEIGHTS_FILE))?.read_exact(&mut start);
    if entries.next().is_none() || (ours().is_ok() && table::is_ours(&start)) {
        return Ok(());
    }
    Err(ModelError::file(out, "holds something that no import wrote; it is left as it is"))
}

fn copy(from: &Path, to: &Path) -> Result<(), ModelError> {
    match fs::copy(from, to) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(ModelError::io(from, error)),
        Ok(_) => sync(to),
    }
}

/// Waits until a file or a folder has reached the disk.
fn sync(path: &Path) -> Result<(), ModelError> {
    File::open(path).and_then(|file| file.sync_all()).map_err(|e| ModelError::io(path, e))
}

/// Gives a finished folder its name. An earlier one is moved out of the way first, and removed once
/// the new one is there; processes that read it keep their file.
fn replace(dir: tempfile::TempDir, out: &Path) -> Result<(), ModelError> {
    let failed = |error| ModelError::io(out, error);
    let parent = out.parent().unwrap_or(Path::new("/"));
    let grave = tempfile::Builder::new().prefix(".replaced-").tempdir_in(parent).map_err(failed)?;
    let earlier = grave.path().join("model");
    match fs::rename(out, &earlier) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    if let Err(error) = fs::rename(dir.path(), out) {
        // Nothing to put back if there was nothing, which the error below tells, too.
        let _ = fs::rename(&earlier, out);
        return Err(failed(error));
    }
    // It has another name now; there is nothing to remove.
    let _ = dir.keep();
    Ok(())
}

/// A file that grows part by part.
struct Writer {
    path: PathBuf,
    /// Absent when only the manifest is wanted.
    file: Option<File>,
    /// Where the next part begins.
    offset: u64,
    parts: BTreeMap<Part, Entry>,
    hashes: BTreeMap<Part, [u8; 32]>,
}

impl Writer {
    fn create(path: PathBuf) -> Result<Self, ModelError> {
        let file = File::create_new(&path).map_err(|e| ModelError::io(&path, e))?;
        Ok(Self { path, file: Some(file), ..Self::to_nowhere() })
    }

    fn to_nowhere() -> Self {
        let (parts, hashes) = (BTreeMap::new(), BTreeMap::new());
        Self { path: PathBuf::new(), file: None, offset: table::ALIGNMENT, parts, hashes }
    }

    fn parts(
        &mut self,
        checkpoint: &Checkpoint,
        kernels: &dyn Kernels,
        progress: &dyn Progress,
    ) -> Result<(), ModelError> {
        let arch = checkpoint.architecture();
        let total = parts::all(arch).count() as u64;
        progress.advance(0, total);
        let mut coordinator = Some(CoordinatorWeights::load(checkpoint, kernels, &())?);
        for (done, part) in (1..).zip(parts::all(arch)) {
            match (part, &coordinator) {
                (Part::Expert(layer, expert), _) => {
                    coordinator = None;
                    let ffn = load_expert(checkpoint, kernels, layer, expert)?;
                    self.add(part, &parts::pieces_of_ffn(&ffn))?;
                }
                (_, Some(weights)) => self.add(part, &parts::pieces(weights, part))?,
                (_, None) => unreachable!("experts come last"),
            }
            progress.advance(done, total);
        }
        Ok(())
    }

    fn add(&mut self, part: Part, pieces: &[Piece<'_>]) -> Result<(), ModelError> {
        let (mut hash, mut sha256) = (blake3::Hasher::new(), Sha256::new());
        let (mut tensors, mut len) = (Vec::new(), 0);
        for Piece { encoding, shape, bytes } in pieces {
            let end = len + bytes.len();
            tensors.push(Stored { encoding: *encoding, shape: *shape, range: len..end });
            let filled = bytes.len().next_multiple_of(size_of::<Line>());
            let zeros = [0; size_of::<Line>()];
            for bytes in [bytes, &Cow::Borrowed(&zeros[..filled - bytes.len()])] {
                hash.update(bytes);
                sha256.update(bytes);
                self.write(bytes, self.offset + len as u64)?;
                len += bytes.len();
            }
        }
        let checksum = hash.finalize().into();
        self.hashes.insert(part, sha256.finalize().into());
        self.parts.insert(part, Entry { offset: self.offset, len, checksum, tensors });
        self.offset = (self.offset + len as u64).next_multiple_of(table::ALIGNMENT);
        Ok(())
    }

    fn write(&self, bytes: &[u8], offset: u64) -> Result<(), ModelError> {
        let Some(file) = &self.file else { return Ok(()) };
        file.write_all_at(bytes, offset).map_err(|e| ModelError::io(&self.path, e))
    }

    fn finish(
        self,
        checkpoint: &Checkpoint,
        kernels: &dyn Kernels,
        dir: &Path,
    ) -> Result<Imported, ModelError> {
        let table = Table {
            format: kernels.format(),
            model_digest: checkpoint.digest(),
            architecture_digest: digest_of_architecture(checkpoint.architecture()),
            parts: self.parts.clone(),
        };
        let manifest = Manifest::of(dir, &table, &self.hashes);
        let table = table.encode();
        self.write(&table, self.offset)?;
        self.write(&table::frame(&table, self.offset), 0)?;
        if let Some(file) = &self.file {
            file.sync_all().map_err(|e| ModelError::io(&self.path, e))?;
        }
        let weights_bytes = self.parts.values().map(|entry| entry.len as u64).sum();
        Ok(Imported { weights_bytes, parts: self.parts.len() as u64, manifest })
    }
}
