//! Random prompts and arrival times that a seed names (SplitMix64; Steele, Lea and Flood 2014).

/// A stream of random numbers.
#[derive(Debug, Clone)]
pub struct Random(u64);

/// Ids below this are control tokens in most vocabularies.
const FIRST_TOKEN: u32 = 3;

impl Random {
    /// The stream of this seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ (bits >> 31)
    }

    /// A number below `end`, which is not 0.
    pub fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    /// `len` token ids of a vocabulary, no control tokens where ids begin with those.
    pub fn tokens(&mut self, len: usize, vocab: usize) -> Vec<u32> {
        let ids = vocab.saturating_sub(FIRST_TOKEN as usize).max(1);
        (0..len).map(|_| FIRST_TOKEN + self.below(ids) as u32).collect()
    }

    /// A number in `[0, 1)`.
    pub fn uniform(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// Seconds until the next event of a Poisson process with `rate` events a second.
    pub fn gap_s(&mut self, rate: f64) -> f64 {
        -(1.0 - self.uniform()).ln() / rate
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_have_the_mean_that_the_rate_says() {
        let mut random = Random::new(5);
        let mean = (0..100_000).map(|_| random.gap_s(4.0)).sum::<f64>() / 1e5;
        assert!((mean - 0.25).abs() < 0.01, "{mean}");
    }
}
