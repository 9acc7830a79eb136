//! AVX-512 with BF16 and VNNI instructions: AMD from Zen 4, Intel from Cooper Lake and Sapphire
//! Rapids.

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::fp8::{NORMAL_OFFSET, SUBNORMAL_OFFSETS};
use super::super::memory::Line;
use super::super::quantise::{BLOCK_WORDS, GROUP, GROUP_WORDS, GroupScale, OFFSET, SIGNLESS};
use super::isa::{Isa, LANES};

/// Proof that the processor has AVX-512 F, BW, DQ, VL, VNNI and BF16.
#[derive(Clone, Copy)]
pub struct Avx512(());

impl Avx512 {
    pub fn detect() -> Option<Self> {
        let present = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vnni")
            && is_x86_feature_detected!("avx512bf16");
        present.then_some(Self(()))
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
fn with_features<R>(f: impl FnOnce() -> R) -> R {
    f()
}

/// A line of codes of e4m3 as bf16 numbers.
///
/// # Safety
/// The processor must have what [`Avx512`] proves.
#[inline(always)]
unsafe fn widened_e4m3(line: &Line) -> [__m512i; 2] {
    let bytes: *const __m256i = line.0.as_ptr().cast();
    // SAFETY: the caller promises it, and a line is two registers of bytes.
    unsafe {
        let (left, right) = (_mm256_load_si256(bytes), _mm256_load_si256(bytes.add(1)));
        [widened_half(left), widened_half(right)]
    }
}

/// The same of 32 codes.
///
/// # Safety
/// The same.
#[inline(always)]
unsafe fn widened_half(codes: __m256i) -> __m512i {
    // SAFETY: the caller promises it.
    unsafe {
        // The sign goes to the highest bit and those above the code; the code then moves to its
        // place, and of its signs the highest stays.
        let codes = _mm512_cvtepi8_epi16(codes);
        let bits = _mm512_slli_epi16::<4>(codes);
        let bits = _mm512_and_si512(bits, _mm512_set1_epi16(0x87f0_u16.cast_signed()));
        // Products flush subnormal numbers of bf16, so those of e4m3 become normal here.
        let subnormal = _mm512_testn_epi16_mask(codes, _mm512_set1_epi16(0x78));
        let normal = _mm512_set1_epi16(NORMAL_OFFSET.cast_signed());
        let offsets = _mm512_loadu_si512(SUBNORMAL_OFFSETS.as_ptr().cast());
        let offset = _mm512_mask_permutexvar_epi16(normal, subnormal, codes, offsets);
        _mm512_add_epi16(bits, offset)
    }
}

// SAFETY, for every block below: `self` proves that the processor has the instructions, and
// references to whole arrays and lines are valid to read or write in full.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Isa for Avx512 {
    type V = __m512;
    type Pairs = __m512bh;
    type Ints = __m512i;
    type Bytes = __m512i;

    const NAME: &'static str = "avx512";
    const NAME_BF16: &'static str = "avx512bf16";
    const NAME_INT8: &'static str = "avx512vnni";
    // 24 accumulators, two to four weights, one broadcast: 32 registers.
    const TILE_ROWS: usize = 12;
    // 12 integer sums, 12 of the group and 12 of the row are more than there are registers, so some
    // of the group's go to memory once a group. It pays: with 12 chains of integer products the
    // multipliers have other work while sums are scaled, and weights are read less often.
    const TILE_ROWS_INT8: usize = 6;

    #[inline(always)]
    fn enter<R>(self, f: impl FnOnce() -> R) -> R {
        unsafe { with_features(f) }
    }

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        unsafe { _mm512_set1_ps(x) }
    }

    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> __m512 {
        unsafe { _mm512_loadu_ps(x.as_ptr()) }
    }

    #[inline(always)]
    fn store(self, v: __m512, out: &mut [f32; LANES]) {
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), v) }
    }

    #[inline(always)]
    fn load_line(self, line: &Line) -> __m512 {
        unsafe { _mm512_load_ps(line.0.as_ptr().cast()) }
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_add_ps(a, b) }
    }

    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_sub_ps(a, b) }
    }

    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_div_ps(a, b) }
    }

    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn fused(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        self.fma(a, b, c)
    }

    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_max_ps(a, b) }
    }

    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_min_ps(a, b) }
    }

    #[inline(always)]
    fn exponent(self, v: __m512) -> __m512 {
        unsafe {
            let shifted = _mm512_slli_epi32::<23>(_mm512_castps_si512(v));
            _mm512_castsi512_ps(_mm512_add_epi32(shifted, _mm512_set1_epi32(0x3f80_0000)))
        }
    }

    #[inline(always)]
    fn keep(self, lanes: Range<usize>, v: __m512, other: __m512) -> __m512 {
        let mask = ((1u32 << lanes.end) - 1) & !((1u32 << lanes.start) - 1);
        unsafe { _mm512_mask_mov_ps(other, mask as u16, v) }
    }

    #[inline(always)]
    fn widen(self, line: &Line) -> [__m512; 2] {
        unsafe {
            let pairs = _mm512_load_si512(line.0.as_ptr().cast());
            let first = _mm512_slli_epi32::<16>(pairs);
            let second = _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff_0000_u32 as i32));
            [_mm512_castsi512_ps(first), _mm512_castsi512_ps(second)]
        }
    }

    #[inline(always)]
    fn load_pairs(self, line: &Line) -> __m512bh {
        unsafe { std::mem::transmute(_mm512_load_si512(line.0.as_ptr().cast())) }
    }

    #[inline(always)]
    fn dot(self, acc: __m512, pairs: __m512bh, x: u32) -> __m512 {
        unsafe {
            let x: __m512bh = std::mem::transmute(_mm512_set1_epi32(x as i32));
            _mm512_dpbf16_ps(acc, pairs, x)
        }
    }

    #[inline(always)]
    fn load_e4m3(self, line: &Line) -> [__m512bh; 2] {
        unsafe { std::mem::transmute::<[__m512i; 2], [__m512bh; 2]>(widened_e4m3(line)) }
    }

    #[inline(always)]
    fn widen_e4m3(self, line: &Line) -> [Line; 2] {
        let mut lines = [Line::default(); 2];
        let [left, right] = unsafe { widened_e4m3(line) };
        self.store_bytes(left, &mut lines[0]);
        self.store_bytes(right, &mut lines[1]);
        lines
    }

    #[inline(always)]
    fn splat_int(self, x: i32) -> __m512i {
        unsafe { _mm512_set1_epi32(x) }
    }

    #[inline(always)]
    fn to_floats(self, v: __m512i) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(v) }
    }

    #[inline(always)]
    fn load_bytes(self, line: &Line) -> __m512i {
        unsafe { _mm512_load_si512(line.0.as_ptr().cast()) }
    }

    #[inline(always)]
    fn store_bytes(self, bytes: __m512i, line: &mut Line) {
        unsafe { _mm512_store_si512(line.0.as_mut_ptr().cast(), bytes) }
    }

    #[inline(always)]
    fn look_up(self, table: &[u8; 16], line: &Line) -> [__m512i; 2] {
        unsafe {
            let table = _mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast()));
            let (line, lower) = (self.load_bytes(line), _mm512_set1_epi8(15));
            let first = _mm512_and_si512(line, lower);
            let second = _mm512_and_si512(_mm512_srli_epi16::<4>(line), lower);
            [_mm512_shuffle_epi8(table, first), _mm512_shuffle_epi8(table, second)]
        }
    }

    #[inline(always)]
    fn dot_bytes(self, acc: __m512i, bytes: __m512i, x: u32) -> __m512i {
        unsafe { _mm512_dpbusd_epi32(acc, bytes, _mm512_set1_epi32(x.cast_signed())) }
    }

    #[inline(always)]
    fn group_words(self, values: &[f32; GROUP], out: &mut [u32; GROUP_WORDS]) {
        let (values, _) = values.as_chunks::<LANES>();
        let [scale_word, blocks @ ..] = out;
        let (blocks, _) = blocks.as_chunks_mut::<BLOCK_WORDS>();
        unsafe {
            let signless = _mm512_set1_epi32(SIGNLESS.cast_signed());
            let mut greatest = _mm512_setzero_si512();
            for values in values {
                let bits = _mm512_castps_si512(self.load(values));
                greatest = _mm512_max_epu32(greatest, _mm512_and_si512(bits, signless));
            }
            let magnitude = f32::from_bits(_mm512_reduce_max_epu32(greatest));
            let GroupScale { scale, inverse } = GroupScale::of(magnitude);
            *scale_word = scale.to_bits();
            let inverse = self.splat(inverse);
            for ([correction, words @ ..], values) in blocks.iter_mut().zip(values.chunks_exact(2))
            {
                let mut sums = _mm512_setzero_si512();
                for (words, values) in words.as_chunks_mut::<4>().0.iter_mut().zip(values) {
                    let codes = _mm512_cvtps_epi32(self.mul(self.load(values), inverse));
                    sums = _mm512_add_epi32(sums, codes);
                    _mm_storeu_si128(words.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(codes));
                }
                let sum = _mm512_reduce_add_epi32(sums);
                *correction = sum.wrapping_mul(-OFFSET).cast_unsigned();
            }
        }
    }

    #[inline(always)]
    fn round_pairs(self, values: &[f32; 2 * LANES]) -> [u32; LANES] {
        unsafe {
            let rounded = |at: usize| {
                let value = _mm512_loadu_ps(values[at..at + LANES].as_ptr());
                let bits = _mm512_castps_si512(value);
                let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
                let half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
                let rounded = _mm512_add_epi32(bits, half);
                let no_number = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(value, value);
                _mm512_mask_or_epi32(rounded, no_number, bits, _mm512_set1_epi32(0x0040_0000))
            };
            let upper_halves: [u16; 2 * LANES] = std::array::from_fn(|i| 2 * i as u16 + 1);
            let upper_halves = _mm512_loadu_si512(upper_halves.as_ptr().cast());
            let pairs = _mm512_permutex2var_epi16(rounded(0), upper_halves, rounded(LANES));
            std::mem::transmute(pairs)
        }
    }

    #[inline(always)]
    fn interleave<const R: usize>(self, rows: &[[u32; LANES]; R], out: &mut [[u32; R]; LANES]) {
        const { assert!(R <= LANES) };
        unsafe {
            let mut columns = [_mm512_setzero_si512(); LANES];
            for (column, row) in columns.iter_mut().zip(rows) {
                *column = _mm512_loadu_si512(row.as_ptr().cast());
            }
            let columns = transpose(columns);
            let first_rows = ((1_u32 << R) - 1) as u16;
            for (column, out) in columns.iter().zip(out) {
                _mm512_mask_storeu_epi32(out.as_mut_ptr().cast(), first_rows, *column);
            }
        }
    }

    #[inline(always)]
    fn prefetch(self, line: *const Line) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.cast()) }
    }
}

/// Turns 16 rows of 16 words into their columns: words, pairs of words, quarters, quarters again.
#[inline(always)]
unsafe fn transpose(rows: [__m512i; LANES]) -> [__m512i; LANES] {
    let mut pairs = rows;
    let mut fours = rows;
    let mut eights = rows;
    let mut columns = rows;
    // SAFETY: the caller has the instructions.
    unsafe {
        for i in 0..8 {
            pairs[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
            pairs[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
        }
        // In each quarter `q` of `fours[4 * i + k]`: word `4 * q + k` of rows `4 * i` and on.
        for i in 0..4 {
            for k in 0..2 {
                let (first, second) = (pairs[4 * i + k], pairs[4 * i + 2 + k]);
                fours[4 * i + 2 * k] = _mm512_unpacklo_epi64(first, second);
                fours[4 * i + 2 * k + 1] = _mm512_unpackhi_epi64(first, second);
            }
        }
        for k in 0..4 {
            for i in 0..2 {
                let (first, second) = (fours[8 * i + k], fours[8 * i + 4 + k]);
                eights[4 * i + k] = _mm512_shuffle_i32x4::<0b10_00_10_00>(first, second);
                eights[8 + 4 * i + k] = _mm512_shuffle_i32x4::<0b11_01_11_01>(first, second);
            }
        }
        for k in 0..4 {
            let (first, second) = (eights[k], eights[4 + k]);
            columns[k] = _mm512_shuffle_i32x4::<0b10_00_10_00>(first, second);
            columns[8 + k] = _mm512_shuffle_i32x4::<0b11_01_11_01>(first, second);
            let (first, second) = (eights[8 + k], eights[12 + k]);
            columns[4 + k] = _mm512_shuffle_i32x4::<0b10_00_10_00>(first, second);
            columns[12 + k] = _mm512_shuffle_i32x4::<0b11_01_11_01>(first, second);
        }
    }
    columns
}

#[cfg(test)]
mod tests {
    use super::super::super::quantise::group_words;
    use super::super::portable::Portable;
    use super::super::tile::round_to_bf16;
    use super::*;

    #[test]
    fn activations_become_the_same_words_as_everywhere() {
        let Some(isa) = Avx512::detect() else { return };
        let mut values: [f32; GROUP] = std::array::from_fn(|i| (i as f32 * 0.7).sin());
        for scale in [0.0, 1e-40, 1e-31, 1e-20, 0.03, 1.0, 63.5, 1e30] {
            for special in [None, Some(f32::NAN), Some(f32::INFINITY), Some(f32::NEG_INFINITY)] {
                // Products of halves are ties between two bytes.
                let mut group = values.map(|v| (v * 254.0).round() / 2.0 * scale);
                special.into_iter().for_each(|special| group[17] = special);
                let mut words = [1; GROUP_WORDS];
                isa.enter(|| isa.group_words(&group, &mut words));
                let want = group_words(&group);
                // What is no number is in the scale, and with it in every product.
                assert_eq!(words[0], want[0], "{scale} {special:?}");
                assert!(special.is_some() || words == want, "{scale} {words:x?}");
            }
            values.rotate_left(5);
        }
    }

    #[test]
    fn rows_are_interleaved_word_by_word() {
        let Some(isa) = Avx512::detect() else { return };
        let rows: [[u32; LANES]; 11] =
            std::array::from_fn(|r| std::array::from_fn(|k| (100 * r + k) as u32));
        let mut out = [[0; 11]; LANES];
        isa.enter(|| isa.interleave(&rows, &mut out));
        for (k, out) in out.iter().enumerate() {
            assert_eq!(*out, rows.map(|row| row[k]), "word {k}");
        }
    }

    #[test]
    fn pairs_are_rounded_to_the_same_bits_as_everywhere() {
        let Some(isa) = Avx512::detect() else { return };
        // Every sign, exponent and seven bits of fraction, below it ties and what is next to them.
        for upper in 0..=u16::MAX {
            let lower = [0_u32, 1, 0x7fff, 0x8000, 0x8001, 0xffff];
            let values: [f32; 2 * LANES] =
                std::array::from_fn(|i| f32::from_bits(u32::from(upper) << 16 | lower[i % 6]));
            let words = isa.enter(|| isa.round_pairs(&values));
            let want = |i: usize| round_to_bf16(values[i]) >> 16;
            let want = std::array::from_fn(|i| want(2 * i) | want(2 * i + 1) << 16);
            assert_eq!(words, want, "{upper:#x}");
        }
    }

    #[test]
    fn all_256_codes_of_e4m3_become_the_same_bits_as_everywhere() {
        let Some(isa) = Avx512::detect() else { return };
        for code in 0..256_u32 {
            // Every code beside every other kind of neighbour, in each of the four bytes of a word.
            let line = Line(std::array::from_fn(|i| {
                let other = (i as u32 * 17 + code * 3) & 0xff;
                (code | other << 8 | other << 16 | code << 24).rotate_left(8 * (i as u32 % 4))
            }));
            let [have, want] = [isa.enter(|| isa.widen_e4m3(&line)), Portable.widen_e4m3(&line)];
            assert_eq!(have.map(|line| line.0), want.map(|line| line.0), "{code:#x}");
        }
    }

    /// Two fused multiply-adds in f32, as the instruction is defined, in this order.
    fn two_steps(acc: f32, w: [f32; 2], x: [f32; 2]) -> f32 {
        x[0].mul_add(w[0], x[1].mul_add(w[1], acc))
    }

    /// The class promises the same bits on every machine, so all of them must agree on this.
    #[test]
    fn the_bf16_product_is_the_two_rounded_steps_of_its_definition() {
        let Some(isa) = Avx512::detect() else { return };
        let mut state = 1_u64;
        let mut next = |bits: u32| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> (64 - bits)) as u32
        };
        for _ in 0..100_000 {
            // Signs, 8 bits of fraction and exponents close enough for roundings to show.
            let mut value =
                || f32::from_bits(((next(1) << 31) | ((120 + next(4)) << 23)) | next(7) << 16);
            let (w, x, acc) = ([value(), value()], [value(), value()], value() * 1.000_123);
            let pair = |v: [f32; 2]| v[0].to_bits() >> 16 | v[1].to_bits();
            let line = Line([pair(w); 16]);
            let mut out = [0.0; LANES];
            isa.store(isa.dot(isa.splat(acc), isa.load_pairs(&line), pair(x)), &mut out);
            assert_eq!(out, [two_steps(acc, w, x); LANES], "{acc} + {w:?} * {x:?}");
        }
    }
}
