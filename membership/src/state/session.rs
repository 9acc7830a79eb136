//! Exactly once: what became of each client's latest command.
//!
//! A proposal that timed out is *unknown*: it may be in the log, may get there yet, or may be lost.
//! So a client repeats it with the same (session, sequence) until it is told an outcome, and the
//! rule for what a repetition gets is:
//!
//! | the sequence is | the answer is |
//! |---|---|
//! | above the session's latest | the command is applied, and the outcome kept |
//! | the session's latest | the kept outcome, accepted or refused; nothing is applied |
//! | below it | `Superseded`: the client itself went on, so it knew the outcome or gave it up |
//! | of a session that is not here | `SessionExpired`; nothing is applied |
//!
//! The table is bounded. When it is full, opening a session closes the one that was unused for
//! longest. As a closed session is refused, forgetting one can never apply a command twice.

use std::collections::BTreeMap;

use super::command::{Outcome, Refused, RefusedCode, SessionId};

/// Most sessions that are open at a time.
pub const SESSIONS_MAX: usize = 1_024;

/// One client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Session {
    pub sequence: u64,
    /// Absent until the first command.
    pub outcome: Option<Outcome>,
    pub used_at_index: u64,
}

/// All clients.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Sessions(pub BTreeMap<SessionId, Session>);

impl Sessions {
    /// Opens a session at a log index, after which it is named: an index is never used twice.
    pub fn open(&mut self, index: u64) -> SessionId {
        if self.0.len() >= SESSIONS_MAX {
            let idle = self.0.iter().min_by_key(|(id, session)| (session.used_at_index, **id));
            if let Some(id) = idle.map(|(id, _)| *id) {
                self.0.remove(&id);
            }
        }
        let id = SessionId(index);
        self.0.insert(id, Session { sequence: 0, outcome: None, used_at_index: index });
        id
    }

    /// What a command gets without being applied; `None` when it is to be applied.
    pub fn replay(&self, id: SessionId, sequence: u64) -> Option<Outcome> {
        let Some(session) = self.0.get(&id) else {
            let text = format_args!("session {} is not open; open another", id.0);
            return Some(Err(Refused::new(RefusedCode::SessionExpired, text)));
        };
        if sequence > session.sequence {
            return None;
        }
        match &session.outcome {
            Some(outcome) if sequence == session.sequence => Some(outcome.clone()),
            _ => {
                let text = format_args!(
                    "sequence {sequence} of session {} is superseded by {}",
                    id.0, session.sequence
                );
                Some(Err(Refused::new(RefusedCode::Superseded, text)))
            }
        }
    }

    /// Keeps the outcome of the session's latest command.
    pub fn keep(&mut self, id: SessionId, sequence: u64, index: u64, outcome: &Outcome) {
        if let Some(session) = self.0.get_mut(&id) {
            *session = Session { sequence, outcome: Some(outcome.clone()), used_at_index: index };
        }
    }
}
