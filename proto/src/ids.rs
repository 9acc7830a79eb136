//! Identifiers and small values that cannot exist in an invalid form.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Why a text is not the identifier that it was meant to be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a {what}: {rule}")]
pub struct InvalidId {
    what: &'static str,
    text: String,
    rule: &'static str,
}

/// Longest name of a node or a tenant in bytes: names end up in certificates and metric labels.
pub const NAME_LEN_MAX: usize = 63;

/// A country, as a lower-case ISO 3166 alpha-2 code: the unit of residency policy.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Region([u8; 2]);

impl Region {
    /// The two letters.
    pub fn as_str(&self) -> &str {
        // Built from ASCII letters only, so this cannot fail.
        std::str::from_utf8(&self.0).unwrap_or("??")
    }
}

impl FromStr for Region {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, InvalidId> {
        match text.as_bytes() {
            &[a, b] if a.is_ascii_lowercase() && b.is_ascii_lowercase() => Ok(Self([a, b])),
            _ => Err(InvalidId {
                what: "region",
                text: text.chars().take(32).collect(),
                rule: "two lower-case letters of ISO 3166, such as fr or se",
            }),
        }
    }
}

/// The regions that may see a row. An empty set allows nothing.
pub type RegionSet = BTreeSet<Region>;

/// The name of a process in the cluster, such as `fr-expert-1`; also a DNS label.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct NodeName(String);

impl NodeName {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for NodeName {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, InvalidId> {
        label("node name", text).map(Self)
    }
}

/// The name of a customer of the cluster, such as `tax-office`; written like a node's.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TenantName(String);

impl TenantName {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for TenantName {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, InvalidId> {
        label("tenant name", text).map(Self)
    }
}

/// A DNS label.
fn label(what: &'static str, text: &str) -> Result<String, InvalidId> {
    let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    let bytes = text.as_bytes();
    let valid = (1..=NAME_LEN_MAX).contains(&bytes.len())
        && bytes.iter().all(|b| allowed(*b))
        && !text.starts_with('-')
        && !text.ends_with('-');
    if valid {
        return Ok(text.to_owned());
    }
    Err(InvalidId {
        what,
        text: text.chars().take(80).collect(),
        rule: "1 to 63 of a-z, 0-9 and -, not starting or ending with -",
    })
}

macro_rules! text_id {
    ($($name:ident),+) => {$(
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }
        impl TryFrom<String> for $name {
            type Error = InvalidId;
            fn try_from(text: String) -> Result<Self, InvalidId> {
                text.parse()
            }
        }
        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.as_str().to_owned()
            }
        }
    )+};
}

text_id!(Region, NodeName, TenantName);

macro_rules! number_id {
    ($($(#[$doc:meta])* $name:ident($inner:ty)),+ $(,)?) => {$(
        $(#[$doc])*
        #[derive(
            Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
        )]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    )+};
}

number_id! {
    /// A node's number in the membership; stable for as long as the node is a member.
    NodeId(u32),
    /// A decoder layer, counted from 0 as in the checkpoint.
    LayerId(u16),
    /// An expert within its layer, counted from 0 as in the checkpoint.
    ExpertId(u16),
    /// Counts committed changes of the membership.
    MembershipEpoch(u64),
    /// Counts committed changes of the placement.
    PlacementEpoch(u64),
    /// Minted at each start of a node; never reused.
    Incarnation(u64),
    /// Numbers the exchanges of one coordinator; never reused while the coordinator lives.
    ExchangeId(u64),
}

/// Names one request of a client for ever: random, so that nobody can count or guess others'.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u128);

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Debug for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for RequestId {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, InvalidId> {
        let hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
        let valid = text.len() == 32 && text.bytes().all(hex);
        let number = valid.then(|| u128::from_str_radix(text, 16).ok()).flatten();
        number.map(Self).ok_or_else(|| InvalidId {
            what: "request id",
            text: text.chars().take(80).collect(),
            rule: "32 digits of 0-9 and a-f",
        })
    }
}

/// SHA-256 that tells one model from another.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ModelDigest(pub [u8; 32]);

impl fmt::Display for ModelDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for ModelDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Instruction set, weight format and kernel version, such as `bf16/avx512bf16/1`. Replicas of one
/// class give bit-equal rows; those of another stand in for them only where none is left, and count.
#[derive(Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct KernelClass(pub String);

/// Longest name of a kernel class in bytes.
pub const KERNEL_CLASS_LEN_MAX: usize = 64;

impl KernelClass {
    /// How weights are kept, which also says how rows travel: what comes before the first slash.
    /// Processes whose kernels differ in it do not speak of the same weights.
    pub fn format(&self) -> &str {
        self.0.split('/').next().unwrap_or_default()
    }

    /// Whether its kernels run on a device and not on the processor.
    pub fn is_of_device(&self) -> bool {
        self.0.split('/').nth(1).is_some_and(|on| on.starts_with("cuda-"))
    }
}

impl fmt::Display for KernelClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What sender and receiver of an exchange must agree on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fence {
    /// The committed membership that the sender acted on.
    pub membership_epoch: MembershipEpoch,
    /// The committed placement that the sender acted on.
    pub placement_epoch: PlacementEpoch,
    /// The start of the node that the frame is for.
    pub incarnation: Incarnation,
    /// The model that both must hold.
    pub model_digest: ModelDigest,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_region_is_two_lower_case_letters() {
        assert_eq!("fr".parse::<Region>().unwrap().to_string(), "fr");
        for bad in ["", "f", "FR", "fra", "f1", "é"] {
            assert!(bad.parse::<Region>().is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn a_node_name_is_a_dns_label() {
        assert!("fr-expert-1".parse::<NodeName>().is_ok());
        let long = "a".repeat(NAME_LEN_MAX + 1);
        for bad in ["", "-a", "a-", "A", "a.b", "a b", "é", long.as_str()] {
            assert!(bad.parse::<NodeName>().is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn a_request_id_is_read_as_it_is_written_and_in_no_other_way() {
        let id = RequestId(0xA5);
        let text = id.to_string();
        assert_eq!(text.parse(), Ok(id));
        for bad in ["", "a5", "+00000000000000000000000000000a5", &text.to_uppercase()] {
            assert!(bad.parse::<RequestId>().is_err(), "{bad:?} was accepted");
        }
    }
}
