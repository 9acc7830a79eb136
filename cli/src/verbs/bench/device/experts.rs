//! The experts of a layer: what an expert node computes.
//!
//! Two times for each number of rows: of the kernels alone, with rows and results on the device, and
//! of the whole call, from rows in memory of the process to results there.

use std::time::Instant;

use entente_model::kernels::cuda::Probe;
use entente_model::kernels::{
    Activation, ExpertKernels, FfnGroup, GatedFfn, Matrix, MatrixSource, SourceDtype,
};
use half::bf16;

use super::machine::{Machine, REPEATS, SEEDS};
use super::shape::Shape;
use super::{Line, Work};
use crate::random::Random;
use crate::stats::median;

/// The experts of one layer, on the device.
pub struct Layer<'a> {
    machine: &'a Machine,
    kernels: &'a dyn ExpertKernels,
    shape: Shape,
    experts: Vec<GatedFfn>,
}

/// Medians of what was measured.
struct Medians {
    /// Experts that any row went to.
    used: f64,
    kernels_us: f64,
    call_us: f64,
}

impl<'a> Layer<'a> {
    pub fn new(
        machine: &'a Machine,
        kernels: &'a dyn ExpertKernels,
        shape: Shape,
    ) -> anyhow::Result<Self> {
        let Shape { hidden, inner, .. } = shape;
        let mut random = Random::new(1);
        // Small, so that results stay near the inputs; the same for all experts, in memory of their
        // own.
        let mut weight = || bf16::from_f64((random.uniform() - 0.5) * 0.04).to_le_bytes();
        let bytes: Vec<u8> = (0..hidden * inner).flat_map(|_| weight()).collect();
        let pack = |out_features, in_features| -> anyhow::Result<Matrix> {
            let dtype = SourceDtype::Bf16;
            Ok(kernels.pack(MatrixSource {
                out_features,
                in_features,
                dtype,
                bytes: &bytes,
                scales: None,
            })?)
        };
        let expert = |_| {
            Ok(GatedFfn {
                gate: pack(inner, hidden)?,
                up: pack(inner, hidden)?,
                down: pack(hidden, inner)?,
                activation: Activation::SwiGlu,
            })
        };
        let experts = (0..shape.experts).map(expert).collect::<anyhow::Result<_>>()?;
        Ok(Self { machine, kernels, shape, experts })
    }

    /// For each expert its rows and where their results go; every row goes to as many experts as the
    /// shape says, chosen at random.
    fn route(&self, random: &mut Random, rows: usize) -> Vec<Vec<(u32, u32)>> {
        let Shape { experts, top_k, .. } = self.shape;
        let mut groups = vec![Vec::new(); experts];
        let mut order: Vec<usize> = (0..experts).collect();
        for row in 0..rows {
            for i in 0..top_k {
                order.swap(i, i + random.below(experts - i));
                groups[order[i]].push((row as u32, (row * top_k + i) as u32));
            }
        }
        groups
    }

    fn measure(&self, rows: usize) -> anyhow::Result<Medians> {
        let Shape { hidden, top_k, .. } = self.shape;
        let mut probe = Probe::new(&self.machine.device)?;
        let (mut used, mut kernels_us, mut call_us) = (Vec::new(), Vec::new(), Vec::new());
        let mut y = vec![0; rows * top_k * hidden * 2];
        for seed in 0..SEEDS {
            let mut random = Random::new(seed);
            let mut value = || bf16::from_f64(random.uniform() * 2.0 - 1.0).to_le_bytes();
            let x: Vec<u8> = (0..rows * hidden).flat_map(|_| value()).collect();
            let x: Vec<&[u8]> = x.chunks_exact(2 * hidden).collect();
            let routes = self.route(&mut random, rows);
            let routes = self.experts.iter().zip(&routes).filter(|(_, rows)| !rows.is_empty());
            let groups: Vec<FfnGroup<'_>> =
                routes.map(|(ffn, rows)| FfnGroup { ffn, rows }).collect();
            used.push(groups.len() as f64);
            kernels_us.push(probe.gated_ffn(&x, &groups, REPEATS)?.as_secs_f64() * 1e6);
            self.kernels.gated_ffn_encoded(&x, &groups, &mut y)?;
            let start = Instant::now();
            self.kernels.gated_ffn_encoded(&x, &groups, &mut y)?;
            call_us.push(start.elapsed().as_secs_f64() * 1e6);
        }
        let [used, kernels_us, call_us] = [used, kernels_us, call_us].map(|all| median(&all));
        Ok(Medians { used, kernels_us, call_us })
    }

    pub fn line(&self, rows: usize) -> anyhow::Result<Line> {
        let Shape { hidden, inner, top_k, .. } = self.shape;
        let Medians { used, kernels_us, call_us } = self.measure(rows)?;
        let weights = 3 * hidden * inner;
        // Gate and up as one product of as many rows as an expert has.
        let rows_of_expert = ((rows * top_k) as f64 / used).round().max(1.0) as usize;
        let GatedFfn { gate, up, down, .. } = &self.experts[0];
        let expert_bytes = gate.bytes() + up.bytes() + down.bytes();
        let work = Work {
            moved_bytes: used * expert_bytes as f64,
            operations: Some(2.0 * (weights * rows * top_k) as f64),
            cublas_flop_s: self.machine.cublas_flop_s(rows_of_expert, hidden, 2 * inner)?,
        };
        let line =
            Line::new("experts", self.shape.to_string(), rows, kernels_us, &work, self.machine);
        Ok(Line { experts: Some(used), call_us: Some(call_us), ..line })
    }
}
