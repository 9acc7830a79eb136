//! A log's folder as everybody but its writer sees it: a static site of c2sp.org/tlog-tiles, and
//! beside it what only this program reads (`open`, `checkpoints`).
//!
//! Nothing here is believed. What is read is checked by whoever asked for it, against a checkpoint.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::files::read;
use crate::merkle::Hash;
use crate::tile::{self, Kind, Tile, Tiles, WIDTH};
use crate::{Error, at};

/// The checkpoint of the log.
pub const CHECKPOINT: &str = "checkpoint";
/// All checkpoints that were signed, each as a JSON string on a line.
pub const CHECKPOINTS: &str = "checkpoints";
/// The latest checkpoint that somebody has cosigned.
pub const COSIGNED: &str = "cosigned";
/// The bundle at the end of the log, which grows.
pub const OPEN: &str = "open";
/// Tiles that are kept in memory.
const CACHE_LEN_MAX: usize = 64;

/// Tiles that were read, by level and number.
type Cache = BTreeMap<(u32, u64), Arc<Vec<Hash>>>;

/// The folder, for a tree of a certain size in it.
pub struct Folder {
    root: PathBuf,
    size: u64,
    cache: RefCell<Cache>,
}

impl Folder {
    /// The first `size` records of the log in `root`.
    pub fn new(root: &Path, size: u64) -> Self {
        Self { root: root.to_owned(), size, cache: RefCell::default() }
    }

    /// The note of the log's latest checkpoint.
    ///
    /// # Errors
    /// There is none, or it cannot be read.
    pub fn note(root: &Path) -> Result<String, Error> {
        let path = root.join(CHECKPOINT);
        let bytes = read(&path, crate::note::NOTE_LEN_MAX as u64)?
            .ok_or_else(|| Error::file(&path, "it is missing: nothing was signed here"))?;
        String::from_utf8(bytes).map_err(|_| Error::file(&path, "it is not text"))
    }

    /// The note of the log's latest checkpoint that somebody has cosigned, if there is one.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn cosigned_note(root: &Path) -> Result<Option<String>, Error> {
        let path = root.join(COSIGNED);
        let bytes = read(&path, crate::note::NOTE_LEN_MAX as u64)?;
        let text = bytes.map(String::from_utf8).transpose();
        text.map_err(|_| Error::file(&path, "it is not text"))
    }

    /// Records that this view has.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// How many things tile `index` of a kind holds in a tree of this size.
    fn width(&self, kind: Kind, index: u64) -> u64 {
        let count = match kind {
            Kind::Hashes(level) => self.size >> (tile::HEIGHT * level),
            Kind::Entries => self.size,
        };
        count.saturating_sub(index * WIDTH).min(WIDTH)
    }

    /// The file of a tile: the partial one, or the full one that has taken its place.
    pub(crate) fn file(&self, kind: Kind, index: u64) -> Result<(PathBuf, Vec<u8>), Error> {
        let width = self.width(kind, index);
        let len_max = match kind {
            Kind::Hashes(_) => WIDTH * 32,
            Kind::Entries => tile::BUNDLE_LEN_MAX,
        };
        for width in [width, WIDTH] {
            let path = self.root.join(Tile { kind, index, width }.path());
            if let Some(bytes) = read(&path, len_max)? {
                return Ok((path, bytes));
            }
        }
        let path = self.root.join(Tile { kind, index, width }.path());
        Err(Error::file(path, "it is missing"))
    }

    /// The records of bundle `index`, as far as this view goes.
    ///
    /// # Errors
    /// The file is missing or has fewer records; the text names the first one that is not there.
    pub fn bundle(&self, index: u64) -> Result<Vec<Vec<u8>>, Error> {
        let width = self.width(Kind::Entries, index) as usize;
        let (path, bytes) = self.file(Kind::Entries, index)?;
        let (records, len) = tile::read_records(&bytes);
        if records.len() < width {
            let first = index * WIDTH + records.len() as u64;
            let reason = format!("it is missing or cut off in {}", path.display());
            return Err(Error::Record { index: first, reason });
        }
        // A partial bundle that became full has more, which is not of this view.
        let counts = [width, WIDTH as usize];
        if !counts.contains(&records.len()) || len < bytes.len() {
            let first = index * WIDTH + records.len() as u64;
            let reason = format!("there is more than a bundle in {}", path.display());
            return Err(Error::Record { index: first, reason });
        }
        Ok(records.into_iter().take(width).map(<[u8]>::to_vec).collect())
    }

    /// All records of this view, one bundle after the other, each with its number.
    pub fn records(&self) -> impl Iterator<Item = Result<(u64, Vec<u8>), Error>> + '_ {
        (0..self.size.div_ceil(WIDTH)).flat_map(|index| match self.bundle(index) {
            Ok(records) => {
                let numbered = records.into_iter().enumerate();
                let first = index * WIDTH;
                numbered.map(|(at, record)| Ok((first + at as u64, record))).collect::<Vec<_>>()
            }
            Err(error) => vec![Err(error)],
        })
    }

    /// Records that were written after those of this view, and are under no checkpoint yet.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn unsigned(&self) -> Result<Vec<Vec<u8>>, Error> {
        let mut index = self.size / WIDTH;
        let mut records = Vec::new();
        let path = |index| self.root.join(Tile::full(Kind::Entries, index).path());
        while let Some(bytes) = read(&path(index), tile::BUNDLE_LEN_MAX)? {
            records.extend(tile::read_records(&bytes).0.into_iter().map(<[u8]>::to_vec));
            index += 1;
        }
        if let Some(bytes) = read(&self.root.join(OPEN), tile::BUNDLE_LEN_MAX)? {
            records.extend(tile::read_records(&bytes).0.into_iter().map(<[u8]>::to_vec));
        }
        let signed = (self.size % WIDTH) as usize;
        Ok(records.split_off(signed.min(records.len())))
    }

    /// The bytes of a file of [`Self::tile_files`].
    pub(crate) fn raw(&self, name: &str) -> Result<Vec<u8>, Error> {
        Ok(read(&self.root.join(name), tile::BUNDLE_LEN_MAX)?.unwrap_or_default())
    }

    /// The paths of all files below `tile/`, relative to the folder, sorted.
    pub(crate) fn tile_files(&self) -> Result<Vec<String>, Error> {
        let (mut files, mut folders) = (Vec::new(), vec![self.root.join("tile")]);
        while let Some(folder) = folders.pop() {
            if !folder.exists() {
                continue;
            }
            for entry in at(&folder, fs::read_dir(&folder))? {
                let entry = at(&folder, entry)?;
                if at(&folder, entry.file_type())?.is_dir() {
                    folders.push(entry.path());
                } else {
                    let path = entry.path();
                    let name = path.strip_prefix(&self.root).unwrap_or(&path);
                    files.push(name.to_string_lossy().into_owned());
                }
            }
        }
        files.sort();
        Ok(files)
    }
}

impl Tiles for Folder {
    fn hashes(&self, level: u32, index: u64) -> Result<Arc<Vec<Hash>>, Error> {
        if let Some(hashes) = self.cache.borrow().get(&(level, index)) {
            return Ok(hashes.clone());
        }
        let (path, bytes) = self.file(Kind::Hashes(level), index)?;
        let hashes = tile::read_hashes(&bytes);
        let hashes = hashes.ok_or_else(|| Error::file(path, "it does not hold whole hashes"))?;
        let hashes = Arc::new(hashes);
        let mut cache = self.cache.borrow_mut();
        if cache.len() >= CACHE_LEN_MAX {
            cache.clear();
        }
        cache.insert((level, index), hashes.clone());
        Ok(hashes)
    }
}
