//! One pass of a step's rows through the model: attention here, experts wherever they are.
//!
//! Rows of different sequences lie side by side; the only thing that ties a row to its sequence is
//! the block table that its attention reads. Since kernels are batch-invariant and experts come
//! back unreduced, a row's logits depend on its own sequence alone.
//!
//! What it does not know: scheduling, sampling, nodes, placement.

use std::sync::Arc;

use entente_model::config::{FfnSpec, Scoring};
use entente_model::kernels::{
    AttentionRow, AttentionShape, BLOCK_LEN, FfnGroup, Kernels, KvDtype, KvLayer, Matrix,
};
use entente_model::{Architecture, CoordinatorWeights, FfnWeights, Rope};
use entente_proto::ids::LayerId;
use entente_router::exchange::Failure;
use entente_router::gate::{self, Choice, GateSpec};

use super::exchanger::{Exchanger, Rows};
use super::scheduler::Chunk;
use crate::metrics::Metrics;

/// What a step computes.
pub struct StepRows<'a> {
    /// The chunks, whose rows lie one after the other in this order.
    pub chunks: &'a [Chunk],
    /// Rows whose logits are wanted, ascending.
    pub logit_rows: &'a [usize],
}

/// What the KV cache of every layer is made of.
#[derive(Debug, Clone, Copy)]
pub struct CacheShape {
    /// Blocks of [`BLOCK_LEN`] positions.
    pub blocks: usize,
    /// How keys and values are kept.
    pub dtype: KvDtype,
}

/// The coordinator's part of a model, with its KV cache.
pub struct Forward {
    architecture: Architecture,
    weights: CoordinatorWeights,
    kernels: Arc<dyn Kernels>,
    rope: Rope,
    cache: Vec<KvLayer>,
    /// How each layer's gate chooses; absent for a dense layer.
    gates: Vec<Option<GateSpec>>,
    metrics: Arc<Metrics>,
}

/// Activations of one step that every layer works on.
struct Activations {
    /// The residual stream, `[rows, hidden]`.
    x: Vec<f32>,
    /// The residual stream after a norm, `[rows, hidden]`.
    normed: Vec<f32>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    /// What attention or a feed-forward adds to the residual stream.
    delta: Vec<f32>,
}

impl Forward {
    /// Puts weights and an empty cache together.
    pub fn new(
        architecture: Architecture,
        weights: CoordinatorWeights,
        kernels: Arc<dyn Kernels>,
        CacheShape { blocks, dtype }: CacheShape,
        metrics: Arc<Metrics>,
    ) -> Self {
        let rope = Rope::new(&architecture.rope);
        let gates = architecture.layers.iter().map(|layer| gate_spec(&layer.ffn)).collect();
        let cache = architecture
            .layers
            .iter()
            .map(|_| KvLayer::new(architecture.kv_heads, architecture.head_dim, blocks, dtype))
            .collect();
        Self { architecture, weights, kernels, rope, cache, gates, metrics }
    }

    /// Logits of `step.logit_rows`, `[logit_rows, vocab]`. The rows' keys and values are in the
    /// cache afterwards. On failure the cache may hold some of them, which does no harm: they are
    /// written again, with the same values, when the rows are computed again.
    pub fn run(
        &mut self,
        step: &StepRows<'_>,
        exchanger: &mut Exchanger,
    ) -> Result<Vec<f32>, Failure> {
        let architecture = &self.architecture;
        let positions: Vec<usize> =
            step.chunks.iter().flat_map(|c| c.start..c.start + c.tokens.len()).collect();
        let rows = positions.len();
        let (hidden, head_dim) = (architecture.hidden, architecture.head_dim);
        let mut acts = Activations {
            x: vec![0.0; rows * hidden],
            normed: vec![0.0; rows * hidden],
            q: vec![0.0; rows * architecture.heads * head_dim],
            k: vec![0.0; rows * architecture.kv_heads * head_dim],
            v: vec![0.0; rows * architecture.kv_heads * head_dim],
            delta: vec![0.0; rows * hidden],
        };
        let tokens = step.chunks.iter().flat_map(|chunk| &chunk.tokens);
        for (token, row) in tokens.zip(acts.x.chunks_exact_mut(hidden)) {
            self.weights.embed.lookup(*token, row);
        }
        let half_dim = self.rope.half_dim();
        let (mut cos, mut sin) = (vec![0.0; rows * half_dim], vec![0.0; rows * half_dim]);
        self.rope.fill(&positions, &mut cos, &mut sin);
        for layer in 0..architecture.layers.len() {
            self.attention(layer, step.chunks, &positions, (&cos, &sin), &mut acts);
            self.kernels.add(&mut acts.x, &acts.delta);
            self.feed_forward(layer, &mut acts, exchanger)?;
            self.kernels.add(&mut acts.x, &acts.delta);
        }
        Ok(self.logits(&acts.x, step.logit_rows))
    }

    /// `delta = o(attention(q, k, v))` of the normed rows.
    fn attention(
        &mut self,
        layer: usize,
        chunks: &[Chunk],
        positions: &[usize],
        (cos, sin): (&[f32], &[f32]),
        acts: &mut Activations,
    ) {
        let Self { architecture: arch, kernels, cache, weights, .. } = self;
        let weights = &weights.layers[layer];
        let cache = &mut cache[layer];
        kernels.rms_norm(&acts.x, &weights.input_norm, arch.rms_eps, &mut acts.normed);
        let (q, k, v) = (&mut acts.q[..], &mut acts.k[..], &mut acts.v[..]);
        let products = &mut [(&weights.q, q), (&weights.k, k), (&weights.v, v)];
        kernels.matmul_many(&acts.normed, products);
        kernels.rope(&mut acts.q, arch.heads, arch.head_dim, cos, sin);
        kernels.rope(&mut acts.k, arch.kv_heads, arch.head_dim, cos, sin);

        let blocks = chunks.iter().flat_map(|c| c.tokens.iter().map(|_| c.blocks.as_slice()));
        let rows: Vec<AttentionRow<'_>> = blocks
            .zip(positions)
            .map(|(blocks, &position)| AttentionRow { blocks, position })
            .collect();
        let slot = |row: &AttentionRow<'_>| {
            row.blocks[row.position / BLOCK_LEN] as usize * BLOCK_LEN + row.position % BLOCK_LEN
        };
        let slots: Vec<usize> = rows.iter().map(slot).collect();
        kernels.write_kv(cache, &slots, &acts.k, &acts.v);

        let shape = AttentionShape {
            heads: arch.heads,
            kv_heads: arch.kv_heads,
            head_dim: arch.head_dim,
            window: arch.layers[layer].window,
            scale: (arch.head_dim as f32).powf(-0.5),
        };
        let mut attended = vec![0.0; acts.q.len()];
        kernels.attention(&shape, &acts.q, &rows, cache, &mut attended);
        kernels.matmul(&attended, &weights.o, &mut acts.delta);
    }

    /// `delta = ffn(norm(x))`, on this process for a dense layer, by exchange for an MoE layer.
    fn feed_forward(
        &mut self,
        layer: usize,
        acts: &mut Activations,
        exchanger: &mut Exchanger,
    ) -> Result<(), Failure> {
        let weights = &self.weights.layers[layer];
        let eps = self.architecture.rms_eps;
        self.kernels.rms_norm(&acts.x, &weights.post_norm, eps, &mut acts.normed);
        acts.delta.fill(0.0);
        let hidden = self.architecture.hidden;
        match (&weights.ffn, &self.gates[layer]) {
            (FfnWeights::Moe { gate }, Some(spec)) => {
                let choices = self.route(gate, spec, &acts.normed);
                let layer = LayerId(layer as u16);
                self.metrics.count_choices(layer, &choices);
                let values = &acts.normed;
                let rows = Rows { layer, hidden, values, choices, top_k: spec.top_k };
                exchanger.exchange(rows, &mut acts.delta)
            }
            (FfnWeights::Dense(ffn), None) => {
                let count = (acts.x.len() / hidden) as u32;
                let rows: Vec<(u32, u32)> = (0..count).map(|row| (row, row)).collect();
                let group = FfnGroup { ffn, rows: &rows };
                self.kernels.gated_ffn(&acts.normed, &[group], &mut acts.delta);
                Ok(())
            }
            _ => unreachable!("the weights were loaded by this same architecture"),
        }
    }

    fn route(&self, gate: &Matrix, spec: &GateSpec, normed: &[f32]) -> Vec<Choice> {
        let rows = normed.len() / self.architecture.hidden;
        let mut logits = vec![0.0; rows * spec.experts];
        self.kernels.matmul(normed, gate, &mut logits);
        let mut choices = Vec::with_capacity(rows * spec.top_k);
        gate::choose(spec, &logits, &mut choices);
        choices
    }

    fn logits(&self, x: &[f32], wanted: &[usize]) -> Vec<f32> {
        let hidden = self.architecture.hidden;
        let mut rows = Vec::with_capacity(wanted.len() * hidden);
        for row in wanted {
            rows.extend_from_slice(&x[row * hidden..(row + 1) * hidden]);
        }
        let mut normed = vec![0.0; rows.len()];
        self.kernels.rms_norm(&rows, &self.weights.norm, self.architecture.rms_eps, &mut normed);
        let mut logits = vec![0.0; wanted.len() * self.architecture.vocab];
        self.kernels.matmul(&normed, &self.weights.head, &mut logits);
        logits
    }
}

/// The router's form of what the model says about a layer's gate.
fn gate_spec(ffn: &FfnSpec) -> Option<GateSpec> {
    match *ffn {
        FfnSpec::Dense { .. } => None,
        FfnSpec::Moe { experts, top_k, scoring: Scoring::Softmax { renormalise }, .. } => {
            Some(GateSpec { experts, top_k, renormalise })
        }
    }
}
