//! The control ports that a client knows, and the connections to them.

use std::collections::BTreeMap;

use tonic::transport::Channel;

use crate::state::{NodeState, State};

/// Most addresses that are remembered.
const ADDRESSES_MAX: usize = 64;

/// Where voters are.
pub(super) struct Addresses {
    /// Those that the caller gave; tried again when all that was learnt is of no use.
    given: Vec<String>,
    /// All that are known, in the order in which they are tried.
    known: Vec<String>,
    channels: BTreeMap<String, Channel>,
    leader: Option<String>,
    answered: Option<String>,
}

impl Addresses {
    pub(super) fn new(given: Vec<String>) -> Self {
        let known = given.clone();
        Self { given, known, channels: BTreeMap::new(), leader: None, answered: None }
    }

    /// Whom to ask first.
    pub(super) fn first(&self, leader: bool) -> String {
        let last = if leader { &self.leader } else { &self.answered };
        last.clone().unwrap_or_else(|| self.known[0].clone())
    }

    /// Whom to ask next: the one that was named, or else one that was not asked yet.
    pub(super) fn next(&mut self, tried: &[String], hint: Option<String>) -> Option<String> {
        if let Some(hint) = hint.filter(|hint| !tried.contains(hint)) {
            self.learn(&hint);
            return Some(hint);
        }
        self.known.iter().find(|address| !tried.contains(address)).cloned()
    }

    /// The one after, in a circle.
    pub(super) fn after(&self, address: &str) -> String {
        let at = self.known.iter().position(|known| known == address);
        let next = at.map_or(0, |at| (at + 1) % self.known.len());
        self.known[next].clone()
    }

    pub(super) fn answered(&mut self, address: &str, leader: bool) {
        let last = if leader { &mut self.leader } else { &mut self.answered };
        *last = Some(address.to_owned());
    }

    /// The next call to anybody begins elsewhere.
    pub(super) fn pass_over(&mut self) {
        self.answered = self.answered.take().map(|last| self.after(&last));
    }

    fn learn(&mut self, address: &str) {
        if self.known.len() < ADDRESSES_MAX && !self.known.iter().any(|known| known == address) {
            self.known.push(address.to_owned());
        }
    }

    /// A committed state says where voters are, and what is no longer one.
    pub(super) fn learn_from(&mut self, state: &State) {
        let voters = state.nodes().filter(|node| {
            node.spec.role.votes()
                && node.state != NodeState::Removed
                && !node.spec.address.is_empty()
        });
        let learnt: Vec<String> = voters.map(|node| node.spec.address.clone()).collect();
        self.known.clone_from(&self.given);
        learnt.iter().for_each(|address| self.learn(address));
        self.channels.retain(|address, _| self.known.contains(address));
    }

    pub(super) fn channel(&self, address: &str) -> Option<Channel> {
        self.channels.get(address).cloned()
    }

    pub(super) fn keep_channel(&mut self, address: &str, channel: Channel) {
        if self.channels.len() >= ADDRESSES_MAX {
            self.channels.clear();
        }
        self.channels.insert(address.to_owned(), channel);
    }

    /// The next call dials, and does not begin there.
    pub(super) fn failed(&mut self, address: &str) {
        self.channels.remove(address);
        self.leader = self.leader.take().filter(|leader| leader != address);
        self.answered = self.answered.take().filter(|answered| answered != address);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(list: &[&str]) -> Addresses {
        Addresses::new(list.iter().map(|a| (*a).to_owned()).collect())
    }

    #[test]
    fn the_named_one_is_asked_next_and_then_whoever_was_not_asked() {
        let mut known = addresses(&["a:1", "b:1"]);
        let tried = vec!["a:1".to_owned()];
        assert_eq!(known.next(&tried, Some("c:1".to_owned())).as_deref(), Some("c:1"));
        assert_eq!(known.next(&tried, Some("a:1".to_owned())).as_deref(), Some("b:1"));
        let tried = ["a:1", "b:1", "c:1"].map(str::to_owned);
        assert_eq!(known.next(&tried, None), None);
        assert_eq!(known.after("c:1"), "a:1");
    }

    #[test]
    fn what_voters_name_is_remembered_up_to_a_bound() {
        let mut known = addresses(&["a:1"]);
        for port in 0..1_000 {
            known.next(&[], Some(format!("x:{port}")));
        }
        assert_eq!(known.known.len(), ADDRESSES_MAX);
    }
}
