//! Who a process is, as its certificate says it: one URI,
//! `spiffe://<cluster>/region/<cc>/role/<role>/node/<name>`.
//!
//! There is exactly one way to write an identity; what differs in a single byte is none. The
//! region in here is the one that counts, whatever a configuration file says. A CA is named by the
//! region that it speaks for, `spiffe://<cluster>/region/<cc>`.
//!
//! What it does not know: certificates. It reads the text that was found in one.

use std::fmt;
use std::str::FromStr;

use crate::ids::{NodeName, Region};

/// Longest identity in bytes, before anything of it is looked at.
const IDENTITY_LEN_MAX: usize = 256;

/// What a process may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Sends rows to experts.
    Coordinator,
    /// Holds experts.
    Expert,
    /// Votes, and holds nothing.
    Witness,
    /// A person or a program that runs the cluster.
    Operator,
}

impl Role {
    const ALL: [Self; 4] = [Self::Coordinator, Self::Expert, Self::Witness, Self::Operator];

    /// Its name in an identity.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Coordinator => "coordinator",
            Self::Expert => "expert",
            Self::Witness => "witness",
            Self::Operator => "operator",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// One process of one cluster.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Identity {
    /// The cluster; written like a node's name.
    pub cluster: NodeName,
    /// The country that the process stands in.
    pub region: Region,
    /// What it may do.
    pub role: Role,
    /// Its name in the cluster.
    pub node: NodeName,
}

/// A text that is no identity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} is not spiffe://<cluster>/region/<cc>/role/<coordinator|expert|witness|operator>\
     /node/<name>"
)]
pub struct InvalidIdentity {
    text: String,
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { cluster, region, role, node } = self;
        write!(f, "spiffe://{cluster}/region/{region}/role/{role}/node/{node}")
    }
}

impl FromStr for Identity {
    type Err = InvalidIdentity;

    fn from_str(text: &str) -> Result<Self, InvalidIdentity> {
        parse(text).ok_or_else(|| InvalidIdentity { text: text.chars().take(80).collect() })
    }
}

fn parse(text: &str) -> Option<Identity> {
    if text.len() > IDENTITY_LEN_MAX {
        return None;
    }
    // The parts' own rules admit no slash, no per cent sign and no upper case letter, so there is
    // nothing to decode or to normalise, and no second spelling.
    let mut parts = text.strip_prefix("spiffe://")?.split('/');
    let cluster = parts.next()?.parse().ok()?;
    let mut value_of = |key: &str| parts.next().filter(|part| *part == key).and(parts.next());
    let region = value_of("region")?.parse().ok()?;
    let role = value_of("role")?;
    let role = Role::ALL.into_iter().find(|known| known.as_str() == role)?;
    let node = value_of("node")?.parse().ok()?;
    parts.next().is_none().then_some(Identity { cluster, region, role, node })
}

/// What a CA speaks for: the processes of one cluster in one region.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Domain {
    /// The cluster.
    pub cluster: NodeName,
    /// The country.
    pub region: Region,
}

impl fmt::Display for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spiffe://{}/region/{}", self.cluster, self.region)
    }
}

/// A text that names no region of a cluster.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not spiffe://<cluster>/region/<cc>")]
pub struct InvalidDomain {
    text: String,
}

impl FromStr for Domain {
    type Err = InvalidDomain;

    fn from_str(text: &str) -> Result<Self, InvalidDomain> {
        let parse = || {
            let (cluster, region) = text.strip_prefix("spiffe://")?.split_once("/region/")?;
            Some(Self { cluster: cluster.parse().ok()?, region: region.parse().ok()? })
        };
        parse().ok_or_else(|| InvalidDomain { text: text.chars().take(80).collect() })
    }
}

impl Identity {
    /// Where it is at home: what a CA must speak for to speak of it.
    pub fn domain(&self) -> Domain {
        Domain { cluster: self.cluster.clone(), region: self.region }
    }
}

/// What the process at the other end must be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expected {
    /// Its cluster: ours.
    pub cluster: NodeName,
    /// Its role: one of these.
    pub roles: Vec<Role>,
    /// Its country and its name, where it is known whom to expect.
    pub member: Option<(Region, NodeName)>,
}

/// The process at the other end is not the one that it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the peer is {have}, expected was {want}")]
pub struct Stranger {
    have: Box<Identity>,
    want: Box<Expected>,
}

impl fmt::Display for Expected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { cluster, roles, member } = self;
        let roles: Vec<&str> = roles.iter().map(|role| role.as_str()).collect();
        let role = roles.join(" or ");
        match member {
            Some((region, node)) => write!(f, "{role} {node} of {cluster} in {region}"),
            None => write!(f, "a {role} of {cluster}"),
        }
    }
}

impl Expected {
    /// Compares every part that is known.
    ///
    /// # Errors
    /// Names both: who it is and who it should be.
    pub fn check(&self, identity: &Identity) -> Result<(), Stranger> {
        let member_matches = self
            .member
            .as_ref()
            .is_none_or(|(region, node)| (*region, node) == (identity.region, &identity.node));
        if self.cluster == identity.cluster && self.roles.contains(&identity.role) && member_matches
        {
            return Ok(());
        }
        Err(Stranger { have: Box::new(identity.clone()), want: Box::new(self.clone()) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "spiffe://production/region/fr/role/expert/node/fr-expert-1";

    #[test]
    fn an_identity_is_printed_as_it_was_read() {
        for role in Role::ALL {
            let text = GOOD.replace("expert/", &format!("{role}/"));
            assert_eq!(text.parse::<Identity>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn whatever_is_written_otherwise_is_no_identity() {
        let long = format!("spiffe://{}", "a".repeat(IDENTITY_LEN_MAX));
        let changes = [
            ("spiffe://", "SPIFFE://"),
            ("spiffe://", "https://"),
            ("production", "Production"),
            ("production", ""),
            ("production", "production:443"),
            ("production", "user@production"),
            ("/fr/", "/FR/"),
            ("/fr/", "/fra/"),
            ("/fr/", "//"),
            ("/region/fr", ""),
            ("region/fr/role/expert", "role/expert/region/fr"),
            ("role/expert", "role/expert-node"),
            ("role/expert", "role/"),
            ("fr-expert-1", "fr%2Dexpert-1"),
            ("fr-expert-1", ""),
            ("fr-expert-1", "fr-expert-1/"),
            ("fr-expert-1", "fr-expert-1/node/fr-expert-2"),
            ("fr-expert-1", "fr-expert-1?a=b"),
            ("fr-expert-1", "fr-expert-1\0"),
            (GOOD, &long),
            (GOOD, ""),
        ];
        for (from, to) in changes {
            let text = GOOD.replacen(from, to, 1);
            assert_ne!(text, GOOD);
            assert!(text.parse::<Identity>().is_err(), "{text:?} was accepted");
        }
    }

    #[test]
    fn a_ca_is_named_by_its_cluster_and_region_and_by_nothing_else() {
        let domain: Domain = "spiffe://production/region/fr".parse().unwrap();
        assert_eq!(domain.to_string(), "spiffe://production/region/fr");
        assert_eq!(GOOD.parse::<Identity>().unwrap().domain(), domain);
        for text in [
            GOOD,
            "spiffe://production",
            "spiffe://production/region/",
            "spiffe://production/region/fr/",
            "spiffe://production/region/FR",
            "spiffe://Production/region/fr",
            "spiffe:///region/fr",
            "https://production/region/fr",
            "",
        ] {
            assert!(text.parse::<Domain>().is_err(), "{text:?} was accepted");
        }
    }

    #[test]
    fn a_peer_is_taken_only_if_every_part_that_is_known_is_right() {
        let identity: Identity = GOOD.parse().unwrap();
        let (cluster, roles) = (identity.cluster.clone(), vec![identity.role]);
        let member = Some((identity.region, identity.node.clone()));
        let exact = Expected { cluster, roles, member };
        assert_eq!(exact.check(&identity), Ok(()));
        let anyone = Expected { member: None, ..exact.clone() };
        assert_eq!(anyone.check(&identity), Ok(()));
        let either = Expected { roles: Role::ALL.to_vec(), ..exact.clone() };
        assert_eq!(either.check(&identity), Ok(()));
        let with = |region: &str, name: &str| {
            Some((region.parse().unwrap(), name.parse::<NodeName>().unwrap()))
        };
        for wrong in [
            Expected { cluster: "staging".parse().unwrap(), ..exact.clone() },
            Expected { roles: vec![Role::Coordinator, Role::Witness], ..exact.clone() },
            Expected { member: with("se", "fr-expert-1"), ..exact.clone() },
            Expected { member: with("fr", "fr-expert-2"), ..exact.clone() },
            Expected { roles: Vec::new(), ..anyone },
        ] {
            let error = wrong.check(&identity).unwrap_err().to_string();
            assert!(error.contains(GOOD) && error.ends_with(&wrong.to_string()), "{error}");
        }
    }
}
