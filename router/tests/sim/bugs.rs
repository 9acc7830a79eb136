//! Bugs planted around the shipped code: each makes the owner of the exchanges undo one thing that
//! they do, or break one promise that they rely on. None of them is in the library, so none can be
//! shipped.

use std::collections::BTreeSet;

use bytes::Bytes;
use entente_proto::frame::{Answer, Dispatch};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bug {
    /// Outputs are added up as they come, not in ascending order of experts.
    ArrivalOrder,
    /// An answer of an earlier start of the node is taken for one of the present.
    StaleFenceAccepted,
    /// An answer that is too short, or too long, is cut or filled up.
    WrongLengthAccepted,
    /// Each answer for a row is added, also the second.
    RepeatCounted,
    /// An answer to an earlier exchange is taken for one to the present.
    OtherExchangeAccepted,
    /// When a link breaks, all rows of the exchange are sent again.
    AllSentAgain,
    /// Hedges cost nothing.
    BudgetForgotten,
}

/// What the exchanges get to see of an answer from a node, given the frames that it was sent and
/// has not answered.
pub fn seen(bug: Option<Bug>, mut answer: Answer, open: &[&Dispatch]) -> Answer {
    let same = open.iter().find(|frame| frame.exchange == answer.exchange);
    match bug {
        Some(Bug::StaleFenceAccepted) => {
            if let Some(frame) = same {
                answer.fence = Some(frame.fence);
            }
        }
        Some(Bug::WrongLengthAccepted) => {
            if let (Some(frame), Ok(rows)) = (same, &answer.result) {
                let mut rows = rows.to_vec();
                rows.resize(frame.answer_len(), 0);
                answer.result = Ok(Bytes::from(rows));
            }
        }
        Some(Bug::OtherExchangeAccepted) => {
            let fits = |frame: &&&Dispatch| {
                answer.result.as_ref().is_ok_and(|rows| rows.len() == frame.answer_len())
            };
            if let (None, Some(frame)) = (same, open.iter().find(fits)) {
                answer.exchange = frame.exchange;
                answer.fence = Some(frame.fence);
            }
        }
        _ => {}
    }
    answer
}

/// The outputs that are added up, by slot: as shipped they are `parts`; otherwise what `arrived`.
pub fn added<'a>(
    bug: Option<Bug>,
    parts: Vec<(usize, &'a [u8])>,
    arrived: &'a [(usize, Bytes)],
) -> Vec<(usize, &'a [u8])> {
    let all = arrived.iter().map(|(slot, row)| (*slot, &row[..]));
    match bug {
        Some(Bug::ArrivalOrder) => {
            let mut known = BTreeSet::new();
            all.filter(|(slot, _)| known.insert(*slot)).collect()
        }
        Some(Bug::RepeatCounted) => {
            let mut all: Vec<(usize, &[u8])> = all.collect();
            all.sort_by_key(|(slot, _)| *slot);
            all
        }
        _ => parts,
    }
}
