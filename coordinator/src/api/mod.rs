//! The public HTTP API in OpenAI's shape. A thin shell: it checks and translates requests, hands
//! them to the engine, and writes what the engine says.
//!
//! Every limit on what a client may send is a constant of `request` or of this file, or a key of the
//! configuration; those of connections and heads are the listener's
//! ([`entente_membership::net::http`]). Answers that refuse are counted here, whoever gives them.
//!
//! What this module does not know: scheduling, nodes, weights.

mod access;
mod admission;
pub mod body;
mod chat;
mod choice;
mod completions;
mod error;
mod meta;
mod meter;
mod quota;
pub mod receipts;
pub mod request;
mod slow;
mod stream;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::http::StatusCode;
use axum::middleware;
use axum::routing::{get, post};
use entente_membership::allowance::Allowance;
use entente_membership::net::http::Refusals;
use entente_model::{ChatTemplate, GenerationConfig, Tokenizer, TokenizerError};
use entente_proto::ids::Region;
use entente_tls::Credentials;

pub use self::access::{Access, Caller};
pub use self::error::ApiError;
use crate::engine::EngineHandle;
use crate::ledger::Books;
use crate::metrics::Metrics;
use crate::residency::Endpoints;

/// Bytes of a request body at most.
const BODY_LEN_MAX: usize = 1 << 20;

/// What every handler works with.
pub struct Api {
    /// The way to the engine.
    pub engine: EngineHandle,
    /// Text to tokens and back.
    pub tokenizer: Arc<Tokenizer>,
    /// Conversations to prompts.
    pub template: ChatTemplate,
    /// The model's defaults.
    pub generation: GenerationConfig,
    /// Name of the model in the API.
    pub model_name: String,
    /// Prompt and answer together, at most.
    pub context_len: usize,
    /// Tokens that the model knows.
    pub vocab: usize,
    /// When this process started, in seconds since the epoch.
    pub created_s: u64,
    /// The country that this coordinator stands in.
    pub home: Region,
    /// Where the coordinators of all regions are asked, as far as it is known.
    pub endpoints: Endpoints,
    /// Who may come in.
    pub access: Access,
    /// Where records of requests are kept, if they are.
    pub books: Option<Books>,
    /// What is measured.
    pub metrics: Arc<Metrics>,
    /// What this process shows to others, if it has anything to show.
    pub credentials: Option<Credentials>,
    /// Connections that the listener has refused.
    pub refused_connections: Arc<Refusals>,
    /// Records of those whom nobody knows.
    pub strangers: Mutex<Allowance>,
    /// How long a body may take.
    pub body_wait_max: Duration,
}

/// The routes.
pub fn router(api: Arc<Api>) -> Router {
    let known = middleware::from_fn_with_state(api.clone(), admission::authenticate);
    let kept = middleware::from_fn_with_state(api.clone(), receipts::keep);
    let counted = middleware::from_fn_with_state(api.clone(), error::count);
    let unhurried = middleware::map_request_with_state(api.clone(), slow::bound);
    // Of each request of somebody for tokens a record is kept, also of one that it may not make.
    let work = Router::new()
        .route("/v1/completions", post(completions::create))
        .route("/v1/chat/completions", post(chat::create))
        .route_layer(kept);
    // For these routes one must be somebody; those below are for anybody.
    work.route("/v1/receipts/{id}", get(receipts::find))
        .route("/v1/models", get(meta::models))
        .route_layer(known)
        .route("/health", get(meta::live))
        .route("/livez", get(meta::live))
        .route("/readyz", get(meta::ready))
        .route("/metrics", get(meta::metrics))
        .route("/version", get(meta::version))
        .method_not_allowed_fallback(wrong_method)
        .fallback(unknown_path)
        .layer(DefaultBodyLimit::max(BODY_LEN_MAX))
        .layer(unhurried)
        .layer(counted)
        .with_state(api)
}

async fn unknown_path() -> ApiError {
    let message = "there is no such path".to_owned();
    ApiError::new(StatusCode::NOT_FOUND, "NotFoundError", message, None)
}

async fn wrong_method() -> ApiError {
    let message = "this path does not take this method".to_owned();
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "invalid_request_error", message, None)
}

/// Seconds since the epoch, for the `created` field.
pub(crate) fn now_s() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |since| since.as_secs())
}

/// A tokenizer that cannot write its own tokens is broken; the ids still reach the client.
fn unreadable(error: TokenizerError) -> String {
    tracing::error!(%error, "tokens have no text");
    String::new()
}

impl Api {
    /// Checks a prompt's length and ids; gives the tokens that may follow it.
    fn check_prompt(&self, prompt: &[u32]) -> Result<usize, ApiError> {
        if prompt.is_empty() {
            return Err(ApiError::invalid("prompt", "the prompt has no tokens"));
        }
        if let Some(id) = prompt.iter().find(|id| **id as usize >= self.vocab) {
            let message = format!("token id {id} is not below the vocabulary's {}", self.vocab);
            return Err(ApiError::invalid("prompt", message));
        }
        self.context_len.checked_sub(prompt.len()).ok_or_else(|| {
            let message = format!(
                "the prompt has {} tokens, the context holds {}",
                prompt.len(),
                self.context_len
            );
            ApiError::invalid("prompt", message)
        })
    }

    /// The text of tokens, control tokens left out.
    fn text(&self, ids: &[u32]) -> String {
        self.tokenizer.decode(ids, true).unwrap_or_else(unreadable)
    }

    /// The text under which one token is reported.
    fn token_text(&self, id: u32) -> String {
        self.tokenizer.token_text(id).unwrap_or_else(unreadable)
    }

    /// Checks that an answer of `max_tokens` fits behind a prompt.
    fn check_fit(&self, prompt_len: usize, max_tokens: usize) -> Result<(), ApiError> {
        if prompt_len.saturating_add(max_tokens) <= self.context_len {
            return Ok(());
        }
        let message = format!(
            "a prompt of {prompt_len} tokens and max_tokens {max_tokens} do not fit the context of {}",
            self.context_len
        );
        Err(ApiError::invalid("max_tokens", message))
    }
}
