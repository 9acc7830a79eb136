//! The audit log: records of what was done with each request, in a tree that cannot be changed
//! unseen, on a disk that may lose power, in files that anybody can check without this program.
//!
//! ```text
//!   record ── canonical JSON ──► leaf of an RFC 6962 tree ──► tiles and bundles on disk (c2sp.org/tlog-tiles)
//!                                          │
//!                                          └──► checkpoint: size and root, signed (c2sp.org/tlog-checkpoint)
//! ```
//!
//! - [`record`]: what a leaf says. One record has exactly one sequence of bytes.
//! - [`merkle`]: the tree, inclusion and consistency; [`tile`]: how it is cut into files.
//! - [`log`]: the one writer of a folder; [`folder`]: everybody else's view of it.
//! - [`note`], [`checkpoint`], [`proof`]: what is signed, and the files handed to others.
//! - [`cosign`], [`witness`]: that somebody else has seen a log grow, and who says so.
//! - [`files`], [`keyfile`]: how something is put on a disk for good, and where keys are.
//! - [`export`], [`verify`], [`report`]: one file for an auditor, its check, and the table they ask for.
//!
//! Invariants:
//! - a record that was acknowledged is on disk, and under the next checkpoint at its index for ever;
//! - a checkpoint is signed only for a tree whose records are on disk, and never for a smaller tree
//!   than one that was signed before;
//! - nothing here holds text, tokens, or the number of an expert.
//!
//! What this crate does not know: who writes records and when, networks, clocks, certificates'
//! insides (whoever verifies statements brings an [`verify::Notary`]).

pub mod checkpoint;
pub mod cosign;
pub mod export;
pub mod files;
pub mod folder;
pub mod keyfile;
pub mod log;
pub mod merkle;
pub mod note;
pub mod proof;
pub mod record;
pub mod report;
pub mod tile;
pub mod verify;
pub mod witness;

use std::path::PathBuf;

/// Why something of a log cannot be used, or is not what it claims to be.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// Where.
        path: PathBuf,
        /// What it said.
        source: std::io::Error,
    },
    /// Bytes that are not a record, or not the one way to write it.
    #[error("record {index}: {reason}")]
    Record {
        /// Its number in the log, from 0.
        index: u64,
        /// What is wrong with it.
        reason: String,
    },
    /// A file of the log is not what its records make it.
    #[error("{}: {reason}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A signed note, a checkpoint or a key is malformed or of somebody else.
    #[error("{what}: {reason}")]
    Note {
        /// Which kind of thing.
        what: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// A tree has no such node or record.
    #[error("the tree of {size} records has no {what}")]
    NotInTree {
        /// Its size.
        size: u64,
        /// What was looked for.
        what: String,
    },
}

impl Error {
    pub(crate) fn note(what: &'static str, reason: impl Into<String>) -> Self {
        Self::Note { what, reason: reason.into() }
    }

    pub(crate) fn file(path: impl Into<PathBuf>, reason: impl Into<String>) -> Self {
        Self::File { path: path.into(), reason: reason.into() }
    }
}

/// An error of the file system, with the path that it is about.
pub(crate) fn at<T>(path: &std::path::Path, result: std::io::Result<T>) -> Result<T, Error> {
    result.map_err(|source| Error::Io { path: path.to_owned(), source })
}

/// Base 64 as C2SP's formats have it: RFC 4648 section 4, padded, and nothing else accepted.
pub(crate) mod base64 {
    use data_encoding::BASE64;

    pub fn encode(bytes: &[u8]) -> String {
        BASE64.encode(bytes)
    }

    pub fn decode(text: &str) -> Option<Vec<u8>> {
        BASE64.decode(text.as_bytes()).ok()
    }
}
