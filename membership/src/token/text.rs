//! The text of a token, as an operator copies it from one machine to another.

use std::fmt;
use std::str::FromStr;

use bytes::Bytes;
use data_encoding::BASE64URL_NOPAD;
use entente_proto::ids::{NodeName, Region};
use entente_proto::wire;
use prost::Message;

use super::{SECRET_LEN, name_in};
use crate::state::codec::{Malformed, role_in, role_out};
use crate::state::{Role, TEXT_LEN_MAX};

/// What every token begins with, so that one is known where it should not be.
const PREFIX: &str = "entente-join-";
/// Longest text in bytes.
const LEN_MAX: usize = 4_096;
/// Most addresses, and most CAs, in a token.
const LISTED_MAX: usize = 9;
/// Longest id in bytes.
const ID_LEN_MAX: usize = 32;

/// Everything that a process needs to join. Whoever has it may join, so it is not printed but by
/// [`fmt::Display`].
#[derive(Clone, PartialEq, Eq)]
pub struct Text {
    /// Which record it is about.
    pub id: String,
    /// Proves that it was made for whoever shows it.
    pub secret: [u8; SECRET_LEN],
    /// Where the process stands.
    pub region: Region,
    /// What it becomes.
    pub role: Role,
    /// What it is called, if the operator has said it.
    pub name: Option<NodeName>,
    /// Control ports of coordinators.
    pub addresses: Vec<String>,
    /// SHA-256 of the CA certificates by which they are known.
    pub ca_sha256: Vec<[u8; 32]>,
}

/// A text that is no token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("that is no token: {0}")]
pub struct InvalidText(String);

impl Text {
    fn from_message(message: wire::TokenText) -> Result<Self, Malformed> {
        let digest = |bytes: &Bytes| {
            <[u8; 32]>::try_from(&bytes[..]).map_err(|_| Malformed::Unknown("the digest of a CA"))
        };
        let address_fits = |text: &String| (1..=TEXT_LEN_MAX).contains(&text.len());
        if !message.addresses.iter().all(address_fits) || message.addresses.is_empty() {
            return Err(Malformed::Unknown("an address"));
        }
        if message.addresses.len() > LISTED_MAX || message.ca_sha256.len() > LISTED_MAX {
            return Err(Malformed::Unknown("so long a list"));
        }
        if message.id.is_empty() || message.id.len() > ID_LEN_MAX {
            return Err(Malformed::Unknown("the id"));
        }
        let secret = message.secret[..].try_into();
        Ok(Self {
            secret: secret.map_err(|_| Malformed::Unknown("the secret"))?,
            region: message.region.parse()?,
            role: role_in(message.role())?,
            name: name_in(&message.name)?,
            ca_sha256: message.ca_sha256.iter().map(digest).collect::<Result<_, _>>()?,
            id: message.id,
            addresses: message.addresses,
        })
    }
}

impl fmt::Display for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let message = wire::TokenText {
            id: self.id.clone(),
            secret: Bytes::copy_from_slice(&self.secret),
            region: self.region.to_string(),
            role: role_out(self.role).into(),
            name: self.name.as_ref().map(ToString::to_string).unwrap_or_default(),
            addresses: self.addresses.iter().take(LISTED_MAX).cloned().collect(),
            ca_sha256: self
                .ca_sha256
                .iter()
                .take(LISTED_MAX)
                .map(|digest| Bytes::copy_from_slice(digest))
                .collect(),
        };
        write!(f, "{PREFIX}{}", BASE64URL_NOPAD.encode(&message.encode_to_vec()))
    }
}

impl fmt::Debug for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "token {} for {} in {}", self.id, self.role.name(), self.region)
    }
}

impl FromStr for Text {
    type Err = InvalidText;

    fn from_str(text: &str) -> Result<Self, InvalidText> {
        // The error never repeats what it is about: half a token is still a secret.
        let invalid = |reason: &dyn fmt::Display| InvalidText(reason.to_string());
        let text = text.trim();
        if text.len() > LEN_MAX {
            return Err(invalid(&format_args!("it is longer than {LEN_MAX} bytes")));
        }
        let encoded = text
            .strip_prefix(PREFIX)
            .ok_or_else(|| invalid(&format_args!("it does not begin with {PREFIX}")))?;
        let changed = || invalid(&"it is cut or changed");
        let bytes = BASE64URL_NOPAD.decode(encoded.as_bytes()).map_err(|_| changed())?;
        let message = wire::TokenText::decode(&bytes[..]).map_err(|_| changed())?;
        Self::from_message(message).map_err(|error| invalid(&error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text() -> Text {
        Text {
            id: "0123abcd".to_owned(),
            secret: [200; SECRET_LEN],
            region: "se".parse().unwrap(),
            role: Role::Witness,
            name: Some("witness".parse().unwrap()),
            addresses: vec!["10.0.0.1:7200".to_owned()],
            ca_sha256: vec![[3; 32], [4; 32]],
        }
    }

    #[test]
    fn a_token_survives_being_copied() {
        let copied = format!("  {}\n", text());
        assert_eq!(copied.parse(), Ok(text()));
    }

    #[test]
    fn a_token_that_is_cut_is_refused_and_not_repeated() {
        let whole = text().to_string();
        for len in [0, PREFIX.len(), PREFIX.len() + 9, whole.len() - 1] {
            let error = whole[..len].parse::<Text>().unwrap_err().to_string();
            assert!(error.starts_with("that is no token"), "{error}");
            assert!(len <= PREFIX.len() || !error.contains(&whole[PREFIX.len()..len]), "{error}");
        }
        let long = format!("{PREFIX}{}", "A".repeat(LEN_MAX));
        assert!(long.parse::<Text>().is_err());
    }

    #[test]
    fn a_token_is_not_printed_by_accident() {
        assert_eq!(format!("{:?}", text()), "token 0123abcd for witness in se");
    }
}
