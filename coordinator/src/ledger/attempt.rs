//! One request from the moment on at which it was taken up until it was answered: it tells the
//! ledger what became of it when it is dropped, and so cannot forget to, whichever way a handler ends.

use std::sync::{Arc, Mutex, PoisonError};

use crossbeam_channel::Sender;
use entente_audit::record::{Policy, Refused};
use entente_proto::ids::{RequestId, TenantName};
use sha2::{Digest as _, Sha256};
use tokio::sync::OwnedSemaphorePermit;

use super::Message;
use super::requests::{Facts, Opened};
use crate::engine::origin::Origin;

/// The status of a request whose client left before there was an answer: nginx's.
const CLIENT_GONE: u16 = 499;

/// A request that the API works on. Shared by what handles it.
#[derive(Clone)]
pub struct Attempt(Arc<Inner>);

struct Inner {
    inbox: Sender<Message>,
    facts: Arc<Facts>,
    begun_ms: u64,
    /// The request's id as long as it has no origin.
    id: RequestId,
    stage: Mutex<Stage>,
    /// Passes to the owner with what it is told, and comes back here if the owner is gone.
    ticket: Option<OwnedSemaphorePermit>,
}

#[derive(Default)]
struct Stage {
    tenant: Option<TenantName>,
    /// SHA-256 of the body, once it was read.
    body: Option<[u8; 32]>,
    admitted: Option<(Arc<Origin>, Option<Policy>)>,
    generations: usize,
    /// The status and the code of an answer that refuses.
    refused: Option<(u16, &'static str)>,
}

impl Attempt {
    pub(super) fn new(
        inbox: Sender<Message>,
        facts: Arc<Facts>,
        begun_ms: u64,
        ticket: OwnedSemaphorePermit,
    ) -> Self {
        let id = RequestId(uuid::Uuid::new_v4().as_u128());
        let (stage, ticket) = (Mutex::default(), Some(ticket));
        Self(Arc::new(Inner { inbox, facts, begun_ms, id, stage, ticket }))
    }

    fn stage<T>(&self, change: impl FnOnce(&mut Stage) -> T) -> T {
        change(&mut self.0.stage.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whose it is, as soon as that is known.
    pub fn of(&self, tenant: &TenantName) {
        self.stage(|stage| stage.tenant = Some(tenant.clone()));
    }

    /// What was asked for. Only its hash is kept.
    pub fn body(&self, body: &[u8]) {
        let hash: [u8; 32] = Sha256::digest(body).into();
        self.stage(|stage| stage.body = Some(hash));
    }

    /// It may be worked on, under this policy.
    pub fn admitted(&self, origin: &Arc<Origin>, policy: Option<Policy>) {
        self.of(&origin.tenant);
        self.stage(|stage| stage.admitted = Some((origin.clone(), policy)));
    }

    /// The engine has taken one generation of it, and will close it.
    pub fn submitted(&self) {
        self.stage(|stage| stage.generations += 1);
    }

    /// It was refused, with this status and code.
    pub fn refused(&self, status: u16, code: &'static str) {
        self.stage(|stage| stage.refused = Some((status, code)));
    }

    /// What its receipt is called.
    pub fn id(&self) -> RequestId {
        let admitted = self.stage(|stage| stage.admitted.as_ref().map(|(origin, _)| origin.id));
        admitted.unwrap_or(self.0.id)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let stage = self.stage.get_mut().unwrap_or_else(PoisonError::into_inner);
        let Stage { tenant, body, admitted, generations, refused } = std::mem::take(stage);
        let id = admitted.as_ref().map_or(self.id, |(origin, _)| origin.id);
        let message = match admitted {
            Some((origin, policy)) if generations > 0 => {
                let (begun_ms, facts) = (self.begun_ms, self.facts.clone());
                // Nobody is admitted whose body was not read.
                let body = body.unwrap_or_default();
                let opened = Opened { origin, policy, body, begun_ms, generations, facts };
                Message::Opened(Box::new(opened))
            }
            _ => {
                let (status, code) = refused.unwrap_or((CLIENT_GONE, "client_gone"));
                let (status, code) = (status.into(), code.to_owned());
                let at_ms = super::now_ms();
                let refused = Refused { id, tenant, body: None, at_ms, status, code };
                Message::Refused { refused, body }
            }
        };
        // The queue has room for whoever has a ticket, so this fails only when the owner has ended.
        if self.inbox.try_send(message).is_err() {
            tracing::error!(request = %id, "there is no record of a request");
        } else if let Some(ticket) = self.ticket.take() {
            ticket.forget();
        }
    }
}
