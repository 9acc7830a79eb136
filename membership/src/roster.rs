//! The cluster as a configuration file lists it: the `[cluster]` section of every process.
//!
//! ```toml
//! [cluster]
//! name = "demo"
//! replicas = 2
//!
//! [[cluster.nodes]]
//! name = "fr-expert-1"
//! region = "fr"
//! address = "127.0.0.1:7101"
//! ```
//!
//! `nodes` are the expert nodes. `voters` are the coordinators and witnesses that found the raft
//! group, each with the address of its control plane. All processes of a cluster must be given the
//! same list; the order in the file does not matter. A roster that exists is valid.
//!
//! Without `voters` the list is all that there is: nobody joins, and nobody is moved.

use std::collections::{BTreeMap, BTreeSet};

use entente_proto::identity::{self, Expected};
use entente_proto::ids::{NodeId, NodeName, Region};
use entente_proto::placement::PlacementNode;
use serde::{Deserialize, Serialize};

use crate::state::{Command, NodeSpec, Role};

/// Most expert nodes in a file.
pub const NODES_MAX: usize = 1_024;
/// Most founders of the raft group in a file.
pub const VOTERS_MAX: usize = 9;
/// Most replicas of an expert in a region.
pub const REPLICAS_MAX: u16 = 16;
/// Longest address in bytes; a DNS name has at most 253.
const ADDRESS_LEN_MAX: usize = 260;

/// A validated list of the expert nodes of a cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "RosterFile", into = "RosterFile")]
pub struct Roster(RosterFile);

/// The section as it is written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RosterFile {
    name: String,
    #[serde(default = "one")]
    replicas: u16,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    voters: Vec<RosterVoter>,
    #[serde(default)]
    nodes: Vec<RosterNode>,
}

fn one() -> u16 {
    1
}

/// One expert node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RosterNode {
    /// Unique in the cluster.
    pub name: NodeName,
    /// The country that it stands in.
    pub region: Region,
    /// Where coordinators reach it, `host:port`.
    pub address: String,
}

/// One founder of the raft group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RosterVoter {
    /// Unique in the cluster.
    pub name: NodeName,
    /// The country that it stands in.
    pub region: Region,
    /// Whether it serves a model.
    pub role: VoterRole,
    /// Where its control plane is reached, `host:port`.
    pub address: String,
}

/// What a voter does besides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VoterRole {
    /// It serves a model.
    Coordinator,
    /// Nothing.
    Witness,
}

/// Why a roster is not usable.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidRoster {
    /// The cluster's name ends up in identities.
    #[error("cluster.name {0:?} is not 1 to 63 of a-z, 0-9 and -, not starting or ending with -")]
    Name(String),
    /// Too few or too many nodes.
    #[error("cluster.nodes has {0} nodes, allowed is 1 to {NODES_MAX}")]
    NodeCount(usize),
    /// Too many voters.
    #[error("cluster.voters has {0} voters, allowed are {VOTERS_MAX}")]
    VoterCount(usize),
    /// Two members have one name.
    #[error("cluster: the name {0} is there twice")]
    NameTwice(NodeName),
    /// Two members have one address.
    #[error("cluster: the address {0} is there twice")]
    AddressTwice(String),
    /// An address cannot be dialled.
    #[error("cluster: address {address:?} of {node} is not host:port: {reason}")]
    Address {
        /// The node.
        node: NodeName,
        /// What the file says.
        address: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// No or too many replicas.
    #[error("cluster.replicas is {0}, allowed is 1 to {REPLICAS_MAX}")]
    ReplicaCount(u16),
    /// Replicas of one expert would have to share a node.
    #[error(
        "cluster.replicas is {replicas}, so region {region} needs {replicas} nodes; it has {nodes}"
    )]
    TooFewNodes {
        /// Replicas wanted of each expert.
        replicas: u16,
        /// The region.
        region: Region,
        /// Its nodes.
        nodes: usize,
    },
}

impl Roster {
    /// Checks and keeps the list.
    pub fn new(name: String, replicas: u16, nodes: Vec<RosterNode>) -> Result<Self, InvalidRoster> {
        Self::try_from(RosterFile { name, replicas, voters: Vec::new(), nodes })
    }

    /// Founders of a raft group, which expert nodes join.
    pub fn founded(
        name: String,
        replicas: u16,
        voters: Vec<RosterVoter>,
    ) -> Result<Self, InvalidRoster> {
        Self::try_from(RosterFile { name, replicas, voters, nodes: Vec::new() })
    }

    /// The same with founders of a raft group.
    pub fn with_voters(self, voters: Vec<RosterVoter>) -> Result<Self, InvalidRoster> {
        Self::try_from(RosterFile { voters, ..self.0 })
    }

    /// The roster whose [`Roster::specs`] these are.
    ///
    /// # Errors
    /// They are not those of a roster.
    pub fn of_specs(
        name: String,
        replicas: u16,
        specs: Vec<NodeSpec>,
    ) -> Result<Self, InvalidRoster> {
        let (mut nodes, mut voters) = (Vec::new(), Vec::new());
        for NodeSpec { name, region, role, address, .. } in specs {
            let role = match role {
                Role::ExpertNode => {
                    nodes.push(RosterNode { name, region, address });
                    continue;
                }
                Role::Coordinator => VoterRole::Coordinator,
                Role::Witness => VoterRole::Witness,
            };
            voters.push(RosterVoter { name, region, role, address });
        }
        Self::try_from(RosterFile { name, replicas, voters, nodes })
    }

    /// The cluster's name.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// What a process of this cluster must be: its role and, where it is known, which one.
    pub fn expect(&self, role: identity::Role, member: Option<(Region, NodeName)>) -> Expected {
        let cluster = self.name().parse().expect("a roster's name was checked as a node's is");
        Expected { cluster, roles: vec![role], member }
    }

    /// The founders of the raft group, in order of name; none in a cluster that is only a list.
    pub fn voters(&self) -> &[RosterVoter] {
        &self.0.voters
    }

    /// Replicas of each expert in each region.
    pub fn replicas(&self) -> u16 {
        self.0.replicas
    }

    /// The nodes with their numbers, in order of name.
    pub fn nodes(&self) -> impl Iterator<Item = (NodeId, &RosterNode)> {
        self.0.nodes.iter().enumerate().map(|(id, node)| (NodeId(id as u32), node))
    }

    /// The node of this name, with its number.
    pub fn node(&self, name: &NodeName) -> Option<(NodeId, &RosterNode)> {
        self.nodes().find(|(_, node)| node.name == *name)
    }

    /// The nodes as the placement planner takes them.
    pub fn placement_nodes(&self) -> Vec<PlacementNode> {
        let node = |(id, node): (NodeId, &RosterNode)| PlacementNode {
            id,
            region: node.region,
            memory_bytes: None,
        };
        self.nodes().map(node).collect()
    }

    /// The command that founds the cluster. Without voters it numbers the nodes as
    /// [`Roster::nodes`] does.
    pub fn found(&self) -> Command {
        Command::Found(self.specs())
    }

    /// Everybody in it, for [`crate::voter::genesis`].
    pub fn specs(&self) -> Vec<NodeSpec> {
        let spec = |(name, region, role, address): (&NodeName, Region, Role, &str)| NodeSpec {
            name: name.clone(),
            region,
            site: String::new(),
            role,
            address: address.to_owned(),
            memory_bytes: None,
            kernel_class: String::new(),
            device: None,
        };
        let voter = |voter: &RosterVoter| match voter.role {
            VoterRole::Coordinator => Role::Coordinator,
            VoterRole::Witness => Role::Witness,
        };
        let nodes = self.0.nodes.iter().map(|n| (&n.name, n.region, Role::ExpertNode, &*n.address));
        let voters = self.0.voters.iter().map(|v| (&v.name, v.region, voter(v), &*v.address));
        nodes.chain(voters).map(spec).collect()
    }
}

impl TryFrom<RosterFile> for Roster {
    type Error = InvalidRoster;

    fn try_from(mut file: RosterFile) -> Result<Self, InvalidRoster> {
        if file.name.parse::<NodeName>().is_err() {
            return Err(InvalidRoster::Name(file.name.chars().take(80).collect()));
        }
        // Where there are voters, nodes may join later.
        let nodes_min = usize::from(file.voters.is_empty());
        if !(nodes_min..=NODES_MAX).contains(&file.nodes.len()) {
            return Err(InvalidRoster::NodeCount(file.nodes.len()));
        }
        if !(1..=REPLICAS_MAX).contains(&file.replicas) {
            return Err(InvalidRoster::ReplicaCount(file.replicas));
        }
        if file.voters.len() > VOTERS_MAX {
            return Err(InvalidRoster::VoterCount(file.voters.len()));
        }
        file.nodes.sort_by(|a, b| a.name.cmp(&b.name));
        file.voters.sort_by(|a, b| a.name.cmp(&b.name));
        check_members(&file)?;
        let mut regions: BTreeMap<Region, usize> = BTreeMap::new();
        for node in &file.nodes {
            *regions.entry(node.region).or_default() += 1;
        }
        let replicas = file.replicas;
        if let Some((region, nodes)) = regions.into_iter().find(|(_, n)| *n < replicas.into()) {
            return Err(InvalidRoster::TooFewNodes { replicas, region, nodes });
        }
        Ok(Self(file))
    }
}

impl From<Roster> for RosterFile {
    fn from(roster: Roster) -> Self {
        roster.0
    }
}

/// No name and no address may be there twice, and each must be dialable.
fn check_members(file: &RosterFile) -> Result<(), InvalidRoster> {
    let (mut names, mut addresses) = (BTreeSet::new(), BTreeSet::new());
    let nodes = file.nodes.iter().map(|node| (&node.name, &node.address));
    let voters = file.voters.iter().map(|voter| (&voter.name, &voter.address));
    for (name, address) in nodes.chain(voters) {
        check_address(name, address)?;
        if !names.insert(name) {
            return Err(InvalidRoster::NameTwice(name.clone()));
        }
        if !addresses.insert(address) {
            return Err(InvalidRoster::AddressTwice(address.clone()));
        }
    }
    Ok(())
}

/// A name or an IP address, a colon, and a port that can be dialled.
fn check_address(node: &NodeName, address: &str) -> Result<(), InvalidRoster> {
    let error = |reason| InvalidRoster::Address {
        node: node.clone(),
        address: address.chars().take(80).collect(),
        reason,
    };
    if address.len() > ADDRESS_LEN_MAX {
        return Err(error("too long"));
    }
    let (host, port) = address.rsplit_once(':').ok_or(error("the port is missing"))?;
    match port.parse::<u16>() {
        Ok(0) => return Err(error("port 0 cannot be dialled")),
        Ok(_) => {}
        Err(_) => return Err(error("the port is not a number from 1 to 65535")),
    }
    let ip_v6 = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    let valid = match ip_v6 {
        Some(ip) => ip.parse::<std::net::Ipv6Addr>().is_ok(),
        None => {
            !host.is_empty()
                && host.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'.')
        }
    };
    if valid { Ok(()) } else { Err(error("the host is neither a name nor an address")) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::State;

    #[derive(Debug, Serialize, Deserialize)]
    struct File {
        cluster: Roster,
    }

    const TWO_COUNTRIES: &str = r#"
        [cluster]
        name = "demo"
        replicas = 1
        nodes = [
            { name = "se-expert-1", region = "se", address = "[::1]:7201" },
            { name = "fr-expert-2", region = "fr", address = "expert-2.fr.example:7102" },
            { name = "fr-expert-1", region = "fr", address = "127.0.0.1:7101" },
        ]"#;

    #[test]
    fn a_roster_founds_a_cluster_with_the_numbers_that_it_tells() {
        let roster = toml::from_str::<File>(TWO_COUNTRIES).unwrap().cluster;
        let mut state = State::new();
        state.apply(roster.found()).unwrap();
        for (id, node) in roster.nodes() {
            assert_eq!(state.node(&node.name).map(|member| member.id), Some(id));
        }
        let names: Vec<_> = roster.nodes().map(|(_, node)| node.name.as_str()).collect();
        assert_eq!(names, ["fr-expert-1", "fr-expert-2", "se-expert-1"]);
    }

    #[test]
    fn a_roster_survives_being_written_and_read() {
        let file: File = toml::from_str(TWO_COUNTRIES).unwrap();
        let again: File = toml::from_str(&toml::to_string(&file).unwrap()).unwrap();
        assert_eq!(again.cluster, file.cluster);
    }

    #[test]
    fn what_is_wrong_in_a_roster_is_named() {
        let cases = [
            ("\"demo\"", "\"Demo\"", "cluster.name \"Demo\""),
            ("replicas = 1", "replicas = 0", "cluster.replicas is 0"),
            ("replicas = 1", "replicas = 17", "cluster.replicas is 17"),
            ("replicas = 1", "replicas = 2", "so region se needs 2 nodes; it has 1"),
            ("replicas = 1", "replica = 1", "unknown field `replica`"),
            ("region = \"se\"", "country = \"se\"", "unknown field `country`"),
            ("region = \"se\"", "region = \"SE\"", "\"SE\" is not a region"),
            ("\"fr-expert-2\"", "\"fr-expert-1\"", "the name fr-expert-1 is there twice"),
            ("expert-2.fr.example:7102", "127.0.0.1:7101", "the address 127.0.0.1:7101 is there"),
            ("[::1]:7201", "[::1]", "the port is not a number"),
            ("[::1]:7201", "localhost", "the port is missing"),
            ("[::1]:7201", "::1:7201", "the host is neither"),
            ("[::1]:7201", "[::g]:7201", "the host is neither"),
            ("[::1]:7201", "http://se:7201", "the host is neither"),
            ("[::1]:7201", "se:0", "port 0"),
            ("[::1]:7201", "se:70000", "the port is not a number"),
        ];
        for (text, spoilt, cause) in cases {
            let spoilt = TWO_COUNTRIES.replace(text, spoilt);
            let error = toml::from_str::<File>(&spoilt).unwrap_err().to_string();
            assert!(error.contains(cause), "{error} does not say {cause}");
        }
        let twice = TWO_COUNTRIES.replace("replicas = 1", "replicas = 1\n        voters = [{ name = \"w\", region = \"de\", role = \"witness\", address = \"127.0.0.1:7101\" }]");
        let error = toml::from_str::<File>(&twice).unwrap_err().to_string();
        assert!(error.contains("the address 127.0.0.1:7101 is there twice"), "{error}");
        let empty = Roster::new("demo".to_owned(), 1, Vec::new());
        assert_eq!(empty, Err(InvalidRoster::NodeCount(0)));
    }
}
