//! How a file is put on a disk so that after a loss of power it is there as before or as it is now.

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use crate::{Error, at};

/// Files that everybody may read whom the process's mask lets.
pub(crate) const SHARED: u32 = 0o666;
/// Files that nobody else reads.
pub const PRIVATE: u32 = 0o600;

/// Reads a file that has `len_max` bytes at most; nothing if it is not there.
///
/// # Errors
/// It is longer, or the file system refused.
pub fn read(path: &Path, len_max: u64) -> Result<Option<Vec<u8>>, Error> {
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => at(path, other)?,
    };
    let mut bytes = Vec::new();
    at(path, file.take(len_max + 1).read_to_end(&mut bytes))?;
    if bytes.len() as u64 > len_max {
        return Err(Error::file(path, format!("it has more than {len_max} bytes")));
    }
    Ok(Some(bytes))
}

/// Replaces a whole file by one with these permissions, in one step.
///
/// # Errors
/// The file system refused.
pub fn replace(path: &Path, bytes: &[u8], mode: u32) -> Result<(), Error> {
    let part = path.with_extension("part");
    let mut options = OpenOptions::new();
    let options = options.write(true).create(true).truncate(true).mode(mode);
    let mut file = at(&part, options.open(&part))?;
    at(&part, file.write_all(bytes).and_then(|()| file.sync_all()))?;
    at(path, fs::rename(&part, path))?;
    sync_folder(path.parent().unwrap_or(path))
}

/// Makes the names in a folder durable.
pub(crate) fn sync_folder(folder: &Path) -> Result<(), Error> {
    at(folder, File::open(folder).and_then(|folder| folder.sync_all()))
}

/// Makes a folder that only this user enters.
///
/// # Errors
/// The file system refused.
pub fn make_private(folder: &Path) -> Result<(), Error> {
    at(folder, DirBuilder::new().recursive(true).mode(0o700).create(folder))
}

/// Keeps other processes out of a folder for as long as the file is open.
pub(crate) fn lock(root: &Path) -> Result<File, Error> {
    let path = root.join("lock");
    let file = at(&path, File::create(&path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(Error::file(root, "another process uses it")),
        Err(TryLockError::Error(error)) => at(&path, Err(error)),
    }
}
