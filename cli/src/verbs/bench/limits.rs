//! The machine's limits, as reports show them.

use entente_model::kernels::WeightFormat;
use entente_model::kernels::limits::{Limits, Multiply};
use serde::Serialize;

use crate::stats::median;

/// Passes of each measurement; the median counts.
const PASSES: usize = 5;

/// What the machine could do at best while the report was made.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Measured {
    /// Memory that all threads together read, in 10^9 bytes a second.
    pub read_bandwidth_gb_s: f64,
    /// Operations that all threads together do in registers, in 10^9 a second.
    pub multiply_peak_gflop_s: f64,
}

/// Measures both limits for one weight format.
pub struct Probe {
    limits: Limits,
    multiply: Multiply,
}

impl Probe {
    /// Limits of `threads` threads, multiplying as `format` does.
    pub fn new(format: WeightFormat, threads: usize) -> Self {
        let multiply = match format {
            WeightFormat::F32 => Multiply::F32,
            WeightFormat::Bf16 | WeightFormat::Fp8 => Multiply::Bf16,
            WeightFormat::Q8 | WeightFormat::Q4 => Multiply::Int8,
        };
        Self { limits: Limits::new(threads), multiply }
    }

    /// Measures now.
    pub fn measure(&self) -> Measured {
        let of = |pass: &dyn Fn() -> f64| median(&(0..PASSES).map(|_| pass()).collect::<Vec<_>>());
        Measured {
            read_bandwidth_gb_s: of(&|| self.limits.read_bandwidth_gb_s()),
            multiply_peak_gflop_s: of(&|| self.limits.multiply_peak_gflop_s(self.multiply)),
        }
    }
}

/// Threads to measure with: what was asked for, or all cores.
pub fn threads(asked: Option<u16>) -> usize {
    let cores = || std::thread::available_parallelism().map_or(1, usize::from);
    asked.map_or_else(cores, usize::from)
}
