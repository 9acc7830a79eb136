//! The ledger: the log of what this coordinator did with each request, and receipts out of it.
//!
//! ```text
//!   api ── attempts ──┐ bounded
//!   engine ── ends ───┼──► owner: ONE thread, requests + log ──► folder (entente-audit)
//!   nodes' statements ┘                     │
//!                                           ├──► the latest checkpoint, for raft and witnesses
//!   witnesses' cosignatures ────────────────┘
//! ```
//!
//! Records are committed in groups: whatever has come while the disk was busy is written with one
//! sync. A token never waits for it, and a request is answered with its receipt's id before its
//! record can exist; a receipt is given out only once its record is on disk and under a checkpoint.
//!
//! Invariants:
//! - every request that the API took up leaves one record, however it ended ([`Attempt`] sees to it
//!   when it is dropped);
//! - the engine waits rather than that an end is lost; the API refuses rather than that a request is
//!   begun for which there would be no record;
//! - an error of the log ends the owner, after which nothing is served any more.
//!
//! What this module does not know: HTTP, how rows travel, who may read a receipt.

mod attempt;
mod books;
pub(crate) mod commit;
pub(crate) mod cosign;
pub mod keys;
pub mod notary;
mod owner;
pub mod requests;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crossbeam_channel::{Receiver, Sender};
use entente_audit::checkpoint::Checkpoint;
use entente_audit::cosign::CosignerKey;
use entente_audit::merkle::Hash;
use entente_audit::record::{Admin, Refused};
use entente_membership::audit::{Event, Sink};
use entente_proto::ids::{RequestId, TenantName};
use serde::{Deserialize, Serialize};
use tokio::sync::{Semaphore, oneshot, watch};

pub use attempt::Attempt;
pub use books::Books;
use requests::{Facts, OPEN_MAX, Opened};

use crate::engine::tally::Closed;
use crate::statements::Stated;

/// Ends of generations that may wait for the owner; then the engine waits.
const CLOSINGS_MAX: usize = 4_096;
/// Messages that may wait for the owner beside those that a ticket stands for, which have a queue of
/// their own: nobody who asks or is refused can take their place.
const MORE_MAX: usize = 1_024;

/// Where the audit log is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Its folder; this process's alone.
    pub dir: PathBuf,
}

/// Why the ledger cannot be kept.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// The log.
    #[error(transparent)]
    Log(#[from] entente_audit::Error),
    /// A file with a salt holds something else.
    #[error("{}: it is not a salt", path.display())]
    Salt {
        /// The file.
        path: PathBuf,
    },
    /// The system has no random numbers.
    #[error("no random numbers: {0}")]
    Random(String),
    /// A record cannot be written.
    #[error("a record cannot be written: {0}")]
    Record(String),
    /// The system refused a thread, or it died.
    #[error("the ledger's thread: {0}")]
    Thread(String),
}

/// A record that is on disk, and that it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Receipt {
    /// The record's bytes.
    pub record: Vec<u8>,
    /// The proof, as a file of c2sp.org/tlog-proof.
    pub proof: String,
    /// Under which its body was hashed; for its tenant only.
    pub salt: [u8; 32],
}

/// What becomes of a request that has a ticket.
enum Message {
    Opened(Box<Opened>),
    Refused { refused: Refused, body: Option<[u8; 32]> },
}

/// What else the owner is told and asked.
enum More {
    Certificate(Vec<u8>),
    Admin(Admin),
    Find { id: RequestId, tenant: TenantName, reply: oneshot::Sender<Option<Receipt>> },
    Consistency { old: u64, new: u64, reply: oneshot::Sender<Option<Vec<Hash>>> },
    Cosigned(Box<Cosigned>),
    Stop { reply: oneshot::Sender<()> },
}

/// What a witness has said of a checkpoint of this log.
struct Cosigned {
    checkpoint: Checkpoint,
    key: CosignerKey,
    line: String,
}

/// The way to the ledger. Cheap to clone.
#[derive(Clone)]
pub struct Ledger {
    inbox: Sender<Message>,
    more: Sender<More>,
    closings: Sender<Closed>,
    statements: Sender<Stated>,
    /// One for each request whose record is not made yet: with the queue's length this bounds
    /// everything that the owner has to remember.
    tickets: Arc<Semaphore>,
    checkpoint: watch::Receiver<Option<Arc<Checkpoint>>>,
    key: Arc<str>,
}

/// A ledger that has been started.
pub struct Started {
    /// The way to it.
    pub ledger: Ledger,
    /// Resolves when its owner has ended: after [`Ledger::stop`], or for an error.
    pub ended: oneshot::Receiver<Result<(), LedgerError>>,
}

/// Opens the log `origin` in the configured folder, or begins it, and starts its owner.
///
/// # Errors
/// What is wrong with the folder.
pub fn start(config: &Config, origin: &str) -> Result<Started, LedgerError> {
    let (inbox, messages) = crossbeam_channel::bounded(OPEN_MAX);
    let (more, others) = crossbeam_channel::bounded(MORE_MAX);
    let (statements, stated) = crossbeam_channel::bounded(MORE_MAX);
    let (closings, ends) = crossbeam_channel::bounded(CLOSINGS_MAX);
    let (tell, checkpoint) = watch::channel(None);
    let tickets = Arc::new(Semaphore::new(OPEN_MAX));
    let inputs = Inputs { messages, others, ends, stated, tickets: tickets.clone() };
    let (owner, key) = owner::Owner::open(config, origin, inputs, tell)?;
    let (done, ended) = oneshot::channel();
    std::thread::Builder::new()
        .name("ledger".into())
        .spawn(move || {
            let result = owner.run();
            if let Err(error) = &result {
                tracing::error!(%error, "the audit log cannot be written");
            }
            let _ = done.send(result);
        })
        .map_err(|error| LedgerError::Thread(error.to_string()))?;
    let ledger = Ledger { inbox, more, closings, statements, tickets, checkpoint, key: key.into() };
    Ok(Started { ledger, ended })
}

/// Where the owner's work comes from.
struct Inputs {
    messages: Receiver<Message>,
    others: Receiver<More>,
    ends: Receiver<Closed>,
    stated: Receiver<Stated>,
    tickets: Arc<Semaphore>,
}

impl Ledger {
    /// Where the engine says that a generation has ended.
    pub fn closings(&self) -> Sender<Closed> {
        self.closings.clone()
    }

    /// Where nodes' statements about what has ended go.
    pub fn statements(&self) -> Sender<Stated> {
        self.statements.clone()
    }

    /// The public key of its checkpoints, as C2SP writes it.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// The latest checkpoint.
    pub fn checkpoint(&self) -> watch::Receiver<Option<Arc<Checkpoint>>> {
        self.checkpoint.clone()
    }

    /// Takes up a request; none if too many have no record yet, or if none can be written.
    pub fn begin(&self, facts: Arc<Facts>) -> Option<Attempt> {
        let ticket = self.tickets.clone().try_acquire_owned().ok()?;
        Some(Attempt::new(self.inbox.clone(), facts, now_ms(), ticket))
    }

    /// Keeps a certificate that records name, unless it is in the log already. False: it had to be
    /// dropped, as more waits than may.
    pub fn certify(&self, der: Vec<u8>) -> bool {
        self.more.try_send(More::Certificate(der)).is_ok()
    }

    /// Where the control plane says whom it has refused and which operators' orders it has obeyed.
    /// It never waits: what does not fit is in the process's log only.
    pub fn sink(&self) -> Sink {
        let more = self.more.clone();
        Sink::to(move |event: Event| {
            let caller = event.caller.map_or("unknown".to_owned(), |caller| caller.to_string());
            let Event { call, allowed, reason, .. } = event;
            let admin = Admin { at_ms: now_ms(), caller, call, allowed, reason: Some(reason) };
            if more.try_send(More::Admin(admin)).is_err() {
                tracing::warn!("an event of the control plane is not in the audit log");
            }
        })
    }

    /// The receipt of a tenant's request, once there is one; none if it is not its, or too old to be
    /// known by id.
    pub async fn find(&self, id: RequestId, tenant: TenantName) -> Option<Receipt> {
        let (reply, answer) = oneshot::channel();
        self.more.try_send(More::Find { id, tenant, reply }).ok()?;
        answer.await.ok()?
    }

    /// That the tree of `old` records is the beginning of that of `new`.
    pub async fn consistency(&self, old: u64, new: u64) -> Option<Vec<Hash>> {
        let (reply, answer) = oneshot::channel();
        self.more.try_send(More::Consistency { old, new, reply }).ok()?;
        answer.await.ok()?
    }

    /// Shows a witness's cosignature of a checkpoint of this log, once it was found to be one. False:
    /// it had to be dropped, as more waits than may.
    pub fn cosigned(&self, checkpoint: Checkpoint, key: CosignerKey, line: String) -> bool {
        let cosigned = Box::new(Cosigned { checkpoint, key, line });
        self.more.try_send(More::Cosigned(cosigned)).is_ok()
    }

    /// Writes what is still open as it is, signs a last checkpoint, and ends the owner.
    pub async fn stop(&self, max: Duration) {
        let (reply, answer) = oneshot::channel();
        let more = self.more.clone();
        // The queue may be full; whoever empties it is not this thread.
        tokio::task::spawn_blocking(move || more.send_timeout(More::Stop { reply }, max));
        if tokio::time::timeout(max, answer).await.is_err() {
            tracing::warn!("the audit log was not closed in time");
        }
    }
}

/// Milliseconds since 1970.
pub(crate) fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
