//! A checkpoint folder, open: its architecture and its tensors, checked against each other.
//!
//! The weights are safetensors as they were published, or the packed form of one format
//! ([`crate::packed`]); everything outside this crate treats both alike.
//!
//! Opening reads `config.json` and the safetensors headers, and a few thousand small values for the
//! digest; the weights stay on disk until somebody asks for them by name. That is what lets an
//! expert node with 4 of 256 experts start in the time that 4 experts take.
//!
//! Invariant of a [`Checkpoint`] that exists: all weights that the architecture calls for are there,
//! and nothing else is; but with a manifest ([`crate::packed::Manifest`]), which names them all,
//! weights may be missing, and who needs them gets them from somebody who has them.

mod digest;
mod header;
mod map;
mod scales;
mod shards;
mod tensors;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use entente_proto::ids::ModelDigest;

use crate::ModelError;
use crate::config::{self, Architecture};
use crate::kernels::WeightFormat;
use crate::packed::{Manifest, Packed};

pub(crate) use digest::of_architecture as digest_of_architecture;
pub(crate) use tensors::{TensorView, Tensors, widen};

/// An open checkpoint folder.
pub struct Checkpoint {
    dir: PathBuf,
    architecture: Architecture,
    storage: Storage,
    digest: ModelDigest,
    manifest: Option<Arc<Manifest>>,
}

/// Where the weights are.
pub(crate) enum Storage {
    /// In the form of the kernels of one format.
    Packed(Packed),
    /// As they were published.
    Tensors(Tensors),
}

impl Checkpoint {
    /// Opens a Hugging Face checkpoint folder, or one that [`crate::packed::import`] wrote, and
    /// checks everything about it but the values.
    pub fn open(dir: &Path) -> Result<Self, ModelError> {
        let (architecture, family) = config::read(dir)?;
        let manifest = Manifest::open(dir, &architecture)?.map(Arc::new);
        let (storage, digest) = match Packed::open(dir, &architecture)? {
            Some(packed) => {
                manifest.iter().try_for_each(|manifest| packed.require(manifest))?;
                let digest = packed.model_digest();
                (Storage::Packed(packed), digest)
            }
            None => {
                let tensors = Tensors::open(dir, &architecture, family, manifest.is_some())?;
                let digest = match &manifest {
                    // What is missing is part of the digest.
                    Some(manifest) if !tensors.is_complete() => manifest.model_digest(),
                    _ => digest::of(&architecture, &tensors)?,
                };
                (Storage::Tensors(tensors), digest)
            }
        };
        manifest.iter().try_for_each(|manifest| manifest.require_model(digest))?;
        Ok(Self { dir: dir.to_owned(), architecture, storage, digest, manifest })
    }

    /// The manifest of the weights in this format, if the folder has it.
    pub fn manifest(&self, format: WeightFormat) -> Option<&Arc<Manifest>> {
        self.any_manifest().filter(|manifest| manifest.format() == format)
    }

    /// The manifest of whatever format.
    pub(crate) fn any_manifest(&self) -> Option<&Arc<Manifest>> {
        self.manifest.as_ref()
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What the model is made of.
    pub fn architecture(&self) -> &Architecture {
        &self.architecture
    }

    /// SHA-256 that tells this model from others, computed from what every node can read cheaply.
    ///
    /// It covers the architecture; the name, element type and shape of every tensor; the values of
    /// all norms and gates; and the first row of every other matrix outside the experts. Equal
    /// digests therefore show that two nodes mean the same model and that neither mixed up its
    /// folders: another size, conversion or fine-tune differs in one of these. They do **not** show
    /// that the experts' bytes are equal: a flipped bit on one disk goes unnoticed here. The packed
    /// form carries the digest of what was packed.
    pub fn digest(&self) -> ModelDigest {
        self.digest
    }

    pub(crate) fn storage(&self) -> &Storage {
        &self.storage
    }
}
