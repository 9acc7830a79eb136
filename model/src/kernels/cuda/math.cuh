// Functions that the compiler offers too, but not with the same bits in every version of it: a
// kernel class must not depend on which toolkit compiled it. Compiled without contraction, so that
// a fused multiply-add is one exactly where it is written.
#pragma once

#include "device.cuh"

__device__ inline float minus_infinity() { return bits_to_float(0xff800000u); }

// e^x to within 2 ulp; 0 at -88 and below, e^88.37 beyond that, NaN for NaN.
//
// x = n ln 2 + r with |r| <= ln 2 / 2; e^r by the polynomial of Cephes `expf` (Moshier). The same
// operations as `exp` of the processors' kernels (cpu/elementwise.rs), hence the same bits.
__device__ inline float exponential(float x) {
    x = x < -88.0f ? -88.0f : x;
    x = x > 88.37626f ? 88.37626f : x;
    // 1.5 * 2^23: added to a small number, it leaves the nearest integer in the low bits.
    const float round = 12582912.0f;
    float shifted = fmaf(x, 1.44269504f, round);
    float n = shifted - round;
    // ln 2 in two parts, the first with few enough bits that n times it is exact.
    float r = fmaf(n, -0.6933594f, x);
    r = fmaf(n, 2.1219444e-4f, r);
    float p = 1.9875691e-4f;
    p = fmaf(p, r, 1.3981999e-3f);
    p = fmaf(p, r, 8.333452e-3f);
    p = fmaf(p, r, 4.1665796e-2f);
    p = fmaf(p, r, 1.6666665e-1f);
    p = fmaf(p, r, 0.5f);
    p = fmaf(p, r * r, r + 1.0f);
    // 2^n: n + 127 in the place of the exponent; n = -127 gives 0.
    return p * bits_to_float((float_to_bits(shifted) + 127u) << 23);
}

// x * sigmoid(x).
__device__ inline float silu(float x) { return x / (1.0f + exponential(0.0f - x)); }
