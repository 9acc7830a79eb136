//! How near the kernels come to the memory's and the multipliers' limits.
//!
//! For each kernel class: GB/s of weights at 1 row, where memory is the limit, and GFLOP/s at 128
//! and 512 rows, where the multipliers are. `cargo bench -p entente-model --bench kernels`; a
//! number after `--` sets the threads, and names of formats select them.

#![allow(clippy::print_stdout)] // Printing is what it is for.

use std::time::{Duration, Instant};

use entente_model::kernels::limits::{Limits, Multiply};
use entente_model::kernels::{
    Activation, FfnGroup, GatedFfn, Kernels, Matrix, MatrixSource, SourceDtype, WeightFormat,
    select,
};

/// How long each figure is measured; the fastest run counts, as others share the machine.
const MEASURE: Duration = Duration::from_millis(400);
/// Rows of a call: decoding alone, decoding together, prefill.
const ROWS: [usize; 5] = [1, 8, 32, 128, 512];
/// More than the caches hold, so that weights come from memory.
const COLD_BYTES: usize = 256 << 20;

fn main() {
    let threads = std::env::args().filter_map(|arg| arg.parse().ok()).next().unwrap_or(2);
    let named = |class: &str| std::env::args().skip(1).any(|arg| class.starts_with(&arg));
    let all = !WeightFormat::ALL.iter().any(|format| named(&format!("{format:?}").to_lowercase()));
    for format in WeightFormat::ALL {
        let kernels = select(format, threads).expect("every format has portable kernels");
        if !all && !named(&kernels.class().0) {
            continue;
        }
        println!("{} on {threads} threads", kernels.class());
        report_limits(&Limits::new(threads));
        for (hidden, inner) in [(1024, 3584), (2048, 7168)] {
            bench_matmul(&*kernels, hidden, inner);
            bench_ffn(&*kernels, hidden, inner);
        }
    }
}

/// What the figures below are to be compared with, measured in the same minute.
fn report_limits(limits: &Limits) {
    let [bf16, int8] = [Multiply::Bf16, Multiply::Int8].map(|m| limits.multiply_peak_gflop_s(m));
    println!(
        "{:>10} memory read {:.1} GB/s, bf16 {bf16:.0} GFLOP/s, int8 {int8:.0} GOP/s",
        "limits",
        limits.read_bandwidth_gb_s()
    );
}

/// Seconds of the fastest run of `run`, which gets the number of the run.
fn fastest(mut run: impl FnMut(usize)) -> f64 {
    let (start, mut best, mut runs) = (Instant::now(), f64::INFINITY, 0);
    while start.elapsed() < MEASURE {
        let start = Instant::now();
        run(runs);
        best = best.min(start.elapsed().as_secs_f64());
        runs += 1;
    }
    best
}

fn values(n: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 7919) % 2003) as f32 / 1000.0 - 1.0).collect()
}

/// A matrix as a checkpoint stores it.
struct Stored {
    out_features: usize,
    in_features: usize,
    bytes: Vec<u8>,
}

impl Stored {
    fn new(out_features: usize, in_features: usize) -> Self {
        let bytes = values(out_features * in_features)
            .into_iter()
            .flat_map(|v| half::bf16::from_f32(v).to_le_bytes())
            .collect();
        Self { out_features, in_features, bytes }
    }

    fn pack(&self, kernels: &dyn Kernels) -> Matrix {
        let Self { out_features, in_features, ref bytes } = *self;
        kernels.pack(MatrixSource { out_features, in_features, dtype: SourceDtype::Bf16, bytes })
    }
}

fn bench_matmul(kernels: &dyn Kernels, inputs: usize, outputs: usize) {
    let (stored, weights) = (Stored::new(outputs, inputs), inputs * outputs);
    let weights_bytes = stored.pack(kernels).bytes();
    let count = COLD_BYTES.div_ceil(weights_bytes);
    let start = Instant::now();
    let matrices: Vec<Matrix> = (0..count).map(|_| stored.pack(kernels)).collect();
    let per_nano = (count * weights) as f64 / start.elapsed().as_nanos() as f64;
    println!("{:>10} {inputs}x{outputs} {per_nano:>22.2} weights/ns", "pack");
    for rows in ROWS {
        let (x, mut y) = (values(rows * inputs), vec![0.0; rows * outputs]);
        let seconds = fastest(|run| kernels.matmul(&x, &matrices[run % count], &mut y));
        report(&format!("matmul {inputs}x{outputs}"), rows, weights, weights_bytes, seconds);
    }
}

fn bench_ffn(kernels: &dyn Kernels, hidden: usize, inner: usize) {
    let (wide, tall) = (Stored::new(inner, hidden), Stored::new(hidden, inner));
    let expert = || GatedFfn {
        gate: wide.pack(kernels),
        up: wide.pack(kernels),
        down: tall.pack(kernels),
        activation: Activation::SwiGlu,
    };
    let mut experts = vec![expert()];
    let (weights, weights_bytes) = (3 * hidden * inner, experts[0].bytes());
    let count = COLD_BYTES.div_ceil(weights_bytes);
    experts.extend((1..count).map(|_| expert()));
    for rows in ROWS {
        let (x, mut y) = (values(rows * hidden), vec![0.0; rows * hidden]);
        let pairs: Vec<(u32, u32)> = (0..rows as u32).map(|r| (r, r)).collect();
        let seconds = fastest(|run| {
            let group = FfnGroup { ffn: &experts[run % count], rows: &pairs };
            kernels.gated_ffn(&x, &[group], &mut y);
        });
        report(&format!("gated_ffn {hidden}x{inner}"), rows, weights, weights_bytes, seconds);
    }
}

fn report(what: &str, rows: usize, weights: usize, weights_bytes: usize, seconds: f64) {
    let gigabytes = weights_bytes as f64 / seconds / 1e9;
    // Two operations for each weight and row.
    let gflops = (2 * weights * rows) as f64 / seconds / 1e9;
    let micros = seconds * 1e6;
    println!(
        "{what:>20} {rows:>4} rows {micros:>9.1} us \
         {gigabytes:>6.1} GB/s {gflops:>7.1} GFLOP/s"
    );
}
