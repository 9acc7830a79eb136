//! The folder of one `entente up`: configurations, certificates, logs, the voters' stores, the
//! unpacked model and `cluster.json`.
//!
//! One process owns it at a time, by a lock that the kernel drops when that process ends, however
//! it ends. `cluster.json` is there exactly while the cluster is ready: written by an atomic
//! rename, again whenever a process was restarted, removed at a clean stop, and swept away by the
//! next owner after an unclean one.

use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use entente_proto::ids::{NodeName, Region};
use serde::{Deserialize, Serialize};

use super::plan::Role;
use crate::api_key::ApiKey;
use crate::exit::Misuse;

const CLUSTER_FILE: &str = "cluster.json";

/// The header that shows the key, as `curl -H @FILE` reads it: so the key is neither on a screen nor
/// in a list of processes.
pub const AUTHORIZATION_FILE: &str = "authorization";

/// What `cluster.json` says: how scripts find a cluster and its processes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ClusterFile {
    /// The public API of the first region's coordinator.
    pub http: String,
    /// The public API of each region's coordinator.
    pub endpoints: BTreeMap<Region, String>,
    /// The control plane of each voter, by name; empty where nobody votes.
    pub control: BTreeMap<NodeName, String>,
    /// Key of the tenant that the cluster began with; absent where no key is needed or known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub api_key: Option<ApiKey>,
    /// The public key of each coordinator's audit log, by name; empty where none is kept.
    #[serde(default)]
    pub audit_keys: BTreeMap<NodeName, String>,
    /// Every child process.
    pub processes: Vec<ProcessEntry>,
    /// The public key with which each witness cosigns audit logs, by name.
    #[serde(default)]
    pub witness_keys: BTreeMap<NodeName, String>,
}

/// One child process in `cluster.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ProcessEntry {
    /// Its name in the cluster.
    pub name: NodeName,
    /// What it does.
    pub role: Role,
    /// Where it stands.
    pub region: Region,
    /// Its process id.
    pub pid: u32,
    /// Where it listens; for a witness this is its control plane.
    pub address: SocketAddr,
    /// The URL of its metrics; a witness has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metrics: Option<String>,
}

impl ClusterFile {
    /// Reads the file of the cluster that runs in `data_dir`.
    pub fn read(data_dir: &Path) -> anyhow::Result<Self> {
        let path = data_dir.join(CLUSTER_FILE);
        let text = match fs::read_to_string(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => bail!(Misuse(format!(
                "no cluster is running in {}: start one with `entente up`, or say where one is",
                data_dir.display()
            ))),
            other => other.with_context(|| format!("cannot read {}", path.display()))?,
        };
        serde_json::from_str(&text).with_context(|| format!("{} is not valid", path.display()))
    }
}

/// Where certificates and keys are kept in the data directory `root`.
pub fn tls_in(root: &Path) -> PathBuf {
    root.join("tls")
}

/// Where coordinators keep their audit logs in the data directory `root`.
pub fn audit_in(root: &Path) -> PathBuf {
    root.join("audit")
}

/// A data directory that this process owns until the value is dropped.
#[derive(Debug)]
pub struct DataDir {
    root: PathBuf,
    // Held, not used: the lock lives as long as the open file.
    _lock: File,
}

impl DataDir {
    /// Takes ownership of `root`, creating it if need be.
    ///
    /// # Errors
    /// When another process owns it, or when it cannot be written.
    pub fn open(root: &Path) -> anyhow::Result<Self> {
        let cannot = || format!("cannot use {} as the data directory", root.display());
        fs::create_dir_all(root.join("logs")).with_context(cannot)?;
        // Children find their configuration by its path, wherever they are started.
        let root = root.canonicalize().with_context(cannot)?;
        let lock = File::create(root.join("lock")).with_context(cannot)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => bail!(
                "the data directory {} is in use by another `entente up`; give this one its own \
                 with --data-dir",
                root.display()
            ),
            Err(TryLockError::Error(error)) => return Err(error).with_context(cannot),
        }
        let dir = Self { root, _lock: lock };
        dir.retract()?;
        Ok(dir)
    }

    /// The folder itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Where unpacked models are kept.
    pub fn models(&self) -> PathBuf {
        self.root.join("models")
    }

    /// Where certificates and keys are kept.
    pub fn tls(&self) -> PathBuf {
        tls_in(&self.root)
    }

    /// Where coordinators keep their audit logs, each in a folder of its name.
    pub fn audit(&self) -> PathBuf {
        audit_in(&self.root)
    }

    /// Where witnesses keep what they cosigned, each in a folder of its name.
    pub fn cosign(&self) -> PathBuf {
        self.root.join("cosign")
    }

    /// Where voters keep their logs, each in a folder of its name: empty at first. A cluster on one
    /// machine has new certificates and new addresses at each start, so what an earlier one agreed
    /// on is about members that are no more.
    pub fn empty_raft(&self) -> anyhow::Result<PathBuf> {
        let path = self.root.join("raft");
        match fs::remove_dir_all(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("cannot empty {}", path.display()))
            }
            _ => Ok(path),
        }
    }

    /// The log of the child `name`, empty. A child that is restarted goes on in it.
    pub fn empty_log(&self, name: &NodeName) -> anyhow::Result<PathBuf> {
        let path = self.log(name);
        File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(path)
    }

    /// The log of the child `name`.
    pub fn log(&self, name: &NodeName) -> PathBuf {
        self.root.join("logs").join(format!("{name}.log"))
    }

    /// Writes the configuration of the child `name` and says where it is.
    pub fn write_config(&self, name: &NodeName, toml: &str) -> anyhow::Result<PathBuf> {
        let path = self.root.join(format!("{name}.toml"));
        fs::write(&path, toml).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(path)
    }

    /// Tells everyone that the cluster is ready.
    pub fn publish(&self, cluster: &ClusterFile) -> anyhow::Result<()> {
        if let Some(key) = &cluster.api_key {
            let header = format!("Authorization: {}\n", key.authorization());
            self.write_private(AUTHORIZATION_FILE, &header)?;
        }
        self.write_private(CLUSTER_FILE, &(serde_json::to_string_pretty(cluster)? + "\n"))
    }

    /// Replaces a file in one step by one that nobody else may read.
    fn write_private(&self, name: &str, text: &str) -> anyhow::Result<()> {
        let (path, part) = (self.root.join(name), self.root.join(format!("{name}.part")));
        let write = || {
            remove(&part)?;
            let mut file = File::options().write(true).create_new(true).mode(0o600).open(&part)?;
            file.write_all(text.as_bytes())?;
            fs::rename(&part, &path)
        };
        write().with_context(|| format!("cannot write {}", path.display()))
    }

    /// Tells everyone that there is no cluster here (any more).
    pub fn retract(&self) -> anyhow::Result<()> {
        for name in [CLUSTER_FILE, AUTHORIZATION_FILE] {
            let path = self.root.join(name);
            remove(&path).with_context(|| format!("cannot remove {}", path.display()))?;
        }
        Ok(())
    }
}

/// Removes a file if it is there.
fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn nobody_else_may_read_the_key_and_it_goes_with_the_cluster() {
        let dir = tempfile::tempdir().unwrap();
        let data = DataDir::open(dir.path()).unwrap();
        let api_key: Option<ApiKey> = Some("mk_0_secret".parse().unwrap());
        let (http, endpoints) = ("http://a".to_owned(), BTreeMap::new());
        let (control, processes) = (BTreeMap::new(), Vec::new());
        let (audit_keys, witness_keys) = (BTreeMap::new(), BTreeMap::new());
        let file =
            ClusterFile { http, endpoints, control, api_key, audit_keys, processes, witness_keys };
        // Twice, as it is when a process was restarted.
        data.publish(&file).unwrap();
        data.publish(&file).unwrap();
        let paths = [CLUSTER_FILE, AUTHORIZATION_FILE].map(|name| data.root().join(name));
        for path in &paths {
            let mode = fs::metadata(path).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{}", path.display());
            assert!(fs::read_to_string(path).unwrap().contains("mk_0_secret"));
        }
        assert_eq!(ClusterFile::read(dir.path()).unwrap(), file);
        data.retract().unwrap();
        assert!(paths.iter().all(|path| !path.exists()));
    }

    #[test]
    fn a_second_owner_is_refused_until_the_first_lets_go() {
        let dir = tempfile::tempdir().unwrap();
        let first = DataDir::open(dir.path()).unwrap();
        let refusal = DataDir::open(dir.path()).unwrap_err().to_string();
        assert!(refusal.contains("in use"), "{refusal}");
        drop(first);
        DataDir::open(dir.path()).unwrap();
    }

    #[test]
    fn a_new_owner_sweeps_away_what_a_killed_one_left() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(CLUSTER_FILE), "{}").unwrap();
        let _owner = DataDir::open(dir.path()).unwrap();
        let error = ClusterFile::read(dir.path()).unwrap_err().to_string();
        assert!(error.contains("no cluster is running"), "{error}");
    }
}
