//! Where the rows of one generation went, and how it ended: what a receipt is made of.
//!
//! Rows are counted as (row, expert) pairs when they are handed to a link, whether or not the link
//! gets them across: a node that may have seen a row is named. What the node really computed is its
//! own to say. A step counts by the number that each generation has in it; the counts are added to
//! the generations once, at the step's end, also when the step came to nothing.
//!
//! Invariant: every generation that the engine was given is closed exactly once.
//!
//! Pure. What it does not know: experts (they are counted by node only, since choices reveal text),
//! tokens, text, who keeps the records.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use entente_proto::ids::{
    Incarnation, KernelClass, MembershipEpoch, NodeName, PlacementEpoch, Region,
};
use entente_router::pace::Repeats;

use super::origin::Origin;
use super::output::Finish;

/// One start of an expert node that rows were sent to, as it showed itself when it was dialled.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Touched {
    /// Its name.
    pub node: NodeName,
    /// The country that it stands in.
    pub region: Region,
    /// Which start of it.
    pub incarnation: Incarnation,
    /// SHA-256 of its certificate in DER; zeros where none is shown.
    pub certificate_sha256: [u8; 32],
    /// The kernels that compute its rows.
    pub kernel_class: KernelClass,
}

/// What was committed when a step began.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Epochs {
    /// Of the membership.
    pub membership: MembershipEpoch,
    /// Of the placement.
    pub placement: PlacementEpoch,
}

/// What was done for one generation. Rows are (row, expert) pairs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tally {
    /// Rows sent to each node, repeated ones and hedges included.
    pub touched: BTreeMap<Touched, u64>,
    /// Rows sent again because the first attempt came to nothing.
    pub retried_rows: u64,
    /// Rows asked of a second node because the first was slow.
    pub hedged_rows: u64,
    /// What its first step was computed under; zeros when there was none.
    pub first_epochs: Epochs,
    /// What its last step was computed under.
    pub last_epochs: Epochs,
    /// Tokens of the prompt.
    pub prompt_tokens: u64,
    /// Tokens generated.
    pub completion_tokens: u64,
}

/// How a generation ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum How {
    /// As it should.
    Finished(Finish),
    /// Its client went away.
    Disconnected,
    /// It could not go on; the text is what the client was told.
    Failed(String),
}

/// A generation that has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Closed {
    /// Whose it was. Several generations may be of one request.
    pub origin: Arc<Origin>,
    /// What was done for it.
    pub tally: Tally,
    /// How it ended.
    pub how: How,
    /// From when the engine was given it until its end.
    pub took: Duration,
}

/// Where the rows of one step went, by the number that their owner has in it.
#[derive(Debug, Default)]
pub struct StepTally {
    /// A few nodes at most, so they are looked for one after the other.
    sent: Vec<(Arc<Touched>, Vec<u64>)>,
    repeats: BTreeMap<u16, Repeats>,
}

impl StepTally {
    /// Takes note of a frame for a node, so many rows of it of each owner.
    pub(super) fn sent(&mut self, touched: &Arc<Touched>, shares: &[(u16, u32)]) {
        let known = self.sent.iter().position(|(node, _)| Arc::ptr_eq(node, touched));
        let at = known.unwrap_or_else(|| {
            self.sent.push((touched.clone(), Vec::new()));
            self.sent.len() - 1
        });
        let rows_of = &mut self.sent[at].1;
        for (owner, rows) in shares {
            let owner = usize::from(*owner);
            if rows_of.len() <= owner {
                rows_of.resize(owner + 1, 0);
            }
            rows_of[owner] += u64::from(*rows);
        }
    }

    /// Takes note of rows that were sent more than once.
    pub(super) fn repeated(&mut self, repeats: BTreeMap<u16, Repeats>) {
        for (owner, Repeats { hedged, retried }) in repeats {
            let sum = self.repeats.entry(owner).or_default();
            sum.hedged += hedged;
            sum.retried += retried;
        }
    }
}

impl Tally {
    /// Adds what a step did for the generation that was its owner `number`.
    pub(super) fn add(&mut self, step: &StepTally, number: u16, epochs: Epochs) {
        if self.first_epochs == Epochs::default() {
            self.first_epochs = epochs;
        }
        self.last_epochs = epochs;
        for (touched, rows_of) in &step.sent {
            let rows = rows_of.get(usize::from(number)).copied().unwrap_or(0);
            match self.touched.get_mut(&**touched) {
                _ if rows == 0 => {}
                Some(sum) => *sum += rows,
                None => {
                    self.touched.insert((**touched).clone(), rows);
                }
            }
        }
        if let Some(repeats) = step.repeats.get(&number) {
            self.retried_rows += repeats.retried;
            self.hedged_rows += repeats.hedged;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(name: &str, certificate: u8) -> Arc<Touched> {
        Arc::new(Touched {
            node: name.parse().unwrap(),
            region: "fr".parse().unwrap(),
            incarnation: Incarnation(7),
            certificate_sha256: [certificate; 32],
            kernel_class: KernelClass::default(),
        })
    }

    #[test]
    fn rows_are_added_to_their_owners_by_node_and_by_the_certificate_that_it_showed() {
        let (one, renewed, other) = (node("a", 1), node("a", 2), node("b", 1));
        let mut step = StepTally::default();
        step.sent(&one, &[(0, 2), (2, 3)]);
        step.sent(&other, &[(2, 1)]);
        step.sent(&one, &[(0, 1)]);
        step.sent(&renewed, &[(2, 5)]);
        let repeats = Repeats { hedged: 1, retried: 4 };
        step.repeated([(2, repeats)].into());
        step.repeated([(2, repeats)].into());
        let epochs = |n| Epochs { membership: MembershipEpoch(n), placement: PlacementEpoch(n) };
        let mut tallies = [Tally::default(), Tally::default(), Tally::default()];
        for n in [3, 4] {
            for (number, tally) in tallies.iter_mut().enumerate() {
                tally.add(&step, number as u16, epochs(n));
            }
        }
        let touched = |tally: &Tally| -> Vec<(String, u8, u64)> {
            let of = |(node, rows): (&Touched, &u64)| {
                (node.node.to_string(), node.certificate_sha256[0], *rows)
            };
            tally.touched.iter().map(of).collect()
        };
        let is = |name: &str, certificate, rows| (name.to_owned(), certificate, rows);
        assert_eq!(touched(&tallies[0]), [is("a", 1, 6)]);
        assert_eq!(touched(&tallies[1]), []);
        assert_eq!(touched(&tallies[2]), [is("a", 1, 6), is("a", 2, 10), is("b", 1, 2)]);
        assert_eq!((tallies[2].retried_rows, tallies[2].hedged_rows), (16, 4));
        assert_eq!((tallies[0].retried_rows, tallies[0].hedged_rows), (0, 0));
        assert_eq!((tallies[1].first_epochs, tallies[1].last_epochs), (epochs(3), epochs(4)));
    }
}
