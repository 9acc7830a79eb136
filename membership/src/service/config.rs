//! The section `[membership]` of a coordinator's or a witness's configuration.

use std::path::PathBuf;
use std::time::Duration;

use entente_proto::ids::NodeName;
use serde::{Deserialize, Serialize};

use crate::net::{Bounds, Via};
use crate::raft;
use crate::roster::Roster;
use crate::steward;
use crate::store::Identity;
use crate::voter::Settings;

/// Entries after which a snapshot is taken: the log's memory, and what a start has to apply again.
const SNAPSHOT_ENTRIES: u64 = 8_192;
/// Entries before it that are kept for followers that are a little behind.
const SNAPSHOT_KEEP: u64 = 1_024;
/// Ticks between raft's heartbeats. Two, so that a timeout is never off by more than half of one.
const HEARTBEAT_TICKS: u16 = 2;
/// Shortest and longest life of a certificate: there has to be time to renew it, and what has no end
/// is never renewed.
pub const LEAF_LIFE_S_MIN: u64 = 2;
/// See [`LEAF_LIFE_S_MIN`].
pub const LEAF_LIFE_S_MAX: u64 = 90 * 24 * 3_600;
/// Longest of all durations below.
const MS_MAX: u64 = 600_000;
/// Most connections and handshakes that a control port may be told to take.
const PEERS_MAX: u64 = 65_536;

/// How a voter runs. Durations are milliseconds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The control port, `host:port`.
    pub listen: String,
    /// Where the durable log is.
    pub data_dir: PathBuf,
    /// Where others reach the control port, if the roster does not say it and it is not `listen`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub advertise: Option<String>,
    /// Between two heartbeats of a leader.
    #[serde(default = "heartbeat_ms")]
    pub heartbeat_ms: u64,
    /// Silence of the leader after which an election begins: this, to twice this.
    #[serde(default = "election_ms")]
    pub election_ms: u64,
    /// Silence after which an expert node is down.
    #[serde(default = "down_after_ms")]
    pub down_after_ms: u64,
    /// Time for which a node that is down may come back before its replicas are made elsewhere.
    #[serde(default = "restore_after_ms")]
    pub restore_after_ms: u64,
    /// It is no founder: with an empty disk it asks to become a member, and then waits to be added
    /// to the raft group.
    #[serde(default)]
    pub join: bool,
    /// Where to dial others, if not where the cluster says that they are.
    #[serde(default, skip_serializing_if = "Via::is_empty")]
    pub via: Via,
    /// Control ports to ask besides those of the founders, who may be gone one day.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub contacts: Vec<String>,
    /// The CAs whose keys are here: of the regions whose processes get their certificates here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca: Option<CaConfig>,
    /// Handshakes that are under way at the control port at a time.
    #[serde(default = "handshakes_max")]
    pub handshakes_max: usize,
    /// Those of one host among them.
    #[serde(default = "handshakes_of_host_max")]
    pub handshakes_of_host_max: usize,
    /// Connections of members and operators at a time.
    #[serde(default = "connections_max")]
    pub connections_max: usize,
    /// An etcd that shows the membership to others.
    #[cfg(feature = "etcd")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub etcd: Option<crate::mirror::Config>,
}

/// The section `[membership.ca]`: what this process issues certificates with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CaConfig {
    /// A folder with a `<region>.pem` and a `<region>.key` for each region.
    pub dir: PathBuf,
    /// Life of a certificate in seconds; it is renewed when half of it is over.
    #[serde(default = "leaf_life_s")]
    pub leaf_life_s: u64,
}

/// What is stolen is of use for a day at most.
fn leaf_life_s() -> u64 {
    24 * 3_600
}

impl CaConfig {
    /// With certificates that live for a day.
    pub fn new(dir: PathBuf) -> Self {
        Self { dir, leaf_life_s: leaf_life_s() }
    }
}

fn heartbeat_ms() -> u64 {
    100
}

fn election_ms() -> u64 {
    300
}

fn down_after_ms() -> u64 {
    1_000
}

fn restore_after_ms() -> u64 {
    10_000
}

fn handshakes_max() -> usize {
    Bounds::default().handshakes_max
}

fn handshakes_of_host_max() -> usize {
    Bounds::default().handshakes_of_host_max
}

fn connections_max() -> usize {
    Bounds::default().connections_max
}

/// A setting that is of no use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("membership.{key} is {value}, allowed is {min} to {max}")]
pub struct InvalidConfig {
    key: &'static str,
    value: u64,
    min: u64,
    max: u64,
}

impl Config {
    /// With the usual times.
    pub fn new(listen: String, data_dir: PathBuf) -> Self {
        Self {
            listen,
            data_dir,
            advertise: None,
            heartbeat_ms: heartbeat_ms(),
            election_ms: election_ms(),
            down_after_ms: down_after_ms(),
            restore_after_ms: restore_after_ms(),
            join: false,
            via: Via::default(),
            contacts: Vec::new(),
            ca: None,
            handshakes_max: handshakes_max(),
            handshakes_of_host_max: handshakes_of_host_max(),
            connections_max: connections_max(),
            #[cfg(feature = "etcd")]
            etcd: None,
        }
    }

    /// Whether the times fit together.
    ///
    /// # Errors
    /// Names the one that does not.
    pub fn check(&self) -> Result<(), InvalidConfig> {
        let (heartbeat, election) = (self.heartbeat_ms, self.election_ms);
        let bounds = [
            ("heartbeat_ms", heartbeat, 10, 10_000),
            // One heartbeat that is lost must not be an election.
            ("election_ms", election, heartbeat.saturating_mul(2).max(20), 100 * heartbeat.max(1)),
            ("down_after_ms", self.down_after_ms, 100, MS_MAX),
            ("restore_after_ms", self.restore_after_ms, 0, MS_MAX),
            ("handshakes_max", self.handshakes_max as u64, 1, PEERS_MAX),
            ("handshakes_of_host_max", self.handshakes_of_host_max as u64, 1, PEERS_MAX),
            ("connections_max", self.connections_max as u64, 1, PEERS_MAX),
            (
                "ca.leaf_life_s",
                self.ca.as_ref().map_or(LEAF_LIFE_S_MIN, |ca| ca.leaf_life_s),
                LEAF_LIFE_S_MIN,
                LEAF_LIFE_S_MAX,
            ),
        ];
        match bounds.into_iter().find(|(_, value, min, max)| !(min..=max).contains(&value)) {
            None => Ok(()),
            Some((key, value, min, max)) => Err(InvalidConfig { key, value, min, max }),
        }
    }

    /// How many may come to the control port.
    pub(super) fn bounds(&self) -> Bounds {
        let Self { handshakes_max, handshakes_of_host_max, connections_max, .. } = *self;
        Bounds { handshakes_max, handshakes_of_host_max, connections_max }
    }

    /// Where others reach the voter `name`.
    pub(super) fn address(&self, roster: &Roster, name: &NodeName) -> String {
        let founder = roster.voters().iter().find(|voter| voter.name == *name);
        let said = self.advertise.as_ref().or(founder.map(|voter| &voter.address));
        said.unwrap_or(&self.listen).clone()
    }

    pub(super) fn tick(&self) -> Duration {
        Duration::from_millis((self.heartbeat_ms / u64::from(HEARTBEAT_TICKS)).max(1))
    }

    pub(super) fn steward(&self) -> steward::Settings {
        steward::Settings {
            down_after_ms: self.down_after_ms,
            restore_after_ms: self.restore_after_ms,
            ..steward::Settings::default()
        }
    }

    pub(super) fn voter(&self, identity: Identity) -> Settings {
        let tick_ms = u64::try_from(self.tick().as_millis()).unwrap_or(1);
        let election_ticks = u16::try_from(self.election_ms / tick_ms).unwrap_or(u16::MAX);
        Settings {
            raft: raft::Config {
                id: identity.voter,
                heartbeat_ticks: HEARTBEAT_TICKS,
                election_ticks,
                seed: random(),
            },
            cluster: identity.cluster,
            snapshot_entries: SNAPSHOT_ENTRIES,
            snapshot_keep: SNAPSHOT_KEEP,
            #[cfg(feature = "etcd")]
            tells_changes: self.etcd.is_some(),
            #[cfg(not(feature = "etcd"))]
            tells_changes: false,
        }
    }
}

/// Another number at each start. Where the system gives no randomness the time must do: the number
/// has to differ, not to be secret.
pub(super) fn random() -> u64 {
    getrandom::u64().unwrap_or_else(|_| {
        let since = std::time::SystemTime::now().duration_since(std::time::SystemTime::UNIX_EPOCH);
        let nanos = since.unwrap_or_default().as_nanos();
        #[allow(clippy::cast_possible_truncation)]
        let low = nanos as u64;
        low ^ u64::from(std::process::id()).rotate_left(48)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_that_do_not_fit_together_are_named() {
        let good = Config::new("127.0.0.1:1".to_owned(), PathBuf::new());
        assert_eq!(good.check(), Ok(()));
        let hasty = Config { election_ms: 150, ..good.clone() };
        let error = hasty.check().unwrap_err().to_string();
        assert_eq!(error, "membership.election_ms is 150, allowed is 200 to 10000");
        let closed = Config { handshakes_max: 0, ..good.clone() };
        assert!(
            closed.check().unwrap_err().to_string().starts_with("membership.handshakes_max is 0")
        );
        assert!(Config { heartbeat_ms: 0, ..good }.check().is_err());
    }
}
