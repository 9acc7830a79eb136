//! Who may call what: one table, looked at in one place, before any handler.
//!
//! What is not in the table is refused. Handlers check further what a table cannot say: that a
//! message's sender and a heartbeat's node are the caller.

use std::sync::Arc;

use entente_proto::identity::{Identity, Role};
use tonic::Status;
use tonic::codegen::http;

use crate::net::Peer;

use Role::{Coordinator, Expert, Operator, Witness};

/// The calls, each with the roles that may make it.
pub const ALLOWED: &[(&str, &[Role])] = &[
    ("/entente.v1.Raft/Deliver", &[Coordinator, Witness]),
    ("/entente.v1.Membership/Register", &[Expert]),
    ("/entente.v1.Membership/Heartbeat", &[Expert]),
    ("/entente.v1.Membership/Watch", &[Coordinator, Witness, Expert, Operator]),
    ("/entente.v1.Membership/Propose", &[Coordinator, Witness, Operator]),
    // For those who have no certificate yet, on connections of their own; no member has a token.
    ("/entente.v1.Enrolment/Join", &[]),
    ("/entente.v1.Enrolment/Renew", &[Coordinator, Witness, Expert, Operator]),
    ("/entente.v1.Enrolment/Enlist", &[Coordinator, Witness]),
    ("/entente.v1.Admin/Status", &[Operator]),
    ("/entente.v1.Admin/ChangeGroup", &[Operator]),
    ("/entente.v1.Admin/TransferLeader", &[Operator]),
    ("/entente.v1.Admin/TakeSnapshot", &[Operator]),
    ("/entente.v1.Admin/Nodes", &[Operator]),
    ("/entente.v1.Admin/OkToStop", &[Operator]),
    ("/entente.v1.Admin/Drain", &[Operator]),
    ("/entente.v1.Admin/Plan", &[Operator]),
    ("/entente.v1.Admin/Rebalance", &[Operator]),
];

/// Whether a role may make the call of this path.
pub fn allowed(role: Role, path: &str) -> bool {
    let entry = ALLOWED.iter().find(|(call, _)| *call == path);
    entry.is_some_and(|(_, roles)| roles.contains(&role))
}

/// Who calls. Every connection has said it.
pub(super) fn caller<T>(request: &tonic::Request<T>) -> Result<Arc<Identity>, Status> {
    let peer = request.extensions().get::<Peer>();
    peer.map(|peer| peer.0.clone()).ok_or_else(|| Status::unauthenticated("nobody is known there"))
}

/// Refuses a caller for what it said, and leaves a trace of it.
pub(super) fn refuse(caller: &Identity, call: &str, reason: &str) -> Status {
    tracing::warn!(target: "audit", %caller, call, reason, "refused");
    Status::permission_denied(format!("{caller} may not: {reason}"))
}

/// Lets a call through to its handler, or not.
pub(super) fn admit<T>(request: &http::Request<T>) -> Result<(), Status> {
    let path = request.uri().path();
    let peer = request.extensions().get::<Peer>();
    let Peer(caller) = peer.ok_or_else(|| Status::unauthenticated("nobody is known there"))?;
    if !allowed(caller.role, path) {
        return Err(refuse(caller, path, "the call is not for its role"));
    }
    if path.starts_with("/entente.v1.Admin/") {
        tracing::info!(target: "audit", %caller, call = path, "operator");
    }
    Ok(())
}
