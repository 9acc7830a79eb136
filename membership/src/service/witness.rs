//! Cosigns checkpoints of coordinators' audit logs, where this process is a witness.
//!
//! A coordinator asks with the proof that the checkpoint goes on from the one cosigned before. It is
//! answered once the checkpoint is committed here too, so that no cosignature is of what the voters
//! would refuse. What was cosigned is this process's own memory ([`entente_audit::witness`]) and not
//! the cluster's: a leader that commits what it likes cannot make it forget.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use entente_audit::checkpoint;
use entente_audit::merkle::Tree;
use entente_audit::witness::{self, Answer};
use entente_proto::wire;
use entente_proto::wire::cosign_reply::Answer as Said;
use entente_proto::wire::witness_server;
use tokio::sync::Mutex;
use tokio::time::timeout;
use tonic::{Request, Response, Status, async_trait};

use super::shared::Shared;
use crate::checkpoint::Committed;
use crate::guard::caller;
use crate::state::State;

const CALL: &str = "/entente.v1.Witness/Cosign";
/// How long the commit of a checkpoint may take to get here before who asks has to ask again.
const COMMIT_MAX: Duration = Duration::from_secs(2);

/// The key and the memory of this process, and how often they were against it.
pub(super) struct Cosigner {
    /// Whoever waits for it is served in turn, so that a log's sizes come in order.
    witness: Arc<Mutex<witness::Witness>>,
    key: String,
    refused: AtomicU64,
}

impl Cosigner {
    pub(super) fn new(witness: witness::Witness) -> Self {
        let key = witness.verifier().to_string();
        Self { witness: Arc::new(Mutex::new(witness)), key, refused: AtomicU64::new(0) }
    }

    /// Checkpoints that contradicted others since the start.
    pub(super) fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    async fn cosign(&self, asked: Committed, old: u64) -> Result<Answer, Status> {
        let mut witness = self.witness.clone().lock_owned().await;
        // It syncs to disk, which blocks.
        let cosign = move || witness.cosign(&asked.checkpoint, old, &asked.path, now_s());
        let done = tokio::task::spawn_blocking(cosign).await;
        let done = done.map_err(|error| Status::internal(error.to_string()))?;
        done.map_err(|error| {
            tracing::error!(%error, "nothing can be cosigned");
            Status::internal("what was cosigned cannot be kept")
        })
    }
}

/// The service.
pub(super) struct Witness(pub(super) Shared);

#[async_trait]
impl witness_server::Witness for Witness {
    async fn cosign(
        &self,
        request: Request<wire::CosignRequest>,
    ) -> Result<Response<wire::CosignReply>, Status> {
        let caller = caller(&request)?;
        let Some(cosigner) = &self.0.cosigner else {
            return Err(Status::failed_precondition("this process cosigns nothing"));
        };
        let wire::CosignRequest { checkpoint: asked, old_size } = request.into_inner();
        let asked = Committed::read(&asked.unwrap_or_default())
            .map_err(|error| Status::invalid_argument(error.to_string()))?;
        if asked.checkpoint.origin != checkpoint::origin(&caller.cluster, &caller.node) {
            return Err(self.0.guard.refuse(&caller, CALL, "it is the log of somebody else"));
        }
        let record_key = Committed::record_key(&caller.node, &asked.key);
        let agreed = self.agreed(&record_key, asked.checkpoint.tree.size).await?;
        let answer = if agreed == asked.checkpoint.tree {
            cosigner.cosign(asked, old_size).await?
        } else {
            Answer::Refused("the cluster has agreed on another root of this size".to_owned())
        };
        if let Answer::Refused(reason) = &answer {
            cosigner.refused.fetch_add(1, Ordering::Relaxed);
            self.0.guard.note_refused(&caller, CALL, reason);
        }
        let said = match answer {
            Answer::Cosigned(line) => Said::Cosignature(line),
            Answer::From(size) => Said::Size(size),
            Answer::Refused(reason) => Said::Refused(reason),
        };
        Ok(Response::new(wire::CosignReply { key: cosigner.key.clone(), answer: Some(said) }))
    }
}

impl Witness {
    /// The tree of `size` records that the voters have agreed on for this log.
    async fn agreed(&self, record_key: &str, size: u64) -> Result<Tree, Status> {
        let tree = |state: &Arc<State>| {
            let committed = Committed::of(state, record_key)?.ok()?;
            Some(committed.0.checkpoint.tree)
        };
        let mut states = self.0.state.clone();
        let there = states.wait_for(|state| tree(state).is_some_and(|tree| tree.size >= size));
        let state = match timeout(COMMIT_MAX, there).await {
            Ok(Ok(state)) => state.clone(),
            _ => return Err(Status::unavailable("the checkpoint is not committed here yet")),
        };
        let later = || Status::aborted("a later checkpoint is committed");
        tree(&state).filter(|tree| tree.size == size).ok_or_else(later)
    }
}

/// Seconds since 1970.
fn now_s() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    since.as_secs()
}
