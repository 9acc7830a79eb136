//! A running expert node, and the handle through which both doors reach it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use entente_membership::state::State;
use entente_model::kernels::{self, Kernels};
use entente_model::{Checkpoint, Progress};
use entente_proto::frame::{Answer, Dispatch, Refusal};
use entente_proto::ids::{Fence, Incarnation, NodeName};
use entente_proto::link::NodeInfo;

use crate::core::{NodeFacts, admit};
use crate::store::ExpertStore;
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
        let kernels = kernels::select(config.weights, config.thread_count())?;
        Self::start(&config.name, &state, &checkpoint, kernels, progress)
    }

    /// The same for a node of a cluster whose state is known, with a model that is open.
    pub fn start(
        name: &NodeName,
        state: &State,
        checkpoint: &Checkpoint,
        kernels: Arc<dyn Kernels>,
        progress: &dyn Progress,
    ) -> Result<NodeHandle, Error> {
        let node = state.node(name).ok_or_else(|| Error::NotAMember(name.clone()))?;
        let placed = state.placement().experts_of(node.id);
        let store = ExpertStore::load(checkpoint, kernels.as_ref(), &placed, progress)?;
        let facts = NodeFacts {
            region: node.spec.region,
            fence: Fence {
                membership_epoch: state.membership_epoch(),
                placement_epoch: state.placement_epoch(),
                incarnation: mint_incarnation(),
                model_digest: checkpoint.digest(),
            },
            hidden: checkpoint.architecture().hidden,
            dtype: kernels.row_dtype(),
            layers: checkpoint.architecture().moe_layers().collect(),
            held: store.keys(),
        };
        let info = NodeInfo {
            name: name.clone(),
            region: facts.region,
            fence: facts.fence,
            kernel_class: kernels.class().clone(),
            experts: facts.held.clone(),
            weights_bytes: store.bytes(),
        };
        let queue = Queue::start(kernels, store).map_err(Error::Thread)?;
        let draining = AtomicBool::new(false);
        Ok(NodeHandle(Arc::new(Node { info, facts, queue, draining })))
    }
}

/// Tells one start from the next: nanoseconds since 1970, until raft mints the number.
fn mint_incarnation() -> Incarnation {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Incarnation(u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
}

struct Node {
    info: NodeInfo,
    facts: NodeFacts,
    queue: Queue,
    draining: AtomicBool,
}

/// The way to a running node. When the last handle is dropped, computing stops.
#[derive(Clone)]
pub struct NodeHandle(Arc<Node>);

impl NodeHandle {
    /// What the node says of itself.
    pub fn info(&self) -> NodeInfo {
        self.0.info.clone()
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
        let draining = self.0.draining.load(Ordering::Relaxed);
        let (exchange, fence) = (frame.exchange, Some(self.0.facts.fence));
        let refuse = |reply: Reply, refusal| {
            reply(Answer { exchange, fence, result: Err(refusal) });
        };
        if let Err(refusal) = admit(&frame, &self.0.facts, draining) {
            return refuse(reply, refusal);
        }
        let due = Instant::now() + Duration::from_millis(frame.deadline_ms.into());
        if let Err(reply) = push(&self.0.queue, Work { frame, due, reply }) {
            refuse(reply, Refusal::Busy);
        }
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
