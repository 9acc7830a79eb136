//! Who asks, and whether it may: the one door that every request for tokens goes through before its
//! prompt is looked at.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::HeaderMap;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use entente_membership::tenant::Scope;
use entente_proto::frame::REGIONS_MAX;
use entente_proto::ids::RegionSet;
use futures::StreamExt;

use super::receipts;
use super::request::Common;
use super::{Api, ApiError, BODY_LEN_MAX, Caller};
use crate::engine::origin::Origin;
use crate::residency::{self, Decision};

/// The header by which a request says where it may be served.
pub const RESIDENCY_HEADER: &str = "x-entente-residency";

/// Finds out who asks before a byte of the body is kept; handlers get the [`Caller`] as an extension.
/// Every answer tells how much of the tenant's quota is left.
pub(super) async fn authenticate(
    State(api): State<Arc<Api>>,
    mut request: Request,
    next: Next,
) -> Response {
    match api.access.authenticate(request.headers()) {
        Ok(caller) => {
            let quota = caller.quota.clone();
            request.extensions_mut().insert(caller);
            let mut response = next.run(request).await;
            response.headers_mut().extend(quota.headers());
            response
        }
        Err(error) => {
            discard(request.into_body()).await;
            receipts::of_stranger(&api, error.into_response())
        }
    }
}

/// Reads a body to its end, or as far as any body may go: a connection that is closed in the middle
/// of what the client sends takes the answer with it.
async fn discard(body: Body) {
    let mut left = BODY_LEN_MAX;
    let mut pieces = body.into_data_stream();
    while let Some(Ok(piece)) = pieces.next().await {
        left = left.saturating_sub(piece.len());
        if left == 0 {
            return;
        }
    }
}

impl Api {
    /// Decides whose a request is and where its rows may go, or refuses it. Whether experts are
    /// there is not asked: a request waits for those that it needs.
    pub(super) fn admit(
        &self,
        caller: &Caller,
        headers: &HeaderMap,
        common: &Common,
    ) -> Result<Arc<Origin>, ApiError> {
        caller.may(Scope::Inference)?;
        self.check_model(common)?;
        let narrowing = narrowing(headers, common)?;
        let allowed = self.permit(&caller.policy.allowed, narrowing.as_ref())?;
        Ok(Arc::new(caller.origin(allowed)))
    }

    /// Refuses a request for another model than the one that is served.
    fn check_model(&self, common: &Common) -> Result<(), ApiError> {
        match common.model.as_ref().filter(|model| **model != self.model_name) {
            Some(model) => Err(ApiError::unknown_model(model)),
            None => Ok(()),
        }
    }

    /// Where a request of somebody bound by `policy` may go, if it may be served here.
    fn permit(
        &self,
        policy: &RegionSet,
        narrowing: Option<&RegionSet>,
    ) -> Result<RegionSet, ApiError> {
        match residency::decide(policy, narrowing, self.home, &self.endpoints) {
            Decision::Allowed(allowed) => Ok(allowed),
            Decision::Unsatisfiable { reason } => Err(ApiError::residency(reason)),
            Decision::WrongEntry { region, url } => Err(ApiError::wrong_entry(region, &url)),
        }
    }
}

/// The regions to which a request narrows its tenant's policy. Where both body and header do, both
/// hold.
fn narrowing(headers: &HeaderMap, common: &Common) -> Result<Option<RegionSet>, ApiError> {
    let in_body: Option<RegionSet> =
        common.residency.as_ref().map(|list| list.0.iter().copied().collect());
    Ok(residency::both(in_body, in_header(headers)?))
}

/// A list with commas; a header that comes several times is one list.
fn in_header(headers: &HeaderMap) -> Result<Option<RegionSet>, ApiError> {
    let refused = |reason: String| ApiError::invalid(RESIDENCY_HEADER, reason);
    let mut regions: Option<RegionSet> = None;
    for value in headers.get_all(RESIDENCY_HEADER) {
        let text = value.to_str().map_err(|_| refused("the header is not ASCII".to_owned()))?;
        let listed = residency::parse(text).map_err(|error| refused(error.to_string()))?;
        regions.get_or_insert_default().extend(listed);
    }
    match regions.as_ref().map_or(0, RegionSet::len) {
        0..=REGIONS_MAX => Ok(regions),
        count => Err(refused(format!("{count} regions, at most {REGIONS_MAX}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    /// What a body and headers narrow to, or the field that is at fault.
    fn narrowed(body: Value, headers: &[&str]) -> Result<Option<Vec<String>>, String> {
        let mut map = HeaderMap::new();
        for value in headers {
            map.append(RESIDENCY_HEADER, value.parse().unwrap());
        }
        let param = |error: ApiError| {
            let body: Value = serde_json::from_str(&error.body()).unwrap();
            body["error"]["param"].as_str().unwrap_or_default().to_owned()
        };
        let common = super::super::body::read(body.to_string().as_bytes()).map_err(param)?;
        let regions = narrowing(&map, &common).map_err(param)?;
        Ok(regions.map(|regions| regions.iter().map(ToString::to_string).collect()))
    }

    #[test]
    fn body_and_header_both_narrow_a_request() {
        let to = |codes: &[&str]| Ok(Some(codes.iter().map(ToString::to_string).collect()));
        assert_eq!(narrowed(json!({}), &[]), Ok(None));
        assert_eq!(narrowed(json!({ "residency": null }), &[]), Ok(None));
        assert_eq!(narrowed(json!({ "residency": ["se", "fr"] }), &[]), to(&["fr", "se"]));
        assert_eq!(narrowed(json!({ "residency": [] }), &[]), to(&[]));
        assert_eq!(narrowed(json!({}), &["fr, se"]), to(&["fr", "se"]));
        assert_eq!(narrowed(json!({}), &["fr", "se"]), to(&["fr", "se"]), "one list in two lines");
        assert_eq!(narrowed(json!({ "residency": ["fr", "de"] }), &["fr,se"]), to(&["fr"]));
    }

    #[test]
    fn a_region_that_is_none_is_refused_by_the_name_of_its_field() {
        let many: Vec<String> = (0..=REGIONS_MAX).map(|_| "fr".to_owned()).collect();
        for bad in [json!(["FR"]), json!("fr"), json!([1]), json!(many)] {
            let refused = narrowed(json!({ "residency": bad }), &[]);
            assert_eq!(refused, Err("residency".to_owned()), "{bad}");
        }
        for bad in ["FR", "fr;se", "", "fr,", "\u{e9}"] {
            assert_eq!(narrowed(json!({}), &[bad]), Err(RESIDENCY_HEADER.to_owned()), "{bad:?}");
        }
    }
}
