//! Plain Rust, for any processor: arrays that the compiler vectorises as far as the target's
//! baseline goes. Multiply and add are rounded separately, so that a machine without a fused
//! instruction gives the same bits at the same pace; but for products of bytes, see
//! [`Isa::fused`].

use std::array::from_fn;
use std::ops::Range;

use super::super::memory::Line;
use super::isa::{Isa, LANES};

/// No proof needed.
#[derive(Clone, Copy)]
pub struct Portable;

impl Isa for Portable {
    type V = [f32; LANES];
    type Pairs = [[f32; LANES]; 2];
    type Ints = [i32; LANES];
    type Bytes = [[u8; 4]; LANES];

    const NAME: &'static str = "portable";
    const NAME_BF16: &'static str = "portable";
    const NAME_INT8: &'static str = "portable";
    // One row's 32 accumulators are half of the 16 registers of 4 lanes that baselines have.
    const TILE_ROWS: usize = 1;
    const TILE_ROWS_INT8: usize = 1;

    #[inline(always)]
    fn enter<R>(self, f: impl FnOnce() -> R) -> R {
        f()
    }

    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        [x; LANES]
    }

    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::V {
        *x
    }

    #[inline(always)]
    fn store(self, v: Self::V, out: &mut [f32; LANES]) {
        *out = v;
    }

    #[inline(always)]
    fn load_line(self, line: &Line) -> Self::V {
        line.0.map(f32::from_bits)
    }

    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        from_fn(|i| a[i] + b[i])
    }

    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        from_fn(|i| a[i] - b[i])
    }

    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        from_fn(|i| a[i] * b[i])
    }

    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        from_fn(|i| a[i] / b[i])
    }

    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        from_fn(|i| a[i] * b[i] + c[i])
    }

    /// A call of the maths library where the target's baseline has no such instruction: used once
    /// for 32 products of bytes.
    #[inline(always)]
    fn fused(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        from_fn(|i| a[i].mul_add(b[i], c[i]))
    }

    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        from_fn(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }

    #[inline(always)]
    fn min(self, a: Self::V, b: Self::V) -> Self::V {
        from_fn(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }

    #[inline(always)]
    fn exponent(self, v: Self::V) -> Self::V {
        v.map(|v| f32::from_bits((v.to_bits() << 23).wrapping_add(0x3f80_0000)))
    }

    #[inline(always)]
    fn keep(self, lanes: Range<usize>, v: Self::V, other: Self::V) -> Self::V {
        from_fn(|i| if lanes.contains(&i) { v[i] } else { other[i] })
    }

    #[inline(always)]
    fn widen(self, line: &Line) -> [Self::V; 2] {
        let first = line.0.map(|pair| f32::from_bits(pair << 16));
        let second = line.0.map(|pair| f32::from_bits(pair & 0xffff_0000));
        [first, second]
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
        [x; LANES]
    }

    #[inline(always)]
    fn to_floats(self, v: Self::Ints) -> Self::V {
        v.map(|v| v as f32)
    }

    #[inline(always)]
    fn load_bytes(self, line: &Line) -> Self::Bytes {
        line.0.map(u32::to_le_bytes)
    }

    #[inline(always)]
    fn store_bytes(self, bytes: Self::Bytes, line: &mut Line) {
        line.0 = bytes.map(u32::from_le_bytes);
    }

    #[inline(always)]
    fn look_up(self, table: &[u8; 16], line: &Line) -> [Self::Bytes; 2] {
        let codes = self.load_bytes(line);
        let first = codes.map(|four| four.map(|code| table[usize::from(code & 15)]));
        let second = codes.map(|four| four.map(|code| table[usize::from(code >> 4)]));
        [first, second]
    }

    #[inline(always)]
    fn dot_bytes(self, acc: Self::Ints, bytes: Self::Bytes, x: u32) -> Self::Ints {
        let x = x.to_le_bytes().map(|b| i32::from(b.cast_signed()));
        let mut sums = acc;
        // Nothing here can overflow; a check would keep the loop from becoming vectors.
        for j in 0..4 {
            for (sum, four) in sums.iter_mut().zip(&bytes) {
                *sum = sum.wrapping_add(i32::from(four[j]).wrapping_mul(x[j]));
            }
        }
        sums
    }

    #[inline(always)]
    fn prefetch(self, _line: *const Line) {}
}
