//! One pass of a step's rows through the model: attention here, experts wherever they are.
//!
//! Rows of different sequences lie side by side; the only thing that ties a row to its sequence is
//! the block table that its attention reads. Since kernels are batch-invariant and experts come
//! back unreduced, a row's logits depend on its own sequence alone.
//!
//! A step with many rows is cut into two micro-batches that take turns: while the experts of one
//! are computed elsewhere, the other attends here.
//!
//! ```text
//!   here       attend A │ attend B │ combine A, attend A │ combine B, attend B │ …
//!   at nodes            │ experts of A │ experts of B    │ experts of A        │ …
//! ```
//!
//! In each layer A attends first, so the keys that a row of B needs of an earlier row of its
//! sequence have been written.
//!
//! What it does not know: scheduling, sampling, nodes, placement.

use std::ops::Range;
use std::sync::Arc;

use entente_model::config::{FfnSpec, Scoring};
use entente_model::kernels::{
    AttentionRow, AttentionShape, BLOCK_LEN, FfnGroup, Kernels, KvDtype, KvLayer, Matrix,
};
use entente_model::{Architecture, CoordinatorWeights, FfnWeights, Rope};
use entente_proto::ids::LayerId;
use entente_router::exchange::Failure;
use entente_router::gate::{self, Choice, GateSpec};

use super::exchanger::{Exchanger, InFlight, Rows};
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
    micro_batch_rows_min: usize,
    buffers: Buffers,
    metrics: Arc<Metrics>,
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
    // What follows belongs to one micro-batch at a time and holds nothing between its turns.
    /// The residual stream after a norm, `[rows, hidden]`.
    normed: Vec<f32>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    attended: Vec<f32>,
    /// What attention or a feed-forward adds to the residual stream, `[rows, hidden]`.
    delta: Vec<f32>,
    gate_logits: Vec<f32>,
    logits: Vec<f32>,
}

/// The first `len` values of a buffer that grows and never shrinks. They hold what was left there.
fn prefix(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    &mut buffer[..len]
}

/// A step's rows as attention sees them.
struct Positions<'a> {
    rows: Vec<AttentionRow<'a>>,
    /// Where each row's key and value go.
    slots: Vec<usize>,
}

impl<'a> Positions<'a> {
    fn of(chunks: &'a [Chunk]) -> Self {
        let rows: Vec<AttentionRow<'a>> = chunks
            .iter()
            .flat_map(|chunk| (0..chunk.tokens.len()).map(move |offset| (chunk, offset)))
            .map(|(chunk, offset)| AttentionRow {
                blocks: &chunk.blocks,
                position: chunk.start + offset,
            })
            .collect();
        let slot = |row: &AttentionRow<'_>| {
            row.blocks[row.position / BLOCK_LEN] as usize * BLOCK_LEN + row.position % BLOCK_LEN
        };
        let slots = rows.iter().map(slot).collect();
        Self { rows, slots }
    }
}

/// Cuts the rows of a step into micro-batches: two halves if each has `rows_min` rows, else one.
fn micro_batches(rows: usize, rows_min: usize) -> Vec<Range<usize>> {
    let half = rows.div_ceil(2);
    if rows / 2 >= rows_min {
        vec![0..half, half..rows]
    } else {
        std::iter::once(0..rows).collect()
    }
}

impl Forward {
    /// Puts weights and an empty cache together. Where exchanges overlap, steps
    /// with twice `micro_batch_rows_min` rows are cut in two.
    pub fn new(
        architecture: Architecture,
        weights: CoordinatorWeights,
        kernels: Arc<dyn Kernels>,
        CacheShape { blocks, dtype }: CacheShape,
        micro_batch_rows_min: usize,
        metrics: Arc<Metrics>,
    ) -> Self {
        let rope = Rope::new(&architecture.rope);
        let gates = architecture.layers.iter().map(|layer| gate_spec(&layer.ffn)).collect();
        let cache = architecture
            .layers
            .iter()
            .map(|_| KvLayer::new(architecture.kv_heads, architecture.head_dim, blocks, dtype))
            .collect();
        let buffers = Buffers::default();
        Self {
            architecture,
            weights,
            kernels,
            rope,
            cache,
            gates,
            micro_batch_rows_min,
            buffers,
            metrics,
        }
    }

    /// Logits of `step.logit_rows`, `[logit_rows, vocab]`. The rows' keys and values are in the
    /// cache afterwards. On failure the cache may hold some of them, which does no harm: they are
    /// written again, with the same values, when the rows are computed again.
    pub fn run(
        &mut self,
        step: &StepRows<'_>,
        exchanger: &mut Exchanger,
    ) -> Result<Vec<f32>, Failure> {
        let positions = Positions::of(step.chunks);
        let rows = positions.rows.len();
        self.begin(step.chunks, &positions);
        let rows_min = if exchanger.overlaps() { self.micro_batch_rows_min } else { usize::MAX };
        self.layers(&micro_batches(rows, rows_min), &positions, exchanger)?;
        Ok(self.logits(step.logit_rows))
    }

    /// The threads that computed the logits, for what is done with them.
    pub fn kernels(&self) -> &dyn Kernels {
        self.kernels.as_ref()
    }

    /// Takes logits back once they are no longer needed, so that the next step's use their memory.
    pub fn reuse(&mut self, logits: Vec<f32>) {
        self.buffers.logits = logits;
    }

    /// Embeds the step's tokens and looks the rotations up.
    fn begin(&mut self, chunks: &[Chunk], positions: &Positions<'_>) {
        let Buffers { x, cos, sin, .. } = &mut self.buffers;
        let (hidden, rows) = (self.architecture.hidden, positions.rows.len());
        let tokens = chunks.iter().flat_map(|chunk| &chunk.tokens);
        for (token, row) in tokens.zip(prefix(x, rows * hidden).chunks_exact_mut(hidden)) {
            self.weights.embed.lookup(*token, row);
        }
        let rotations = rows * self.rope.half_dim();
        let positions: Vec<usize> = positions.rows.iter().map(|row| row.position).collect();
        self.rope.fill(&positions, prefix(cos, rotations), prefix(sin, rotations));
    }

    /// Takes all micro-batches through all layers. A micro-batch's turn begins with what its rows
    /// get from the experts of the layer before.
    fn layers(
        &mut self,
        batches: &[Range<usize>],
        positions: &Positions<'_>,
        exchanger: &mut Exchanger,
    ) -> Result<(), Failure> {
        let mut in_flight: Vec<Option<InFlight>> = batches.iter().map(|_| None).collect();
        for layer in 0..self.architecture.layers.len() {
            for (batch, in_flight) in batches.iter().zip(&mut in_flight) {
                self.finish(batch, in_flight.take(), exchanger)?;
                self.attention(layer, batch, positions);
                *in_flight = self.feed_forward(layer, batch, exchanger);
            }
        }
        for (batch, in_flight) in batches.iter().zip(in_flight) {
            self.finish(batch, in_flight, exchanger)?;
        }
        Ok(())
    }

    /// `x += o(attention(q, k, v))` of the normed rows.
    fn attention(&mut self, layer: usize, batch: &Range<usize>, positions: &Positions<'_>) {
        let Self { architecture: arch, kernels, cache, weights, buffers, .. } = self;
        let (weights, cache) = (&weights.layers[layer], &mut cache[layer]);
        let (count, half_dim) = (batch.len(), self.rope.half_dim());
        let x = &mut buffers.x[batch.start * arch.hidden..batch.end * arch.hidden];
        let normed = prefix(&mut buffers.normed, x.len());
        let q = prefix(&mut buffers.q, count * arch.heads * arch.head_dim);
        let k = prefix(&mut buffers.k, count * arch.kv_heads * arch.head_dim);
        let v = prefix(&mut buffers.v, k.len());

        kernels.rms_norm(x, &weights.input_norm, arch.rms_eps, normed);
        let products = &mut [(&weights.q, &mut *q), (&weights.k, &mut *k), (&weights.v, &mut *v)];
        kernels.matmul_many(normed, products);
        let turned = batch.start * half_dim..batch.end * half_dim;
        let (cos, sin) = (&buffers.cos[turned.clone()], &buffers.sin[turned]);
        kernels.rope(q, arch.heads, arch.head_dim, cos, sin);
        kernels.rope(k, arch.kv_heads, arch.head_dim, cos, sin);
        kernels.write_kv(cache, &positions.slots[batch.clone()], k, v);

        let shape = AttentionShape {
            heads: arch.heads,
            kv_heads: arch.kv_heads,
            head_dim: arch.head_dim,
            window: arch.layers[layer].window,
            scale: (arch.head_dim as f32).powf(-0.5),
        };
        let attended = prefix(&mut buffers.attended, q.len());
        kernels.attention(&shape, q, &positions.rows[batch.clone()], cache, attended);
        let delta = prefix(&mut buffers.delta, x.len());
        kernels.matmul(attended, &weights.o, delta);
        kernels.add(x, delta);
    }

    /// `x += ffn(norm(x))`: at once for a dense layer, which is computed here; for an MoE layer
    /// the rows are sent to their experts, and [`Self::finish`] adds what comes back.
    fn feed_forward(
        &mut self,
        layer: usize,
        batch: &Range<usize>,
        exchanger: &mut Exchanger,
    ) -> Option<InFlight> {
        let Self { architecture: arch, kernels, buffers, .. } = self;
        let weights = &self.weights.layers[layer];
        let x = &mut buffers.x[batch.start * arch.hidden..batch.end * arch.hidden];
        let normed = prefix(&mut buffers.normed, x.len());
        kernels.rms_norm(x, &weights.post_norm, arch.rms_eps, normed);
        match (&weights.ffn, &self.gates[layer]) {
            (FfnWeights::Moe { gate }, Some(spec)) => {
                let logits = prefix(&mut buffers.gate_logits, batch.len() * spec.experts);
                let choices = route(kernels.as_ref(), gate, spec, normed, logits);
                let layer = LayerId(layer as u16);
                self.metrics.count_choices(layer, &choices);
                let (hidden, top_k) = (arch.hidden, spec.top_k);
                let first_row = batch.start;
                let rows = Rows { layer, hidden, values: normed, choices, top_k, first_row };
                Some(exchanger.start(rows))
            }
            (FfnWeights::Dense(ffn), None) => {
                let rows: Vec<(u32, u32)> = (0..batch.len() as u32).map(|r| (r, r)).collect();
                let delta = prefix(&mut buffers.delta, x.len());
                kernels.gated_ffn(normed, &[FfnGroup { ffn, rows: &rows }], delta);
                kernels.add(x, delta);
                None
            }
            _ => unreachable!("the weights were loaded by this same architecture"),
        }
    }

    /// Adds what the experts made of a micro-batch, if it has been sent to any.
    fn finish(
        &mut self,
        batch: &Range<usize>,
        in_flight: Option<InFlight>,
        exchanger: &mut Exchanger,
    ) -> Result<(), Failure> {
        let Some(in_flight) = in_flight else { return Ok(()) };
        let hidden = self.architecture.hidden;
        let x = &mut self.buffers.x[batch.start * hidden..batch.end * hidden];
        let delta = prefix(&mut self.buffers.delta, x.len());
        delta.fill(0.0);
        exchanger.finish(in_flight, delta)?;
        self.kernels.add(x, delta);
        Ok(())
    }

    fn logits(&mut self, wanted: &[usize]) -> Vec<f32> {
        let hidden = self.architecture.hidden;
        let Buffers { x, normed, attended, logits, .. } = &mut self.buffers;
        let (rows, normed) =
            (prefix(attended, wanted.len() * hidden), prefix(normed, wanted.len() * hidden));
        for (row, copy) in wanted.iter().zip(rows.chunks_exact_mut(hidden)) {
            copy.copy_from_slice(&x[row * hidden..(row + 1) * hidden]);
        }
        self.kernels.rms_norm(rows, &self.weights.norm, self.architecture.rms_eps, normed);
        let mut logits = std::mem::take(logits);
        logits.resize(wanted.len() * self.architecture.vocab, 0.0);
        self.kernels.matmul(normed, &self.weights.head, &mut logits);
        logits
    }
}

fn route(
    kernels: &dyn Kernels,
    gate: &Matrix,
    spec: &GateSpec,
    normed: &[f32],
    logits: &mut [f32],
) -> Vec<Choice> {
    kernels.matmul(normed, gate, logits);
    let mut choices = Vec::with_capacity(logits.len() / spec.experts * spec.top_k);
    gate::choose(spec, logits, &mut choices);
    choices
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_halved_once_both_halves_are_large_enough() {
        let lens = |rows, rows_min| -> Vec<usize> {
            micro_batches(rows, rows_min).iter().map(Range::len).collect()
        };
        assert_eq!(lens(7, 4), [7]);
        assert_eq!(lens(512, usize::MAX), [512]);
        assert_eq!(lens(8, 4), [4, 4]);
        assert_eq!(micro_batches(9, 4), [0..5, 5..9]);
    }

    #[test]
    fn a_row_is_where_its_sequence_has_its_position() {
        let chunk = |start, len: usize, blocks| Chunk {
            id: super::super::scheduler::SequenceId(1),
            start,
            tokens: vec![1; len],
            blocks,
            reaches_end: true,
            draft_len: 0,
        };
        let chunks = [chunk(BLOCK_LEN - 1, 2, vec![5, 3]), chunk(0, 1, vec![9])];
        let positions = Positions::of(&chunks);
        let at = |row: &AttentionRow<'_>| row.position;
        assert_eq!(positions.rows.iter().map(at).collect::<Vec<_>>(), [15, 16, 0]);
        assert_eq!(positions.slots, [5 * BLOCK_LEN + 15, 3 * BLOCK_LEN, 9 * BLOCK_LEN]);
    }
}
