//! What stands in the folder of one process on a machine of its own, and how it gets there.
//!
//! ```text
//!   DIR/<role>.toml      the configuration, which an operator may change
//!   DIR/tls/ca.pem       the CAs of all regions
//!   DIR/tls/<name>.pem   certificate and key, replaced by the process itself at half-life
//!   DIR/tls/ca/          CAs whose keys are here: <region>.pem and <region>.key
//!   DIR/raft/            the log of a voter
//!   DIR/audit/           the audit log of a coordinator
//!   DIR/cosign/          the key of a witness, and what it cosigned
//!   DIR/cluster.json     on the founder: how an operator's verbs find the cluster (--data-dir)
//! ```
//!
//! Nothing that is there is overwritten but certificates: a process that joins once more, because
//! its certificate has expired, keeps its configuration and its log.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use entente_membership::enrolment::write_private;
use entente_membership::roster::Roster;
use entente_membership::state::Role;
use entente_model::kernels::DeviceId;
use entente_proto::ids::{NodeName, Region};
use entente_tls::Files;
use serde::Serialize;

use crate::bundled;
use crate::cluster::plan::Weights;
use crate::exit::Misuse;

/// What has to be said about a process on the machine that it will run on.
#[derive(Debug, Args)]
pub struct MachineArgs {
    /// Folder of the process: configuration, certificate, log. Made if need be; kept private.
    #[arg(long, env = "ENTENTE_DIR", value_name = "DIR")]
    pub dir: PathBuf,

    /// Where it listens: the control port of a coordinator or witness, the exchange port of an expert
    /// node.
    #[arg(long, env = "ENTENTE_LISTEN", value_name = "HOST:PORT")]
    pub listen: String,

    /// Where other processes reach that; --listen if absent.
    #[arg(long, env = "ENTENTE_ADVERTISE", value_name = "HOST:PORT")]
    pub advertise: Option<String>,

    /// Where the public API listens; a coordinator's.
    #[arg(long, env = "ENTENTE_HTTP", value_name = "HOST:PORT", default_value = "127.0.0.1:8080")]
    pub http: String,

    /// Where an expert node or a witness shows /metrics and /livez; nowhere if absent. A coordinator
    /// does so at --http.
    #[arg(long, env = "ENTENTE_METRICS", value_name = "HOST:PORT")]
    pub metrics: Option<String>,

    /// Checkpoint folder; the bundled demo model if absent. Not for a witness.
    #[arg(long, env = "ENTENTE_MODEL", value_name = "DIR")]
    pub model: Option<PathBuf>,

    /// How weights are kept in memory; the same for every process.
    #[arg(long, env = "ENTENTE_WEIGHTS", value_enum, default_value = "bf16")]
    pub weights: Weights,

    /// Bytes that expert weights may take; not limited if absent. An expert node's.
    #[arg(long, env = "ENTENTE_MEMORY_BYTES", value_name = "N")]
    pub memory_bytes: Option<u64>,

    /// Where an expert node or a coordinator computes: cpu, or cuda:N for the CUDA device of this
    /// number.
    #[arg(long, env = "ENTENTE_DEVICE", value_name = "DEVICE", default_value_t)]
    pub device: DeviceId,

    /// The data centre, such as fr-par-1; replicas of an expert keep apart. An expert node's.
    #[arg(long, env = "ENTENTE_SITE", value_name = "NAME")]
    pub site: Option<String>,
}

/// One process, as its certificate and its cluster have it.
#[derive(Debug)]
pub struct Process {
    /// Its name.
    pub name: NodeName,
    /// Where it stands.
    pub region: Region,
    /// What it does.
    pub role: Role,
    /// The founders.
    pub roster: Roster,
    /// Control ports besides those of the founders.
    pub contacts: Vec<String>,
    /// It is no founder.
    pub joins: bool,
    /// How long the certificates live that it issues, if that was said.
    pub leaf_life_s: Option<u64>,
}

/// A role's configuration as far as it is not the default. The three roles have these keys in
/// common, or do not have them; what a role does not know it is not given.
#[derive(Debug, Serialize)]
struct RoleFile<'a> {
    name: &'a NodeName,
    region: Region,
    #[serde(skip_serializing_if = "Option::is_none")]
    http: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    listen: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    advertise: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    metrics_listen: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    site: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    memory_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    device: Option<DeviceId>,
    #[serde(skip_serializing_if = "Option::is_none")]
    model: Option<&'a Path>,
    #[serde(skip_serializing_if = "Option::is_none")]
    weights: Option<entente_model::kernels::WeightFormat>,
    tls: Files,
    #[serde(skip_serializing_if = "Option::is_none")]
    audit: Option<Dir>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cosign: Option<Dir>,
    membership: Membership<'a>,
    cluster: &'a Roster,
}

#[derive(Debug, Serialize)]
struct Membership<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    listen: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    advertise: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data_dir: Option<PathBuf>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    join: bool,
    #[serde(skip_serializing_if = "<[String]>::is_empty")]
    contacts: &'a [String],
    #[serde(skip_serializing_if = "Option::is_none")]
    ca: Option<Dir>,
}

/// A section that is a folder, and of one with CAs what is done with them.
#[derive(Debug, Serialize)]
struct Dir {
    dir: PathBuf,
    #[serde(skip_serializing_if = "Option::is_none")]
    leaf_life_s: Option<u64>,
}

/// The folder of one process.
#[derive(Debug)]
pub struct Folder(PathBuf);

impl Folder {
    /// Takes the folder, and makes it if need be.
    pub fn open(dir: &Path) -> anyhow::Result<Self> {
        private_dir(dir)?;
        let root = dir.canonicalize().with_context(|| format!("cannot use {}", dir.display()))?;
        private_dir(&root.join("tls"))?;
        Ok(Self(root))
    }

    /// The folder itself.
    pub fn root(&self) -> &Path {
        &self.0
    }

    /// Where CAs are whose keys are here.
    pub fn ca_dir(&self) -> PathBuf {
        self.0.join("tls").join("ca")
    }

    /// The certificate and key of a process, in one file: it is replaced at one stroke.
    pub fn files(&self, name: &NodeName) -> Files {
        let own = self.0.join("tls").join(format!("{name}.pem"));
        Files { ca: self.0.join("tls").join("ca.pem"), certificate: own.clone(), key: own }
    }

    /// Where the configuration of a role is.
    pub fn config(&self, role: Role) -> PathBuf {
        self.0.join(format!("{}.toml", role.name()))
    }

    /// Writes a file that only its owner reads.
    pub fn write(&self, path: &Path, text: &str) -> anyhow::Result<()> {
        write_private(path, text).with_context(|| format!("cannot write {}", path.display()))
    }

    /// Writes what makes a machine a member: certificate and key, CAs, and the configuration unless
    /// there is one. Whether it was written.
    pub fn settle(
        &self,
        process: &Process,
        machine: &MachineArgs,
        ca_pem: &str,
        pair_pem: &str,
    ) -> anyhow::Result<bool> {
        let files = self.files(&process.name);
        self.write(&files.ca, ca_pem)?;
        self.write(&files.key, pair_pem)?;
        let path = self.config(process.role);
        if path.exists() {
            return Ok(false);
        }
        let model = match process.role {
            Role::Witness => None,
            _ => Some(self.model(machine)?),
        };
        if process.role == Role::Coordinator {
            private_dir(&self.ca_dir())?;
        }
        let text = self.configuration(process, machine, model.as_deref())?;
        self.write(&path, &text)?;
        Ok(true)
    }

    fn model(&self, machine: &MachineArgs) -> anyhow::Result<PathBuf> {
        match &machine.model {
            None => bundled::unpack(&self.0.join("models")),
            Some(folder) => Ok(folder
                .canonicalize()
                .map_err(|error| Misuse(format!("--model {}: {error}", folder.display())))?),
        }
    }

    fn configuration(
        &self,
        process: &Process,
        machine: &MachineArgs,
        model: Option<&Path>,
    ) -> anyhow::Result<String> {
        let (votes, role) = (process.role.votes(), process.role);
        let (listen, advertise) = (Some(&*machine.listen), machine.advertise.as_deref());
        let is_expert_node = role == Role::ExpertNode;
        let is_coordinator = role == Role::Coordinator;
        let computes = is_expert_node || is_coordinator;
        let file = RoleFile {
            name: &process.name,
            region: process.region,
            http: is_coordinator.then_some(&machine.http),
            listen: listen.filter(|_| !votes),
            advertise: advertise.filter(|_| !votes),
            metrics_listen: machine.metrics.as_deref().filter(|_| !is_coordinator),
            site: machine.site.as_deref().filter(|_| is_expert_node),
            memory_bytes: machine.memory_bytes.filter(|_| is_expert_node),
            device: Some(machine.device).filter(|d| computes && *d != DeviceId::Cpu),
            model,
            weights: model.map(|_| machine.weights.into()),
            tls: self.files(&process.name),
            audit: is_coordinator.then(|| Dir { dir: self.0.join("audit"), leaf_life_s: None }),
            cosign: (role == Role::Witness)
                .then(|| Dir { dir: self.0.join("cosign"), leaf_life_s: None }),
            membership: Membership {
                listen: listen.filter(|_| votes),
                advertise: advertise.filter(|_| votes),
                data_dir: votes.then(|| self.0.join("raft")),
                join: votes && process.joins,
                contacts: &process.contacts,
                ca: is_coordinator
                    .then(|| Dir { dir: self.ca_dir(), leaf_life_s: process.leaf_life_s }),
            },
            cluster: &process.roster,
        };
        let text = toml::to_string(&file).context("the configuration cannot be written")?;
        Ok(format!(
            "# docs/configuration.md explains every key. This file is not written again.\n\n{text}"
        ))
    }
}

/// Makes a folder that nobody else looks into.
pub fn private_dir(path: &Path) -> anyhow::Result<()> {
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.with_context(|| format!("cannot create {}", path.display()))
}

/// A file that must not be there yet.
pub fn expect_absent(path: &Path) -> Result<(), Misuse> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        _ => Err(Misuse(format!("{} is there already; nothing was changed", path.display()))),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use entente_membership::roster::{RosterVoter, VoterRole};

    use super::*;
    use crate::verbs::witness;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        machine: MachineArgs,
    }

    fn machine(dir: &Path) -> MachineArgs {
        let dir = dir.to_str().unwrap();
        let flags =
            ["x", "--dir", dir, "--listen", "0.0.0.0:7200", "--advertise", "a.example:7200"];
        Line::try_parse_from(flags).unwrap().machine
    }

    fn process(role: Role) -> Process {
        let founder = RosterVoter {
            name: "fr-coordinator".parse().unwrap(),
            region: "fr".parse().unwrap(),
            role: VoterRole::Coordinator,
            address: "10.1.0.1:7200".to_owned(),
        };
        Process {
            name: "se-one".parse().unwrap(),
            region: "se".parse().unwrap(),
            role,
            roster: Roster::founded("production".to_owned(), 2, vec![founder]).unwrap(),
            contacts: vec!["10.3.0.1:7200".to_owned()],
            joins: true,
            leaf_life_s: Some(7),
        }
    }

    #[test]
    fn each_role_understands_the_configuration_that_is_written_for_it() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::open(dir.path()).unwrap();
        let machine = machine(dir.path());
        let text = |role| {
            let process = process(role);
            assert!(folder.settle(&process, &machine, "ca", "pair").unwrap());
            assert!(!folder.settle(&process, &machine, "ca", "pair").unwrap(), "written again");
            fs::read_to_string(folder.config(role)).unwrap()
        };
        let coordinator: entente_coordinator::Config =
            toml::from_str(&text(Role::Coordinator)).unwrap();
        let membership = coordinator.membership.unwrap();
        assert!(membership.join);
        assert_eq!(membership.advertise.as_deref(), Some("a.example:7200"));
        let ca = membership.ca.unwrap();
        assert_eq!((ca.dir, ca.leaf_life_s), (folder.ca_dir(), 7));
        assert_eq!(coordinator.audit.unwrap().dir, folder.root().join("audit"));
        assert_eq!(membership.contacts, ["10.3.0.1:7200"]);
        let node: entente_expert_node::Config = toml::from_str(&text(Role::ExpertNode)).unwrap();
        assert_eq!(node.listen, "0.0.0.0:7200");
        assert_eq!(node.cluster, coordinator.cluster);
        assert_eq!(node.membership.contacts, ["10.3.0.1:7200"]);
        let witness: witness::Config = toml::from_str(&text(Role::Witness)).unwrap();
        assert_eq!(witness.membership.data_dir, folder.root().join("raft"));
        assert_eq!(witness.tls.key, witness.tls.certificate);
        assert_eq!(witness.cosign.unwrap().dir, folder.root().join("cosign"));
    }
}
