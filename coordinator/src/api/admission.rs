//! Who asks, and whether it may: the one door that every request for tokens goes through before its
//! prompt is looked at.

use std::sync::Arc;

use super::request::Common;
use super::{Api, ApiError};
use crate::engine::origin::Origin;
use axum::http::HeaderMap;

impl Api {
    /// Decides whose a request is and where its rows may go, or refuses it. Whether experts are
    /// there is not asked: a request waits for those that it needs.
    pub(super) fn admit(
        &self,
        _headers: &HeaderMap,
        common: &Common,
    ) -> Result<Arc<Origin>, ApiError> {
        if let Some(model) = common.model.as_ref().filter(|model| **model != self.model_name) {
            return Err(ApiError::unknown_model(model));
        }
        Ok(Arc::new(Origin::anonymous(self.home)))
    }
}
