//! What the server says of itself: models, health, metrics.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use entente_membership::metrics::{certificates, refused_connections};
use serde_json::{Value, json};

use super::{Api, ApiError};
use crate::engine::Readiness;

/// `GET /v1/models`.
pub async fn models(State(api): State<Arc<Api>>) -> Json<Value> {
    Json(json!({
        "object": "list",
        "data": [{
            "id": api.model_name,
            "object": "model",
            "created": api.created_s,
            "owned_by": "entente",
            "max_model_len": api.context_len,
        }],
    }))
}

/// `GET /livez`, `GET /health`: the process answers.
pub async fn live() -> &'static str {
    "ok\n"
}

/// `GET /readyz`: 200 only while every expert has a live replica.
pub async fn ready(State(api): State<Arc<Api>>) -> Response {
    match &*api.engine.readiness().borrow() {
        Readiness::Ready => "ready\n".into_response(),
        Readiness::Waiting(missing) => {
            let status = StatusCode::SERVICE_UNAVAILABLE;
            ApiError::new(status, "service_unavailable", missing.clone(), None).into_response()
        }
    }
}

/// `GET /metrics`, Prometheus text format.
pub async fn metrics(State(api): State<Arc<Api>>) -> Response {
    let kind = "text/plain; version=0.0.4; charset=utf-8";
    let mut text = api.metrics.render();
    api.credentials.iter().for_each(|own| certificates(&mut text, own));
    refused_connections(&mut text, &api.refused_connections);
    ([(header::CONTENT_TYPE, kind)], text).into_response()
}

/// `GET /version`.
pub async fn version() -> Json<Value> {
    Json(json!({ "version": env!("CARGO_PKG_VERSION") }))
}
