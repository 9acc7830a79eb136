//! The configuration file of an expert node. An unknown key is an error that names the key.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use entente_membership::net::Via;
use entente_membership::roster::Roster;
use entente_model::kernels::{self, DeviceId, ExpertKernels, WeightFormat};
use entente_proto::identity::Role;
use entente_proto::ids::{NodeName, Region};
use entente_tls::Credentials;
use serde::{Deserialize, Serialize};

use crate::{Error, Nccl, NcclConfig};

/// How often a node of a live cluster tells that it lives, unless its configuration says otherwise.
const HEARTBEAT_MS: u64 = 100;
/// How rarely and how often it may be told to.
const HEARTBEAT_MS_MIN: u64 = 10;
const HEARTBEAT_MS_MAX: u64 = 10_000;
/// How long leaving may take unless the configuration says otherwise, and at most.
const DRAIN_DEADLINE_MS: u64 = 30_000;
const DRAIN_DEADLINE_MS_MAX: u64 = 86_400_000;
/// How often each expert in memory is looked at unless the configuration says otherwise, and how
/// rarely it may be.
const SCRUB_INTERVAL_S: u64 = 3_600;
const SCRUB_INTERVAL_S_MAX: u64 = 31_536_000;
/// Longest address or site in bytes.
const TEXT_LEN_MAX: usize = 260;

/// Most threads that a node may be told to compute with.
const THREADS_MAX: usize = 1_024;

/// An expert node, as TOML.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// This process's name; must be in the cluster's list, or in its certificate if the cluster
    /// has voters.
    pub name: NodeName,
    /// The country that it stands in; must be the one that the list or the certificate says.
    pub region: Region,
    /// Where it listens, `host:port`; port 0 picks a free one.
    pub listen: String,
    /// The checkpoint folder, in Hugging Face format or packed.
    pub model: PathBuf,
    /// How weights are kept: `f32`, `bf16`, `q8`, `fp8` or `q4`.
    pub weights: WeightFormat,
    /// Threads for arithmetic; all cores when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threads: Option<usize>,
    /// Bytes that expert weights may take here; when absent as many as the device has room for, and
    /// without a device not limited. Like all that follows but
    /// `metrics_listen` and `tls`, it matters in a cluster with voters only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
    /// The data centre within the region, such as `fr-par-1`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub site: Option<String>,
    /// Where coordinators reach the node, `host:port`; `listen` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub advertise: Option<String>,
    /// How long a node that was told to stop waits until its experts are elsewhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drain_deadline_ms: Option<u64>,
    /// Where `/metrics`, `/livez` and `/readyz` are answered, `host:port`; nowhere when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metrics_listen: Option<String>,
    /// Certificate, key and CAs; without them the node listens on loopback only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<entente_tls::Files>,
    /// How often each expert in memory is compared with its SHA-256; 0: never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scrub_interval_s: Option<u64>,
    /// Where it computes: `cpu`, or `cuda:N` for the CUDA device of this number.
    #[serde(default, skip_serializing_if = "is_default")]
    pub device: DeviceId,
    /// How the node speaks to the voters.
    #[serde(default, skip_serializing_if = "is_default")]
    pub membership: MembershipConfig,
    /// Where rows may travel from GPU to GPU, unencrypted; nowhere when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nccl: Option<NcclConfig>,
    /// The voters, or all expert nodes if there are none.
    pub cluster: Roster,
}

/// The section `[membership]`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MembershipConfig {
    /// How often the node tells that it lives.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub heartbeat_ms: Option<u64>,
    /// Where to dial voters, if not where the cluster says that they are.
    #[serde(default, skip_serializing_if = "Via::is_empty")]
    pub via: Via,
    /// Control ports to ask besides those of `cluster.voters`, who may be gone one day.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub contacts: Vec<String>,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// Why a configuration is not usable.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{}: {source}", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// The text is no configuration. Names the line and the key.
    #[error("configuration: {0}")]
    Toml(#[from] toml::de::Error),
    /// The cluster does not know this node.
    #[error("name: {0} is not one of the nodes in cluster.nodes")]
    NotInRoster(NodeName),
    /// The cluster says another region.
    #[error("region: {name} is in {have}, but cluster.nodes says {want}")]
    Region {
        /// The node.
        name: NodeName,
        /// What the node's own section says.
        have: Region,
        /// What the cluster's list says.
        want: Region,
    },
    /// No or absurdly many threads.
    #[error("threads: is {0}, allowed is 1 to {THREADS_MAX}")]
    Threads(usize),
    /// NCCL brings rows to a device, of those who have shown certificates.
    #[error("nccl: {0}")]
    Nccl(&'static str),
    /// A control plane is spoken to over TLS or not at all.
    #[error("tls: the section is needed in a cluster with cluster.voters")]
    TlsNeeded,
    /// A time or a text out of its bounds.
    #[error("{key}: is {have}, allowed is {min} to {max}")]
    Bounds {
        /// The key.
        key: &'static str,
        /// Its value, or its length in bytes.
        have: u64,
        /// The least that is allowed.
        min: u64,
        /// The most that is allowed.
        max: u64,
    },
    /// Nobody can dial that.
    #[error("advertise: is needed, since coordinators cannot dial {0}")]
    Advertise(String),
}

impl Config {
    /// Reads and checks a file.
    pub fn load(file: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(file)
            .map_err(|source| ConfigError::Read { file: file.to_owned(), source })?;
        Self::parse(&text)
    }

    /// Reads and checks a text.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let config: Self = toml::from_str(text)?;
        config.check()?;
        Ok(config)
    }

    /// A node with everything optional absent.
    pub fn new(
        name: NodeName,
        region: Region,
        listen: String,
        model: PathBuf,
        weights: WeightFormat,
        cluster: Roster,
    ) -> Self {
        Self {
            name,
            region,
            listen,
            model,
            weights,
            threads: None,
            memory_bytes: None,
            site: None,
            advertise: None,
            drain_deadline_ms: None,
            scrub_interval_s: None,
            device: DeviceId::Cpu,
            metrics_listen: None,
            tls: None,
            membership: MembershipConfig::default(),
            nccl: None,
            cluster,
        }
    }

    /// Whether raft carries what the cluster agrees on. Otherwise the list is all there is.
    pub fn is_live(&self) -> bool {
        !self.cluster.voters().is_empty()
    }

    /// Checks what the parts cannot know of each other.
    pub fn check(&self) -> Result<(), ConfigError> {
        match self.threads {
            Some(threads) if !(1..=THREADS_MAX).contains(&threads) => {
                return Err(ConfigError::Threads(threads));
            }
            _ => {}
        }
        if let Some(have) = self.scrub_interval_s.filter(|have| *have > SCRUB_INTERVAL_S_MAX) {
            let (key, min, max) = ("scrub_interval_s", 0, SCRUB_INTERVAL_S_MAX);
            return Err(ConfigError::Bounds { key, have, min, max });
        }
        self.check_nccl()?;
        if self.is_live() { self.check_live() } else { self.check_listed() }
    }

    fn check_nccl(&self) -> Result<(), ConfigError> {
        let Some(nccl) = &self.nccl else { return Ok(()) };
        if self.device == DeviceId::Cpu {
            return Err(ConfigError::Nccl("the section needs device = \"cuda:N\""));
        }
        if self.tls.is_none() {
            return Err(ConfigError::Nccl("the section needs the section [tls]"));
        }
        nccl.check().map_err(|(key, have, min, max)| ConfigError::Bounds { key, have, min, max })
    }

    /// What rows may travel by besides the network, or why by nothing although that was asked for. It
    /// is no reason not to serve, but one to say so.
    pub(crate) fn nccl(&self, kernels: &dyn ExpertKernels) -> Option<Result<Nccl, String>> {
        let (config, device) = self.nccl.as_ref().zip(kernels.cuda_device())?;
        Some(Nccl::new(config, device).map_err(|error| {
            tracing::warn!(%error, "rows travel over the network only");
            error.to_string()
        }))
    }

    /// The certificate says who the node is; the list only helps to found the cluster.
    fn check_live(&self) -> Result<(), ConfigError> {
        if self.tls.is_none() {
            return Err(ConfigError::TlsNeeded);
        }
        let len = |text: &Option<String>| text.as_ref().map_or(0, |text| text.len() as u64);
        let bounds = [
            ("membership.heartbeat_ms", self.heartbeat_ms(), HEARTBEAT_MS_MIN, HEARTBEAT_MS_MAX),
            ("drain_deadline_ms", self.drain_deadline_ms(), 0, DRAIN_DEADLINE_MS_MAX),
            ("site", len(&self.site), 0, TEXT_LEN_MAX as u64),
            ("advertise", len(&self.advertise), 0, TEXT_LEN_MAX as u64),
        ];
        if let Some((key, have, min, max)) =
            bounds.into_iter().find(|(_, have, min, max)| !(min..=max).contains(&have))
        {
            return Err(ConfigError::Bounds { key, have, min, max });
        }
        let anywhere = self.listen.parse().is_ok_and(|a: SocketAddr| a.ip().is_unspecified());
        if anywhere && self.advertise.is_none() {
            return Err(ConfigError::Advertise(self.listen.clone()));
        }
        Ok(())
    }

    fn check_listed(&self) -> Result<(), ConfigError> {
        let Some((_, node)) = self.cluster.node(&self.name) else {
            return Err(ConfigError::NotInRoster(self.name.clone()));
        };
        if node.region != self.region {
            let (name, have, want) = (self.name.clone(), self.region, node.region);
            return Err(ConfigError::Region { name, have, want });
        }
        Ok(())
    }

    /// How often the node tells that it lives.
    pub(crate) fn heartbeat_ms(&self) -> u64 {
        self.membership.heartbeat_ms.unwrap_or(HEARTBEAT_MS)
    }

    /// How often each expert in memory is looked at, if it is.
    pub(crate) fn scrub_interval(&self) -> Option<Duration> {
        let interval_s = self.scrub_interval_s.unwrap_or(SCRUB_INTERVAL_S);
        (interval_s > 0).then(|| Duration::from_secs(interval_s))
    }

    /// How long leaving may take.
    pub(crate) fn drain_deadline_ms(&self) -> u64 {
        self.drain_deadline_ms.unwrap_or(DRAIN_DEADLINE_MS)
    }

    /// Where coordinators reach the node, which listens at `address`.
    pub(crate) fn reached_at(&self, address: SocketAddr) -> String {
        let listen = if self.listen.ends_with(":0") { &address.to_string() } else { &self.listen };
        self.advertise.as_ref().unwrap_or(listen).clone()
    }

    /// Reads what `[tls]` names, and checks that it was issued to this node.
    pub fn credentials(&self) -> Result<Option<Credentials>, entente_tls::Error> {
        let Some(files) = &self.tls else { return Ok(None) };
        let credentials = Credentials::load(files)?;
        let member = Some((self.region, self.name.clone()));
        credentials.belong_to(&self.cluster.expect(Role::Expert, member))?;
        Ok(Some(credentials))
    }

    /// The kernels to compute with.
    pub(crate) fn kernels(&self) -> Result<Arc<dyn ExpertKernels>, Error> {
        let device = self.device;
        kernels::select_on(device, self.weights, self.thread_count())
            .map_err(|source| Error::Device { device, source })
    }

    /// Threads to compute with.
    pub(crate) fn thread_count(&self) -> usize {
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        self.threads.unwrap_or_else(cores)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
        name = "fr-expert-1"
        region = "fr"
        listen = "127.0.0.1:7101"
        model = "/models/demo"
        weights = "bf16"
        threads = 2

        [tls]
        ca = "/etc/entente/ca.pem"
        certificate = "/etc/entente/fr-expert-1.pem"
        key = "/etc/entente/fr-expert-1.key"

        [cluster]
        name = "demo"
        nodes = [
            { name = "fr-expert-1", region = "fr", address = "127.0.0.1:7101" },
            { name = "se-expert-1", region = "se", address = "127.0.0.1:7201" },
        ]"#;

    #[test]
    fn a_configuration_survives_being_written_and_read() {
        let config = Config::parse(GOOD).unwrap();
        let again = Config::parse(&toml::to_string(&config).unwrap()).unwrap();
        assert_eq!(again, config);
    }

    fn refused_as(text: &str, cases: &[(&str, &str, &str)]) {
        for (good, bad, cause) in cases {
            let spoilt = text.replacen(good, bad, 1);
            assert_ne!(spoilt, text, "{good} is not in the text");
            match Config::parse(&spoilt) {
                Ok(_) => assert_eq!(*cause, "", "{spoilt} was accepted"),
                Err(error) => {
                    let error = error.to_string();
                    assert!(!cause.is_empty() && error.contains(cause), "{error}: {cause}?");
                }
            }
        }
    }

    #[test]
    fn what_is_wrong_in_a_configuration_is_named() {
        let cases = [
            ("weights = \"bf16\"", "weights = \"int4\"", "unknown variant `int4`"),
            ("weights = \"bf16\"", "weight = \"bf16\"", "unknown field `weight`"),
            ("threads = 2", "threads = 0", "threads: is 0"),
            ("threads = 2", "threads = 2000", "threads: is 2000"),
            ("threads = 2", "", ""),
            ("threads = 2", "device = \"cpu\"", ""),
            ("threads = 2", "device = \"cuda:3\"", ""),
            ("threads = 2", "device = \"gpu\"", "gpu is no device: cpu, or cuda:N"),
            ("threads = 2", "scrub_interval_s = 0", ""),
            ("threads = 2", "scrub_interval_s = 31536001", "scrub_interval_s: is 31536001"),
            ("key = ", "keys = ", "unknown field `keys`"),
            ("[cluster]", "[nccl]\nsite = \"here\"\n[cluster]", "nccl: the section needs device"),
            ("ca = \"/etc/entente/ca.pem\"", "", "missing field `ca`"),
            ("model = \"/models/demo\"", "", "missing field `model`"),
            ("region = \"fr\"\n        listen", "region = \"se\"\n        listen", "says fr"),
            ("name = \"fr-expert-1\"\n", "name = \"fr-expert-2\"\n", "fr-expert-2 is not one of"),
        ];
        refused_as(GOOD, &cases);
    }

    /// A node that the list does not name, in a cluster with a voter.
    fn live() -> String {
        let voter = r#"voters = [
            { name = "fr-coordinator", region = "fr", role = "coordinator", address = "h:1" },
        ]
        nodes = ["#;
        let more = "threads = 2\nmemory_bytes = 1000\nsite = \"fr-par-1\"\nadvertise = \"a:1\"\n\
                    drain_deadline_ms = 5";
        GOOD.replacen("nodes = [", voter, 1)
            .replacen("threads = 2", more, 1)
            .replacen("name = \"fr-expert-1\"", "name = \"fr-expert-9\"", 1)
            .replacen("[cluster]", "[membership]\nheartbeat_ms = 50\n[cluster]", 1)
    }

    #[test]
    fn a_node_of_a_live_cluster_need_not_be_listed_but_must_be_certified_and_reachable() {
        let config = Config::parse(&live()).unwrap();
        let again = Config::parse(&toml::to_string(&config).unwrap()).unwrap();
        assert_eq!(again, config);
        let tls = &live()[live().find("[tls]").unwrap()..live().find("[membership]").unwrap()];
        let cases = [
            (tls, "", "tls: the section is needed"),
            ("heartbeat_ms = 50", "heartbeat_ms = 9", "membership.heartbeat_ms: is 9"),
            ("heartbeat_ms = 50", "heartbeat = 9", "unknown field `heartbeat`"),
            ("_ms = 5\n", "_ms = 90000000\n", "drain_deadline_ms: is 90000000"),
            ("advertise = \"a:1\"", "", ""),
            ("listen = \"127.0.0.1", "listen = \"0.0.0.0", ""),
        ];
        refused_as(&live(), &cases);
        let anywhere = live().replacen("listen = \"127.0.0.1", "listen = \"0.0.0.0", 1);
        refused_as(&anywhere, &[("advertise = \"a:1\"", "", "advertise: is needed")]);
    }
}
