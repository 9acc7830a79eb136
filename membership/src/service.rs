//! The service around the pure [`crate::voter::Voter`]: a thread with a disk, and sockets.
//!
//! ```text
//!   control port ──► guard (crate::access: who may call what) ──► raft | members | admin | enrolment | witness
//!                                                    │  bounded commands
//!                                                    ▼
//!                        owner: ONE thread, Voter + Store ──► peers: a task for each voter
//!                                    │
//!                                    └──► state, status: the latest of each, for whoever looks
//!   steward: ONE task, acts while this voter leads; its decisions are proposals like any other
//! ```
//!
//! Invariants:
//! - nothing touches the voter or its disk but the owner's thread, as `fsync` blocks;
//! - an error of the disk or of the log ends the service, and with it the process;
//! - a state is published before anybody is answered from it;
//! - every queue is bounded: raft messages that do not fit are dropped, as raft sends them again,
//!   and a proposal that does not fit is refused as busy.
//!
//! What it does not know: models, experts' weights, the exchange.

mod admin;
mod authorities;
mod config;
mod disk;
mod enlist;
mod enrolment;
mod heartbeat;
mod members;
#[cfg(feature = "etcd")]
mod mirrored;
mod owner;
mod peers;
mod raft_rpc;
mod registration;
mod server;
mod shared;
mod steward_shell;
mod witness;

use std::sync::Arc;
use std::time::Duration;

use entente_audit::witness::Witness;
use entente_proto::ids::NodeName;
use entente_tls::Credentials;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;

pub use config::{CaConfig, Config, InvalidConfig, LEAF_LIFE_S_MAX, LEAF_LIFE_S_MIN};
pub use heartbeat::{pack_experts, unpack_experts};

use crate::audit::Sink;
use crate::client::{Client, ClientError};
use crate::guard::Guard;
use crate::net::{Bounds, Dialler};
use crate::raft::Status;
use crate::roster::Roster;
use crate::state::{Applied, Command, Expect, Refused, State};
use crate::steward;
use crate::store::StoreError;
use crate::voter::{Voter, VoterError};
use authorities::Authorities;
use enrolment::Enrolment;
use shared::Shared;
use witness::Cosigner;

/// How long what is being answered may take when the service stops.
const STOP_MAX: Duration = Duration::from_millis(500);

/// Why the service does not start, or has ended.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// A setting is of no use.
    #[error(transparent)]
    Config(#[from] InvalidConfig),
    /// The roster's founders and nodes cannot be a cluster.
    #[error("the cluster cannot be founded: {0}")]
    Genesis(Refused),
    /// The disk is of another process, or of none.
    #[error("membership.data_dir: {0}")]
    Disk(String),
    /// A CA whose certificates are to be issued here cannot be used.
    #[error("membership.ca: {0}")]
    Ca(String),
    /// The durable log cannot be used, or not any longer.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The voter cannot go on.
    #[error(transparent)]
    Voter(#[from] VoterError),
    /// The credentials are of no use, or of somebody else.
    #[error(transparent)]
    Tls(#[from] entente_tls::Error),
    /// Nothing can listen there.
    #[error("membership.listen {address}: {reason}")]
    Listen {
        /// The address.
        address: String,
        /// Why.
        reason: String,
    },
    /// The cluster does not take it in.
    #[error("the cluster does not take this voter in: {0}")]
    Refused(ClientError),
    /// A part of it ended on its own, which is a bug.
    #[error("the membership service: its {0} has ended")]
    Ended(&'static str),
}

/// A proposal came to nothing.
pub type ProposeError = ClientError;

/// A service that runs.
pub struct Service {
    /// Its door, for this process.
    pub handle: Membership,
    /// Ends with the service. An error must end the process.
    pub ended: JoinHandle<Result<(), ServiceError>>,
}

/// What this process asks of its own voter. Cheap to clone.
#[derive(Clone)]
pub struct Membership {
    shared: Shared,
    stop: Arc<watch::Sender<bool>>,
}

impl Membership {
    /// The committed state as far as this voter knows it.
    pub fn state(&self) -> watch::Receiver<Arc<State>> {
        self.shared.state.clone()
    }

    /// Where raft stands.
    pub fn status(&self) -> watch::Receiver<Status> {
        self.shared.status.clone()
    }

    /// Proposes at whoever leads, exactly once.
    ///
    /// # Errors
    /// As [`Client::propose`].
    pub async fn propose(
        &self,
        deadline: Duration,
        expect: Expect,
        command: Command,
    ) -> Result<Applied, ProposeError> {
        self.shared.client.propose(deadline, expect, command).await
    }

    /// A state in which everything is that was committed before this call; not only the leader can
    /// tell. `None`: nobody could confirm it in time.
    pub async fn read(&self, deadline: Duration) -> Option<Arc<State>> {
        self.shared.read(deadline).await
    }

    /// The library with which this process speaks to all voters.
    pub fn client(&self) -> &Client {
        &self.shared.client
    }

    /// Hands leadership over, if it has it, and stops. [`Service::ended`] says when it has stopped.
    pub async fn shutdown(self) {
        let status = self.shared.status();
        if status.is_leader {
            let others = status
                .matched
                .iter()
                .filter(|(id, _)| **id != status.id && status.group.voters.contains(id));
            if let Some((to, _)) = others.max_by_key(|(_, matched)| **matched) {
                self.shared.transfer(*to, self.shared.election).await;
            }
        }
        self.stop.send_replace(true);
        self.shared.owner.wake();
    }
}

/// The process that a voter is to be part of.
pub struct Process {
    /// What it shows, and whom it believes.
    pub credentials: Credentials,
    /// The socket of its control port, if somebody has bound it already.
    pub listener: Option<std::net::TcpListener>,
    /// Who is told of refusals and of operators' orders.
    pub audit: Sink,
    /// What cosigns checkpoints of audit logs, where this process does.
    pub witness: Option<Witness>,
}

impl From<Credentials> for Process {
    /// Binds its port itself, and tells its log.
    fn from(credentials: Credentials) -> Self {
        Self { credentials, listener: None, audit: Sink::default(), witness: None }
    }
}

/// Starts the voter `name` of the cluster: founds it, takes up where its disk left off, or joins.
///
/// # Errors
/// What is wrong with the configuration, the credentials, the disk or the port.
pub async fn start(
    config: Config,
    roster: &Roster,
    name: &NodeName,
    process: Process,
) -> Result<Service, ServiceError> {
    config.check()?;
    let Process { credentials, listener, audit, witness } = process;
    let listener = server::listen(&config, listener).await?;
    let listens = listener.local_addr().map_err(|error| server::cannot(&config, &error))?;
    let address = config.address(roster, name);
    let dialler = Dialler::new(&credentials, None)?
        .knowing_itself(address.clone(), listens)
        .through(config.via.clone());
    let client = |more: &[String]| {
        let voters = roster.voters().iter().map(|voter| voter.address.clone());
        let addresses = voters.chain(config.contacts.iter().chain(more).cloned()).collect();
        Client::with(dialler.clone(), addresses).map_err(ServiceError::Refused)
    };
    let own = disk::Own { name, credentials: &credentials, address: &address };
    let authorities = Authorities::load(config.ca.as_ref())?;
    let disk = disk::open(&config, roster, &own, &client(&[])?).await?;
    let voter = Voter::open(config.voter(disk.identity), disk.durable)?;
    let own_voter = disk.identity.voter;
    let known = shared::addresses(voter.state());
    let (stop, stopping) = watch::channel(false);
    let (steward, asks) = steward_shell::channel();
    let (thread, shared) = owner::prepare(owner::Parts {
        voter,
        store: disk.store,
        config: &config,
        credentials: credentials.clone(),
        guard: Guard::new(credentials.identity(), audit),
        beginning: disk.beginning,
        identity: disk.identity,
        name: name.clone(),
        address,
        client: client(&known)?,
        cosigner: witness.map(Cosigner::new),
        steward,
        stopping,
    })?;
    tracing::info!(voter = own_voter, %name, %listens, "the membership service has started");
    let handle = Membership { shared: shared.clone(), stop: Arc::new(stop) };
    let enrolment = Enrolment::new(enrolment::Parts {
        shared: shared.clone(),
        authorities,
        credentials: credentials.clone(),
        roster: roster.clone(),
    });
    let parts = Running {
        thread,
        shared,
        stop: handle.stop.clone(),
        asks,
        settings: config.steward(),
        enrolment,
        joins: config.join,
        bounds: config.bounds(),
    };
    let ended = tokio::spawn(parts.run(listener, credentials));
    Ok(Service { handle, ended })
}

/// What is started.
struct Running {
    thread: owner::Thread,
    shared: Shared,
    stop: Arc<watch::Sender<bool>>,
    asks: mpsc::Receiver<steward_shell::Ask>,
    settings: steward::Settings,
    enrolment: Enrolment,
    joins: bool,
    bounds: Bounds,
}

impl Running {
    /// Runs all parts until one ends or it is to stop.
    async fn run(
        self,
        listener: TcpListener,
        credentials: Credentials,
    ) -> Result<(), ServiceError> {
        let Self { thread, shared, stop, asks, settings, enrolment, joins, bounds } = self;
        let server = server::serve(shared.clone(), enrolment, listener, &credentials, bounds)?;
        let mut server = tokio::spawn(server);
        let mut owner = thread.start()?;
        let mut steward = tokio::spawn(steward_shell::run(shared.clone(), settings, asks));
        let mut registration = tokio::spawn(registration::run(shared.clone()));
        let enlisting = joins.then(|| tokio::spawn(enlist::run(shared.clone())));
        let ended = |part| Err(ServiceError::Ended(part));
        let early = tokio::select! {
            biased;
            () = shared.stopped() => None,
            result = &mut owner => Some(result.unwrap_or(ended("owner"))),
            // They end when they are to stop, perhaps before this task has noticed.
            _ = &mut server => (!*shared.stopping.borrow()).then(|| ended("server")),
            _ = &mut steward => (!*shared.stopping.borrow()).then(|| ended("steward")),
            error = refused(&mut registration) => Some(Err(error)),
        };
        stop.send_replace(true);
        shared.owner.wake();
        registration.abort();
        enlisting.inspect(JoinHandle::abort);
        steward.abort();
        let result = match early {
            Some(result) => result,
            None => owner.await.unwrap_or(ended("owner")),
        };
        // Open streams see that it stops and end; what does not is cut off.
        if !server.is_finished() && timeout(STOP_MAX, &mut server).await.is_err() {
            server.abort();
        }
        result
    }
}

/// Why the voter could not be registered; never returns once it is.
async fn refused(registration: &mut JoinHandle<Result<(), ServiceError>>) -> ServiceError {
    match registration.await {
        Ok(Ok(())) => std::future::pending().await,
        Ok(Err(error)) => error,
        Err(_) => ServiceError::Ended("registration"),
    }
}
