//! Chooses a token from a row of logits. Pure and repeatable: the random number for a token is a
//! function of the request's seed and the token's position alone, so a retried, preempted or
//! re-batched step draws the same token.
//!
//! Order of the filters: temperature, top-k, top-p, min-p, as in Hugging Face transformers. Ties
//! go to the lower token id throughout.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// How a request wants its tokens chosen. Validated by the API.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// 0 takes the most likely token.
    pub temperature: f32,
    /// Keeps the smallest set of tokens whose probabilities reach this sum; in (0, 1].
    pub top_p: f32,
    /// Keeps this many tokens; 0 keeps all.
    pub top_k: usize,
    /// Keeps tokens at least this fraction as likely as the most likely one; in [0, 1].
    pub min_p: f32,
    /// Names the request's random numbers.
    pub seed: u64,
}

/// A token with its log-probability under the model, before temperature and filters.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenLogprob {
    /// The token.
    pub id: u32,
    /// Natural logarithm of its probability.
    pub logprob: f32,
}

/// A chosen token, and the likeliest tokens beside it.
#[derive(Debug, Clone, PartialEq)]
pub struct ScoredToken {
    /// The token.
    pub token: TokenLogprob,
    /// The most likely tokens, likeliest first; empty unless asked for.
    pub top: Vec<TokenLogprob>,
}

/// Chooses the token at `position` from `logits` (one per token of the vocabulary).
pub fn sample(logits: &[f32], sampling: &Sampling, position: usize) -> u32 {
    if sampling.temperature == 0.0 {
        return argmax(logits);
    }
    let candidates = filter(logits, sampling);
    draw(&candidates, uniform(sampling.seed, position))
}

/// The most likely token; the lowest id among equals. NaN never wins.
pub fn argmax(logits: &[f32]) -> u32 {
    let mut best = 0;
    let mut best_logit = f32::NEG_INFINITY;
    for (id, &logit) in logits.iter().enumerate() {
        if logit > best_logit {
            (best, best_logit) = (id, logit);
        }
    }
    best as u32
}

/// Uniform in [0, 1), a function of seed and position only (ChaCha8, one stream a position).
fn uniform(seed: u64, position: usize) -> f64 {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    random.set_stream(position as u64);
    (random.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}

/// Tokens that survive the filters with their unnormalised weights, likeliest first.
fn filter(logits: &[f32], sampling: &Sampling) -> Vec<(u32, f64)> {
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    let likelier =
        |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    if (1..order.len()).contains(&sampling.top_k) {
        order.select_nth_unstable_by(sampling.top_k - 1, likelier);
        order.truncate(sampling.top_k);
    }
    order.sort_unstable_by(likelier);
    let max = f64::from(logits[order[0] as usize]);
    let temperature = f64::from(sampling.temperature);
    let weight = |id: u32| ((f64::from(logits[id as usize]) - max) / temperature).exp();
    let mut kept: Vec<(u32, f64)> = order.into_iter().map(|id| (id, weight(id))).collect();
    if sampling.top_p < 1.0 {
        let total: f64 = kept.iter().map(|(_, w)| w).sum();
        let enough = f64::from(sampling.top_p) * total;
        let mut sum = 0.0;
        // Keep the token that crosses the threshold: the set has to reach it.
        let cut = kept.iter().position(|(_, w)| {
            sum += w;
            sum >= enough
        });
        kept.truncate(cut.map_or(kept.len(), |at| at + 1));
    }
    // The likeliest token has weight 1, so min_p compares with the weights directly.
    kept.retain(|(_, w)| *w >= f64::from(sampling.min_p));
    kept
}

fn draw(candidates: &[(u32, f64)], uniform: f64) -> u32 {
    let total: f64 = candidates.iter().map(|(_, w)| w).sum();
    let mut left = uniform * total;
    for (id, weight) in candidates {
        left -= weight;
        if left < 0.0 {
            return *id;
        }
    }
    // Rounding can leave a sliver; it belongs to the last candidate.
    candidates.last().map_or(0, |(id, _)| *id)
}

/// Log-probability of `id` and of the `top_len` likeliest tokens: `x - log(sum(exp(x)))` in f64.
pub fn score(logits: &[f32], id: u32, top_len: usize) -> ScoredToken {
    let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits.iter().map(|x| (f64::from(*x) - max).exp()).sum();
    let log_sum = max + sum.ln();
    let logprob =
        |id: u32| TokenLogprob { id, logprob: (f64::from(logits[id as usize]) - log_sum) as f32 };
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    let likelier =
        |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    let top_len = top_len.min(order.len());
    if top_len > 0 && top_len < order.len() {
        order.select_nth_unstable_by(top_len - 1, likelier);
    }
    order.truncate(top_len);
    order.sort_unstable_by(likelier);
    ScoredToken { token: logprob(id), top: order.into_iter().map(logprob).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Sampling =
        Sampling { temperature: 1.0, top_p: 1.0, top_k: 0, min_p: 0.0, seed: 42 };

    #[test]
    fn the_lower_id_wins_a_tie_and_nan_never_wins() {
        assert_eq!(argmax(&[f32::NAN, 1.0, 3.0, 3.0]), 2);
    }

    #[test]
    fn frequencies_follow_the_probabilities() {
        let logits = [0.1f32.ln(), 0.2f32.ln(), 0.7f32.ln()];
        let mut counts = [0u32; 3];
        for position in 0..20_000 {
            counts[sample(&logits, &PLAIN, position) as usize] += 1;
        }
        for (count, expected) in counts.iter().zip([2_000.0, 4_000.0, 14_000.0]) {
            // Five standard deviations of the widest of the three.
            assert!((f64::from(*count) - expected).abs() < 330.0, "seed 42: {counts:?}");
        }
    }

    #[test]
    fn a_draw_depends_on_seed_and_position_only() {
        let logits: Vec<f32> = (0..100).map(|i| ((i * 37) % 100) as f32 * 0.02).collect();
        let tokens = |seed| -> Vec<u32> {
            let sampling = Sampling { seed, ..PLAIN };
            (0..50).map(|position| sample(&logits, &sampling, position)).collect()
        };
        assert_eq!(tokens(1), tokens(1));
        assert_ne!(tokens(1), tokens(2));
    }

    #[test]
    fn each_filter_keeps_what_it_should() {
        let logits: Vec<f32> = [0.4f32, 0.3, 0.2, 0.1].iter().map(|p| p.ln()).collect();
        let ids = |sampling: Sampling| -> Vec<u32> {
            filter(&logits, &sampling).into_iter().map(|(id, _)| id).collect()
        };
        assert_eq!(ids(PLAIN), [0, 1, 2, 3]);
        assert_eq!(ids(Sampling { top_k: 2, ..PLAIN }), [0, 1]);
        assert_eq!(ids(Sampling { top_p: 0.6, ..PLAIN }), [0, 1]);
        assert_eq!(ids(Sampling { top_p: 0.75, ..PLAIN }), [0, 1, 2]);
        assert_eq!(ids(Sampling { min_p: 0.6, ..PLAIN }), [0, 1]);
    }

    #[test]
    fn log_probabilities_sum_to_one_and_the_top_is_sorted() {
        let logits: Vec<f32> = (0..50).map(|i| ((i * 13) % 50) as f32 * 0.1).collect();
        let all = score(&logits, 3, 50);
        let sum: f64 = all.top.iter().map(|t| f64::from(t.logprob).exp()).sum();
        assert!((sum - 1.0).abs() < 1e-5, "{sum}");
        assert!(all.top.windows(2).all(|w| w[0].logprob >= w[1].logprob));
        assert_eq!(all.token, *all.top.iter().find(|t| t.id == 3).unwrap());
    }
}
