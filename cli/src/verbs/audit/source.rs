//! Which logs, and by which keys.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use entente_audit::checkpoint::Checkpoint;
use entente_audit::folder::Folder;
use entente_audit::keyfile::PUBLIC_KEY;
use entente_audit::note::{PublicKey, Verifier};
use entente_proto::ids::NodeName;

use crate::cluster::data_dir::audit_in;
use crate::exit::Misuse;

/// The flags by which logs are found.
#[derive(Debug, Args)]
#[command(next_help_heading = "Logs")]
pub struct LogArgs {
    /// Folder of the `entente up` whose coordinators' logs are meant.
    #[arg(long, env = "ENTENTE_DATA_DIR", value_name = "DIR", default_value = ".entente")]
    data_dir: PathBuf,

    /// The coordinator whose log is meant, instead of all of --data-dir.
    #[arg(long, env = "ENTENTE_AUDIT_NODE", value_name = "NAME")]
    node: Option<NodeName>,

    /// A log's own folder, instead of those of --data-dir.
    #[arg(long, env = "ENTENTE_AUDIT_FOLDER", value_name = "DIR", conflicts_with = "node")]
    folder: Option<PathBuf>,

    /// The log's public key, or a file with it; the one in the log's folder when absent.
    #[arg(long, env = "ENTENTE_AUDIT_KEY", value_name = "KEY")]
    key: Option<String>,
}

/// A log, as far as its latest checkpoint.
pub struct Source {
    /// Its folder.
    pub root: PathBuf,
    /// Whose it is.
    pub verifier: Verifier,
    /// What it says that it holds.
    pub checkpoint: Checkpoint,
}

impl Source {
    fn open(root: PathBuf, key: Option<&str>) -> anyhow::Result<Self> {
        let verifier = match key {
            Some(key) => read_key(key)?,
            None => read_key(&root.join(PUBLIC_KEY).to_string_lossy())?,
        };
        let checkpoint = Checkpoint::open(&Folder::note(&root)?, &verifier)
            .with_context(|| format!("the log in {}", root.display()))?;
        Ok(Self { root, verifier, checkpoint })
    }

    /// The same log as far as somebody has cosigned it, which while it grows is a little less far.
    pub fn cosigned(self) -> anyhow::Result<Self> {
        let note = Folder::cosigned_note(&self.root)?;
        let none = || Misuse(format!("no witness has cosigned the log in {}", self.root.display()));
        let checkpoint = Checkpoint::open(&note.ok_or_else(none)?, &self.verifier)?;
        Ok(Self { checkpoint, ..self })
    }

    /// Its records.
    pub fn folder(&self) -> Folder {
        Folder::new(&self.root, self.checkpoint.tree.size)
    }
}

impl LogArgs {
    /// All logs that are meant; at least one.
    pub fn all(&self) -> anyhow::Result<Vec<Source>> {
        let roots = match (&self.folder, &self.node) {
            (Some(folder), _) => vec![folder.clone()],
            (None, Some(node)) => vec![audit_in(&self.data_dir).join(node.as_str())],
            (None, None) => folders(&audit_in(&self.data_dir))?,
        };
        // A coordinator that has served nobody yet has signed nothing.
        let begun = roots.into_iter().filter(|root| self.is_named() || Folder::note(root).is_ok());
        let open = |root| Source::open(root, self.key.as_deref());
        let sources = begun.map(open).collect::<anyhow::Result<Vec<_>>>()?;
        if sources.is_empty() {
            let folder = audit_in(&self.data_dir);
            let text = format!(
                "there is no audit log with records in {}; say where one is with --folder",
                folder.display()
            );
            return Err(Misuse(text).into());
        }
        Ok(sources)
    }

    /// The one log that is meant.
    pub fn one(&self) -> anyhow::Result<Source> {
        let mut all = self.all()?;
        match (all.pop(), all.is_empty()) {
            (Some(source), true) => Ok(source),
            _ => {
                Err(Misuse("there are several logs; say which with --node or --folder".into())
                    .into())
            }
        }
    }

    fn is_named(&self) -> bool {
        self.folder.is_some() || self.node.is_some()
    }
}

fn folders(root: &Path) -> anyhow::Result<Vec<PathBuf>> {
    if !root.is_dir() {
        return Ok(Vec::new());
    }
    let cannot = || format!("cannot read {}", root.display());
    let entries = fs::read_dir(root).with_context(cannot)?;
    let mut folders = entries
        .map(|entry| Ok(entry.with_context(cannot)?.path()))
        .collect::<anyhow::Result<Vec<_>>>()?;
    folders.retain(|folder| folder.is_dir());
    folders.sort();
    Ok(folders)
}

/// A key, from itself or from a file.
pub fn read_key<const TYPE: u8>(text: &str) -> anyhow::Result<PublicKey<TYPE>> {
    if let Ok(key) = text.parse() {
        return Ok(key);
    }
    let unreadable =
        || Misuse(format!("{text:?} is neither a public key of this kind nor a file of one"));
    let file = fs::read_to_string(text).map_err(|_| unreadable())?;
    file.parse().map_err(|_| unreadable().into())
}
