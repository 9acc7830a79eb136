//! From the several ends of one request to its one record. Pure: no clock, no disk.
//!
//! A request has as many generations as it has prompts times answers, each of which the engine
//! closes for itself, and it may be closed before the API has said how many there are. Its record is
//! made once the API has said so and all of them are closed.

use std::collections::BTreeMap;
use std::sync::Arc;

use entente_audit::record::{self, Digest, NODES_MAX};
use entente_proto::ids::RequestId;

use crate::engine::origin::Origin;
use crate::engine::output::Finish;
use crate::engine::tally::{Closed, How, Touched};

/// Requests whose ends are awaited at most; the ledger's tickets keep them below.
pub const OPEN_MAX: usize = 8_192;

/// What is the same in the records of all requests.
#[derive(Debug, Clone)]
pub struct Facts {
    /// This process.
    pub coordinator: record::Coordinator,
    /// The model that answers.
    pub model: Digest,
    /// Which bits its kernels give.
    pub kernel_class: String,
}

/// What the API says of a request once it has been handed to the engine.
#[derive(Debug, Clone)]
pub struct Opened {
    /// Whose it is, and where its rows may go.
    pub origin: Arc<Origin>,
    /// The policy that it was admitted under.
    pub policy: Option<record::Policy>,
    /// SHA-256 of its body; the record has it salted.
    pub body: [u8; 32],
    /// When it was read, in milliseconds since 1970.
    pub begun_ms: u64,
    /// Generations that the engine took.
    pub generations: usize,
    /// What is the same in all records.
    pub facts: Arc<Facts>,
}

/// A request that is complete, and how it ended.
#[derive(Debug)]
pub struct Complete {
    /// What the API said.
    pub opened: Opened,
    /// Its generations, in the order in which they ended.
    pub closed: Vec<Closed>,
}

/// The requests whose record cannot be made yet.
#[derive(Debug, Default)]
pub struct Requests {
    open: BTreeMap<RequestId, (Option<Opened>, Vec<Closed>)>,
}

impl Requests {
    /// Takes what the API says; gives the request if it was all that was missing.
    pub fn opened(&mut self, opened: Opened) -> Option<Complete> {
        let id = opened.origin.id;
        self.open.entry(id).or_default().0 = Some(opened);
        self.complete(id)
    }

    /// Takes the end of a generation; gives the request if it was all that was missing.
    pub fn closed(&mut self, closed: Closed) -> Option<Complete> {
        let id = closed.origin.id;
        // Ends of requests that the API never speaks of would pile up; there are none.
        if self.open.len() >= OPEN_MAX && !self.open.contains_key(&id) {
            tracing::error!(request = %id, "a generation ended of a request that nobody began");
            return None;
        }
        self.open.entry(id).or_default().1.push(closed);
        self.complete(id)
    }

    /// Whether the request is one whose record is not made yet.
    pub fn is_open(&self, id: RequestId) -> bool {
        self.open.contains_key(&id)
    }

    /// The requests that did not end in time, as far as they got.
    pub fn give_up(&mut self) -> Vec<Complete> {
        let open = std::mem::take(&mut self.open).into_values();
        open.filter_map(|(opened, closed)| Some(Complete { opened: opened?, closed })).collect()
    }

    fn complete(&mut self, id: RequestId) -> Option<Complete> {
        let (opened, closed) = self.open.get(&id)?;
        let all = opened.as_ref().is_some_and(|opened| closed.len() >= opened.generations);
        if !all {
            return None;
        }
        let (opened, closed) = self.open.remove(&id)?;
        Some(Complete { opened: opened?, closed })
    }
}

impl Complete {
    /// The record. `body` is salted already.
    pub fn record(self, body: Digest, ended_ms: u64) -> record::Request {
        let Self { opened, closed } = self;
        let Opened { origin, policy, begun_ms, generations, facts, .. } = opened;
        let sum = |of: fn(&Closed) -> u64| closed.iter().map(of).sum::<u64>();
        let (nodes, nodes_omitted) = nodes(&closed, &facts.kernel_class);
        let epochs = |of: fn(&Closed) -> [u64; 2]| span(closed.iter().map(of));
        record::Request {
            id: origin.id,
            tenant: origin.tenant.clone(),
            policy,
            allowed: origin.allowed.clone(),
            body,
            model: facts.model,
            kernel_class: facts.kernel_class.clone(),
            coordinator: facts.coordinator.clone(),
            nodes,
            nodes_omitted,
            membership_epochs: epochs(|closed| {
                [closed.tally.first_epochs.membership.0, closed.tally.last_epochs.membership.0]
            }),
            placement_epochs: epochs(|closed| {
                [closed.tally.first_epochs.placement.0, closed.tally.last_epochs.placement.0]
            }),
            retried_rows: sum(|closed| closed.tally.retried_rows),
            hedged_rows: sum(|closed| closed.tally.hedged_rows),
            prompt_tokens: sum(|closed| closed.tally.prompt_tokens),
            completion_tokens: sum(|closed| closed.tally.completion_tokens),
            begun_ms,
            ended_ms,
            answers: closed.iter().map(|closed| end(&closed.how).to_owned()).collect(),
            decision: decision(&closed, generations).to_owned(),
        }
    }
}

/// The nodes that any of the generations touched, in the order of their names; with their kernel
/// class where it is not `own`.
fn nodes(closed: &[Closed], own: &str) -> (Vec<record::Node>, u64) {
    let mut rows: BTreeMap<&Touched, u64> = BTreeMap::new();
    for (touched, count) in closed.iter().flat_map(|closed| &closed.tally.touched) {
        *rows.entry(touched).or_default() += count;
    }
    let omitted = rows.len().saturating_sub(NODES_MAX) as u64;
    let node = |(touched, rows): (&Touched, u64)| {
        let shown = touched.certificate_sha256;
        record::Node {
            node: touched.node.clone(),
            region: touched.region,
            incarnation: touched.incarnation.0,
            certificate: (shown != [0; 32]).then_some(Digest(shown)),
            rows,
            kernel_class: Some(touched.kernel_class.0.clone()).filter(|class| class != own),
        }
    };
    (rows.into_iter().take(NODES_MAX).map(node).collect(), omitted)
}

/// The lowest first and the highest last epoch of generations that had any.
fn span(epochs: impl Iterator<Item = [u64; 2]>) -> [u64; 2] {
    let had = epochs.filter(|[_, last]| *last > 0);
    let wider = |a: [u64; 2], b: [u64; 2]| [a[0].min(b[0]), a[1].max(b[1])];
    had.reduce(wider).unwrap_or_default()
}

/// A word for how an answer ended: never a text, which could say what was asked for.
fn end(how: &How) -> &'static str {
    match how {
        How::Finished(Finish::Length) => "length",
        How::Finished(Finish::EndOfSequence | Finish::StopString(_)) => "stop",
        How::Disconnected => "disconnected",
        How::Failed(_) => "failed",
    }
}

fn decision(closed: &[Closed], generations: usize) -> &'static str {
    let any = |is: fn(&How) -> bool| closed.iter().any(|closed| is(&closed.how));
    if any(|how| matches!(how, How::Failed(_))) {
        "failed"
    } else if any(|how| matches!(how, How::Disconnected)) {
        "disconnected"
    } else if closed.len() < generations {
        "cut off"
    } else {
        "served"
    }
}

#[cfg(test)]
mod tests;
