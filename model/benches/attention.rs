//! What a step does beside multiplying weights: attention, the cache, norms, rotations.
//!
//! Shapes of the mid checkpoint (16 heads of 64 values over 4 key and value heads) on 2 threads.
//! `cargo bench -p entente-model --bench attention`; words after `--` select benches by name.
//! Throughput counts multiply-adds of attention as two operations, so `Gelem/s` are GFLOP/s, and
//! bytes of f32 rows elsewhere.

// The macros of criterion make functions without documentation.
#![allow(missing_docs)]

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use entente_model::kernels::{
    AttentionRow, AttentionShape, BLOCK_LEN, Kernels, KvDtype, KvLayer, WeightFormat, select,
};

const SHAPE: AttentionShape =
    AttentionShape { heads: 16, kv_heads: 4, head_dim: 64, window: None, scale: 0.125 };
const THREADS: usize = 2;
const HIDDEN: usize = 1024;
const DTYPES: [KvDtype; 2] = [KvDtype::F32, KvDtype::Bf16];

fn values(n: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 7919) % 2003) as f32 / 1000.0 - 1.0).collect()
}

fn kernels() -> std::sync::Arc<dyn Kernels> {
    select(WeightFormat::Bf16, THREADS).expect("every format has portable kernels")
}

/// A cache with `positions` written, in order.
fn cache(kernels: &dyn Kernels, positions: usize, dtype: KvDtype) -> KvLayer {
    let blocks = positions.div_ceil(BLOCK_LEN);
    let mut cache = KvLayer::new(SHAPE.kv_heads, SHAPE.head_dim, blocks, dtype);
    let kv = values(positions * SHAPE.kv_heads * SHAPE.head_dim);
    kernels.write_kv(&mut cache, &(0..positions).collect::<Vec<_>>(), &kv, &kv);
    cache
}

/// One decoding row at several contexts; chunks of 512 rows of a prompt, at its beginning and late
/// in it; the same with a window.
fn attention(c: &mut Criterion) {
    let kernels = kernels();
    let cases = [
        ("decode", 63..64, None),
        ("decode", 1_999..2_000, None),
        ("decode", 7_999..8_000, None),
        ("decode in a window of 1024", 7_999..8_000, Some(1_024)),
        ("prefill", 0..512, None),
        ("prefill", 3_584..4_096, None),
        ("prefill in a window of 1024", 3_584..4_096, Some(1_024)),
    ];
    for dtype in DTYPES {
        let mut group = c.benchmark_group(format!("attention with {} keys", dtype.name()));
        for (name, positions, window) in &cases {
            let end = positions.end;
            let cache = cache(&*kernels, end, dtype);
            let blocks: &[u32] = &(0..end.div_ceil(BLOCK_LEN) as u32).collect::<Vec<_>>();
            let rows: Vec<AttentionRow<'_>> =
                positions.clone().map(|position| AttentionRow { blocks, position }).collect();
            let shape = AttentionShape { window: *window, ..SHAPE };
            let q = values(rows.len() * SHAPE.heads * SHAPE.head_dim);
            let mut out = vec![0.0; q.len()];
            let seen = |p: usize| (p + 1).min(window.unwrap_or(usize::MAX));
            let seen: usize = positions.clone().map(seen).sum();
            group
                .throughput(Throughput::Elements((seen * SHAPE.heads * SHAPE.head_dim * 4) as u64));
            group.bench_function(BenchmarkId::new(*name, end), |b| {
                b.iter(|| kernels.attention(&shape, &q, &rows, &cache, &mut out));
            });
        }
    }
}

fn write_kv(c: &mut Criterion) {
    let (kernels, rows) = (kernels(), 512);
    let mut group = c.benchmark_group("write_kv");
    let kv = values(rows * SHAPE.kv_heads * SHAPE.head_dim);
    let slots: Vec<usize> = (0..rows).collect();
    group.throughput(Throughput::Bytes(size_of_val(&kv[..]) as u64 * 2));
    for dtype in DTYPES {
        let mut cache = cache(&*kernels, rows, dtype);
        group.bench_function(dtype.name(), |b| {
            b.iter(|| kernels.write_kv(&mut cache, &slots, &kv, &kv));
        });
    }
}

/// What is done to whole rows, at one row and at a chunk of a prompt.
fn rows(c: &mut Criterion) {
    let kernels = kernels();
    let mut group = c.benchmark_group("rows");
    let half = SHAPE.head_dim / 2;
    for rows in [1, 512] {
        let (weight, mut x, delta) =
            (values(HIDDEN), values(rows * HIDDEN), vec![0.0; rows * HIDDEN]);
        let mut y = vec![0.0; x.len()];
        group.throughput(Throughput::Bytes(size_of_val(&x[..]) as u64));
        group.bench_function(BenchmarkId::new("rms_norm", rows), |b| {
            b.iter(|| kernels.rms_norm(&x, &weight, 1e-5, &mut y));
        });
        let (cos, sin) = (vec![0.8; rows * half], vec![0.6; rows * half]);
        group.bench_function(BenchmarkId::new("rope", rows), |b| {
            b.iter(|| kernels.rope(&mut x, SHAPE.heads, SHAPE.head_dim, &cos, &sin));
        });
        group.bench_function(BenchmarkId::new("add", rows), |b| {
            b.iter(|| kernels.add(&mut x, &delta));
        });
    }
}

criterion_group!(benches, attention, write_kv, rows);
criterion_main!(benches);
