//! The tensors of a checkpoint as it was published, by name.
//!
//! Invariants of [`Tensors`] that exist: every tensor that the architecture calls for is there, unless
//! some were allowed to be missing, with the shape that the architecture gives it and an element type
//! that can be computed with; and there is no other tensor, since a weight that nobody reads is an
//! answer that is wrong.

use std::path::Path;

use super::header::Entry;
use super::shards::Shards;
use crate::ModelError;
use crate::config::Architecture;
use crate::family::{Expected, Family, Layout};
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
        let Some((file, entry)) = self.shards.tensors.get(name) else {
            return Err(ModelError::tensor(&self.shards.root, name, "missing"));
        };
        let file = &self.shards.files[*file];
        let error = |reason: String| ModelError::tensor(file.path(), name, reason);
        if entry.shape != shape {
            return Err(error(format!("shape {:?}, expected {shape:?}", entry.shape)));
        }
        let dtype = source_dtype(&entry.dtype).ok_or_else(|| {
            error(format!("unsupported dtype {}; supported: BF16, F16, F32", entry.dtype))
        })?;
        let bytes = file
            .bytes(entry.range.clone())
            .ok_or_else(|| error("the file became shorter while it was opened".to_owned()))?;
        Ok(TensorView { dtype, shape: &entry.shape, bytes, scales: None })
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
                self.tensor(&want.name, &want.shape)?;
            }
        }
        Ok(is_complete)
    }

    fn refuse_foreign(&self, arch: &Architecture) -> Result<(), ModelError> {
        let expected: std::collections::BTreeSet<String> =
            self.expected(arch).map(|want| want.name).collect();
        for (name, (file, _)) in &self.shards.tensors {
            if !expected.contains(name) && !self.layout.ignores(name) {
                let reason = format!("not part of {} as configured", arch.family);
                return Err(ModelError::tensor(self.shards.files[*file].path(), name, reason));
            }
        }
        Ok(())
    }
}

fn source_dtype(name: &str) -> Option<SourceDtype> {
    match name {
        "F32" => Some(SourceDtype::F32),
        "F16" => Some(SourceDtype::F16),
        "BF16" => Some(SourceDtype::Bf16),
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
        TensorView { shape: &self.shape[1..], bytes, ..*self }
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
