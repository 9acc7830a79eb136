//! Rotary position embedding: the angles. The rotation itself is a kernel.
//!
//! Source: Su et al. 2021, "RoFormer", section 3.4; the order of roundings is that of transformers'
//! `MistralRotaryEmbedding`, since an angle at position 30000 keeps few correct digits in f32 and
//! another order would move them.

use crate::config::RopeSpec;

/// Cosines and sines by position.
pub struct Rope {
    inv_freq: Vec<f32>,
}

impl Rope {
    /// `inv_freq[i] = 1 / theta^(2i / dim)` for `i < dim / 2`.
    pub fn new(spec: &RopeSpec) -> Self {
        // Each step is rounded to f32 as it is there; the power is taken in f64 so that it does not
        // depend on a library's single-precision power.
        let theta = f64::from(spec.theta as f32);
        let inv_freq = |i: usize| {
            let exponent = (2 * i) as f32 / spec.dim as f32;
            1.0 / (theta.powf(f64::from(exponent)) as f32)
        };
        Self { inv_freq: (0..spec.dim / 2).map(inv_freq).collect() }
    }

    /// Values in one row of cosines, and of sines: half of the rotating values.
    pub fn half_dim(&self) -> usize {
        self.inv_freq.len()
    }

    /// Writes the cosines and sines of each position; `cos` and `sin` are
    /// `[positions, half_dim]`. The angle is the f32 product of position and frequency.
    pub fn fill(&self, positions: &[usize], cos: &mut [f32], sin: &mut [f32]) {
        let half = self.half_dim();
        let rows = cos.chunks_exact_mut(half).zip(sin.chunks_exact_mut(half));
        for (position, (cos, sin)) in positions.iter().zip(rows) {
            for ((freq, cos), sin) in self.inv_freq.iter().zip(cos).zip(sin) {
                let (s, c) = f64::from(*position as f32 * freq).sin_cos();
                (*cos, *sin) = (c as f32, s as f32);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frequencies_are_those_of_the_definition_in_single_precision() {
        let rope = Rope::new(&RopeSpec { theta: 10_000.0, dim: 8 });
        assert_eq!(rope.inv_freq, [1.0, 0.1, 0.01, 0.001]);
        let rope = Rope::new(&RopeSpec { theta: 1e6, dim: 16 });
        for (i, freq) in rope.inv_freq.iter().enumerate() {
            let exact = 1e6f64.powf(-(i as f64) / 8.0);
            assert!((f64::from(*freq) / exact - 1.0).abs() < 2e-7, "{i}: {freq} for {exact}");
        }
    }

    #[test]
    fn each_position_gets_its_own_row() {
        let rope = Rope::new(&RopeSpec { theta: 10_000.0, dim: 4 });
        let (mut cos, mut sin) = ([0.0; 6], [0.0; 6]);
        rope.fill(&[0, 3, 4_095], &mut cos, &mut sin);
        assert_eq!((cos[0], cos[1], sin[0], sin[1]), (1.0, 1.0, 0.0, 0.0));
        assert_eq!((cos[2], sin[2]), (3f64.cos() as f32, 3f64.sin() as f32));
        let angle = f64::from(4_095.0f32 * 0.01f32);
        assert_eq!((cos[5], sin[5]), (angle.cos() as f32, angle.sin() as f32));
    }
}
