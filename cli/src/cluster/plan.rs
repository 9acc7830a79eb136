//! Which processes a cluster has, and what each is told. Pure: nothing here opens or starts.
//!
//! A region has one coordinator, and expert nodes among which its own complete set of experts is
//! spread, so that no row ever crosses a border. Who holds which expert is not decided here.
//!
//! A cluster whose roster has voters is live: coordinators and witnesses have a section
//! `[membership]` and agree on everything else among themselves. Without voters, when expert nodes
//! live inside their coordinator, the roster is all that there is.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;

use anyhow::Context;
use clap::ValueEnum;
use entente_coordinator::config::{ApiConfig, EngineConfig};
use entente_coordinator::ledger;
use entente_coordinator::residency::Endpoints;
use entente_expert_node::NcclConfig;
use entente_membership::net::Via;
use entente_membership::roster::{Roster, RosterNode, RosterVoter, VoterRole};
use entente_membership::service::{self, CaConfig};
use entente_model::kernels::{DeviceId, KvDtype, WeightFormat};
use entente_proto::ids::{NodeName, Region};
use serde::{Deserialize, Serialize};

use super::pki;
use crate::exit::Misuse;
use crate::verbs::witness;

/// Most expert nodes in one region of a cluster on one machine.
pub const NODES_MAX: u16 = 64;

/// The name of the cluster in every roster.
const CLUSTER_NAME: &str = "local";

/// What a process does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Attention, gating, sampling and the public API of a region.
    Coordinator,
    /// Holds experts.
    ExpertNode,
    /// Votes, and does nothing else.
    Witness,
}

impl fmt::Display for Role {
    /// As the verb of the command line, which is also its name in `cluster.json`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Coordinator => "coordinator",
            Self::ExpertNode => "expert-node",
            Self::Witness => "witness",
        })
    }
}

/// How weights are kept in memory.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Weights {
    /// 32 bits: exact, twice the memory.
    F32,
    /// 16 bits: as most checkpoints are published.
    Bf16,
    /// 8 bits: half the memory of bf16, hardly any loss.
    Q8,
    /// 8 bits with a floating point: half the memory of bf16; what a checkpoint in FP8 holds, without
    /// any loss, and more loss than q8 for one in bf16.
    Fp8,
    /// 4 bits: a quarter of the memory of bf16, some loss.
    Q4,
}

/// How a coordinator keeps keys and values.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum KvCache {
    /// 32 bits: as they were computed.
    F32,
    /// 16 bits: half the memory.
    Bf16,
}

/// How rows travel from a coordinator to its expert nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Transport {
    /// Expert nodes are processes of their own, reached by frames on a byte stream over TLS.
    Stream,
    /// Expert nodes are processes of their own, reached by gRPC over TLS.
    Grpc,
    /// Expert nodes live inside the coordinator's process.
    Inproc,
}

impl Transport {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Grpc => "grpc",
            Self::Stream => "stream",
            Self::Inproc => "inproc",
        }
    }
}

impl From<Weights> for WeightFormat {
    fn from(weights: Weights) -> Self {
        match weights {
            Weights::F32 => Self::F32,
            Weights::Bf16 => Self::Bf16,
            Weights::Q8 => Self::Q8,
            Weights::Fp8 => Self::Fp8,
            Weights::Q4 => Self::Q4,
        }
    }
}

impl From<KvCache> for KvDtype {
    fn from(dtype: KvCache) -> Self {
        match dtype {
            KvCache::F32 => Self::F32,
            KvCache::Bf16 => Self::Bf16,
        }
    }
}

impl From<Transport> for entente_coordinator::config::Transport {
    fn from(transport: Transport) -> Self {
        match transport {
            Transport::Stream => Self::Stream,
            Transport::Grpc => Self::Grpc,
            Transport::Inproc => Self::Inproc,
        }
    }
}

/// How many expert nodes each region has, in the order given; never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Regions(Vec<(Region, u16)>);

impl FromStr for Regions {
    type Err = String;

    /// Parses `fr=2,se=2`.
    fn from_str(text: &str) -> Result<Self, String> {
        let mut regions: Vec<(Region, u16)> = Vec::new();
        for part in text.split(',') {
            let (name, count) = part
                .split_once('=')
                .ok_or(format!("{part:?} is not REGION=NODES, such as fr=2"))?;
            let region: Region = name.trim().parse().map_err(|error| format!("{error}"))?;
            let count = count
                .trim()
                .parse()
                .ok()
                .filter(|count| (1..=NODES_MAX).contains(count))
                .ok_or(format!("{region} needs 1 to {NODES_MAX} nodes, not {count:?}"))?;
            if regions.iter().any(|(other, _)| *other == region) {
                return Err(format!("{region} is named twice"));
            }
            regions.push((region, count));
        }
        Ok(Self(regions))
    }
}

/// One process to start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Its name in the cluster, such as `fr-expert-1`.
    pub name: NodeName,
    /// What it does.
    pub role: Role,
    /// Where it stands.
    pub region: Region,
}

impl Role {
    /// Whether such a process takes part in the raft group, and as what.
    pub fn votes_as(self) -> Option<VoterRole> {
        match self {
            Self::Coordinator => Some(VoterRole::Coordinator),
            Self::Witness => Some(VoterRole::Witness),
            Self::ExpertNode => None,
        }
    }
}

impl Regions {
    /// The regions with the number of their nodes, in the order given.
    pub fn iter(&self) -> impl Iterator<Item = (Region, u16)> + '_ {
        self.0.iter().copied()
    }

    /// The processes of the cluster, the first region's coordinator first.
    pub fn members(&self) -> Vec<Member> {
        let member = |name: String, role, region| {
            let name = name.parse().expect("a region and a number make a valid name");
            Member { name, role, region }
        };
        let mut members = Vec::new();
        for &(region, nodes) in &self.0 {
            members.push(member(format!("{region}-coordinator"), Role::Coordinator, region));
            for number in 1..=nodes {
                let name = format!("{region}-expert-{number}");
                members.push(member(name, Role::ExpertNode, region));
            }
        }
        members
    }

    /// Checks that every region has room for that many copies of each expert.
    ///
    /// # Errors
    /// The text gives the arithmetic: copies of one expert on one node would be lost together.
    pub fn check_replicas(&self, replicas: u16) -> Result<(), Misuse> {
        match self.0.iter().find(|(_, nodes)| *nodes < replicas) {
            None => Ok(()),
            Some((region, nodes)) => Err(Misuse(format!(
                "--replicas {replicas} does not fit: each copy of an expert stands on a different \
                 node of its region, which takes {replicas} nodes, but {region} has {nodes}; use \
                 --regions {region}={replicas} or --replicas {nodes}"
            ))),
        }
    }
}

/// What is the same for every process of a cluster.
#[derive(Debug, Clone)]
pub struct Common {
    /// Folder of the checkpoint.
    pub model: PathBuf,
    /// How weights are kept.
    pub weights: Weights,
    /// How keys and values are kept; what goes with the weights when absent.
    pub kv_dtype: Option<KvCache>,
    /// Compute threads of each process; its own default when absent.
    pub threads: Option<u16>,
    /// How rows travel.
    pub transport: Transport,
    /// The folder of everybody's certificates, where rows travel between processes.
    pub tls: Option<PathBuf>,
    /// What coordinators issue certificates with.
    pub ca: Option<CaConfig>,
    /// The folder in which each voter keeps its log in a folder of its own.
    pub raft: PathBuf,
    /// Where each region's API is reached.
    pub endpoints: Endpoints,
    /// The folder in which each coordinator keeps its audit log in a folder of its own, where it does.
    pub audit: Option<PathBuf>,
    /// The folder in which each witness keeps what it cosigned in a folder of its own.
    pub cosign: PathBuf,
    /// The expert nodes and where they listen.
    pub roster: Roster,
    /// Whether the public API asks for no key.
    pub open: bool,
    /// Where processes compute that do not compute on the processor.
    pub devices: BTreeMap<NodeName, DeviceId>,
    /// Whether rows travel by NCCL between those that compute on devices.
    pub nccl: bool,
}

/// All processes of one machine are at one site.
const SITE: &str = "this-machine";

impl Common {
    fn device_of(&self, member: &Member) -> DeviceId {
        self.devices.get(&member.name).copied().unwrap_or_default()
    }

    fn nccl(&self, member: &Member) -> Option<NcclConfig> {
        let is_there = self.nccl && self.device_of(member) != DeviceId::Cpu;
        is_there.then(|| NcclConfig::new(SITE.to_owned()))
    }

    fn tls_files(&self, member: &Member) -> Option<entente_tls::Files> {
        self.tls.as_ref().map(|folder| pki::files(folder, &member.name))
    }
}

/// The roster that every process is given. An expert node without an address lives inside its
/// coordinator; nobody dials it, so its name stands for its address.
pub fn roster(
    replicas: u16,
    nodes: impl Iterator<Item = (Member, Option<SocketAddr>)>,
) -> anyhow::Result<Roster> {
    let node = |(member, address): (Member, Option<SocketAddr>)| RosterNode {
        address: address.map_or(format!("{}:1", member.name), |address| address.to_string()),
        name: member.name,
        region: member.region,
    };
    Ok(Roster::new(CLUSTER_NAME.to_owned(), replicas, nodes.map(node).collect())?)
}

/// Where a process listens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Addresses {
    /// What it serves; for a witness this is its control plane.
    pub main: SocketAddr,
    /// The control plane of a voter.
    pub control: Option<SocketAddr>,
    /// Where an expert node tells its metrics; a coordinator does so beside its API.
    pub metrics: Option<SocketAddr>,
}

/// The voters that found the raft group, for [`Roster::with_voters`].
pub fn voters<'a>(
    processes: impl IntoIterator<Item = (&'a Member, &'a Addresses)>,
) -> Vec<RosterVoter> {
    let voter = |(member, addresses): (&Member, &Addresses)| {
        Some(RosterVoter {
            name: member.name.clone(),
            region: member.region,
            role: member.role.votes_as()?,
            address: addresses.control?.to_string(),
        })
    };
    processes.into_iter().filter_map(voter).collect()
}

/// The TOML text of the configuration of `member`, which listens at `addresses` and dials `via`.
pub fn configuration(
    common: &Common,
    member: &Member,
    addresses: Addresses,
    via: Via,
) -> anyhow::Result<String> {
    let listen = addresses.main;
    let membership = addresses.control.map(|control| {
        let data_dir = common.raft.join(member.name.as_str());
        let via = via.clone();
        // Any coordinator for any region: it is one machine, and a witness's region may have none.
        let ca = common.ca.clone().filter(|_| member.role == Role::Coordinator);
        service::Config { via, ca, ..service::Config::new(control.to_string(), data_dir) }
    });
    let text = match member.role {
        Role::Coordinator => toml::to_string(&entente_coordinator::Config {
            membership,
            ..coordinator(common, member, listen)
        }),
        Role::ExpertNode => toml::to_string(&expert_node(common, member, addresses, via)),
        Role::Witness => toml::to_string(&witness::Config {
            metrics_listen: None,
            name: member.name.clone(),
            region: member.region,
            tls: common.tls_files(member).context("a witness needs a certificate")?,
            membership: membership.context("a witness needs a control plane")?,
            cluster: common.roster.clone(),
            cosign: Some(witness::CosignConfig { dir: common.cosign.join(member.name.as_str()) }),
        }),
    };
    text.with_context(|| format!("the configuration of {} cannot be written", member.name))
}

/// Where one process computes, as `--device` says it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceOf {
    /// The process.
    pub name: NodeName,
    /// Its device.
    pub device: DeviceId,
}

impl FromStr for DeviceOf {
    type Err = String;

    /// Parses `fr-expert-1=cuda:0`.
    fn from_str(text: &str) -> Result<Self, String> {
        let (name, device) = text
            .split_once('=')
            .ok_or(format!("{text:?} is not NODE=DEVICE, such as fr-expert-1=cuda:0"))?;
        let name = name.parse().map_err(|error| format!("{error}"))?;
        Ok(Self { name, device: device.parse().map_err(|error| format!("{error}"))? })
    }
}

/// The configuration of an expert node.
fn expert_node(
    common: &Common,
    member: &Member,
    addresses: Addresses,
    via: Via,
) -> entente_expert_node::Config {
    entente_expert_node::Config {
        metrics_listen: addresses.metrics.map(|address| address.to_string()),
        membership: entente_expert_node::MembershipConfig { via, ..Default::default() },
        threads: common.threads.map(usize::from),
        device: common.device_of(member),
        tls: common.tls_files(member),
        nccl: common.nccl(member),
        ..entente_expert_node::Config::new(
            member.name.clone(),
            member.region,
            addresses.main.to_string(),
            common.model.clone(),
            common.weights.into(),
            common.roster.clone(),
        )
    }
}

/// The configuration of a coordinator whose API listens at `address`.
pub fn coordinator(
    common: &Common,
    member: &Member,
    address: SocketAddr,
) -> entente_coordinator::Config {
    entente_coordinator::Config {
        name: member.name.clone(),
        region: member.region,
        http: address.to_string(),
        model: common.model.clone(),
        weights: common.weights.into(),
        threads: common.threads.map(usize::from),
        device: common.device_of(member),
        transport: common.transport.into(),
        served_model_name: None,
        api: ApiConfig {
            endpoints: common.endpoints.clone(),
            open: common.open,
            ..ApiConfig::default()
        },
        engine: EngineConfig {
            kv_dtype: common.kv_dtype.map(KvDtype::from),
            ..EngineConfig::default()
        },
        tls: common.tls_files(member),
        audit: common
            .audit
            .as_ref()
            .map(|folder| ledger::Config { dir: folder.join(member.name.as_str()) }),
        nccl: common.nccl(member),
        membership: None,
        cluster: common.roster.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn regions(text: &str) -> Regions {
        text.parse().unwrap()
    }

    fn region(code: &str) -> Region {
        code.parse().unwrap()
    }

    #[test]
    fn processes_are_named_after_region_and_role() {
        let names: Vec<String> = regions("se=1,fr=2")
            .members()
            .iter()
            .map(|member| format!("{} {}", member.name, member.role))
            .collect();
        assert_eq!(
            names,
            [
                "se-coordinator coordinator",
                "se-expert-1 expert-node",
                "fr-coordinator coordinator",
                "fr-expert-1 expert-node",
                "fr-expert-2 expert-node",
            ]
        );
    }

    #[test]
    fn a_wrong_region_list_names_its_wrong_part() {
        for (text, part) in [
            ("", "REGION=NODES"),
            ("fr", "\"fr\""),
            ("fr=2,", "REGION=NODES"),
            ("FR=2", "\"FR\""),
            ("fr=0", "1 to 64"),
            ("fr=65", "1 to 64"),
            ("fr=x", "\"x\""),
            ("fr=1,fr=2", "twice"),
        ] {
            let error = text.parse::<Regions>().unwrap_err();
            assert!(error.contains(part), "{text:?}: {error}");
        }
    }

    #[test]
    fn replicas_that_do_not_fit_are_refused_with_the_arithmetic() {
        assert!(regions("fr=2,se=2").check_replicas(2).is_ok());
        let refusal = regions("fr=3,se=2").check_replicas(3).unwrap_err().to_string();
        assert!(refusal.contains("takes 3 nodes, but se has 2"), "{refusal}");
    }

    #[test]
    fn each_role_reads_the_configuration_that_is_written_for_it() {
        let members = regions("fr=2").members();
        let address: SocketAddr = "127.0.0.1:4001".parse().unwrap();
        let nodes = members[1..].iter().cloned().map(|member| (member, None));
        let common = Common {
            model: "a \"quoted\" folder".into(),
            weights: Weights::Bf16,
            kv_dtype: Some(KvCache::F32),
            threads: Some(2),
            transport: Transport::Inproc,
            tls: Some("certificates".into()),
            ca: None,
            raft: "raft".into(),
            audit: None,
            cosign: "cosign".into(),
            endpoints: [(region("fr"), "http://fr".to_owned())].into(),
            roster: roster(2, nodes).unwrap(),
            open: false,
            devices: BTreeMap::new(),
            nccl: false,
        };
        let addresses = Addresses { main: address, control: None, metrics: Some(address) };
        let text =
            |at: usize| configuration(&common, &members[at], addresses, Via::default()).unwrap();
        let coordinator: entente_coordinator::Config = toml::from_str(&text(0)).unwrap();
        let node: entente_expert_node::Config = toml::from_str(&text(2)).unwrap();
        assert_eq!((coordinator.cluster, node.cluster), (common.roster.clone(), common.roster));
        assert_eq!(node.model, common.model);
        assert_eq!(node.metrics_listen.as_deref(), Some("127.0.0.1:4001"));
        assert_eq!(coordinator.engine.kv_dtype, Some(KvDtype::F32));
        assert_eq!(coordinator.api.endpoints, common.endpoints);
        assert_eq!(node.tls, Some(pki::files("certificates".as_ref(), &members[2].name)));
        assert_eq!(coordinator.tls, Some(pki::files("certificates".as_ref(), &members[0].name)));
    }
    #[test]
    fn a_voter_is_told_where_its_control_plane_and_its_store_are_and_who_votes() {
        let mut members = regions("fr=1").members();
        let witness = Member {
            name: "witness".parse().unwrap(),
            role: Role::Witness,
            region: "de".parse().unwrap(),
        };
        members.push(witness);
        let at = |port: u16| SocketAddr::from(([127, 0, 0, 1], port));
        let addresses = [
            Addresses { main: at(1), control: Some(at(2)), metrics: None },
            Addresses { main: at(3), control: None, metrics: None },
            Addresses { main: at(4), control: Some(at(4)), metrics: None },
        ];
        let voters = voters(members.iter().zip(&addresses));
        let common = Common {
            model: "model".into(),
            weights: Weights::Bf16,
            kv_dtype: None,
            threads: None,
            transport: Transport::Stream,
            tls: Some("certificates".into()),
            ca: Some(CaConfig::new("cas".into())),
            raft: "raft".into(),
            audit: None,
            cosign: "cosign".into(),
            endpoints: [(region("fr"), "http://fr".to_owned())].into(),
            roster: roster(1, [(members[1].clone(), Some(at(3)))].into_iter())
                .and_then(|roster| Ok(roster.with_voters(voters)?))
                .unwrap(),
            open: false,
            devices: BTreeMap::new(),
            nccl: false,
        };
        let via = Via::from_iter([("127.0.0.1:3".to_owned(), "127.0.0.1:9".to_owned())]);
        let text =
            |at: usize| configuration(&common, &members[at], addresses[at], via.clone()).unwrap();
        let coordinator: entente_coordinator::Config = toml::from_str(&text(0)).unwrap();
        let node: entente_expert_node::Config = toml::from_str(&text(1)).unwrap();
        let witness: witness::Config = toml::from_str(&text(2)).unwrap();
        assert_eq!(node.cluster, common.roster);
        assert_eq!(node.membership.via, via);
        let names: Vec<_> = common.roster.voters().iter().map(|v| v.name.as_str()).collect();
        assert_eq!(names, ["fr-coordinator", "witness"]);
        let membership = coordinator.membership.unwrap();
        assert_eq!(membership.listen, "127.0.0.1:2");
        assert_eq!(membership.via, via);
        assert_eq!(membership.data_dir, PathBuf::from("raft/fr-coordinator"));
        assert_eq!(witness.membership.listen, "127.0.0.1:4");
        assert_eq!(witness.cosign.unwrap().dir, PathBuf::from("cosign/witness"));
        assert_eq!((membership.ca, witness.membership.ca), (common.ca, None));
    }
}
