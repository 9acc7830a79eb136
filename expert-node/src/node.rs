//! A running expert node, and the handle through which both doors reach it.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use entente_membership::state::State;
use entente_model::kernels::{DeviceError, ExpertKernels, GatedFfn, WeightFormat};
use entente_model::packed::Manifest;
use entente_model::{Checkpoint, Progress, load_experts};
use entente_proto::frame::{Answer, Dispatch, Refusal};
use entente_proto::ids::{
    Fence, Incarnation, KernelClass, MembershipEpoch, ModelDigest, NodeName, PlacementEpoch,
    Region, RequestId,
};
use entente_proto::link::NodeInfo;
use entente_proto::placement::ExpertKey;
use entente_proto::statement::Statement;
use tokio::sync::watch;

use crate::account::Account;
use crate::core::{NodeFacts, Standing, admit};
use crate::counters::Counters;
use crate::health::Health;
use crate::lanes::NcclUse;
use crate::member::Loader;
use crate::nccl::Nccl;
use crate::store::{Expert, ExpertStore};
use crate::worker::{Queue, Work};
use crate::{Config, Error, cluster};

/// Takes the one answer to a frame. Called from the compute thread or from within
/// [`NodeHandle::submit`]; must not block.
pub type Reply = Box<dyn FnOnce(Answer) + Send>;

/// Brings expert nodes to life.
pub struct ExpertNode;

impl ExpertNode {
    /// Opens the model, loads the experts that are placed on the node and starts computing. Blocks
    /// for as long as loading takes; `progress` counts experts.
    pub fn load(config: &Config, progress: &dyn Progress) -> Result<NodeHandle, Error> {
        config.check()?;
        let checkpoint = Checkpoint::open(&config.model)?;
        let state = cluster::found(&config.cluster, &checkpoint, config.weights)?;
        let kernels = config.kernels()?;
        let nccl = config.nccl(kernels.as_ref());
        let node = Self::start(&config.name, &state, &checkpoint, kernels, progress)?;
        nccl.into_iter().for_each(|nccl| node.exchange_by(nccl));
        Ok(node)
    }

    /// The same for a node of a cluster whose state is known, with a model that is open.
    pub fn start(
        name: &NodeName,
        state: &State,
        checkpoint: &Checkpoint,
        kernels: Arc<dyn ExpertKernels>,
        progress: &dyn Progress,
    ) -> Result<NodeHandle, Error> {
        let member = state.node(name).ok_or_else(|| Error::NotAMember(name.clone()))?;
        let placed = state.placement().experts_of(member.id);
        let experts = load_experts(checkpoint, kernels.as_ref(), &placed, progress)?;
        let node = Self::empty(name, member.spec.region, checkpoint, kernels)?;
        node.hold(experts);
        node.saw(state.membership_epoch(), state.placement_epoch());
        node.adopt(mint_incarnation());
        Ok(node)
    }

    /// A node that holds nothing and has no incarnation yet.
    pub(crate) fn empty(
        name: &NodeName,
        region: Region,
        checkpoint: &Checkpoint,
        kernels: Arc<dyn ExpertKernels>,
    ) -> Result<NodeHandle, Error> {
        let facts = NodeFacts {
            region,
            hidden: checkpoint.architecture().hidden,
            dtype: kernels.row_dtype(),
            layers: checkpoint.architecture().moe_layers().collect(),
        };
        let (account, health) = (Arc::new(Account::default()), Arc::new(Health::default()));
        let queue = Queue::start(kernels.clone(), account.clone(), health.clone());
        Ok(NodeHandle(Arc::new(Node {
            name: name.clone(),
            kernel_class: kernels.class().clone(),
            format: kernels.format(),
            manifest: checkpoint.manifest(kernels.format()).cloned(),
            counters: Arc::default(),
            loader: OnceLock::new(),
            model_digest: checkpoint.digest(),
            facts,
            store: ExpertStore::default(),
            queue: queue.map_err(Error::Thread)?,
            account,
            health,
            incarnation: watch::Sender::new(Incarnation::default()),
            membership_epoch: AtomicU64::new(0),
            placement_epoch: AtomicU64::new(0),
            draining: AtomicBool::new(false),
            nccl: OnceLock::new(),
            nccl_use: Arc::default(),
        })))
    }
}

/// Tells one start from the next where no raft group mints the number: nanoseconds since 1970.
fn mint_incarnation() -> Incarnation {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Incarnation(u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
}

struct Node {
    name: NodeName,
    kernel_class: KernelClass,
    format: WeightFormat,
    model_digest: ModelDigest,
    /// What each expert is, if the model folder says it.
    manifest: Option<Arc<Manifest>>,
    counters: Arc<Counters>,
    /// What brings experts from the model folder, for peers that have none.
    loader: OnceLock<Arc<Loader>>,
    facts: NodeFacts,
    store: ExpertStore,
    queue: Queue,
    account: Arc<Account>,
    health: Arc<Health>,
    /// Whoever was greeted under an earlier one must be greeted again, so doors watch it.
    incarnation: watch::Sender<Incarnation>,
    /// The highest epochs seen. They count up on their own: nothing else is read by them.
    membership_epoch: AtomicU64,
    placement_epoch: AtomicU64,
    draining: AtomicBool,
    /// What rows may travel by besides the network, or why by nothing.
    nccl: OnceLock<Result<Nccl, String>>,
    nccl_use: Arc<NcclUse>,
}

/// Why rows travel over the network where nothing else was configured.
const NO_NCCL: &str = "this node has no section [nccl]";

/// The way to a running node. When the last handle is dropped, computing stops.
#[derive(Clone)]
pub struct NodeHandle(Arc<Node>);

impl NodeHandle {
    /// What the node says of itself.
    pub fn info(&self) -> NodeInfo {
        let node = &self.0;
        NodeInfo {
            name: node.name.clone(),
            region: node.facts.region,
            fence: self.standing().fence,
            kernel_class: node.kernel_class.clone(),
            experts: node.store.keys(),
            weights_bytes: node.store.bytes(),
        }
    }

    fn standing(&self) -> Standing {
        let node = &self.0;
        let fence = Fence {
            membership_epoch: MembershipEpoch(node.membership_epoch.load(Ordering::Relaxed)),
            placement_epoch: PlacementEpoch(node.placement_epoch.load(Ordering::Relaxed)),
            incarnation: *node.incarnation.borrow(),
            model_digest: node.model_digest,
        };
        // What failed is about to end, too.
        let draining = node.draining.load(Ordering::Relaxed) || node.health.has_failed();
        Standing { fence, draining }
    }

    /// Takes a frame, without ever waiting: `reply` gets the rows or the reason why there are none.
    pub fn submit(&self, frame: Dispatch, reply: Reply) {
        self.admit(frame, reply, Queue::push);
    }

    /// The same for a caller that would only wait for the answer: it computes what is queued, this
    /// frame included, on its own thread, unless somebody else is computing.
    pub fn compute(&self, frame: Dispatch, reply: Reply) {
        self.admit(frame, reply, Queue::push_and_compute);
    }

    fn admit(
        &self,
        frame: Dispatch,
        reply: Reply,
        push: impl FnOnce(&Queue, Work) -> Result<(), Reply>,
    ) {
        let node = &self.0;
        let (standing, experts) = (self.standing(), node.store.layer(frame.layer));
        let (exchange, sent) = (frame.exchange, frame.fence);
        let refuse = |reply: Reply, refusal| {
            node.account.refused(&refusal);
            let fence = Some(standing.fence);
            reply(Answer { exchange, fence, result: Err(refusal) });
        };
        let holds = |expert| experts.contains_key(&expert);
        if let Err(refusal) = admit(&frame, &node.facts, &standing, holds) {
            return refuse(reply, refusal);
        }
        self.saw(sent.membership_epoch, sent.placement_epoch);
        let due = Instant::now() + Duration::from_millis(frame.deadline_ms.into());
        if let Err(reply) = push(&node.queue, Work { frame, experts, due, reply }) {
            refuse(reply, Refusal::Busy);
        }
    }

    /// Keeps the highest epochs that anybody has told.
    pub(crate) fn saw(&self, membership: MembershipEpoch, placement: PlacementEpoch) {
        raise(&self.0.membership_epoch, membership.0);
        raise(&self.0.placement_epoch, placement.0);
    }

    /// The node is another start from here on: frames for the one before are refused, and the
    /// connections over which it was greeted end.
    pub fn adopt(&self, incarnation: Incarnation) {
        self.0.incarnation.send_replace(incarnation);
    }

    /// The start that the node is, for whoever greets peers.
    pub(crate) fn incarnation(&self) -> watch::Receiver<Incarnation> {
        self.0.incarnation.subscribe()
    }

    /// Takes further experts in; frames for them are admitted from here on.
    pub(crate) fn hold(&self, experts: BTreeMap<ExpertKey, GatedFfn>) {
        self.0.store.hold(experts, self.0.manifest.as_deref());
    }

    /// The experts that are held.
    pub(crate) fn held(&self) -> BTreeSet<ExpertKey> {
        self.0.store.keys()
    }

    /// An expert that is held.
    pub(crate) fn expert(&self, (layer, expert): ExpertKey) -> Option<Arc<Expert>> {
        self.0.store.layer(layer).get(&expert).cloned()
    }

    /// Whether an expert in memory is still what it should be, which one that has gone is.
    pub(crate) fn is_sound(
        &self,
        key: ExpertKey,
        rest: impl FnMut(usize),
    ) -> Result<bool, DeviceError> {
        let Some(expert) = self.expert(key) else { return Ok(true) };
        let is_sound = expert.is_sound(rest)?;
        self.0.counters.count_scrubbed(is_sound);
        Ok(is_sound)
    }

    /// Counts what befalls weights here.
    pub fn counters(&self) -> &Arc<Counters> {
        &self.0.counters
    }

    /// What brings experts from the model folder, once it is known.
    pub(crate) fn loader(&self) -> Option<Arc<Loader>> {
        self.0.loader.get().cloned()
    }

    /// Says what brings experts from the model folder; only the first time counts.
    pub(crate) fn lend_from(&self, loader: Arc<Loader>) {
        let _ = self.0.loader.set(loader);
    }

    /// Says whether rows may travel by NCCL, or why not; only the first time counts.
    pub fn exchange_by(&self, nccl: Result<Nccl, String>) {
        let _ = self.0.nccl.set(nccl);
    }

    /// What rows may travel by besides the network.
    pub(crate) fn nccl(&self) -> Result<&Nccl, String> {
        let nccl = self.0.nccl.get().map(Result::as_ref);
        nccl.unwrap_or(Err(&NO_NCCL.to_owned())).map_err(Clone::clone)
    }

    /// Counts what travels by it.
    pub(crate) fn nccl_use(&self) -> &Arc<NcclUse> {
        &self.0.nccl_use
    }

    /// How weights are kept.
    pub(crate) fn format(&self) -> WeightFormat {
        self.0.format
    }

    /// What the model folder says that its weights are.
    pub(crate) fn manifest(&self) -> Option<&Arc<Manifest>> {
        self.0.manifest.as_ref()
    }

    /// Lets experts go. Frames that were admitted before are still computed.
    pub(crate) fn release(&self, experts: &BTreeSet<ExpertKey>) {
        self.0.store.release(experts);
    }

    /// Rows computed by each expert since the last call.
    pub(crate) fn take_rows(&self) -> Vec<(ExpertKey, u64)> {
        self.0.store.take_rows()
    }

    /// Which model it is, and with which kernels.
    pub(crate) fn model(&self) -> (ModelDigest, &KernelClass) {
        (self.0.model_digest, &self.0.kernel_class)
    }

    /// What the node has computed for these requests, in its own words.
    pub fn statement(&self, requests: &[RequestId]) -> Statement {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Statement {
            node: self.0.name.clone(),
            region: self.0.facts.region,
            incarnation: *self.0.incarnation.borrow(),
            at_ms: u64::try_from(since.as_millis()).unwrap_or(u64::MAX),
            rows: self.0.account.rows_of(requests),
        }
    }

    /// What the node has done.
    pub(crate) fn account(&self) -> &Account {
        &self.0.account
    }

    /// Whether the device still does what it is asked.
    pub(crate) fn health(&self) -> &Health {
        &self.0.health
    }

    /// Whether new frames are refused because the node is about to end.
    pub(crate) fn is_draining(&self) -> bool {
        self.0.draining.load(Ordering::Relaxed)
    }

    /// Refuses new frames from now on; what is queued is still computed.
    pub fn drain(&self) {
        self.0.draining.store(true, Ordering::Relaxed);
    }

    /// Resolves once nothing is queued or computed.
    pub async fn idle(&self) {
        self.0.queue.idle().await;
    }
}

/// Almost always it is there already, and a plain read costs frames on other threads nothing.
fn raise(epoch: &AtomicU64, seen: u64) {
    if epoch.load(Ordering::Relaxed) < seen {
        epoch.fetch_max(seen, Ordering::Relaxed);
    }
}
