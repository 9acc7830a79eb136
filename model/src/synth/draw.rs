//! Normally distributed bf16 values, each a function of seed, tensor and place.
//!
//! A 64-bit hash of the place gives four numbers of 16 bits, and each picks one of 65,536 quantiles
//! of the normal distribution from a table. That is as fine as bf16 needs (its values have 8 bits
//! of fraction), and it makes three thousand million values in seconds rather than minutes.

use half::bf16;

/// Entries of a table: all numbers of 16 bits.
const TABLE_LEN: usize = 1 << 16;

/// The values of one tensor.
pub struct Values {
    key: u64,
    /// The value for each number of 16 bits; a constant when absent.
    table: Option<Vec<bf16>>,
}

impl Values {
    /// Values of the tensor `name` with this standard deviation around 0, or ones.
    pub fn new(seed: u64, name: &str, deviation: Option<f32>) -> Self {
        let key = name.bytes().fold(mix(seed), |key, byte| mix(key ^ u64::from(byte)));
        let table = deviation.map(|deviation| {
            let at = |i: usize| (i as f64 + 0.5) / TABLE_LEN as f64;
            (0..TABLE_LEN).map(|i| bf16::from_f64(quantile(at(i)) * f64::from(deviation))).collect()
        });
        Self { key, table }
    }

    /// Appends the bytes of `len` values from place `first` on, which is a multiple of 4.
    pub fn append(&self, first: usize, len: usize, out: &mut Vec<u8>) {
        debug_assert_eq!(first % 4, 0);
        let Some(table) = &self.table else {
            out.extend((0..len).flat_map(|_| bf16::ONE.to_le_bytes()));
            return;
        };
        let end = out.len() + 2 * len;
        for place in (first as u64 / 4).. {
            if out.len() >= end {
                break;
            }
            let bits = mix(self.key.wrapping_add(place.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
            let value = |part: u32| table[(bits >> (16 * part)) as u16 as usize].to_le_bytes();
            let [a, b, c, d] = [value(0), value(1), value(2), value(3)];
            out.extend_from_slice(&[a[0], a[1], b[0], b[1], c[0], c[1], d[0], d[1]]);
        }
        out.truncate(end);
    }
}

/// The finaliser of SplitMix64 (Steele, Lea and Flood 2014).
fn mix(mut bits: u64) -> u64 {
    bits = bits.wrapping_add(0x9e37_79b9_7f4a_7c15);
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

/// The value that a standard normal variable stays below with probability `p`, by Acklam's
/// rational approximation (relative error below 1.2e-9).
fn quantile(p: f64) -> f64 {
    const A: [f64; 6] = [
        -39.69683028665376,
        220.9460984245205,
        -275.9285104469687,
        138.357751867269,
        -30.66479806614716,
        2.506628277459239,
    ];
    const B: [f64; 6] = [
        -54.47609879822406,
        161.5858368580409,
        -155.6989798598866,
        66.80131188771972,
        -13.28068155288572,
        1.0,
    ];
    const C: [f64; 6] = [
        -0.007784894002430293,
        -0.3223964580411365,
        -2.400758277161838,
        -2.549732539343734,
        4.374664141464968,
        2.938163982698783,
    ];
    const D: [f64; 5] =
        [0.007784695709041462, 0.3224671290700398, 2.445134137142996, 3.754408661907416, 1.0];
    const TAIL: f64 = 0.02425;
    let polynomial = |c: &[f64], x: f64| c.iter().fold(0.0, |sum, c| sum * x + c);
    if p > 0.5 {
        return -quantile(1.0 - p);
    }
    if p < TAIL {
        let q = (-2.0 * p.ln()).sqrt();
        return polynomial(&C, q) / polynomial(&D, q);
    }
    let q = p - 0.5;
    let r = q * q;
    polynomial(&A, r) * q / polynomial(&B, r)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_those_of_the_tables() {
        for (p, z) in [(0.5, 0.0), (0.975, 1.959_964), (0.001, -3.090_232), (0.1, -1.281_552)] {
            assert!((quantile(p) - z).abs() < 1e-6, "{p}");
        }
    }

    #[test]
    fn a_part_made_alone_is_the_same_as_within_the_whole() {
        let values = Values::new(3, "w", Some(0.5));
        let (mut whole, mut part) = (Vec::new(), Vec::new());
        values.append(0, 103, &mut whole);
        values.append(40, 63, &mut part);
        assert_eq!((whole.len(), &whole[80..]), (206, &part[..]));
    }
}
