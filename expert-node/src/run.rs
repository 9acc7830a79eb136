//! A whole expert-node process but for its command line: bind, load, serve, leave, drain.

use std::collections::BTreeSet;
use std::future::Future;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use entente_membership::client::Client;
use entente_membership::enrolment::keep_fresh;
use entente_membership::net::Dialler;
use entente_model::kernels::{DeviceFacts, DeviceId};
use entente_model::{Checkpoint, Progress};
use entente_proto::placement::ExpertKey;
use entente_proto::wire;
use entente_tls::Credentials;
use tokio::sync::{mpsc, oneshot, watch};

use crate::http::{self, Stage};
use crate::limits::SPOILT_MAX;
use crate::member::{Loader, Member, Restorer, Settings, Told};
use crate::node::NodeHandle;
use crate::service::AbortOnDrop;
use crate::{Config, ConfigError, Error, ExpertNode, scrub, serve};

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

/// Sockets that were bound before the node was started; it binds what is not among them.
#[derive(Debug, Default)]
pub struct Listeners {
    /// For frames.
    pub exchange: Option<TcpListener>,
    /// For metrics.
    pub metrics: Option<TcpListener>,
}

/// Runs a node from start to end.
///
/// Binds `listen` and `metrics_listen` unless listeners are given, and serves. In a cluster without voters it loads what
/// the list places on it first, calls `on_ready`, and ends when `leave` or `stop` resolves. In a
/// live one it registers, loads what is wanted of it, calls `on_ready` once it takes traffic, and
/// ends when `stop` resolves or when the cluster has let it go after `leave`. `progress` is told how
/// many experts are held and how many there should be.
pub async fn run(
    config: Config,
    listeners: Listeners,
    progress: impl Fn(u64, u64) + Send + 'static,
    on_ready: impl FnOnce(Ready),
    leave: impl Future<Output = ()>,
    stop: impl Future<Output = ()>,
) -> Result<(), Error> {
    config.check()?;
    let (listener, address) = bind(listeners.exchange, &config.listen)?;
    let credentials = config.credentials()?;
    let stages = watch::Sender::new(Stage::default());
    let _http = match &config.metrics_listen {
        Some(at) => {
            let (metrics, _) = bind(listeners.metrics, at)?;
            let http = http::serve(metrics, stages.subscribe(), credentials.clone());
            Some(AbortOnDrop(tokio::spawn(http)))
        }
        None => None,
    };
    if credentials.is_none() && !address.ip().is_loopback() {
        return Err(Error::PlainText(address));
    }
    let serving = stages.clone();
    let on_ready = |node: &NodeHandle| {
        serving.send_replace(Stage::Ready(node.clone()));
        let info = node.info();
        let (experts, weights_bytes) = (info.experts.len(), info.weights_bytes);
        on_ready(Ready { address, experts, weights_bytes });
    };
    if config.is_live() {
        let credentials = credentials.ok_or(ConfigError::TlsNeeded)?;
        let live = Live { config, credentials, listener, address, stages };
        return live.run(progress, on_ready, leave, stop).await;
    }
    let mut shutdown = std::pin::pin!(either(leave, stop));
    let (model, scrub_interval) = (config.model.clone(), config.scrub_interval());
    let device = config.device;
    let load = move || ExpertNode::load(&config, &Telling(progress));
    let Some(node) = unless(shutdown.as_mut(), &model, load).await? else { return Ok(()) };
    // Nobody here could get it anew, but its rows are wrong: other replicas have the right ones.
    let taken_from = node.clone();
    let take_out = move |expert| taken_from.release(&BTreeSet::from([expert]));
    let _scrubber = scrub_interval.map(|i| scrub::start(node.clone(), i, take_out)).transpose()?;
    on_ready(&node);
    let ended = either(shutdown, node.health().failed());
    serve(node.clone(), listener, credentials.map(Into::into), ended).await?;
    sound(&node, device)
}

/// A node whose device failed has served to its end, which is no good end.
fn sound(node: &NodeHandle, device: DeviceId) -> Result<(), Error> {
    node.health().failure().map_or(Ok(()), |source| Err(Error::Device { device, source }))
}

/// The listener that was given, or one at `at`; and where it is reached.
fn bind(
    given: Option<TcpListener>,
    at: &str,
) -> Result<(tokio::net::TcpListener, SocketAddr), Error> {
    let bound = || {
        let listener = given.map_or_else(|| TcpListener::bind(at), Ok)?;
        listener.set_nonblocking(true)?;
        let listener = tokio::net::TcpListener::from_std(listener)?;
        let address = listener.local_addr()?;
        Ok((listener, address))
    };
    bound().map_err(|source| Error::Listen { address: at.to_owned(), source })
}

/// A node of a cluster with voters.
struct Live {
    config: Config,
    credentials: Credentials,
    listener: tokio::net::TcpListener,
    address: SocketAddr,
    stages: watch::Sender<Stage>,
}

impl Live {
    async fn run(
        self,
        progress: impl Fn(u64, u64),
        on_ready: impl FnOnce(&NodeHandle),
        leave: impl Future<Output = ()>,
        stop: impl Future<Output = ()>,
    ) -> Result<(), Error> {
        let Self { config, credentials, listener, address, stages } = self;
        let mut stop = std::pin::pin!(stop);
        let files = config.tls.clone().ok_or(ConfigError::TlsNeeded)?;
        let founders = config.cluster.voters().iter().map(|voter| voter.address.clone());
        let voters = founders.chain(config.membership.contacts.iter().cloned()).collect();
        let dialler = Dialler::new(&credentials, None)?.through(config.membership.via.clone());
        let client = Client::with(dialler, voters)?;
        let fresh = keep_fresh(client.clone(), credentials.clone(), files);
        let (model, own) = (config.model.clone(), credentials.clone());
        let device = config.device;
        let scrub_interval = config.scrub_interval();
        let (taking_out, spoilt) = mpsc::channel(SPOILT_MAX);
        let open = move || open(&config, own, client, address, spoilt);
        let Some(member) = unless(stop.as_mut(), &model, open).await? else { return Ok(()) };
        let node = member.node.clone();
        stages.send_replace(Stage::Loading(node.clone()));
        let take_out = move |expert| {
            // Fails only when the member has ended.
            let _ = taking_out.blocking_send(expert);
        };
        let _scrubber =
            scrub_interval.map(|i| scrub::start(node.clone(), i, take_out)).transpose()?;
        let (registered, may_greet) = oneshot::channel();
        let (end, ended) = oneshot::channel::<()>();
        let told = Told { progress, ready: || on_ready(&node), registered };
        let membership = async {
            let lived = member.run(told, leave, either(stop, node.health().failed())).await;
            drop(end);
            lived
        };
        // A coordinator that is greeted learns the incarnation, so there has to be one first. Until
        // then connections wait in the listener's queue.
        let service = async {
            match may_greet.await {
                Ok(()) => {
                    let ended = async { drop(ended.await) };
                    serve(node.clone(), listener, Some(credentials.into()), ended).await
                }
                Err(_) => Ok(()),
            }
        };
        tokio::select! {
            ended = async { tokio::try_join!(membership, service) } => {
                ended.and_then(|_| sound(&node, device))
            }
            never = fresh => match never {},
        }
    }
}

/// Opens the model for a node that holds nothing yet. Blocks.
fn open(
    config: &Config,
    credentials: Credentials,
    client: Client,
    address: SocketAddr,
    spoilt: mpsc::Receiver<ExpertKey>,
) -> Result<Member, Error> {
    let checkpoint = Checkpoint::open(&config.model)?;
    let kernels = config.kernels()?;
    // The certificate's region is the one that counts; the configuration names the same, or the
    // credentials would not have been taken.
    let region = credentials.identity().region;
    let node = ExpertNode::empty(&config.name, region, &checkpoint, kernels.clone())?;
    config.nccl(kernels.as_ref()).into_iter().for_each(|nccl| node.exchange_by(nccl));
    let (model_digest, kernel_class) = node.model();
    let on_device = kernels.device();
    let registration = wire::RegisterRequest {
        address: config.reached_at(address),
        site: config.site.clone().unwrap_or_default(),
        // What the operator gives expert weights, and no more than a device has room for.
        memory_bytes: smaller(config.memory_bytes, on_device.map(|d| d.weights_bytes_max)),
        kernel_class: kernel_class.to_string(),
        model_digest: Bytes::copy_from_slice(&model_digest.0),
        manifest_sha256: node.manifest().map(|m| Bytes::copy_from_slice(&m.sha256())),
        device: on_device.map(device_out),
    };
    let settings = Settings {
        heartbeat_ms: config.heartbeat_ms(),
        drain_deadline_ms: config.drain_deadline_ms(),
    };
    let states = client.watch();
    let restorer = node.manifest().map(|manifest| Restorer {
        name: config.name.clone(),
        states: states.clone(),
        credentials,
        via: config.membership.via.clone(),
        region,
        manifest: manifest.clone(),
        activation: checkpoint.architecture().activation,
        counters: node.counters().clone(),
    });
    let loader = Arc::new(Loader::new(checkpoint, config.weights, kernels, restorer)?);
    node.lend_from(loader.clone());
    let name = config.name.clone();
    Ok(Member { name, node, client, states, registration, loader, settings, spoilt })
}

/// The bound that binds, of two that may be absent.
fn smaller(one: Option<u64>, other: Option<u64>) -> Option<u64> {
    one.into_iter().chain(other).min()
}

fn device_out(device: &DeviceFacts) -> wire::NodeDevice {
    wire::NodeDevice {
        name: device.name.clone(),
        uuid: device.uuid.clone(),
        memory_bytes: device.memory_bytes,
        bandwidth_bytes_s: device.bandwidth_bytes_s,
    }
}

/// Does something that blocks, unless it is not wanted any more: what is not done then ends with the
/// process.
async fn unless<T: Send + 'static>(
    stop: impl Future<Output = ()>,
    model: &Path,
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<Option<T>, Error> {
    tokio::select! {
        done = tokio::task::spawn_blocking(work) => {
            let stopped = |error: tokio::task::JoinError| Error::Loading {
                model: model.to_owned(),
                reason: error.to_string(),
            };
            done.map_err(stopped)?.map(Some)
        }
        () = stop => Ok(None),
    }
}

async fn either(one: impl Future<Output = ()>, other: impl Future<Output = ()>) {
    tokio::select! {
        () = one => {}
        () = other => {}
    }
}

/// A function that wants to know how far loading is.
struct Telling<F>(F);

impl<F: Fn(u64, u64)> Progress for Telling<F> {
    fn advance(&self, done: u64, total: u64) {
        (self.0)(done, total);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_has_room_for_what_its_operator_and_its_device_both_allow() {
        for (configured, on_device, room) in [
            (None, None, None),
            (Some(5), None, Some(5)),
            (None, Some(7), Some(7)),
            (Some(5), Some(7), Some(5)),
            (Some(9), Some(7), Some(7)),
        ] {
            assert_eq!(smaller(configured, on_device), room, "{configured:?}, {on_device:?}");
        }
    }
}
