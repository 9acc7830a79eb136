//! What the node has done so far: rows computed, in all and for each request, and frames refused.
//!
//! Rows are (row, expert) pairs, and count when they were computed, before they are answered. The
//! counts by request are what the node makes statements of. They stay after a statement was made, so
//! a later one of the same request says no less, and one that got lost on its way can be made again.
//!
//! Invariant: no more than [`REQUESTS_MAX`] requests are remembered; past it the oldest is forgotten,
//! and how many were is counted.
//!
//! What it does not know: experts by request (choices reveal text), tenants, who asks, signatures.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use entente_proto::frame::{Dispatch, Refusal};
use entente_proto::ids::RequestId;

use crate::limits::REQUESTS_MAX;

/// See the module.
#[derive(Default)]
pub(crate) struct Account {
    rows: AtomicU64,
    refused: Mutex<BTreeMap<&'static str, u64>>,
    requests: Mutex<Requests>,
}

/// A thread that panicked while it counted has left a number too low at worst.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Account {
    /// Takes note of a frame that was computed.
    pub(crate) fn computed(&self, frame: &Dispatch) {
        self.rows.fetch_add(frame.assignments.len() as u64, Ordering::Relaxed);
        let mut requests = lock(&self.requests);
        for (request, rows) in &frame.requests {
            requests.add(*request, u64::from(*rows));
        }
    }

    /// Takes note of a frame that was not.
    pub(crate) fn refused(&self, refusal: &Refusal) {
        *lock(&self.refused).entry(reason(refusal)).or_default() += 1;
    }

    /// Rows computed since the process started.
    pub(crate) fn rows(&self) -> u64 {
        self.rows.load(Ordering::Relaxed)
    }

    /// Frames refused since the process started, by reason; all reasons, so that whoever looks for
    /// changes sees the first one too.
    pub(crate) fn refusals(&self) -> BTreeMap<&'static str, u64> {
        let mut all = BTreeMap::from(REASONS.map(|reason| (reason, 0)));
        all.extend(lock(&self.refused).iter());
        all
    }

    /// Rows computed for each of these requests so far; 0 for those that are not known.
    pub(crate) fn rows_of(&self, requests: &[RequestId]) -> Vec<(RequestId, u64)> {
        let known = lock(&self.requests);
        requests.iter().map(|request| (*request, known.rows(request))).collect()
    }

    /// Requests that were forgotten since the process started.
    pub(crate) fn forgotten(&self) -> u64 {
        lock(&self.requests).forgotten
    }
}

/// All that [`reason`] says.
const REASONS: [&str; 7] =
    ["busy", "draining", "expired", "invalid", "not_held", "region_refused", "stale_fence"];

/// The word for a refusal in metrics.
fn reason(refusal: &Refusal) -> &'static str {
    match refusal {
        Refusal::Busy => "busy",
        Refusal::Draining => "draining",
        Refusal::StaleFence(_) => "stale_fence",
        Refusal::NotHeld(_) => "not_held",
        Refusal::RegionRefused(_) => "region_refused",
        Refusal::Invalid(_) => "invalid",
        Refusal::Expired => "expired",
    }
}

/// Rows by request, the youngest requests only.
#[derive(Debug, Default)]
struct Requests {
    /// Rows, and the number under which the request stands in `order`.
    rows: BTreeMap<RequestId, (u64, u64)>,
    /// In the order in which they were first heard of.
    order: BTreeMap<u64, RequestId>,
    next: u64,
    forgotten: u64,
}

impl Requests {
    fn add(&mut self, request: RequestId, rows: u64) {
        if let Some((sum, _)) = self.rows.get_mut(&request) {
            *sum += rows;
            return;
        }
        if self.rows.len() >= REQUESTS_MAX
            && let Some((_, oldest)) = self.order.pop_first()
        {
            self.rows.remove(&oldest);
            self.forgotten += 1;
        }
        self.rows.insert(request, (rows, self.next));
        self.order.insert(self.next, request);
        self.next += 1;
    }

    fn rows(&self, request: &RequestId) -> u64 {
        self.rows.get(request).map_or(0, |(rows, _)| *rows)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_add_up_by_request_and_the_oldest_is_forgotten_first() {
        let (mut requests, count) = (Requests::default(), REQUESTS_MAX as u128);
        for id in (0..count).chain(0..count) {
            requests.add(RequestId(id), 2);
        }
        assert_eq!((requests.rows(&RequestId(0)), requests.forgotten), (4, 0));
        requests.add(RequestId(count), 1);
        assert_eq!((requests.rows(&RequestId(0)), requests.forgotten), (0, 1));
        assert_eq!((requests.rows(&RequestId(1)), requests.rows(&RequestId(count))), (4, 1));
        assert_eq!((requests.rows.len(), requests.order.len()), (REQUESTS_MAX, REQUESTS_MAX));
    }
}
