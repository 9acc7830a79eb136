//! The tensors of a checkpoint as it was published, by name.
//!
//! Invariants of [`Tensors`] that exist: every tensor that the architecture calls for is there, unless
//! some were allowed to be missing, with the shape that the architecture gives it and an element type
//! that can be computed with; and there is no other tensor, since a weight that nobody reads is an
//! answer that is wrong.

use std::path::Path;

use super::header::Entry;
use super::scales;
use super::shards::Shards;
use crate::ModelError;
use crate::config::Architecture;
use crate::family::{Expected, Family, Layout, Role};
use crate::kernels::{MatrixSource, Scales, SourceDtype, read};

/// All tensors of a folder; the values stay on disk.
pub(crate) struct Tensors {
    layout: Layout,
    shards: Shards,
    is_complete: bool,
}

impl Tensors {
    /// Opens the safetensors files of a folder and checks everything about them but the values.
    /// Tensors, files, and even all of them `may_lack`; what is there is checked all the same.
    pub fn open(
        dir: &Path,
        arch: &Architecture,
        family: &'static Family,
        may_lack: bool,
    ) -> Result<Self, ModelError> {
        let shards = Shards::open(dir, may_lack)?;
        let layout = Layout::of(family, arch, |name| shards.tensors.contains_key(name));
        let mut tensors = Self { layout, shards, is_complete: true };
        tensors.is_complete = tensors.check_expected(arch, may_lack)?;
        tensors.refuse_foreign(arch)?;
        Ok(tensors)
    }

    /// Whether every tensor that the architecture calls for is there.
    pub fn is_complete(&self) -> bool {
        self.is_complete
    }

    /// A tensor of exactly this shape.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<TensorView<'_>, ModelError> {
        let (entry, dtype, bytes) = self.stored(name)?;
        if entry.shape != shape {
            let reason = format!("shape {:?}, expected {shape:?}", entry.shape);
            return Err(self.error(name, reason));
        }
        let scales = match dtype {
            SourceDtype::E4m3 => Some(self.scales(name, shape)?),
            SourceDtype::F32 | SourceDtype::F16 | SourceDtype::Bf16 => None,
        };
        Ok(TensorView { dtype, shape: &entry.shape, bytes, scales })
    }

    /// A tensor of whatever shape, as its file has it.
    fn stored(&self, name: &str) -> Result<(&Entry, SourceDtype, &[u8]), ModelError> {
        let Some((file, entry)) = self.shards.tensors.get(name) else {
            return Err(self.error(name, "missing"));
        };
        let dtype = source_dtype(&entry.dtype).ok_or_else(|| {
            let reason =
                format!("unsupported dtype {}; supported: BF16, F16, F32, F8_E4M3", entry.dtype);
            self.error(name, reason)
        })?;
        let bytes = self.shards.files[*file]
            .bytes(entry.range.clone())
            .ok_or_else(|| self.error(name, "the file became shorter while it was opened"))?;
        Ok((entry, dtype, bytes))
    }

    /// The scales of a tensor in e4m3.
    fn scales(&self, name: &str, shape: &[usize]) -> Result<Scales<'_>, ModelError> {
        let names = scales::names(name);
        let Some(found) = names.iter().find(|name| self.shards.tensors.contains_key(*name)) else {
            let reason = format!("F8_E4M3 without {}", names.join(" or "));
            return Err(self.error(name, reason));
        };
        let (entry, dtype, bytes) = self.stored(found)?;
        if dtype == SourceDtype::E4m3 {
            return Err(self.error(found, "unsupported dtype F8_E4M3 of scales"));
        }
        scales::of(shape, entry, dtype, bytes).map_err(|reason| self.error(found, reason))
    }

    /// An error about a tensor, in the file where it is or should have been.
    fn error(&self, name: &str, reason: impl Into<String>) -> ModelError {
        let file = self.shards.tensors.get(name).map(|(file, _)| self.shards.files[*file].path());
        ModelError::tensor(file.unwrap_or(&self.shards.root), name, reason)
    }

    /// Says that these bytes, which are a tensor's, will not be read again soon: otherwise a process
    /// that packs them counts both forms as its memory.
    pub fn release(&self, bytes: &[u8]) {
        self.shards.files.iter().for_each(|file| file.release(bytes));
    }

    /// The names that this checkpoint uses.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// All tensors in order of name.
    pub fn entries(&self) -> impl Iterator<Item = (&str, &Entry)> {
        self.shards.tensors.iter().map(|(name, (_, entry))| (name.as_str(), entry))
    }

    /// All tensors that the architecture calls for.
    pub fn expected<'a>(&'a self, arch: &'a Architecture) -> impl Iterator<Item = Expected> + 'a {
        self.layout.expected(arch)
    }

    /// Whether all that is expected is there; what is there must be as expected.
    fn check_expected(&self, arch: &Architecture, may_lack: bool) -> Result<bool, ModelError> {
        let mut is_complete = true;
        for want in self.expected(arch) {
            if may_lack && !self.shards.tensors.contains_key(&want.name) {
                is_complete = false;
            } else {
                let view = self.tensor(&want.name, &want.shape)?;
                // What is not multiplied in the weight format, and is little, is never in FP8.
                let in_f32 = want.role == Role::Small || want.name == self.layout.names.embed;
                if in_f32 && view.scales.is_some() {
                    let reason = "F8_E4M3 is supported for matrices alone, not for norms, gates and \
                                  embeddings";
                    return Err(self.error(&want.name, reason));
                }
            }
        }
        Ok(is_complete)
    }

    fn refuse_foreign(&self, arch: &Architecture) -> Result<(), ModelError> {
        let expected: std::collections::BTreeSet<String> =
            self.expected(arch).map(|want| want.name).collect();
        for name in self.shards.tensors.keys() {
            let scales = || scales::owner(name).is_some_and(|of| self.is_scaled_by(of, name));
            if !expected.contains(name) && !self.layout.ignores(name) && !scales() {
                let reason = format!("not part of {} as configured", arch.family);
                return Err(self.error(name, reason));
            }
        }
        Ok(())
    }

    /// Whether this is the tensor that scales the other, which is one in e4m3.
    fn is_scaled_by(&self, tensor: &str, scales: &str) -> bool {
        let in_e4m3 = |(_, entry): &(usize, Entry)| entry.dtype == E4M3;
        let mut names = scales::names(tensor).into_iter();
        let used = names.find(|name| self.shards.tensors.contains_key(name));
        self.shards.tensors.get(tensor).is_some_and(in_e4m3) && used.is_some_and(|n| n == scales)
    }
}

/// What files call it: the format with NaN and without infinities.
const E4M3: &str = "F8_E4M3";

fn source_dtype(name: &str) -> Option<SourceDtype> {
    match name {
        "F32" => Some(SourceDtype::F32),
        "F16" => Some(SourceDtype::F16),
        "BF16" => Some(SourceDtype::Bf16),
        E4M3 => Some(SourceDtype::E4m3),
        _ => None,
    }
}

/// A tensor as it lies in the file, row-major and little-endian.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TensorView<'a> {
    /// Element type.
    pub dtype: SourceDtype,
    /// Outermost first.
    pub shape: &'a [usize],
    /// As many bytes as the shape calls for.
    pub bytes: &'a [u8],
    /// What the elements are multiplied by; absent where they are the values.
    pub scales: Option<Scales<'a>>,
}

impl<'a> TensorView<'a> {
    /// The `index`-th slice along the outermost dimension, of shape `shape[1..]`.
    pub fn slice(&self, index: usize) -> TensorView<'a> {
        let slice_len = self.bytes.len() / self.shape[0];
        let bytes = &self.bytes[index * slice_len..(index + 1) * slice_len];
        let scales = self.scales.map(|scales| {
            let len = scales.bytes.len() / self.shape[0];
            Scales { bytes: &scales.bytes[index * len..][..len], ..scales }
        });
        TensorView { shape: &self.shape[1..], bytes, scales, ..*self }
    }

    /// A matrix `[out, in]`, for a tensor of two dimensions.
    pub fn matrix(&self) -> MatrixSource<'a> {
        self.rows(0, self.shape[0])
    }

    /// Rows `first..first + count` of a matrix.
    pub(crate) fn rows(&self, first: usize, count: usize) -> MatrixSource<'a> {
        let [out_features, in_features] = [self.shape[0], self.shape[1]];
        let Self { dtype, bytes, scales, .. } = *self;
        MatrixSource { out_features, in_features, dtype, bytes, scales }.rows(first, count)
    }

    /// All values, widened.
    pub fn to_f32(self) -> Vec<f32> {
        let mut values = vec![0.0; self.bytes.len() / self.dtype.size()];
        widen(self.dtype, self.bytes, &mut values);
        values
    }
}

/// Reads values of a checkpoint; exact, since binary32 holds all types.
pub(crate) fn widen(dtype: SourceDtype, bytes: &[u8], out: &mut [f32]) {
    debug_assert_eq!(bytes.len(), out.len() * dtype.size());
    read(dtype, bytes, |i, value| out[i] = value);
}
