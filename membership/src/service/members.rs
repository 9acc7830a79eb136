//! What nodes, operators and other voters ask: to register, to report, to watch, to propose.

use std::sync::Mutex;
use std::time::Duration;

use entente_proto::identity::{Identity, Role};
use entente_proto::wire;
use entente_proto::wire::membership_server;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming, async_trait};

use super::heartbeat;
use super::shared::Shared;
use super::steward_shell::Ask;
use crate::audit::in_words;
use crate::guard::caller;
use crate::net::Reason;
use crate::raft::{self, NotProposed};
use crate::served::ServedModel;
use crate::state::codec::{device_in, outcome_out};
use crate::state::{self, Applied, Command, Expect, NodeSpec, Outcome, Refused, State};

const PROPOSE: &str = "/entente.v1.Membership/Propose";
/// How long a proposal is waited for; a client that has less time goes away earlier.
const PROPOSAL_MAX: Duration = Duration::from_secs(10);
/// A voter that knows no leader for so long may be cut off: others know more.
const LEADERLESS_MAX: Duration = Duration::from_secs(1);

pub(super) struct Members {
    shared: Shared,
    /// The latest state as it is sent, made once for all who watch.
    sealed: std::sync::Arc<Mutex<Option<wire::WatchUpdate>>>,
}

impl Members {
    pub(super) fn new(shared: Shared) -> Self {
        Self { shared, sealed: std::sync::Arc::default() }
    }
}

#[async_trait]
impl membership_server::Membership for Members {
    type HeartbeatStream = ReceiverStream<Result<wire::HeartbeatOrders, Status>>;
    type WatchStream = ReceiverStream<Result<wire::WatchUpdate, Status>>;

    async fn register(
        &self,
        request: Request<wire::RegisterRequest>,
    ) -> Result<Response<wire::RegisterReply>, Status> {
        let caller = caller(&request)?;
        let shared = &self.shared;
        shared.expect_leader()?;
        let said = request.into_inner();
        check_model(&shared.state(), &said)?;
        let node = self.member(&caller, &said).await?;
        let command = Command::RegisterWith {
            node,
            address: said.address,
            memory_bytes: said.memory_bytes,
            kernel_class: said.kernel_class,
            device: said.device.map(device_in),
        };
        match self.propose_here(command).await? {
            Applied::Registered(incarnation) => {
                tracing::info!(node = %caller.node, %incarnation, "a node has registered");
                let (node, incarnation) = (node.0, incarnation.0);
                Ok(Response::new(wire::RegisterReply { node, incarnation }))
            }
            _ => Err(Status::internal("another outcome than an incarnation")),
        }
    }

    async fn heartbeat(
        &self,
        request: Request<Streaming<wire::HeartbeatReport>>,
    ) -> Result<Response<Self::HeartbeatStream>, Status> {
        let caller = caller(&request)?;
        self.shared.expect_leader()?;
        let (answers, stream) = mpsc::channel(1);
        let heartbeat = heartbeat::Heartbeat::new(self.shared.clone(), caller);
        tokio::spawn(heartbeat.run(request.into_inner(), answers));
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn watch(
        &self,
        request: Request<wire::WatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let after_index = request.into_inner().after_index;
        let (updates, stream) = mpsc::channel(1);
        let (shared, sealed) = (self.shared.clone(), self.sealed.clone());
        tokio::spawn(async move {
            tokio::select! {
                ended = watch(&shared, &sealed, after_index, &updates) => {
                    let _ = updates.send(Err(ended)).await;
                }
                () = updates.closed() => {}
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn propose(
        &self,
        request: Request<wire::ProposeRequest>,
    ) -> Result<Response<wire::ProposeReply>, Status> {
        let missing = || Status::invalid_argument("there is no request");
        let caller = caller(&request)?;
        let request = request.into_inner().request.ok_or_else(missing)?;
        let request = state::Request::from_wire(request);
        let request = request.map_err(|error| Status::invalid_argument(error.to_string()))?;
        let command = in_words(&request.command);
        let ordered = caller.role == Role::Operator && request.command != Command::OpenSession;
        let proposed = timeout(PROPOSAL_MAX, self.shared.owner.propose(request)).await;
        let unknown = || Reason::UnknownOutcome.status("it may be committed or not; ask again");
        let proposed = proposed.ok().flatten().ok_or_else(unknown)?;
        let (index, outcome) = proposed.map_err(|error| not_proposed(&self.shared, &error))?;
        if ordered {
            self.shared.guard.obey(&caller, PROPOSE, &command);
        }
        let outcome = Some(outcome_out(&outcome));
        Ok(Response::new(wire::ProposeReply { index, outcome }))
    }
}

/// Why a proposal was not made, as a status.
pub(super) fn not_proposed(shared: &Shared, error: &NotProposed) -> Status {
    match error {
        NotProposed::NotLeader { .. } => shared.not_leader(),
        NotProposed::Busy => Status::resource_exhausted(error.to_string()),
        NotProposed::TooLong(_) => Status::invalid_argument(error.to_string()),
        NotProposed::ChangeUnderWay => Status::aborted(error.to_string()),
        NotProposed::Change(_) => Status::failed_precondition(error.to_string()),
    }
}

impl Members {
    /// The number of the caller's node, which becomes a member if it is none.
    async fn member(
        &self,
        caller: &Identity,
        said: &wire::RegisterRequest,
    ) -> Result<entente_proto::ids::NodeId, Status> {
        let state = self.shared.state();
        if let Some(node) = state.node(&caller.node) {
            let (region, role) = (node.spec.region, node.spec.role);
            if region != caller.region || role != state::Role::ExpertNode {
                let text = format!("{} is a member already, {role:?} in {region}", caller.node);
                return Err(Status::failed_precondition(text));
            }
            return Ok(node.id);
        }
        let spec = NodeSpec {
            name: caller.node.clone(),
            region: caller.region,
            site: said.site.clone(),
            role: state::Role::ExpertNode,
            address: said.address.clone(),
            memory_bytes: said.memory_bytes,
            kernel_class: said.kernel_class.clone(),
            device: said.device.clone().map(device_in),
        };
        match self.propose_here(Command::AddNode(spec)).await? {
            Applied::Added(node) => Ok(node),
            _ => Err(Status::internal("another outcome than a node's number")),
        }
    }

    async fn propose_here(&self, command: Command) -> Result<Applied, Status> {
        let propose = |answer| Ask::Propose(Expect::default(), Box::new(command), answer);
        let asked = self.shared.steward.ask(propose).await;
        let unknown = || Reason::UnknownOutcome.status("it may be committed or not; ask again");
        let outcome: Option<Outcome> = asked.ok_or_else(|| self.shared.not_leader())?;
        let refused = |refused: Refused| Status::failed_precondition(refused.text);
        outcome.ok_or_else(unknown)?.map_err(refused)
    }
}

/// A node that has another model or other weights than the cluster serves would compute other rows.
fn check_model(state: &State, said: &wire::RegisterRequest) -> Result<(), Status> {
    match ServedModel::of(state) {
        Some(Ok(model)) => model
            .admits(&said.model_digest, said.manifest_sha256.as_deref())
            .map_err(|differs| Reason::OtherModel.status(differs.to_string())),
        // Until a coordinator has said what is served, the exchange's own fence is the one there is.
        _ => Ok(()),
    }
}

/// Sends the latest state whenever it is newer than the one before; what comes in between while
/// the watcher is slow, it never sees. Returns why it ended.
async fn watch(
    shared: &Shared,
    sealed: &Mutex<Option<wire::WatchUpdate>>,
    mut sent_index: u64,
    updates: &mpsc::Sender<Result<wire::WatchUpdate, Status>>,
) -> Status {
    let (mut states, mut status) = (shared.state.clone(), shared.status.clone());
    loop {
        let state = states.borrow_and_update().clone();
        if state.applied_index() > sent_index {
            sent_index = state.applied_index();
            if updates.send(Ok(update(&state, sealed))).await.is_err() {
                return Status::cancelled("nobody watches");
            }
        }
        tokio::select! {
            changed = states.changed() => if changed.is_err() {
                return Status::unavailable("the voter has ended");
            },
            () = leaderless(&mut status) => {
                return Status::unavailable("this voter knows no leader");
            }
            () = shared.stopped() => return Status::unavailable("the voter stops"),
        }
    }
}

fn update(state: &State, sealed: &Mutex<Option<wire::WatchUpdate>>) -> wire::WatchUpdate {
    let applied_index = state.applied_index();
    let mut sealed = sealed.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    match &*sealed {
        Some(update) if update.applied_index == applied_index => update.clone(),
        _ => {
            let update = wire::WatchUpdate { applied_index, state: Some(state.sealed()) };
            sealed.insert(update).clone()
        }
    }
}

async fn leaderless(status: &mut watch::Receiver<raft::Status>) {
    loop {
        if status.wait_for(|status| status.leader.is_none()).await.is_err() {
            return;
        }
        let led = status.wait_for(|status| status.leader.is_some());
        if timeout(LEADERLESS_MAX, led).await.is_err() {
            return;
        }
    }
}
