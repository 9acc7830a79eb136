//! The trunk on a CUDA device: the residual stream, weights, norms and the KV cache stay there.
//!
//! What crosses the bus is, once a step, the embedded rows (looked up here) and where they stand;
//! for each layer and micro-batch the rows for the experts with their gate logits, and what came
//! back of them; and what is wanted of the logits: a token, where that is all. All work goes into
//! one stream in the order of its calls, and only what is copied back is waited for: while the
//! experts of one micro-batch compute, the device attends for the other. What the host asks for is
//! kept back until it gives something or wants something back, and is then issued as one segment
//! ([`graphs`]).
//!
//! All memory is set aside by [`plan`] before the first step.
//!
//! What it does not know: what kernels look like, exchanges, choices.

mod compute;
mod graphs;
mod memory;
pub(super) mod plan;
mod shape;

use std::ops::Range;
use std::sync::Arc;
use std::{iter, slice};

use entente_model::kernels::cuda::{self, DenseFfn, Device, Draw, Stream, row_pairs};
use entente_model::kernels::{DeviceError, WeightFormat};
use entente_model::{Architecture, CoordinatorWeights, Embedding, Rope};
use entente_proto::ids::KernelClass;

use self::compute::{Compute, Layout, Work, values};
use self::graphs::Graphs;
use self::memory::{Activations, KvCache, Placer, Stagings, StepMemory};
pub use self::plan::StepBounds;
use self::plan::{BATCHES_MAX, LOGIT_ROWS_MAX, Lengths, Piece, Run};
use self::shape::Shape;
use super::super::sampler::Choice;
use super::super::scheduler::Chunk;
use super::positions::Positions;
use super::{Answers, Need, Trunk, Wanted};

/// The trunk on a device, and the stream of work there.
pub struct CudaTrunk {
    class: KernelClass,
    embed: Embedding,
    rope: Rope,
    /// Blocks of the cache that sequences have; one more has the filler.
    blocks: usize,
    /// Of all rows of the step: its own, then the filler.
    positions: Positions,
    own_rows: usize,
    /// Absent for a step that is like no other.
    shape: Option<Shape>,
    /// What is to be done before anything else is, and has not been issued.
    pending: Vec<Work>,
    /// As they were copied back last.
    gate_logits: Vec<f32>,
    // Dropped before the memory that they work on.
    graphs: Graphs,
    compute: Compute,
    stagings: Stagings,
    // Dropped after what its work uses.
    stream: Stream,
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

        let rows_max = shape::padded(bounds.rows_max);
        let lengths = Lengths::of(&architecture, rows_max);
        let mut step = StepMemory::new(device, &architecture, &lengths, bounds)?;
        let mut activations = Activations::new(device, &lengths)?;
        stagings.grow(&stream, &mut step, &mut activations)?;
        let ffns = compute::dense_ffns(&layers).count();
        let dense = DenseFfn::new(&stream, ffns, [rows_max, BATCHES_MAX], lengths.inner)?;
        let blocks = match blocks {
            Some(blocks) => blocks,
            None => plan::blocks(&architecture, device.memory_free_bytes()?)?,
        };
        let layer_cache = |_| KvCache::new(device, &architecture, blocks + 1);
        let cache = (0..layers.len()).map(layer_cache).collect::<Result<Vec<_>, _>>()?;
        let rope = Rope::new(&architecture.rope);
        let (half_dim, layout) = (rope.half_dim(), Layout::default());
        let compute = Compute {
            architecture,
            layers,
            norm,
            head,
            half_dim,
            cache,
            step,
            activations,
            dense,
            layout,
        };
        Ok(Self {
            class: kernels.class().clone(),
            embed,
            rope,
            blocks,
            positions: Positions::default(),
            own_rows: 0,
            shape: None,
            pending: Vec::new(),
            gate_logits: Vec::new(),
            graphs: Graphs::default(),
            compute,
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
        let Compute { architecture: Architecture { hidden, .. }, step, .. } = &mut self.compute;
        // The filler is of any token.
        let tokens = chunks.iter().flat_map(|chunk| &chunk.tokens).chain(iter::repeat(&0));
        let x = step.x.slice_mut(0..self.positions.len() * *hidden);
        self.stagings.x.upload(&self.stream, x, |x| {
            for (token, row) in tokens.zip(x.chunks_exact_mut(*hidden)) {
                self.embed.lookup(*token, row);
            }
        })
    }

    /// Uploads where the rows of a step stand.
    fn place(&mut self) -> Result<(), DeviceError> {
        let Self { compute, positions, stagings, stream, rope, .. } = self;
        let rows = positions.len();
        let rotations = compute.step.rotations.slice_mut(0..2 * rows * rope.half_dim());
        stagings.rotations.upload(stream, rotations, |both| {
            let (cos, sin) = both.split_at_mut(rows * rope.half_dim());
            rope.fill(&positions.positions, cos, sin);
        })?;
        let places = compute.step.places.slice_mut(0..rows + positions.tables.len());
        stagings.places.upload(stream, places, |places| {
            let (slots, tables) = places.split_at_mut(rows);
            // Blocks are fewer than `plan::BLOCKS_MAX`.
            slots.iter_mut().zip(&positions.slots).for_each(|(to, slot)| *to = *slot as u32);
            tables.copy_from_slice(&positions.tables);
        })
    }

    /// Cuts the rows of a step into what is launched at once.
    fn cut(&mut self, batches: &[Range<usize>]) -> Result<(), DeviceError> {
        let Self { compute, positions, stagings, stream, .. } = self;
        let (arch, partial_len) = (&compute.architecture, compute.activations.partial.len());
        let pieces_of = |rows| plan::pieces(arch, &positions.positions, rows, partial_len);
        let cut: Vec<Piece> = match self.shape {
            Some(Shape { rows, splits }) => vec![Piece { rows: 0..rows, splits }],
            None => batches.iter().cloned().flat_map(pieces_of).collect(),
        };
        let (mut pieces, mut all) = (Vec::new(), Vec::new());
        for piece in cut {
            let first = all.len();
            let places = piece.rows.clone().map(|row| positions.place(row));
            all.extend(plan::runs(arch, places));
            if self.shape.is_some() {
                // Runs of no rows: how many rows share a run is nothing that a shape depends on.
                all.resize(first + piece.rows.len(), Run::default());
            }
            pieces.push((piece, first..all.len()));
        }
        let to = compute.step.runs.slice_mut(0..all.len());
        stagings.runs.upload(stream, to, |to| to.copy_from_slice(&all))?;
        compute.layout = Layout { rows: positions.len(), tables: positions.tables.len(), pieces };
        let parts: Vec<usize> = batches.iter().map(Range::len).collect();
        compute.dense.cut(stream, compute::dense_ffns(&compute.layers), &parts)
    }

    /// All rows of the step that are computed where these are asked for. Where there is filler, a
    /// step is one micro-batch.
    fn filled(&self, rows: Range<usize>) -> Range<usize> {
        self.shape.map_or(rows, |shape| 0..shape.rows)
    }

    /// Issues what is pending. It waits until there is a reason, so that a graph is as long as can
    /// be.
    fn issue(&mut self) -> Result<(), DeviceError> {
        let segment = std::mem::take(&mut self.pending);
        if segment.is_empty() {
            return Ok(());
        }
        let Self { graphs, compute, stream, .. } = self;
        match graphs.launch(stream, &segment, || compute.issue(stream, &segment))? {
            true => Ok(()),
            false => compute.issue(stream, &segment),
        }
    }

    /// Uploads how tokens are chosen from so many rows of logits, of which the first are wanted.
    fn choose(&mut self, wanted: &[Wanted], rows: usize) -> Result<(), DeviceError> {
        let to = self.compute.activations.draws.slice_mut(0..rows);
        self.stagings.draws.upload(&self.stream, to, |to| {
            to.fill(Draw::Likeliest.words());
            to.iter_mut().zip(wanted).for_each(|(to, wanted)| *to = draw(wanted.need).words());
        })
    }

    /// Brings back as much of the logits of these rows as they are needed for.
    fn answer(&mut self, wanted: &[Wanted], answers: &mut Answers) -> Result<(), DeviceError> {
        let Self { compute: Compute { architecture, activations: a, .. }, stream, .. } = self;
        let (vocab, back) = (architecture.vocab, &mut self.stagings.back);
        let mut tokens = Vec::new();
        if wanted.iter().any(|wanted| wanted.need != Need::Logits) {
            let from = a.tokens.slice(0..wanted.len());
            tokens = back.download(stream, from, <[u32]>::to_vec)?;
        }
        let mut at = 0;
        let is_whole = |wanted: &Wanted| wanted.need == Need::Logits;
        for run in wanted.chunk_by(|one, next| is_whole(one) == is_whole(next)) {
            let rows = at..at + run.len();
            at = rows.end;
            if !is_whole(&run[0]) {
                tokens[rows].iter().for_each(|token| answers.push_token(*token));
                continue;
            }
            let to = answers.push_logits(run.len(), vocab);
            let from = a.logits.slice(values(&rows, vocab));
            back.download(stream, from, |from| to.copy_from_slice(from))?;
        }
        Ok(())
    }
}

impl Trunk for CudaTrunk {
    fn class(&self) -> &KernelClass {
        &self.class
    }

    fn begin(&mut self, chunks: &[Chunk], batches: &[Range<usize>]) -> Result<(), DeviceError> {
        self.pending.clear();
        self.positions = Positions::of(chunks);
        self.own_rows = self.positions.len();
        let (arch, partial) = (&self.compute.architecture, self.compute.activations.partial.len());
        let fits = |rows, splits| plan::partial_len(arch, rows, splits) <= partial;
        self.shape = Shape::of(chunks, batches, fits);
        self.graphs.begin(self.shape);
        let filler = self.shape.map_or(0, |shape| shape.rows - self.own_rows);
        if filler > 0 {
            self.positions.push(0..filler, &[self.blocks as u32]);
        }
        self.embed(chunks)?;
        self.place()?;
        let batches: Vec<_> = batches.iter().map(|rows| self.filled(rows.clone())).collect();
        self.cut(&batches)
    }

    fn attend(&mut self, layer: usize, rows: Range<usize>) -> Result<(), DeviceError> {
        self.pending.push(Work::Attend(layer, self.filled(rows)));
        Ok(())
    }

    fn feed_forward(&mut self, layer: usize, rows: Range<usize>) -> Result<(), DeviceError> {
        self.pending.push(Work::FeedForward(layer, self.filled(rows)));
        Ok(())
    }

    fn route(
        &mut self,
        layer: usize,
        rows: Range<usize>,
        encoded: &mut [u8],
    ) -> Result<&[f32], DeviceError> {
        self.pending.push(Work::Route(layer, self.filled(rows.clone())));
        self.issue()?;
        let Self { compute, stream, stagings, .. } = self;
        let Compute { architecture: arch, layers, activations: a, .. } = compute;
        let (count, row_words) = (rows.len(), row_pairs(arch.hidden));
        stagings.back.download(stream, a.words.slice(0..count * row_words), |words| {
            let rows = encoded.chunks_exact_mut(arch.hidden * size_of::<u16>());
            rows.zip(words.chunks_exact(row_words)).for_each(|(row, words)| unpack(words, row));
        })?;
        let (to, experts) = (&mut self.gate_logits, layers[layer].gate().out_features());
        stagings.back.download(stream, a.gate_logits.slice(0..count * experts), |logits| {
            to.clear();
            to.extend_from_slice(logits);
        })?;
        Ok(&self.gate_logits)
    }

    fn add(&mut self, rows: Range<usize>, delta: &[f32]) -> Result<(), DeviceError> {
        // What is pending may use the same memory.
        self.issue()?;
        let to = self.compute.activations.delta.slice_mut(0..delta.len());
        self.stagings.delta.upload(&self.stream, to, |to| to.copy_from_slice(delta))?;
        self.pending.push(Work::Add(self.filled(rows)));
        Ok(())
    }

    fn logits(&mut self, wanted: &[Wanted], answers: &mut Answers) -> Result<(), DeviceError> {
        for wanted in wanted.chunks(LOGIT_ROWS_MAX) {
            let runs = wanted.chunk_by(|one, next| one.row + 1 == next.row);
            let mut runs: Vec<_> = runs.map(|run| run[0].row..run[0].row + run.len()).collect();
            if runs == slice::from_ref(&(0..self.own_rows)) {
                runs[0] = self.filled(0..self.own_rows);
            }
            self.choose(wanted, runs.iter().map(Range::len).sum())?;
            self.pending.push(Work::Head(runs));
            self.issue()?;
            self.answer(wanted, answers)?;
        }
        // Of a step without answers the cache is wanted.
        self.issue()
    }
}

/// What the kernel is told; of a row whose logits are wanted, anything.
fn draw(need: Need) -> Draw {
    match need {
        Need::Token(Choice::Draw { scale, weight_min, uniform }) => {
            Draw::Weighed { scale, weight_min, uniform }
        }
        Need::Token(Choice::Likeliest) | Need::Logits => Draw::Likeliest,
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
