//! The one writer of a log's folder.
//!
//! Records are appended to the file `open` and synced; that is all that a commit costs. After 256
//! of them the hash tiles that they complete are written and synced, and only then `open` is renamed
//! to be their bundle: where a bundle is, its tiles are. Partial tiles are written when a checkpoint
//! is, and can always be made again.
//!
//! After a loss of power the end of `open` may be torn. What was torn was acknowledged to nobody,
//! and is cut off; what a checkpoint covers is never cut off, and a folder that does not lead to its
//! checkpoint's root is not written to any more.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::checkpoint::Checkpoint;
use crate::files::{SHARED, lock, read, replace, sync_folder};
use crate::folder::{CHECKPOINT, CHECKPOINTS, COSIGNED, Folder, OPEN};
use crate::merkle::{self, Hash, Tree};
use crate::note::Verifier;
use crate::record::Record;
use crate::tile::{self, Edges, Kind, Tile, Tiles, WIDTH};
use crate::{Error, at};

/// A log that this process alone writes.
pub struct Log {
    root: PathBuf,
    edges: Edges,
    /// The bundle at the end, as it is on disk.
    bundle: Vec<u8>,
    open: File,
    published: u64,
    /// What is read of full tiles.
    full: Folder,
    // Held, not used: the lock lives as long as the open file.
    _lock: File,
}

impl Log {
    /// Takes over the log in `root`, or begins one, whose checkpoints `verifier` vouches for.
    /// Gives the number of bytes that a loss of power had torn and that were cut off.
    ///
    /// # Errors
    /// Somebody else writes it, or it is not the log that was signed.
    pub fn open(root: &Path, verifier: &Verifier) -> Result<(Self, u64), Error> {
        at(root, fs::create_dir_all(root))?;
        let lock = lock(root)?;
        let signed = match read(&root.join(CHECKPOINT), crate::note::NOTE_LEN_MAX as u64)? {
            None => Tree { size: 0, root: merkle::empty_root() },
            Some(_) => Checkpoint::open(&Folder::note(root)?, verifier)?.tree,
        };
        let bundles = bundles(root);
        let mut edges = edges(&Folder::new(root, bundles * WIDTH), bundles * WIDTH)?;
        let path = root.join(OPEN);
        let mut bundle = read(&path, tile::BUNDLE_LEN_MAX)?.unwrap_or_default();
        let records = tile::read_records(&bundle).0;
        let sound = records.iter().take_while(|record| Record::decode(record).is_ok());
        let (mut len, mut full) = (0, Vec::new());
        for record in sound.take(WIDTH as usize) {
            len += 2 + record.len();
            full = edges.push(merkle::leaf_hash(record));
        }
        let torn = (bundle.len() - len) as u64;
        bundle.truncate(len);
        let open = at(&path, OpenOptions::new().create(true).append(true).open(&path))?;
        let size = edges.tree().size;
        if size < signed.size {
            let reason = format!(
                "it ends at record {size}, but {} records were signed; it is not written to",
                signed.size
            );
            return Err(Error::file(root, reason));
        }
        at(&path, open.set_len(len as u64).and_then(|()| open.sync_all()))?;
        sync_folder(root)?;
        let full_tiles = Folder::new(root, u64::MAX);
        let root = root.to_owned();
        let published = signed.size;
        let mut log = Self { root, edges, bundle, open, published, full: full_tiles, _lock: lock };
        log.complete(full)?;
        if merkle::root(&log, signed.size)? != signed.root {
            let reason =
                "its records do not lead to the root that was signed; it is not written to";
            return Err(Error::file(&log.root, reason));
        }
        log.write_partial(signed.size)?;
        Ok((log, torn))
    }

    /// The tree of all records that are on disk.
    pub fn tree(&self) -> Tree {
        self.edges.tree()
    }

    /// Size of the tree of the latest checkpoint.
    pub fn published(&self) -> u64 {
        self.published
    }

    /// The folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Appends records; when it returns, they are on disk. Gives the number of the first.
    ///
    /// # Errors
    /// A record is too long, and none was written; or the disk refused, and this log must not be
    /// used any more, as how much is on disk is not known.
    pub fn append(&mut self, records: &[Vec<u8>]) -> Result<u64, Error> {
        let first = self.edges.tree().size;
        let too_long = |record: &&Vec<u8>| record.len() > tile::RECORD_LEN_MAX;
        if let Some(record) = records.iter().find(too_long) {
            return Err(Error::Record { index: first, reason: format!("{} bytes", record.len()) });
        }
        let mut rest = records;
        while !rest.is_empty() {
            let size = self.edges.tree_size();
            let room = (WIDTH - size % WIDTH) as usize;
            let (now, later) = rest.split_at(room.min(rest.len()));
            let from = self.bundle.len();
            for record in now {
                tile::push_record(&mut self.bundle, size, record)?;
            }
            let path = self.root.join(OPEN);
            at(&path, self.open.write_all(&self.bundle[from..]))?;
            at(&path, self.open.sync_data())?;
            let mut full = Vec::new();
            for record in now {
                full = self.edges.push(merkle::leaf_hash(record));
            }
            self.complete(full)?;
            rest = later;
        }
        Ok(first)
    }

    /// Writes tiles that have become full, then makes `open` the bundle that they are about.
    fn complete(&mut self, full: Vec<(Tile, Vec<Hash>)>) -> Result<(), Error> {
        let Some((lowest, _)) = full.first() else { return Ok(()) };
        let bundle = Tile::full(Kind::Entries, lowest.index);
        for (tile, hashes) in &full {
            self.write_durably(&tile.path(), &tile::write_hashes(hashes))?;
        }
        let (from, to) = (self.root.join(OPEN), self.root.join(bundle.path()));
        self.make_folder(&to)?;
        at(&to, fs::rename(&from, &to))?;
        sync_folder(to.parent().unwrap_or(&self.root))?;
        self.open = at(&from, OpenOptions::new().create(true).append(true).open(&from))?;
        sync_folder(&self.root)?;
        self.bundle.clear();
        for tile in full.iter().map(|(tile, _)| tile).chain([&bundle]) {
            // The full tile is there now; the partial ones on the way to it are of no more use.
            let partial = self.root.join(format!("{}.p", tile.path()));
            match fs::remove_dir_all(&partial) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => at(&partial, Err(error))?,
                _ => {}
            }
        }
        Ok(())
    }

    /// Shows a checkpoint of this log, with the partial tiles that go with it.
    ///
    /// # Errors
    /// It goes back, or the disk refused.
    pub fn publish(&mut self, checkpoint: &Checkpoint) -> Result<(), Error> {
        let size = checkpoint.tree.size;
        if size < self.published || merkle::root(self, size)? != checkpoint.tree.root {
            return Err(Error::note("checkpoint", "it is not of this log, or goes back"));
        }
        self.write_partial(size)?;
        self.write_durably(CHECKPOINT, checkpoint.note.as_bytes())?;
        self.published = size;
        // A help to find where a fork began; nothing rests on it.
        let path = self.root.join(CHECKPOINTS);
        let line = serde_json::to_string(&checkpoint.note).unwrap_or_default() + "\n";
        let mut file = at(&path, OpenOptions::new().create(true).append(true).open(&path))?;
        at(&path, file.write_all(line.as_bytes()))
    }

    /// Shows a checkpoint of this log that somebody has cosigned, which may be an earlier one.
    ///
    /// # Errors
    /// It is of another tree than this log's, or the disk refused.
    pub fn show_cosigned(&mut self, checkpoint: &Checkpoint) -> Result<(), Error> {
        if !self.begins_with(&checkpoint.tree) {
            return Err(Error::note("checkpoint", "it is not of this log"));
        }
        let note = checkpoint.note.as_bytes();
        self.write_durably(COSIGNED, note)?;
        if checkpoint.tree.size == self.published {
            self.write_durably(CHECKPOINT, note)?;
        }
        Ok(())
    }

    /// Whether this tree is the beginning of the log.
    pub fn begins_with(&self, tree: &Tree) -> bool {
        let is_there = tree.size <= self.edges.tree_size();
        is_there && merkle::root(self, tree.size).is_ok_and(|root| root == tree.root)
    }

    /// The record at `index`.
    ///
    /// # Errors
    /// There is none, or the disk refused.
    pub fn record(&self, index: u64) -> Result<Vec<u8>, Error> {
        let size = self.edges.tree_size();
        let missing = || Error::NotInTree { size, what: format!("record {index}") };
        if index >= size {
            return Err(missing());
        }
        let at = (index % WIDTH) as usize;
        if index / WIDTH == size / WIDTH {
            let records = tile::read_records(&self.bundle).0;
            return records.get(at).map(|record| record.to_vec()).ok_or_else(missing);
        }
        let mut records = self.full.bundle(index / WIDTH)?;
        if at < records.len() { Ok(records.swap_remove(at)) } else { Err(missing()) }
    }

    /// The records from the bundle of number `first` on, each with its number; a bundle is read once.
    pub fn records_from(&self, first: u64) -> Vec<Result<(u64, Vec<u8>), Error>> {
        let size = self.edges.tree_size();
        let whole = size / WIDTH;
        let mut records = Vec::new();
        for index in first / WIDTH..whole {
            match self.full.bundle(index) {
                Ok(bundle) => {
                    let numbered = bundle.into_iter().enumerate();
                    records.extend(numbered.map(|(at, r)| Ok((index * WIDTH + at as u64, r))));
                }
                Err(error) => records.push(Err(error)),
            }
        }
        let open = tile::read_records(&self.bundle).0.into_iter().enumerate();
        records.extend(open.map(|(at, record)| Ok((whole * WIDTH + at as u64, record.to_vec()))));
        records
    }

    /// Writes the tiles with which a tree of `size` records ends.
    fn write_partial(&self, size: u64) -> Result<(), Error> {
        for tile in Tile::partial(size) {
            let width = tile.width as usize;
            let full = self.root.join(Tile::full(tile.kind, tile.index).path());
            if full.exists() {
                continue;
            }
            let bytes = match tile.kind {
                Kind::Hashes(level) => tile::write_hashes(&self.edges.level(level)[..width]),
                Kind::Entries => {
                    let records = tile::read_records(&self.bundle).0;
                    let len = records[..width].iter().map(|record| 2 + record.len()).sum();
                    self.bundle[..len].to_vec()
                }
            };
            let path = self.root.join(tile.path());
            self.make_folder(&path)?;
            at(&path, fs::write(&path, bytes))?;
        }
        Ok(())
    }

    /// Writes a whole file so that after a loss of power it is there as before or as it is now.
    fn write_durably(&self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        let path = self.root.join(name);
        self.make_folder(&path)?;
        replace(&path, bytes, SHARED)
    }

    /// Makes the folder of a file, durably.
    fn make_folder(&self, path: &Path) -> Result<(), Error> {
        let folder = path.parent().unwrap_or(&self.root);
        if folder.is_dir() {
            return Ok(());
        }
        at(folder, fs::create_dir_all(folder))?;
        // Each new folder is a name in the one above it.
        let above = folder.ancestors().skip(1).take_while(|above| above.starts_with(&self.root));
        above.collect::<Vec<_>>().into_iter().try_for_each(sync_folder)
    }
}

impl Tiles for Log {
    fn hashes(&self, level: u32, index: u64) -> Result<Arc<Vec<Hash>>, Error> {
        let last = self.edges.tree_size() >> (tile::HEIGHT * (level + 1));
        if index == last {
            return Ok(Arc::new(self.edges.level(level).to_vec()));
        }
        self.full.hashes(level, index)
    }
}

/// How many full bundles there are: they are written one after the other, so that a few looks tell.
fn bundles(root: &Path) -> u64 {
    let is_there = |index| root.join(Tile::full(Kind::Entries, index).path()).exists();
    if !is_there(0) {
        return 0;
    }
    let (mut there, mut step) = (0u64, 1u64);
    while is_there(there + step) {
        there += step;
        step *= 2;
    }
    while step > 1 {
        step /= 2;
        if is_there(there + step) {
            there += step;
        }
    }
    there + 1
}

/// The hashes at the end of a tree that ends with a full bundle, from the tiles below each.
fn edges(folder: &Folder, size: u64) -> Result<Edges, Error> {
    let mut levels = vec![Vec::new()];
    for level in 1u32.. {
        let count = size >> (tile::HEIGHT * level);
        if count == 0 {
            break;
        }
        let of = |index| Ok(merkle::over(&folder.hashes(level - 1, index)?));
        levels.push((count - count % WIDTH..count).map(of).collect::<Result<_, Error>>()?);
    }
    Ok(Edges::of(size, levels))
}

#[cfg(test)]
mod tests;
