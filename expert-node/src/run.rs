//! A whole expert-node process but for its command line: bind, load, serve, drain.

use std::future::Future;
use std::net::{SocketAddr, TcpListener};

use entente_model::Progress;

use crate::{Config, Error, ExpertNode, serve};

/// What a node can say once it is about to take frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ready {
    /// Where it listens.
    pub address: SocketAddr,
    /// Experts that it holds.
    pub experts: usize,
    /// Bytes of weights that it keeps in memory.
    pub weights_bytes: u64,
}

/// Runs a node from start to end.
///
/// Binds `listen` unless a listener is given, loads while telling `progress` (experts done, experts
/// in all), calls `on_ready`, and serves until `shutdown` resolves.
pub async fn run(
    config: Config,
    listener: Option<TcpListener>,
    progress: impl Fn(u64, u64) + Send + 'static,
    on_ready: impl FnOnce(Ready),
    shutdown: impl Future<Output = ()>,
) -> Result<(), Error> {
    let unusable = |source| Error::Listen { address: config.listen.clone(), source };
    let listener = match listener {
        Some(listener) => listener,
        None => TcpListener::bind(&config.listen).map_err(unusable)?,
    };
    listener.set_nonblocking(true).map_err(unusable)?;
    let listener = tokio::net::TcpListener::from_std(listener).map_err(unusable)?;
    let address = listener.local_addr().map_err(unusable)?;
    let credentials = config.credentials()?;
    if credentials.is_none() && !address.ip().is_loopback() {
        return Err(Error::PlainText(address));
    }

    let model = config.model.clone();
    let loading = tokio::task::spawn_blocking(move || ExpertNode::load(&config, &Told(progress)));
    let mut shutdown = std::pin::pin!(shutdown);
    let node = tokio::select! {
        loaded = loading => loaded
            .map_err(|error| Error::Loading { model, reason: error.to_string() })??,
        // Loading ends with the process; there is nothing to drain yet.
        () = &mut shutdown => return Ok(()),
    };
    let info = node.info();
    let (experts, weights_bytes) = (info.experts.len(), info.weights_bytes);
    on_ready(Ready { address, experts, weights_bytes });
    serve(node, listener, credentials.as_ref(), shutdown).await
}

/// A function that wants to know how far loading is.
struct Told<F>(F);

impl<F: Fn(u64, u64)> Progress for Told<F> {
    fn advance(&self, done: u64, total: u64) {
        (self.0)(done, total);
    }
}
