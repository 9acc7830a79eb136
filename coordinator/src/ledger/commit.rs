//! Has the cluster agree on what the ledger holds: each new checkpoint is proposed with the proof
//! that it goes on from the one that is committed.
//!
//! Nothing of a request waits for it. Without a quorum checkpoints stay this process's own word, and
//! the first one after that covers them all.

use std::sync::Arc;
use std::time::Duration;

use entente_audit::checkpoint::Checkpoint;
use entente_audit::note::Verifier;
use entente_membership::checkpoint::Committed;
use entente_membership::client::ClientError;
use entente_membership::service::Membership;
use entente_membership::state::{Command, Expect, RecordKind, RefusedCode};
use entente_proto::ids::NodeName;
use tokio::time::timeout;

use super::Ledger;
use crate::metrics::Metrics;

/// How long a proposal may take, and how long one that came to nothing waits for the next.
const ATTEMPT_MAX: Duration = Duration::from_secs(5);

/// Runs for as long as the ledger does.
pub(crate) async fn run(
    ledger: Ledger,
    membership: Membership,
    coordinator: NodeName,
    metrics: Arc<Metrics>,
) {
    let Ok(key) = ledger.key().parse::<Verifier>() else { return };
    let mut checkpoints = ledger.checkpoint();
    let mut done = false;
    loop {
        // One that could not be committed is tried again; one that was waits for the next.
        match timeout(ATTEMPT_MAX, checkpoints.changed()).await {
            Ok(Err(_)) => return,
            Err(_) if done => continue,
            Ok(Ok(())) | Err(_) => {}
        }
        let Some(latest) = checkpoints.borrow_and_update().clone() else { continue };
        let proposed = propose(&ledger, &membership, (&coordinator, &key), &latest).await;
        done = proposed.is_ok();
        match proposed {
            Ok(()) => {
                metrics.cluster.audit_committed.set(latest.tree.size.try_into().unwrap_or(i64::MAX))
            }
            Err(ClientError::Refused(refused)) if refused.code == RefusedCode::NotAContinuation => {
                metrics.cluster.audit_alarms.inc();
                tracing::error!(target: "audit", %refused, "the audit log contradicts the cluster");
            }
            Err(error) => tracing::debug!(%error, "a checkpoint is not committed yet"),
        }
    }
}

async fn propose(
    ledger: &Ledger,
    membership: &Membership,
    (coordinator, key): (&NodeName, &Verifier),
    latest: &Checkpoint,
) -> Result<(), ClientError> {
    let record_key = Committed::record_key(coordinator, key);
    let before = Committed::of(&membership.state().borrow(), &record_key).transpose()?;
    let (old, revision) = before.map_or((0, 0), |(old, at)| (old.checkpoint.tree.size, at));
    if old == latest.tree.size {
        return Ok(());
    }
    // A log that has become shorter has no such proof; the voters say so.
    let path = match ledger.consistency(old, latest.tree.size).await {
        None if old < latest.tree.size => {
            return Err(ClientError::Deadline("the ledger is busy".to_owned()));
        }
        path => path.unwrap_or_default(),
    };
    let committed = Committed { key: key.clone(), checkpoint: latest.clone(), path };
    let (kind, value) = (RecordKind::Checkpoint, committed.encode());
    let command = Command::PutRecord { kind, key: record_key, value, revision: Some(revision) };
    membership.propose(ATTEMPT_MAX, Expect::default(), command).await.map(drop)
}
