//! Expert nodes as child processes, for as long as a bench runs.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail};
use entente_membership::net::Via;

use super::relay;
use crate::cluster::data_dir::DataDir;
use crate::cluster::pki;
use crate::cluster::plan::{self, Addresses, Common, Member, Regions, Role, Transport, Weights};
use crate::cluster::report::log_tail;
use crate::cluster::supervisor::{Event, Launch, Supervisor};
use crate::logging::LogArgs;
use crate::status::Status;

/// How long the nodes may be silent while they load.
const STALL_DEADLINE: Duration = Duration::from_secs(120);

/// What the nodes are told.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// Folder of the checkpoint.
    pub model: PathBuf,
    /// How weights are kept.
    pub weights: Weights,
    /// Compute threads of each process.
    pub threads: Option<u16>,
    /// Whether nodes are processes or run here.
    pub transport: Transport,
    /// How many.
    pub nodes: u16,
    /// How far away they are to be, in each direction.
    pub link_delay: Duration,
}

/// Nodes that are ready. Those that are processes end when this is stopped or dropped.
pub struct Nodes {
    /// How the coordinator finds them.
    pub coordinator: entente_coordinator::Config,
    supervisor: Supervisor,
    // The folder of configurations and logs goes when the bench is over.
    _dir: tempfile::TempDir,
}

impl Nodes {
    /// Starts the nodes, unless they run in this process, and waits until they are ready.
    pub async fn start(wanted: Wanted, logging: &LogArgs) -> anyhow::Result<Self> {
        let regions: Regions =
            format!("fr={}", wanted.nodes).parse().map_err(crate::exit::Misuse)?;
        let mut members = regions.members();
        let coordinator = members.remove(0);
        let is_process = wanted.transport != Transport::Inproc;
        let mut listeners = Vec::new();
        for _ in members.iter().filter(|_| is_process) {
            listeners.push(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?);
        }
        let addresses: Vec<SocketAddr> =
            listeners.iter().map(TcpListener::local_addr).collect::<Result<_, _>>()?;
        let dialled = dialled(&addresses, wanted.link_delay)?;
        let address_of =
            |(at, member): (usize, &Member)| (member.clone(), dialled.get(at).copied());
        let dir = tempfile::tempdir().context("cannot make a temporary folder")?;
        let data = DataDir::open(dir.path())?;
        let roster = plan::roster(1, members.iter().enumerate().map(address_of))?;
        let tls = is_process.then(|| data.tls());
        if let Some(folder) = &tls {
            let everyone = [std::slice::from_ref(&coordinator), &members].concat();
            pki::mint(folder, &roster, &everyone, pki::UNRENEWED)?;
        }
        let common = Common {
            model: wanted.model,
            weights: wanted.weights,
            kv_dtype: None,
            threads: wanted.threads,
            transport: wanted.transport,
            tls,
            raft: PathBuf::new(),
            audit: None,
            cosign: "cosign".into(),
            ca: None,
            endpoints: Default::default(),
            roster,
            open: false,
            devices: BTreeMap::new(),
            nccl: false,
        };
        let mut supervisor = Supervisor::new();
        let exe = std::env::current_exe().context("cannot find this program's own file")?;
        for ((member, listener), address) in members.iter().zip(listeners).zip(&addresses) {
            let addresses = Addresses { main: *address, control: None, metrics: None };
            let toml = plan::configuration(&common, member, addresses, Via::default())?;
            let config = data.write_config(&member.name, &toml)?;
            let log = data.empty_log(&member.name)?;
            let listeners = vec![listener];
            supervisor.start(&exe, Launch { member, config, log, listeners }, logging)?;
        }
        let started: Vec<&Member> = members.iter().filter(|_| is_process).collect();
        debug_assert!(started.iter().all(|member| member.role == Role::ExpertNode));
        ready(&mut supervisor, &started, &data).await?;
        let nobody_listens = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let coordinator = plan::coordinator(&common, &coordinator, nobody_listens);
        Ok(Self { coordinator, supervisor, _dir: dir })
    }

    /// Ends the processes.
    pub async fn stop(self) {
        self.supervisor.stop().await;
    }
}

/// Where the coordinator finds nodes that listen at `addresses` but are to be further away.
fn dialled(addresses: &[SocketAddr], delay: Duration) -> anyhow::Result<Vec<SocketAddr>> {
    if delay.is_zero() {
        return Ok(addresses.to_vec());
    }
    let relays = addresses.iter().map(|address| relay::open(*address, delay));
    relays.collect::<Result<_, _>>().context("cannot open a relay")
}

async fn ready(
    supervisor: &mut Supervisor,
    members: &[&Member],
    data: &DataDir,
) -> anyhow::Result<()> {
    let mut waiting = members.len();
    while waiting > 0 {
        match tokio::time::timeout(STALL_DEADLINE, supervisor.next()).await {
            Err(_) => bail!("the expert nodes have said nothing for {STALL_DEADLINE:?}"),
            Ok((_, Event::Said(Status::Loading { .. }))) => {}
            Ok((_, Event::Said(Status::Ready { .. }))) => waiting -= 1,
            Ok((index, Event::Exited(status))) => {
                let name = &members[index].name;
                bail!("{name} ended during the start ({status}):{}", log_tail(&data.log(name)));
            }
        }
    }
    Ok(())
}
