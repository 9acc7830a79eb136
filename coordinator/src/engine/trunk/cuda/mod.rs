//! The trunk on a CUDA device: the residual stream, weights, norms and the KV cache stay there.
//!
//! What crosses the bus is, once a step, the embedded rows (looked up here) and where they stand;
//! for each layer and micro-batch the rows for the experts with their gate logits, and what came
//! back of them; and the logits that are wanted. All work goes into one stream in the order of its
//! calls, and only what is copied back is waited for: while the experts of one micro-batch compute,
//! the device attends for the other.
//!
//! All memory is set aside by [`plan`] before the first step.
//!
//! What it does not know: what kernels look like, exchanges, choices.

mod memory;
pub(super) mod plan;

use std::ops::Range;
use std::sync::Arc;

use entente_model::kernels::cuda::{self, DenseFfn, Device, KvView, Stream, row_pairs};
use entente_model::kernels::{DeviceError, Matrix, WeightFormat};
use entente_model::{Architecture, CoordinatorWeights, Embedding, FfnWeights, Rope};
use entente_proto::ids::KernelClass;

use self::memory::{Activations, KvCache, Layer, Placer, Stagings, StepMemory};
pub use self::plan::StepBounds;
use self::plan::{LOGIT_ROWS_MAX, Lengths, Piece};
use super::super::scheduler::Chunk;
use super::Trunk;
use super::positions::Positions;

/// Weights, cache and activations on a device, and the stream of work there.
pub struct CudaTrunk {
    architecture: Architecture,
    class: KernelClass,
    embed: Embedding,
    layers: Vec<Layer>,
    norm: cuda::Buffer<f32>,
    head: Matrix,
    rope: Rope,
    cache: Vec<KvCache>,
    blocks: usize,
    positions: Positions,
    /// Rows that attend in one launch, those of one micro-batch after those of another, and their
    /// runs among those of the step.
    pieces: Vec<(Piece, Range<usize>)>,
    /// As they were copied back last.
    gate_logits: Vec<f32>,
    step: StepMemory,
    activations: Activations,
    dense: DenseFfn,
    stagings: Stagings,
    // Dropped after what its work uses.
    stream: Stream,
}

/// The values of some rows of `len` values.
fn values(rows: &Range<usize>, len: usize) -> Range<usize> {
    rows.start * len..rows.end * len
}

impl CudaTrunk {
    /// Bytes that one block of the cache takes, in all layers.
    pub fn block_bytes(architecture: &Architecture) -> usize {
        plan::block_bytes(architecture)
    }

    /// Takes the weights, packed in `format`, to the device, and sets memory aside for steps within
    /// `bounds` and for a cache of so many blocks, or of those that fit in most of what is left.
    ///
    /// # Errors
    /// The device has no room, no kernels for the architecture or the format, or is lost.
    pub fn new(
        device: &Arc<Device>,
        architecture: Architecture,
        format: WeightFormat,
        weights: CoordinatorWeights,
        bounds: StepBounds,
        blocks: Option<usize>,
    ) -> Result<Self, DeviceError> {
        plan::check(&architecture)?;
        let kernels = cuda::experts(device, format)?;
        let stream = Stream::new(device)?;
        let mut stagings = Stagings::new(device)?;
        let staging = &mut stagings.x;
        let mut placer = Placer { kernels: kernels.as_ref(), stream: &stream, staging };
        let CoordinatorWeights { embed, layers, norm, head } = weights;
        let layers: Result<Vec<_>, _> = layers.into_iter().map(|l| placer.layer(l)).collect();
        let (layers, norm) = (layers?, placer.values(&norm)?);
        let head = kernels.place(head)?;

        let lengths = Lengths::of(&architecture, bounds.rows_max);
        let mut step = StepMemory::new(device, &architecture, &lengths, bounds)?;
        let mut activations = Activations::new(device, &lengths)?;
        stagings.grow(&stream, &mut step, &mut activations)?;
        let dense = DenseFfn::new(&stream, bounds.rows_max, lengths.inner)?;
        let blocks = match blocks {
            Some(blocks) => blocks,
            None => plan::blocks(&architecture, device.memory_free_bytes()?)?,
        };
        let layer_cache = |_| KvCache::new(device, &architecture, blocks);
        let cache = (0..layers.len()).map(layer_cache).collect::<Result<Vec<_>, _>>()?;
        Ok(Self {
            class: kernels.class().clone(),
            rope: Rope::new(&architecture.rope),
            positions: Positions::default(),
            pieces: Vec::new(),
            gate_logits: Vec::new(),
            architecture,
            embed,
            layers,
            norm,
            head,
            cache,
            blocks,
            step,
            activations,
            dense,
            stagings,
            stream,
        })
    }

    /// Blocks of the cache.
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Uploads the embedded rows of a step.
    fn embed(&mut self, chunks: &[Chunk]) -> Result<(), DeviceError> {
        let hidden = self.architecture.hidden;
        let tokens = chunks.iter().flat_map(|chunk| &chunk.tokens);
        let x = self.step.x.slice_mut(0..self.positions.len() * hidden);
        self.stagings.x.upload(&self.stream, x, |x| {
            for (token, row) in tokens.zip(x.chunks_exact_mut(hidden)) {
                self.embed.lookup(*token, row);
            }
        })
    }

    /// Uploads where the rows of a step stand.
    fn place(&mut self, batches: &[Range<usize>]) -> Result<(), DeviceError> {
        let Self { architecture, positions, pieces, step, stagings, stream, rope, .. } = self;
        let rows = positions.len();
        let rotations = step.rotations.slice_mut(0..2 * rows * rope.half_dim());
        stagings.rotations.upload(stream, rotations, |both| {
            let (cos, sin) = both.split_at_mut(rows * rope.half_dim());
            rope.fill(&positions.positions, cos, sin);
        })?;
        let places = step.places.slice_mut(0..rows + positions.tables.len());
        stagings.places.upload(stream, places, |places| {
            let (slots, tables) = places.split_at_mut(rows);
            // Blocks are fewer than `plan::BLOCKS_MAX`.
            slots.iter_mut().zip(&positions.slots).for_each(|(to, slot)| *to = *slot as u32);
            tables.copy_from_slice(&positions.tables);
        })?;
        let partial_len = self.activations.partial.len();
        pieces.clear();
        for batch in batches {
            let cut = plan::pieces(architecture, &positions.positions, batch.clone(), partial_len);
            pieces.extend(cut.into_iter().map(|piece| (piece, 0..0)));
        }
        let mut all = Vec::new();
        for (piece, runs) in pieces {
            let first = all.len();
            all.extend(plan::runs(architecture, piece.rows.clone().map(|r| positions.place(r))));
            *runs = first..all.len();
        }
        let to = step.runs.slice_mut(0..all.len());
        stagings.runs.upload(stream, to, |to| to.copy_from_slice(&all))
    }

    /// Queries, keys and values of some rows, turned to their positions; keys and values go into the
    /// cache.
    fn project(&mut self, layer: usize, rows: &Range<usize>) -> Result<(), DeviceError> {
        let Self { architecture: arch, stream, step, activations: a, .. } = self;
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

        let half_dim = self.rope.half_dim();
        let (turned, sines) = (values(rows, half_dim), self.positions.len() * half_dim);
        let cos = step.rotations.slice(turned.clone());
        let sin = step.rotations.slice(sines + turned.start..sines + turned.end);
        stream.rope(a.q.slice_mut(q), heads, cos, sin)?;
        stream.rope(a.k.slice_mut(kv.clone()), kv_heads, cos, sin)?;
        let both = [cache.keys.view_mut(), cache.values.view_mut()];
        let slots = step.places.slice(rows.clone());
        stream.write_kv(both, slots, kv_heads, a.k.slice(kv.clone()), a.v.slice(kv))
    }

    /// Attention of the rows of a micro-batch, piece by piece.
    fn attention(&mut self, layer: usize, rows: &Range<usize>) -> Result<(), DeviceError> {
        let Self { architecture: arch, stream, step, activations: a, positions, .. } = self;
        let shape = plan::shape(arch, arch.layers[layer].window);
        let tables = positions.len()..positions.len() + positions.tables.len();
        let own = self.pieces.iter().filter(|(piece, _)| rows.contains(&piece.rows.start));
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
    fn normed(&mut self, layer: usize, rows: &Range<usize>) -> Result<(), DeviceError> {
        let Self { architecture: arch, stream, step, activations: a, .. } = self;
        let weight = self.layers[layer].post_norm.view();
        let x = step.x.slice(values(rows, arch.hidden));
        let normed = a.normed.slice_mut(0..x.len());
        let words = a.words.slice_mut(0..rows.len() * row_pairs(arch.hidden));
        stream.rms_norm(x, weight, arch.rms_eps, Some(normed), Some(words))
    }
}

impl Trunk for CudaTrunk {
    fn class(&self) -> &KernelClass {
        &self.class
    }

    fn begin(&mut self, chunks: &[Chunk], batches: &[Range<usize>]) -> Result<(), DeviceError> {
        self.positions = Positions::of(chunks);
        self.embed(chunks)?;
        self.place(batches)
    }

    fn attend(&mut self, layer: usize, rows: Range<usize>) -> Result<(), DeviceError> {
        self.project(layer, &rows)?;
        self.attention(layer, &rows)?;
        let Self { architecture: arch, stream, step, activations: a, .. } = self;
        let (count, len) = (rows.len(), arch.heads * arch.head_dim);
        let words = 0..count * row_pairs(len);
        stream.round_rows(
            a.attended.slice(0..count * len),
            len,
            a.words.slice_mut(words.clone()),
        )?;
        let delta = 0..count * arch.hidden;
        let o = &self.layers[layer].o;
        stream.matmul(o, a.words.slice(words), count, a.delta.slice_mut(delta.clone()))?;
        stream.add(step.x.slice_mut(values(&rows, arch.hidden)), a.delta.slice(delta))
    }

    fn feed_forward(&mut self, layer: usize, rows: Range<usize>) -> Result<(), DeviceError> {
        self.normed(layer, &rows)?;
        let Self { architecture: arch, stream, step, activations: a, .. } = self;
        let FfnWeights::Dense(ffn) = &self.layers[layer].ffn else {
            unreachable!("the weights were loaded by this same architecture");
        };
        let (count, delta) = (rows.len(), 0..rows.len() * arch.hidden);
        let words = a.words.slice(0..count * row_pairs(arch.hidden));
        self.dense.run(stream, ffn, words, count, a.delta.slice_mut(delta.clone()))?;
        stream.add(step.x.slice_mut(values(&rows, arch.hidden)), a.delta.slice(delta))
    }

    fn route(
        &mut self,
        layer: usize,
        rows: Range<usize>,
        encoded: &mut [u8],
    ) -> Result<&[f32], DeviceError> {
        self.normed(layer, &rows)?;
        let Self { architecture: arch, stream, stagings, activations: a, .. } = self;
        let FfnWeights::Moe { gate } = &self.layers[layer].ffn else {
            unreachable!("the weights were loaded by this same architecture");
        };
        let (count, row_words) = (rows.len(), row_pairs(arch.hidden));
        let logits = 0..count * gate.out_features();
        let normed = a.normed.slice(0..count * arch.hidden);
        stream.matmul_exact(gate, normed, count, a.gate_logits.slice_mut(logits.clone()))?;
        stagings.back.download(stream, a.words.slice(0..count * row_words), |words| {
            let rows = encoded.chunks_exact_mut(arch.hidden * size_of::<u16>());
            rows.zip(words.chunks_exact(row_words)).for_each(|(row, words)| unpack(words, row));
        })?;
        let to = &mut self.gate_logits;
        stagings.back.download(stream, a.gate_logits.slice(logits), |logits| {
            to.clear();
            to.extend_from_slice(logits);
        })?;
        Ok(&self.gate_logits)
    }

    fn add(&mut self, rows: Range<usize>, delta: &[f32]) -> Result<(), DeviceError> {
        let Self { stream, step, stagings, activations: a, .. } = self;
        let to = a.delta.slice_mut(0..delta.len());
        stagings.delta.upload(stream, to, |to| to.copy_from_slice(delta))?;
        let x = step.x.slice_mut(values(&rows, self.architecture.hidden));
        stream.add(x, a.delta.slice(0..delta.len()))
    }

    fn logits(&mut self, wanted: &[usize], logits: &mut [f32]) -> Result<(), DeviceError> {
        let Self { architecture: arch, stream, step, stagings, activations: a, .. } = self;
        let (hidden, row_words) = (arch.hidden, row_pairs(arch.hidden));
        let parts = logits.chunks_mut(LOGIT_ROWS_MAX * arch.vocab);
        for (wanted, logits) in wanted.chunks(LOGIT_ROWS_MAX).zip(parts) {
            let mut at = 0;
            for run in wanted.chunk_by(|row, next| row + 1 == *next) {
                let x = step.x.slice(run[0] * hidden..(run[0] + run.len()) * hidden);
                let words = a.words.slice_mut(at * row_words..(at + run.len()) * row_words);
                stream.rms_norm(x, self.norm.view(), arch.rms_eps, None, Some(words))?;
                at += run.len();
            }
            let words = a.words.slice(0..at * row_words);
            stream.matmul(&self.head, words, at, a.logits.slice_mut(0..logits.len()))?;
            let from = a.logits.slice(0..logits.len());
            stagings.back.download(stream, from, |from| logits.copy_from_slice(from))?;
        }
        Ok(())
    }
}

/// The values of a row in bf16, which its words hold in pairs, as bytes. Padding stays behind.
fn unpack(words: &[u32], row: &mut [u8]) {
    let (pairs, rest) = row.as_chunks_mut::<4>();
    let mut words = words.iter().map(|word| word.to_le_bytes());
    for (pair, word) in pairs.iter_mut().zip(&mut words) {
        *pair = word;
    }
    if let Some(word) = words.next().filter(|_| !rest.is_empty()) {
        rest.copy_from_slice(&word[..rest.len()]);
    }
}
