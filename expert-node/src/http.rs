//! What an expert node tells its operator over HTTP: whether it lives, whether it takes traffic,
//! and its counters in the Prometheus text format.
//!
//! It answers from the moment that the process starts, so that a long load is not taken for a
//! process that hangs. It says nothing of requests, tenants or single experts, and takes no orders.

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use entente_membership::metrics::{certificates, family, refused_connections};
use entente_membership::net::http::{self, Bounds, Refusals};
use entente_tls::Credentials;
use hyper::body::Incoming;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tower::ServiceExt;

use crate::counters::Counts;
use crate::node::NodeHandle;

/// How far the node is.
#[derive(Clone, Default)]
pub(crate) enum Stage {
    /// Its model is being opened.
    #[default]
    Opening,
    /// It is there and does not take traffic yet.
    Loading(NodeHandle),
    /// It takes traffic.
    Ready(NodeHandle),
}

impl Stage {
    fn node(&self) -> Option<&NodeHandle> {
        match self {
            Self::Opening => None,
            Self::Loading(node) | Self::Ready(node) => Some(node),
        }
    }
}

/// What is told from.
struct Told {
    stages: watch::Receiver<Stage>,
    credentials: Option<Credentials>,
    refusals: Arc<Refusals>,
}

/// Answers on `listener` for as long as it is polled.
pub(crate) async fn serve(
    listener: TcpListener,
    stages: watch::Receiver<Stage>,
    credentials: Option<Credentials>,
) {
    let refusals = Arc::new(Refusals::default());
    let told = Told { stages, credentials, refusals: refusals.clone() };
    let router = Router::new()
        .route("/livez", get(async || "ok\n"))
        .route("/health", get(async || "ok\n"))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics))
        .with_state(Arc::new(told));
    http::serve(
        listener,
        router.map_request(|request: Request<Incoming>| request.map(Body::new)),
        Bounds::default(),
        refusals,
        std::future::pending(),
    )
    .await;
}

async fn ready(State(told): State<Arc<Told>>) -> Response {
    let not = |why| (StatusCode::SERVICE_UNAVAILABLE, why).into_response();
    match &*told.stages.borrow() {
        Stage::Opening => not("the model is being opened\n"),
        Stage::Loading(_) => not("experts are being loaded\n"),
        Stage::Ready(node) if node.is_draining() => not("the node is leaving\n"),
        Stage::Ready(_) => "ready\n".into_response(),
    }
}

async fn metrics(State(told): State<Arc<Told>>) -> Response {
    let kind = "text/plain; version=0.0.4; charset=utf-8";
    let mut text = told.stages.borrow().node().map(text).unwrap_or_default();
    told.credentials.iter().for_each(|own| certificates(&mut text, own));
    refused_connections(&mut text, &told.refusals);
    ([(header::CONTENT_TYPE, kind)], text).into_response()
}

/// The node's counters.
fn text(node: &NodeHandle) -> String {
    let (info, account, mut text) = (node.info(), node.account(), String::new());
    let mut metric = |name: &str, kind: &str, help: &str, samples: &[(String, u64)]| {
        family(&mut text, name, kind, help, samples);
    };
    let plain = |value| [(String::new(), value)];
    metric(
        "expert_rows_total",
        "counter",
        "(row, expert) pairs computed, by the region of the node.",
        &[(format!("{{region=\"{}\"}}", info.region), account.rows())],
    );
    let refused = account.refusals().into_iter();
    let refused = refused.map(|(reason, frames)| (format!("{{reason=\"{reason}\"}}"), frames));
    metric(
        "refused_frames_total",
        "counter",
        "Frames that were not computed.",
        &refused.collect::<Vec<_>>(),
    );
    metric(
        "forgotten_requests_total",
        "counter",
        "Requests whose rows can be stated no more, for want of room.",
        &plain(account.forgotten()),
    );
    let Counts { scrubbed, spoilt, restored, refused, lent } = node.counters().read();
    let of_weights = [
        ("scrubbed_experts_total", "Experts in memory compared with their SHA-256.", scrubbed),
        ("spoilt_experts_total", "Those of them that had changed and were taken out.", spoilt),
        ("restored_experts_total", "Experts got from a peer of the region.", restored),
        ("refused_weights_total", "Experts sent by a peer that were other weights.", refused),
        ("lent_experts_total", "Experts given to a peer of the region.", lent),
    ];
    for (name, help, value) in of_weights {
        metric(name, "counter", help, &plain(value));
    }
    let [connections, rows_bytes] = node.nccl_use().read();
    metric(
        "nccl_connections",
        "gauge",
        "Connections whose rows travel by NCCL.",
        &plain(connections),
    );
    metric(
        "nccl_rows_bytes_total",
        "counter",
        "Bytes of rows and of answers that travelled by NCCL.",
        &plain(rows_bytes),
    );
    metric("experts_held", "gauge", "Experts in memory.", &plain(info.experts.len() as u64));
    metric("weights_bytes", "gauge", "Bytes of weights in memory.", &plain(info.weights_bytes));
    text
}
