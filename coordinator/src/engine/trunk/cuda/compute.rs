//! The arithmetic of a step on the device: which kernels a piece of work is.
//!
//! All of it is launches into a stream, on memory that was set aside and that others fill and read.
//! Nothing here waits, copies or takes memory, so that whatever is issued can be recorded as well.
//!
//! What it does not know: exchanges, copies to and from the host, whether it is being recorded.

use std::ops::Range;
use std::slice;

use entente_model::kernels::cuda::{Buffer, DenseFfn, KvView, Stream, row_pairs};
use entente_model::kernels::{DeviceError, GatedFfn, Matrix};
use entente_model::{Architecture, FfnWeights};

use super::memory::{Activations, KvCache, Layer, StepMemory};
use super::plan::{self, Piece};

/// A part of a step, of the rows of one micro-batch or of those whose logits are wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Work {
    /// `x += delta`.
    Add(Range<usize>),
    /// `x += o(attention(q, k, v))`.
    Attend(usize, Range<usize>),
    /// `x += ffn(norm(x))` of a dense layer.
    FeedForward(usize, Range<usize>),
    /// `norm(x)` as words, and the gate's logits of it.
    Route(usize, Range<usize>),
    /// Logits of some rows, which ascend, and a token of each.
    Head(Vec<Range<usize>>),
}

impl Work {
    /// Whether it is of these rows and no others.
    pub fn is_of(&self, all: &Range<usize>) -> bool {
        match self {
            Self::Add(rows)
            | Self::Attend(_, rows)
            | Self::FeedForward(_, rows)
            | Self::Route(_, rows) => rows == all,
            Self::Head(runs) => runs == slice::from_ref(all),
        }
    }
}

/// How the rows of a step lie in memory.
#[derive(Default)]
pub(super) struct Layout {
    /// Rows of the step.
    pub rows: usize,
    /// Blocks of all their sequences.
    pub tables: usize,
    /// Rows that attend in one launch, those of one micro-batch after those of another, and their
    /// runs among those of the step.
    pub pieces: Vec<(Piece, Range<usize>)>,
}

/// Weights, cache and activations.
pub(super) struct Compute {
    pub architecture: Architecture,
    pub layers: Vec<Layer>,
    pub norm: Buffer<f32>,
    pub head: Matrix,
    /// Half of the values that rotate.
    pub half_dim: usize,
    pub cache: Vec<KvCache>,
    pub step: StepMemory,
    pub activations: Activations,
    pub dense: DenseFfn,
    pub layout: Layout,
}

/// The values of some rows of `len` values.
pub(super) fn values(rows: &Range<usize>, len: usize) -> Range<usize> {
    rows.start * len..rows.end * len
}

/// The feed-forwards of all dense layers.
pub(super) fn dense_ffns(layers: &[Layer]) -> impl Iterator<Item = &GatedFfn> {
    layers.iter().filter_map(|layer| match &layer.ffn {
        FfnWeights::Dense(ffn) => Some(ffn),
        FfnWeights::Moe { .. } => None,
    })
}

impl Compute {
    /// Puts work into the stream, one piece after the other.
    pub fn issue(&mut self, stream: &Stream, works: &[Work]) -> Result<(), DeviceError> {
        works.iter().try_for_each(|work| match work {
            Work::Add(rows) => self.add(stream, rows),
            Work::Attend(layer, rows) => self.attend(stream, *layer, rows),
            Work::FeedForward(layer, rows) => self.feed_forward(stream, *layer, rows),
            Work::Route(layer, rows) => self.route(stream, *layer, rows),
            Work::Head(runs) => self.head(stream, runs),
        })
    }

    fn add(&mut self, stream: &Stream, rows: &Range<usize>) -> Result<(), DeviceError> {
        let Self { architecture: arch, step, activations: a, .. } = self;
        let delta = a.delta.slice(0..rows.len() * arch.hidden);
        stream.add(step.x.slice_mut(values(rows, arch.hidden)), delta)
    }

    fn attend(
        &mut self,
        stream: &Stream,
        layer: usize,
        rows: &Range<usize>,
    ) -> Result<(), DeviceError> {
        self.project(stream, layer, rows)?;
        self.attention(stream, layer, rows)?;
        let Self { architecture: arch, activations: a, .. } = self;
        let (count, len) = (rows.len(), arch.heads * arch.head_dim);
        let words = 0..count * row_pairs(len);
        let attended = a.attended.slice(0..count * len);
        stream.round_rows(attended, len, a.words.slice_mut(words.clone()))?;
        let (o, delta) = (&self.layers[layer].o, 0..count * arch.hidden);
        stream.matmul(o, a.words.slice(words), count, a.delta.slice_mut(delta))?;
        self.add(stream, rows)
    }

    /// Queries, keys and values of some rows, turned to their positions; keys and values go into the
    /// cache.
    fn project(
        &mut self,
        stream: &Stream,
        layer: usize,
        rows: &Range<usize>,
    ) -> Result<(), DeviceError> {
        let Self { architecture: arch, step, activations: a, layout, half_dim, .. } = self;
        let (weights, cache) = (&self.layers[layer], &mut self.cache[layer]);
        let (count, heads) = (rows.len(), [arch.heads, arch.head_dim]);
        let kv_heads = [arch.kv_heads, arch.head_dim];
        let x = step.x.slice(values(rows, arch.hidden));
        let words = 0..count * row_pairs(arch.hidden);
        let (q, kv) = (0..count * heads[0] * heads[1], 0..count * kv_heads[0] * kv_heads[1]);

        let norm = weights.input_norm.view();
        stream.rms_norm(x, norm, arch.rms_eps, None, Some(a.words.slice_mut(words.clone())))?;
        let normed = a.words.slice(words);
        stream.matmul(&weights.q, normed, count, a.q.slice_mut(q.clone()))?;
        stream.matmul(&weights.k, normed, count, a.k.slice_mut(kv.clone()))?;
        stream.matmul(&weights.v, normed, count, a.v.slice_mut(kv.clone()))?;

        let (turned, sines) = (values(rows, *half_dim), layout.rows * *half_dim);
        let cos = step.rotations.slice(turned.clone());
        let sin = step.rotations.slice(sines + turned.start..sines + turned.end);
        stream.rope(a.q.slice_mut(q), heads, cos, sin)?;
        stream.rope(a.k.slice_mut(kv.clone()), kv_heads, cos, sin)?;
        let both = [cache.keys.view_mut(), cache.values.view_mut()];
        let slots = step.places.slice(rows.clone());
        stream.write_kv(both, slots, kv_heads, a.k.slice(kv.clone()), a.v.slice(kv))
    }

    /// Attention of the rows of a micro-batch, piece by piece.
    fn attention(
        &mut self,
        stream: &Stream,
        layer: usize,
        rows: &Range<usize>,
    ) -> Result<(), DeviceError> {
        let Self { architecture: arch, step, activations: a, layout, .. } = self;
        let shape = plan::shape(arch, arch.layers[layer].window);
        let tables = layout.rows..layout.rows + layout.tables;
        let own = layout.pieces.iter().filter(|(piece, _)| rows.contains(&piece.rows.start));
        for (piece, runs) in own {
            let within = piece.rows.start - rows.start..piece.rows.end - rows.start;
            let len = values(&within, arch.heads * arch.head_dim);
            let cache = KvView {
                keys: self.cache[layer].keys.view(),
                values: self.cache[layer].values.view(),
                tables: step.places.slice(tables.clone()),
                runs: step.runs.slice(runs.clone()),
            };
            let (partial, out) = (a.partial.view_mut(), a.attended.slice_mut(len.clone()));
            stream.attention(&shape, a.q.slice(len), &cache, piece.splits, partial, out)?;
        }
        Ok(())
    }

    /// `norm(x)` before the feed-forward, as words and for a gate also in f32.
    fn normed(
        &mut self,
        stream: &Stream,
        layer: usize,
        rows: &Range<usize>,
    ) -> Result<(), DeviceError> {
        let Self { architecture: arch, step, activations: a, .. } = self;
        let weight = self.layers[layer].post_norm.view();
        let x = step.x.slice(values(rows, arch.hidden));
        let normed = a.normed.slice_mut(0..x.len());
        let words = a.words.slice_mut(0..rows.len() * row_pairs(arch.hidden));
        stream.rms_norm(x, weight, arch.rms_eps, Some(normed), Some(words))
    }

    fn feed_forward(
        &mut self,
        stream: &Stream,
        layer: usize,
        rows: &Range<usize>,
    ) -> Result<(), DeviceError> {
        self.normed(stream, layer, rows)?;
        let Self { architecture: arch, activations: a, .. } = self;
        let FfnWeights::Dense(ffn) = &self.layers[layer].ffn else {
            unreachable!("the weights were loaded by this same architecture");
        };
        let (count, delta) = (rows.len(), 0..rows.len() * arch.hidden);
        let words = a.words.slice(0..count * row_pairs(arch.hidden));
        self.dense.run(stream, ffn, words, count, a.delta.slice_mut(delta))?;
        self.add(stream, rows)
    }

    fn route(
        &mut self,
        stream: &Stream,
        layer: usize,
        rows: &Range<usize>,
    ) -> Result<(), DeviceError> {
        self.normed(stream, layer, rows)?;
        let Self { architecture: arch, activations: a, .. } = self;
        let gate = self.layers[layer].gate();
        let normed = a.normed.slice(0..rows.len() * arch.hidden);
        let logits = a.gate_logits.slice_mut(0..rows.len() * gate.out_features());
        stream.matmul_exact(gate, normed, rows.len(), logits)
    }

    fn head(&mut self, stream: &Stream, runs: &[Range<usize>]) -> Result<(), DeviceError> {
        let Self { architecture: arch, step, activations: a, .. } = self;
        let row_words = row_pairs(arch.hidden);
        let mut count = 0;
        for run in runs {
            let x = step.x.slice(values(run, arch.hidden));
            let words = a.words.slice_mut(values(&(count..count + run.len()), row_words));
            stream.rms_norm(x, self.norm.view(), arch.rms_eps, None, Some(words))?;
            count += run.len();
        }
        let (words, logits) = (a.words.slice(0..count * row_words), 0..count * arch.vocab);
        stream.matmul(&self.head, words, count, a.logits.slice_mut(logits.clone()))?;
        let (logits, draws) = (a.logits.slice(logits), a.draws.slice(0..count));
        stream.draw(logits, arch.vocab, draws, a.tokens.slice_mut(0..count))
    }
}
