//! Errors in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`.
//!
//! The text is for the client: it names the field and the cause, and nothing of the inside.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use entente_proto::ids::Region;
use serde::Serialize;

use super::Api;
use super::receipts::Refusal;
use crate::engine::EngineError;

/// An error that a client gets.
#[derive(Debug, Clone)]
pub struct ApiError {
    status: StatusCode,
    kind: &'static str,
    message: String,
    param: Option<String>,
    /// For programs; the HTTP status when absent.
    code: Option<&'static str>,
    headers: Vec<(HeaderName, HeaderValue)>,
}

#[derive(Serialize)]
struct Body<'a> {
    error: Inner<'a>,
}

#[derive(Serialize)]
struct Inner<'a> {
    message: &'a str,
    #[serde(rename = "type")]
    kind: &'static str,
    param: Option<&'a str>,
    code: Code,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Code {
    Name(&'static str),
    Status(u16),
}

impl ApiError {
    /// 400: `param` is wrong, and the message says how.
    pub fn invalid(param: &str, message: impl Into<String>) -> Self {
        let param = (!param.is_empty()).then(|| param.to_owned());
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", message.into(), param)
    }

    /// 404 with the words that clients know from vLLM.
    pub fn unknown_model(model: &str) -> Self {
        let shown: String = model.chars().take(128).collect();
        let message = format!("The model `{shown}` does not exist.");
        Self::new(StatusCode::NOT_FOUND, "NotFoundError", message, Some("model".into()))
    }

    /// 403: no region is left that may serve the request.
    pub fn residency(reason: String) -> Self {
        let error = Self::new(StatusCode::FORBIDDEN, "permission_error", reason, None);
        error.coded("residency_unsatisfiable")
    }

    /// 421: the request may be served in `region`, at `url`, and not here.
    pub fn wrong_entry(region: Region, url: &str) -> Self {
        let message = format!("the request may not be served here; it may be in {region}: {url}");
        let status = StatusCode::MISDIRECTED_REQUEST;
        let error = Self::new(status, "invalid_request_error", message, None);
        let error = error.coded("wrong_entry_region");
        // An address that is no header's value is still in the message.
        match HeaderValue::from_str(url) {
            Ok(url) => error.with_header(header::LOCATION, url),
            Err(_) => error,
        }
    }

    /// Any other status.
    pub fn new(
        status: StatusCode,
        kind: &'static str,
        message: String,
        param: Option<String>,
    ) -> Self {
        Self { status, kind, message, param, code: None, headers: Vec::new() }
    }

    /// The same with a code that programs can rely on.
    pub fn coded(self, code: &'static str) -> Self {
        Self { code: Some(code), ..self }
    }

    /// The same with a further header.
    pub fn with_header(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.headers.push((name, value));
        self
    }

    /// The body, which is also the last event of a stream that fails.
    pub fn body(&self) -> String {
        let error = Inner {
            message: &self.message,
            kind: self.kind,
            param: self.param.as_deref(),
            code: self.code.map_or(Code::Status(self.status.as_u16()), Code::Name),
        };
        serde_json::to_string(&Body { error }).unwrap_or_default()
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let json = HeaderValue::from_static("application/json");
        let mut response =
            (self.status, [(header::CONTENT_TYPE, json)], self.body()).into_response();
        if self.status == StatusCode::SERVICE_UNAVAILABLE {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response.extensions_mut().insert(Refusal(self.code.unwrap_or(self.kind)));
        response.headers_mut().extend(self.headers);
        response
    }
}

/// Counts an answer that refuses, by the word that says why.
pub(super) async fn count(State(api): State<Arc<Api>>, request: Request, next: Next) -> Response {
    let response = next.run(request).await;
    if response.status().is_client_error() || response.status().is_server_error() {
        api.metrics.refused_requests.with_label_values(&[Refusal::of(&response)]).inc();
    }
    response
}

impl From<EngineError> for ApiError {
    fn from(error: EngineError) -> Self {
        let message = error.to_string();
        match error {
            EngineError::TooLong(_) => Self::invalid("max_tokens", message),
            EngineError::NotPermitted(_) => Self::residency(message),
            EngineError::Unreadable(_) => Self::invalid("prompt", message),
            EngineError::TenantBusy(_) => super::quota::too_many(message),
            EngineError::Busy(_) => {
                Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_busy", message, None)
            }
            EngineError::Unavailable(_) | EngineError::Stopped | EngineError::Device(_) => {
                Self::new(StatusCode::SERVICE_UNAVAILABLE, "service_unavailable", message, None)
            }
        }
    }
}
