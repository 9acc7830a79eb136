//! The control plane of a cluster on this machine, as an operator meets it: who leads, what is
//! committed, and whether anything can be.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use entente_membership::client::Client;
use entente_membership::net::Reason;
use entente_membership::state::{Applied, Command, Expect, NodeState, Role, State};
use entente_proto::ids::{NodeId, NodeName};
use entente_proto::placement::ExpertKey;
use entente_proto::wire::admin_client::AdminClient;
use entente_proto::wire::{StatusReply, StatusRequest};
use entente_tls::Credentials;
use tokio::runtime::{Handle, Runtime};
use tokio::sync::watch;
use tokio::time::timeout;

use super::board::Board;
use super::history::Write;
use crate::cluster::data_dir::ClusterFile;
use crate::cluster::pki;

/// Longest that one look may take.
const LOOK_DEADLINE: Duration = Duration::from_millis(500);

/// How long the first voter may take to answer.
const CONNECT_DEADLINE: Duration = Duration::from_secs(10);

/// Longest that a change may take before its outcome counts as unknown.
const CHANGE_DEADLINE: Duration = Duration::from_secs(5);

/// From one look at the epochs to the next, and from one change of a session to its next.
const EPOCHS_PAUSE: Duration = Duration::from_millis(200);
const WRITE_PAUSE: Duration = Duration::from_millis(20);

/// How long nothing may change for a cluster to be at rest, and how long that may take to come.
const REST: Duration = Duration::from_secs(1);
const REST_DEADLINE: Duration = Duration::from_secs(60);

/// An operator's way to the voters. Calls block.
pub struct Control {
    runtime: Runtime,
    credentials: Credentials,
    addresses: Vec<String>,
    client: Client,
    states: watch::Receiver<Option<Arc<State>>>,
}

/// What the control plane said during a run.
#[derive(Debug, Default)]
pub struct Log {
    /// Membership and placement epoch of whoever led, again and again.
    pub epochs: Vec<(u64, u64)>,
    /// Changes that were made.
    pub writes: Vec<Write>,
    /// Replicas that were placed where they had not been at the look before.
    pub moves: u64,
}

impl Control {
    /// To the voters of the cluster in `data_dir`; none when its members are fixed.
    pub fn connect(data_dir: &Path) -> anyhow::Result<Option<Self>> {
        let control = ClusterFile::read(data_dir)?.control;
        if control.is_empty() {
            return Ok(None);
        }
        let addresses: Vec<String> = control.into_values().collect();
        let credentials = Credentials::load(&pki::files(&data_dir.join("tls"), &pki::operator()))?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .context("cannot start a runtime")?;
        let entered = runtime.enter();
        let client = Client::new(&credentials, addresses.clone())?;
        let mut states = client.watch();
        drop(entered);
        let known = states.wait_for(Option::is_some);
        let known = runtime.block_on(async { timeout(CONNECT_DEADLINE, known).await.is_ok() });
        if !known {
            bail!("no voter tells the committed state");
        }
        Ok(Some(Self { runtime, credentials, addresses, client, states }))
    }

    /// What the leader says of itself; nothing when nobody leads.
    fn leader_status(&self) -> Option<StatusReply> {
        let ask = self.client.leader(LOOK_DEADLINE, |channel| async {
            let status = AdminClient::new(channel).status(StatusRequest {}).await?.into_inner();
            if status.leader == status.voter { Ok(status) } else { Err(Reason::not_leader(None)) }
        });
        self.runtime.block_on(ask).ok()
    }

    /// The name of the voter that leads.
    pub fn leader(&self) -> Option<NodeName> {
        self.leader_status()?.name.parse().ok()
    }

    /// Membership and placement epoch, as the leader has them.
    pub fn epochs(&self) -> Option<(u64, u64)> {
        let status = self.leader_status()?;
        Some((status.membership_epoch, status.placement_epoch))
    }

    /// What is committed, as some voter told last.
    pub fn state(&self) -> Option<Arc<State>> {
        self.states.borrow().clone()
    }

    /// What is committed once nothing of what was agreed on has changed for a while. What audit logs
    /// commit of themselves is no change: under load they do so every second.
    ///
    /// # Errors
    /// It goes on changing.
    pub fn at_rest(&self) -> anyhow::Result<Arc<State>> {
        let mut states = self.states.clone();
        let agreed = |state: &Option<Arc<State>>| state.as_ref().map(|state| state.agreed_sha256());
        let still = async {
            loop {
                let before = agreed(&states.borrow_and_update());
                let other = states.wait_for(|state| agreed(state) != before);
                if timeout(REST, other).await.is_err() {
                    return;
                }
            }
        };
        let still = self.runtime.block_on(async { timeout(REST_DEADLINE, still).await });
        still.with_context(|| format!("the cluster did not come to rest in {REST_DEADLINE:?}"))?;
        self.state().context("no voter tells the committed state")
    }

    /// What is committed once this entry is applied.
    ///
    /// # Errors
    /// That is not heard of in time.
    pub fn state_from(&self, index: u64) -> anyhow::Result<Arc<State>> {
        let mut states = self.states.clone();
        let is_there = |state: &Option<Arc<State>>| {
            state.as_ref().is_some_and(|state| state.applied_index() >= index)
        };
        let waited = async { timeout(CONNECT_DEADLINE, states.wait_for(is_there)).await.is_ok() };
        ensure!(self.runtime.block_on(waited), "entry {index} was not heard of");
        self.state().context("no voter tells the committed state")
    }

    /// Somebody else's way to the same voters.
    pub fn client(&self, credentials: &Credentials) -> anyhow::Result<Client> {
        let _entered = self.runtime.enter();
        Ok(Client::new(credentials, self.addresses.clone())?)
    }

    /// What calls run on.
    pub fn runtime(&self) -> &Handle {
        self.runtime.handle()
    }

    /// Whether every expert node of the cluster takes traffic, by the committed state.
    pub fn all_active(&self) -> bool {
        self.state().is_some_and(|state| {
            let nodes = state.nodes().filter(|node| node.spec.role == Role::ExpertNode);
            let mut nodes = nodes.filter(|node| node.state != NodeState::Removed);
            nodes.all(|node| node.state == NodeState::Active)
        })
    }

    /// Every replica that is placed, by the committed state.
    fn placed(&self) -> BTreeSet<(ExpertKey, NodeId)> {
        let state = self.state();
        let placed = state.iter().flat_map(|state| state.placement().iter());
        placed.flat_map(|(expert, nodes)| nodes.iter().map(move |node| (expert, *node))).collect()
    }

    /// Whether a change can be committed.
    pub fn commits(&self) -> bool {
        self.write(&self.client).is_some()
    }

    /// Commits a change that changes nothing: the replicas that a region wants are set to what they
    /// are. Its place in the order of all changes; nothing when it is not known to be committed.
    fn write(&self, client: &Client) -> Option<u64> {
        let state = self.state()?;
        let (region, replicas) = state.replicas().iter().next().map(|(r, n)| (*r, *n))?;
        let command = Command::SetReplicas(region, replicas);
        let proposed = client.propose(CHANGE_DEADLINE, Expect::default(), command);
        match self.runtime.block_on(proposed) {
            Ok(Applied::Revision(revision)) => Some(revision),
            _ => None,
        }
    }

    /// Asks for the epochs, and makes changes with so many sessions at once, until the run is over.
    pub fn log(&self, board: &Board, writers: usize) -> anyhow::Result<Log> {
        let over = |pause| board.wait_for(pause, |state| state.finished || state.interrupted);
        let log = Mutex::new(Log::default());
        let locked = || log.lock().unwrap_or_else(PoisonError::into_inner);
        let client = |_| self.client(&self.credentials);
        let clients = (0..writers).map(client).collect::<anyhow::Result<Vec<_>>>()?;
        thread::scope(|scope| {
            for client in &clients {
                scope.spawn(move || {
                    while !over(WRITE_PAUSE) {
                        let began_ms = board.ms();
                        let revision = self.write(client);
                        let ended_ms = board.ms();
                        locked().writes.push(Write { began_ms, ended_ms, revision });
                    }
                });
            }
            let mut placed = self.placed();
            while !over(EPOCHS_PAUSE) {
                let epochs = self.epochs();
                let now = self.placed();
                let mut log = locked();
                log.moves += now.difference(&placed).count() as u64;
                log.epochs.extend(epochs);
                placed = now;
            }
        });
        Ok(log.into_inner().unwrap_or_else(PoisonError::into_inner))
    }
}
