//! A step that cannot be computed now, and how long its requests wait for it.
//!
//! Nothing of a failed step is kept: a sequence stands at its last token, and the rows that did get
//! into the KV cache are written again with the same values. So a step may be tried any number of
//! times, with other requests beside it, and nobody can tell from an answer. Failing is the last
//! resort: a request is told only after it has waited for as long as it may.
//!
//! Pure: moments come in as data.

use std::time::{Duration, Instant};

use entente_router::exchange::Failure;

use super::EngineError;

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Hold {
    /// When the first of the attempts began that came to nothing.
    since: Instant,
    failure: Failure,
    /// What the cluster's counter of changes showed when the attempt began that failed for want of a
    /// replica: until it shows something else another attempt would fail as well. Absent where
    /// replicas are there, and only slow.
    changes: Option<u64>,
}

impl Hold {
    /// What becomes of a step that failed: it is held, unless waiting cannot mend it.
    pub(super) fn of(failure: Failure, since: Instant, changes: u64) -> Result<Self, Failure> {
        let changes = match failure {
            Failure::Impossible { .. } | Failure::NotPermitted { .. } => return Err(failure),
            Failure::NoReplica { .. } => Some(changes),
            Failure::NotTaken { .. } | Failure::Deadline { .. } | Failure::GivenUp => None,
        };
        Ok(Self { since, failure, changes })
    }

    /// When the first attempt began.
    pub(super) fn since(&self) -> Instant {
        self.since
    }

    /// Whether the next attempt is due, given the cluster's counter of changes.
    pub(super) fn is_over(&self, changes: u64) -> bool {
        self.changes.is_none_or(|seen| seen != changes)
    }

    /// When a request that arrived at `arrived` has waited for `wait_max`.
    pub(super) fn gives_up_at(&self, arrived: Instant, wait_max: Duration) -> Instant {
        self.since.max(arrived) + wait_max
    }

    /// What a request is told that has waited for too long.
    pub(super) fn error(&self, wait_max: Duration) -> EngineError {
        let (waited_ms, failure) = (wait_max.as_millis(), &self.failure);
        EngineError::Unavailable(format!("waited {waited_ms} ms for experts; {failure}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use entente_proto::ids::{LayerId, NodeId};

    const LAYER: LayerId = LayerId(3);

    #[test]
    fn a_step_without_a_replica_is_tried_again_when_the_cluster_has_changed() {
        let failure = Failure::NoReplica { layer: LAYER, last: "a link broke" };
        let hold = Hold::of(failure, Instant::now(), 7).unwrap();
        assert!(!hold.is_over(7));
        assert!(hold.is_over(8));
        let told = hold.error(Duration::from_millis(1_500)).to_string();
        assert_eq!(
            told,
            "the model is not available: waited 1500 ms for experts; layer 3: no permitted replica \
             is left for some rows (last: a link broke)"
        );
    }

    #[test]
    fn a_step_whose_nodes_are_slow_is_tried_again_at_once_and_a_hopeless_one_never() {
        let slow = Failure::Deadline { layer: LAYER, node: NodeId(1) };
        assert!(Hold::of(slow, Instant::now(), 7).unwrap().is_over(7));
        let hopeless = Failure::Impossible { layer: LAYER, what: "no rows" };
        assert_eq!(Hold::of(hopeless.clone(), Instant::now(), 7), Err(hopeless));
    }

    #[test]
    fn a_request_waits_from_when_the_step_began_or_from_when_it_came() {
        let (began, wait) = (Instant::now(), Duration::from_secs(2));
        let failure = Failure::NoReplica { layer: LAYER, last: "none is live" };
        let hold = Hold::of(failure, began, 0).unwrap();
        let second = Duration::from_secs(1);
        assert_eq!(hold.gives_up_at(began - second, wait), began + wait);
        assert_eq!(hold.gives_up_at(began + second, wait), began + second + wait);
    }
}
