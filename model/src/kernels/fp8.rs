//! Numbers of eight bits with a floating point: e4m3 of the Open Compute Project (OCP 8-bit Floating
//! Point Specification 1.0, 2023), and weights that are stored as them.
//!
//! A code is a sign, four bits of exponent and three of fraction: multiples of 2^-9 below 2^-6, then
//! numbers of four significant bits up to 448; no infinities, and one NaN of either sign. All of
//! them are bf16 numbers that are normal or zero, and so is what kernels multiply.
//!
//! Weights are cut into blocks of 128 inputs. Each output has one f32 scale a block, by which the
//! sum of its products is multiplied. A panel holds the codes first, a line for each pair of
//! inputs, `[pair][output of the panel: 32][input of the pair: 2]`, then the scales, two lines a
//! block, `[block][output of the panel: 32]`.
//!
//! Two kinds of checkpoint end up here. Of one that is stored in e4m3, codes and scales are taken as
//! they are. All others are rounded: the scale is the greatest magnitude of the block over 448, and
//! a code is the nearest to the weight over the scale. A block in which something is no finite
//! number has NaN for its scale and zeros for codes, so NaN is never among the codes of a panel, and
//! kernels need not know it.

use super::cpu::isa::Isa;
use super::matrix::PANEL;
use super::memory::Line;
use super::quantise::{MAGNITUDE_MIN, ROUND, SIGNLESS};
use super::source::{MatrixSource, SourceDtype};

/// Inputs that share a scale.
pub const BLOCK: usize = 128;
/// The greatest number.
const MAX: f32 = 448.0;
/// Its code; that of NaN is the next.
const MAX_CODE: u32 = 0x7e;
/// All bits of a code but the sign.
const MAGNITUDE: u32 = 0x7f;
/// The least code of a normal number, which stands for 2^-6.
const NORMAL_MIN: u32 = 8;
/// The bits of 2^-6 in f32.
const NORMAL_MIN_BITS: u32 = 121 << 23;
/// From the exponent of a code to that of an f32: the difference of the biases, 127 and 7.
const REBIAS: u32 = 120;
/// Bits of the fraction that f32 has and a code has not.
const NARROWER: u32 = 20;

/// Lines of the codes of a panel.
pub const fn code_lines(inputs: usize) -> usize {
    inputs.div_ceil(2)
}

/// Lines of the scales of a panel.
pub const fn scale_lines(inputs: usize) -> usize {
    inputs.div_ceil(BLOCK) * 2
}

/// The number that a code stands for.
pub fn value(code: u8) -> f32 {
    if is_nan(code) { f32::NAN } else { f32::from_bits(widened(code.into())) }
}

fn is_nan(code: u8) -> bool {
    u32::from(code) & MAGNITUDE > MAX_CODE
}

/// The bits, as f32, of the number of a code that is not NaN; the lower half of them is zero.
#[inline(always)]
const fn widened(code: u32) -> u32 {
    let magnitude = code & MAGNITUDE;
    let normal = (magnitude << NARROWER) + (REBIAS << 23);
    // Below, numbers are multiples of 2^-9.
    let subnormal = (magnitude as f32 * (1.0 / 512.0)).to_bits();
    let bits = if magnitude < NORMAL_MIN { subnormal } else { normal };
    (code & !MAGNITUDE) << 24 | bits
}

/// Four bits further up, the bits of a code but for its sign are those of a bf16 number, less this:
/// for the codes below that of 2^-6, by code.
pub const SUBNORMAL_OFFSETS: [u16; 32] = {
    let mut offsets = [0; 32];
    let mut code = 0;
    while code < NORMAL_MIN {
        offsets[code as usize] = (widened(code) >> 16) as u16 - ((code as u16) << 4);
        code += 1;
    }
    offsets
};
/// The same for all others.
pub const NORMAL_OFFSET: u16 = (REBIAS << 7) as u16;

/// Two codes, the first in the lower byte, as two bf16 numbers, the first in the lower half.
#[inline(always)]
pub fn widened_pair(codes: u32) -> u32 {
    widened(codes & 0xff) >> 16 | widened(codes >> 8 & 0xff)
}

/// The code nearest to a finite number, ties to even; 448 and its negative for what is beyond them.
#[inline(always)]
fn nearest(v: f32) -> u32 {
    let bits = v.to_bits() & SIGNLESS;
    let half = (1 << (NARROWER - 1)) - 1 + (bits >> NARROWER & 1);
    let normal = (bits.wrapping_add(half) >> NARROWER).wrapping_sub(REBIAS << 3);
    // In multiples of 2^-9; the greatest of them rounds to the code of 2^-6, which is the next.
    let multiples = f32::from_bits(bits) * 512.0 + ROUND;
    let subnormal = multiples.to_bits().wrapping_sub(ROUND.to_bits());
    let magnitude = if bits < NORMAL_MIN_BITS { subnormal } else { normal };
    magnitude.min(MAX_CODE) | v.to_bits() >> 24 & !MAGNITUDE
}

/// A block of one output: what multiplies it, and its codes, zeros beyond the last input.
type Block = (f32, [u8; BLOCK]);

/// Packs panel `p`, whose lines begin as zeros, block by block.
pub fn pack<I: Isa>(isa: I, source: &MatrixSource<'_>, p: usize, panel: &mut [Line]) {
    let outs = p * PANEL..source.out_features.min((p + 1) * PANEL);
    let (codes, scales) = panel.split_at_mut(code_lines(source.in_features));
    let blocks = codes.chunks_mut(BLOCK / 2).zip(scales.as_chunks_mut::<2>().0);
    isa.enter(
        #[inline(always)]
        || {
            for (b, (lines, scales)) in blocks.enumerate() {
                for (lane, out) in outs.clone().enumerate() {
                    let (scale, codes) = match source.dtype {
                        SourceDtype::E4m3 => stored_block(source, out, b),
                        _ => rounded_block(source, out, b),
                    };
                    scales[lane / 16].0[lane % 16] = scale.to_bits();
                    for (line, pair) in lines.iter_mut().zip(codes.as_chunks().0) {
                        let pair = u32::from(u16::from_le_bytes(*pair));
                        line.0[lane / 2] |= pair << (lane % 2 * 16);
                    }
                }
            }
        },
    );
}

/// Block `b` as the checkpoint has it.
fn stored_block(source: &MatrixSource<'_>, out: usize, b: usize) -> Block {
    let row = &source.row(out)[b * BLOCK..];
    let mut codes = [0; BLOCK];
    for (code, stored) in codes.iter_mut().zip(row) {
        *code = *stored;
    }
    let scale = source.scale(out, b);
    if codes.iter().any(|code| is_nan(*code)) || !scale.is_finite() {
        return (f32::NAN, [0; BLOCK]);
    }
    (scale, codes)
}

/// Block `b`, rounded.
#[inline(always)]
fn rounded_block(source: &MatrixSource<'_>, out: usize, b: usize) -> Block {
    let mut values = [0.0; BLOCK];
    let (start, end) = (b * BLOCK, source.in_features.min((b + 1) * BLOCK));
    source.each(out, start, end, |i, value| values[i] = value);
    round(&values)
}

#[inline(always)]
fn round(values: &[f32; BLOCK]) -> Block {
    // Compared as bits, so that a NaN is greater than all and shows.
    let greatest = values.iter().map(|v| v.to_bits() & SIGNLESS).fold(0, u32::max);
    let greatest = f32::from_bits(greatest);
    if !greatest.is_finite() {
        return (f32::NAN, [0; BLOCK]);
    }
    if greatest < MAGNITUDE_MIN {
        return (0.0, [0; BLOCK]);
    }
    let scale = greatest / MAX;
    let mut codes = [0; BLOCK];
    for (code, value) in codes.iter_mut().zip(values) {
        *code = nearest(value / scale) as u8;
    }
    (scale, codes)
}

/// The weight of a panel that multiplies `inputs` inputs.
#[cfg(test)]
pub fn weight(panel: &[Line], inputs: usize, lane: usize, input: usize) -> f32 {
    let pair = panel[input / 2].0[lane / 2] >> (lane % 2 * 16);
    let scales = &panel[code_lines(inputs) + input / BLOCK * 2..];
    let scale = f32::from_bits(scales[lane / 16].0[lane % 16]);
    scale * value((pair >> (input % 2 * 8)) as u8)
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::super::cpu::portable::Portable;
    use super::super::pool::Pool;
    use super::super::{Layout, Matrix};
    use super::*;

    /// The definition: (-1)^s 2^(e-7) (1 + f/8), and (-1)^s 2^-6 (f/8) where e is zero.
    fn defined(code: u8) -> f64 {
        let (exponent, fraction) = (i32::from(code >> 3 & 15), f64::from(code & 7) / 8.0);
        let magnitude = match (exponent, code & 7) {
            (15, 7) => f64::NAN,
            (0, _) => fraction / 64.0,
            _ => (1.0 + fraction) * 2_f64.powi(exponent - 7),
        };
        if code < 0x80 { magnitude } else { -magnitude }
    }

    #[test]
    fn all_256_codes_stand_for_what_they_are_defined_as() {
        for code in 0..=u8::MAX {
            let (have, want) = (value(code), defined(code));
            assert_eq!(have.is_nan(), want.is_nan(), "{code:#x}");
            if !have.is_nan() {
                assert_eq!(f64::from(have), want, "{code:#x}");
                assert_eq!(have.is_sign_negative(), code >= 0x80, "{code:#x}");
                // Exact in bf16, and never one of its subnormal numbers.
                assert_eq!(bf16::from_f32(have).to_f32(), have);
                assert!(have == 0.0 || have.is_normal());
                let pair = widened_pair(u32::from(code) | 0x3500);
                let want = u32::from(bf16::from_f32(have).to_bits());
                assert_eq!(pair, want | u32::from(bf16::from_f32(value(0x35)).to_bits()) << 16);
            }
        }
    }

    /// The nearest of all codes, of two that are as near the one with an even fraction.
    fn nearest_of_all(v: f32) -> u8 {
        let distance = |code: u8| (f64::from(value(code)) - f64::from(v)).abs();
        let signed = if v.is_sign_negative() { 0x80..0xff } else { 0..0x7f };
        let better = |best: u8, code: u8| {
            let (d, best_d) = (distance(code), distance(best));
            if d < best_d || d == best_d && code.is_multiple_of(2) { code } else { best }
        };
        signed.reduce(better).unwrap()
    }

    #[test]
    fn rounding_finds_the_nearest_code_of_all() {
        let around = |v: f32| [v.next_down(), v, v.next_up()];
        let mut values = vec![0.0, 1e-40, 1e-12, 447.9, 448.0, 450.0, 464.0, 1e9, f32::MAX];
        for code in 0..0x7e_u8 {
            let (one, next) = (value(code), value(code + 1));
            // Where codes are, where they change, and something on either side.
            let middle = (one + next) / 2.0;
            values.extend([around(one), around(middle)].concat());
            values.extend([0.25, 0.75].map(|part| one + part * (next - one)));
        }
        for v in values.iter().flat_map(|v| [*v, -*v]) {
            assert_eq!(nearest(v) as u8, nearest_of_all(v), "{v:e}");
        }
    }

    #[test]
    fn a_block_is_within_half_a_step_of_its_weights_and_its_greatest_is_exact() {
        for magnitude in [1e-25_f32, 0.02, 1.0, 3e30] {
            let values: [f32; BLOCK] =
                std::array::from_fn(|i| ((i * 37 % 128) as f32 - 63.5) / 63.5 * magnitude);
            let (scale, codes) = round(&values);
            assert_eq!(scale, magnitude / 448.0);
            for (code, want) in codes.iter().zip(values) {
                let have = value(*code) * scale;
                // Four significant bits, or half of 2^-9.
                let bound = (want.abs() / 16.0).max(scale / 1024.0) * 1.001;
                assert!((have - want).abs() <= bound, "{have} for {want}");
            }
            assert_eq!([codes[0], codes[0] & 0x7f], [0xfe, 0x7e]);
        }
        assert_eq!(round(&[0.0; BLOCK]), (0.0, [0; BLOCK]));
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut values = [1.0; BLOCK];
            values[77] = bad;
            let (scale, codes) = round(&values);
            assert!(scale.is_nan() && codes == [0; BLOCK]);
        }
    }

    #[test]
    fn stored_codes_and_scales_are_taken_as_they_are() {
        use super::super::source::Scales;

        // 300 inputs are two whole blocks and a part, 40 outputs a whole panel and a part. The matrix
        // begins 100 outputs into a tensor whose blocks are 128 by 128.
        let (outputs, inputs) = (40, 300);
        let mut bytes: Vec<u8> = (0..outputs * inputs).map(|i| (i * 7 % 127) as u8).collect();
        bytes[13 * inputs + 200] = 0xff;
        let scales: Vec<u8> =
            (0..6).flat_map(|i| (i as f32 * 0.37 + 0.001).to_le_bytes()).collect();
        let scales = Scales {
            dtype: SourceDtype::F32,
            bytes: &scales,
            block: [128, 128],
            columns: 3,
            outputs_before: 100,
        };
        let (out_features, in_features, dtype) = (outputs, inputs, SourceDtype::E4m3);
        let source =
            MatrixSource { out_features, in_features, dtype, bytes: &bytes, scales: Some(scales) };
        let packed = Matrix::pack(Portable, source, Layout::Fp8, &Pool::new(1));
        for (at, code) in bytes.iter().enumerate() {
            let (out, input) = (at / inputs, at % inputs);
            let scale = ((100 + out) / 128 * 3 + input / 128) as f32 * 0.37 + 0.001;
            let have = packed.quantised(out, input);
            if (out, input / 128) == (13, 1) {
                assert!(have.is_nan(), "a NaN spoils its block");
            } else {
                assert_eq!(have, value(*code) * scale, "weight {input} of output {out}");
            }
        }
    }
}
