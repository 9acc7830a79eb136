//! The gate: from the logits of a row to the experts that it goes through, and their weights.
//!
//! Softmax over **all** experts in f32, then the k most probable (Mixtral, arXiv 2401.04088 §2.1;
//! with `renormalise` the chosen weights are divided by their sum, which equals a softmax over the
//! chosen logits). Nothing is ever dropped for capacity. The exponential comes from a fixed
//! software implementation, because that of the system's C library may differ in the last bit
//! from one machine to the next, and a choice of experts must not.

use entente_proto::ids::ExpertId;

/// How a layer's gate chooses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GateSpec {
    /// Experts of the layer; the width of a row of logits.
    pub experts: usize,
    /// Experts that each row goes through; 1 to `experts`.
    pub top_k: usize,
    /// Whether the chosen weights are divided by their sum.
    pub renormalise: bool,
}

/// One expert that a row goes through.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Choice {
    /// The expert.
    pub expert: ExpertId,
    /// What its output is multiplied with.
    pub weight: f32,
}

/// Appends the `top_k` choices of each row of `logits` (`[rows, experts]`) to `out`, those of a row
/// in ascending order of experts. Equal probabilities go to the lower expert; a logit that is not a
/// number counts as the lowest, so that a broken row harms nobody else.
pub fn choose(spec: &GateSpec, logits: &[f32], out: &mut Vec<Choice>) {
    debug_assert!((1..=spec.experts).contains(&spec.top_k), "a gate of impossible shape: {spec:?}");
    let mut probabilities = vec![0.0; spec.experts];
    let mut order = Vec::with_capacity(spec.experts);
    for row in logits.chunks_exact(spec.experts) {
        softmax(row, &mut probabilities);
        order.clear();
        order.extend(0..spec.experts);
        order.select_nth_unstable_by(spec.top_k - 1, |a, b| {
            probabilities[*b].total_cmp(&probabilities[*a]).then(a.cmp(b))
        });
        let chosen = &mut order[..spec.top_k];
        chosen.sort_unstable();
        let sum =
            if spec.renormalise { chosen.iter().map(|e| probabilities[*e]).sum() } else { 1.0 };
        out.extend(chosen.iter().map(|expert| Choice {
            expert: ExpertId(*expert as u16),
            weight: probabilities[*expert] / sum,
        }));
    }
}

/// `p[i] = exp(x[i] - max x) / sum_j exp(x[j] - max x)`, summed in ascending order.
fn softmax(logits: &[f32], probabilities: &mut [f32]) {
    // Clamped, the differences below are never infinity minus infinity.
    let finite = |x: f32| if x.is_nan() { f32::MIN } else { x.clamp(f32::MIN, f32::MAX) };
    let max = logits.iter().copied().map(finite).fold(f32::MIN, f32::max);
    for (p, x) in probabilities.iter_mut().zip(logits) {
        *p = libm::expf(finite(*x) - max);
    }
    let sum: f32 = probabilities.iter().sum();
    probabilities.iter_mut().for_each(|p| *p /= sum);
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOP_2_OF_4: GateSpec = GateSpec { experts: 4, top_k: 2, renormalise: true };

    fn chosen(spec: &GateSpec, logits: &[f32]) -> Vec<(u16, f32)> {
        let mut out = Vec::new();
        choose(spec, logits, &mut out);
        out.iter().map(|c| (c.expert.0, c.weight)).collect()
    }

    #[test]
    fn the_most_probable_come_in_ascending_order_with_weights_that_sum_to_one() {
        let got = chosen(&TOP_2_OF_4, &[1.0, -2.0, 0.0, 3.0]);
        // softmax over the two chosen logits 1 and 3
        let expected = 1.0 / (1.0 + 2.0_f32.exp());
        assert_eq!((got[0].0, got[1].0), (0, 3));
        assert!((got[0].1 - expected).abs() < 1e-6, "{got:?}");
        assert!((got[0].1 + got[1].1 - 1.0).abs() < 1e-6, "{got:?}");
    }

    #[test]
    fn without_renormalising_weights_are_shares_of_all_experts() {
        let spec = GateSpec { renormalise: false, ..TOP_2_OF_4 };
        assert_eq!(chosen(&spec, &[0.0; 4]), [(0, 0.25), (1, 0.25)]);
    }

    #[test]
    fn equal_probabilities_go_to_the_lower_expert() {
        assert_eq!(chosen(&TOP_2_OF_4, &[5.0, 7.0, 7.0, 7.0]), [(1, 0.5), (2, 0.5)]);
    }

    #[test]
    fn broken_logits_do_not_panic_and_are_chosen_last() {
        let (nan, inf) = (f32::NAN, f32::INFINITY);
        assert_eq!(chosen(&TOP_2_OF_4, &[nan, 1.0, nan, 1.0]), [(1, 0.5), (3, 0.5)]);
        assert_eq!(chosen(&TOP_2_OF_4, &[-inf, inf, inf, nan]), [(1, 0.5), (2, 0.5)]);
        assert_eq!(chosen(&TOP_2_OF_4, &[nan; 4]), [(0, 0.5), (1, 0.5)]);
    }

    #[test]
    fn a_rows_choice_does_not_depend_on_the_rows_beside_it() {
        let rows = [[0.3, -0.2, 0.9, 0.1], [nanless(1), nanless(2), nanless(3), nanless(4)]];
        let together = chosen(&TOP_2_OF_4, rows.as_flattened());
        let alone = [chosen(&TOP_2_OF_4, &rows[0]), chosen(&TOP_2_OF_4, &rows[1])].concat();
        assert_eq!(together, alone);
    }

    fn nanless(i: u32) -> f32 {
        (i as f32 * 1.7).sin()
    }
}
