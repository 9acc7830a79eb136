//! What must be true of every run, checked at every step and over the clients' history at the end.

use std::collections::BTreeMap;

use entente_membership::log::{Batch, Group};
use entente_membership::state::codec::sha256;
use entente_membership::state::{Applied, Outcome, State};
use entente_membership::voter::{Answer, Voter};
use entente_proto::ids::{Incarnation, NodeId};
use entente_proto::wire;

/// What a client wanted, as far as the oracle must know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wish {
    Put { key: String, value: String },
    Register(NodeId),
    Fenced(NodeId, Incarnation),
    Mint,
    Open,
}

/// One finished operation of a client that has a place in the order of revisions.
#[derive(Debug, Clone)]
pub struct Operation {
    pub start: u64,
    pub end: u64,
    /// The revision that it made, or that it saw.
    pub revision: u64,
    pub is_write: bool,
}

/// A read's value, to be compared with the writes once all are known.
#[derive(Debug, Clone)]
pub struct Seen {
    pub key: String,
    pub value: Option<String>,
    pub revision: u64,
}

#[derive(Default)]
pub struct Oracle {
    leaders: BTreeMap<u64, u64>,
    appended: BTreeMap<(u64, u64), [u8; 32]>,
    committed: BTreeMap<u64, (u64, [u8; 32])>,
    outcomes: BTreeMap<u64, Outcome>,
    digests: BTreeMap<u64, [u8; 32]>,
    counters: BTreeMap<u64, [u64; 4]>,
    votes: BTreeMap<(u64, u64), u64>,
    terms: BTreeMap<u64, u64>,
    minted: BTreeMap<Incarnation, u64>,
    latest: BTreeMap<NodeId, Incarnation>,
    /// By number of the wish.
    pub wishes: BTreeMap<u64, Wish>,
    /// Which wish a proposal is a try of.
    pub tries: BTreeMap<(u64, u64), u64>,
    effects: BTreeMap<u64, Applied>,
    writes: BTreeMap<u64, (String, String)>,
    pub history: Vec<Operation>,
    pub seen: Vec<Seen>,
}

pub type Checked = Result<(), String>;

impl Oracle {
    /// Two leaders of one term would both be right.
    pub fn leads(&mut self, id: u64, voter: &Voter) -> Checked {
        if !voter.is_leader() {
            return Ok(());
        }
        let term = voter.log().hard_state.term;
        match *self.leaders.entry(term).or_insert(id) {
            leader if leader == id => Ok(()),
            leader => Err(format!("{leader} and {id} both lead term {term}")),
        }
    }

    /// An index and a term name one entry.
    pub fn appends(&mut self, batch: &Batch) -> Checked {
        for entry in &batch.entries {
            let hash = sha256(&entry.data);
            if *self.appended.entry((entry.index, entry.term)).or_insert(hash) != hash {
                return Err(format!("two entries {} of term {}", entry.index, entry.term));
            }
        }
        Ok(())
    }

    /// A voter votes once a term and never says a term that is below an earlier one.
    pub fn sends(&mut self, message: &wire::RaftMessage) -> Checked {
        const VOTE_RESPONSE: i32 = 6;
        if message.msg_type != VOTE_RESPONSE || message.reject {
            return Ok(());
        }
        let (from, term, to) = (message.from, message.term, message.to);
        if *self.votes.entry((from, term)).or_insert(to) != to {
            return Err(format!("{from} voted twice in term {term}"));
        }
        let highest = self.terms.entry(from).or_default();
        if term < *highest {
            return Err(format!("{from} went back from term {highest} to {term}"));
        }
        *highest = term;
        Ok(())
    }

    /// What a voter applied up to `before` .. now is what everybody applied, and a majority holds it.
    pub fn applies(
        &mut self,
        voter: &Voter,
        before: u64,
        groups: [&Group; 2],
        holds: impl Fn(u64, u64, u64) -> bool,
    ) -> Checked {
        let (state, log) = (voter.state(), voter.log());
        for index in before + 1..=state.applied_index() {
            let Some(entry) = log.entries.iter().find(|entry| entry.index == index) else {
                continue;
            };
            let this = (entry.term, sha256(&entry.data));
            match self.committed.get(&index) {
                Some(that) if *that != this => {
                    return Err(format!("entry {index} was committed twice"));
                }
                Some(_) => continue,
                None => self.committed.insert(index, this),
            };
            // A leader counts by the group that it has applied: until it has applied the change to a
            // joint group that is in its log, by the old voters alone. That is safe, because who
            // ends the joint group needs their majority, and so this entry.
            let majority = |ids: &std::collections::BTreeSet<u64>| {
                ids.is_empty()
                    || ids.iter().filter(|id| holds(**id, index, entry.term)).count() * 2
                        > ids.len()
            };
            if !groups.iter().any(|group| {
                majority(if group.outgoing.is_empty() { &group.voters } else { &group.outgoing })
            }) {
                return Err(format!("entry {index} was committed and a majority does not hold it"));
            }
        }
        self.state_is_common(state)
    }

    /// Equal prefixes give equal states, and nothing that counts falls.
    pub fn state_is_common(&mut self, state: &State) -> Checked {
        let index = state.applied_index();
        let counters = [
            state.membership_epoch().0,
            state.placement_epoch().0,
            state.incarnations_minted(),
            state.revision(),
        ];
        let below = self.counters.range(..index).next_back().map(|(_, counters)| *counters);
        let above = self.counters.range(index..).next().map(|(_, counters)| *counters);
        let falls = |low: [u64; 4], high: [u64; 4]| low.iter().zip(&high).any(|(l, h)| l > h);
        if below.is_some_and(|low| falls(low, counters))
            || above.is_some_and(|high| falls(counters, high))
        {
            return Err(format!("an epoch went back at index {index}"));
        }
        self.counters.insert(index, counters);
        if index.is_multiple_of(4) {
            let digest = sha256(&state.encode());
            if *self.digests.entry(index).or_insert(digest) != digest {
                return Err(format!("two states at index {index}"));
            }
        }
        Ok(())
    }

    /// An answer is the same everywhere, follows from a wish, and no wish comes true twice.
    /// Returns whether it is news.
    pub fn answers(&mut self, answer: &Answer) -> Result<bool, String> {
        let index = answer.index;
        if let Some(outcome) = self.outcomes.get(&index) {
            let same = *outcome == answer.outcome;
            return if same { Ok(false) } else { Err(format!("two outcomes at index {index}")) };
        }
        self.outcomes.insert(index, answer.outcome.clone());
        let Some(wish) = self.tries.get(&(answer.session.0, answer.sequence)).copied() else {
            return Ok(true);
        };
        let Ok(applied) = answer.outcome else { return Ok(true) };
        if self.wishes[&wish] == Wish::Open {
            return Ok(true);
        }
        match self.effects.get(&wish).copied() {
            Some(earlier) if earlier == applied => return Ok(true),
            Some(earlier) => {
                return Err(format!("wish {wish} came true twice: {earlier:?}, {applied:?}"));
            }
            None => self.effects.insert(wish, applied),
        };
        self.comes_true(wish, applied)?;
        Ok(true)
    }

    fn comes_true(&mut self, wish: u64, applied: Applied) -> Checked {
        match (self.wishes[&wish].clone(), applied) {
            (Wish::Put { key, value }, Applied::Revision(revision)) => {
                match self.writes.insert(revision, (key, value)) {
                    None => Ok(()),
                    Some(_) => Err(format!("revision {revision} was made twice")),
                }
            }
            (Wish::Register(node), Applied::Registered(incarnation)) => {
                self.latest.insert(node, incarnation);
                match self.minted.insert(incarnation, wish) {
                    None => Ok(()),
                    Some(_) => Err(format!("incarnation {incarnation} was minted twice")),
                }
            }
            (Wish::Fenced(node, incarnation), _)
                if self.latest.get(&node) != Some(&incarnation) =>
            {
                Err(format!("incarnation {incarnation} of node {node} was fenced and got its way"))
            }
            _ => Ok(()),
        }
    }

    /// The clients' history is linearizable: revisions put all operations into one order, and that
    /// order must respect real time and give each read what was last written.
    pub fn history_is_linearizable(&mut self) -> Checked {
        self.history.sort_by_key(|operation| operation.start);
        let mut ended: Vec<&Operation> = self.history.iter().collect();
        ended.sort_by_key(|operation| operation.end);
        let (mut floor, mut next) = (0, 0);
        for operation in &self.history {
            while next < ended.len() && ended[next].end < operation.start {
                floor = floor.max(ended[next].revision);
                next += 1;
            }
            let fits = if operation.is_write {
                operation.revision > floor
            } else {
                operation.revision >= floor
            };
            if !fits {
                return Err(format!("revision {floor} was over when {operation:?} began"));
            }
        }
        for seen in &self.seen {
            let mut earlier = self.writes.range(..=seen.revision).rev();
            let last =
                earlier.find(|(_, (key, _))| *key == seen.key).map(|(_, (_, value))| value.clone());
            if last != seen.value {
                return Err(format!("{seen:?} was read, {last:?} was written"));
            }
        }
        Ok(())
    }
}
