//! What a leaf of the log says, and the one way to write it.
//!
//! A record is JSON with sorted keys, no spaces, no fractions and the shortest escapes (a subset of
//! RFC 8785). [`Record::decode`] takes exactly the bytes that [`Record::encode`] gives: two records
//! that mean the same are the same bytes, and hash alike.
//!
//! Nothing in a record is text that a client sent, a token, or the number of an expert: which
//! experts were chosen reveals what was said.

use std::collections::BTreeSet;
use std::fmt;

use entente_proto::ids::{NodeName, Region, RequestId, TenantName};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use sha2::Digest as _;

use crate::Error;
use crate::tile::RECORD_LEN_MAX;

/// Nodes that one record names at most, so that it fits a bundle; how many more there were is
/// counted.
pub const NODES_MAX: usize = 200;
/// Integers above this are not the same in every reader of JSON.
pub const INTEGER_MAX: u64 = (1 << 53) - 1;

/// 32 bytes that stand for something else, written as 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest(pub [u8; 32]);

impl Digest {
    /// SHA-256.
    pub fn of(bytes: &[u8]) -> Self {
        Self(sha2::Sha256::digest(bytes).into())
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let digits = text.as_bytes();
        let bad = || de::Error::custom("a digest is 64 hexadecimal digits");
        let nibble = |digit: u8| char::from(digit).to_digit(16).map(|value| value as u8);
        let byte = |pair: &[u8]| Some((nibble(pair[0])? << 4) | nibble(pair[1])?);
        if digits.len() != 64 {
            return Err(bad());
        }
        let bytes: Option<Vec<u8>> = digits.chunks_exact(2).map(byte).collect();
        bytes.and_then(|bytes| bytes.try_into().ok()).map(Self).ok_or_else(bad)
    }
}

/// Bytes written as base 64.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blob(pub Vec<u8>);

impl Serialize for Blob {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&crate::base64::encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for Blob {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let bytes = crate::base64::decode(&text);
        bytes.map(Self).ok_or_else(|| de::Error::custom("bytes are base 64"))
    }
}

mod request_id {
    use super::*;

    pub fn serialize<S: Serializer>(id: &RequestId, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(id)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<RequestId, D::Error> {
        String::deserialize(from)?.parse().map_err(de::Error::custom)
    }
}

/// One leaf.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Record {
    /// A request that was worked on, once all of its answers have ended.
    Request(Box<Request>),
    /// A request that was not taken.
    Refused(Refused),
    /// A certificate, before the first record that names it.
    Certificate(Certificate),
    /// What a node says that it computed.
    Statement(Statement),
    /// An operator's call, or one that was refused.
    Admin(Admin),
}

/// What was done with a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// Names it.
    #[serde(with = "request_id")]
    pub id: RequestId,
    /// Whose it was.
    pub tenant: TenantName,
    /// The policy that it was admitted under; absent where requests need no key.
    pub policy: Option<Policy>,
    /// The regions that its rows were allowed in, after it had narrowed them itself.
    pub allowed: BTreeSet<Region>,
    /// HMAC-SHA-256 of its body under a salt of its tenant's: says which request it was to whoever
    /// has body and salt, and nothing to anybody else.
    pub body: Digest,
    /// The model that answered.
    pub model: Digest,
    /// Which bits its kernels give.
    pub kernel_class: String,
    /// The coordinator that worked on it.
    pub coordinator: Coordinator,
    /// Every start of a node that rows of it were sent to, in the order of their names.
    pub nodes: Vec<Node>,
    /// Nodes beyond those, which the record has no room for.
    pub nodes_omitted: u64,
    /// Membership epochs of the first and of the last row.
    pub membership_epochs: [u64; 2],
    /// Placement epochs of the first and of the last row.
    pub placement_epochs: [u64; 2],
    /// Assignments that were sent again since an answer was lost, late or a refusal.
    pub retried_rows: u64,
    /// Assignments that were sent to a second node since the first was slow.
    pub hedged_rows: u64,
    /// Tokens of its prompts.
    pub prompt_tokens: u64,
    /// Tokens generated.
    pub completion_tokens: u64,
    /// When it was read, in milliseconds since 1970.
    pub begun_ms: u64,
    /// When its last answer had ended.
    pub ended_ms: u64,
    /// How its answers ended, in the order in which they did: `stop`, `length`, `disconnected`,
    /// `failed`.
    pub answers: Vec<String>,
    /// `served`, `disconnected`, `failed`, or `cut off` where the coordinator stopped before the end.
    pub decision: String,
}

/// The policy of a tenant as it was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    /// Names it.
    pub id: String,
    /// SHA-256 of what it said.
    pub sha256: Digest,
    /// The regions that it allows.
    pub allowed: BTreeSet<Region>,
}

/// The coordinator of a log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Coordinator {
    /// Its name.
    pub node: NodeName,
    /// Where it stands.
    pub region: Region,
    /// SHA-256 of its certificate; absent in a cluster of one process.
    pub certificate: Option<Digest>,
}

/// A node that rows of a request were sent to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Node {
    /// Its name.
    pub node: NodeName,
    /// Where it stands, by its certificate.
    pub region: Region,
    /// Which start of it.
    pub incarnation: u64,
    /// SHA-256 of its certificate; absent for experts of the coordinator's own process.
    pub certificate: Option<Digest>,
    /// Assignments of a row to an expert that were sent to it, those sent again included.
    pub rows: u64,
    /// Which bits its kernels give, where they are others than the coordinator's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel_class: Option<String>,
}

/// A request that was not taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Refused {
    /// Names it.
    #[serde(with = "request_id")]
    pub id: RequestId,
    /// Whose it was, if it showed a key.
    pub tenant: Option<TenantName>,
    /// The same HMAC as of a request that is taken; absent where the tenant is not known.
    pub body: Option<Digest>,
    /// When, in milliseconds since 1970.
    pub at_ms: u64,
    /// The HTTP status that it was answered with.
    pub status: u64,
    /// Why, as the answer's `code` or `type` said it.
    pub code: String,
}

/// A certificate that records name by its fingerprint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Certificate {
    /// SHA-256 of `der`.
    pub sha256: Digest,
    /// The certificate.
    pub der: Blob,
}

/// What a node says, under its own signature, that it computed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Statement {
    /// SHA-256 of the certificate whose key signed it.
    pub certificate: Digest,
    /// What it says, as it was signed.
    pub statement: Blob,
    /// The signature.
    pub signature: Blob,
}

/// A call to the control plane that is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Admin {
    /// When, in milliseconds since 1970.
    pub at_ms: u64,
    /// Who, as their certificate says.
    pub caller: String,
    /// Which call.
    pub call: String,
    /// Whether it was let through.
    pub allowed: bool,
    /// Why not.
    pub reason: Option<String>,
}

impl Record {
    /// The record's bytes.
    ///
    /// # Errors
    /// It is longer than a leaf may be, or a number is too large.
    pub fn encode(&self) -> Result<Vec<u8>, String> {
        let mut value = serde_json::to_value(self).map_err(|error| error.to_string())?;
        check_integers(&value)?;
        value.sort_all_objects();
        let bytes = serde_json::to_vec(&value).map_err(|error| error.to_string())?;
        if bytes.len() > RECORD_LEN_MAX {
            return Err(format!("{} bytes, at most {RECORD_LEN_MAX}", bytes.len()));
        }
        Ok(bytes)
    }

    /// Reads a record.
    ///
    /// # Errors
    /// The bytes are no record, or are not the one way to write it.
    pub fn decode(bytes: &[u8]) -> Result<Self, String> {
        if bytes.len() > RECORD_LEN_MAX {
            return Err(format!("{} bytes, at most {RECORD_LEN_MAX}", bytes.len()));
        }
        let record: Self = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        // Whatever a lenient reader lets through, writing it again brings to light.
        if record.encode()? != bytes {
            return Err("it is not written in the canonical way".to_owned());
        }
        Ok(record)
    }

    /// The same as an error that names the record.
    pub(crate) fn decode_at(index: u64, bytes: &[u8]) -> Result<Self, Error> {
        Self::decode(bytes).map_err(|reason| Error::Record { index, reason })
    }

    /// The request that it is about.
    pub fn request(&self) -> Option<RequestId> {
        match self {
            Self::Request(request) => Some(request.id),
            Self::Refused(refused) => Some(refused.id),
            Self::Certificate(_) | Self::Statement(_) | Self::Admin(_) => None,
        }
    }

    /// Whose request it is about.
    pub fn tenant(&self) -> Option<&TenantName> {
        match self {
            Self::Request(request) => Some(&request.tenant),
            Self::Refused(refused) => refused.tenant.as_ref(),
            Self::Certificate(_) | Self::Statement(_) | Self::Admin(_) => None,
        }
    }
}

fn check_integers(value: &serde_json::Value) -> Result<(), String> {
    use serde_json::Value;
    match value {
        Value::Number(number) => match number.as_u64() {
            Some(0..=INTEGER_MAX) => Ok(()),
            _ => Err(format!("{number} is not between 0 and 2^53 - 1")),
        },
        Value::Array(items) => items.iter().try_for_each(check_integers),
        Value::Object(fields) => fields.values().try_for_each(check_integers),
        Value::Null | Value::Bool(_) | Value::String(_) => Ok(()),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use entente_proto::ids::KERNEL_CLASS_LEN_MAX;

    use super::*;

    /// A request of one node in `region`, for tests.
    pub(crate) fn request(number: u64, region: &str) -> Request {
        let region: Region = region.parse().unwrap();
        Request {
            id: RequestId(u128::from(number) + 1),
            tenant: "tax-office".parse().unwrap(),
            policy: None,
            allowed: BTreeSet::from([region]),
            body: Digest::of(&number.to_le_bytes()),
            model: Digest([7; 32]),
            kernel_class: "bf16/avx512bf16/1".to_owned(),
            coordinator: Coordinator {
                node: "fr-coordinator".parse().unwrap(),
                region: "fr".parse().unwrap(),
                certificate: None,
            },
            nodes: vec![Node {
                node: "fr-expert-1".parse().unwrap(),
                region,
                incarnation: 3,
                certificate: None,
                rows: 64,
                kernel_class: None,
            }],
            nodes_omitted: 0,
            membership_epochs: [4, 4],
            placement_epochs: [1, 2],
            retried_rows: 0,
            hedged_rows: 2,
            prompt_tokens: 12,
            completion_tokens: 4,
            begun_ms: 1_795_000_000_000 + number,
            ended_ms: 1_795_000_000_500 + number,
            answers: vec!["stop".to_owned()],
            decision: "served".to_owned(),
        }
    }

    #[test]
    fn a_record_is_read_back_from_its_one_form_and_from_no_other() {
        let record = Record::Request(Box::new(request(5, "fr")));
        let bytes = record.encode().unwrap();
        let text = String::from_utf8(bytes.clone()).unwrap();
        assert_eq!(Record::decode(&bytes), Ok(record));
        assert!(text.starts_with(r#"{"allowed":["fr"],"answers":["stop"],"begun_ms":"#), "{text}");
        let others = [
            text.replacen(':', ": ", 1),
            format!("{text}\n"),
            text.replacen(r#"["fr"]"#, r#"["\u0066r"]"#, 1),
            text.replacen(r#""hedged_rows":2"#, r#""hedged_rows":2.0"#, 1),
            text.replacen(r#""hedged_rows":2"#, r#""hedged_rows":2e0"#, 1),
            text.replacen(r#""hedged_rows":2"#, r#""hedged_rows":2,"hedged_rows":2"#, 1),
            text.replacen(r#""hedged_rows":2"#, r#""hedged_rows":2,"more":1"#, 1),
            text.replacen(r#""policy":null,"#, "", 1),
            text.replacen(r#"{"allowed":["fr"],"#, "{", 1).replacen(
                '}',
                r#","allowed":["fr"]}"#,
                1,
            ),
            text.replacen(r#"["fr"]"#, r#"["se","fr"]"#, 1),
            text.replacen("0707", "070A", 1),
        ];
        for other in others {
            assert_ne!(other, text, "the case changes nothing");
            assert!(Record::decode(other.as_bytes()).is_err(), "{other}");
        }
    }

    #[test]
    fn a_record_for_which_a_leaf_is_too_small_is_not_written() {
        let mut large = request(0, "fr");
        large.kernel_class = "x".repeat(RECORD_LEN_MAX);
        assert!(Record::Request(Box::new(large)).encode().is_err());
        let mut many = request(0, "fr");
        let node = Node {
            node: "a".repeat(63).parse().unwrap(),
            region: "fr".parse().unwrap(),
            incarnation: INTEGER_MAX,
            certificate: Some(Digest([1; 32])),
            rows: INTEGER_MAX,
            kernel_class: Some("x".repeat(KERNEL_CLASS_LEN_MAX)),
        };
        many.nodes = vec![node; NODES_MAX];
        assert!(Record::Request(Box::new(many)).encode().is_ok(), "{NODES_MAX} nodes fit");
        let huge = Request { hedged_rows: INTEGER_MAX + 1, ..request(0, "fr") };
        assert!(Record::Request(Box::new(huge)).encode().is_err());
    }
}
