//! The trunk on a processor: kernels over slices in this process's memory.
//!
//! What it does not know: gates' choices, exchanges, micro-batches beyond the rows it is given.

use std::ops::Range;
use std::sync::Arc;

use entente_model::kernels::{AttentionShape, DeviceError, FfnGroup, Kernels, KvDtype, KvLayer};
use entente_model::{Architecture, CoordinatorWeights, FfnWeights, Rope};
use entente_proto::ids::KernelClass;

use super::super::scheduler::Chunk;
use super::positions::Positions;
use super::{Answers, Trunk, Wanted};

/// What the KV cache of every layer is made of.
#[derive(Debug, Clone, Copy)]
pub struct CacheShape {
    /// Blocks of [`BLOCK_LEN`](entente_model::kernels::BLOCK_LEN) positions.
    pub blocks: usize,
    /// How keys and values are kept.
    pub dtype: KvDtype,
}

/// Weights, cache and activations in memory, and the kernels that work on them.
pub struct CpuTrunk {
    architecture: Architecture,
    weights: CoordinatorWeights,
    kernels: Arc<dyn Kernels>,
    rope: Rope,
    cache: Vec<KvLayer>,
    positions: Positions,
    buffers: Buffers,
}

/// Activations. They are kept from step to step: to get megabytes from the system and give them
/// back costs more than to fill them.
#[derive(Default)]
struct Buffers {
    /// The residual stream of the whole step, `[rows, hidden]`.
    x: Vec<f32>,
    /// Rotations of the whole step, `[rows, head_dim / 2]` each.
    cos: Vec<f32>,
    sin: Vec<f32>,
    // What follows holds nothing between two calls.
    /// The residual stream after a norm, `[rows, hidden]`.
    normed: Vec<f32>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    attended: Vec<f32>,
    /// What attention or a feed-forward adds to the residual stream, `[rows, hidden]`.
    delta: Vec<f32>,
    gate_logits: Vec<f32>,
}

/// The first `len` values of a buffer that grows and never shrinks. They hold what was left there.
fn prefix(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    &mut buffer[..len]
}

impl CpuTrunk {
    /// Puts weights and an empty cache together.
    pub fn new(
        architecture: Architecture,
        weights: CoordinatorWeights,
        kernels: Arc<dyn Kernels>,
        CacheShape { blocks, dtype }: CacheShape,
    ) -> Self {
        let rope = Rope::new(&architecture.rope);
        let cache = architecture
            .layers
            .iter()
            .map(|_| KvLayer::new(architecture.kv_heads, architecture.head_dim, blocks, dtype))
            .collect();
        let (positions, buffers) = (Positions::default(), Buffers::default());
        Self { architecture, weights, kernels, rope, cache, positions, buffers }
    }
}

/// The values of some rows of `hidden` values.
fn values(rows: &Range<usize>, hidden: usize) -> Range<usize> {
    rows.start * hidden..rows.end * hidden
}

impl Trunk for CpuTrunk {
    fn class(&self) -> &KernelClass {
        self.kernels.class()
    }

    fn begin(&mut self, chunks: &[Chunk], _batches: &[Range<usize>]) -> Result<(), DeviceError> {
        self.positions = Positions::of(chunks);
        let Buffers { x, cos, sin, .. } = &mut self.buffers;
        let (hidden, rows) = (self.architecture.hidden, self.positions.len());
        let tokens = chunks.iter().flat_map(|chunk| &chunk.tokens);
        for (token, row) in tokens.zip(prefix(x, rows * hidden).chunks_exact_mut(hidden)) {
            self.weights.embed.lookup(*token, row);
        }
        let rotations = rows * self.rope.half_dim();
        let (cos, sin) = (prefix(cos, rotations), prefix(sin, rotations));
        self.rope.fill(&self.positions.positions, cos, sin);
        Ok(())
    }

    fn attend(&mut self, layer: usize, rows: Range<usize>) -> Result<(), DeviceError> {
        let Self { architecture: arch, kernels, cache, weights, buffers, .. } = self;
        let (weights, cache) = (&weights.layers[layer], &mut cache[layer]);
        let (count, half_dim) = (rows.len(), self.rope.half_dim());
        let x = &mut buffers.x[values(&rows, arch.hidden)];
        let normed = prefix(&mut buffers.normed, x.len());
        let q = prefix(&mut buffers.q, count * arch.heads * arch.head_dim);
        let k = prefix(&mut buffers.k, count * arch.kv_heads * arch.head_dim);
        let v = prefix(&mut buffers.v, k.len());

        kernels.rms_norm(x, &weights.input_norm, arch.rms_eps, normed);
        let products = &mut [(&weights.q, &mut *q), (&weights.k, &mut *k), (&weights.v, &mut *v)];
        kernels.matmul_many(normed, products);
        let turned = values(&rows, half_dim);
        let (cos, sin) = (&buffers.cos[turned.clone()], &buffers.sin[turned]);
        kernels.rope(q, arch.heads, arch.head_dim, cos, sin);
        kernels.rope(k, arch.kv_heads, arch.head_dim, cos, sin);
        kernels.write_kv(cache, &self.positions.slots[rows.clone()], k, v);

        let shape = AttentionShape {
            heads: arch.heads,
            kv_heads: arch.kv_heads,
            head_dim: arch.head_dim,
            window: arch.layers[layer].window,
            scale: (arch.head_dim as f32).powf(-0.5),
        };
        let attended = prefix(&mut buffers.attended, q.len());
        kernels.attention(&shape, q, &self.positions.rows(rows), cache, attended);
        let delta = prefix(&mut buffers.delta, x.len());
        kernels.matmul(attended, &weights.o, delta);
        kernels.add(x, delta);
        Ok(())
    }

    fn feed_forward(&mut self, layer: usize, rows: Range<usize>) -> Result<(), DeviceError> {
        let Self { architecture: arch, kernels, weights, buffers, .. } = self;
        let weights = &weights.layers[layer];
        let FfnWeights::Dense(ffn) = &weights.ffn else {
            unreachable!("the weights were loaded by this same architecture");
        };
        let x = &mut buffers.x[values(&rows, arch.hidden)];
        let normed = prefix(&mut buffers.normed, x.len());
        kernels.rms_norm(x, &weights.post_norm, arch.rms_eps, normed);
        let rows: Vec<(u32, u32)> = (0..rows.len() as u32).map(|r| (r, r)).collect();
        let delta = prefix(&mut buffers.delta, x.len());
        kernels.gated_ffn(normed, &[FfnGroup { ffn, rows: &rows }], delta);
        kernels.add(x, delta);
        Ok(())
    }

    fn route(
        &mut self,
        layer: usize,
        rows: Range<usize>,
        encoded: &mut [u8],
    ) -> Result<&[f32], DeviceError> {
        let Self { architecture: arch, kernels, weights, buffers, .. } = self;
        let weights = &weights.layers[layer];
        let FfnWeights::Moe { gate } = &weights.ffn else {
            unreachable!("the weights were loaded by this same architecture");
        };
        let x = &buffers.x[values(&rows, arch.hidden)];
        let normed = prefix(&mut buffers.normed, x.len());
        kernels.rms_norm(x, &weights.post_norm, arch.rms_eps, normed);
        let logits = prefix(&mut buffers.gate_logits, rows.len() * gate.out_features());
        kernels.matmul(normed, gate, logits);
        kernels.encode_rows(normed, encoded);
        Ok(logits)
    }

    fn add(&mut self, rows: Range<usize>, delta: &[f32]) -> Result<(), DeviceError> {
        let x = &mut self.buffers.x[values(&rows, self.architecture.hidden)];
        self.kernels.add(x, delta);
        Ok(())
    }

    /// All of them: whoever reads logits here reads them where they are, on as many threads.
    fn logits(&mut self, wanted: &[Wanted], answers: &mut Answers) -> Result<(), DeviceError> {
        let Architecture { hidden, vocab, rms_eps, .. } = self.architecture;
        let Buffers { x, normed, attended, .. } = &mut self.buffers;
        let len = wanted.len() * hidden;
        let (rows, normed) = (prefix(attended, len), prefix(normed, len));
        for (Wanted { row, .. }, copy) in wanted.iter().zip(rows.chunks_exact_mut(hidden)) {
            copy.copy_from_slice(&x[row * hidden..(row + 1) * hidden]);
        }
        self.kernels.rms_norm(rows, &self.weights.norm, rms_eps, normed);
        let logits = answers.push_logits(wanted.len(), vocab);
        self.kernels.matmul(normed, &self.weights.head, logits);
        Ok(())
    }
}
