//! Whether the changes that a control plane acknowledged make sense together. Pure.

use serde::Serialize;

/// A change, as the one saw it who made it. Times are in ms since the run began.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Write {
    /// When it was asked for.
    pub began_ms: f64,
    /// When the answer came.
    pub ended_ms: f64,
    /// Its place among all changes; none when the outcome is not known.
    pub revision: Option<u64>,
}

/// Acknowledged changes that no order of all changes explains; 0 for a linearizable history.
///
/// An acknowledgement tells the change's place in the order. So the order is given, and the history
/// is linearizable (Herlihy and Wing 1990) just when no two have the same place and none stands
/// after one that was asked for only after it had been answered. A change whose outcome is unknown
/// has no place and explains everything.
pub fn out_of_order(writes: &[Write]) -> usize {
    let known = writes.iter().filter_map(|write| Some((write.revision?, write)));
    let mut known: Vec<(u64, &Write)> = known.collect();
    known.sort_by_key(|(revision, _)| *revision);
    let twice = known.windows(2).filter(|pair| pair[0].0 == pair[1].0).count();
    let mut latest_began_ms = f64::NEG_INFINITY;
    let mut late = 0;
    for (_, write) in known {
        late += usize::from(write.ended_ms < latest_began_ms);
        latest_began_ms = latest_began_ms.max(write.began_ms);
    }
    twice + late
}

/// How often a pair of epochs is lower, in one of them, than an earlier one.
pub fn epochs_back(epochs: &[(u64, u64)]) -> usize {
    let (mut highest, mut back) = ((0, 0), 0);
    for (membership, placement) in epochs.iter().copied() {
        back += usize::from(membership < highest.0 || placement < highest.1);
        highest = (highest.0.max(membership), highest.1.max(placement));
    }
    back
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(writes: &[(f64, f64, Option<u64>)], expected: usize) {
        let write = |&(began_ms, ended_ms, revision)| Write { began_ms, ended_ms, revision };
        let history: Vec<Write> = writes.iter().map(write).collect();
        assert_eq!(out_of_order(&history), expected, "{writes:?}");
    }

    #[test]
    fn changes_that_overlap_may_have_any_order() {
        check(&[(0.0, 10.0, Some(2)), (5.0, 15.0, Some(1)), (11.0, 20.0, Some(3))], 0);
    }

    #[test]
    fn a_change_that_was_answered_before_another_was_asked_for_stands_before_it() {
        check(&[(0.0, 10.0, Some(2)), (11.0, 15.0, Some(1))], 1);
        check(&[(0.0, 10.0, Some(2)), (11.0, 15.0, None)], 0);
    }

    #[test]
    fn two_changes_never_have_the_same_place() {
        check(&[(0.0, 10.0, Some(1)), (5.0, 15.0, Some(1))], 1);
    }

    #[test]
    fn an_epoch_that_goes_back_is_counted() {
        assert_eq!(epochs_back(&[(1, 5), (2, 5), (2, 6)]), 0);
        assert_eq!(epochs_back(&[(2, 5), (1, 6), (2, 6), (2, 5)]), 2);
    }
}
