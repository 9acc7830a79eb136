//! Numbers of eight and four bits: how weights and activations become them.
//!
//! **Weights** are cut into blocks of 32 along the inputs. A block has one scale, kept as a bf16
//! number and chosen before the codes, so that its rounding costs nothing: codes are nearest to
//! the scale that is stored. A code stands for a number between -127 and 127:
//! - q8: the code is the number, and the scale is the greatest weight over 127;
//! - q4: the code counts a [`CODEBOOK`] of 16 numbers that lie closer around zero, where most
//!   weights are (the idea of NF4, Dettmers et al. 2023, and of llama.cpp's IQ4_NL). Of a few
//!   candidate scales, either sign, the one with the least squared error is kept.
//!
//! **Activations** are quantised once, row by row, in groups of [`GROUP`] with one f32 scale, to
//! signed bytes. What a byte holds depends on its own row alone.
//!
//! The multipliers want unsigned weights, so a number `n` is multiplied as `n + 128`, and 128 times
//! the sum of a block's activations is taken away beforehand: integer sums are exact, whatever the
//! order. Together with [`super::cpu`]'s rule to round each f32 operation by itself, that makes the
//! product the same bits on every processor.
//!
//! Everything here is written as loops over arrays that the compiler turns into vector
//! instructions, those of the caller's instruction set where it is inlined. Integers wrap by name
//! where they cannot overflow: a check would keep the loop from becoming vectors.

use super::cpu::isa::LANES;

/// Weights of a block, which share a scale.
pub const BLOCK: usize = 32;
/// Activations that share a scale: two blocks, so that the multipliers spend less on scaling. A
/// block more or less in it moves the error of a product by a few per cent of itself.
pub const GROUP: usize = 2 * BLOCK;
/// Words of a block of activations: the correction, then four activations a word.
pub const BLOCK_WORDS: usize = 1 + BLOCK / 4;
/// Words of a whole group of activations: the scale, then the blocks.
pub const GROUP_WORDS: usize = 1 + GROUP / BLOCK * BLOCK_WORDS;

/// What the multipliers add to a weight to make it unsigned.
pub const OFFSET: i32 = 128;

/// The numbers that q4 codes stand for, ascending: found by Lloyd's iteration (1982) on blocks of
/// normal weights with the candidate scales below. The relative error of a normal weight is 7.4 %;
/// 16 evenly spaced numbers, as in Q4_0, have 8.5 %.
const CODEBOOK: [i8; 16] =
    [-127, -100, -79, -62, -48, -34, -22, -10, 2, 13, 25, 36, 50, 65, 83, 107];

/// [`CODEBOOK`] as the multipliers want it.
pub const CODEBOOK_UNSIGNED: [u8; 16] = {
    let mut table = [0; 16];
    let mut i = 0;
    while i < 16 {
        table[i] = (CODEBOOK[i] as i32 + OFFSET) as u8;
        i += 1;
    }
    table
};

/// Where the nearest number of the codebook changes, and by how much.
const STEPS: [(f32, f32); 15] = {
    let mut steps = [(0.0, 0.0); 15];
    let mut i = 0;
    while i < 15 {
        let (lower, upper) = (CODEBOOK[i] as f32, CODEBOOK[i + 1] as f32);
        steps[i] = ((lower + upper) / 2.0, upper - lower);
        i += 1;
    }
    steps
};

/// Candidates for the number that the greatest weight of a q4 block becomes.
const PEAKS: [f32; 5] = [-127.0, -116.0, 113.0, 104.0, -140.0];

/// Blocks whose greatest magnitude is below this are zeros: its inverse might not be finite.
pub const MAGNITUDE_MIN: f32 = 1e-30;

/// All bits of an f32 but the sign.
pub const SIGNLESS: u32 = 0x7fff_ffff;

/// 1.5 * 2^23: added to a small number, it leaves the nearest integer, ties to even, in the low
/// bits.
pub const ROUND: f32 = 12_582_912.0;

/// Rounds to the nearest integer. Anything at all for what is far outside of a byte.
#[inline(always)]
fn nearest(v: f32) -> i32 {
    (v + ROUND).to_bits().wrapping_sub(ROUND.to_bits()).cast_signed()
}

/// How a group of activations becomes bytes.
pub struct GroupScale {
    /// What a byte is multiplied by to stand for its activation.
    pub scale: f32,
    /// What an activation is multiplied by before it is rounded.
    pub inverse: f32,
}

impl GroupScale {
    /// The greatest magnitude of the group becomes 127.
    #[inline(always)]
    pub fn of(magnitude: f32) -> Self {
        let inverse = if magnitude >= MAGNITUDE_MIN { 127.0 / magnitude } else { 0.0 };
        let scale = if magnitude < MAGNITUDE_MIN { 0.0 } else { magnitude / 127.0 };
        Self { scale, inverse }
    }
}

/// Quantises a group of activations into words: scale, then for each block 128 times its sum,
/// negated, and its bytes. The greatest magnitude is found among bits, where a NaN is greater than
/// all; a value that is not finite makes the scale not finite, and with it every
/// product.
#[inline(always)]
pub fn group_words(values: &[f32; GROUP]) -> [u32; GROUP_WORDS] {
    let greatest = values.iter().map(|v| v.to_bits() & SIGNLESS).fold(0, u32::max);
    let GroupScale { scale, inverse } = GroupScale::of(f32::from_bits(greatest));
    let mut codes = [0_i8; GROUP];
    for (code, v) in codes.iter_mut().zip(values) {
        *code = nearest(v * inverse) as i8;
    }
    let mut words = [0; GROUP_WORDS];
    words[0] = scale.to_bits();
    let blocks = words[1..].as_chunks_mut::<BLOCK_WORDS>().0;
    for (words, codes) in blocks.iter_mut().zip(codes.as_chunks::<BLOCK>().0) {
        let sum = codes.iter().fold(0_i32, |sum, code| sum.wrapping_add(i32::from(*code)));
        words[0] = sum.wrapping_mul(-OFFSET).cast_unsigned();
        for (word, four) in words[1..].iter_mut().zip(codes.as_chunks::<4>().0) {
            *word = u32::from_le_bytes(four.map(i8::cast_unsigned));
        }
    }
    words
}

/// Blocks side by side: lane `l` belongs to the `l`-th of 16 outputs.
pub type Lanes<T> = [T; LANES];

/// A quantised block of weights of each of 16 outputs.
pub struct Blocks {
    /// What multiplies the numbers, as bf16 bits.
    pub scales: Lanes<u32>,
    /// q8: numbers plus 128. q4: places in the codebook.
    pub codes: [Lanes<u32>; BLOCK],
}

impl Blocks {
    /// Eight bits a weight.
    #[inline(always)]
    pub fn q8(weights: &[Lanes<f32>; BLOCK]) -> Self {
        let magnitudes = magnitudes(weights);
        let scales = magnitudes.map(|magnitude| stored_scale(magnitude / 127.0, magnitude));
        let inverses = scales.map(|scale| 1.0 / scale);
        let mut codes = [[0_u32; LANES]; BLOCK];
        for (codes, weights) in codes.iter_mut().zip(weights) {
            for l in 0..LANES {
                // A scale that was rounded down makes the greatest weight a little more than 127.
                let number = nearest(weights[l] * inverses[l]).clamp(-127, 127);
                codes[l] = (number + OFFSET).cast_unsigned();
            }
        }
        Self { scales: scales.map(|scale| scale.to_bits() >> 16), codes }
    }

    /// Four bits a weight.
    #[inline(always)]
    pub fn q4(weights: &[Lanes<f32>; BLOCK]) -> Self {
        let magnitudes = magnitudes(weights);
        let peaks = peaks(weights, &magnitudes);
        let (mut scales, mut merits) = ([0.0; LANES], [0.0; LANES]);
        for candidate in PEAKS {
            let (fitted, merit) = fit(weights, &peaks.map(|peak| candidate / peak));
            for l in 0..LANES {
                let better = merit[l] > merits[l];
                scales[l] = if better { fitted[l] } else { scales[l] };
                merits[l] = if better { merit[l] } else { merits[l] };
            }
        }
        for l in 0..LANES {
            scales[l] = stored_scale(scales[l], magnitudes[l]);
        }
        // The codes are chosen again for the scale that is stored.
        let inverses = scales.map(|scale| 1.0 / scale);
        let mut codes = [[0_u32; LANES]; BLOCK];
        for (codes, weights) in codes.iter_mut().zip(weights) {
            for l in 0..LANES {
                let v = weights[l] * inverses[l];
                for (threshold, _) in STEPS {
                    codes[l] = codes[l].wrapping_add(u32::from(v > threshold));
                }
            }
        }
        Self { scales: scales.map(|scale| scale.to_bits() >> 16), codes }
    }

    /// The codes of inputs `4 * four..4 * four + 4`, one to a byte.
    #[inline(always)]
    pub fn four(&self, four: usize) -> Lanes<u32> {
        let mut words = [0; LANES];
        for (j, codes) in self.codes[4 * four..4 * four + 4].iter().enumerate() {
            for l in 0..LANES {
                words[l] |= codes[l] << (8 * j);
            }
        }
        words
    }
}

/// The greatest magnitude of each block. Compared as bits, so that a NaN is greater than all and
/// shows.
#[inline(always)]
fn magnitudes(weights: &[Lanes<f32>; BLOCK]) -> Lanes<f32> {
    let mut greatest = [0; LANES];
    for weights in weights {
        for l in 0..LANES {
            greatest[l] = u32::max(greatest[l], weights[l].to_bits() & SIGNLESS);
        }
    }
    greatest.map(f32::from_bits)
}

/// The weight of the greatest magnitude of each block, with its sign.
#[inline(always)]
fn peaks(weights: &[Lanes<f32>; BLOCK], magnitudes: &Lanes<f32>) -> Lanes<f32> {
    let mut peaks = *magnitudes;
    for weights in weights {
        for l in 0..LANES {
            peaks[l] = if weights[l] == -magnitudes[l] { weights[l] } else { peaks[l] };
        }
    }
    peaks
}

/// A scale rounded to bf16; zero for a block of zeros, and no number for one that holds what is
/// none.
#[inline(always)]
fn stored_scale(scale: f32, magnitude: f32) -> f32 {
    let bits = scale.to_bits();
    let rounded = f32::from_bits(bits.wrapping_add(0x7fff + (bits >> 16 & 1)) & 0xffff_0000);
    let rounded = if magnitude < MAGNITUDE_MIN { 0.0 } else { rounded };
    if magnitude <= f32::MAX { rounded } else { f32::NAN }
}

/// The scale that suits the codes which `inverses` lead to best, and how well it does.
///
/// With numbers `n` for weights `w`, that scale is `sum(w n) / sum(n^2)`, and the squared error is
/// `sum(w^2) - sum(w n)^2 / sum(n^2)`: the root of what is taken away is the merit.
#[inline(always)]
fn fit(weights: &[Lanes<f32>; BLOCK], inverses: &Lanes<f32>) -> (Lanes<f32>, Lanes<f32>) {
    let (mut along, mut square) = ([0.0; LANES], [0.0; LANES]);
    for weights in weights {
        for l in 0..LANES {
            let v = weights[l] * inverses[l];
            // The nearest number of the codebook: one step more for each threshold below.
            let mut number = f32::from(CODEBOOK[0]);
            for (threshold, step) in STEPS {
                number += if v > threshold { step } else { 0.0 };
            }
            along[l] += weights[l] * number;
            square[l] += number * number;
        }
    }
    let mut merits = [0.0; LANES];
    for l in 0..LANES {
        merits[l] = along[l].abs() / square[l].sqrt();
        along[l] /= square[l];
    }
    (along, merits)
}

/// The activations that a row's groups stand for.
#[cfg(test)]
pub fn activations(row: &[f32]) -> Vec<f32> {
    let groups = row.chunks(GROUP).flat_map(|values| {
        let mut padded = [0.0; GROUP];
        padded[..values.len()].copy_from_slice(values);
        let [scale, words @ ..] = group_words(&padded);
        let blocks = words.as_chunks::<BLOCK_WORDS>().0.to_vec().into_iter();
        let bytes = blocks.flat_map(|words| words[1..].to_vec()).flat_map(u32::to_le_bytes);
        bytes.map(move |b| f32::from(b.cast_signed()) * f32::from_bits(scale)).take(values.len())
    });
    groups.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The same block in every lane.
    fn ramp(scale: f32) -> [Lanes<f32>; BLOCK] {
        std::array::from_fn(|i| [((i * 7 % 32) as f32 - 15.7) * scale; LANES])
    }

    /// Scale, weights, and what stands for them, of the last lane.
    fn last(
        weights: &[Lanes<f32>; BLOCK],
        blocks: &Blocks,
        number: impl Fn(u32) -> u32,
    ) -> (f32, Vec<(f32, f32)>) {
        let scale = f32::from_bits(blocks.scales[LANES - 1] << 16);
        let stored = blocks.codes.map(|c| scale * (number(c[LANES - 1]) as f32 - OFFSET as f32));
        (scale, weights.iter().map(|w| w[LANES - 1]).zip(stored).collect())
    }

    #[test]
    fn codes_are_nearest_to_what_is_stored() {
        for scale in [1e-20, 0.013, 1.0, 3e30] {
            let weights = ramp(scale);
            let (step, pairs) = last(&weights, &Blocks::q8(&weights), |code| code);
            for (want, have) in pairs {
                let error = (have - want).abs() / step;
                // Half a step, and half a step more where the greatest was cut.
                assert!(error <= if want.abs() > 15.6 * scale { 1.0 } else { 0.501 }, "{error}");
            }
            let number = |code| u32::from(CODEBOOK_UNSIGNED[code as usize]);
            let (step, pairs) = last(&weights, &Blocks::q4(&weights), number);
            for (want, have) in pairs {
                for number in CODEBOOK {
                    let (error, other) = ((have - want).abs(), f32::from(number) * step);
                    assert!(error <= (other - want).abs() * 1.001, "{want}: {have}, not {other}");
                }
            }
        }
    }

    #[test]
    fn zeros_stay_zeros_and_what_is_no_number_stays_none() {
        for quantise in [Blocks::q8, Blocks::q4] {
            assert_eq!(quantise(&[[0.0; LANES]; BLOCK]).scales, [0; LANES]);
            assert_eq!(quantise(&[[1e-40; LANES]; BLOCK]).scales, [0; LANES]);
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut weights = ramp(1.0);
                weights[9][3] = bad;
                let scales = quantise(&weights).scales.map(|bits| f32::from_bits(bits << 16));
                let finite = scales.map(f32::is_finite);
                assert_eq!(finite, std::array::from_fn(|l| l != 3));
                assert!(scales[3].is_nan());
            }
        }
        let mut row = [0.0; GROUP];
        assert_eq!(group_words(&row), [0; GROUP_WORDS]);
        for bad in [f32::NAN, f32::INFINITY] {
            row[40] = bad;
            assert!(!f32::from_bits(group_words(&row)[0]).is_finite());
        }
    }

    #[test]
    fn activations_are_within_half_a_step() {
        let row: Vec<f32> = (0..GROUP + 11).map(|i| (i as f32 * 0.7).sin() * 3.0).collect();
        for (have, want) in activations(&row).iter().zip(&row) {
            assert!((have - want).abs() <= 3.0 / 127.0 / 2.0 * 1.001, "{have} for {want}");
        }
        assert_eq!(activations(&row).len(), row.len());
    }
}
