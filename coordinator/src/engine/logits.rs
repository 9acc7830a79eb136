//! Loops over a row of logits: the likeliest tokens, and sums of weights.
//!
//! A vocabulary has up to some hundred thousand tokens, and nearly all of them do not matter. So
//! each loop goes over the row once, in blocks whose inner loops the compiler turns into vector
//! instructions, and looks closely only at blocks that have something.
//!
//! Every result is a function of the row alone: sums go by a fixed number of lanes, then over the
//! lanes, then over the blocks. Tokens whose logit is NaN or minus infinity have no weight and are
//! never among the likeliest.
//!
//! What it does not know: temperature's meaning, filters, random numbers.

/// Values that are summed beside each other.
const LANES: usize = 16;
/// Tokens of a sum in f32; sums of blocks are added in f64.
pub const BLOCK_LEN: usize = 1_024;
/// Tokens that are compared with one bound before any is looked at.
const SCAN_LEN: usize = 64;

/// The greatest logit; minus infinity when there is none.
pub fn max(logits: &[f32]) -> f32 {
    let greater = |a: f32, b: f32| if b > a { b } else { a };
    let (vectors, rest) = logits.as_chunks::<LANES>();
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for vector in vectors {
        for (lane, x) in lanes.iter_mut().zip(vector) {
            *lane = greater(*lane, *x);
        }
    }
    lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, greater)
}

/// The likeliest token; the lowest id among equals.
pub fn argmax(logits: &[f32]) -> u32 {
    let max = max(logits);
    logits.iter().position(|x| *x == max).unwrap_or(0) as u32
}

/// The `count` likeliest tokens, likeliest first, lower ids before higher ones among equals.
pub fn likeliest(logits: &[f32], count: usize) -> Vec<u32> {
    let likelier =
        |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    let (mut top, mut floor) = (Vec::new(), f32::NEG_INFINITY);
    for (at, part) in logits.chunks(SCAN_LEN).enumerate() {
        // Without a branch, so that it is a few vector comparisons.
        if count == 0 || !part.iter().fold(false, |any, x| any | (*x > floor)) {
            continue;
        }
        let ids = at as u32 * SCAN_LEN as u32..;
        top.extend(ids.zip(part).filter(|(_, x)| **x > floor).map(|(id, _)| id));
        if top.len() >= count.saturating_mul(2).max(SCAN_LEN) {
            top.select_nth_unstable_by(count - 1, likelier);
            top.truncate(count);
            // From here on an equal logit has a higher id than all that are kept.
            floor = logits[top[count - 1] as usize];
        }
    }
    top.sort_unstable_by(likelier);
    top.truncate(count);
    top
}

/// What weight a logit has: `exp((logit - max) * scale)`, or 0 if that is below `weight_min`.
#[derive(Debug, Clone, Copy)]
pub struct Weighing {
    /// The greatest logit, which has weight 1.
    pub max: f32,
    /// One over the temperature.
    pub scale: f32,
    /// Smaller weights count as none.
    pub weight_min: f32,
}

impl Weighing {
    /// The weight of one logit.
    #[inline(always)]
    pub fn weight(&self, logit: f32) -> f32 {
        let weight = exp((logit - self.max) * self.scale);
        if weight >= self.weight_min { weight } else { 0.0 }
    }

    /// The sum of the weights of each [`BLOCK_LEN`] logits.
    pub fn block_sums<'a>(&'a self, logits: &'a [f32]) -> impl Iterator<Item = f64> + 'a {
        logits.chunks(BLOCK_LEN).map(|block| self.block_sum(block))
    }

    /// Which of [`BINS`] a logit of any weight belongs to; likelier ones come first.
    pub fn bin(&self, logit: f32) -> usize {
        (((self.max - logit) * self.scale * BINS_PER_UNIT) as usize).min(BINS - 1)
    }

    /// The sum of the weights of each bin.
    pub fn bin_sums(&self, logits: &[f32]) -> Vec<f64> {
        let mut sums = vec![0.0; BINS];
        for part in logits.chunks(SCAN_LEN) {
            // In a loop of their own, which becomes vector instructions.
            let mut weights = [0.0; SCAN_LEN];
            for (weight, logit) in weights.iter_mut().zip(part) {
                *weight = self.weight(*logit);
            }
            for (weight, logit) in weights.iter().zip(part) {
                sums[self.bin(*logit)] += f64::from(*weight);
            }
        }
        sums
    }

    fn block_sum(&self, block: &[f32]) -> f64 {
        let (vectors, rest) = block.as_chunks::<LANES>();
        let mut lanes = [0.0_f32; LANES];
        for vector in vectors {
            for (lane, x) in lanes.iter_mut().zip(vector) {
                *lane += self.weight(*x);
            }
        }
        for (lane, x) in lanes.iter_mut().zip(rest) {
            *lane += self.weight(*x);
        }
        lanes.iter().copied().map(f64::from).sum()
    }
}

/// Below this `exp` is taken for 0.
const EXP_MIN: f32 = -87.0;
/// Bins of logits, after scaling, in a factor e of weight.
const BINS_PER_UNIT: f32 = 16.0;
/// Bins in all: the last one has what weighs next to nothing.
pub const BINS: usize = 1_394;
/// Adding it rounds to an integer, which then stands in the lowest bits.
const ROUND: f32 = 12_582_912.0;

/// `e^x` for `x` up to 0, within 2e-7 of its value; 0 for less than [`EXP_MIN`] and for NaN. As in
/// Cephes: `2^n * e^r` with `|r| <= ln(2) / 2` and a polynomial for the rest. Written out since the
/// library's is a call for each value.
#[inline(always)]
fn exp(x: f32) -> f32 {
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    // ln 2 in two parts, the first with few enough bits that n times it is exact.
    let r = x - n * 0.693_359_4 + n * 2.121_944_4e-4;
    let p = 1.987_569_1e-4 * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 0.5;
    let p = p * (r * r) + (r + 1.0);
    // The integer's bits, moved to where the exponent is; what stood above them falls off.
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(1.0_f32.to_bits()));
    if x >= EXP_MIN { p * power } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Logits with many equals, some of which have no weight.
    fn row(len: usize) -> Vec<f32> {
        (0..len as u64)
            .map(|i| match i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 52 {
                0..=20 => f32::NEG_INFINITY,
                21..=40 => f32::NAN,
                bits => (bits % 300) as f32 * 0.05 - 7.0,
            })
            .collect()
    }

    #[test]
    fn the_likeliest_are_what_a_full_sort_says() {
        for len in [0, 1, 63, 64, 65, 1_000, 5_000] {
            let row = row(len);
            let mut sorted: Vec<u32> =
                (0..len as u32).filter(|id| row[*id as usize] > f32::NEG_INFINITY).collect();
            sorted.sort_by(|a, b| row[*b as usize].total_cmp(&row[*a as usize]).then(a.cmp(b)));
            for count in [0, 1, 2, 20, 63, 64, 900, 10_000] {
                let expected = &sorted[..count.min(sorted.len())];
                assert_eq!(likeliest(&row, count), expected, "{count} of {len}");
            }
            assert_eq!(argmax(&row), sorted.first().copied().unwrap_or(0), "{len}");
        }
    }

    #[test]
    fn exp_is_near_the_librarys_and_total() {
        for i in 0..=870_000 {
            let x = -i as f32 * 1e-4;
            let exact = f64::from(x).exp();
            assert!((f64::from(exp(x)) - exact).abs() <= 2e-7 * exact, "{x}: {}", exp(x));
        }
        assert_eq!([exp(f32::NEG_INFINITY), exp(f32::NAN), exp(-1e30)], [0.0; 3]);
        assert_eq!(exp(0.0), 1.0);
    }

    #[test]
    fn sums_are_near_the_ones_in_f64_whatever_the_length() {
        for len in [1, 15, 17, 1_023, 1_025, 40_000] {
            let row = row(len);
            let weighing = Weighing { max: max(&row), scale: 0.5, weight_min: 0.001 };
            let weights = row.iter().filter(|x| !x.is_nan()).map(|x| {
                let weight = ((f64::from(*x) - f64::from(weighing.max)) * 0.5).exp();
                if weight >= 0.001 { weight } else { 0.0 }
            });
            let (exact, sum) = (weights.sum::<f64>(), weighing.block_sums(&row).sum::<f64>());
            assert!((sum - exact).abs() <= 1e-6 * exact, "{len}: {sum} {exact}");
        }
    }
}
