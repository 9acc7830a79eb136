//! How near the kernels come to the memory's and the multipliers' limits.
//!
//! For each kernel class: GB/s of weights at 1 row, where memory is the limit, and GFLOP/s at 128
//! and 512 rows, where the multipliers are. `cargo bench -p entente-model --bench kernels`; a
//! number after `--` sets the threads.

#![allow(clippy::print_stdout)] // Printing is what it is for.

use std::time::{Duration, Instant};

use entente_model::kernels::{
    Activation, AttentionRow, AttentionShape, BLOCK_LEN, FfnGroup, GatedFfn, Kernels, KvLayer,
    Matrix, MatrixSource, SourceDtype, WeightFormat, select,
};

/// How long each figure is measured; the fastest run counts, as others share the machine.
const MEASURE: Duration = Duration::from_millis(400);
/// More than the caches hold, so that weights come from memory.
const COLD_BYTES: usize = 256 << 20;

fn main() {
    let threads = std::env::args().filter_map(|arg| arg.parse().ok()).next().unwrap_or(2);
    for format in [WeightFormat::F32, WeightFormat::Bf16] {
        let kernels = select(format, threads).expect("every format has portable kernels");
        println!("{} on {threads} threads", kernels.class());
        for (hidden, inner) in [(1024, 3584), (2048, 7168)] {
            bench_matmul(&*kernels, hidden, inner);
            bench_ffn(&*kernels, hidden, inner);
        }
        bench_attention(&*kernels);
    }
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

fn pack(kernels: &dyn Kernels, out_features: usize, in_features: usize) -> Matrix {
    let value = |i: usize| half::bf16::from_f32((i * 7919 % 2003) as f32 / 1000.0 - 1.0);
    let bytes: Vec<u8> =
        (0..out_features * in_features).flat_map(|i| value(i).to_le_bytes()).collect();
    let dtype = SourceDtype::Bf16;
    kernels.pack(MatrixSource { out_features, in_features, dtype, bytes: &bytes })
}

fn bench_matmul(kernels: &dyn Kernels, inputs: usize, outputs: usize) {
    let weights_bytes = inputs * outputs * 2;
    let count = COLD_BYTES.div_ceil(weights_bytes);
    let matrices: Vec<Matrix> = (0..count).map(|_| pack(kernels, outputs, inputs)).collect();
    for rows in [1, 8, 32, 128, 512] {
        let (x, mut y) = (values(rows * inputs), vec![0.0; rows * outputs]);
        let seconds = fastest(|run| kernels.matmul(&x, &matrices[run % count], &mut y));
        report("matmul", inputs, outputs, rows, weights_bytes, seconds);
    }
}

fn bench_ffn(kernels: &dyn Kernels, hidden: usize, inner: usize) {
    let weights_bytes = hidden * inner * 2 * 3;
    let count = COLD_BYTES.div_ceil(weights_bytes);
    let expert = |_| GatedFfn {
        gate: pack(kernels, inner, hidden),
        up: pack(kernels, inner, hidden),
        down: pack(kernels, hidden, inner),
        activation: Activation::SwiGlu,
    };
    let experts: Vec<GatedFfn> = (0..count).map(expert).collect();
    for rows in [1, 8, 32, 128, 512] {
        let (x, mut y) = (values(rows * hidden), vec![0.0; rows * hidden]);
        let pairs: Vec<(u32, u32)> = (0..rows as u32).map(|r| (r, r)).collect();
        let seconds = fastest(|run| {
            let group = FfnGroup { ffn: &experts[run % count], rows: &pairs };
            kernels.gated_ffn(&x, &[group], &mut y);
        });
        report("gated_ffn", hidden, inner, rows, weights_bytes, seconds);
    }
}

fn report(name: &str, inputs: usize, outputs: usize, rows: usize, bytes: usize, seconds: f64) {
    let gigabytes = bytes as f64 / seconds / 1e9;
    // Two operations for each weight, of two bytes, and row.
    let gflops = (bytes * rows) as f64 / seconds / 1e9;
    let micros = seconds * 1e6;
    println!(
        "{name:>10} {inputs}x{outputs} {rows:>4} rows {micros:>9.1} us \
         {gigabytes:>6.1} GB/s {gflops:>7.1} GFLOP/s"
    );
}

/// One decoding row after 2,000 positions, and a prefill chunk of 512 from the beginning.
fn bench_attention(kernels: &dyn Kernels) {
    let shape = AttentionShape { heads: 16, kv_heads: 4, head_dim: 64, window: None, scale: 0.125 };
    let positions = 2_000;
    let mut cache = KvLayer::new(shape.kv_heads, shape.head_dim, positions / BLOCK_LEN);
    let slots: Vec<usize> = (0..positions).collect();
    let kv = values(positions * shape.kv_heads * shape.head_dim);
    kernels.write_kv(&mut cache, &slots, &kv, &kv);
    let blocks: Vec<u32> = (0..(positions / BLOCK_LEN) as u32).collect();
    for (what, range) in [("decode at 2000", positions - 1..positions), ("prefill 512", 0..512)] {
        let rows: Vec<AttentionRow<'_>> =
            range.map(|position| AttentionRow { blocks: &blocks, position }).collect();
        let q = values(rows.len() * shape.heads * shape.head_dim);
        let mut out = vec![0.0; q.len()];
        let seconds = fastest(|_| kernels.attention(&shape, &q, &rows, &cache, &mut out));
        let seen: usize = rows.iter().map(|row| row.position + 1).sum();
        let gflops = (seen * shape.heads * shape.head_dim * 4) as f64 / seconds / 1e9;
        println!(
            "{:>10} {what:<14} {:>13.1} us {gflops:>16.1} GFLOP/s",
            "attention",
            seconds * 1e6
        );
    }
}
