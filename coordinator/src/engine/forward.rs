//! One pass of a step's rows through the model: the trunk here, experts wherever they are.
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
//! What it does not know: kernels, weights, the cache; scheduling, sampling, nodes, placement.

use std::ops::Range;
use std::sync::Arc;

use entente_model::Architecture;
use entente_model::config::{FfnSpec, Scoring};
use entente_model::kernels::DeviceError;
use entente_proto::ids::LayerId;
use entente_router::exchange::Failure;
use entente_router::gate::{self, GateSpec};

use super::exchanger::{Exchanger, InFlight, Rows};
use super::scheduler::Chunk;
use super::trunk::{Answers, Trunk, Wanted};
use crate::metrics::Metrics;

/// What a step computes.
pub struct StepRows<'a> {
    /// The chunks, whose rows lie one after the other in this order.
    pub chunks: &'a [Chunk],
    /// Rows whose logits say something that is wanted, ascending.
    pub wanted: &'a [Wanted],
}

/// Why a step came to nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StepError {
    /// Its rows did not get through their experts. It may be tried again.
    #[error(transparent)]
    Experts(#[from] Failure),
    /// The trunk's device failed. No step can be computed any more.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// Takes steps through a trunk and its experts.
pub struct Forward {
    trunk: Box<dyn Trunk>,
    /// How each layer's gate chooses; absent for a dense layer.
    gates: Vec<Option<GateSpec>>,
    hidden: usize,
    micro_batch_rows_min: usize,
    /// What experts add to the residual stream of a micro-batch, `[rows, hidden]`. Kept, as the
    /// answers' memory is, for the next.
    delta: Vec<f32>,
    answers: Answers,
    metrics: Arc<Metrics>,
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
    /// Steps of this architecture's trunk. Where exchanges overlap, steps with twice
    /// `micro_batch_rows_min` rows are cut in two.
    pub fn new(
        architecture: &Architecture,
        trunk: Box<dyn Trunk>,
        micro_batch_rows_min: usize,
        metrics: Arc<Metrics>,
    ) -> Self {
        let gates = architecture.layers.iter().map(|layer| gate_spec(&layer.ffn)).collect();
        let (hidden, delta, answers) = (architecture.hidden, Vec::new(), Answers::default());
        Self { trunk, gates, hidden, micro_batch_rows_min, delta, answers, metrics }
    }

    /// An answer about each of `step.wanted`. The rows' keys and values are in the cache afterwards. On failure the cache may hold some of them, which does no harm: they are
    /// written again, with the same values, when the rows are computed again.
    pub fn run(
        &mut self,
        step: &StepRows<'_>,
        exchanger: &mut Exchanger,
    ) -> Result<Answers, StepError> {
        let rows = step.chunks.iter().map(|chunk| chunk.tokens.len()).sum();
        let rows_min = if exchanger.overlaps() { self.micro_batch_rows_min } else { usize::MAX };
        let batches = micro_batches(rows, rows_min);
        self.trunk.begin(step.chunks, &batches)?;
        self.layers(&batches, exchanger)?;
        let mut answers = std::mem::take(&mut self.answers);
        answers.clear();
        self.trunk.logits(step.wanted, &mut answers)?;
        Ok(answers)
    }

    /// Takes answers back once they are no longer needed, so that the next step's use their memory.
    pub fn reuse(&mut self, answers: Answers) {
        self.answers = answers;
    }

    /// Takes all micro-batches through all layers. A micro-batch's turn begins with what its rows
    /// get from the experts of the layer before.
    fn layers(
        &mut self,
        batches: &[Range<usize>],
        exchanger: &mut Exchanger,
    ) -> Result<(), StepError> {
        let mut in_flight: Vec<Option<InFlight>> = batches.iter().map(|_| None).collect();
        for layer in 0..self.gates.len() {
            for (batch, in_flight) in batches.iter().zip(&mut in_flight) {
                self.finish(batch, in_flight.take(), exchanger)?;
                self.trunk.attend(layer, batch.clone())?;
                *in_flight = self.feed_forward(layer, batch, exchanger)?;
            }
        }
        for (batch, in_flight) in batches.iter().zip(in_flight) {
            self.finish(batch, in_flight, exchanger)?;
        }
        Ok(())
    }

    /// `x += ffn(norm(x))`: at once for a dense layer, which is computed here; for an MoE layer
    /// the rows are sent to their experts, and [`Self::finish`] adds what comes back.
    fn feed_forward(
        &mut self,
        layer: usize,
        batch: &Range<usize>,
        exchanger: &mut Exchanger,
    ) -> Result<Option<InFlight>, StepError> {
        let Some(spec) = &self.gates[layer] else {
            self.trunk.feed_forward(layer, batch.clone())?;
            return Ok(None);
        };
        let (count, hidden, top_k) = (batch.len(), self.hidden, spec.top_k);
        let mut buffer = exchanger.buffer(count * hidden);
        let logits = self.trunk.route(layer, batch.clone(), buffer.rows())?;
        let mut choices = Vec::with_capacity(count * top_k);
        gate::choose(spec, logits, &mut choices);
        let layer = LayerId(layer as u16);
        self.metrics.count_choices(layer, &choices);
        let first_row = batch.start;
        let rows = Rows { layer, hidden, buffer, choices, top_k, first_row, count };
        Ok(Some(exchanger.start(rows)))
    }

    /// Adds what the experts made of a micro-batch, if it has been sent to any.
    fn finish(
        &mut self,
        batch: &Range<usize>,
        in_flight: Option<InFlight>,
        exchanger: &mut Exchanger,
    ) -> Result<(), StepError> {
        let Some(in_flight) = in_flight else { return Ok(()) };
        self.delta.clear();
        self.delta.resize(batch.len() * self.hidden, 0.0);
        exchanger.finish(in_flight, &mut self.delta)?;
        Ok(self.trunk.add(batch.clone(), &self.delta)?)
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
}
