//! A control plane that does what a test says: one voter, whose state is real and whose decisions
//! are the test's.

use std::collections::BTreeSet;
use std::net::TcpListener;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use entente_membership::audit::Sink;
use entente_membership::guard::Guard;
use entente_membership::net::{Bounds, Reason, accept};
use entente_membership::roster::Roster;
use entente_membership::state::{
    Applied, Command, Expect, NodeSpec, NodeState, Request, Role, SessionId, State,
};
use entente_proto::ids::{ExpertId, LayerId, NodeId, NodeName};
use entente_proto::placement::{ExpertKey, Placement};
use entente_proto::wire;
use entente_proto::wire::membership_server::{Membership, MembershipServer};
use entente_tls::Credentials;
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Server;
use tonic::{Request as Call, Response, Status, Streaming};

pub const PATIENCE: Duration = Duration::from_secs(20);

/// What the leader says to the node.
#[derive(Clone, Default)]
pub struct Wishes {
    pub wanted: BTreeSet<ExpertKey>,
    pub dismissed: bool,
}

/// What outlives a voter that is killed.
pub struct Plane {
    name: NodeName,
    digest: Vec<u8>,
    /// The session in which the plane proposes, and the next sequence.
    log: Mutex<(SessionId, u64)>,
    state: watch::Sender<State>,
    wishes: watch::Sender<Wishes>,
    reports: watch::Sender<Vec<wire::HeartbeatReport>>,
    /// How many of them the test has gone past.
    heard: Mutex<usize>,
}

/// A voter that answers, on a runtime of its own; dropped, it closes its sockets as a killed process
/// does.
pub struct Voter(Option<Runtime>);

impl Drop for Voter {
    fn drop(&mut self) {
        self.0.take().into_iter().for_each(Runtime::shutdown_background);
    }
}

impl Plane {
    /// The plane of the cluster that `roster` founds, for a node of this name.
    pub fn new(roster: &Roster, name: &NodeName, digest: &[u8]) -> Arc<Self> {
        let plane = Self {
            name: name.clone(),
            digest: digest.to_vec(),
            log: Mutex::default(),
            state: watch::Sender::new(State::genesis(roster.specs()).unwrap()),
            wishes: watch::Sender::default(),
            reports: watch::Sender::default(),
            heard: Mutex::default(),
        };
        plane.commit(Command::OpenSession);
        Arc::new(plane)
    }

    pub fn serve(self: &Arc<Self>, listener: TcpListener, own: &Credentials) -> Voter {
        let runtime = Runtime::new().unwrap();
        let (control, own) = (MembershipServer::new(Control(self.clone())), own.clone());
        listener.set_nonblocking(true).unwrap();
        runtime.spawn(async move {
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            let guard = Guard::new(own.identity(), Sink::default());
            let incoming = accept(listener, &own, guard, Bounds::default()).unwrap().members;
            Server::builder().serve_with_incoming(control, incoming).await.unwrap();
        });
        Voter(Some(runtime))
    }

    pub fn commit(&self, command: Command) -> Applied {
        let mut log = self.log.lock().unwrap();
        let (session, sequence) = *log;
        let request = Request { session, sequence, at_ms: 1, expect: Expect::default(), command };
        let mut applied = None;
        self.state.send_modify(|state| {
            let index = state.applied_index() + 1;
            applied = state.apply_entry(index, Some(request)).unwrap();
        });
        let applied = applied.unwrap().unwrap();
        *log = match applied {
            Applied::Session(session) => (session, 1),
            _ => (session, sequence + 1),
        };
        applied
    }

    pub fn state(&self) -> State {
        self.state.borrow().clone()
    }

    pub fn node(&self) -> NodeId {
        self.state.borrow().node(&self.name).expect("it has registered").id
    }

    pub fn place(&self, experts: &BTreeSet<ExpertKey>) {
        let mut placement = Placement::new();
        for expert in experts {
            placement.add(*expert, self.node());
        }
        self.commit(Command::SetPlacement(placement));
    }

    pub fn set_state(&self, state: NodeState) {
        self.commit(Command::SetState(self.node(), state));
    }

    /// Another node of the region, which takes traffic and on which these experts are placed.
    pub fn add_peer(&self, name: &NodeName, address: &str, experts: &BTreeSet<ExpertKey>) {
        let Applied::Added(node) = self.commit(Command::AddNode(NodeSpec {
            name: name.clone(),
            region: "fr".parse().unwrap(),
            site: String::new(),
            role: Role::ExpertNode,
            address: address.to_owned(),
            memory_bytes: None,
            kernel_class: String::new(),
            device: None,
        })) else {
            panic!("{name} was not added")
        };
        self.commit(Command::Register(node));
        self.commit(Command::SetState(node, NodeState::Active));
        let mut placement = Placement::clone(self.state().placement());
        for expert in experts {
            placement.add(*expert, node);
        }
        self.commit(Command::SetPlacement(placement));
    }

    pub fn want(&self, wanted: &BTreeSet<ExpertKey>) {
        self.wishes.send_modify(|wishes| wishes.wanted = wanted.clone());
    }

    pub fn dismiss(&self) {
        self.wishes.send_modify(|wishes| wishes.dismissed = true);
    }

    /// The first report that is as described, after the last one that was waited for.
    pub async fn reported(
        &self,
        what: &str,
        is: impl Fn(&wire::HeartbeatReport) -> bool,
    ) -> wire::HeartbeatReport {
        let from = *self.heard.lock().unwrap();
        let mut reports = self.reports.subscribe();
        let all = timeout(PATIENCE, reports.wait_for(|all| all[from..].iter().any(&is))).await;
        let last = || self.reports.borrow().last().cloned();
        let all = all.unwrap_or_else(|_| panic!("never {what}, but at last {:?}", last())).unwrap();
        let at = from + all[from..].iter().position(is).unwrap();
        *self.heard.lock().unwrap() = at + 1;
        all[at].clone()
    }

    fn answer(
        &self,
        report: wire::HeartbeatReport,
        told: &mut Option<BTreeSet<ExpertKey>>,
    ) -> Result<wire::HeartbeatOrders, Status> {
        let state = self.state();
        let node = state.node_by_id(NodeId(report.node)).expect("it has registered");
        let latest = node.incarnation.map(|incarnation| incarnation.0);
        if latest != Some(report.incarnation) || node.state == NodeState::Down {
            return Err(Reason::Fenced.status("another start"));
        }
        let Wishes { wanted, dismissed } = self.wishes.borrow().clone();
        let news = (told.as_ref() != Some(&wanted)).then(|| pack(&wanted).into());
        *told = Some(wanted);
        let orders = wire::HeartbeatOrders {
            sequence: report.sequence,
            membership_epoch: state.membership_epoch().0,
            placement_epoch: state.placement_epoch().0,
            wanted: news,
            dismissed,
        };
        self.reports.send_modify(|reports| reports.push(report));
        Ok(orders)
    }
}

struct Control(Arc<Plane>);

#[tonic::async_trait]
impl Membership for Control {
    async fn register(
        &self,
        call: Call<wire::RegisterRequest>,
    ) -> Result<Response<wire::RegisterReply>, Status> {
        let (plane, said) = (&self.0, call.into_inner());
        if said.model_digest != plane.digest {
            return Err(Reason::OtherModel.status("the cluster serves another model"));
        }
        if plane.state().node(&plane.name).is_none() {
            plane.commit(Command::AddNode(NodeSpec {
                name: plane.name.clone(),
                region: "fr".parse().unwrap(),
                site: said.site,
                role: Role::ExpertNode,
                address: said.address.clone(),
                memory_bytes: said.memory_bytes,
                kernel_class: said.kernel_class.clone(),
                device: None,
            }));
        }
        let applied = plane.commit(Command::RegisterWith {
            node: plane.node(),
            address: said.address,
            memory_bytes: said.memory_bytes,
            kernel_class: said.kernel_class,
            device: None,
        });
        let Applied::Registered(incarnation) = applied else { panic!("{applied:?}") };
        let node = plane.node().0;
        Ok(Response::new(wire::RegisterReply { node, incarnation: incarnation.0 }))
    }

    type HeartbeatStream = ReceiverStream<Result<wire::HeartbeatOrders, Status>>;

    async fn heartbeat(
        &self,
        call: Call<Streaming<wire::HeartbeatReport>>,
    ) -> Result<Response<Self::HeartbeatStream>, Status> {
        let (plane, mut reports) = (self.0.clone(), call.into_inner());
        let (answers, orders) = mpsc::channel(4);
        tokio::spawn(async move {
            let mut told = None;
            while let Ok(Some(report)) = reports.message().await {
                let answer = plane.answer(report, &mut told);
                let ends = answer.is_err();
                if answers.send(answer).await.is_err() || ends {
                    return;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(orders)))
    }

    type WatchStream = ReceiverStream<Result<wire::WatchUpdate, Status>>;

    async fn watch(
        &self,
        _: Call<wire::WatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let mut states = self.0.state.subscribe();
        let (updates, stream) = mpsc::channel(4);
        tokio::spawn(async move {
            loop {
                let state = states.borrow_and_update().clone();
                let (applied_index, state) = (state.applied_index(), Some(state.sealed()));
                let update = wire::WatchUpdate { applied_index, state };
                if updates.send(Ok(update)).await.is_err() || states.changed().await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn propose(
        &self,
        _: Call<wire::ProposeRequest>,
    ) -> Result<Response<wire::ProposeReply>, Status> {
        Err(Status::permission_denied("nodes propose nothing"))
    }
}

pub fn pack(experts: &BTreeSet<ExpertKey>) -> Vec<u8> {
    let pair = |(layer, expert): &ExpertKey| [layer.0.to_le_bytes(), expert.0.to_le_bytes()];
    experts.iter().flat_map(pair).flatten().collect()
}

pub fn experts(layer: u16, ids: std::ops::Range<u16>) -> BTreeSet<ExpertKey> {
    ids.map(|id| (LayerId(layer), ExpertId(id))).collect()
}
