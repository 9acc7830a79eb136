//! Puts a coordinator together and runs it until it is told to stop.

use std::collections::BTreeMap;
use std::future::{Future, IntoFuture};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::serve::ListenerExt;
use entente_expert_node::inproc::InprocLink;
use entente_expert_node::{ExpertNode, NodeHandle};
use entente_membership::state::{Node, State};
use entente_model::kernels::{self, BLOCK_LEN, Kernels};
use entente_model::{
    Architecture, ChatTemplate, Checkpoint, CoordinatorWeights, GenerationConfig, ModelError,
    Progress, Tokenizer,
};
use entente_proto::ids::{KernelClass, NodeId};
use entente_proto::link::{Link, LinkEvents};
use entente_router::view::{ClusterView, NodeView};

use crate::api::{self, Api};
use crate::config::{Config, Transport};
use crate::engine::exchanger::{self, Exchanger};
use crate::engine::forward::Forward;
use crate::engine::scheduler::SchedulerConfig;
use crate::engine::{Engine, EngineHandle, Parts, Readiness};
use crate::link::grpc::GrpcLink;
use crate::link::stream::StreamLink;
use crate::metrics::Metrics;

/// How long running requests may take to finish once the coordinator is told to stop.
const DRAIN_DEADLINE: Duration = Duration::from_secs(10);

/// Why a coordinator could not start or had to stop.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration is wrong.
    #[error("configuration: {0}")]
    Config(String),
    /// The model cannot be loaded.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// An expert node in this process could not start.
    #[error("expert node in this process: {0}")]
    ExpertNode(#[from] entente_expert_node::Error),
    /// The address cannot be served.
    #[error("cannot serve {address}: {source}")]
    Listen {
        /// The address.
        address: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// The system refused a thread or a task died.
    #[error("cannot start: {0}")]
    Start(String),
}

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

/// What is read from the model folder.
struct Loaded {
    checkpoint: Checkpoint,
    weights: CoordinatorWeights,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    generation: GenerationConfig,
    kernels: Arc<dyn Kernels>,
    state: State,
    /// Expert nodes that run in this process.
    local: BTreeMap<NodeId, NodeHandle>,
}

/// A coordinator whose engine runs, before anything listens.
pub struct Started {
    /// What the API works with; the engine is in it.
    pub api: Api,
    /// Which bits the kernels give.
    pub kernel_class: KernelClass,
    /// Experts held: none, unless they run in this process.
    pub experts: usize,
    /// Bytes of weights in this process.
    pub weights_bytes: u64,
    /// Bytes of the coordinator's own weights that every step reads: all but the embedding.
    pub step_weights_bytes: u64,
}

/// Loads the model, opens the links and starts the engine, which serves once every expert has a
/// live replica. `progress` counts layers.
pub async fn start(
    config: &Config,
    progress: impl Fn(u64, u64) + Send + Sync + 'static,
) -> Result<Started, Error> {
    config.engine.check().map_err(Error::Config)?;
    let to_load = config.clone();
    let loaded = tokio::task::spawn_blocking(move || load(&to_load, &progress))
        .await
        .map_err(|error| Error::Start(error.to_string()))??;
    let local: Vec<_> = loaded.local.values().map(NodeHandle::info).collect();
    let own_bytes = loaded.weights.bytes() as u64;
    let step_weights_bytes = own_bytes - loaded.weights.embed.bytes() as u64;
    let kernel_class = loaded.kernels.class().clone();
    let metrics = Arc::new(Metrics::new());
    let exchanger =
        connect(config, &loaded, &metrics).map_err(|error| Error::Start(error.to_string()))?;
    let api = start_engine(config, loaded, exchanger, metrics)?;
    Ok(Started {
        api,
        kernel_class,
        experts: local.iter().map(|node| node.experts.len()).sum(),
        weights_bytes: own_bytes + local.iter().map(|node| node.weights_bytes).sum::<u64>(),
        step_weights_bytes,
    })
}

/// Runs a coordinator until `shutdown` resolves. `progress` counts layers;
/// `on_ready` is told once every expert has a live replica.
pub async fn run(
    config: Config,
    listener: Option<std::net::TcpListener>,
    progress: impl Fn(u64, u64) + Send + Sync + 'static,
    on_ready: impl FnOnce(Ready) + Send + 'static,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<(), Error> {
    // Bind before loading: an address in use should not cost a minute of reading.
    let listener = listen(&config.http, listener)?;
    let address = listener.local_addr().map_err(|source| listen_error(&config.http, source))?;
    let Started { api, experts, weights_bytes, .. } = start(&config, progress).await?;
    let ready = Ready { address, experts, weights_bytes };
    let api = Arc::new(api);
    tokio::spawn(announce(api.engine.clone(), on_ready, ready));
    serve(api, listener, shutdown).await.map_err(|source| listen_error(&config.http, source))
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

/// Passes the loader's progress on to whoever started this process.
struct Forwarder<'a>(&'a dyn Fn(u64, u64));

impl Progress for Forwarder<'_> {
    fn advance(&self, done: u64, total: u64) {
        (self.0)(done, total);
    }
}

fn load(config: &Config, progress: &dyn Fn(u64, u64)) -> Result<Loaded, Error> {
    let checkpoint = Checkpoint::open(&config.model)?;
    let kernels = kernels::select(config.weights, threads(config))
        .map_err(|error| Error::Config(format!("weights: {error}")))?;
    let weights = CoordinatorWeights::load(&checkpoint, kernels.as_ref(), &Forwarder(progress))?;
    let state = entente_expert_node::found(&config.cluster, &checkpoint, config.weights)?;
    let mut local = BTreeMap::new();
    if config.transport == Transport::Inproc {
        for node in state.nodes().filter(|node| node.spec.region == config.region) {
            // They share the kernels' threads: the engine waits while they compute.
            let kernels = kernels.clone();
            let started = ExpertNode::start(&node.spec.name, &state, &checkpoint, kernels, &())?;
            local.insert(node.id, started);
        }
    }
    Ok(Loaded {
        tokenizer: Tokenizer::open(&config.model, checkpoint.architecture())?,
        template: ChatTemplate::open(&config.model)?,
        generation: GenerationConfig::open(&config.model, checkpoint.architecture())?,
        weights,
        kernels,
        state,
        local,
        checkpoint,
    })
}

fn threads(config: &Config) -> usize {
    let cores = || std::thread::available_parallelism().map_or(1, usize::from);
    config.threads.unwrap_or_else(cores)
}

/// Opens a link to every expert node of the coordinator's region.
fn connect(config: &Config, loaded: &Loaded, metrics: &Arc<Metrics>) -> std::io::Result<Exchanger> {
    let view = view(config, loaded);
    let (mailbox, inbox) = exchanger::mailbox();
    let mut links = BTreeMap::new();
    for node in loaded.state.nodes().filter(|node| node.spec.region == config.region) {
        let local = loaded.local.get(&node.id);
        links.insert(node.id, open_link(config.transport, node, local, mailbox.clone())?);
    }
    let deadline = Duration::from_millis(config.engine.exchange_deadline_ms);
    let kernels = loaded.kernels.clone();
    Ok(Exchanger::new(links, inbox, view, kernels, deadline, metrics.clone()))
}

fn open_link(
    transport: Transport,
    node: &Node,
    local: Option<&NodeHandle>,
    events: Arc<dyn LinkEvents>,
) -> std::io::Result<Box<dyn Link>> {
    if let Some(local) = local {
        return Ok(Box::new(InprocLink::open(node.id, local.clone(), events)));
    }
    let (name, address) = (node.spec.name.clone(), node.spec.address.clone());
    if transport == Transport::Stream {
        return Ok(Box::new(StreamLink::open(node.id, name, address, events)?));
    }
    let runtime = tokio::runtime::Handle::current();
    Ok(Box::new(GrpcLink::open(node.id, name, address, events, &runtime)))
}

/// What the coordinator believes of the cluster before any link is up.
fn view(config: &Config, loaded: &Loaded) -> ClusterView {
    let state = &loaded.state;
    let node = |node: &Node| {
        let (name, region) = (node.spec.name.clone(), node.spec.region);
        (node.id, NodeView { name, region, live: None })
    };
    ClusterView {
        home: config.region,
        membership_epoch: state.membership_epoch(),
        placement_epoch: state.placement_epoch(),
        model_digest: loaded.checkpoint.digest(),
        kernel_class: loaded.kernels.class().clone(),
        nodes: state.nodes().map(node).collect(),
        placement: state.placement().clone(),
    }
}

fn start_engine(
    config: &Config,
    loaded: Loaded,
    exchanger: Exchanger,
    metrics: Arc<Metrics>,
) -> Result<Api, Error> {
    let architecture = loaded.checkpoint.architecture().clone();
    let blocks = kv_blocks(&architecture, config.engine.kv_cache_mib)?;
    let vocab = architecture.vocab;
    let context_len = architecture.max_positions.min(blocks * BLOCK_LEN);
    let tokenizer = Arc::new(loaded.tokenizer);
    let forward =
        Forward::new(architecture, loaded.weights, loaded.kernels, blocks, metrics.clone());
    let scheduler = SchedulerConfig {
        step_rows_max: config.engine.step_rows_max,
        running_max: config.engine.running_max,
        waiting_max: config.engine.waiting_max,
        blocks,
    };
    let parts = Parts {
        scheduler,
        forward,
        exchanger,
        tokenizer: tokenizer.clone(),
        vocab,
        metrics: metrics.clone(),
    };
    let engine = Engine::start(parts).map_err(|error| Error::Start(error.to_string()))?;
    Ok(Api {
        engine,
        tokenizer,
        template: loaded.template,
        generation: loaded.generation,
        model_name: model_name(config),
        context_len,
        vocab,
        created_s: api::now_s(),
        metrics,
    })
}

/// Blocks that fit the configured memory: keys and values of every layer in f32.
fn kv_blocks(architecture: &Architecture, kv_cache_mib: usize) -> Result<usize, Error> {
    let values = 2 * architecture.layers.len() * architecture.kv_heads * architecture.head_dim;
    let block_bytes = values * BLOCK_LEN * size_of::<f32>();
    match (kv_cache_mib << 20) / block_bytes {
        0 => Err(Error::Config(format!(
            "engine.kv_cache_mib is {kv_cache_mib}, one block of {BLOCK_LEN} positions takes \
             {block_bytes} bytes"
        ))),
        blocks => Ok(blocks),
    }
}

fn model_name(config: &Config) -> String {
    let folder = || config.model.file_name().map(|name| name.to_string_lossy().into_owned());
    config.served_model_name.clone().or_else(folder).unwrap_or_else(|| "model".to_owned())
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
