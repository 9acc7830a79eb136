//! Receipts: every answer says what its record is called, and whoever asked can have it.

use std::convert::Infallible;
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use axum::extract::{FromRequestParts, Path, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderName, HeaderValue, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use entente_audit::record::{Digest, Policy};
use entente_membership::tenant::Scope;
use entente_proto::ids::{RequestId, TenantName};
use serde_json::{Value, json};

use super::{Api, ApiError, Caller};
use crate::engine::origin::Origin;
use crate::ledger::{Attempt, Receipt};

/// The header that names a request's receipt.
pub const RECEIPT_HEADER: HeaderName = HeaderName::from_static("x-entente-receipt");

/// Why an answer refuses: the word that its record keeps. Beside the answer, not in it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Refusal(pub &'static str);

impl Refusal {
    /// The word of an answer that is no success.
    pub(super) fn of(response: &Response) -> &'static str {
        response.extensions().get::<Self>().map_or("http_error", |why| why.0)
    }
}

/// Takes up a request in the ledger, and names its receipt in the answer. The record is made when
/// the last that handles the request lets go of it, also when its client has left in between.
pub(super) async fn keep(
    State(api): State<Arc<Api>>,
    mut request: Request,
    next: Next,
) -> Response {
    let Some(books) = &api.books else { return next.run(request).await };
    let Some(attempt) = books.begin() else {
        let message = "no record of the request could be kept".to_owned();
        let status = StatusCode::SERVICE_UNAVAILABLE;
        return ApiError::new(status, "server_busy", message, None).into_response();
    };
    request.extensions_mut().insert(attempt.clone());
    let response = next.run(request).await;
    named(&attempt, response)
}

/// Takes note of a refusal of somebody without a valid key, as long as there are few: whoever has no
/// key must not be able to fill the disk. The others are counted in metrics only.
pub(super) fn of_stranger(api: &Api, refusal: Response) -> Response {
    let Some(books) = &api.books else { return refusal };
    let mut strangers = api.strangers.lock().unwrap_or_else(PoisonError::into_inner);
    let is_written = strangers.take(Instant::now()).is_some();
    drop(strangers);
    match is_written.then(|| books.begin()).flatten() {
        Some(attempt) => named(&attempt, refusal),
        None => refusal,
    }
}

/// The same answer with the name of its receipt; the attempt learns how it was answered.
fn named(attempt: &Attempt, mut response: Response) -> Response {
    if !response.status().is_success() {
        attempt.refused(response.status().as_u16(), Refusal::of(&response));
    }
    if let Ok(id) = HeaderValue::from_str(&attempt.id().to_string()) {
        response.headers_mut().insert(RECEIPT_HEADER, id);
    }
    response
}

/// What a handler tells the ledger of its request; nothing where there is no ledger.
pub struct Entry(Option<Attempt>);

impl<S: Sync> FromRequestParts<S> for Entry {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Infallible> {
        Ok(Self(parts.extensions.get::<Attempt>().cloned()))
    }
}

impl Entry {
    /// Whose it is.
    pub fn of(&self, tenant: &TenantName) {
        self.0.iter().for_each(|attempt| attempt.of(tenant));
    }

    /// What was asked for.
    pub fn body(&self, body: &[u8]) {
        self.0.iter().for_each(|attempt| attempt.body(body));
    }

    /// It may be worked on.
    pub fn admitted(&self, origin: &Arc<Origin>, policy: Option<Policy>) {
        self.0.iter().for_each(|attempt| attempt.admitted(origin, policy.clone()));
    }

    /// The engine has taken one generation of it.
    pub fn submitted(&self) {
        self.0.iter().for_each(Attempt::submitted);
    }
}

impl Caller {
    /// The policy that it is bound by, as a record has it.
    pub(super) fn policy(&self) -> Policy {
        let entente_membership::tenant::Policy { id, sha256, allowed } = &*self.policy;
        Policy { id: id.clone(), sha256: Digest(*sha256), allowed: allowed.clone() }
    }
}

/// `GET /v1/receipts/{id}`.
pub(super) async fn find(
    State(api): State<Arc<Api>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let none = || {
        let message = "there is no receipt of this name, or not yet".to_owned();
        let error = ApiError::new(StatusCode::NOT_FOUND, "NotFoundError", message, None);
        error.coded("receipt_not_found")
    };
    caller.may(Scope::Receipts)?;
    let id: RequestId = id.parse().map_err(|_| none())?;
    let books = api.books.as_ref().ok_or_else(none)?;
    let receipt = books.ledger().find(id, caller.tenant.clone()).await.ok_or_else(none)?;
    Ok(Json(shown(&receipt, books.ledger().key())))
}

fn shown(receipt: &Receipt, key: &str) -> Value {
    // The record is JSON by its own rules; it is shown as it is.
    let record: Value = serde_json::from_slice(&receipt.record).unwrap_or_default();
    json!({
        "object": "receipt",
        "record": record,
        "proof": receipt.proof,
        "key": key,
        "salt": Digest(receipt.salt).to_string(),
    })
}
