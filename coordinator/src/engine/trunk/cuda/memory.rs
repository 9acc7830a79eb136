//! What a trunk keeps on its device: weights, cache and activations.

use std::sync::Arc;

use entente_model::kernels::cuda::{Buffer, Device, Staging, Stream};
use entente_model::kernels::{BLOCK_LEN, DeviceError, ExpertKernels, Matrix};
use entente_model::{Architecture, FfnWeights, LayerWeights};

use super::plan::{self, Lengths, Run, StepBounds};

/// The weights of one layer, placed.
pub(super) struct Layer {
    pub input_norm: Buffer<f32>,
    pub q: Matrix,
    pub k: Matrix,
    pub v: Matrix,
    pub o: Matrix,
    pub post_norm: Buffer<f32>,
    pub ffn: FfnWeights,
}

impl Layer {
    /// The gate of a layer with experts.
    pub fn gate(&self) -> &Matrix {
        match &self.ffn {
            FfnWeights::Moe { gate } => gate,
            FfnWeights::Dense(_) => {
                unreachable!("the weights were loaded by the architecture that steps follow")
            }
        }
    }
}

/// Takes weights from the memory of the process to a device.
pub(super) struct Placer<'a> {
    pub kernels: &'a dyn ExpertKernels,
    pub stream: &'a Stream,
    pub staging: &'a mut Staging,
}

impl Placer<'_> {
    pub fn layer(&mut self, layer: LayerWeights) -> Result<Layer, DeviceError> {
        Ok(Layer {
            input_norm: self.values(&layer.input_norm)?,
            q: self.kernels.place(layer.q)?,
            k: self.kernels.place(layer.k)?,
            v: self.kernels.place(layer.v)?,
            o: self.kernels.place(layer.o)?,
            post_norm: self.values(&layer.post_norm)?,
            ffn: match layer.ffn {
                FfnWeights::Dense(ffn) => FfnWeights::Dense(ffn.place(self.kernels)?),
                FfnWeights::Moe { gate } => FfnWeights::Moe { gate: self.kernels.place(gate)? },
            },
        })
    }

    pub fn values(&mut self, values: &[f32]) -> Result<Buffer<f32>, DeviceError> {
        let mut buffer = Buffer::new(self.stream.device(), values.len())?;
        self.staging.upload(self.stream, buffer.view_mut(), |to| to.copy_from_slice(values))?;
        Ok(buffer)
    }
}

/// Keys and values of one layer, `[block][kv_head][BLOCK_LEN][head_dim]` in bf16 both. What has not
/// been written is not read.
pub(super) struct KvCache {
    pub keys: Buffer<u16>,
    pub values: Buffer<u16>,
}

impl KvCache {
    pub fn new(
        device: &Arc<Device>,
        arch: &Architecture,
        blocks: usize,
    ) -> Result<Self, DeviceError> {
        let len = blocks * plan::block_len(arch);
        Ok(Self { keys: Buffer::new(device, len)?, values: Buffer::new(device, len)? })
    }
}

/// What the rows of a step are, uploaded when it begins.
pub(super) struct StepMemory {
    /// The residual stream, `[rows, hidden]`.
    pub x: Buffer<f32>,
    /// Cosines, then sines, `[rows, half of the rotating values]` each.
    pub rotations: Buffer<f32>,
    /// The slot of each row, then the blocks of all sequences.
    pub places: Buffer<u32>,
    /// Rows that follow one another in their sequence; never more runs than rows.
    pub runs: Buffer<Run>,
}

impl StepMemory {
    pub fn new(
        device: &Arc<Device>,
        arch: &Architecture,
        lengths: &Lengths,
        bounds: StepBounds,
    ) -> Result<Self, DeviceError> {
        // One block more for the filler.
        let tables = bounds.sequences_max * arch.max_positions.div_ceil(BLOCK_LEN) + 1;
        Ok(Self {
            x: Buffer::new(device, lengths.hidden)?,
            rotations: Buffer::new(device, 2 * lengths.rotations)?,
            places: Buffer::new(device, lengths.rows + tables)?,
            runs: Buffer::new(device, lengths.rows)?,
        })
    }
}

/// Activations of the micro-batch that is computed; they hold nothing between two calls.
pub(super) struct Activations {
    /// Rows after a norm, `[rows, hidden]`, as the gate takes them.
    pub normed: Buffer<f32>,
    /// Rows as products take them.
    pub words: Buffer<u32>,
    pub q: Buffer<f32>,
    pub k: Buffer<f32>,
    pub v: Buffer<f32>,
    pub partial: Buffer<f32>,
    pub attended: Buffer<f32>,
    /// What is added to the residual stream, `[rows, hidden]`.
    pub delta: Buffer<f32>,
    pub gate_logits: Buffer<f32>,
    pub logits: Buffer<f32>,
    /// How a token is chosen from each row of logits, and the token.
    pub draws: Buffer<[u64; 2]>,
    pub tokens: Buffer<u32>,
}

impl Activations {
    pub fn new(device: &Arc<Device>, lengths: &Lengths) -> Result<Self, DeviceError> {
        Ok(Self {
            normed: Buffer::new(device, lengths.hidden)?,
            words: Buffer::new(device, lengths.words)?,
            q: Buffer::new(device, lengths.q)?,
            k: Buffer::new(device, lengths.kv)?,
            v: Buffer::new(device, lengths.kv)?,
            partial: Buffer::new(device, lengths.partial)?,
            attended: Buffer::new(device, lengths.q)?,
            delta: Buffer::new(device, lengths.hidden)?,
            gate_logits: Buffer::new(device, lengths.gate_logits)?,
            logits: Buffer::new(device, lengths.logits)?,
            draws: Buffer::new(device, lengths.logit_rows)?,
            tokens: Buffer::new(device, lengths.logit_rows)?,
        })
    }
}

/// The ways to the device and back, one for each kind of thing that travels, so that none waits for
/// another's copy.
pub(super) struct Stagings {
    pub x: Staging,
    pub rotations: Staging,
    pub places: Staging,
    pub runs: Staging,
    pub delta: Staging,
    pub draws: Staging,
    pub back: Staging,
}

impl Stagings {
    pub fn new(device: &Arc<Device>) -> Result<Self, DeviceError> {
        Ok(Self {
            x: Staging::new(device)?,
            rotations: Staging::new(device)?,
            places: Staging::new(device)?,
            runs: Staging::new(device)?,
            delta: Staging::new(device)?,
            draws: Staging::new(device)?,
            back: Staging::new(device)?,
        })
    }

    /// Copies as much as the largest step will, whatever it is: staging memory grows with its copies,
    /// and a step is not to be the first to ask for it.
    pub fn grow(
        &mut self,
        stream: &Stream,
        step: &mut StepMemory,
        activations: &mut Activations,
    ) -> Result<(), DeviceError> {
        self.x.upload(stream, step.x.view_mut(), |_| {})?;
        self.rotations.upload(stream, step.rotations.view_mut(), |_| {})?;
        self.places.upload(stream, step.places.view_mut(), |_| {})?;
        self.runs.upload(stream, step.runs.view_mut(), |_| {})?;
        self.delta.upload(stream, activations.delta.view_mut(), |_| {})?;
        self.draws.upload(stream, activations.draws.view_mut(), |_| {})?;
        self.back.download(stream, activations.words.view(), |_| ())?;
        self.back.download(stream, activations.gate_logits.view(), |_| ())?;
        self.back.download(stream, activations.logits.view(), |_| ())
    }
}
