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
use entente_model::kernels::{self, BLOCK_LEN, Kernels, KvDtype, KvLayer};
use entente_model::{
    Architecture, ChatTemplate, Checkpoint, CoordinatorWeights, GenerationConfig, ModelError,
    Progress, Tokenizer,
};
use entente_proto::identity::Role;
use entente_proto::ids::{KernelClass, NodeId};
use entente_router::view::{ClusterView, NodeView};
use entente_tls::{ALPN_GRPC, ALPN_STREAM, Credentials};

use crate::api::{self, Api};
use crate::config::{Config, Speculation, Transport};
use crate::engine::exchanger::Exchanger;
use crate::engine::forward::{CacheShape, Forward};
use crate::engine::scheduler::SchedulerConfig;
use crate::engine::{Engine, EngineHandle, Parts, Readiness};
use crate::link::grpc::GrpcLink;
use crate::link::{Links, Peer};
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
    /// Certificate, key or CA are not usable.
    #[error("tls: {0}")]
    Tls(#[from] entente_tls::Error),
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
    /// How the cache keeps keys and values, which decides bits of the output too.
    pub kv_dtype: KvDtype,
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
    let credentials = credentials(config)?;
    let to_load = config.clone();
    let loaded = tokio::task::spawn_blocking(move || load(&to_load, &progress))
        .await
        .map_err(|error| Error::Start(error.to_string()))??;
    let local: Vec<_> = loaded.local.values().map(NodeHandle::info).collect();
    let own_bytes = loaded.weights.bytes() as u64;
    let step_weights_bytes = own_bytes - loaded.weights.embed.bytes() as u64;
    let kernel_class = loaded.kernels.class().clone();
    let metrics = Arc::new(Metrics::new());
    let exchanger = connect(config, credentials.as_ref(), &loaded, &metrics)?;
    let kv_dtype = config.engine.kv_dtype.unwrap_or(KvDtype::of(config.weights));
    metrics.tell_cache(kv_dtype.name(), BLOCK_LEN);
    let api = start_engine(config, loaded, kv_dtype, exchanger, metrics)?;
    Ok(Started {
        api,
        kernel_class,
        kv_dtype,
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
fn connect(
    config: &Config,
    credentials: Option<&Credentials>,
    loaded: &Loaded,
    metrics: &Arc<Metrics>,
) -> Result<Exchanger, Error> {
    let view = view(config, loaded);
    let unable = |error: std::io::Error| Error::Start(error.to_string());
    let mut links = Links::new().map_err(unable)?;
    for node in loaded.state.nodes().filter(|node| node.spec.region == config.region) {
        let mailbox = links.mailbox();
        if let Some(local) = loaded.local.get(&node.id) {
            links.add(node.id, Box::new(InprocLink::open(node.id, local.clone(), mailbox)));
        } else if config.transport == Transport::Grpc {
            let peer = peer(config, credentials, node, ALPN_GRPC)?;
            let runtime = tokio::runtime::Handle::current();
            links.add(node.id, Box::new(GrpcLink::open(peer, mailbox, &runtime)));
        } else {
            let peer = peer(config, credentials, node, ALPN_STREAM)?;
            links.dial(peer).map_err(unable)?;
        }
    }
    let deadline = Duration::from_millis(config.engine.exchange_deadline_ms);
    let kernels = loaded.kernels.clone();
    Ok(Exchanger::new(links, view, kernels, deadline, metrics.clone()))
}

/// Reads what `[tls]` names, and checks that it was issued to this coordinator.
fn credentials(config: &Config) -> Result<Option<Credentials>, Error> {
    let Some(files) = &config.tls else { return Ok(None) };
    let credentials = Credentials::load(files)?;
    let member = Some((config.region, config.name.clone()));
    credentials.belong_to(&config.cluster.expect(Role::Coordinator, member))?;
    Ok(Some(credentials))
}

/// Whom to dial, and whose certificate to expect there: the roster says both.
fn peer(
    config: &Config,
    credentials: Option<&Credentials>,
    node: &Node,
    alpn: &[u8],
) -> Result<Peer, Error> {
    let spec = &node.spec;
    let member = Some((spec.region, spec.name.clone()));
    let tls = match credentials {
        Some(own) => Some(own.client(config.cluster.expect(Role::Expert, member), &[alpn])?),
        None if is_loopback(&spec.address) => None,
        None => {
            return Err(Error::Config(format!(
                "cluster.nodes: {} of {} is not a loopback address, so the section [tls] is needed",
                spec.address, spec.name
            )));
        }
    };
    Ok(Peer { node: node.id, name: spec.name.clone(), address: spec.address.clone(), tls })
}

fn is_loopback(address: &str) -> bool {
    address.parse().is_ok_and(|address: SocketAddr| address.ip().is_loopback())
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
    kv_dtype: KvDtype,
    exchanger: Exchanger,
    metrics: Arc<Metrics>,
) -> Result<Api, Error> {
    let architecture = loaded.checkpoint.architecture().clone();
    let blocks = kv_blocks(&architecture, kv_dtype, config.engine.kv_cache_mib)?;
    let vocab = architecture.vocab;
    let context_len = architecture.max_positions.min(blocks * BLOCK_LEN);
    let tokenizer = Arc::new(loaded.tokenizer);
    let cache = CacheShape { blocks, dtype: kv_dtype };
    let forward = Forward::new(
        architecture,
        loaded.weights,
        loaded.kernels,
        cache,
        config.engine.micro_batch_rows_min,
        metrics.clone(),
    );
    let scheduler = SchedulerConfig {
        step_rows_max: config.engine.step_rows_max,
        prefill_rows_beside_decode_max: config.engine.prefill_rows_beside_decode_max,
        running_max: config.engine.running_max,
        waiting_max: config.engine.waiting_max,
        blocks,
    };
    let draft_tokens_max = match config.engine.speculation {
        Speculation::Auto => config.engine.draft_tokens_max,
        Speculation::Off => 0,
    };
    let parts = Parts {
        scheduler,
        draft_tokens_max,
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

/// Blocks that fit the configured memory: keys and values of every layer.
fn kv_blocks(
    architecture: &Architecture,
    dtype: KvDtype,
    kv_cache_mib: usize,
) -> Result<usize, Error> {
    let Architecture { kv_heads, head_dim, ref layers, .. } = *architecture;
    let block_bytes = layers.len() * KvLayer::block_bytes(kv_heads, head_dim, dtype);
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
