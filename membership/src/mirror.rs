//! Shows the committed membership in an operator's etcd, for platform systems that watch it there.
//!
//! It never decides anything: nothing here is ever read back by the cluster but the mirror's own
//! key. Whoever leads the raft group writes, and each write is one transaction that compares the
//! epochs which stood there before, so that a leader that does not know yet that it was replaced
//! cannot overwrite what its successor has shown.
//!
//! ```text
//!   <prefix>/<cluster>/epochs             {"index":7,"membership":3,"placement":2}
//!   <prefix>/<cluster>/nodes/<name>       {"address":…,"incarnation":…,"state":"active",…}
//!   <prefix>/<cluster>/placement/<layer>  {"0":["fr-expert-1"],"1":["fr-expert-2"]}
//! ```
//!
//! Invariants:
//! - `epochs` never goes back, and is written in the same transaction as what it stands for;
//! - states are shown in the order in which they were committed, each one, as long as etcd keeps
//!   up; a mirror that is behind by more than its queue, or that takes over from another leader,
//!   shows several commits at once, under the epochs of the last.
//!
//! What it does not know: raft, who leads and why, files, what a watcher does with it.

mod keys;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use etcd_client::{
    Certificate, Client, Compare, CompareOp, ConnectOptions, GetOptions, Identity, TlsOptions, Txn,
    TxnOp,
};
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, watch};
use tokio::time::sleep;

use crate::state::State;
pub use keys::keys;
use keys::{Change, changes, index_in};

/// States that may wait for etcd.
pub const QUEUE_LEN_MAX: usize = 256;
/// Operations of one transaction; etcd takes 128 unless it is told otherwise.
const OPERATIONS_MAX: usize = 100;
/// How long etcd may take to answer.
const ANSWER_MAX: Duration = Duration::from_secs(5);
/// First and longest pause after a failure.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(10));

/// The section `[etcd]` of a voter's configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// `http://host:port` or `https://host:port`, one of which must answer.
    pub endpoints: Vec<String>,
    /// What all keys begin with.
    #[serde(default = "default_prefix")]
    pub prefix: String,
    /// PEM files for `https`: etcd's CA, and the certificate and key shown to it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<entente_tls::Files>,
}

fn default_prefix() -> String {
    "/entente".to_owned()
}

/// Why nothing could be shown.
#[derive(Debug, thiserror::Error)]
enum MirrorError {
    #[error("etcd: {0}")]
    Etcd(#[from] etcd_client::Error),
    #[error("{}: {source}", file.display())]
    File { file: std::path::PathBuf, source: std::io::Error },
    /// Another leader has shown something since; what it was must be read first.
    #[error("somebody else has written")]
    Overtaken,
}

/// Shows each state that comes while `leads` is true, until the sender of `states` is gone. What
/// goes wrong is logged and tried again; the cluster does not depend on it.
pub async fn run(
    config: Config,
    cluster: String,
    leads: watch::Receiver<bool>,
    mut states: mpsc::Receiver<Arc<State>>,
) {
    let root = format!("{}/{cluster}/", config.prefix.trim_end_matches('/'));
    let mut mirror = Mirror { config, root, shown: None };
    while let Some(state) = states.recv().await {
        if !*leads.borrow() {
            // Whoever leads writes; what stands there has to be read again when this one does.
            mirror.shown = None;
            continue;
        }
        mirror.show_until_done(&state, &leads).await;
    }
}

/// What the mirror knows of etcd.
struct Mirror {
    config: Config,
    root: String,
    shown: Option<Shown>,
}

struct Shown {
    client: Client,
    keys: BTreeMap<String, String>,
}

impl Mirror {
    async fn show_until_done(&mut self, state: &State, leads: &watch::Receiver<bool>) {
        let mut pause = PAUSES.0;
        let mut leads = leads.clone();
        while let Err(error) = self.show(state).await {
            self.shown = None;
            if !matches!(error, MirrorError::Overtaken) {
                tracing::warn!(%error, "the mirror is behind");
                tokio::select! {
                    () = sleep(pause) => pause = (pause * 2).min(PAUSES.1),
                    _ = leads.wait_for(|leads| !leads) => return,
                }
            }
            if !*leads.borrow() {
                return;
            }
        }
    }

    /// Brings etcd to `state`, unless what stands there is as new.
    async fn show(&mut self, state: &State) -> Result<(), MirrorError> {
        if self.shown.is_none() {
            self.shown = Some(self.read().await?);
        }
        let (epochs, wanted) = (format!("{}epochs", self.root), keys(&self.root, state));
        let Some(shown) = &mut self.shown else { return Ok(()) };
        let before = shown.keys.get(&epochs).cloned();
        if before.as_deref().and_then(index_in) >= Some(state.applied_index()) {
            return Ok(());
        }
        let mut left = changes(&shown.keys, &wanted);
        left.retain(|change| change.key() != epochs);
        // The epochs come with the last of the others: what stands beside them is complete.
        left.extend(wanted.get(&epochs).map(|now| Change::Put(epochs.clone(), now.clone())));
        for batch in left.chunks(OPERATIONS_MAX) {
            write(&mut shown.client, &epochs, before.as_deref(), batch).await?;
        }
        shown.keys = wanted;
        Ok(())
    }

    async fn read(&self) -> Result<Shown, MirrorError> {
        let mut client = Client::connect(&self.config.endpoints, Some(self.options()?)).await?;
        let prefix = GetOptions::new().with_prefix();
        let answer = client.get(self.root.as_str(), Some(prefix)).await?;
        let mut keys = BTreeMap::new();
        for pair in answer.kvs() {
            keys.insert(pair.key_str()?.to_owned(), pair.value_str()?.to_owned());
        }
        Ok(Shown { client, keys })
    }

    fn options(&self) -> Result<ConnectOptions, MirrorError> {
        let options =
            ConnectOptions::new().with_connect_timeout(ANSWER_MAX).with_timeout(ANSWER_MAX);
        let Some(files) = &self.config.tls else { return Ok(options) };
        let read = |file: &std::path::PathBuf| {
            std::fs::read(file).map_err(|source| MirrorError::File { file: file.clone(), source })
        };
        let own = Identity::from_pem(read(&files.certificate)?, read(&files.key)?);
        let ca = Certificate::from_pem(read(&files.ca)?);
        Ok(options.with_tls(TlsOptions::new().ca_certificate(ca).identity(own)))
    }
}

/// One transaction, if the epochs are still `before`.
async fn write(
    client: &mut Client,
    epochs: &str,
    before: Option<&str>,
    batch: &[Change],
) -> Result<(), MirrorError> {
    let unchanged = match before {
        Some(before) => Compare::value(epochs, CompareOp::Equal, before),
        None => Compare::create_revision(epochs, CompareOp::Equal, 0),
    };
    let operation = |change: &Change| match change {
        Change::Put(key, value) => TxnOp::put(key.as_str(), value.as_str(), None),
        Change::Delete(key) => TxnOp::delete(key.as_str(), None),
    };
    let operations: Vec<TxnOp> = batch.iter().map(operation).collect();
    let answer = client.txn(Txn::new().when([unchanged]).and_then(operations)).await?;
    if answer.succeeded() { Ok(()) } else { Err(MirrorError::Overtaken) }
}
