//! Kernels that look at one value, or one row, at a time: exp, SiLU, sums, RMSNorm, RoPE.
//!
//! `exp` is our own: a C library's differs between versions and machines, and would make the kernel
//! class a lie.

use super::isa::{Isa, LANES, load_part, store_part, sum};

/// Below this, 2^n has the exponent -127, whose bits are those of zero.
const EXP_MIN: f32 = -88.0;
/// Above this, 2^n would need the exponent 128.
const EXP_MAX: f32 = 88.376_26;
/// 1.5 * 2^23: added to a small number, it leaves the nearest integer in the low bits.
const ROUND: f32 = 12_582_912.0;

/// e^x to within 2 ulp; exactly 0 at -88 and below (results under 2^-126 are not represented), e^88.37
/// beyond that, NaN for NaN.
///
/// x = n ln 2 + r with |r| <= ln 2 / 2; e^r by the polynomial of Cephes `expf` (Moshier).
#[inline(always)]
pub fn exp<I: Isa>(isa: I, x: I::V) -> I::V {
    let constant = |c: f32| isa.splat(c);
    // With the bound first, a NaN stays NaN.
    let x = isa.min(constant(EXP_MAX), isa.max(constant(EXP_MIN), x));
    let shifted = isa.fma(x, constant(std::f32::consts::LOG2_E), constant(ROUND));
    let n = isa.sub(shifted, constant(ROUND));
    // ln 2 in two parts, the first with few enough bits that n times it is exact.
    let r = isa.fma(n, constant(-0.693_359_4), x);
    let r = isa.fma(n, constant(2.121_944_4e-4), r);
    let mut p = constant(1.987_569_1e-4);
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = isa.fma(p, r, constant(c));
    }
    let p = isa.fma(p, isa.mul(r, r), isa.add(r, constant(1.0)));
    isa.mul(p, isa.exponent(shifted))
}

/// `x * sigmoid(x)`, as `x / (1 + e^-x)`.
#[inline(always)]
pub fn silu<I: Isa>(isa: I, x: I::V) -> I::V {
    let negated = isa.sub(isa.splat(0.0), x);
    isa.div(x, isa.add(isa.splat(1.0), exp(isa, negated)))
}

/// One row of [`super::super::Kernels::rms_norm`]. Squares are summed by 16 lanes, value `i` in
/// lane `i % 16`, then across the lanes.
pub fn rms_norm_row<I: Isa>(isa: I, x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
    isa.enter(
        #[inline(always)]
        || {
            let (vectors, rest) = x.as_chunks::<LANES>();
            let rest = load_part(isa, rest);
            let mut squares = isa.splat(0.0);
            for v in vectors {
                let v = isa.load(v);
                squares = isa.fma(v, v, squares);
            }
            squares = isa.fma(rest, rest, squares);
            let mean = sum(isa, squares) / x.len() as f32;
            let scale = isa.splat(1.0 / (mean + eps).sqrt());

            let (weights, weights_rest) = weight.as_chunks::<LANES>();
            let (out, out_rest) = y.as_chunks_mut::<LANES>();
            for ((v, w), out) in vectors.iter().zip(weights).zip(out) {
                isa.store(isa.mul(isa.mul(isa.load(v), scale), isa.load(w)), out);
            }
            let last = isa.mul(isa.mul(rest, scale), load_part(isa, weights_rest));
            store_part(isa, last, out_rest);
        },
    );
}

/// `x += delta`.
pub fn add<I: Isa>(isa: I, x: &mut [f32], delta: &[f32]) {
    isa.enter(
        #[inline(always)]
        || {
            for (x, delta) in x.iter_mut().zip(delta) {
                *x += delta;
            }
        },
    );
}

/// Rotates all heads of one row in place by the angles whose cosines and sines are given.
pub fn rope_row<I: Isa>(isa: I, row: &mut [f32], head_dim: usize, cos: &[f32], sin: &[f32]) {
    isa.enter(
        #[inline(always)]
        || {
            for head in row.chunks_exact_mut(head_dim) {
                let (first, second) = head.split_at_mut(head_dim / 2);
                let (firsts, first) = first.as_chunks_mut::<LANES>();
                let (seconds, second) = second.as_chunks_mut::<LANES>();
                let (cosines, cos) = cos.as_chunks::<LANES>();
                let (sines, sin) = sin.as_chunks::<LANES>();
                let angles = cosines.iter().zip(sines);
                for ((a, b), (cos, sin)) in firsts.iter_mut().zip(seconds).zip(angles) {
                    let (va, vb) = (isa.load(a), isa.load(b));
                    let turned = rotate(isa, [va, vb, isa.load(cos), isa.load(sin)]);
                    isa.store(turned[0], a);
                    isa.store(turned[1], b);
                }
                if !first.is_empty() {
                    let (va, vb) = (load_part(isa, first), load_part(isa, second));
                    let angles = (load_part(isa, cos), load_part(isa, sin));
                    let turned = rotate(isa, [va, vb, angles.0, angles.1]);
                    store_part(isa, turned[0], first);
                    store_part(isa, turned[1], second);
                }
            }
        },
    );
}

/// `(a, b)` becomes `(a cos - b sin, b cos + a sin)`.
#[inline(always)]
fn rotate<I: Isa>(isa: I, [a, b, cos, sin]: [I::V; 4]) -> [I::V; 2] {
    let first = isa.sub(isa.mul(a, cos), isa.mul(b, sin));
    [first, isa.add(isa.mul(b, cos), isa.mul(a, sin))]
}

#[cfg(test)]
mod tests {
    use super::super::portable::Portable;
    use super::*;

    fn exp_of(isa: impl Isa, x: f32) -> f32 {
        let mut out = [0.0; LANES];
        isa.enter(|| isa.store(exp(isa, isa.splat(x)), &mut out));
        out[7]
    }

    fn check_exp(isa: impl Isa) {
        for step in -8700..8830 {
            let x = step as f32 * 0.01;
            let (have, want) = (f64::from(exp_of(isa, x)), f64::from(x).exp());
            assert!(((have - want) / want).abs() < 2.4e-7, "exp({x}) = {have}, not {want}");
        }
        assert_eq!(exp_of(isa, 0.0), 1.0);
        for x in [-88.0, -89.0, -1e30, f32::NEG_INFINITY] {
            assert_eq!(exp_of(isa, x).to_bits(), 0, "exp({x})");
        }
        for x in [88.4, 1e30, f32::INFINITY] {
            assert!(exp_of(isa, x) > 2e38, "exp({x})");
        }
        assert!(exp_of(isa, f32::NAN).is_nan());
    }

    #[test]
    fn exp_is_within_two_ulp_and_total() {
        check_exp(Portable);
        #[cfg(target_arch = "x86_64")]
        {
            super::super::avx2::Avx2::detect().into_iter().for_each(check_exp);
            super::super::avx512::Avx512::detect().into_iter().for_each(check_exp);
        }
    }
}
