//! Runs a coordinator process: binds, starts what it is made of, serves, and ends in order.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use entente_audit::checkpoint;
use entente_membership::net::http;
use entente_model::kernels::DeviceError;
use hyper::body::Incoming;
use tokio::sync::watch;
use tower::ServiceExt;

use crate::api::{self, Api};
use crate::engine::{EngineHandle, Readiness};
use crate::ledger::{self, Ledger, commit, cosign};
use crate::{Config, Error, Started, Wiring, host, start_wired};

/// How long running requests may take to finish once the coordinator is told to stop.
const DRAIN_DEADLINE: Duration = Duration::from_secs(10);
/// How long the audit log may take to be closed.
const LEDGER_STOP_MAX: Duration = Duration::from_secs(5);

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
    let mut kept = keep(&config)?;
    let ledger = kept.as_ref().map(|kept| kept.ledger.clone());
    let front = Front { config: &config, listener, on_ready, shutdown };
    let result = tokio::select! {
        result = live(&config, control, ledger, progress, front) => result,
        error = ended(&mut kept) => return Err(error),
    };
    if let Some(kept) = kept {
        kept.ledger.stop(LEDGER_STOP_MAX).await;
    }
    result
}

/// Opens the audit log, if one is configured.
fn keep(config: &Config) -> Result<Option<ledger::Started>, Error> {
    let origin = checkpoint::origin(config.cluster.name(), &config.name);
    Ok(config.audit.as_ref().map(|audit| ledger::start(audit, &origin)).transpose()?)
}

/// Resolves once the audit log cannot be written any more: nothing is served of which there would
/// be no record.
async fn ended(kept: &mut Option<ledger::Started>) -> Error {
    let Some(kept) = kept else { return std::future::pending().await };
    match (&mut kept.ended).await {
        Ok(Err(error)) => error.into(),
        Ok(Ok(())) | Err(_) => Error::Start("the audit log has ended".to_owned()),
    }
}

/// Runs with its voter, if it has one.
async fn live<R, S>(
    config: &Config,
    control: Option<std::net::TcpListener>,
    ledger: Option<Ledger>,
    progress: impl Fn(u64, u64) + Send + Sync + 'static,
    front: Front<'_, R, S>,
) -> Result<(), Error>
where
    R: FnOnce(Ready) + Send + 'static,
    S: Future<Output = ()> + Send + 'static,
{
    if config.cluster.voters().is_empty() {
        if config.membership.is_some() {
            return Err(Error::Config("[membership] needs cluster.voters".to_owned()));
        }
        let wiring = Wiring { ledger, ..Wiring::default() };
        return front.serve(start_wired(config, wiring, progress).await?).await;
    }
    let audit = ledger.as_ref().map(Ledger::sink).unwrap_or_default();
    let mut host = host::start(config, control, audit).await?;
    let membership = host.service.handle.clone();
    let wiring = Wiring {
        states: Some(membership.state()),
        credentials: Some(host.credentials.clone()),
        ledger: ledger.clone(),
        ..Wiring::default()
    };
    let fresh = host.keep_fresh();
    let live = async {
        let started = start_wired(config, wiring, progress).await?;
        tokio::spawn(host::show(membership.status(), started.api.metrics.clone()));
        if let Some(ledger) = ledger {
            let (name, metrics) = (config.name.clone(), started.api.metrics.clone());
            let asker = cosign::Asker {
                ledger: ledger.clone(),
                membership: membership.clone(),
                credentials: host.credentials.clone(),
                via: config.membership.as_ref().map(|m| m.via.clone()).unwrap_or_default(),
                metrics: metrics.clone(),
            };
            tokio::spawn(cosign::run(asker));
            tokio::spawn(commit::run(ledger, membership.clone(), name, metrics));
        }
        let served = started.served.clone();
        let agreed = async {
            match host::agree(&membership, &served, config).await {
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
        let bounds = config.api.bounds();
        let ready = Ready { address, experts, weights_bytes };
        tokio::spawn(announce(api.engine.clone(), on_ready, ready));
        let failure = api.engine.failure();
        let mut failing = failure.clone();
        let until = async move {
            tokio::select! {
                () = shutdown => {}
                () = failed(&mut failing) => {}
            }
        };
        serve(api, listener, bounds, until).await;
        let failure = failure.borrow().clone();
        failure.map_or(Ok(()), |source| Err(Error::Device { device: config.device, source }))
    }
}

/// Resolves once nothing can be computed any more.
async fn failed(failure: &mut watch::Receiver<Option<DeviceError>>) {
    if failure.wait_for(Option::is_some).await.is_err() {
        // The engine has ended because nobody needs it any more.
        std::future::pending().await
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
    bounds: http::Bounds,
    shutdown: impl Future<Output = ()> + Send + 'static,
) {
    let (stop, stopped) = tokio::sync::oneshot::channel();
    let until_told = async move {
        shutdown.await;
        let _ = stop.send(());
    };
    let refusals = api.refused_connections.clone();
    let service = api::router(api).map_request(|request: Request<Incoming>| request.map(Body::new));
    let server = http::serve(listener, service, bounds, refusals, until_told);
    let deadline = async move {
        // A dropped sender means that the server ended by itself; then there is nothing to cut off.
        if stopped.await.is_ok() {
            tokio::time::sleep(DRAIN_DEADLINE).await;
        } else {
            std::future::pending::<()>().await;
        }
    };
    tokio::select! {
        () = server => {}
        () = deadline => {}
    }
}
