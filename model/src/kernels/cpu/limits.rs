//! Loops that do nothing but multiply, for knowing how fast that can be.
//!
//! As many accumulators as the kernels keep, all in registers, and operands that never change: no
//! memory is touched, so what is left is the rate of the multipliers.

use std::hint::black_box;

use super::super::memory::{LINE_WORDS, Line};
use super::isa::{Isa, LANES};

/// What is multiplied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Multiply {
    /// f32 by f32.
    F32,
    /// Pairs of bf16, accumulated in f32.
    Bf16,
    /// Fours of int8, accumulated in 32 bits.
    Int8,
}

/// Multiplies `rounds` times with every accumulator, using the best instructions of this processor
/// for `multiply`. Gives the operations done, a multiplication and an addition counting as two.
pub fn multiply(multiply: Multiply, rounds: usize) -> u64 {
    #[cfg(target_arch = "x86_64")]
    {
        use super::avx2::Avx2;
        use super::avx512::Avx512;
        if multiply == Multiply::Int8 && is_x86_feature_detected!("avx512vnni") {
            // SAFETY: the processor has just said that it has the instructions.
            return unsafe { dot_int8(rounds) };
        }
        if let Some(isa) = Avx512::detect() {
            return of_isa::<_, 24>(isa, multiply, rounds);
        }
        if let Some(isa) = Avx2::detect() {
            return of_isa::<_, 6>(isa, multiply, rounds);
        }
    }
    of_isa::<_, 2>(super::portable::Portable, multiply, rounds)
}

/// `N` accumulators. Instruction sets without products of int8 are measured by those of bf16, which
/// is what they would be multiplied as.
fn of_isa<I: Isa, const N: usize>(isa: I, multiply: Multiply, rounds: usize) -> u64 {
    isa.enter(
        #[inline(always)]
        || {
            let line = black_box(Line([0x3f80_3f80; LINE_WORDS]));
            let (w, x) = (isa.load_line(&line), isa.splat(black_box(1e-3)));
            let (pairs, word) = (isa.load_pairs(&line), black_box(0x3a83_3a83));
            let mut sums = [isa.splat(0.0); N];
            for _ in 0..rounds {
                for sum in &mut sums {
                    *sum = match multiply {
                        Multiply::F32 => isa.fma(w, x, *sum),
                        Multiply::Bf16 | Multiply::Int8 => isa.dot(*sum, pairs, word),
                    };
                }
            }
            for sum in sums {
                let mut out = [0.0; LANES];
                isa.store(sum, &mut out);
                black_box(out);
            }
        },
    );
    let per_lane = if multiply == Multiply::F32 { 2 } else { 4 };
    (rounds * N * LANES * per_lane) as u64
}

/// # Safety
/// The processor must have AVX-512 F and VNNI.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn dot_int8(rounds: usize) -> u64 {
    use std::arch::x86_64::*;
    const N: usize = 24;
    let (w, x) = (_mm512_set1_epi32(black_box(0x0101_0101)), black_box(0x0203_0405));
    let x = _mm512_set1_epi32(x);
    let mut sums = [_mm512_setzero_si512(); N];
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = _mm512_dpbusd_epi32(*sum, x, w);
        }
    }
    let total = sums.into_iter().fold(_mm512_setzero_si512(), |a, b| _mm512_add_epi32(a, b));
    black_box(_mm512_reduce_add_epi32(total));
    (rounds * N * LANES * 8) as u64
}
