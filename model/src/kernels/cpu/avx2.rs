//! AVX2 with FMA: x86-64 processors since about 2013 (Haswell, Zen).
//!
//! A vector is two registers of 8 lanes. There is no bf16 multiply, so pairs are widened, which is
//! exact, and multiplied in f32. Bytes become 16 bits wide first: the instruction that multiplies bytes gives
//! up at sums beyond 16 bits.

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::memory::Line;
use super::isa::{Isa, LANES};

/// Proof that the processor has AVX2 and FMA.
#[derive(Clone, Copy)]
pub struct Avx2(());

impl Avx2 {
    pub fn detect() -> Option<Self> {
        let present = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
        present.then_some(Self(()))
    }
}

#[target_feature(enable = "avx2,fma")]
fn with_features<R>(f: impl FnOnce() -> R) -> R {
    f()
}

/// Applies an operation to the lower and the upper lanes.
macro_rules! both {
    ($op:ident, $($v:expr),+) => {
        unsafe { [$op($($v[0]),+), $op($($v[1]),+)] }
    };
}

// SAFETY, for every block below: `self` proves that the processor has the instructions, and
// references to whole arrays and lines are valid to read or write in full.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Isa for Avx2 {
    type V = [__m256; 2];
    type Pairs = [[__m256; 2]; 2];
    type Ints = [__m256i; 2];
    type Bytes = [__m256i; 2];

    const NAME: &'static str = "avx2";
    const NAME_BF16: &'static str = "avx2";
    const NAME_INT8: &'static str = "avx2";
    // 8 accumulators of the 16 registers; widened weights and a broadcast take the rest.
    const TILE_ROWS: usize = 2;
    const TILE_ROWS_INT8: usize = 1;

    #[inline(always)]
    fn enter<R>(self, f: impl FnOnce() -> R) -> R {
        unsafe { with_features(f) }
    }

    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        unsafe { [_mm256_set1_ps(x); 2] }
    }

    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::V {
        unsafe { [_mm256_loadu_ps(x.as_ptr()), _mm256_loadu_ps(x.as_ptr().add(8))] }
    }

    #[inline(always)]
    fn store(self, v: Self::V, out: &mut [f32; LANES]) {
        unsafe {
            _mm256_storeu_ps(out.as_mut_ptr(), v[0]);
            _mm256_storeu_ps(out.as_mut_ptr().add(8), v[1]);
        }
    }

    #[inline(always)]
    fn load_line(self, line: &Line) -> Self::V {
        let start: *const f32 = line.0.as_ptr().cast();
        unsafe { [_mm256_load_ps(start), _mm256_load_ps(start.add(8))] }
    }

    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        both!(_mm256_add_ps, a, b)
    }

    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        both!(_mm256_sub_ps, a, b)
    }

    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        both!(_mm256_mul_ps, a, b)
    }

    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        both!(_mm256_div_ps, a, b)
    }

    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        both!(_mm256_fmadd_ps, a, b, c)
    }

    #[inline(always)]
    fn fused(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        self.fma(a, b, c)
    }

    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        both!(_mm256_max_ps, a, b)
    }

    #[inline(always)]
    fn min(self, a: Self::V, b: Self::V) -> Self::V {
        both!(_mm256_min_ps, a, b)
    }

    #[inline(always)]
    fn exponent(self, v: Self::V) -> Self::V {
        v.map(|v| unsafe {
            let shifted = _mm256_slli_epi32::<23>(_mm256_castps_si256(v));
            _mm256_castsi256_ps(_mm256_add_epi32(shifted, _mm256_set1_epi32(0x3f80_0000)))
        })
    }

    #[inline(always)]
    fn keep(self, lanes: Range<usize>, v: Self::V, other: Self::V) -> Self::V {
        let mut choice = [0.0; LANES];
        // All bits set: a blend looks at the sign bit.
        choice[lanes].fill(f32::from_bits(u32::MAX));
        let choice = self.load(&choice);
        both!(_mm256_blendv_ps, other, v, choice)
    }

    #[inline(always)]
    fn widen(self, line: &Line) -> [Self::V; 2] {
        let start: *const __m256i = line.0.as_ptr().cast();
        unsafe {
            let pairs = [_mm256_load_si256(start), _mm256_load_si256(start.add(1))];
            let upper = _mm256_set1_epi32(0xffff_0000_u32 as i32);
            let first = pairs.map(|p| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(p)));
            let second = pairs.map(|p| _mm256_castsi256_ps(_mm256_and_si256(p, upper)));
            [first, second]
        }
    }

    #[inline(always)]
    fn load_pairs(self, line: &Line) -> Self::Pairs {
        self.widen(line)
    }

    #[inline(always)]
    fn dot(self, acc: Self::V, pairs: Self::Pairs, x: u32) -> Self::V {
        let first = self.splat(f32::from_bits(x << 16));
        let second = self.splat(f32::from_bits(x & 0xffff_0000));
        self.fma(pairs[1], second, self.fma(pairs[0], first, acc))
    }

    #[inline(always)]
    fn splat_int(self, x: i32) -> Self::Ints {
        unsafe { [_mm256_set1_epi32(x); 2] }
    }

    #[inline(always)]
    fn to_floats(self, v: Self::Ints) -> Self::V {
        both!(_mm256_cvtepi32_ps, v)
    }

    #[inline(always)]
    fn load_bytes(self, line: &Line) -> Self::Bytes {
        let start: *const __m256i = line.0.as_ptr().cast();
        unsafe { [_mm256_load_si256(start), _mm256_load_si256(start.add(1))] }
    }

    #[inline(always)]
    fn store_bytes(self, bytes: Self::Bytes, line: &mut Line) {
        let start: *mut __m256i = line.0.as_mut_ptr().cast();
        unsafe {
            _mm256_store_si256(start, bytes[0]);
            _mm256_store_si256(start.add(1), bytes[1]);
        }
    }

    #[inline(always)]
    fn look_up(self, table: &[u8; 16], line: &Line) -> [Self::Bytes; 2] {
        unsafe {
            let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast()));
            let (line, lower) = (self.load_bytes(line), _mm256_set1_epi8(15));
            let first = line.map(|v| _mm256_and_si256(v, lower));
            let second = line.map(|v| _mm256_and_si256(_mm256_srli_epi16::<4>(v), lower));
            [first, second].map(|codes| codes.map(|v| _mm256_shuffle_epi8(table, v)))
        }
    }

    #[inline(always)]
    fn dot_bytes(self, acc: Self::Ints, bytes: Self::Bytes, x: u32) -> Self::Ints {
        unsafe {
            let x = _mm256_set1_epi32(x.cast_signed());
            // Bytes 0 and 2 of each lane, and bytes 1 and 3, as pairs of 16 bits.
            let x_even = _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(x));
            let x_odd = _mm256_srai_epi16::<8>(x);
            let mut sums = acc;
            for (sum, bytes) in sums.iter_mut().zip(bytes) {
                let even = _mm256_and_si256(bytes, _mm256_set1_epi16(255));
                let odd = _mm256_srli_epi16::<8>(bytes);
                *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(even, x_even));
                *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(odd, x_odd));
            }
            sums
        }
    }

    #[inline(always)]
    fn prefetch(self, line: *const Line) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.cast()) }
    }
}
