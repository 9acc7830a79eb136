//! What must be known later: who was refused what, and what operators have ordered.
//!
//! Every event goes to the `audit` target of the log. A process that keeps a ledger plugs it in
//! behind a [`Sink`], which everybody who refuses or obeys holds a clone of. Whoever is known by a
//! certificate leaves a trace each time; of all others there are as many as [`Allowance`] lets through.
//!
//! What it does not know: what becomes of an event.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use entente_proto::identity::Identity;

use crate::allowance::Allowance;
use crate::state::Command;

/// Longest text of an event in bytes: a peer has a say in it.
const TEXT_LEN_MAX: usize = 300;

/// A call that was refused, or an operator's that was obeyed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// Whose call it was; `None` when it did not get as far as saying so.
    pub caller: Option<Identity>,
    /// The path of the call, or `connection`.
    pub call: String,
    /// Whether it was let through.
    pub allowed: bool,
    /// Why not; or what was asked for.
    pub reason: String,
}

/// Where events go. Cheap to clone.
#[derive(Clone, Default)]
pub struct Sink {
    ledger: Option<Arc<dyn Fn(Event) + Send + Sync>>,
    strangers: Arc<Mutex<Allowance>>,
}

impl fmt::Debug for Sink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.ledger.is_some() { "Sink(ledger)" } else { "Sink(log)" })
    }
}

impl Sink {
    /// Events go to `ledger` too, which is called where they happen and must not wait for long.
    pub fn to(ledger: impl Fn(Event) + Send + Sync + 'static) -> Self {
        Self { ledger: Some(Arc::new(ledger)), ..Self::default() }
    }

    /// A call was refused.
    pub fn refused(&self, caller: Option<&Identity>, call: &str, reason: &str) {
        self.record(caller, call, false, reason);
    }

    /// An operator's call was obeyed; `what` is asked for in it.
    pub fn obeyed(&self, caller: &Identity, call: &str, what: &str) {
        self.record(Some(caller), call, true, what);
    }

    fn record(&self, caller: Option<&Identity>, call: &str, allowed: bool, reason: &str) {
        let (call, mut reason) = (short(call), short(reason));
        if caller.is_none() {
            let Some(left_out) = self.take() else { return };
            if left_out > 0 {
                reason.push_str(&format!(" (after {left_out} of which there is no trace)"));
            }
        }
        let name = caller.map(Identity::to_string).unwrap_or_default();
        if allowed {
            tracing::info!(target: "audit", caller = name, call, reason, "an operator's order");
        } else {
            tracing::warn!(target: "audit", caller = name, call, reason, "refused");
        }
        if let Some(ledger) = &self.ledger {
            ledger(Event { caller: caller.cloned(), call, allowed, reason });
        }
    }

    fn take(&self) -> Option<u64> {
        self.strangers.lock().unwrap_or_else(PoisonError::into_inner).take(Instant::now())
    }
}

fn short(text: &str) -> String {
    let end = (0..=TEXT_LEN_MAX.min(text.len())).rev().find(|end| text.is_char_boundary(*end));
    text[..end.unwrap_or(0)].to_owned()
}

/// A command in words, without the contents of records: these may be secrets, and are long.
pub(crate) fn in_words(command: &Command) -> String {
    match command {
        Command::PutRecord { kind, key, .. } => format!("put record {kind:?} {key}"),
        Command::DeleteRecord { kind, key, .. } => format!("delete record {kind:?} {key}"),
        Command::SetPlacement(_) => "set placement".to_owned(),
        other => format!("{other:?}"),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::allowance::STRANGERS_MAX;
    use crate::state::RecordKind;

    #[test]
    fn what_a_peer_has_written_is_cut_to_a_length_and_never_within_a_character() {
        let events = Arc::new(Mutex::new(Vec::new()));
        let ledger = events.clone();
        let sink = Sink::to(move |event| ledger.lock().unwrap().push(event));
        sink.refused(None, "/a/b", &"\u{e9}".repeat(TEXT_LEN_MAX));
        sink.refused(None, "/a/b", &format!("x{}", "\u{e9}".repeat(TEXT_LEN_MAX)));
        let lens: Vec<usize> = events.lock().unwrap().iter().map(|e| e.reason.len()).collect();
        assert_eq!(lens, [300, 299]);
    }

    #[test]
    fn strangers_without_end_leave_no_traces_without_end_and_hide_nobody_who_is_known() {
        let events = Arc::new(Mutex::new(Vec::new()));
        let ledger = events.clone();
        let sink = Sink::to(move |event| ledger.lock().unwrap().push(event));
        let attempts = 10 * STRANGERS_MAX;
        (0..attempts).for_each(|_| sink.refused(None, "connection", "no certificate"));
        let traces = events.lock().unwrap().len();
        assert!(
            (STRANGERS_MAX as usize..STRANGERS_MAX as usize + 10).contains(&traces),
            "{traces}"
        );
        let known = "spiffe://demo/region/fr/role/expert/node/n".parse().unwrap();
        (0..5).for_each(|_| sink.refused(Some(&known), "/a/b", "it may not"));
        let seen = events.lock().unwrap();
        assert_eq!(seen.iter().filter(|event| event.caller.is_some()).count(), 5);
    }

    #[test]
    fn the_content_of_a_record_is_not_told() {
        let (kind, key) = (RecordKind::Tenant, "tax-office".to_owned());
        let put = Command::PutRecord { kind, key, value: b"secret"[..].into(), revision: None };
        assert_eq!(in_words(&put), "put record Tenant tax-office");
    }
}
