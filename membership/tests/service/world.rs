//! A cluster of voters on loopback. Each runs in a runtime of its own, so that it can be killed: the
//! runtime is shut down, which closes its sockets without a word, and its thread ends with it.

use std::net::TcpListener;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use entente_audit::witness::Witness;
use entente_membership::client::Client;
use entente_membership::net::Dialler;
use entente_membership::roster::{Roster, RosterVoter, VoterRole};
use entente_membership::service::{Config, Membership, Process, Service, ServiceError, start};
use entente_membership::state::{Command, RecordKind, State};
use entente_proto::identity::{Identity, Role};
use entente_proto::ids::NodeName;
use entente_tls::{Authority, Credentials};
use tokio::runtime::{Builder, Runtime};
use tokio::task::JoinHandle;
use tonic::transport::Channel;

use crate::relay::Relay;

/// Nothing in these tests takes so long unless it is broken.
pub const LONG: Duration = Duration::from_secs(20);

pub struct World {
    pub authority: Authority,
    pub roster: Roster,
    pub runtime: Runtime,
    dir: tempfile::TempDir,
    running: Vec<Option<Running>>,
    /// Where each founder listens, which is its address unless a relay is.
    listens: Vec<String>,
    relays: Vec<Relay>,
}

struct Running {
    runtime: Runtime,
    handle: Membership,
    ended: JoinHandle<Result<(), ServiceError>>,
}

fn runtime(threads: usize) -> Runtime {
    Builder::new_multi_thread().worker_threads(threads).enable_all().build().unwrap()
}

/// An address that was free a moment ago.
pub fn free_address() -> String {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string()
}

pub fn name(text: &str) -> NodeName {
    text.parse().unwrap()
}

/// A CA of the region in which everybody stands.
fn authority() -> Authority {
    let (cluster, region) = ("demo".parse().unwrap(), "fr".parse().unwrap());
    Authority::new(&cluster, region, Duration::from_secs(3_600)).unwrap()
}

impl World {
    /// A cluster of so many founders that do not run yet: two coordinators, the rest witnesses.
    pub fn founded_with(voters: usize) -> Self {
        let addresses: Vec<_> = (0..voters).map(|_| free_address()).collect();
        Self::founded(runtime(2), &addresses, addresses.clone(), Vec::new())
    }

    /// The same, each reached through a relay only.
    pub fn behind_relays(voters: usize) -> Self {
        let runtime = runtime(2);
        let listens: Vec<_> = (0..voters).map(|_| free_address()).collect();
        let relays: Vec<_> = {
            let _inside = runtime.enter();
            listens.iter().map(|address| Relay::start(address.clone())).collect()
        };
        let addresses: Vec<_> = relays.iter().map(|relay| relay.address.clone()).collect();
        let mut world = Self::founded(runtime, &addresses, listens, relays);
        (0..voters).for_each(|i| world.start(i));
        world
    }

    /// Nothing reaches this voter while it is held.
    pub fn hold(&self, i: usize, held: bool) {
        self.relays[i].hold(held);
    }

    fn founded(
        runtime: Runtime,
        addresses: &[String],
        listens: Vec<String>,
        relays: Vec<Relay>,
    ) -> Self {
        let voter = |i: usize| RosterVoter {
            name: name(&format!("voter-{i}")),
            region: "fr".parse().unwrap(),
            role: if i < 2 { VoterRole::Coordinator } else { VoterRole::Witness },
            address: addresses[i].clone(),
        };
        let voters: Vec<_> = (0..addresses.len()).map(voter).collect();
        let nodes = vec![entente_membership::roster::RosterNode {
            name: name("fr-expert-1"),
            region: "fr".parse().unwrap(),
            address: "127.0.0.1:1".to_owned(),
        }];
        let running = voters.iter().map(|_| None).collect();
        let roster = Roster::new("demo".to_owned(), 1, nodes).unwrap();
        Self {
            authority: authority(),
            roster: roster.with_voters(voters).unwrap(),
            runtime,
            dir: tempfile::tempdir().unwrap(),
            running,
            listens,
            relays,
        }
    }

    /// A cluster of so many voters that run.
    pub fn of(voters: usize) -> Self {
        let mut world = Self::founded_with(voters);
        (0..voters).for_each(|i| world.start(i));
        world
    }

    pub fn credentials(&self, role: Role, node: &str) -> Credentials {
        let identity = Identity {
            cluster: name("demo"),
            region: "fr".parse().unwrap(),
            role,
            node: name(node),
        };
        let issued = self.authority.issue(&identity, Duration::from_secs(3_600)).unwrap();
        self.authority.credentials(&issued).unwrap()
    }

    pub fn config(&self, address: &str, node: &str) -> Config {
        Config::new(address.to_owned(), self.dir.path().join(node))
    }

    pub fn address(&self, i: usize) -> String {
        self.roster.voters()[i].address.clone()
    }

    pub fn start(&mut self, i: usize) {
        let config = self.config(&self.listens[i], self.roster.voters()[i].name.as_str());
        self.start_as(i, config);
    }

    pub fn start_as(&mut self, i: usize, config: Config) {
        let running = self.start_with(i, config);
        self.running[i] = Some(running.unwrap());
    }

    /// Starts a voter that cosigns; its memory is in `folder`.
    pub fn start_cosigning(&mut self, i: usize, folder: &std::path::Path) {
        let voter = &self.roster.voters()[i];
        let node = voter.name.as_str();
        let config = self.config(&self.listens[i], node);
        let witness = Witness::open(folder, &format!("demo/witness/{node}")).unwrap();
        let credentials = self.credentials(Role::Witness, node);
        let process = Process { witness: Some(witness), ..credentials.into() };
        self.running[i] = Some(self.run(config, node, process).unwrap());
    }

    /// Starts one that is no founder.
    pub fn start_joiner(&mut self, node: &str) -> usize {
        let config = Config { join: true, ..self.config(&free_address(), node) };
        let credentials = self.credentials(Role::Witness, node);
        let running = self.run(config, node, credentials.into()).unwrap();
        self.running.push(Some(running));
        self.running.len() - 1
    }

    fn start_with(&self, i: usize, config: Config) -> Result<Running, ServiceError> {
        let voter = &self.roster.voters()[i];
        let role = match voter.role {
            VoterRole::Coordinator => Role::Coordinator,
            VoterRole::Witness => Role::Witness,
        };
        let credentials = self.credentials(role, voter.name.as_str());
        self.run(config, voter.name.as_str(), credentials.into())
    }

    pub fn run_voter(&self, i: usize, config: Config) -> Option<ServiceError> {
        self.start_with(i, config).err()
    }

    fn run(&self, config: Config, node: &str, process: Process) -> Result<Running, ServiceError> {
        let runtime = runtime(1);
        let service = runtime.block_on(start(config, &self.roster, &name(node), process));
        let Service { handle, ended } = service?;
        Ok(Running { runtime, handle, ended })
    }

    /// Ends it as `kill -9` would.
    pub fn kill(&mut self, i: usize) {
        self.end(i);
        self.disk_given_up(i);
    }

    pub fn end(&mut self, i: usize) {
        let Running { runtime, handle, ended } = self.running[i].take().unwrap();
        drop((handle, ended));
        runtime.shutdown_timeout(LONG);
    }

    /// Ends it and does something at once; tells when that was.
    pub fn kill_and<T>(&mut self, i: usize, then: impl Future<Output = T>) -> (Instant, T) {
        let began = Instant::now();
        self.end(i);
        let done = self.runtime.block_on(then);
        (began, done)
    }

    pub fn disk_given_up(&self, i: usize) {
        // The thread notices that its door is gone, and gives up the disk.
        let file = self.dir.path().join(self.roster.voters()[i].name.as_str());
        let file = file.join("membership.redb");
        self.until("the disk is given up", || redb::Database::open(&file).ok().map(drop));
    }

    /// Ends it as a signal would.
    pub fn shut_down(&mut self, i: usize) {
        let Running { runtime, handle, ended } = self.running[i].take().unwrap();
        runtime.block_on(async {
            handle.shutdown().await;
            ended.await.unwrap().unwrap();
        });
        runtime.shutdown_timeout(LONG);
    }

    pub fn handle(&self, i: usize) -> &Membership {
        &self.running[i].as_ref().unwrap().handle
    }

    pub fn runs(&self, i: usize) -> bool {
        self.running[i].is_some()
    }

    pub fn ids(&self) -> impl Iterator<Item = usize> {
        (0..self.running.len()).filter(|i| self.runs(*i))
    }

    /// Whoever leads, once somebody does and all who run agree.
    pub fn leader(&self) -> usize {
        self.until("somebody leads", || {
            let leads = |i: &usize| self.handle(*i).status().borrow().is_leader;
            let leader = self.ids().find(leads)?;
            let id = self.handle(leader).status().borrow().id;
            let all = self.ids().all(|i| self.handle(i).status().borrow().leader == Some(id));
            all.then_some(leader)
        })
    }

    /// Waits for something to be there.
    pub fn until<T>(&self, what: &str, mut get: impl FnMut() -> Option<T>) -> T {
        let end = Instant::now() + LONG;
        loop {
            if let Some(value) = get() {
                return value;
            }
            assert!(Instant::now() < end, "it does not come about that {what}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn client(&self, role: Role, node: &str, addresses: Vec<String>) -> Client {
        Client::new(&self.credentials(role, node), addresses).unwrap()
    }

    /// An operator who knows all voters.
    pub fn operator(&self) -> Client {
        let addresses = self.roster.voters().iter().map(|voter| voter.address.clone()).collect();
        self.client(Role::Operator, "ops", addresses)
    }

    pub fn dial(&self, credentials: &Credentials, i: usize) -> Channel {
        let dialler = Dialler::new(credentials, None).unwrap();
        self.runtime.block_on(dialler.dial(&self.address(i))).unwrap()
    }

    /// All voters that run have come to a state in which this holds.
    pub fn everywhere(&self, what: &str, holds: impl Fn(&State) -> bool) {
        for i in self.ids() {
            self.until(what, || {
                let state: Arc<State> = self.handle(i).state().borrow().clone();
                holds(&state).then_some(())
            });
        }
    }
}

/// Writes a record, if it has this revision.
pub fn put(key: &str, value: &str, revision: Option<u64>) -> Command {
    Command::PutRecord {
        kind: RecordKind::Tenant,
        key: key.to_owned(),
        value: Bytes::copy_from_slice(value.as_bytes()),
        revision,
    }
}

pub fn value(state: &State, key: &str) -> Option<String> {
    let record = state.record(RecordKind::Tenant, key)?;
    Some(String::from_utf8(record.value.to_vec()).unwrap())
}
