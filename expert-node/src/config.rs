//! The configuration file of an expert node. An unknown key is an error that names the key.

use std::io;
use std::path::{Path, PathBuf};

use entente_membership::roster::Roster;
use entente_model::kernels::WeightFormat;
use entente_proto::identity::Role;
use entente_proto::ids::{NodeName, Region};
use entente_tls::Credentials;
use serde::{Deserialize, Serialize};

/// Most threads that a node may be told to compute with.
const THREADS_MAX: usize = 1_024;

/// An expert node, as TOML.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// This process's name; must be in the cluster.
    pub name: NodeName,
    /// The country that it stands in; must be the one that the cluster says.
    pub region: Region,
    /// Where it listens, `host:port`; port 0 picks a free one.
    pub listen: String,
    /// The checkpoint folder, in Hugging Face format or packed.
    pub model: PathBuf,
    /// How weights are kept: `f32`, `bf16`, `q8` or `q4`.
    pub weights: WeightFormat,
    /// Threads for arithmetic; all cores when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threads: Option<usize>,
    /// Certificate, key and CAs; without them the node listens on loopback only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<entente_tls::Files>,
    /// All expert nodes.
    pub cluster: Roster,
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

    /// Checks what the parts cannot know of each other.
    pub fn check(&self) -> Result<(), ConfigError> {
        let Some((_, node)) = self.cluster.node(&self.name) else {
            return Err(ConfigError::NotInRoster(self.name.clone()));
        };
        if node.region != self.region {
            let (name, have, want) = (self.name.clone(), self.region, node.region);
            return Err(ConfigError::Region { name, have, want });
        }
        match self.threads {
            Some(threads) if !(1..=THREADS_MAX).contains(&threads) => {
                Err(ConfigError::Threads(threads))
            }
            _ => Ok(()),
        }
    }

    /// Reads what `[tls]` names, and checks that it was issued to this node.
    pub fn credentials(&self) -> Result<Option<Credentials>, entente_tls::Error> {
        let Some(files) = &self.tls else { return Ok(None) };
        let credentials = Credentials::load(files)?;
        let member = Some((self.region, self.name.clone()));
        credentials.belong_to(&self.cluster.expect(Role::Expert, member))?;
        Ok(Some(credentials))
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

    #[test]
    fn what_is_wrong_in_a_configuration_is_named() {
        let cases = [
            ("weights = \"bf16\"", "weights = \"int4\"", "unknown variant `int4`"),
            ("weights = \"bf16\"", "weight = \"bf16\"", "unknown field `weight`"),
            ("threads = 2", "threads = 0", "threads: is 0"),
            ("threads = 2", "threads = 2000", "threads: is 2000"),
            ("threads = 2", "", ""),
            ("key = ", "keys = ", "unknown field `keys`"),
            ("ca = \"/etc/entente/ca.pem\"", "", "missing field `ca`"),
            ("model = \"/models/demo\"", "", "missing field `model`"),
            ("region = \"fr\"\n        listen", "region = \"se\"\n        listen", "says fr"),
            ("name = \"fr-expert-1\"\n", "name = \"fr-expert-2\"\n", "fr-expert-2 is not one of"),
        ];
        for (text, spoilt, cause) in cases {
            let spoilt = GOOD.replacen(text, spoilt, 1);
            assert_ne!(spoilt, GOOD, "{text} is not in the text");
            match Config::parse(&spoilt) {
                Ok(_) => assert_eq!(cause, "", "{spoilt} was accepted"),
                Err(error) => {
                    let error = error.to_string();
                    assert!(!cause.is_empty() && error.contains(cause), "{error}: {cause}?");
                }
            }
        }
    }
}
