//! Tenants: who may use the cluster, where their rows may go, how much they may ask for, and by
//! which keys they are known.
//!
//! A tenant is one record of the replicated state, so that every coordinator decides alike and a
//! change is in force wherever it was applied. Operators write records by compare-and-set; nothing
//! here proposes anything.
//!
//! Invariants:
//! - a tenant's secrets cannot be had from its record ([`key`]);
//! - who has no region is allowed nothing;
//! - never are more than [`LIVE_KEYS_MAX`] keys of a tenant good for anything at one time.
//!
//! What this module does not know: clocks and random numbers, which callers bring; requests, quotas'
//! state, HTTP.

pub mod key;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;

use bytes::Bytes;
use entente_proto::ids::{Region, RegionSet, TenantName};
use entente_proto::wire;
use prost::Message;

use crate::state::codec::{Malformed, sha256};
use crate::state::{REGIONS_MAX, Record, RecordKind, State};
pub use key::{Key, KeyId, Scope, Scopes, Secret, Shown};

/// Most keys of a tenant that are good for something: the one in use, and its successor while
/// clients change over.
pub const LIVE_KEYS_MAX: usize = 2;
/// Most keys that a tenant's record remembers; beyond that the oldest dead one is forgotten.
pub const KEYS_MAX: usize = 32;
/// Highest quota that can be given, far beyond any cluster; it keeps a bucket's arithmetic in range.
pub const TOKENS_PER_MINUTE_MAX: u64 = 1_000_000_000_000;

/// One customer of the cluster.
#[derive(Clone, PartialEq, Eq)]
pub struct Tenant {
    /// Its name, which is also its record's key.
    pub name: TenantName,
    /// The regions that may see its rows.
    pub allowed: RegionSet,
    /// Tokens of prompts and answers in a minute; not limited when absent.
    pub tokens_per_minute: Option<u64>,
    /// Requests at once; not limited when absent.
    pub concurrent_max: Option<u32>,
    /// In the order in which they were made.
    pub keys: Vec<Key>,
}

/// Where a tenant's rows may go, named so that a receipt can say by which policy they went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// `<tenant>@<revision of its record>`.
    pub id: String,
    /// SHA-256 of what [`Policy::canonical`] writes: equal policies have equal hashes.
    pub sha256: [u8; 32],
    /// The regions.
    pub allowed: RegionSet,
}

impl Policy {
    fn new(name: &TenantName, revision: u64, allowed: RegionSet) -> Self {
        let sha256 = sha256(Self::canonical(name, &allowed).as_bytes());
        Self { id: format!("{name}@{revision}"), sha256, allowed }
    }

    /// Where rows of a request may go that nobody had to show a key for.
    pub fn anonymous(name: &TenantName, allowed: RegionSet) -> Self {
        Self::new(name, 0, allowed)
    }

    /// The one way to write a policy, for whoever wants to compute its hash again: JSON with sorted
    /// keys and without spaces, such as `{"allowed":["fr","se"],"tenant":"tax-office"}`.
    pub fn canonical(name: &TenantName, allowed: &RegionSet) -> String {
        // Neither a name nor a region has a character that JSON would escape.
        let regions: Vec<String> = allowed.iter().map(|region| format!("\"{region}\"")).collect();
        format!("{{\"allowed\":[{}],\"tenant\":\"{name}\"}}", regions.join(","))
    }
}

/// Why a tenant's keys cannot be changed like that.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// Two is enough to change over, and a third would be one that nobody remembers.
    #[error("{tenant} has {LIVE_KEYS_MAX} live keys ({ids}); revoke one first")]
    TooManyLive {
        /// Whose they are.
        tenant: TenantName,
        /// Which they are.
        ids: String,
    },
    /// There is no such key, or it is good for nothing already.
    #[error("{tenant} has no live key {id}")]
    NotLive {
        /// Who has not.
        tenant: TenantName,
        /// What it has not.
        id: KeyId,
    },
}

impl Tenant {
    /// A tenant without keys and without limits.
    pub fn new(name: TenantName, allowed: RegionSet) -> Self {
        Self { name, allowed, tokens_per_minute: None, concurrent_max: None, keys: Vec::new() }
    }

    /// Its policy as of this revision of its record.
    pub fn policy(&self, revision: u64) -> Policy {
        Policy::new(&self.name, revision, self.allowed.clone())
    }

    /// The tenant of this name and the revision of its record, if there is one.
    pub fn of(state: &State, name: &TenantName) -> Option<Result<(Self, u64), Malformed>> {
        let record = state.record(RecordKind::Tenant, name.as_str())?;
        Some(Self::read(name.as_str(), record).map(|tenant| (tenant, record.revision)))
    }

    /// All tenants in order of name, each with the revision of its record.
    pub fn all(state: &State) -> impl Iterator<Item = Result<(Self, u64), Malformed>> {
        let records = state.records(RecordKind::Tenant);
        records.map(|(key, record)| Ok((Self::read(key, record)?, record.revision)))
    }

    /// Reads a record, which must be that of the tenant in its key.
    ///
    /// # Errors
    /// It is not a tenant, or another one.
    pub fn read(key: &str, record: &Record) -> Result<Self, Malformed> {
        let tenant = Self::decode(&record.value)?;
        if tenant.name.as_str() == key { Ok(tenant) } else { Err(Malformed::Unknown("its name")) }
    }

    /// Adds a key, forgetting the oldest dead one if there are too many to keep.
    ///
    /// # Errors
    /// There are as many live ones as there may be at `now_ms`.
    pub fn add(&mut self, key: Key, now_ms: u64) -> Result<(), KeyError> {
        let live: Vec<&str> = self.live(now_ms).map(|key| key.id.as_str()).collect();
        if live.len() >= LIVE_KEYS_MAX {
            let (tenant, ids) = (self.name.clone(), live.join(", "));
            return Err(KeyError::TooManyLive { tenant, ids });
        }
        if self.keys.len() >= KEYS_MAX
            && let Some(oldest) = self.keys.iter().position(|key| !key.is_live(now_ms))
        {
            self.keys.remove(oldest);
        }
        self.keys.push(key);
        Ok(())
    }

    /// Adds a key's successor, and lets the key itself live on until `old_until_ms` at most.
    ///
    /// # Errors
    /// The key is not live, or two keys are.
    pub fn rotate(
        &mut self,
        old: &KeyId,
        new: Key,
        old_until_ms: u64,
        now_ms: u64,
    ) -> Result<(), KeyError> {
        self.live_key(old, now_ms)?;
        self.add(new, now_ms)?;
        let old = self.live_key(old, now_ms)?;
        old.expires_ms = Some(old.expires_ms.map_or(old_until_ms, |ends| ends.min(old_until_ms)));
        Ok(())
    }

    /// Makes a key good for nothing, at once and for ever.
    ///
    /// # Errors
    /// It is not live.
    pub fn revoke(&mut self, id: &KeyId, now_ms: u64) -> Result<(), KeyError> {
        self.live_key(id, now_ms)?.revoked = true;
        Ok(())
    }

    /// The keys that are good for something at `now_ms`.
    pub fn live(&self, now_ms: u64) -> impl Iterator<Item = &Key> {
        self.keys.iter().filter(move |key| key.is_live(now_ms))
    }

    fn live_key(&mut self, id: &KeyId, now_ms: u64) -> Result<&mut Key, KeyError> {
        let found = self.keys.iter_mut().find(|key| key.id == *id && key.is_live(now_ms));
        found.ok_or_else(|| KeyError::NotLive { tenant: self.name.clone(), id: id.clone() })
    }

    /// The record's value.
    pub fn encode(&self) -> Bytes {
        let message = wire::Tenant {
            name: self.name.to_string(),
            allowed: self.allowed.iter().map(Region::to_string).collect(),
            tokens_per_minute: self.tokens_per_minute,
            concurrent_max: self.concurrent_max,
            keys: self.keys.iter().map(Key::to_wire).collect(),
        };
        message.encode_to_vec().into()
    }

    /// Reads the record's value.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let message = wire::Tenant::decode(bytes)
            .map_err(|error| Malformed::Prost { what: "a tenant", reason: error.to_string() })?;
        let bounds = [
            ("regions", message.allowed.len(), REGIONS_MAX),
            ("keys", message.keys.len(), KEYS_MAX),
        ];
        if let Some((what, len, max)) = bounds.into_iter().find(|(_, len, max)| len > max) {
            return Err(Malformed::TooLong { what, len, max });
        }
        if message.tokens_per_minute.is_some_and(|tokens| tokens > TOKENS_PER_MINUTE_MAX) {
            return Err(Malformed::Unknown("a quota of so many tokens"));
        }
        let allowed = ascending(message.allowed, "the regions' order")?;
        let keys = message.keys.into_iter().map(Key::from_wire).collect::<Result<Vec<_>, _>>()?;
        let ids: BTreeSet<&KeyId> = keys.iter().map(|key| &key.id).collect();
        if ids.len() != keys.len() {
            return Err(Malformed::Unknown("a key that is there twice"));
        }
        Ok(Self {
            name: message.name.parse()?,
            allowed,
            tokens_per_minute: message.tokens_per_minute,
            concurrent_max: message.concurrent_max,
            keys,
        })
    }
}

/// Reads a set that is written in the one way: in ascending order, nothing twice.
fn ascending<T>(texts: Vec<String>, what: &'static str) -> Result<BTreeSet<T>, Malformed>
where
    T: std::str::FromStr + Ord,
    Malformed: From<T::Err>,
{
    let mut set = BTreeSet::new();
    for text in texts {
        let value: T = text.parse()?;
        if set.last().is_some_and(|last| *last >= value) {
            return Err(Malformed::Unknown(what));
        }
        set.insert(value);
    }
    Ok(set)
}
