//! The door of a process: asks the table of [`crate::access`] before any handler, and leaves a trace
//! of whom it refuses.

use std::sync::Arc;

use entente_proto::identity::Identity;
use entente_proto::ids::Region;
use tonic::Status;

use crate::access;
use crate::audit::Sink;
use crate::net::Peer;

/// Guards one process. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Guard {
    region: Region,
    audit: Sink,
}

impl Guard {
    /// Of the process with this identity.
    pub fn new(own: &Identity, audit: Sink) -> Self {
        Self { region: own.region, audit }
    }

    /// Lets a call through to its handler, or not.
    ///
    /// # Errors
    /// Nobody is known to be there, or the table does not allow it.
    pub fn admit(&self, peer: Option<&Peer>, call: &str) -> Result<(), Status> {
        let Some(peer) = peer else {
            self.audit.refused(None, call, "nobody is known there");
            return Err(nobody());
        };
        access::check(&peer.identity, self.region, call)
            .map_err(|denied| self.refuse(&peer.identity, call, &denied.to_string()))
    }

    /// Refuses a caller for what it said, and leaves a trace of it.
    pub fn refuse(&self, caller: &Identity, call: &str, reason: &str) -> Status {
        self.audit.refused(Some(caller), call, reason);
        Status::permission_denied(format!("{caller} may not: {reason}"))
    }

    /// Leaves a trace of a caller that gets another answer than that it may not.
    pub fn note_refused(&self, caller: &Identity, call: &str, reason: &str) {
        self.audit.refused(Some(caller), call, reason);
    }

    /// Leaves a trace of what an operator has ordered.
    pub fn obey(&self, caller: &Identity, call: &str, what: &str) {
        self.audit.obeyed(caller, call, what);
    }

    /// Leaves a trace of somebody without a certificate who was refused.
    pub(crate) fn note_stranger(&self, call: &str, reason: &str) {
        self.audit.refused(None, call, reason);
    }

    /// Leaves a trace of a connection that was not taken.
    pub fn turned_away(&self, address: std::net::SocketAddr, error: &std::io::Error) {
        self.audit.refused(None, "connection", &format!("{address}: {error}"));
    }
}

/// Who calls. Every connection has said it.
pub(crate) fn caller<T>(request: &tonic::Request<T>) -> Result<Arc<Identity>, Status> {
    let peer = request.extensions().get::<Peer>();
    peer.map(|peer| peer.identity.clone()).ok_or_else(nobody)
}

fn nobody() -> Status {
    Status::unauthenticated("nobody is known there")
}
