//! Whose a request is, and where its rows may go: decided once, when the request comes in, and the
//! same for all answers to it and for as long as they take.
//!
//! What this module does not know: how it was decided ([`crate::api`] does that).

use entente_proto::ids::{Region, RegionSet, RequestId, TenantName};

/// What all answers to one request of a client have in common.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    /// Names the request.
    pub id: RequestId,
    /// Whose request it is.
    pub tenant: TenantName,
    /// The regions that may see its rows.
    pub allowed: RegionSet,
    /// Mixed into the names of cached prefixes: requests with different salts share none.
    pub cache_salt: Vec<u8>,
}

impl Origin {
    /// What is mixed in, all in all. Rows that were computed for a request which may go to more
    /// regions are not used for one that may not, and the other way round: what a request's record
    /// says of its rows then holds for those too that it found in the cache.
    pub fn prefix_salt(&self) -> Vec<u8> {
        // The number of regions tells where they end and the tenant's salt begins.
        let mut salt = self.allowed.len().to_le_bytes().to_vec();
        salt.extend(self.allowed.iter().flat_map(|region| region.as_str().bytes()));
        salt.extend_from_slice(&self.cache_salt);
        salt
    }
}

/// The tenant of requests that nobody had to show a key for.
pub const ANONYMOUS: &str = "anonymous";

impl Origin {
    /// A request without a tenant, whose rows stay in `region`.
    pub fn anonymous(region: Region) -> Self {
        Self {
            id: RequestId(uuid::Uuid::new_v4().as_u128()),
            tenant: ANONYMOUS.parse().expect("the word is a valid name"),
            allowed: RegionSet::from([region]),
            cache_salt: Vec::new(),
        }
    }
}
