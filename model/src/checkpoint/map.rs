//! A file in memory without a copy of it: the one place of this crate, beside the kernels, that
//! needs `unsafe`.

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use crate::ModelError;

/// A safetensors file, mapped read-only.
pub(crate) struct MappedFile {
    path: PathBuf,
    map: Mmap,
}

impl MappedFile {
    /// Maps an open file whose header has been checked.
    #[allow(unsafe_code)]
    pub fn map(path: &Path, file: &File) -> Result<Self, ModelError> {
        // SAFETY: the map is private to this type and never written through. That nobody changes
        // the file while it is mapped cannot be enforced; a checkpoint is written once and then
        // only read, and whoever may write it may also replace the model. Values are only ever read
        // as plain bytes, so changed contents give other numbers, not undefined values.
        let map = unsafe { Mmap::map(file) }.map_err(|e| ModelError::io(path, e))?;
        Ok(Self { path: path.to_owned(), map })
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes of the file, counted from its start; absent if the file is shorter.
    pub fn bytes(&self, range: Range<usize>) -> Option<&[u8]> {
        self.map.get(range)
    }

    /// Gives back the memory of these bytes, if they are this file's, until they are read again.
    #[allow(unsafe_code)]
    pub fn release(&self, bytes: &[u8]) {
        if !self.map.as_ptr_range().contains(&bytes.as_ptr()) {
            return;
        }
        #[cfg(unix)]
        {
            use memmap2::UncheckedAdvice::DontNeed;

            let offset = bytes.as_ptr() as usize - self.map.as_ptr() as usize;
            // Advice: where it is not taken, more memory counts as used for longer.
            // SAFETY: the map is shared with its file and never written through, so pages that are
            // dropped come back from the file with the same contents.
            let _ = unsafe { self.map.unchecked_advise_range(DontNeed, offset, bytes.len()) };
        }
    }
}
