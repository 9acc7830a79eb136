//! Chooses a token from a row of logits. Pure and repeatable: the random number for a token is a
//! function of the request's seed and the token's position alone, so a retried, preempted or
//! re-batched step draws the same token.
//!
//! Order of the filters: temperature, top-k, top-p, min-p, as in Hugging Face transformers. Ties
//! go to the lower token id throughout. Tokens that survive lie side by side in the order of their
//! ids, each as wide as its weight, and the random number points at one of them.
//!
//! Only what must see the whole vocabulary does, by the loops of [`logits`].

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use super::logits::{self, BLOCK_LEN, Weighing};

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

/// How a token is chosen from a row of logits where tokens need not be compared with one another.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Choice {
    /// The likeliest; the lowest id among equals.
    Likeliest,
    /// Drawn from all of them.
    Draw {
        /// One over the temperature.
        scale: f32,
        /// Tokens of a smaller weight are left out; the likeliest has weight 1.
        weight_min: f32,
        /// The random number, in [0, 1).
        uniform: f64,
    },
}

impl Sampling {
    /// How the token at `position` is chosen, unless by top-k or top-p.
    pub fn choice(&self, position: usize) -> Option<Choice> {
        if self.temperature == 0.0 {
            return Some(Choice::Likeliest);
        }
        (self.top_k == 0 && self.top_p >= 1.0).then(|| Choice::Draw {
            scale: 1.0 / self.temperature,
            weight_min: self.min_p,
            uniform: uniform(self.seed, position),
        })
    }
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
    if let Some(choice) = sampling.choice(position) {
        return choose(logits, choice);
    }
    let kept = filter(logits, sampling, &weighing(logits, sampling));
    draw(&kept, uniform(sampling.seed, position)).unwrap_or_else(|| logits::argmax(logits))
}

/// The token that a choice takes. Devices compute the same, to the bit (`draw` in `logits.cu`).
pub fn choose(logits: &[f32], choice: Choice) -> u32 {
    let Choice::Draw { scale, weight_min, uniform } = choice else {
        return logits::argmax(logits);
    };
    let weighing = Weighing { max: logits::max(logits), scale, weight_min };
    // Rounding can leave a sliver at the end; it belongs to the likeliest.
    draw_from_all(logits, &weighing, uniform).unwrap_or_else(|| logits::argmax(logits))
}

fn weighing(logits: &[f32], sampling: &Sampling) -> Weighing {
    let scale = 1.0 / sampling.temperature;
    Weighing { max: logits::max(logits), scale, weight_min: sampling.min_p }
}

/// Uniform in [0, 1), a function of seed and position only (ChaCha8, one stream a position).
fn uniform(seed: u64, position: usize) -> f64 {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    random.set_stream(position as u64);
    (random.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}

/// Draws from the whole vocabulary: a block by the blocks' sums, then a token within.
fn draw_from_all(logits: &[f32], weighing: &Weighing, uniform: f64) -> Option<u32> {
    let sums: Vec<f64> = weighing.block_sums(logits).collect();
    let mut left = uniform * sums.iter().sum::<f64>();
    let at = sums.iter().position(|sum| {
        let is_here = left < *sum;
        left -= if is_here { 0.0 } else { *sum };
        is_here
    })?;
    let block = logits[at * BLOCK_LEN..].iter().take(BLOCK_LEN);
    let mut weights = block.map(|logit| f64::from(weighing.weight(*logit)));
    let within = weights.position(|weight| {
        left -= weight;
        left < 0.0
    })?;
    Some((at * BLOCK_LEN + within) as u32)
}

/// Tokens that survive top-k, top-p and min-p with their weights, in the order of their ids.
fn filter(logits: &[f32], sampling: &Sampling, weighing: &Weighing) -> Vec<(u32, f64)> {
    let mut kept = match sampling.top_k {
        0 => likeliest_within(logits, sampling, weighing),
        top_k => {
            let mut kept = weighed(logits, sampling, top_k);
            if sampling.top_p < 1.0 {
                kept.truncate(covering_len(&kept, sampling.top_p));
            }
            kept
        }
    };
    // The likeliest token has weight 1, so min_p compares with the weights directly.
    kept.retain(|(_, weight)| *weight >= f64::from(sampling.min_p));
    kept.sort_unstable_by_key(|(id, _)| *id);
    kept
}

/// The likeliest tokens of the whole vocabulary whose probabilities reach top-p, in the order of
/// their ids. Weights are added up in bins of like logits first, so that only those tokens need to
/// be sorted among which the last one to be kept is.
fn likeliest_within(logits: &[f32], sampling: &Sampling, weighing: &Weighing) -> Vec<(u32, f64)> {
    let weighing = Weighing { weight_min: 0.0, ..*weighing };
    let sums = weighing.bin_sums(logits);
    let enough = f64::from(sampling.top_p) * sums.iter().sum::<f64>();
    let mut sum = 0.0;
    let reaches = |more: f64, sum: &mut f64| {
        *sum += more;
        *sum >= enough
    };
    let bin = sums.iter().position(|more| reaches(*more, &mut sum)).unwrap_or(sums.len() - 1);
    sum = sums[..bin].iter().sum();
    let weight = |logit: f32| f64::from(weighing.weight(logit));
    let tokens = (0_u32..).zip(logits.iter().copied());
    let is_member = |logit: f32| weighing.bin(logit) == bin && weight(logit) > 0.0;
    let mut members: Vec<(u32, f32)> = tokens.clone().filter(|(_, x)| is_member(*x)).collect();
    members.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    // The one that crosses the threshold is kept: the set has to reach it.
    let last = members.iter().find(|(_, logit)| reaches(weight(*logit), &mut sum));
    let Some(&(last_id, last)) = last.or(members.last()) else { return Vec::new() };
    let kept = tokens.filter(|(id, logit)| *logit > last || (*logit == last && *id <= last_id));
    kept.map(|(id, logit)| (id, weight(logit))).collect()
}

/// The `count` likeliest tokens, likeliest first, with their unnormalised weights.
fn weighed(logits: &[f32], sampling: &Sampling, count: usize) -> Vec<(u32, f64)> {
    let ids = logits::likeliest(logits, count);
    let logit = |id: u32| f64::from(logits[id as usize]);
    let max = ids.first().map_or(0.0, |id| logit(*id));
    let temperature = f64::from(sampling.temperature);
    ids.into_iter().map(|id| (id, ((logit(id) - max) / temperature).exp())).collect()
}

/// How many of the first tokens reach the share `top_p` together. The one that crosses the
/// threshold is one of them: the set has to reach it.
fn covering_len(kept: &[(u32, f64)], top_p: f32) -> usize {
    let enough = f64::from(top_p) * kept.iter().map(|(_, weight)| weight).sum::<f64>();
    let mut sum = 0.0;
    let crossing = kept.iter().position(|(_, weight)| {
        sum += weight;
        sum >= enough
    });
    crossing.map_or(kept.len(), |at| at + 1)
}

fn draw(candidates: &[(u32, f64)], uniform: f64) -> Option<u32> {
    let mut left = uniform * candidates.iter().map(|(_, weight)| weight).sum::<f64>();
    let chosen = candidates.iter().find(|(_, weight)| {
        left -= weight;
        left < 0.0
    });
    chosen.map(|(id, _)| *id)
}

/// Log-probability of `id` and of the `top_len` likeliest tokens: `x - log(sum(exp(x)))`.
pub fn score(logits: &[f32], id: u32, top_len: usize) -> ScoredToken {
    let weighing = Weighing { max: logits::max(logits), scale: 1.0, weight_min: 0.0 };
    let log_sum = f64::from(weighing.max) + weighing.block_sums(logits).sum::<f64>().ln();
    let logprob =
        |id: u32| TokenLogprob { id, logprob: (f64::from(logits[id as usize]) - log_sum) as f32 };
    let top = logits::likeliest(logits, top_len);
    ScoredToken { token: logprob(id), top: top.into_iter().map(logprob).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Sampling =
        Sampling { temperature: 1.0, top_p: 1.0, top_k: 0, min_p: 0.0, seed: 42 };

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
            let weighing = weighing(&logits, &sampling);
            filter(&logits, &sampling, &weighing).into_iter().map(|(id, _)| id).collect()
        };
        assert_eq!(ids(PLAIN), [0, 1, 2, 3]);
        assert_eq!(ids(Sampling { top_k: 2, ..PLAIN }), [0, 1]);
        assert_eq!(ids(Sampling { top_p: 0.6, ..PLAIN }), [0, 1]);
        assert_eq!(ids(Sampling { top_p: 0.75, ..PLAIN }), [0, 1, 2]);
        assert_eq!(ids(Sampling { min_p: 0.6, ..PLAIN }), [0, 1]);
    }

    /// The filters and the draw as one would write them down: the survivors in the order of ids,
    /// and the end of each one's part of [0, 1).
    fn obvious(logits: &[f32], sampling: &Sampling) -> Vec<(u32, f64)> {
        let likelihood = |id: &u32| -> f64 {
            (f64::from(logits[*id as usize]) / f64::from(sampling.temperature)).exp()
        };
        let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
        ids.sort_by(|a, b| likelihood(b).total_cmp(&likelihood(a)).then(a.cmp(b)));
        ids.truncate(if sampling.top_k == 0 { ids.len() } else { sampling.top_k });
        let total: f64 = ids.iter().map(likelihood).sum();
        let mut sum = 0.0;
        let mut kept = Vec::new();
        for id in &ids {
            if sum < f64::from(sampling.top_p) * total {
                kept.push(*id);
            }
            sum += likelihood(id);
        }
        kept.retain(|id| likelihood(id) >= f64::from(sampling.min_p) * likelihood(&ids[0]));
        kept.sort_unstable();
        let total: f64 = kept.iter().map(likelihood).sum();
        let mut end = 0.0;
        let part = |id: u32| {
            end += likelihood(&id) / total;
            (id, end)
        };
        kept.into_iter().map(part).collect()
    }

    #[test]
    fn draws_are_those_of_the_obvious_sampler() {
        let logits = |flatness: f64| -> Vec<f32> {
            let bits = |i: u64| i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
            (0..9_000).map(|i| (bits(i) as f64 / flatness) as f32).collect()
        };
        let filters =
            [(0, 1.0, 0.0), (0, 1.0, 0.02), (40, 1.0, 0.0), (0, 0.9, 0.0), (500, 0.8, 0.1)];
        for (top_k, top_p, min_p) in filters {
            for (logits, temperature) in
                [(logits(1e6), 0.7), (logits(1e6), 1.5), (logits(1e8), 1.0)]
            {
                let sampling = Sampling { temperature, top_p, top_k, min_p, seed: 7 };
                let parts = obvious(&logits, &sampling);
                for position in 0..200 {
                    let uniform = uniform(7, position);
                    // Near a border a neighbour will do: the sums differ in their last digits.
                    let from = parts.partition_point(|(_, end)| *end <= uniform - 1e-6);
                    let to = parts.partition_point(|(_, end)| *end <= uniform + 1e-6);
                    let near = &parts[from..=to.min(parts.len() - 1)];
                    let token = sample(&logits, &sampling, position);
                    let is_near = near.iter().any(|(id, _)| *id == token);
                    assert!(is_near, "{sampling:?} at {position}: {token}, not one of {near:?}");
                }
            }
        }
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
