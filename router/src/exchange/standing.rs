//! What one exchange thinks of each node: how much it asked of it, and whether to ask again.

use std::collections::BTreeMap;

use entente_proto::ids::{Fence, NodeId};

/// First time that a node rests; doubles with each failure, up to [`REST_MAX_US`].
const REST_MIN_US: u64 = 1_000;
/// Longest time that a node rests.
const REST_MAX_US: u64 = 64_000;

#[derive(Debug, Default)]
struct Record {
    /// Slots given to the node so far.
    assigned: usize,
    failures: u32,
    rest_until_us: u64,
    /// The node is not asked again while it has this fence.
    excluded_under: Option<Fence>,
}

/// The records of the nodes that were asked or failed.
#[derive(Debug, Default)]
pub(super) struct Standing {
    nodes: BTreeMap<NodeId, Record>,
}

impl Standing {
    /// Whether the node, whose fence is `fence` now, may be asked.
    pub(super) fn in_favour(&self, node: NodeId, fence: &Fence, now_us: u64) -> bool {
        let rests = self.nodes.get(&node).is_some_and(|record| now_us < record.rest_until_us);
        !rests && !self.is_excluded(node, fence)
    }

    /// Whether the node rests for a moment, and may be waited for: not one that has come to rest for
    /// as long as nodes do, time and again.
    pub(super) fn returns_soon(&self, node: NodeId, now_us: u64) -> bool {
        self.nodes.get(&node).is_some_and(|record| {
            now_us < record.rest_until_us && REST_MIN_US << record.failures.min(16) <= REST_MAX_US
        })
    }

    /// Whether the node is not asked again while it has this fence.
    pub(super) fn is_excluded(&self, node: NodeId, fence: &Fence) -> bool {
        let record = self.nodes.get(&node);
        record.is_some_and(|record| record.excluded_under.as_ref() == Some(fence))
    }

    /// Slots given to the node so far, failed ones included: a retry prefers who has done least.
    pub(super) fn assigned(&self, node: NodeId) -> usize {
        self.nodes.get(&node).map_or(0, |record| record.assigned)
    }

    /// Takes note of a slot given to the node.
    pub(super) fn assign(&mut self, node: NodeId) {
        self.nodes.entry(node).or_default().assigned += 1;
    }

    /// Leaves the node alone for a while, after something that may pass.
    pub(super) fn rest(&mut self, node: NodeId, now_us: u64) {
        let record = self.nodes.entry(node).or_default();
        // Several frames that fail at the same moment are one failure.
        if now_us < record.rest_until_us {
            return;
        }
        let pause_us = (REST_MIN_US << record.failures.min(16)).min(REST_MAX_US);
        record.failures += 1;
        record.rest_until_us = now_us.saturating_add(pause_us);
    }

    /// Leaves the node alone while it has this fence, after something that will not pass.
    pub(super) fn exclude(&mut self, node: NodeId, fence: Fence) {
        self.nodes.entry(node).or_default().excluded_under = Some(fence);
    }

    /// When the next resting node may be asked again.
    pub(super) fn next_return_us(&self, now_us: u64) -> Option<u64> {
        self.nodes.values().map(|record| record.rest_until_us).filter(|at| *at > now_us).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rests_double_up_to_a_bound_and_failures_of_one_moment_count_once() {
        let mut standing = Standing::default();
        let (node, mut now_us) = (NodeId(1), 10);
        for expected in [1_000, 2_000, 4_000, 8_000, 16_000, 32_000, 64_000, 64_000] {
            standing.rest(node, now_us);
            standing.rest(node, now_us);
            let back = standing.next_return_us(now_us).unwrap();
            assert_eq!(back - now_us, expected);
            now_us = back;
        }
    }
}
