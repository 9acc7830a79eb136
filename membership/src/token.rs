//! Join tokens: what an operator hands to a process so that it gets a certificate.
//!
//! ```text
//!   token create ──► Text (shown once: addresses, CAs, id, secret)      an operator's clipboard
//!          └───────► Token (id -> SHA-256 of the secret, region, role)  the replicated state
//!   join ──────────► Claim (id, secret, name) ── Token::admits ──► Identity, and the record goes
//! ```
//!
//! Invariants:
//! - a token is good for one certificate: whoever is admitted by its record deletes that record at
//!   the revision that it has read, and two of them cannot;
//! - it is good for one region and one role, and for one name if the operator gave it one;
//! - a name that a member has is given again only by a token that an operator made for that name,
//!   and never with another region or role;
//! - the secret is in the text only; the cluster keeps its digest.
//!
//! What it does not know: clocks (whoever asks brings the time), sockets, certificates.

mod text;

use bytes::Bytes;
use entente_proto::identity::Identity;
use entente_proto::ids::{NodeName, Region};
use entente_proto::wire;
use prost::Message;

use crate::state::codec::{Malformed, role_in, role_out, sha256};
use crate::state::{Command, NodeState, Record, RecordKind, Role, State};

pub use text::{InvalidText, Text};

/// Length of a secret in bytes: nobody guesses 256 bits.
pub const SECRET_LEN: usize = 32;
/// Most tokens that may wait to be used at a time.
pub const TOKENS_MAX: usize = 256;
/// Longest life of a token in milliseconds: a week.
pub const LIFE_MS_MAX: u64 = 7 * 24 * 3_600_000;
/// Longest encoded record.
const RECORD_LEN_MAX: usize = 512;

/// What the cluster keeps of a token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token {
    /// Digest of the secret.
    pub secret_sha256: [u8; 32],
    /// Where whoever joins by it stands.
    pub region: Region,
    /// What it becomes.
    pub role: Role,
    /// What it is called, if the operator has said it.
    pub name: Option<NodeName>,
    /// When it was made, milliseconds since 1970.
    pub created_ms: u64,
    /// When it is over, milliseconds since 1970.
    pub expires_ms: u64,
}

/// What somebody says who wants to join.
#[derive(Debug, Clone, Copy)]
pub struct Claim<'a> {
    /// The token's secret.
    pub secret: &'a [u8],
    /// How the process wants to be called.
    pub name: &'a NodeName,
}

/// Why a token does not admit somebody. The joiner is told of [`TokenRefused::Invalid`] alone where
/// more would help to guess.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenRefused {
    /// There is no such token, or it has another secret.
    #[error("there is no such token: it was used, revoked or never made")]
    Invalid,
    /// Its time is over.
    #[error("the token has expired")]
    Expired,
    /// It was made for another name.
    #[error("the token is for {0}")]
    OtherName(NodeName),
    /// The name is somebody's.
    #[error("{0} is a member already; a token made with its name lets it join again")]
    NameTaken(NodeName),
    /// The name is a member's that stands elsewhere or does something else, or was removed.
    #[error("{name} is {role} in {region} or was removed; it cannot come back as anything else")]
    OtherMember {
        /// The name.
        name: NodeName,
        /// What the member does.
        role: &'static str,
        /// Where it stands.
        region: Region,
    },
    /// The record is not one; perhaps a newer version wrote it.
    #[error(transparent)]
    Malformed(#[from] Malformed),
}

impl Token {
    /// The record's value.
    pub fn encode(&self) -> Bytes {
        let message = wire::TokenRecord {
            secret_sha256: Bytes::copy_from_slice(&self.secret_sha256),
            region: self.region.to_string(),
            role: role_out(self.role).into(),
            name: self.name.as_ref().map(ToString::to_string).unwrap_or_default(),
            created_ms: self.created_ms,
            expires_ms: self.expires_ms,
        };
        message.encode_to_vec().into()
    }

    /// Reads the record's value.
    ///
    /// # Errors
    /// It is none.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let (what, len, max) = ("a token", bytes.len(), RECORD_LEN_MAX);
        if len > max {
            return Err(Malformed::TooLong { what, len, max });
        }
        let message = wire::TokenRecord::decode(bytes)
            .map_err(|error| Malformed::Prost { what, reason: error.to_string() })?;
        let digest = message.secret_sha256[..].try_into();
        Ok(Self {
            secret_sha256: digest.map_err(|_| Malformed::Unknown("the digest of a token"))?,
            role: role_in(message.role())?,
            region: message.region.parse()?,
            name: name_in(&message.name)?,
            created_ms: message.created_ms,
            expires_ms: message.expires_ms,
        })
    }

    /// All tokens of a state that can be read, with their ids.
    pub fn all(state: &State) -> impl Iterator<Item = (&str, Self)> {
        let records = state.records(RecordKind::Token);
        records.filter_map(|(id, record)| Some((id, Self::decode(&record.value).ok()?)))
    }

    /// The token of this id with the revision at which it can be used up.
    ///
    /// # Errors
    /// There is none, or none that can be read.
    pub fn find(state: &State, id: &str) -> Result<(Self, u64), TokenRefused> {
        let record = state.record(RecordKind::Token, id).ok_or(TokenRefused::Invalid)?;
        let Record { value, revision } = record;
        Ok((Self::decode(value)?, *revision))
    }

    /// Whether the token is over.
    pub fn is_over(&self, now_ms: u64) -> bool {
        now_ms >= self.expires_ms
    }

    /// Who somebody with this claim becomes.
    ///
    /// # Errors
    /// Says why nobody. A claim with another secret learns nothing but that.
    pub fn admits(
        &self,
        claim: Claim<'_>,
        now_ms: u64,
        cluster: &NodeName,
        state: &State,
    ) -> Result<Identity, TokenRefused> {
        // What is compared are digests of 256 random bits: how long that takes says nothing.
        if claim.secret.len() != SECRET_LEN || sha256(claim.secret) != self.secret_sha256 {
            return Err(TokenRefused::Invalid);
        }
        if self.is_over(now_ms) {
            return Err(TokenRefused::Expired);
        }
        self.check_name(claim.name, state)?;
        Ok(Identity {
            cluster: cluster.clone(),
            region: self.region,
            role: self.role.identity(),
            node: claim.name.clone(),
        })
    }

    fn check_name(&self, name: &NodeName, state: &State) -> Result<(), TokenRefused> {
        if let Some(own) = self.name.as_ref().filter(|own| *own != name) {
            return Err(TokenRefused::OtherName(own.clone()));
        }
        let Some(member) = state.node(name) else { return Ok(()) };
        let (region, role) = (member.spec.region, member.spec.role);
        if (region, role) != (self.region, self.role) || member.state == NodeState::Removed {
            let (name, role) = (name.clone(), role.name());
            return Err(TokenRefused::OtherMember { name, role, region });
        }
        match self.name {
            Some(_) => Ok(()),
            None => Err(TokenRefused::NameTaken(name.clone())),
        }
    }
}

/// Writes a new token down.
pub fn put(id: &str, token: &Token) -> Command {
    let (kind, key, value) = (RecordKind::Token, id.to_owned(), token.encode());
    Command::PutRecord { kind, key, value, revision: Some(0) }
}

/// Uses a token up, or revokes it: refused unless the record is as it was read.
pub fn delete(id: &str, revision: u64) -> Command {
    Command::DeleteRecord { kind: RecordKind::Token, key: id.to_owned(), revision: Some(revision) }
}

fn name_in(name: &str) -> Result<Option<NodeName>, Malformed> {
    if name.is_empty() { Ok(None) } else { Ok(Some(name.parse()?)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::{NodeSpec, RefusedCode};

    const SECRET: [u8; SECRET_LEN] = [7; SECRET_LEN];
    const NOW_MS: u64 = 1_000;

    fn token(name: Option<&str>) -> Token {
        Token {
            secret_sha256: sha256(&SECRET),
            region: "se".parse().unwrap(),
            role: Role::ExpertNode,
            name: name.map(|name| name.parse().unwrap()),
            created_ms: 10,
            expires_ms: 2_000,
        }
    }

    /// A cluster with an expert node in se and a coordinator in fr.
    fn state() -> State {
        let spec = |name: &str, region: &str, role| NodeSpec {
            name: name.parse().unwrap(),
            region: region.parse().unwrap(),
            site: String::new(),
            role,
            address: "a:1".to_owned(),
            memory_bytes: None,
            kernel_class: String::new(),
            device: None,
        };
        let specs = [
            spec("se-expert-1", "se", Role::ExpertNode),
            spec("fr-coordinator", "fr", Role::Coordinator),
        ];
        State::genesis(specs.into()).unwrap()
    }

    fn admitted(token: &Token, name: &str) -> Result<Identity, TokenRefused> {
        let claim = Claim { secret: &SECRET, name: &name.parse().unwrap() };
        token.admits(claim, NOW_MS, &"demo".parse().unwrap(), &state())
    }

    #[test]
    fn a_record_survives_being_written_and_read_and_rubbish_is_refused() {
        for token in [token(None), token(Some("se-expert-2"))] {
            let bytes = token.encode();
            assert_eq!(Token::decode(&bytes), Ok(token));
            assert!(Token::decode(&bytes[1..]).is_err());
        }
        assert!(Token::decode(&vec![0; RECORD_LEN_MAX + 1]).is_err());
    }

    #[test]
    fn whoever_has_the_secret_becomes_what_the_operator_meant() {
        let identity = admitted(&token(None), "se-expert-2").unwrap();
        assert_eq!(identity.to_string(), "spiffe://demo/region/se/role/expert/node/se-expert-2");
    }

    #[test]
    fn another_secret_and_a_time_that_is_over_are_refused() {
        let (token, name) = (token(None), "se-expert-2".parse().unwrap());
        let (cluster, state) = ("demo".parse().unwrap(), state());
        for secret in [&[8; SECRET_LEN][..], &SECRET[1..], &[]] {
            let refused = token.admits(Claim { secret, name: &name }, NOW_MS, &cluster, &state);
            assert_eq!(refused, Err(TokenRefused::Invalid), "{secret:?}");
        }
        let claim = Claim { secret: &SECRET, name: &name };
        assert!(token.admits(claim, 1_999, &cluster, &state).is_ok());
        let late = token.admits(claim, 2_000, &cluster, &state);
        assert_eq!(late, Err(TokenRefused::Expired));
    }

    #[test]
    fn a_members_name_is_given_again_only_by_a_token_made_for_it() {
        let taken = admitted(&token(None), "se-expert-1");
        assert!(matches!(taken, Err(TokenRefused::NameTaken(_))), "{taken:?}");
        assert!(admitted(&token(Some("se-expert-1")), "se-expert-1").is_ok());
        let other = admitted(&token(Some("fr-coordinator")), "fr-coordinator");
        assert!(matches!(other, Err(TokenRefused::OtherMember { .. })), "{other:?}");
        let name = admitted(&token(Some("se-expert-3")), "se-expert-2");
        assert!(matches!(name, Err(TokenRefused::OtherName(_))), "{name:?}");
    }

    #[test]
    fn a_token_is_used_up_once_however_many_have_read_it() {
        let mut state = state();
        state.apply(put("id", &token(None))).unwrap();
        let again = state.apply(put("id", &token(None))).unwrap_err();
        assert_eq!(again.code, RefusedCode::StaleRevision, "an id was used twice");
        let (read, revision) = Token::find(&state, "id").unwrap();
        assert_eq!(read, token(None));
        state.apply(delete("id", revision)).unwrap();
        let second = state.apply(delete("id", revision)).unwrap_err();
        assert_eq!(second.code, RefusedCode::StaleRevision);
        assert_eq!(Token::find(&state, "id"), Err(TokenRefused::Invalid));
        // Nor does another token that gets the same id fall to who has read the first.
        state.apply(put("id", &token(None))).unwrap();
        assert!(state.apply(delete("id", revision)).is_err());
    }
}
