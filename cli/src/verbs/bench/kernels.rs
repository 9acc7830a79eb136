//! `entente bench kernels`: every kernel that multiplies weights, from 1 to 512 rows.
//!
//! Weights come from memory: each run takes the next of as many matrices as caches do not hold. A
//! kernel can take no less time than reading its weights and multiplying with all of them; that
//! time divided by the measured one is its share of the limit.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;
use comfy_table::Table;
use entente_model::Checkpoint;
use entente_model::config::FfnSpec;
use entente_model::kernels::{
    self, Activation, DeviceId, FfnGroup, GatedFfn, Kernels, Matrix, MatrixSource, SourceDtype,
};
use half::bf16;
use serde::Serialize;

use super::device::{self, Shape, Trunk};
use super::limits::{self, Measured, Probe};
use crate::cluster::columns;
use crate::cluster::plan::Weights;
use crate::stats::median;

/// Rows of the calls.
const ROWS: [usize; 10] = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512];
/// How long each figure is measured at least.
const MEASURE: Duration = Duration::from_millis(250);
/// More than the caches hold.
const COLD_BYTES: usize = 192 << 20;

/// The flags of `entente bench kernels`.
#[derive(Debug, Args)]
pub struct KernelsArgs {
    /// Checkpoint folder whose shapes are measured; without it --hidden and --inner count.
    #[arg(long, env = "ENTENTE_MODEL", value_name = "DIR")]
    model: Option<PathBuf>,

    /// Values of a row.
    #[arg(long, env = "ENTENTE_HIDDEN", value_name = "N", default_value_t = 1_024)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=65_536))]
    hidden: u32,

    /// Values between the two halves of an expert.
    #[arg(long, env = "ENTENTE_INNER", value_name = "N", default_value_t = 3_584)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    inner: u32,

    /// Weight format.
    #[arg(long, env = "ENTENTE_WEIGHTS", value_enum, default_value = "bf16")]
    pub weights: Weights,

    /// Where to measure: cpu, or cuda:N.
    #[arg(long, env = "ENTENTE_DEVICE", value_name = "DEVICE", default_value_t)]
    pub device: DeviceId,

    /// On a device: the layers of experts, as HIDDENxINNERxEXPERTSxTOP. Those of Mixtral 8x7B and
    /// Mistral Small 4 if absent.
    #[arg(long, env = "ENTENTE_SHAPES", value_name = "SHAPE,…", value_delimiter = ',')]
    #[arg(default_values = device::SHAPES)]
    pub shapes: Vec<Shape>,

    /// On a device: what a coordinator computes of a layer and the head, as
    /// HIDDENxHEADSxKV_HEADSxHEAD_DIMxVOCAB. That of Mixtral 8x7B if absent.
    #[arg(long, env = "ENTENTE_TRUNKS", value_name = "TRUNK,…", value_delimiter = ',')]
    #[arg(default_values = device::TRUNKS)]
    pub trunks: Vec<Trunk>,

    /// On a device: positions of sequences, and of prompts with at least as many as rows.
    #[arg(long, env = "ENTENTE_POSITIONS", value_name = "N,…", value_delimiter = ',')]
    #[arg(default_values_t = [512, 4_096])]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    pub positions: Vec<u32>,

    /// On a device: sides of the large product by cuBLAS that others are compared with.
    #[arg(long, env = "ENTENTE_PRODUCT", value_name = "N", default_value_t = 8_192)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=32_768))]
    pub product: u32,

    /// On a device: rows of the calls.
    #[arg(long, env = "ENTENTE_ROWS", value_name = "N,…", value_delimiter = ',')]
    #[arg(default_values_t = [1, 8, 64, 512, 4_096])]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=4_096))]
    pub rows: Vec<u32>,

    /// Compute threads; all cores if absent.
    #[arg(long, env = "ENTENTE_THREADS", value_name = "N")]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
}

/// One kernel at one number of rows.
#[derive(Debug, Serialize)]
struct Line {
    kernel: &'static str,
    rows: usize,
    /// Median.
    us: f64,
    read_gb_s: f64,
    multiply_gflop_s: f64,
    /// The least time that the limits allow, divided by the measured time.
    share_of_limit: f64,
}

/// What was found.
#[derive(Debug, Serialize)]
pub struct Found {
    kernel_class: String,
    threads: usize,
    hidden: usize,
    inner: usize,
    #[serde(flatten)]
    limits: Measured,
    kernels: Vec<Line>,
}

/// Measures every kernel.
pub fn run(args: &KernelsArgs) -> anyhow::Result<Found> {
    let threads = limits::threads(args.threads);
    let kernels = kernels::select(args.weights.into(), threads)?;
    let (hidden, inner) = match &args.model {
        Some(dir) => shape_of(&Checkpoint::open(dir)?),
        None => (args.hidden as usize, args.inner as usize),
    };
    let limits = Probe::new(args.weights.into(), threads).measure();
    let bench = Bench { kernels: &*kernels, limits };
    let mut lines = bench.matmul(hidden, inner);
    lines.extend(bench.gated_ffn(hidden, inner));
    let kernel_class = kernels.class().to_string();
    Ok(Found { kernel_class, threads, hidden, inner, limits, kernels: lines })
}

fn shape_of(checkpoint: &Checkpoint) -> (usize, usize) {
    let arch = checkpoint.architecture();
    let inner = arch.layers.iter().map(|layer| match layer.ffn {
        FfnSpec::Dense { inner } | FfnSpec::Moe { inner, .. } => inner,
    });
    (arch.hidden, inner.max().unwrap_or(arch.hidden))
}

struct Bench<'a> {
    kernels: &'a dyn Kernels,
    limits: Measured,
}

impl Bench<'_> {
    fn pack(&self, out_features: usize, in_features: usize) -> Matrix {
        let value = |i: usize| bf16::from_f32((i * 7_919 % 2_003) as f32 / 1_000.0 - 1.0);
        let bytes: Vec<u8> =
            (0..out_features * in_features).flat_map(|i| value(i).to_le_bytes()).collect();
        let dtype = SourceDtype::Bf16;
        let packed = self.kernels.pack(MatrixSource {
            out_features,
            in_features,
            dtype,
            bytes: &bytes,
            scales: None,
        });
        packed.expect("processors take every matrix")
    }

    fn matmul(&self, hidden: usize, inner: usize) -> Vec<Line> {
        let first = self.pack(inner, hidden);
        let bytes = first.bytes();
        let mut cold = vec![first];
        cold.resize_with(COLD_BYTES.div_ceil(bytes), || self.pack(inner, hidden));
        let measure = |rows| {
            let (x, mut y) = (values(rows * hidden), vec![0.0; rows * inner]);
            let us = median_us(|run| self.kernels.matmul(&x, &cold[run % cold.len()], &mut y));
            self.line("matmul", rows, bytes, hidden * inner, us)
        };
        ROWS.into_iter().map(measure).collect()
    }

    fn gated_ffn(&self, hidden: usize, inner: usize) -> Vec<Line> {
        let expert = || GatedFfn {
            gate: self.pack(inner, hidden),
            up: self.pack(inner, hidden),
            down: self.pack(hidden, inner),
            activation: Activation::SwiGlu,
        };
        let first = expert();
        let bytes = first.bytes();
        let mut cold = vec![first];
        cold.resize_with(COLD_BYTES.div_ceil(bytes), expert);
        let measure = |rows| {
            let (x, mut y) = (values(rows * hidden), vec![0.0; rows * hidden]);
            let pairs: Vec<(u32, u32)> = (0..rows as u32).map(|row| (row, row)).collect();
            let us = median_us(|run| {
                let group = FfnGroup { ffn: &cold[run % cold.len()], rows: &pairs };
                self.kernels.gated_ffn(&x, &[group], &mut y);
            });
            self.line("gated_ffn", rows, bytes, 3 * hidden * inner, us)
        };
        ROWS.into_iter().map(measure).collect()
    }

    /// A call that read `bytes` of weights and multiplied each of `weights` weights with each row.
    fn line(
        &self,
        kernel: &'static str,
        rows: usize,
        bytes: usize,
        weights: usize,
        us: f64,
    ) -> Line {
        let operations = (2 * weights * rows) as f64;
        let read_us = bytes as f64 / self.limits.read_bandwidth_gb_s / 1e3;
        let multiply_us = operations / self.limits.multiply_peak_gflop_s / 1e3;
        Line {
            kernel,
            rows,
            us,
            read_gb_s: bytes as f64 / us / 1e3,
            multiply_gflop_s: operations / us / 1e3,
            share_of_limit: read_us.max(multiply_us) / us,
        }
    }
}

/// Median time of a run; `run` gets the number of the run.
fn median_us(mut run: impl FnMut(usize)) -> f64 {
    let (start, mut times) = (Instant::now(), Vec::new());
    while start.elapsed() < MEASURE {
        let start = Instant::now();
        run(times.len());
        times.push(start.elapsed().as_secs_f64() * 1e6);
    }
    median(&times)
}

fn values(len: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * 7_919) % 2_003) as f32 / 1_000.0 - 1.0).collect()
}

impl super::Report for Found {
    fn table(&self) -> Table {
        let mut table = columns(["KERNEL", "ROWS", "US", "GB/S", "GFLOP/S", "OF LIMIT"]);
        for line in &self.kernels {
            table.add_row([
                line.kernel.to_owned(),
                line.rows.to_string(),
                format!("{:.1}", line.us),
                format!("{:.1}", line.read_gb_s),
                format!("{:.1}", line.multiply_gflop_s),
                format!("{:.0} %", line.share_of_limit * 100.0),
            ]);
        }
        table
    }

    fn notes(&self) -> Vec<String> {
        let Measured { read_bandwidth_gb_s, multiply_peak_gflop_s } = self.limits;
        vec![format!(
            "{} on {} threads, {} x {}; limits: {read_bandwidth_gb_s:.1} GB/s read, \
             {multiply_peak_gflop_s:.0} GFLOP/s",
            self.kernel_class, self.threads, self.hidden, self.inner
        )]
    }
}
