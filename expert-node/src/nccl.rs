//! Where rows may travel by NCCL, and the pair of lanes of one connection: one for rows to the node,
//! one for its answers. Both ends of a connection use this.
//!
//! NCCL does not encrypt, so it is used only where both ends were told that they stand at the same
//! site, and have shown certificates of the same region before.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use entente_model::kernels::DeviceError;
use entente_model::kernels::cuda::nccl::{self, Lane, NcclError, Patience, Rank, UniqueId};
use entente_model::kernels::cuda::{Buffer, Device};
use entente_proto::wire;
use serde::{Deserialize, Serialize};

/// How long one thing may take unless the configuration says otherwise, and how long it may say. It is
/// longer than a part of a coordinator's step, in which it takes nothing from its nodes.
const WAIT_MAX_MS: u64 = 3_000;
const WAIT_MAX_MS_MAX: u64 = 60_000;
/// Longest name of a site in bytes.
const SITE_LEN_MAX: usize = 260;

/// Memory of a device that lanes may want later: their own buffers, and what NCCL takes, of which it
/// says nothing. On small devices it is a share of what is free.
const ROOM_BYTES: u64 = 512 << 20;
const ROOM_SHARE: u64 = 4;

/// The section `[nccl]`: without it rows travel over the network only.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NcclConfig {
    /// The place whose network nobody else can listen on. Rows travel by NCCL, unencrypted, between
    /// processes that name the same.
    pub site: String,
    /// How long a peer may keep NCCL waiting before rows travel over the network again.
    #[serde(default = "wait_max_ms")]
    pub wait_max_ms: u64,
}

fn wait_max_ms() -> u64 {
    WAIT_MAX_MS
}

impl NcclConfig {
    /// A site with everything optional absent.
    pub fn new(site: String) -> Self {
        Self { site, wait_max_ms: WAIT_MAX_MS }
    }

    /// Names the first key whose value is out of bounds, as key, value or length, least and most.
    pub fn check(&self) -> Result<(), (&'static str, u64, u64, u64)> {
        let bounds = [
            ("nccl.site", self.site.len() as u64, 1, SITE_LEN_MAX as u64),
            ("nccl.wait_max_ms", self.wait_max_ms, 10, WAIT_MAX_MS_MAX),
        ];
        let is_out = |(_, have, min, max): &(_, u64, u64, u64)| !(min..=max).contains(&have);
        bounds.into_iter().find(is_out).map_or(Ok(()), Err)
    }
}

/// A device whose rows may travel by NCCL.
#[derive(Clone)]
pub struct Nccl {
    device: Arc<Device>,
    site: Arc<str>,
    version: u32,
    wait_max: Duration,
}

impl Nccl {
    /// For `device` of this process.
    ///
    /// # Errors
    /// NCCL is not installed, or too old.
    pub fn new(config: &NcclConfig, device: &Arc<Device>) -> Result<Self, DeviceError> {
        Ok(Self {
            version: nccl::available()?,
            device: Arc::clone(device),
            site: config.site.as_str().into(),
            wait_max: Duration::from_millis(config.wait_max_ms),
        })
    }

    /// Memory for lanes that are opened later, held while somebody else takes what is left.
    ///
    /// # Errors
    /// The device is lost.
    pub fn room(&self) -> Result<Buffer<u8>, DeviceError> {
        let bytes = ROOM_BYTES.min(self.device.memory_free_bytes()? / ROOM_SHARE);
        Buffer::new(&self.device, bytes as usize)
    }

    /// What a coordinator asks of a node, and the ids by which it joins itself.
    ///
    /// # Errors
    /// NCCL finds no network.
    pub fn request(&self) -> Result<(wire::NcclRequest, [UniqueId; 2]), NcclError> {
        let ids = [UniqueId::new()?, UniqueId::new()?];
        let [to_node, from_node] = ids.map(|id| Bytes::copy_from_slice(id.as_bytes()));
        let (site, version) = (self.site.to_string(), self.version);
        Ok((wire::NcclRequest { site, to_node, from_node, version }, ids))
    }

    /// The ids by which a node joins, or for people why it does not.
    ///
    /// # Errors
    /// The coordinator stands elsewhere, has another NCCL, or asks wrongly.
    pub fn judge(&self, request: &wire::NcclRequest) -> Result<[UniqueId; 2], String> {
        if request.site != *self.site {
            return Err(format!("this node is at site {:?}", self.site));
        }
        if request.version != self.version {
            return Err(format!("NCCL is {} here, {} there", self.version, request.version));
        }
        let id = |name: &str, bytes: &Bytes| match bytes.as_ref().try_into() {
            Ok(bytes) => Ok(UniqueId::from_bytes(bytes)),
            Err(_) => Err(format!("{name} has {} bytes", bytes.len())),
        };
        Ok([id("to_node", &request.to_node)?, id("from_node", &request.from_node)?])
    }

    /// Opens this process's ends, of the lane to the node and of the one from it.
    ///
    /// # Errors
    /// As [`Lane::open`].
    pub fn open(
        &self,
        ids: [UniqueId; 2],
        rank: Rank,
        given_up: &(dyn Fn() -> bool + Sync),
    ) -> Result<[Lane; 2], NcclError> {
        let patience = self.patience(given_up);
        let [to_node, from_node] = ids.map(|id| Lane::open(&self.device, id, rank, &patience));
        Ok([to_node?, from_node?])
    }

    /// How long to wait for the peer.
    pub fn patience<'a>(&self, given_up: &'a (dyn Fn() -> bool + Sync)) -> Patience<'a> {
        Patience { wait_max: self.wait_max, given_up }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_section_that_is_out_of_bounds_is_named() {
        let checked = |text: &str| toml::from_str::<NcclConfig>(text).unwrap().check();
        assert_eq!(checked("site = \"fr-par-1\""), Ok(()));
        assert_eq!(checked("site = \"\""), Err(("nccl.site", 0, 1, 260)));
        let refused = checked("site = \"a\"\nwait_max_ms = 5");
        assert_eq!(refused, Err(("nccl.wait_max_ms", 5, 10, 60_000)));
    }
}
