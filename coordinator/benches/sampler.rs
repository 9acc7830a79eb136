//! What choosing and scoring one token costs, for vocabularies of 32,768 and 151,936 tokens.
//!
//! `cargo bench -p entente-coordinator --bench sampler`. Logits are normally distributed, wide
//! (as where a model is sure of a few tokens) and narrow (as where top-p must look at many).

#![allow(clippy::print_stdout)] // Printing is what it is for.

use std::hint::black_box;
use std::time::{Duration, Instant};

use entente_coordinator::engine::sampler::{Sampling, sample, score};

/// How long each figure is measured; the fastest run counts, as others share the machine.
const MEASURE: Duration = Duration::from_millis(200);
const PLAIN: Sampling = Sampling { temperature: 1.0, top_p: 1.0, top_k: 0, min_p: 0.0, seed: 1 };

fn main() {
    for vocab in [32_768, 151_936] {
        for (width_name, width) in [("wide", 4.0), ("narrow", 0.5)] {
            let logits = logits(vocab, width);
            let report = |what: &str, run: &dyn Fn(usize)| {
                println!("{vocab:>7} {width_name:<6} {what:<16} {:>9.1} us", fastest(run) * 1e6);
            };
            let draw = |what: &str, sampling: Sampling| {
                report(what, &|position| {
                    black_box(sample(&logits, &sampling, position));
                });
            };
            draw("greedy", Sampling { temperature: 0.0, ..PLAIN });
            draw("all", PLAIN);
            draw("min_p 0.05", Sampling { min_p: 0.05, ..PLAIN });
            draw("top_k 40", Sampling { top_k: 40, ..PLAIN });
            draw("top_p 0.95", Sampling { top_p: 0.95, ..PLAIN });
            for top_len in [0, 20] {
                report(&format!("score, top {top_len}"), &|id| {
                    black_box(score(&logits, (id % vocab) as u32, top_len));
                });
            }
        }
    }
}

/// Sums of twelve uniform numbers (an approximation of the normal distribution) times `width`.
fn logits(vocab: usize, width: f32) -> Vec<f32> {
    let mut state = 1_u64;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 40) as f32 / (1_u64 << 24) as f32
    };
    (0..vocab).map(|_| ((0..12).map(|_| uniform()).sum::<f32>() - 6.0) * width).collect()
}

/// Seconds of the fastest run of `run`, which gets the number of the run.
fn fastest(run: &dyn Fn(usize)) -> f64 {
    let (start, mut best, mut runs) = (Instant::now(), f64::INFINITY, 0);
    while start.elapsed() < MEASURE {
        let start = Instant::now();
        run(runs);
        best = best.min(start.elapsed().as_secs_f64());
        runs += 1;
    }
    best
}
