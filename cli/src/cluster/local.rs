//! The cluster of one `entente up`: brings all processes to where they answer, then keeps them
//! there.
//!
//! While it starts, a process that ends is an error. Once the cluster is ready, a process that ends
//! by itself is started again on the same addresses ([`super::restart`] says when): its peers know
//! it by them, and its store and its certificate are still there.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use entente_audit::keyfile::PUBLIC_KEY;
use entente_membership::service::CaConfig;
use entente_proto::ids::NodeName;

use super::data_dir::{ClusterFile, DataDir, ProcessEntry};
use super::pki;
use super::plan::{
    self, Addresses, Common, DeviceOf, KvCache, Member, Regions, Role, Transport, Weights,
};
use super::relay::rule::{Change, Ends};
use super::relay::{Path, Relay};
use super::report::{Progress, log_tail, process_table};
use super::restart::Backoff;
use super::supervisor::{Event, Launch, Supervisor};
use super::tenant;
use super::voters::{Witness, witnesses};
use crate::api_key::ApiKey;
use crate::logging::LogArgs;
use crate::status::Status;

/// How long all processes together may be silent while they load and find each other.
const STALL_DEADLINE: Duration = Duration::from_secs(120);

/// What the cluster should be.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// Folder of the checkpoint.
    pub model: PathBuf,
    /// Regions and their expert nodes.
    pub regions: Regions,
    /// Where witnesses stand.
    pub witness: Option<Witness>,
    /// Replicas of each expert in each region.
    pub replicas: u16,
    /// Where the first region's public API listens.
    pub http: SocketAddr,
    /// How weights are kept.
    pub weights: Weights,
    /// How keys and values are kept.
    pub kv_dtype: Option<KvCache>,
    /// Compute threads of each process.
    pub threads: Option<u16>,
    /// How rows travel.
    pub transport: Transport,
    /// Whether a process that ends by itself is started again.
    pub restart: bool,
    /// What the network between processes is like; without a word there is no relay in between.
    pub links: Vec<Change>,
    /// How long a certificate lives; it is renewed when half of that is over.
    pub certificate_life: Duration,
    /// Whether the public API asks for no key.
    pub open: bool,
    /// Where processes compute that do not compute on the processor.
    pub devices: Vec<DeviceOf>,
    /// Whether rows travel by NCCL between those on devices.
    pub nccl: bool,
}

/// One process and how it fares.
#[derive(Debug)]
struct Process {
    member: Member,
    addresses: Addresses,
    config: PathBuf,
    log: PathBuf,
    started: Instant,
    /// Experts that it held when it said that it was ready; none before that.
    experts: Option<usize>,
    backoff: Backoff,
    /// When it is to be started again.
    due: Option<Instant>,
}

/// The processes that are running, in the order in which they were started.
#[derive(Debug)]
pub struct Cluster {
    processes: Vec<Process>,
    progress: Progress,
    supervisor: Supervisor,
    data: DataDir,
    exe: PathBuf,
    logging: LogArgs,
    restart: bool,
    published: bool,
    /// Of the tenant that the cluster begins with.
    api_key: Option<ApiKey>,
    /// Connections through it end with it.
    relay: Option<Relay>,
}

impl Cluster {
    /// Binds all ports first, so that nothing is started when one is taken.
    pub fn start(wanted: Wanted, data: DataDir, logging: &LogArgs) -> anyhow::Result<Self> {
        let is_live = wanted.transport != Transport::Inproc;
        let everyone = everyone(&wanted, is_live);
        // Expert nodes inside their coordinator are no processes and have no address.
        let is_process = |m: &&Member| m.role == Role::Coordinator || is_live;
        let members: Vec<Member> = everyone.iter().filter(is_process).cloned().collect();
        let bound = bind_all(&members, wanted.http, is_live)?;
        let relay = relay(&wanted, &members, &bound, &data)?;
        let common = common(wanted.clone(), everyone, &members, &bound, &data)?;

        let mut cluster = Self {
            processes: Vec::new(),
            progress: Progress::new(&members),
            supervisor: Supervisor::new(),
            data,
            exe: std::env::current_exe().context("cannot find this program's own file")?,
            logging: logging.clone(),
            restart: wanted.restart,
            published: false,
            api_key: None,
            relay,
        };
        for (member, (listeners, addresses)) in members.into_iter().zip(bound) {
            let via =
                cluster.relay.as_ref().map(|relay| relay.via(&member.name)).unwrap_or_default();
            let toml = plan::configuration(&common, &member, addresses, via)?;
            let config = cluster.data.write_config(&member.name, &toml)?;
            let log = cluster.data.empty_log(&member.name)?;
            let (started, backoff) = (Instant::now(), Backoff::default());
            let process = Process {
                member,
                addresses,
                config,
                log,
                started,
                experts: None,
                backoff,
                due: None,
            };
            cluster.supervisor.start(&cluster.exe, process.launch(listeners), logging)?;
            cluster.processes.push(process);
        }
        Ok(cluster)
    }

    /// Waits until every process said that it is ready, and tells everyone. A coordinator says so
    /// when it has found all its experts.
    pub async fn ready(&mut self) -> anyhow::Result<ClusterFile> {
        while let Some(waiting) = self.processes.iter().position(|p| p.experts.is_none()) {
            let next = tokio::time::timeout(STALL_DEADLINE, self.supervisor.next());
            let Ok((index, event)) = next.await else {
                let what = format!("has said nothing for {STALL_DEADLINE:?}");
                return Err(self.trouble(waiting, &what));
            };
            match event {
                Event::Said(Status::Loading { done, total }) => {
                    self.progress.loading(index, done, total);
                }
                Event::Said(Status::Ready { experts, weights_bytes, .. }) => {
                    self.processes[index].experts = Some(experts);
                    self.progress.ready(index, weights_bytes);
                }
                Event::Exited(status) => {
                    return Err(self.trouble(index, &format!("ended during the start ({status})")));
                }
            }
        }
        self.api_key = self.first_key().await?;
        let file = self.file();
        self.data.publish(&file)?;
        self.published = true;
        Ok(file)
    }

    /// The key of the first tenant, where the cluster can agree on one.
    async fn first_key(&self) -> anyhow::Result<Option<ApiKey>> {
        let members = self.processes.iter().map(|process| (&process.member, process.addresses));
        let coordinators = members.filter(|(member, _)| member.role == Role::Coordinator);
        let (regions, control): (Vec<_>, Vec<_>) =
            coordinators.map(|(member, addresses)| (member.region, addresses.control)).unzip();
        let control: Vec<String> = control.iter().flatten().map(ToString::to_string).collect();
        if control.is_empty() {
            return Ok(None);
        }
        let allowed = regions.into_iter().collect();
        Ok(Some(tenant::found(&self.data.tls(), &control, allowed).await?))
    }

    /// Whether the cluster was ready.
    pub fn was_ready(&self) -> bool {
        self.published
    }

    /// Runs `work`, starting processes again that end meanwhile. The others go on: what is left of
    /// a cluster may well be enough.
    pub async fn watch_until(
        &mut self,
        work: impl Future<Output = anyhow::Result<()>>,
    ) -> anyhow::Result<()> {
        tokio::pin!(work);
        loop {
            let due = self.next_due();
            tokio::select! {
                result = &mut work => return result,
                (index, event) = self.supervisor.next() => self.on(index, event),
                index = when(due) => self.start_again(index),
            }
        }
    }

    fn on(&mut self, index: usize, event: Event) {
        match event {
            Event::Said(Status::Loading { .. }) => {}
            Event::Said(Status::Ready { experts, .. }) => {
                let process = &mut self.processes[index];
                process.experts = Some(experts);
                process.backoff.ready();
                tracing::info!(name = %process.member.name, experts, "a process is back");
            }
            Event::Exited(status) => self.ended(index, status),
        }
    }

    fn ended(&mut self, index: usize, status: ExitStatus) {
        let process = &mut self.processes[index];
        let (name, log) = (&process.member.name, process.log.display());
        if !self.restart {
            tracing::warn!(%name, %status, %log, "a process of the cluster ended");
            return;
        }
        let was_ready = process.experts.take().is_some();
        let delay = process.backoff.ended(process.started.elapsed(), was_ready);
        process.due = Some(Instant::now() + delay);
        tracing::warn!(
            %name, %status, %log, ?delay,
            "a process of the cluster ended and will be started again"
        );
    }

    fn next_due(&self) -> Option<(Instant, usize)> {
        let due = |(index, process): (usize, &Process)| Some((process.due?, index));
        self.processes.iter().enumerate().filter_map(due).min()
    }

    /// A start that fails is treated as a process that ended at once.
    fn start_again(&mut self, index: usize) {
        let process = &mut self.processes[index];
        process.due = None;
        process.started = Instant::now();
        let listeners = bind_again(process.addresses);
        let started = listeners.and_then(|listeners| {
            let launch = process.launch(listeners);
            self.supervisor.restart(index, &self.exe, launch, &self.logging)
        });
        if let Err(error) = started {
            let delay = process.backoff.ended(Duration::ZERO, false);
            process.due = Some(Instant::now() + delay);
            let name = &process.member.name;
            tracing::warn!(%name, ?delay, "a process cannot be started again: {error:#}");
            return;
        }
        // Its pid is another one now. A file that cannot be written is no reason to stop serving.
        if let Err(error) = self.data.publish(&self.file()) {
            tracing::warn!("{error:#}");
        }
    }

    /// What is wrong with a process, in its own last words.
    fn trouble(&self, index: usize, what: &str) -> anyhow::Error {
        let Process { member, log, .. } = &self.processes[index];
        anyhow!("{} {what}; the end of {}:{}", member.name, log.display(), log_tail(log))
    }

    fn file(&self) -> ClusterFile {
        let entry = |(process, pid): (&Process, &u32)| ProcessEntry {
            name: process.member.name.clone(),
            role: process.member.role,
            region: process.member.region,
            pid: *pid,
            address: process.addresses.main,
            metrics: process.metrics().map(|address| format!("{}/metrics", url(address))),
        };
        let control = |p: &Process| Some((p.member.name.clone(), p.addresses.control?.to_string()));
        let is_coordinator = |p: &&Process| p.member.role == Role::Coordinator;
        let coordinators = self.processes.iter().filter(is_coordinator);
        ClusterFile {
            http: url(self.processes[0].addresses.main),
            endpoints: coordinators.map(|p| (p.member.region, url(p.addresses.main))).collect(),
            control: self.processes.iter().filter_map(control).collect(),
            api_key: self.api_key.clone(),
            audit_keys: self.keys_of(Role::Coordinator, &self.data.audit()),
            witness_keys: self.keys_of(Role::Witness, &self.data.cosign()),
            processes: self.processes.iter().zip(self.supervisor.pids()).map(entry).collect(),
        }
    }

    /// The public keys of the audit logs or of those who cosign them, which processes of this role
    /// write before they are ready, each in a folder of its name.
    fn keys_of(&self, role: Role, folder: &std::path::Path) -> BTreeMap<NodeName, String> {
        let key = |process: &Process| {
            let name = &process.member.name;
            let path = folder.join(name.as_str()).join(PUBLIC_KEY);
            Some((name.clone(), std::fs::read_to_string(path).ok()?.trim().to_owned()))
        };
        let of_role = self.processes.iter().filter(|process| process.member.role == role);
        of_role.filter_map(key).collect()
    }

    /// The table of processes.
    pub fn table(&self) -> String {
        let experts: Vec<usize> = self.processes.iter().map(|p| p.experts.unwrap_or(0)).collect();
        process_table(&self.file().processes, &experts)
    }

    /// Tells everyone that there is no cluster any more, and returns when every process has ended.
    pub async fn stop(self) -> anyhow::Result<()> {
        self.data.retract()?;
        self.supervisor.stop().await;
        Ok(())
    }
}

impl Process {
    fn metrics(&self) -> Option<SocketAddr> {
        let Addresses { main, metrics, .. } = self.addresses;
        if self.member.role == Role::Coordinator { Some(main) } else { metrics }
    }

    fn launch(&self, listeners: Vec<TcpListener>) -> Launch<'_> {
        let (config, log) = (self.config.clone(), self.log.clone());
        Launch { member: &self.member, config, log, listeners }
    }
}

/// Completes with the number of the process whose time has come.
async fn when(due: Option<(Instant, usize)>) -> usize {
    match due {
        Some((at, index)) => {
            tokio::time::sleep_until(at.into()).await;
            index
        }
        None => std::future::pending().await,
    }
}

/// Every member of the cluster, also those that are no processes.
fn everyone(wanted: &Wanted, is_live: bool) -> Vec<Member> {
    let mut everyone = wanted.regions.members();
    if is_live {
        everyone.extend(witnesses(&wanted.regions, wanted.witness));
    }
    everyone
}

/// What every process is told: also writes the certificates, since they carry the roster's name.
fn common(
    wanted: Wanted,
    everyone: Vec<Member>,
    members: &[Member],
    bound: &[(Vec<TcpListener>, Addresses)],
    data: &DataDir,
) -> anyhow::Result<Common> {
    let address_of = |member: &Member| {
        members.iter().position(|other| other == member).map(|at| bound[at].1.main)
    };
    let nodes = everyone.into_iter().filter(|m| m.role == Role::ExpertNode);
    let nodes = nodes.map(|node| {
        let address = address_of(&node);
        (node, address)
    });
    let endpoint = |(member, (_, addresses)): (&Member, &(Vec<TcpListener>, Addresses))| {
        (member.role == Role::Coordinator).then(|| (member.region, url(addresses.main)))
    };
    let endpoints = members.iter().zip(bound).filter_map(endpoint).collect();
    let voters = plan::voters(members.iter().zip(bound.iter().map(|(_, addresses)| addresses)));
    let roster = plan::roster(wanted.replicas, nodes)?.with_voters(voters)?;
    // Nothing leaves a process whose expert nodes are in it.
    let tls_is_wanted = wanted.transport != Transport::Inproc;
    let tls = tls_is_wanted.then(|| data.tls());
    if let Some(folder) = &tls {
        pki::mint(folder, &roster, members, wanted.certificate_life)?;
    }
    let ca = tls.as_ref().map(|folder| CaConfig {
        dir: pki::ca_dir(folder),
        leaf_life_s: wanted.certificate_life.as_secs(),
    });
    Ok(Common {
        model: wanted.model,
        weights: wanted.weights,
        kv_dtype: wanted.kv_dtype,
        threads: wanted.threads,
        transport: wanted.transport,
        tls,
        ca,
        raft: data.empty_raft()?,
        // What was recorded stays, whatever the cluster was.
        audit: tls_is_wanted.then(|| data.audit()),
        cosign: data.cosign(),
        endpoints,
        roster,
        open: wanted.open,
        devices: wanted.devices.into_iter().map(|of| (of.name, of.device)).collect(),
        nccl: wanted.nccl,
    })
}

/// The sockets of each process: the first coordinator's API at `http`, the others' on free ports
/// beside it, and everything that only processes of this machine dial on free ports of loopback.
fn bind_all(
    members: &[Member],
    http: SocketAddr,
    is_live: bool,
) -> anyhow::Result<Vec<(Vec<TcpListener>, Addresses)>> {
    let free = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let wanted = |at: usize, member: &Member| match member.role {
        Role::Coordinator => {
            let api = if at == 0 { http } else { SocketAddr::new(http.ip(), 0) };
            [Some(api), is_live.then_some(free)]
        }
        Role::ExpertNode => [Some(free), Some(free)],
        Role::Witness => [Some(free), None],
    };
    let bind_one = |(at, member): (usize, &Member)| {
        let wanted = wanted(at, member).into_iter().flatten();
        let listeners: Vec<TcpListener> = wanted
            .map(|address| {
                TcpListener::bind(address)
                    .with_context(|| format!("cannot listen at {address} for {}", member.name))
            })
            .collect::<Result<_, _>>()?;
        let bound: Vec<SocketAddr> =
            listeners.iter().map(TcpListener::local_addr).collect::<io::Result<_>>()?;
        let (main, last) = (bound[0], bound[bound.len() - 1]);
        let control = (is_live && member.role.votes_as().is_some()).then_some(last);
        let metrics = (member.role == Role::ExpertNode).then_some(last);
        Ok((listeners, Addresses { main, control, metrics }))
    };
    members.iter().enumerate().map(bind_one).collect()
}

/// The relay between those that dial and those that they dial, if something was said about links.
fn relay(
    wanted: &Wanted,
    members: &[Member],
    bound: &[(Vec<TcpListener>, Addresses)],
    data: &DataDir,
) -> anyhow::Result<Option<Relay>> {
    if wanted.links.is_empty() {
        return Ok(None);
    }
    let end = |member: &Member| (member.region, member.name.clone());
    let mut paths = Vec::new();
    for (target, (_, addresses)) in members.iter().zip(bound) {
        // Everybody speaks to voters, and coordinators to expert nodes.
        let diallers = members.iter().filter(|dialler| {
            dialler.name != target.name
                && (addresses.control.is_some() || dialler.role == Role::Coordinator)
        });
        let dialled = addresses.control.unwrap_or(addresses.main);
        paths.extend(diallers.map(|dialler| Path {
            ends: Ends { dialler: end(dialler), target: end(target) },
            target: dialled,
        }));
    }
    let mut relay = Relay::open(paths, wanted.links.clone()).context("cannot start the relay")?;
    relay.serve(data.root())?;
    Ok(Some(relay))
}

/// The same sockets again. What the process before had accepted does not keep the addresses taken:
/// the standard library binds with SO_REUSEADDR.
fn bind_again(addresses: Addresses) -> anyhow::Result<Vec<TcpListener>> {
    let control = addresses.control.filter(|control| *control != addresses.main);
    let second = control.or(addresses.metrics);
    let bind =
        |address| TcpListener::bind(address).with_context(|| format!("cannot listen at {address}"));
    std::iter::once(addresses.main).chain(second).map(bind).collect()
}

/// The URL by which this machine reaches a listener.
fn url(address: SocketAddr) -> String {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    format!("http://{}", SocketAddr::new(ip, address.port()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unspecified_address_is_reached_over_loopback() {
        assert_eq!(url("0.0.0.0:80".parse().unwrap()), "http://127.0.0.1:80");
        assert_eq!(url("[::]:80".parse().unwrap()), "http://[::1]:80");
        assert_eq!(url("10.0.0.1:80".parse().unwrap()), "http://10.0.0.1:80");
    }

    #[test]
    fn every_port_but_the_first_is_free_to_choose() {
        let members = "fr=1,se=1".parse::<Regions>().unwrap().members();
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = taken.local_addr().unwrap();
        let error = bind_all(&members, address, true).unwrap_err().to_string();
        assert!(
            error.contains(&address.to_string()) && error.contains("fr-coordinator"),
            "{error}"
        );
        drop(taken);
        assert_eq!(bind_all(&members, address, true).unwrap().len(), members.len());
    }

    #[test]
    fn voters_and_nobody_else_have_a_control_plane_and_get_the_same_sockets_again() {
        let regions: Regions = "fr=1".parse().unwrap();
        let members = [regions.members(), witnesses(&regions, None)].concat();
        let http = "127.0.0.1:0".parse().unwrap();
        for (member, (listeners, addresses)) in
            members.iter().zip(bind_all(&members, http, true).unwrap())
        {
            assert_eq!(addresses.control.is_some(), member.role != Role::ExpertNode);
            assert_eq!(addresses.metrics.is_some(), member.role == Role::ExpertNode);
            assert_eq!(listeners.len(), if member.role == Role::Witness { 1 } else { 2 });
            let before: Vec<_> = listeners.iter().map(|l| l.local_addr().unwrap()).collect();
            drop(listeners);
            let again = bind_again(addresses).unwrap();
            assert_eq!(again.iter().map(|l| l.local_addr().unwrap()).collect::<Vec<_>>(), before);
        }
        for (_, addresses) in bind_all(&members[..1], http, false).unwrap() {
            assert_eq!(addresses.control, None);
        }
    }
}
