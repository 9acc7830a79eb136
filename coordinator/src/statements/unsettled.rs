//! Which nodes are still to state what they computed for which requests.
//!
//! Pure: time passes by calls of [`Unsettled::next`], one a period.

use std::collections::{BTreeMap, BTreeSet};

use entente_proto::ids::{NodeName, RequestId};
use entente_proto::statement::STATED_REQUESTS_MAX;

/// Requests that wait for one node's statement; past it some are given up. A node forgets requests
/// at the same number, so more would be asked for in vain.
const WAITING_MAX: usize = 65_536;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Unsettled {
    nodes: BTreeMap<NodeName, Waiting>,
    /// Nothing more will be added.
    ended: bool,
}

/// What one node is to state.
#[derive(Debug, Default)]
struct Waiting {
    requests: BTreeSet<RequestId>,
    /// Attempts in a row that failed, and periods until the next.
    failures: u32,
    pause: u32,
}

impl Unsettled {
    /// The node is to be asked about the request.
    pub(super) fn add(&mut self, node: NodeName, request: RequestId) {
        let waiting = self.nodes.entry(node).or_default();
        waiting.requests.insert(request);
        if waiting.requests.len() > WAITING_MAX {
            waiting.requests.pop_first();
        }
    }

    /// Nothing more will be added.
    pub(super) fn end(&mut self) {
        self.ended = true;
    }

    /// Whom to ask in this period, and for what; nothing once everything is over.
    pub(super) fn next(&mut self) -> Option<Vec<(NodeName, Vec<RequestId>)>> {
        if self.ended && self.nodes.is_empty() {
            return None;
        }
        let mut batches = Vec::new();
        for (node, waiting) in &mut self.nodes {
            if waiting.pause > 0 {
                waiting.pause -= 1;
                continue;
            }
            let requests = waiting.requests.iter().take(STATED_REQUESTS_MAX).copied();
            batches.push((node.clone(), requests.collect()));
        }
        Some(batches)
    }

    /// The node has answered.
    pub(super) fn settled(&mut self, node: &NodeName, requests: &[RequestId]) {
        let Some(waiting) = self.nodes.get_mut(node) else { return };
        requests.iter().for_each(|request| {
            waiting.requests.remove(request);
        });
        waiting.failures = 0;
        if waiting.requests.is_empty() {
            self.nodes.remove(node);
        }
    }

    /// The node has not. Whether it is given up with all that it was to state.
    pub(super) fn failed(&mut self, node: &NodeName, attempts_max: u32) -> bool {
        let Some(waiting) = self.nodes.get_mut(node) else { return false };
        waiting.failures += 1;
        waiting.pause = 1 << waiting.failures.min(16);
        let given_up = waiting.failures >= attempts_max;
        if given_up {
            self.nodes.remove(node);
        }
        given_up
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> NodeName {
        text.parse().unwrap()
    }

    #[test]
    fn each_node_is_asked_once_for_all_that_has_ended_and_again_until_it_answers() {
        let mut unsettled = Unsettled::default();
        let ids = [RequestId(1), RequestId(2)];
        for id in ids {
            unsettled.add(name("a"), id);
        }
        unsettled.add(name("b"), ids[1]);
        let asked = vec![(name("a"), ids.to_vec()), (name("b"), vec![ids[1]])];
        assert_eq!(unsettled.next(), Some(asked));
        unsettled.settled(&name("a"), &ids);
        assert!(!unsettled.failed(&name("b"), 3));
        let after = |unsettled: &mut Unsettled| {
            (1..100).find(|_| unsettled.next().is_none_or(|batches| !batches.is_empty()))
        };
        assert_eq!(after(&mut unsettled), Some(3), "two periods of rest");
        assert!(!unsettled.failed(&name("b"), 3));
        assert_eq!(after(&mut unsettled), Some(5));
        unsettled.end();
        assert!(unsettled.failed(&name("b"), 3), "it is given up");
        assert_eq!(unsettled.next(), None);
    }

    #[test]
    fn one_question_is_about_a_bounded_number_of_requests() {
        let mut unsettled = Unsettled::default();
        for id in 0..WAITING_MAX as u128 + 9 {
            unsettled.add(name("a"), RequestId(id));
        }
        let mut asked = 0;
        while let Some((node, batch)) = unsettled.next().and_then(|mut batches| batches.pop()) {
            assert!(batch.len() <= STATED_REQUESTS_MAX);
            asked += batch.len();
            unsettled.settled(&node, &batch);
        }
        assert_eq!(asked, WAITING_MAX);
    }
}
