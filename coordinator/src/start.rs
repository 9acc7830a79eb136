//! Puts a coordinator together: model, links, engine.

mod trunk;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crossbeam_channel::Sender;
use entente_audit::record;
use entente_expert_node::{ExpertNode, Nccl, NodeHandle};
use entente_membership::served::ServedModel;
use entente_membership::state::{Node, State};
use entente_model::kernels::cuda::{self, Device};
use entente_model::kernels::{
    self, BLOCK_LEN, DeviceError, DeviceId, ExpertKernels, Kernels, KvDtype,
};
use entente_model::{
    ChatTemplate, Checkpoint, CoordinatorWeights, GenerationConfig, ModelError, Progress,
    Tokenizer, expert_bytes,
};
use entente_proto::identity::Role;
use entente_proto::ids::{KernelClass, ModelDigest, NodeId};
use entente_proto::placement::ModelShape;
use entente_router::view::Model;
use entente_tls::Credentials;
use tokio::sync::watch;

use crate::api::{self, Access, Api};
use crate::config::{Config, Speculation, Transport};
use crate::engine::cluster::Cluster;
use crate::engine::exchanger::Exchanger;
use crate::engine::forward::Forward;
use crate::engine::scheduler::SchedulerConfig;
use crate::engine::tally::Closed;
use crate::engine::trunk::Trunk;
use crate::engine::{Engine, Parts};
use crate::ledger::requests::Facts;
use crate::ledger::{Books, Ledger, LedgerError};
use crate::link::Opener;
use crate::metrics::Metrics;
use crate::statements::{self, Stated};

/// Why a coordinator could not start or had to stop.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration is wrong.
    #[error("configuration: {0}")]
    Config(String),
    /// The model cannot be loaded.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The device of the configuration cannot be used, or can no longer be used.
    #[error("{device}: {source}")]
    Device {
        /// Which one.
        device: DeviceId,
        /// Why.
        source: DeviceError,
    },
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
    /// This process's voter could not start or had to stop.
    #[error("membership: {0}")]
    Membership(#[from] entente_membership::service::ServiceError),
    /// The cluster has agreed on another model.
    #[error("the cluster serves the model {agreed}, this coordinator was given {ours}")]
    OtherModel {
        /// The cluster's.
        agreed: ModelDigest,
        /// This coordinator's.
        ours: ModelDigest,
    },
    /// The cluster has agreed on another manifest.
    #[error(
        "the cluster serves other weights of this model than manifest.json beside them names, or in \
         another format"
    )]
    OtherWeights,
    /// The audit log cannot be kept.
    #[error("audit: {0}")]
    Ledger(#[from] LedgerError),
    /// The system refused a thread or a task died.
    #[error("cannot start: {0}")]
    Start(String),
}

/// What is read from the model folder.
struct Loaded {
    checkpoint: Checkpoint,
    trunk: Box<dyn Trunk>,
    /// Blocks of the trunk's cache.
    blocks: usize,
    /// Bytes of the coordinator's own weights, and of those the ones that every step reads.
    own_bytes: u64,
    step_weights_bytes: u64,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    generation: GenerationConfig,
    /// The processor's.
    kernels: Arc<dyn Kernels>,
    /// What experts are computed with.
    expert_class: KernelClass,
    served: ServedModel,
    states: watch::Receiver<Arc<State>>,
    /// What rows may travel by besides the network.
    nccl: Option<Nccl>,
    /// Expert nodes that run in this process.
    local: BTreeMap<NodeId, NodeHandle>,
}

/// What a coordinator is connected to, beside what its configuration names.
#[derive(Default)]
pub struct Wiring {
    /// Where committed states come from; without it the cluster is what the roster says, for ever.
    pub states: Option<watch::Receiver<Arc<State>>>,
    /// Who is told of each generation that has ended; see [`Parts::closings`].
    pub closings: Option<Sender<Closed>>,
    /// Who is given what expert nodes state that they computed for what has ended.
    pub statements: Option<Sender<Stated>>,
    /// Credentials that somebody keeps fresh; those of the configuration when absent.
    pub credentials: Option<Credentials>,
    /// Where records of requests are kept; it is told of generations that have ended too.
    pub ledger: Option<Ledger>,
}

/// A coordinator whose engine runs, before anything listens.
pub struct Started {
    /// What the API works with; the engine is in it.
    pub api: Arc<Api>,
    /// The model as the cluster knows it.
    pub served: ServedModel,
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
/// live replica. `progress` counts layers. The cluster is what the roster says, for ever.
pub async fn start(
    config: &Config,
    progress: impl Fn(u64, u64) + Send + Sync + 'static,
) -> Result<Started, Error> {
    start_wired(config, Wiring::default(), progress).await
}

/// The same in a cluster that changes: the engine follows what was committed last.
pub async fn follow(
    config: &Config,
    states: watch::Receiver<Arc<State>>,
    progress: impl Fn(u64, u64) + Send + Sync + 'static,
) -> Result<Started, Error> {
    start_wired(config, Wiring { states: Some(states), ..Wiring::default() }, progress).await
}

/// Nodes of this process would not follow what is committed.
pub(crate) fn check_followable(config: &Config) -> Result<(), Error> {
    if config.transport == Transport::Inproc {
        let text = "transport: inproc is for clusters without cluster.voters";
        return Err(Error::Config(text.to_owned()));
    }
    Ok(())
}

/// The same as either, with everything that it may be connected to.
pub async fn start_wired(
    config: &Config,
    wiring: Wiring,
    progress: impl Fn(u64, u64) + Send + Sync + 'static,
) -> Result<Started, Error> {
    let Wiring { states, closings, statements, credentials: fresh, ledger } = wiring;
    let closings = closings.or(ledger.as_ref().map(Ledger::closings));
    let statements = statements.or(ledger.as_ref().map(Ledger::statements));
    if states.is_some() {
        check_followable(config)?;
    }
    config.engine.check().map_err(Error::Config)?;
    config.api.check().map_err(Error::Config)?;
    config.check_nccl().map_err(Error::Config)?;
    let credentials = match fresh {
        Some(credentials) => Some(credentials),
        None => credentials(config)?,
    };
    let to_load = config.clone();
    let access = access(config, states.clone())?;
    let loaded = tokio::task::spawn_blocking(move || load(&to_load, states, &progress))
        .await
        .map_err(|error| Error::Start(error.to_string()))??;
    let local: Vec<_> = loaded.local.values().map(NodeHandle::info).collect();
    let Loaded { own_bytes, step_weights_bytes, .. } = loaded;
    let kernel_class = loaded.trunk.class().clone();
    let served = loaded.served.clone();
    let metrics = Arc::new(Metrics::new());
    let books = ledger.map(|ledger| books(config, ledger, credentials.clone(), &loaded));
    let opener = opener(config, credentials.clone(), &loaded, &metrics);
    let closings = match statements {
        Some(to) if opener.can_hear_statements() => {
            let asking = (opener.clone(), loaded.states.clone());
            Some(statements::start(closings, to, asking)?)
        }
        _ => closings,
    };
    let exchanger = connect(config, opener, &loaded, &metrics)?;
    let kv_dtype = trunk::kv_dtype(config);
    metrics.tell_cache(kv_dtype.name(), BLOCK_LEN);
    metrics.tell_device(&config.device.to_string(), &kernel_class.0);
    let door = (access, books, credentials);
    let api = start_engine(config, loaded, (exchanger, closings), door, metrics)?;
    Ok(Started {
        api: Arc::new(api),
        served,
        kernel_class,
        kv_dtype,
        experts: local.iter().map(|node| node.experts.len()).sum(),
        weights_bytes: own_bytes + local.iter().map(|node| node.weights_bytes).sum::<u64>(),
        step_weights_bytes,
    })
}

/// Whom the API lets in: where the cluster agrees on anything, those whose keys it has agreed on.
fn access(config: &Config, states: Option<watch::Receiver<Arc<State>>>) -> Result<Access, Error> {
    let mut secret = [0; 32];
    getrandom::fill(&mut secret)
        .map_err(|error| Error::Start(format!("the system has no random numbers: {error}")))?;
    Ok(match states {
        Some(states) if !config.api.open => {
            // As many as the engine would take of one tenant, so that nobody fills the way to it.
            let answers_max = config.engine.running_max + config.engine.tenant_waiting_max;
            Access::keyed(states, &secret, u32::try_from(answers_max).unwrap_or(u32::MAX))
        }
        _ => {
            let entered = config.api.endpoints.keys().copied();
            Access::open(entered.chain([config.region]).collect(), &secret)
        }
    })
}

/// Passes the loader's progress on to whoever started this process.
struct Forwarder<'a>(&'a dyn Fn(u64, u64));

impl Progress for Forwarder<'_> {
    fn advance(&self, done: u64, total: u64) {
        (self.0)(done, total);
    }
}

fn load(
    config: &Config,
    states: Option<watch::Receiver<Arc<State>>>,
    progress: &dyn Fn(u64, u64),
) -> Result<Loaded, Error> {
    let device = trunk::open_device(config)?;
    let checkpoint = Checkpoint::open(&config.model)?;
    let kernels = kernels::select(config.weights, threads(config))
        .map_err(|error| Error::Config(format!("weights: {error}")))?;
    let weights = CoordinatorWeights::load(&checkpoint, kernels.as_ref(), &Forwarder(progress))?;
    let states = match states {
        Some(states) => states,
        None => {
            let state = entente_expert_node::found(&config.cluster, &checkpoint, config.weights)?;
            // Nobody holds the sender: this state is the last.
            watch::channel(Arc::new(state)).1
        }
    };
    let shape = ModelShape {
        layers: checkpoint.architecture().moe_layers().collect(),
        expert_bytes: expert_bytes(&checkpoint, config.weights)?,
    };
    let served = ServedModel {
        digest: checkpoint.digest(),
        shape,
        manifest_sha256: checkpoint.manifest(config.weights).map(|manifest| manifest.sha256()),
    };
    let own_bytes = weights.bytes() as u64;
    let step_weights_bytes = own_bytes - weights.embed.bytes() as u64;
    let experts = expert_kernels(config, &kernels, device.as_ref())?;
    // Before the trunk, whose cache may take all that is left of a device.
    let local = local_nodes(config, &states.borrow().clone(), &checkpoint, &experts)?;
    let nccl = device.as_ref().and_then(|device| nccl(config, device));
    let room = nccl.as_ref().map(Nccl::room).transpose();
    let room = room.map_err(|source| trunk::device_error(config, source))?;
    let architecture = checkpoint.architecture();
    let (trunk, blocks) = trunk::trunk(config, architecture, weights, kernels.clone(), device)?;
    drop(room);
    Ok(Loaded {
        tokenizer: Tokenizer::open(&config.model, architecture)?,
        template: ChatTemplate::open(&config.model)?,
        generation: GenerationConfig::open(&config.model, architecture)?,
        trunk,
        blocks,
        own_bytes,
        step_weights_bytes,
        kernels,
        expert_class: experts.class().clone(),
        served,
        states,
        nccl,
        local,
        checkpoint,
    })
}

/// What rows may travel by besides the network. That NCCL is missing where it was asked for is no reason
/// not to serve, but one to say so.
fn nccl(config: &Config, device: &Arc<Device>) -> Option<Nccl> {
    let nccl = Nccl::new(config.nccl.as_ref()?, device);
    nccl.inspect_err(|error| tracing::warn!(%error, "rows travel over the network only")).ok()
}

/// What experts are computed with, here or elsewhere.
fn expert_kernels(
    config: &Config,
    kernels: &Arc<dyn Kernels>,
    device: Option<&Arc<Device>>,
) -> Result<Arc<dyn ExpertKernels>, Error> {
    match device {
        Some(device) if config.transport == Transport::Inproc => {
            let experts = cuda::experts(device, config.weights);
            experts.map_err(|source| trunk::device_error(config, source))
        }
        // Nodes of this process share the kernels' threads: the engine waits while they compute.
        _ => Ok(kernels.clone()),
    }
}

/// The expert nodes of the region, if they run in this process.
fn local_nodes(
    config: &Config,
    state: &State,
    checkpoint: &Checkpoint,
    kernels: &Arc<dyn ExpertKernels>,
) -> Result<BTreeMap<NodeId, NodeHandle>, Error> {
    if config.transport != Transport::Inproc {
        return Ok(BTreeMap::new());
    }
    let nodes = state.nodes().filter(|node| node.spec.region == config.region);
    let start = |node: &Node| {
        let kernels = kernels.clone();
        Ok((node.id, ExpertNode::start(&node.spec.name, state, checkpoint, kernels, &())?))
    };
    nodes.map(start).collect()
}

fn threads(config: &Config) -> usize {
    let cores = || std::thread::available_parallelism().map_or(1, usize::from);
    config.threads.unwrap_or_else(cores)
}

/// How the expert nodes are reached.
fn opener(
    config: &Config,
    credentials: Option<Credentials>,
    loaded: &Loaded,
    metrics: &Metrics,
) -> Opener {
    Opener {
        transport: config.transport,
        roster: config.cluster.clone(),
        via: config.membership.as_ref().map(|own| own.via.clone()).unwrap_or_default(),
        credentials,
        local: loaded.local.clone(),
        runtime: tokio::runtime::Handle::current(),
        nccl: loaded.nccl.clone().map(|nccl| (nccl, metrics.nccl.clone())),
    }
}

/// Links the engine to the expert nodes of the coordinator's region.
fn connect(
    config: &Config,
    opener: Opener,
    loaded: &Loaded,
    metrics: &Arc<Metrics>,
) -> Result<Exchanger, Error> {
    let kernels = loaded.kernels.clone();
    let model = Model {
        digest: loaded.checkpoint.digest(),
        kernel_class: loaded.expert_class.clone(),
        layers: loaded.checkpoint.architecture().moe_layers().collect(),
    };
    let states = loaded.states.clone();
    let cluster = Cluster::open(opener, (config.region, model), states, metrics.clone())?;
    let deadline = Duration::from_millis(config.engine.exchange_deadline_ms);
    Ok(Exchanger::new(cluster, kernels, deadline, metrics.clone()))
}

/// Reads what `[tls]` names, and checks that it was issued to this coordinator.
pub(crate) fn credentials(config: &Config) -> Result<Option<Credentials>, Error> {
    let Some(files) = &config.tls else { return Ok(None) };
    let credentials = Credentials::load(files)?;
    let member = Some((config.region, config.name.clone()));
    credentials.belong_to(&config.cluster.expect(Role::Coordinator, member))?;
    Ok(Some(credentials))
}

/// The ledger, with what its records say of this process.
fn books(
    config: &Config,
    ledger: Ledger,
    credentials: Option<Credentials>,
    loaded: &Loaded,
) -> Books {
    let (node, region) = (config.name.clone(), config.region);
    let facts = Facts {
        coordinator: record::Coordinator { node, region, certificate: None },
        model: record::Digest(loaded.checkpoint.digest().0),
        kernel_class: loaded.trunk.class().to_string(),
    };
    Books::new(ledger, facts, credentials)
}

fn start_engine(
    config: &Config,
    loaded: Loaded,
    (exchanger, closings): (Exchanger, Option<Sender<Closed>>),
    (access, books, credentials): (Access, Option<Books>, Option<Credentials>),
    metrics: Arc<Metrics>,
) -> Result<Api, Error> {
    let (architecture, blocks) = (loaded.checkpoint.architecture(), loaded.blocks);
    let context_len = architecture.max_positions.min(blocks * BLOCK_LEN);
    let tokenizer = Arc::new(loaded.tokenizer);
    let micro_batch_rows_min = config.engine.micro_batch_rows_min;
    let forward = Forward::new(architecture, loaded.trunk, micro_batch_rows_min, metrics.clone());
    let scheduler = SchedulerConfig {
        step_rows_max: config.engine.step_rows_max,
        prefill_rows_beside_decode_max: config.engine.prefill_rows_beside_decode_max,
        running_max: config.engine.running_max,
        waiting_max: config.engine.waiting_max,
        tenant_waiting_max: config.engine.tenant_waiting_max,
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
        kernels: loaded.kernels,
        tokenizer: tokenizer.clone(),
        request_wait_max: Duration::from_millis(config.engine.request_wait_max_ms),
        closings,
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
        vocab: architecture.vocab,
        created_s: api::now_s(),
        home: config.region,
        endpoints: config.api.endpoints.clone(),
        access,
        books,
        metrics,
        credentials,
        refused_connections: Arc::default(),
        strangers: Mutex::default(),
        body_wait_max: Duration::from_millis(config.api.body_wait_max_ms),
    })
}

fn model_name(config: &Config) -> String {
    let folder = || config.model.file_name().map(|name| name.to_string_lossy().into_owned());
    config.served_model_name.clone().or_else(folder).unwrap_or_else(|| "model".to_owned())
}
