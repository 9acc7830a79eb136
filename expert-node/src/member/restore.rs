//! Gets an expert that cannot be loaded from a peer of the region that has it.
//!
//! Nobody is believed: what a peer sends is compared with the manifest before anything is multiplied
//! with it, and a peer that sends something else is passed over and named in the log.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use entente_membership::net::{Dialler, Via};
use entente_membership::state::State;
use entente_model::kernels::{Activation, GatedFfn, PANELS_VERSION};
use entente_model::packed::Manifest;
use entente_proto::identity::{Expected, Role};
use entente_proto::ids::{NodeName, Region};
use entente_proto::placement::ExpertKey;
use entente_proto::wire::exchange_client::ExchangeClient;
use entente_proto::wire::{FetchPiece, FetchRequest};
use entente_tls::Credentials;
use tokio::sync::watch;
use tokio::time::timeout;
use tonic::{Status, Streaming};

use super::message;
use crate::counters::Counters;

/// Longest wait for a committed state.
const STATE_MAX: Duration = Duration::from_secs(5);
/// Longest wait for a piece: a peer may have others to serve first.
const PIECE_MAX: Duration = Duration::from_secs(30);

/// A node that may have what is missing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Peer {
    pub(crate) name: NodeName,
    pub(crate) address: String,
}

/// What is needed to ask peers.
pub(crate) struct Restorer {
    pub(crate) name: NodeName,
    /// Where peers are found.
    pub(crate) states: watch::Receiver<Option<Arc<State>>>,
    pub(crate) credentials: Credentials,
    /// Where to dial, if not where the cluster says.
    pub(crate) via: Via,
    pub(crate) region: Region,
    pub(crate) manifest: Arc<Manifest>,
    pub(crate) activation: Activation,
    pub(crate) counters: Arc<Counters>,
}

/// Why a peer was of no use.
#[derive(Debug, thiserror::Error)]
enum Useless {
    #[error("{0}")]
    Unreachable(String),
    #[error("{}", .0.message())]
    Refused(#[from] Status),
    #[error("it sends nothing")]
    Silent,
    #[error("it sends other weights: {0}")]
    Lies(#[from] entente_model::ModelError),
}

impl Restorer {
    /// Asks one peer after the other.
    ///
    /// # Errors
    /// What each of them said.
    pub(crate) async fn restore(&self, key: ExpertKey) -> Result<GatedFfn, String> {
        let (layer, expert) = key;
        let mut reasons = Vec::new();
        for peer in &self.peers(key).await {
            let name = &peer.name;
            match self.fetch(key, peer).await {
                Ok(ffn) => {
                    tracing::info!(%layer, %expert, peer = %name, "restored from a peer");
                    self.counters.count_restored();
                    return Ok(ffn);
                }
                Err(useless) => {
                    if let Useless::Lies(reason) = &useless {
                        tracing::error!(target: "audit", peer = %name, %reason, "refused weights");
                        self.counters.count_refused();
                    }
                    reasons.push(format!("{name}: {useless}"));
                }
            }
        }
        Err(if reasons.is_empty() { "no peer has it".to_owned() } else { reasons.join("; ") })
    }

    /// Who may have it. A node that has just registered may not have heard of itself.
    async fn peers(&self, key: ExpertKey) -> Vec<Peer> {
        let peers = |state: &Option<Arc<State>>| {
            state.as_ref().and_then(|state| message::peers(state, &self.name, key))
        };
        let mut states = self.states.clone();
        let known = states.wait_for(|state| peers(state).is_some());
        let known = timeout(STATE_MAX, known).await;
        known.ok().and_then(Result::ok).and_then(|state| peers(&state)).unwrap_or_default()
    }

    async fn fetch(&self, key: ExpertKey, peer: &Peer) -> Result<GatedFfn, Useless> {
        let Some(mut arriving) = self.manifest.receive(self.activation, key) else {
            return Err(Status::not_found("the model has no such expert").into());
        };
        let mut pieces = self.ask(key, peer).await?;
        loop {
            let piece =
                timeout(PIECE_MAX, pieces.message()).await.map_err(|_| Useless::Silent)??;
            match piece {
                Some(FetchPiece { bytes }) => arriving.push(&bytes)?,
                None => return Ok(arriving.finish()?),
            }
        }
    }

    /// Only the process that membership names there, in our own region, is asked.
    async fn ask(&self, key: ExpertKey, peer: &Peer) -> Result<Streaming<FetchPiece>, Useless> {
        let cluster = self.credentials.identity().cluster.clone();
        let member = Some((self.region, peer.name.clone()));
        let expected = Expected { cluster, roles: vec![Role::Expert], member };
        let unreachable = |error: &dyn std::fmt::Display| Useless::Unreachable(error.to_string());
        let dialler =
            Dialler::expecting(&self.credentials, expected).map_err(|e| unreachable(&e))?;
        let dialler = dialler.through(self.via.clone());
        let channel = dialler.dial(&peer.address).await.map_err(|e| unreachable(&e))?;
        let request = FetchRequest {
            model_digest: Bytes::copy_from_slice(&self.manifest.model_digest().0),
            layer: key.0.0.into(),
            expert: key.1.0.into(),
            weights: self.manifest.format().name().to_owned(),
            panels_version: PANELS_VERSION,
        };
        let mut client = ExchangeClient::new(channel);
        let asked = timeout(PIECE_MAX, client.fetch(request)).await.map_err(|_| Useless::Silent)?;
        Ok(asked?.into_inner())
    }
}
