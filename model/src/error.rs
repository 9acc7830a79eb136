//! Why a model folder cannot be used.
//!
//! A person who reads one of these has a folder before them and nothing else, so each text names
//! the file, then the field or the tensor, then the reason.

use std::io;
use std::path::{Path, PathBuf};

use crate::kernels::DeviceError;

/// Why a checkpoint folder, or a file in it, is refused.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The operating system refused.
    #[error("{}: {source}", file.display())]
    Io {
        /// The file or folder.
        file: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// A file as a whole is not what it should be.
    #[error("{}: {reason}", file.display())]
    File {
        /// The file or folder.
        file: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A field of a file is missing, of the wrong kind, out of range or not supported.
    #[error("{}: {field}: {reason}", file.display())]
    Field {
        /// The file.
        file: PathBuf,
        /// The field, with dots for nesting in JSON.
        field: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A tensor is missing, misshapen or misplaced.
    #[error("{}: tensor {tensor}: {reason}", file.display())]
    Tensor {
        /// The safetensors file, or the index when the file is not known.
        file: PathBuf,
        /// The tensor's name in the file.
        tensor: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The configuration names a model family that is not built.
    #[error("{}: architectures: unsupported architecture {have}; supported: {supported}", file.display())]
    UnsupportedArchitecture {
        /// The configuration file.
        file: PathBuf,
        /// The family that was found.
        have: String,
        /// The families that are built, comma separated.
        supported: String,
    },
    /// The folder is good, but the device takes no more weights.
    #[error(transparent)]
    Device(DeviceError),
}

impl ModelError {
    pub(crate) fn io(file: &Path, source: io::Error) -> Self {
        Self::Io { file: file.to_owned(), source }
    }

    pub(crate) fn file(file: &Path, reason: impl Into<String>) -> Self {
        Self::File { file: file.to_owned(), reason: reason.into() }
    }

    pub(crate) fn field(file: &Path, field: &str, reason: impl Into<String>) -> Self {
        Self::Field { file: file.to_owned(), field: field.to_owned(), reason: reason.into() }
    }

    pub(crate) fn tensor(file: &Path, tensor: &str, reason: impl Into<String>) -> Self {
        Self::Tensor { file: file.to_owned(), tensor: tensor.to_owned(), reason: reason.into() }
    }
}
