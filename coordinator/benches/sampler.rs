//! What choosing and scoring one token costs, for vocabularies of 32,768 and 151,936 tokens.
//!
//! `cargo bench -p entente-coordinator --bench sampler`. Logits are normally distributed, wide
//! (as where a model is sure of a few tokens) and narrow (as where top-p must look at many).

// The macros of criterion make functions without documentation.
#![allow(missing_docs)]

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use entente_coordinator::engine::sampler::{Sampling, sample, score};

const PLAIN: Sampling = Sampling { temperature: 1.0, top_p: 1.0, top_k: 0, min_p: 0.0, seed: 1 };
const VOCABS: [usize; 2] = [32_768, 151_936];
const WIDTHS: [(&str, f32); 2] = [("wide", 4.0), ("narrow", 0.5)];

/// Sums of twelve uniform numbers (an approximation of the normal distribution) times `width`.
fn logits(vocab: usize, width: f32) -> Vec<f32> {
    let mut state = 1_u64;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 40) as f32 / (1_u64 << 24) as f32
    };
    (0..vocab).map(|_| ((0..12).map(|_| uniform()).sum::<f32>() - 6.0) * width).collect()
}

/// Calls `run` for logits of each size and width, with a name for them.
fn for_every_row(mut run: impl FnMut(&str, &[f32])) {
    for vocab in VOCABS {
        for (name, width) in WIDTHS {
            run(&format!("{vocab} {name}"), &logits(vocab, width));
        }
    }
}

fn samples(c: &mut Criterion) {
    let mut group = c.benchmark_group("sample");
    let cases = [
        ("greedy", Sampling { temperature: 0.0, ..PLAIN }),
        ("all", PLAIN),
        ("min_p 0.05", Sampling { min_p: 0.05, ..PLAIN }),
        ("top_k 40", Sampling { top_k: 40, ..PLAIN }),
        ("top_p 0.95", Sampling { top_p: 0.95, ..PLAIN }),
    ];
    for_every_row(|name, logits| {
        for (what, sampling) in &cases {
            let mut position = 0;
            group.bench_function(BenchmarkId::new(*what, name), |b| {
                b.iter(|| {
                    // Another number is drawn each time.
                    position += 1;
                    black_box(sample(logits, sampling, position))
                });
            });
        }
    });
}

fn scores(c: &mut Criterion) {
    let mut group = c.benchmark_group("score");
    for_every_row(|name, logits| {
        for top_len in [0, 20] {
            group.bench_function(BenchmarkId::new(format!("top {top_len}"), name), |b| {
                b.iter(|| black_box(score(logits, 7, top_len)));
            });
        }
    });
}

criterion_group!(benches, samples, scores);
criterion_main!(benches);
