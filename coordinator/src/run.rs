//! Runs a coordinator process: binds, starts what it is made of, serves, and ends in order.

use std::future::{Future, IntoFuture};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::serve::ListenerExt;

use crate::api::{self, Api};
use crate::engine::{EngineHandle, Readiness};
use crate::{Config, Error, Started, Wiring, host, start, start_wired};

/// How long running requests may take to finish once the coordinator is told to stop.
const DRAIN_DEADLINE: Duration = Duration::from_secs(10);

/// What a coordinator says once it can serve.
#[derive(Debug, Clone, Copy)]
pub struct Ready {
    /// Where the API listens.
    pub address: SocketAddr,
    /// Experts held: none, unless they run in this process.
    pub experts: usize,
    /// Bytes of weights in this process.
    pub weights_bytes: u64,
}

/// Runs a coordinator until `shutdown` resolves. `progress` counts layers;
/// `on_ready` is told once every expert has a live replica.
///
/// Where the roster has voters, this process is one of them, with `control` as the listener of its
/// control port if one is given. Its voter is there before the model is loaded and until the last
/// request has ended; if it fails, so does the process.
pub async fn run(
    config: Config,
    http: Option<std::net::TcpListener>,
    control: Option<std::net::TcpListener>,
    progress: impl Fn(u64, u64) + Send + Sync + 'static,
    on_ready: impl FnOnce(Ready) + Send + 'static,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<(), Error> {
    // Bind before loading: an address in use should not cost a minute of reading.
    let listener = listen(&config.http, http)?;
    check_open(&config, &listener)?;
    let front = Front { config: &config, listener, on_ready, shutdown };
    if config.cluster.voters().is_empty() {
        if config.membership.is_some() {
            return Err(Error::Config("[membership] needs cluster.voters".to_owned()));
        }
        return front.serve(start(&config, progress).await?).await;
    }
    let mut host = host::start(&config, control).await?;
    let membership = host.service.handle.clone();
    let wiring = Wiring {
        states: Some(membership.state()),
        credentials: Some(host.credentials.clone()),
        ..Wiring::default()
    };
    let fresh = host.keep_fresh();
    let live = async {
        let started = start_wired(&config, wiring, progress).await?;
        tokio::spawn(host::show(membership.status(), started.api.metrics.clone()));
        let served = started.served.clone();
        let agreed = async {
            match host::agree(&membership, &served, &config).await {
                Ok(()) => std::future::pending().await,
                Err(error) => error,
            }
        };
        tokio::select! {
            result = front.serve(started) => result,
            error = agreed => Err(error),
        }
    };
    let result = tokio::select! {
        result = live => result,
        error = host::ended(&mut host.service) => return Err(error),
        never = fresh => match never {},
    };
    host::stop(host.service).await;
    result
}

/// The public side of a coordinator that is about to serve.
struct Front<'a, R, S> {
    config: &'a Config,
    listener: tokio::net::TcpListener,
    on_ready: R,
    shutdown: S,
}

impl<R, S> Front<'_, R, S>
where
    R: FnOnce(Ready) + Send + 'static,
    S: Future<Output = ()> + Send + 'static,
{
    /// Serves until told to stop.
    async fn serve(self, started: Started) -> Result<(), Error> {
        let Self { config, listener, on_ready, shutdown } = self;
        let unusable = |source| listen_error(&config.http, source);
        let address = listener.local_addr().map_err(unusable)?;
        let Started { api, experts, weights_bytes, .. } = started;
        let ready = Ready { address, experts, weights_bytes };
        tokio::spawn(announce(api.engine.clone(), on_ready, ready));
        serve(api, listener, shutdown).await.map_err(unusable)
    }
}

/// An API that asks for no key must not be reachable from elsewhere.
fn check_open(config: &Config, listener: &tokio::net::TcpListener) -> Result<(), Error> {
    let address = listener.local_addr().map_err(|source| listen_error(&config.http, source))?;
    if config.api.open && !address.ip().is_loopback() {
        let text = format!("api.open: {address} is not on loopback, so a key is needed there");
        return Err(Error::Config(text));
    }
    Ok(())
}

fn listen_error(address: &str, source: std::io::Error) -> Error {
    Error::Listen { address: address.to_owned(), source }
}

fn listen(
    address: &str,
    listener: Option<std::net::TcpListener>,
) -> Result<tokio::net::TcpListener, Error> {
    let bound = match listener {
        Some(listener) => Ok(listener),
        None => std::net::TcpListener::bind(address),
    };
    bound
        .and_then(|listener| {
            listener.set_nonblocking(true)?;
            tokio::net::TcpListener::from_std(listener)
        })
        .map_err(|source| listen_error(address, source))
}

/// Tells once that the coordinator can serve.
async fn announce(engine: EngineHandle, on_ready: impl FnOnce(Ready), ready: Ready) {
    let mut readiness = engine.readiness();
    if readiness.wait_for(|now| *now == Readiness::Ready).await.is_ok() {
        on_ready(ready);
    }
}

/// Serves until told to stop, then lets running requests finish for a while.
async fn serve(
    api: Arc<Api>,
    listener: tokio::net::TcpListener,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> std::io::Result<()> {
    let (stop, stopped) = tokio::sync::oneshot::channel();
    let until_told = async move {
        shutdown.await;
        let _ = stop.send(());
    };
    // Tokens are small and wanted at once.
    let listener = listener.tap_io(|stream| {
        let _ = stream.set_nodelay(true);
    });
    let server =
        axum::serve(listener, api::router(api)).with_graceful_shutdown(until_told).into_future();
    let deadline = async move {
        // A dropped sender means that the server ended by itself; then there is nothing to cut off.
        if stopped.await.is_ok() {
            tokio::time::sleep(DRAIN_DEADLINE).await;
        } else {
            std::future::pending::<()>().await;
        }
    };
    tokio::select! {
        served = server => served,
        () = deadline => Ok(()),
    }
}
