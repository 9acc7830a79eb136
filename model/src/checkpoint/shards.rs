//! Which files a checkpoint is made of, and which tensor is in which.
//!
//! A folder holds one `model.safetensors`, or `model.safetensors.index.json` that maps each tensor
//! to one of several files. The index is believed in nothing: its files must be plain names within
//! the folder and must hold exactly the tensors that it says.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::{Path, PathBuf};

use super::header::{self, Entry, UniqueMap};
use super::map::MappedFile;
use crate::ModelError;
use crate::json::read_bounded;

const SINGLE_FILE: &str = "model.safetensors";
const INDEX_FILE: &str = "model.safetensors.index.json";
/// Longest index that is read, in bytes; that of DeepSeek-V3 has nine million.
const INDEX_BYTES_MAX: u64 = 100_000_000;
/// Most files of one checkpoint.
const FILES_MAX: usize = 4_096;

/// All files of a checkpoint.
pub(crate) struct Shards {
    /// The index, or the only file: where a tensor that is nowhere should have been.
    pub root: PathBuf,
    pub files: Vec<MappedFile>,
    /// By tensor name: the number of the file, and where in it.
    pub tensors: BTreeMap<String, (usize, Entry)>,
}

impl Shards {
    /// Finds, checks and maps the files of a folder. Files `may_lack`.
    pub fn open(dir: &Path, may_lack: bool) -> Result<Self, ModelError> {
        let single = dir.join(SINGLE_FILE);
        let index = dir.join(INDEX_FILE);
        if single.exists() {
            let mut shards = Self::empty(single);
            let root = shards.root.clone();
            for (name, entry) in shards.map(&root)? {
                shards.tensors.insert(name, (0, entry));
            }
            Ok(shards)
        } else if index.exists() {
            Self::open_indexed(dir, index, may_lack)
        } else if may_lack {
            Ok(Self::empty(dir.to_owned()))
        } else {
            Err(ModelError::file(dir, format!("holds neither {SINGLE_FILE} nor {INDEX_FILE}")))
        }
    }

    fn empty(root: PathBuf) -> Self {
        Self { root, files: Vec::new(), tensors: BTreeMap::new() }
    }

    fn open_indexed(dir: &Path, index: PathBuf, may_lack: bool) -> Result<Self, ModelError> {
        let promised = read_index(&index)?;
        let mut shards = Self::empty(index);
        for (name, tensors) in promised {
            let path = dir.join(&name);
            if may_lack && !path.exists() {
                continue;
            }
            let mut held = shards.map(&path)?;
            let file = shards.files.len() - 1;
            for tensor in tensors {
                let entry = held.remove(&tensor).ok_or_else(|| {
                    ModelError::tensor(
                        &path,
                        &tensor,
                        format!("missing, though {INDEX_FILE} names it"),
                    )
                })?;
                shards.tensors.insert(tensor, (file, entry));
            }
            if let Some(extra) = held.keys().next() {
                let reason = format!("not in {INDEX_FILE}: the files are of different checkpoints");
                return Err(ModelError::tensor(&path, extra, reason));
            }
        }
        Ok(shards)
    }

    /// Checks one file, maps it, and tells what it holds.
    fn map(&mut self, path: &Path) -> Result<BTreeMap<String, Entry>, ModelError> {
        let mut file = File::open(path).map_err(|e| ModelError::io(path, e))?;
        let entries = header::read(path, &mut file)?;
        self.files.push(MappedFile::map(path, &file)?);
        Ok(entries)
    }
}

#[derive(serde::Deserialize)]
struct RawIndex {
    weight_map: UniqueMap<String>,
}

/// By file name: the tensors that the index says are in it.
fn read_index(path: &Path) -> Result<BTreeMap<String, BTreeSet<String>>, ModelError> {
    let bytes = read_bounded(path, INDEX_BYTES_MAX)?;
    let index: RawIndex = serde_json::from_slice(&bytes)
        .map_err(|e| ModelError::file(path, format!("not a safetensors index: {e}")))?;
    let mut files: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for (tensor, file) in index.weight_map.0 {
        if !is_plain_name(&file) {
            let reason = format!("in {file:?}, which is no plain file name of this folder");
            return Err(ModelError::tensor(path, &tensor, reason));
        }
        files.entry(file).or_default().insert(tensor);
    }
    if files.is_empty() || files.len() > FILES_MAX {
        let reason = format!("weight_map: names {} files, expected 1 to {FILES_MAX}", files.len());
        return Err(ModelError::file(path, reason));
    }
    Ok(files)
}

/// A name that cannot lead out of the folder, on any operating system.
fn is_plain_name(name: &str) -> bool {
    let safe = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    !name.is_empty() && name.len() <= 255 && !name.starts_with('.') && name.chars().all(safe)
}
