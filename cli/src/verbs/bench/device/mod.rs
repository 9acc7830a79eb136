//! `entente bench kernels --device cuda:N`: the experts of a layer on a device, with random routing
//! and fresh inputs, beside the rate at which the device copies its own memory.
//!
//! Two times for each number of rows: of the kernels alone, with rows and results on the device, and
//! of the whole call, from rows in memory of the process to results there. Few rows can take no less
//! time than reading the weights of the experts that they go to; that share of the copy rate is shown.
//! All weights together are far more than a device's caches hold.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Instant;

use comfy_table::Table;
use entente_model::kernels::cuda::{self, Device, Probe};
use entente_model::kernels::{
    Activation, ExpertKernels, FfnGroup, GatedFfn, Matrix, MatrixSource, SourceDtype, WeightFormat,
};
use half::bf16;
use serde::Serialize;

use super::kernels::KernelsArgs;
use crate::cluster::columns;
use crate::random::Random;
use crate::stats::median;

/// Bytes that are copied within the device, or less where it has not so much memory.
const COPY_BYTES: u64 = 1 << 30;
const COPY_REPEATS: u32 = 20;
/// Routings of each number of rows; the median counts.
const ROUTINGS: u64 = 5;
/// Launches of each routing in a row.
const REPEATS: u32 = 20;

/// The experts of one layer.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Shape {
    hidden: usize,
    inner: usize,
    experts: usize,
    top_k: usize,
}

/// Mixtral 8x7B and Mistral Small 4.
pub const SHAPES: [&str; 2] = ["4096x14336x8x2", "4096x2048x128x4"];

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}x{}x{}", self.hidden, self.inner, self.experts, self.top_k)
    }
}

impl FromStr for Shape {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let numbers: Option<Vec<usize>> = text.split('x').map(|n| n.parse().ok()).collect();
        match numbers.as_deref() {
            Some(&[hidden, inner, experts, top_k])
                if (1..=65_536).contains(&hidden)
                    && (1..=1 << 20).contains(&inner)
                    && (1..=4_096).contains(&experts)
                    && (1..=experts).contains(&top_k) =>
            {
                Ok(Self { hidden, inner, experts, top_k })
            }
            _ => Err(format!("{text} is not HIDDENxINNERxEXPERTSxTOP, such as {}", SHAPES[0])),
        }
    }
}

/// One shape at one number of rows.
#[derive(Debug, Serialize)]
struct Line {
    shape: String,
    rows: usize,
    /// Experts that any row went to; median.
    experts: f64,
    /// Of the kernels alone; median.
    kernels_us: f64,
    /// Of the whole call; median.
    call_us: f64,
    /// Weights read a second by the kernels.
    read_gb_s: f64,
    multiply_tflop_s: f64,
    share_of_copy: f64,
}

/// What was found.
#[derive(Debug, Serialize)]
pub struct Found {
    kernel_class: String,
    device: String,
    uuid: String,
    copy_gb_s: f64,
    /// What clock and bus width make possible; 0 if the device does not tell.
    nominal_gb_s: f64,
    kernels: Vec<Line>,
}

/// Measures every shape.
pub fn run(ordinal: u32, args: &KernelsArgs) -> anyhow::Result<Found> {
    let device = Device::open(ordinal)?;
    let format = WeightFormat::from(args.weights);
    let kernels = cuda::experts(&device, format)?;
    let bytes = COPY_BYTES.min(device.memory_free_bytes()? / 4) as usize;
    let copy_bytes_s = Probe::new(&device)?.copy_bandwidth_bytes_s(bytes, COPY_REPEATS)?;
    let mut lines = Vec::new();
    for shape in &args.shapes {
        let layer = Layer::new(*shape, &*kernels)?;
        for &rows in &args.rows {
            lines.push(layer.line(&device, &*kernels, rows as usize, copy_bytes_s)?);
        }
    }
    let facts = device.facts();
    Ok(Found {
        kernel_class: kernels.class().to_string(),
        device: facts.name.clone(),
        uuid: facts.uuid.clone(),
        copy_gb_s: copy_bytes_s / 1e9,
        nominal_gb_s: facts.bandwidth_bytes_s as f64 / 1e9,
        kernels: lines,
    })
}

/// The experts of one layer, on the device.
struct Layer {
    shape: Shape,
    experts: Vec<GatedFfn>,
}

impl Layer {
    fn new(shape: Shape, kernels: &dyn ExpertKernels) -> anyhow::Result<Self> {
        let Shape { hidden, inner, .. } = shape;
        let mut random = Random::new(1);
        // Small, so that results stay near the inputs; the same for all experts, in memory of their
        // own.
        let mut weight = || bf16::from_f64((random.uniform() - 0.5) * 0.04).to_le_bytes();
        let bytes: Vec<u8> = (0..hidden * inner).flat_map(|_| weight()).collect();
        let pack = |out_features, in_features| -> anyhow::Result<Matrix> {
            let dtype = SourceDtype::Bf16;
            Ok(kernels.pack(MatrixSource { out_features, in_features, dtype, bytes: &bytes })?)
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
        Ok(Self { shape, experts })
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

    fn line(
        &self,
        device: &Arc<Device>,
        kernels: &dyn ExpertKernels,
        rows: usize,
        copy_bytes_s: f64,
    ) -> anyhow::Result<Line> {
        let Shape { hidden, inner, top_k, .. } = self.shape;
        let mut probe = Probe::new(device)?;
        let (mut used, mut kernels_us, mut call_us) = (Vec::new(), Vec::new(), Vec::new());
        let mut y = vec![0; rows * top_k * hidden * 2];
        for seed in 0..ROUTINGS {
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
            kernels.gated_ffn_encoded(&x, &groups, &mut y)?;
            let start = Instant::now();
            kernels.gated_ffn_encoded(&x, &groups, &mut y)?;
            call_us.push(start.elapsed().as_secs_f64() * 1e6);
        }
        let (experts, us) = (median(&used), median(&kernels_us));
        let weights = (3 * hidden * inner) as f64;
        let read_bytes_s = experts * weights * 2.0 / us * 1e6;
        Ok(Line {
            shape: self.shape.to_string(),
            rows,
            experts,
            kernels_us: us,
            call_us: median(&call_us),
            read_gb_s: read_bytes_s / 1e9,
            multiply_tflop_s: 2.0 * weights * (rows * top_k) as f64 / us / 1e6,
            share_of_copy: read_bytes_s / copy_bytes_s,
        })
    }
}

impl super::Report for Found {
    fn table(&self) -> Table {
        let header = ["EXPERTS", "ROWS", "USED", "US", "CALL US", "GB/S", "OF COPY", "TFLOP/S"];
        let mut table = columns(header);
        for line in &self.kernels {
            table.add_row([
                line.shape.clone(),
                line.rows.to_string(),
                format!("{:.0}", line.experts),
                format!("{:.1}", line.kernels_us),
                format!("{:.1}", line.call_us),
                format!("{:.0}", line.read_gb_s),
                format!("{:.0} %", line.share_of_copy * 100.0),
                format!("{:.1}", line.multiply_tflop_s),
            ]);
        }
        table
    }

    fn notes(&self) -> Vec<String> {
        let Self { kernel_class, device, copy_gb_s, nominal_gb_s, .. } = self;
        vec![format!(
            "{kernel_class} on {device}; copies {copy_gb_s:.0} GB/s within its memory, \
             {nominal_gb_s:.0} by clock and bus; experts are hidden x inner x experts x top-k"
        )]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shape_is_four_numbers_that_make_sense() {
        for text in SHAPES {
            assert_eq!(text.parse::<Shape>().unwrap().to_string(), text);
        }
        for text in ["", "1x2x3", "1x2x3x4", "0x1x1x1", "1x1x1x0", "1x1x1x1x1", "ax1x1x1"] {
            assert!(text.parse::<Shape>().is_err(), "{text:?}");
        }
    }
}
