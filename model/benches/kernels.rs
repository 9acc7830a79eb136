//! The kernels that multiply weights, with weights that come from memory.
//!
//! Matrices and experts of the mid and large checkpoints, 2 threads, for decoding alone, decoding
//! together and prefill. Each call takes the next of enough copies that no cache holds them.
//! `cargo bench -p entente-model --bench kernels`; words after `--` select benches by name.
//! Throughput counts a multiplication and an addition as two operations, so `Gelem/s` are GFLOP/s.
//! `entente bench kernels` measures the same beside the machine's limits; this tells two builds
//! apart.

// The macros of criterion make functions without documentation.
#![allow(missing_docs)]

use std::sync::Arc;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use entente_model::kernels::{
    Activation, FfnGroup, GatedFfn, Kernels, Matrix, MatrixSource, SourceDtype, WeightFormat,
    select,
};

const THREADS: usize = 2;
/// Rows of a call: decoding alone, decoding together, prefill.
const ROWS: [usize; 5] = [1, 8, 32, 128, 512];
/// Hidden and inner features of an expert.
const SHAPES: [(usize, usize); 2] = [(1024, 3584), (2048, 7168)];
/// More than the caches hold.
const COLD_BYTES: usize = 256 << 20;

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
        let dtype = SourceDtype::Bf16;
        let packed =
            kernels.pack(MatrixSource { out_features, in_features, dtype, bytes, scales: None });
        packed.expect("processors take every matrix")
    }
}

fn every_format() -> impl Iterator<Item = Arc<dyn Kernels>> {
    let portable = "every format has portable kernels";
    WeightFormat::ALL.into_iter().map(move |format| select(format, THREADS).expect(portable))
}

fn operations(weights: usize, rows: usize) -> Throughput {
    Throughput::Elements(2 * (weights * rows) as u64)
}

fn matmul(c: &mut Criterion) {
    for kernels in every_format() {
        let mut group = c.benchmark_group(format!("matmul {}", kernels.class()));
        for (inputs, outputs) in SHAPES {
            let stored = Stored::new(outputs, inputs);
            let count = COLD_BYTES.div_ceil(stored.pack(&*kernels).bytes());
            let matrices: Vec<Matrix> = (0..count).map(|_| stored.pack(&*kernels)).collect();
            let mut next = matrices.iter().cycle();
            for rows in ROWS {
                let (x, mut y) = (values(rows * inputs), vec![0.0; rows * outputs]);
                group.throughput(operations(inputs * outputs, rows));
                let id = BenchmarkId::new(format!("{inputs}x{outputs}"), rows);
                group.bench_function(id, |b| {
                    b.iter(|| kernels.matmul(&x, next.next().expect("a cycle"), &mut y));
                });
            }
        }
    }
}

fn gated_ffn(c: &mut Criterion) {
    for kernels in every_format() {
        let mut group = c.benchmark_group(format!("gated_ffn {}", kernels.class()));
        for (hidden, inner) in SHAPES {
            let (wide, tall) = (Stored::new(inner, hidden), Stored::new(hidden, inner));
            let expert = || GatedFfn {
                gate: wide.pack(&*kernels),
                up: wide.pack(&*kernels),
                down: tall.pack(&*kernels),
                activation: Activation::SwiGlu,
            };
            let count = COLD_BYTES.div_ceil(expert().bytes());
            let experts: Vec<GatedFfn> = (0..count).map(|_| expert()).collect();
            let mut next = experts.iter().cycle();
            for rows in ROWS {
                let (x, mut y) = (values(rows * hidden), vec![0.0; rows * hidden]);
                let pairs: Vec<(u32, u32)> = (0..rows as u32).map(|r| (r, r)).collect();
                group.throughput(operations(3 * hidden * inner, rows));
                let id = BenchmarkId::new(format!("{hidden}x{inner}"), rows);
                group.bench_function(id, |b| {
                    b.iter(|| {
                        let ffn = next.next().expect("a cycle");
                        kernels.gated_ffn(&x, &[FfnGroup { ffn, rows: &pairs }], &mut y);
                    });
                });
            }
        }
    }
}

criterion_group!(benches, matmul, gated_ffn);
criterion_main!(benches);
