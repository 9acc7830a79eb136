//! Weights on their way from the file into a kernel class's layout.
//!
//! A coordinator takes everything but the experts, an expert node takes its experts one by one;
//! neither touches a byte that belongs to the other. Each tensor is packed straight from the mapped
//! file, so that memory holds the packed form and never a second copy.

use entente_proto::ids::{ExpertId, LayerId};

use crate::ModelError;
use crate::checkpoint::{Checkpoint, TensorView, widen};
use crate::config::FfnSpec;
use crate::family::{ExpertNames, GatedNames, Layout, in_layer, of_expert};
use crate::kernels::{GatedFfn, Kernels, Matrix, MatrixSource, SourceDtype, WeightFormat};

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
    bytes: Vec<u8>,
}

impl Embedding {
    /// Writes the row of `token` into `row`, which is `[hidden]`. The id must be below the
    /// vocabulary's size; ids that come from requests are checked when the request is admitted.
    pub fn lookup(&self, token: u32, row: &mut [f32]) {
        let row_len = self.hidden * self.dtype.size();
        let start = token as usize * row_len;
        widen(self.dtype, &self.bytes[start..start + row_len], row);
    }

    /// Bytes of memory held.
    pub fn bytes(&self) -> usize {
        self.bytes.len()
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
    /// Loads and packs; `progress` counts layers, with embedding and head as one more.
    pub fn load(
        checkpoint: &Checkpoint,
        kernels: &dyn Kernels,
        progress: &dyn Progress,
    ) -> Result<Self, ModelError> {
        let loader = Loader { checkpoint, kernels };
        let arch = checkpoint.architecture();
        let names = checkpoint.layout().names;
        let total = arch.layers.len() as u64 + 1;
        progress.advance(0, total);
        let mut layers = Vec::with_capacity(arch.layers.len());
        for layer in 0..arch.layers.len() {
            layers.push(loader.layer(layer)?);
            progress.advance(layers.len() as u64, total);
        }
        let table = [arch.vocab, arch.hidden];
        let embed = checkpoint.tensor(names.embed, &table)?;
        let head = if arch.tied_embeddings { names.embed } else { names.head };
        let weights = Self {
            embed: Embedding {
                hidden: arch.hidden,
                dtype: embed.dtype,
                bytes: embed.bytes.to_vec(),
            },
            layers,
            norm: checkpoint.tensor(names.norm, &[arch.hidden])?.to_f32(),
            head: loader.matrix(head, table)?,
        };
        progress.advance(total, total);
        Ok(weights)
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

/// Loads and packs one expert, reading no other expert's bytes.
pub fn load_expert(
    checkpoint: &Checkpoint,
    kernels: &dyn Kernels,
    layer: LayerId,
    expert: ExpertId,
) -> Result<GatedFfn, ModelError> {
    let sources = ExpertSources::find(checkpoint, layer, expert)?;
    Ok(GatedFfn {
        gate: kernels.pack(sources.gate),
        up: kernels.pack(sources.up),
        down: kernels.pack(sources.down),
        activation: checkpoint.architecture().activation,
    })
}

/// Bytes of memory that one expert takes once loaded, for planning a placement: the largest of the
/// model's experts. Zero for a model without experts.
pub fn expert_bytes(checkpoint: &Checkpoint, format: WeightFormat) -> Result<u64, ModelError> {
    let mut largest = 0;
    for (layer, _) in checkpoint.architecture().moe_layers() {
        let sources = ExpertSources::find(checkpoint, layer, ExpertId(0))?;
        let matrices = [sources.gate, sources.up, sources.down];
        largest = largest.max(matrices.iter().map(|m| format.packed_bytes(m) as u64).sum());
    }
    Ok(largest)
}

/// The stored matrices of one expert.
struct ExpertSources<'a> {
    gate: MatrixSource<'a>,
    up: MatrixSource<'a>,
    down: MatrixSource<'a>,
}

impl<'a> ExpertSources<'a> {
    fn find(
        checkpoint: &'a Checkpoint,
        layer: LayerId,
        expert: ExpertId,
    ) -> Result<Self, ModelError> {
        let (arch, l, e) = (checkpoint.architecture(), layer.0.into(), expert.0.into());
        let (Some(moe), Some((experts, inner))) = (checkpoint.layout().moe, arch.mixture(layer))
        else {
            return Err(no_expert(checkpoint, layer, expert));
        };
        if e >= experts {
            return Err(no_expert(checkpoint, layer, expert));
        }
        match &moe.experts {
            ExpertNames::Separate(GatedNames { gate, up, down }) => {
                let find = |name: &str, shape: [usize; 2]| {
                    Ok(checkpoint.tensor(&of_expert(name, l, e), &shape)?.matrix())
                };
                Ok(Self {
                    gate: find(gate, [inner, arch.hidden])?,
                    up: find(up, [inner, arch.hidden])?,
                    down: find(down, [arch.hidden, inner])?,
                })
            }
            ExpertNames::Fused { gate_up, down } => {
                let find = |name: &str, shape: [usize; 3]| {
                    Ok(checkpoint.tensor(&in_layer(name, l), &shape)?.slice(e))
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

fn no_expert(checkpoint: &Checkpoint, layer: LayerId, expert: ExpertId) -> ModelError {
    ModelError::file(checkpoint.dir(), format!("has no expert {expert} in layer {layer}"))
}

/// Packs the tensors of the coordinator.
struct Loader<'a> {
    checkpoint: &'a Checkpoint,
    kernels: &'a dyn Kernels,
}

impl Loader<'_> {
    fn layer(&self, layer: usize) -> Result<LayerWeights, ModelError> {
        let arch = self.checkpoint.architecture();
        let names = self.checkpoint.layout().names;
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
        let arch = self.checkpoint.architecture();
        let Layout { names, moe } = self.checkpoint.layout();
        match (arch.layers[layer].ffn, moe) {
            (FfnSpec::Moe { experts, .. }, Some(moe)) => {
                let name = in_layer(moe.router, layer);
                let gate = self.checkpoint.tensor(&name, &[experts, arch.hidden])?.matrix();
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
        Ok(self.kernels.pack(self.checkpoint.tensor(name, &shape)?.matrix()))
    }

    fn norm(&self, name: &str, layer: usize) -> Result<Vec<f32>, ModelError> {
        let hidden = self.checkpoint.architecture().hidden;
        Ok(self.checkpoint.tensor(&in_layer(name, layer), &[hidden])?.to_f32())
    }
}
