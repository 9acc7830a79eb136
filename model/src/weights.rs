//! Weights on their way from the file into a kernel class's layout.
//!
//! A coordinator takes everything but the experts, an expert node takes its experts one by one;
//! neither touches a byte that belongs to the other. From a checkpoint as it was published, each
//! tensor is packed straight from the mapped file, whose pages are given back at once, so that
//! memory holds the packed form and never a second copy. The packed form is only read.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use entente_proto::ids::{ExpertId, LayerId};
use entente_proto::placement::ExpertKey;

use crate::ModelError;
use crate::checkpoint::{Checkpoint, Storage, TensorView, Tensors, widen};
use crate::config::{Architecture, FfnSpec};
use crate::family::{ExpertNames, GatedNames, Layout, in_layer, of_expert};
use crate::kernels::{
    ExpertKernels, GatedFfn, Kernels, Line, Lines, Matrix, MatrixSource, SourceDtype, WeightFormat,
};

/// Told how far something has come, for whoever waits.
pub trait Progress {
    /// `done` of `total` units are ready.
    fn advance(&self, done: u64, total: u64);
}

/// Nobody waits.
impl Progress for () {
    fn advance(&self, _done: u64, _total: u64) {}
}

/// The rows that token ids stand for, as in the file.
pub struct Embedding {
    hidden: usize,
    dtype: SourceDtype,
    lines: Arc<Lines>,
    /// Bytes of the rows, which come first; the last line may not be full.
    len: usize,
}

impl Embedding {
    /// Rows of `hidden` values that are the first `len` bytes of `lines`.
    pub(crate) fn new(lines: Arc<Lines>, len: usize, hidden: usize, dtype: SourceDtype) -> Self {
        Self { hidden, dtype, lines, len }
    }

    fn copy_of(view: TensorView<'_>, hidden: usize) -> Self {
        let mut lines = Lines::zeroed(view.bytes.len().div_ceil(size_of::<Line>()));
        lines.as_bytes_mut()[..view.bytes.len()].copy_from_slice(view.bytes);
        Self::new(Arc::new(lines), view.bytes.len(), hidden, view.dtype)
    }

    /// Element type, `[vocab, hidden]` and the rows.
    pub(crate) fn rows(&self) -> (SourceDtype, [usize; 2], &[u8]) {
        let vocab = self.len / (self.hidden * self.dtype.size());
        (self.dtype, [vocab, self.hidden], &self.lines.as_bytes()[..self.len])
    }

    /// Writes the row of `token` into `row`, which is `[hidden]`. The id must be below the
    /// vocabulary's size; ids that come from requests are checked when the request is admitted.
    pub fn lookup(&self, token: u32, row: &mut [f32]) {
        let row_len = self.hidden * self.dtype.size();
        let start = token as usize * row_len;
        widen(self.dtype, &self.rows().2[start..start + row_len], row);
    }

    /// Bytes of memory held.
    pub fn bytes(&self) -> usize {
        self.lines.bytes()
    }
}

/// The feed-forward of a layer, as far as it stays on the coordinator.
pub enum FfnWeights {
    /// The whole of it.
    Dense(GatedFfn),
    /// The gate, `[experts, hidden]`, which multiplies in f32 in every class.
    Moe {
        /// The gate.
        gate: Matrix,
    },
}

/// One decoder layer without its experts.
pub struct LayerWeights {
    /// Scale of the norm before the attention, `[hidden]`.
    pub input_norm: Vec<f32>,
    /// Queries, `[heads * head_dim, hidden]`.
    pub q: Matrix,
    /// Keys, `[kv_heads * head_dim, hidden]`.
    pub k: Matrix,
    /// Values, `[kv_heads * head_dim, hidden]`.
    pub v: Matrix,
    /// Output of the attention, `[hidden, heads * head_dim]`.
    pub o: Matrix,
    /// Scale of the norm before the feed-forward, `[hidden]`.
    pub post_norm: Vec<f32>,
    /// The feed-forward.
    pub ffn: FfnWeights,
}

/// Everything but the experts.
pub struct CoordinatorWeights {
    /// Token ids to rows.
    pub embed: Embedding,
    /// The decoder layers, in order.
    pub layers: Vec<LayerWeights>,
    /// Scale of the last norm, `[hidden]`.
    pub norm: Vec<f32>,
    /// Rows to logits, `[vocab, hidden]`.
    pub head: Matrix,
}

impl CoordinatorWeights {
    /// Loads; `progress` counts parts, each layer one of them.
    ///
    /// # Errors
    /// What is wrong with a file, and a packed form of another format than that of `kernels`.
    pub fn load(
        checkpoint: &Checkpoint,
        kernels: &dyn Kernels,
        progress: &dyn Progress,
    ) -> Result<Self, ModelError> {
        let arch = checkpoint.architecture();
        match checkpoint.storage() {
            Storage::Packed(packed) => {
                packed.require_format(kernels.format())?;
                packed.coordinator(arch, progress)
            }
            Storage::Tensors(tensors) => {
                let weights = Loader { arch, tensors, kernels }.coordinator(progress)?;
                if let Some(manifest) = checkpoint.manifest(kernels.format()) {
                    manifest.check_coordinator(arch, &weights)?;
                }
                Ok(weights)
            }
        }
    }

    /// Bytes of memory held.
    pub fn bytes(&self) -> usize {
        let layer = |layer: &LayerWeights| {
            let matrices = [&layer.q, &layer.k, &layer.v, &layer.o].map(Matrix::bytes);
            let ffn = match &layer.ffn {
                FfnWeights::Dense(ffn) => ffn.bytes(),
                FfnWeights::Moe { gate } => gate.bytes(),
            };
            let norms = layer.input_norm.len() + layer.post_norm.len();
            matrices.iter().sum::<usize>() + ffn + norms * size_of::<f32>()
        };
        let outer = self.embed.bytes() + self.head.bytes() + self.norm.len() * size_of::<f32>();
        self.layers.iter().map(layer).sum::<usize>() + outer
    }
}

/// Loads one expert, reading no other expert's bytes.
pub fn load_expert(
    checkpoint: &Checkpoint,
    kernels: &dyn ExpertKernels,
    layer: LayerId,
    expert: ExpertId,
) -> Result<GatedFfn, ModelError> {
    let mut one = load_experts(checkpoint, kernels, &BTreeSet::from([(layer, expert)]), &())?;
    one.remove(&(layer, expert)).ok_or_else(|| no_expert(checkpoint, layer, expert))
}

/// Loads the experts of `placed` to where `kernels` multiply, reading no other expert's bytes;
/// `progress` counts them.
///
/// # Errors
/// An expert that the model does not have, or that is missing in the folder; what is wrong with a
/// file; weights that are not those of the manifest; a packed form of another format than that of
/// `kernels`; and a device that has no room.
pub fn load_experts(
    checkpoint: &Checkpoint,
    kernels: &dyn ExpertKernels,
    placed: &BTreeSet<ExpertKey>,
    progress: &dyn Progress,
) -> Result<BTreeMap<ExpertKey, GatedFfn>, ModelError> {
    let arch = checkpoint.architecture();
    if let Some((layer, expert)) = placed.iter().find(|key| !arch.has_expert(key.0, key.1)) {
        return Err(no_expert(checkpoint, *layer, *expert));
    }
    match checkpoint.storage() {
        Storage::Packed(packed) => {
            packed.require_format(kernels.format())?;
            packed.experts(arch, kernels, placed, progress)
        }
        Storage::Tensors(tensors) => {
            let loader = Loader { arch, tensors, kernels };
            let manifest = checkpoint.manifest(kernels.format());
            let mut experts = BTreeMap::new();
            for (done, key) in (1..).zip(placed) {
                let expert = loader.expert(*key)?;
                manifest.iter().try_for_each(|manifest| manifest.check(*key, &expert))?;
                experts.insert(*key, expert);
                progress.advance(done, placed.len() as u64);
            }
            Ok(experts)
        }
    }
}

/// Bytes of memory that one expert takes once loaded, for planning a placement: the largest of the
/// model's experts. Zero for a model without experts.
///
/// # Errors
/// As for [`load_experts`].
pub fn expert_bytes(checkpoint: &Checkpoint, format: WeightFormat) -> Result<u64, ModelError> {
    let arch = checkpoint.architecture();
    if let Storage::Packed(packed) = checkpoint.storage() {
        packed.require_format(format)?;
    }
    let (first, manifest) = (ExpertId(0), checkpoint.manifest(format));
    let bytes = |layer| match (checkpoint.storage(), manifest) {
        (Storage::Packed(packed), _) => Ok(packed.expert_bytes(layer, first)),
        (_, Some(manifest)) => Ok(manifest.expert_bytes(layer, first)),
        (Storage::Tensors(tensors), None) => {
            let ExpertSources { gate, up, down } =
                ExpertSources::find(arch, tensors, (layer, first))?;
            Ok([gate, up, down].iter().map(|m| format.packed_bytes(m) as u64).sum())
        }
    };
    let all = arch.moe_layers().map(|(layer, _)| bytes(layer));
    all.collect::<Result<Vec<_>, _>>().map(|all| all.into_iter().max().unwrap_or(0))
}

fn no_expert(checkpoint: &Checkpoint, layer: LayerId, expert: ExpertId) -> ModelError {
    ModelError::file(checkpoint.dir(), format!("has no expert {expert} in layer {layer}"))
}

/// The stored matrices of one expert.
struct ExpertSources<'a> {
    gate: MatrixSource<'a>,
    up: MatrixSource<'a>,
    down: MatrixSource<'a>,
}

impl<'a> ExpertSources<'a> {
    /// Those of an expert that the architecture has.
    fn find(
        arch: &Architecture,
        tensors: &'a Tensors,
        (layer, expert): ExpertKey,
    ) -> Result<Self, ModelError> {
        let (l, e) = (layer.0.into(), expert.0.into());
        let (Some(moe), Some((experts, inner))) = (tensors.layout().moe, arch.mixture(layer))
        else {
            unreachable!("a layer with experts has names for them")
        };
        match &moe.experts {
            ExpertNames::Separate(GatedNames { gate, up, down }) => {
                let find = |name: &str, shape: [usize; 2]| {
                    Ok(tensors.tensor(&of_expert(name, l, e), &shape)?.matrix())
                };
                Ok(Self {
                    gate: find(gate, [inner, arch.hidden])?,
                    up: find(up, [inner, arch.hidden])?,
                    down: find(down, [arch.hidden, inner])?,
                })
            }
            ExpertNames::Fused { gate_up, down } => {
                let find = |name: &str, shape: [usize; 3]| {
                    Ok(tensors.tensor(&in_layer(name, l), &shape)?.slice(e))
                };
                let gate_up: TensorView<'a> = find(gate_up, [experts, 2 * inner, arch.hidden])?;
                let down = find(down, [experts, arch.hidden, inner])?;
                Ok(Self {
                    gate: gate_up.rows(0, inner),
                    up: gate_up.rows(inner, inner),
                    down: down.matrix(),
                })
            }
        }
    }
}

/// Packs tensors of a checkpoint as it was published.
struct Loader<'a, K: ?Sized> {
    arch: &'a Architecture,
    tensors: &'a Tensors,
    kernels: &'a K,
}

impl<K: ExpertKernels + ?Sized> Loader<'_, K> {
    fn expert(&self, key: ExpertKey) -> Result<GatedFfn, ModelError> {
        let ExpertSources { gate, up, down } = ExpertSources::find(self.arch, self.tensors, key)?;
        Ok(GatedFfn {
            gate: self.pack(gate)?,
            up: self.pack(up)?,
            down: self.pack(down)?,
            activation: self.arch.activation,
        })
    }

    fn pack(&self, source: MatrixSource<'_>) -> Result<Matrix, ModelError> {
        let matrix = self.kernels.pack(source).map_err(ModelError::Device)?;
        self.tensors.release(source.bytes);
        Ok(matrix)
    }
}

impl Loader<'_, dyn Kernels + '_> {
    fn coordinator(&self, progress: &dyn Progress) -> Result<CoordinatorWeights, ModelError> {
        let (arch, names) = (self.arch, self.tensors.layout().names);
        let total = arch.layers.len() as u64 + 1;
        progress.advance(0, total);
        let mut layers = Vec::with_capacity(arch.layers.len());
        for layer in 0..arch.layers.len() {
            layers.push(self.layer(layer)?);
            progress.advance(layers.len() as u64, total);
        }
        let table = [arch.vocab, arch.hidden];
        let embed = self.tensors.tensor(names.embed, &table)?;
        let head = if arch.tied_embeddings { names.embed } else { names.head };
        let weights = CoordinatorWeights {
            embed: Embedding::copy_of(embed, arch.hidden),
            layers,
            norm: self.tensors.tensor(names.norm, &[arch.hidden])?.to_f32(),
            head: self.matrix(head, table)?,
        };
        self.tensors.release(embed.bytes);
        progress.advance(total, total);
        Ok(weights)
    }

    fn layer(&self, layer: usize) -> Result<LayerWeights, ModelError> {
        let (arch, names) = (self.arch, self.tensors.layout().names);
        let (q, kv) = (arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim);
        let matrix = |name, shape| self.matrix(&in_layer(name, layer), shape);
        Ok(LayerWeights {
            input_norm: self.norm(names.input_norm, layer)?,
            q: matrix(names.q, [q, arch.hidden])?,
            k: matrix(names.k, [kv, arch.hidden])?,
            v: matrix(names.v, [kv, arch.hidden])?,
            o: matrix(names.o, [arch.hidden, q])?,
            post_norm: self.norm(names.post_norm, layer)?,
            ffn: self.ffn(layer)?,
        })
    }

    fn ffn(&self, layer: usize) -> Result<FfnWeights, ModelError> {
        let arch = self.arch;
        let Layout { names, moe } = self.tensors.layout();
        match (arch.layers[layer].ffn, moe) {
            (FfnSpec::Moe { experts, .. }, Some(moe)) => {
                let name = in_layer(moe.router, layer);
                let gate = self.tensors.tensor(&name, &[experts, arch.hidden])?.matrix();
                Ok(FfnWeights::Moe { gate: self.kernels.pack_f32(gate) })
            }
            (FfnSpec::Dense { inner } | FfnSpec::Moe { inner, .. }, _) => {
                let matrix = |name, shape| self.matrix(&in_layer(name, layer), shape);
                Ok(FfnWeights::Dense(GatedFfn {
                    gate: matrix(names.dense.gate, [inner, arch.hidden])?,
                    up: matrix(names.dense.up, [inner, arch.hidden])?,
                    down: matrix(names.dense.down, [arch.hidden, inner])?,
                    activation: arch.activation,
                }))
            }
        }
    }

    fn matrix(&self, name: &str, shape: [usize; 2]) -> Result<Matrix, ModelError> {
        self.pack(self.tensors.tensor(name, &shape)?.matrix())
    }

    fn norm(&self, name: &str, layer: usize) -> Result<Vec<f32>, ModelError> {
        let hidden = self.arch.hidden;
        Ok(self.tensors.tensor(&in_layer(name, layer), &[hidden])?.to_f32())
    }
}
