//! Gives an expert's weights to a node of the same region that is to hold it and cannot load it.
//!
//! What is given is the memory that is multiplied with, copied back piece by piece if that is a
//! device's, or what the model folder has where the expert is not held. It is not compared with anything here: who receives it does that, and
//! believes nobody.
//!
//! Invariants: at most [`LENDS_MAX`] experts are sent at once and each at [`LEND_BYTES_PER_S`] at
//! most, so that frames have the network and the processor to themselves for most of the time; at
//! most [`LENDS_WAITING_MAX`] wait; a receiver that does not read is given up after [`LEND_WAIT_MAX`].

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use entente_model::kernels::{GatedFfn, PANELS_VERSION};
use entente_proto::ids::{ExpertId, LayerId};
use entente_proto::placement::ExpertKey;
use entente_proto::wire::{FetchPiece, FetchRequest};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use crate::limits::{
    LEND_BYTES_PER_S, LEND_PIECE_BYTES, LEND_WAIT_MAX, LENDS_MAX, LENDS_WAITING_MAX,
};
use crate::member::Purpose;
use crate::node::NodeHandle;
use crate::store::Expert;

pub(crate) type Pieces = ReceiverStream<Result<FetchPiece, Status>>;

/// Who gives.
pub(crate) struct Lender {
    node: NodeHandle,
    waiting: Arc<Semaphore>,
    sending: Arc<Semaphore>,
}

/// Weights that are given, wherever they lie.
enum Lent {
    Held(Arc<Expert>),
    Loaded(Box<GatedFfn>),
}

impl Lent {
    fn ffn(&self) -> &GatedFfn {
        match self {
            Self::Held(expert) => &expert.ffn,
            Self::Loaded(ffn) => ffn,
        }
    }
}

impl Lender {
    pub(crate) fn new(node: NodeHandle) -> Self {
        let semaphore = |permits| Arc::new(Semaphore::new(permits));
        Self { node, waiting: semaphore(LENDS_WAITING_MAX), sending: semaphore(LENDS_MAX) }
    }

    /// Gives what is asked for, piece by piece.
    ///
    /// # Errors
    /// It is of another model or in another form, or too many wait already.
    pub(crate) fn lend(&self, request: &FetchRequest) -> Result<Pieces, Status> {
        let key = self.check(request)?;
        let busy = |_| Status::resource_exhausted("too many wait for weights here");
        let place = self.waiting.clone().try_acquire_owned().map_err(busy)?;
        let (pieces, outgoing) = mpsc::channel(1);
        let (node, sending) = (self.node.clone(), self.sending.clone());
        tokio::spawn(async move {
            let _place: OwnedSemaphorePermit = place;
            // Whoever goes away while waiting costs nobody a turn. The semaphore is never closed.
            let turn = tokio::select! {
                turn = sending.acquire_owned() => turn,
                () = pieces.closed() => return,
            };
            let Ok(_turn) = turn else { return };
            match find(&node, key).await {
                Some(lent) => {
                    if send(&node, &lent, &pieces).await {
                        node.counters().count_lent();
                    }
                }
                None => {
                    // The receiver may have gone.
                    let _ = pieces.send(Err(Status::not_found("it is not here"))).await;
                }
            }
        });
        Ok(ReceiverStream::new(outgoing))
    }

    fn check(&self, request: &FetchRequest) -> Result<ExpertKey, Status> {
        let FetchRequest { model_digest, layer, expert, weights, panels_version } = request;
        let (digest, _) = self.node.model();
        if model_digest[..] != digest.0 {
            return Err(Status::failed_precondition("this node has another model"));
        }
        let form = self.node.format().name();
        if (weights.as_str(), *panels_version) != (form, PANELS_VERSION) {
            let text = format!("weights are kept as {form} {PANELS_VERSION} here");
            return Err(Status::failed_precondition(text));
        }
        let narrow = |number: u32| u16::try_from(number).ok();
        let key = narrow(*layer).zip(narrow(*expert)).map(|(l, e)| (LayerId(l), ExpertId(e)));
        key.ok_or_else(|| Status::not_found("there is no such expert"))
    }
}

/// In memory, or else in the model folder.
async fn find(node: &NodeHandle, key: ExpertKey) -> Option<Lent> {
    if let Some(expert) = node.expert(key) {
        return Some(Lent::Held(expert));
    }
    let loader = node.loader()?;
    let outcome = loader.load([key].into(), Purpose::Lending).await;
    let ffn = outcome.loaded.into_values().next()?;
    Some(Lent::Loaded(Box::new(ffn)))
}

/// Sends all of it, unless the receiver goes away or stops reading. Returns whether it did.
async fn send(
    lender: &NodeHandle,
    lent: &Lent,
    pieces: &mpsc::Sender<Result<FetchPiece, Status>>,
) -> bool {
    let mut next = Instant::now();
    for piece in lent.ffn().pieces(LEND_PIECE_BYTES) {
        let piece = match piece {
            Ok(piece) => Bytes::copy_from_slice(&piece),
            Err(error) => {
                lender.health().fail(error);
                // The receiver may have gone.
                let _ = pieces.send(Err(Status::unavailable("the device failed"))).await;
                return false;
            }
        };
        sleep_until(next).await;
        next = Instant::now() + Duration::from_secs_f64(piece.len() as f64 / LEND_BYTES_PER_S);
        let sent = timeout(LEND_WAIT_MAX, pieces.send(Ok(FetchPiece { bytes: piece }))).await;
        if !matches!(sent, Ok(Ok(()))) {
            return false;
        }
    }
    true
}
