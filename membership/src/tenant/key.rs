//! Keys of tenants: what a client shows, and what the cluster keeps to know it again.
//!
//! A key reads `mk_<id>_<secret>`. The id finds it; the secret, 256 random bits, proves it. What is
//! kept of the secret is its HMAC-SHA-256 under 32 random bytes of the key's own: whoever reads the
//! records learns nothing that could be shown to an API, and equal secrets would not look equal. A
//! slow hash would add nothing, as there is no guessing 256 random bits.
//!
//! Secrets are compared in constant time by aws-lc. [`Secret`] has neither `Debug` nor `Display`, so
//! that none gets into a log by accident, and is overwritten when it is dropped.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use aws_lc_rs::hmac;
use bytes::Bytes;
use data_encoding::{BASE64URL_NOPAD, HEXLOWER};
use entente_proto::wire;
use zeroize::Zeroizing;

use super::ascending;
use crate::state::codec::Malformed;

/// What every key begins with, so that scanners for leaked secrets find them.
const PREFIX: &str = "mk_";
/// Characters of a secret: 32 bytes as base64url.
const SECRET_LEN: usize = 43;
/// Longest label in bytes.
pub const LABEL_LEN_MAX: usize = 64;

/// Names a key; not secret.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct KeyId(String);

impl KeyId {
    /// Bytes that it is made of.
    pub const LEN: usize = 8;

    /// The id as it is written.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The text is not an id of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("that is no id of a key, which has {} digits of 0-9 and a-f", 2 * KeyId::LEN)]
pub struct NotAKeyId;

impl FromStr for KeyId {
    type Err = NotAKeyId;

    /// The text is not repeated in the error: it may be a whole key.
    fn from_str(text: &str) -> Result<Self, NotAKeyId> {
        let hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
        let valid = text.len() == 2 * Self::LEN && text.bytes().all(hex);
        if valid { Ok(Self(text.to_owned())) } else { Err(NotAKeyId) }
    }
}

/// What a key may be used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scope {
    /// To ask for tokens.
    Inference,
    /// To read what became of the tenant's requests.
    Receipts,
}

/// What a key may be used for, all of it.
pub type Scopes = BTreeSet<Scope>;

impl Scope {
    /// Every scope there is; what a key has unless somebody says otherwise.
    pub const ALL: [Self; 2] = [Self::Inference, Self::Receipts];

    /// Its name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Inference => "inference",
            Self::Receipts => "receipts",
        }
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Scope {
    type Err = Malformed;

    fn from_str(text: &str) -> Result<Self, Malformed> {
        let found = Self::ALL.into_iter().find(|scope| scope.as_str() == text);
        found.ok_or(Malformed::Unknown("the scope (inference, receipts)"))
    }
}

/// A whole key, as it is shown once to whoever made it.
pub struct Secret(Zeroizing<String>);

impl Secret {
    /// The text, for the one who is to have it.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

/// A key as a client shows it: where it would be found, and what would prove it.
pub struct Shown<'a> {
    /// The part that finds it.
    pub id: &'a str,
    secret: &'a str,
}

impl<'a> Shown<'a> {
    /// Takes a text apart. One that is no key gives parts that match none, so that whoever checks
    /// does the same work for it as for others.
    pub fn parse(text: &'a str) -> Self {
        let parts = text.strip_prefix(PREFIX).and_then(|rest| rest.split_once('_'));
        let (id, secret) = parts.filter(|(_, s)| s.len() == SECRET_LEN).unwrap_or_default();
        Self { id, secret }
    }
}

/// What is kept of a key.
#[derive(Clone, PartialEq, Eq)]
pub struct Key {
    /// Its name.
    pub id: KeyId,
    /// The key of the MAC.
    salt: [u8; 32],
    /// HMAC-SHA-256 of the secret's text.
    mac: [u8; 32],
    /// When it was made, in ms since 1970.
    pub created_ms: u64,
    /// From when on it is refused; never when absent.
    pub expires_ms: Option<u64>,
    /// Refused for ever.
    pub revoked: bool,
    /// What it may be used for.
    pub scopes: Scopes,
    /// A word of the operator's, for people.
    pub label: String,
}

/// Random bytes, from which alone a key follows.
pub struct Seed {
    /// Becomes the id.
    pub id: [u8; KeyId::LEN],
    /// Becomes the secret.
    pub secret: Zeroizing<[u8; 32]>,
    /// The salt.
    pub salt: [u8; 32],
}

impl Key {
    /// Makes a key that never expires, and the text that will prove it.
    pub fn mint(seed: &Seed, created_ms: u64, scopes: Scopes, label: String) -> (Self, Secret) {
        let id = KeyId(HEXLOWER.encode(&seed.id));
        let secret = Zeroizing::new(BASE64URL_NOPAD.encode(&*seed.secret));
        let text = Secret(Zeroizing::new(format!("{PREFIX}{id}_{}", *secret)));
        let tag = hmac::sign(&mac_key(&seed.salt), secret.as_bytes());
        let mut mac = [0; 32];
        mac.copy_from_slice(tag.as_ref());
        let (salt, expires_ms, revoked) = (seed.salt, None, false);
        (Self { id, salt, mac, created_ms, expires_ms, revoked, scopes, label }, text)
    }

    /// A key that nothing matches, for whoever checks a key that is not there: it takes as long.
    pub fn decoy() -> Self {
        Self {
            id: KeyId("0".repeat(2 * KeyId::LEN)),
            salt: [0; 32],
            mac: [0; 32],
            created_ms: 0,
            expires_ms: Some(0),
            revoked: true,
            scopes: Scopes::new(),
            label: String::new(),
        }
    }

    /// Whether this is the key that was shown. Takes as long for a wrong secret as for the right one.
    pub fn matches(&self, shown: &Shown<'_>) -> bool {
        hmac::verify(&mac_key(&self.salt), shown.secret.as_bytes(), &self.mac).is_ok()
    }

    /// Whether it is good for anything at `now_ms`.
    pub fn is_live(&self, now_ms: u64) -> bool {
        !self.revoked && self.expires_ms.is_none_or(|expires_ms| now_ms < expires_ms)
    }

    pub(super) fn to_wire(&self) -> wire::TenantKey {
        wire::TenantKey {
            id: self.id.to_string(),
            salt: Bytes::copy_from_slice(&self.salt),
            mac: Bytes::copy_from_slice(&self.mac),
            created_ms: self.created_ms,
            expires_ms: self.expires_ms,
            revoked: self.revoked,
            scopes: self.scopes.iter().map(Scope::to_string).collect(),
            label: self.label.clone(),
        }
    }

    pub(super) fn from_wire(message: wire::TenantKey) -> Result<Self, Malformed> {
        let bytes32 = |bytes: &[u8], what| bytes.try_into().map_err(|_| Malformed::Unknown(what));
        check_label(&message.label)?;
        Ok(Self {
            id: message.id.parse().map_err(|_| Malformed::Unknown("the id of a key"))?,
            salt: bytes32(&message.salt, "the salt of a key")?,
            mac: bytes32(&message.mac, "the MAC of a key")?,
            created_ms: message.created_ms,
            expires_ms: message.expires_ms,
            revoked: message.revoked,
            scopes: ascending(message.scopes, "the scopes' order")?,
            label: message.label,
        })
    }
}

fn mac_key(salt: &[u8; 32]) -> hmac::Key {
    hmac::Key::new(hmac::HMAC_SHA256, salt)
}

/// Checks that a label is short and can be printed in one line.
///
/// # Errors
/// What is wrong with it.
pub fn check_label(label: &str) -> Result<(), Malformed> {
    let (len, max) = (label.len(), LABEL_LEN_MAX);
    if len > max {
        return Err(Malformed::TooLong { what: "a label", len, max });
    }
    match label.chars().find(|c| c.is_control()) {
        Some(_) => Err(Malformed::Unknown("a label that can be printed")),
        None => Ok(()),
    }
}
