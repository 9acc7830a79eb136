//! A witness: cosigns checkpoints of logs, each only once it was shown to go on from the one that it
//! cosigned before.
//!
//! A log is known by its origin alone, as c2sp.org/tlog-witness has it: a cosignature names no key,
//! so one given to a log that began anew under another key could be put beneath the old one's. Such
//! a log gets none until somebody removes its line here, which is to forget what it said.
//!
//! Invariants:
//! - no two checkpoints of an origin are cosigned that contradict each other, nor a smaller one after
//!   a larger, whatever becomes of the process in between: what is cosigned is durable before the
//!   cosignature is told, and a folder that has a key and no memory is not used;
//! - one process uses the folder.
//!
//! What it does not know: clocks, networks, who asks, and whether the log's own signature counts.

use std::collections::BTreeMap;
use std::fmt::{Display, Write};
use std::fs::File;
use std::path::{Path, PathBuf};

use entente_proto::ids::NodeName;

use crate::checkpoint::Checkpoint;
use crate::cosign::{Cosigner, CosignerKey};
use crate::files::{self, PRIVATE, read};
use crate::merkle::{self, Hash, Tree};
use crate::{Error, base64, keyfile};

/// What was cosigned last of each log: a line of size, root in base 64, and origin.
pub const LOGS: &str = "logs";
/// Most logs that a witness remembers.
pub const LOGS_MAX: usize = 4_096;
/// Longest file of them in bytes.
const LOGS_LEN_MAX: u64 = 2 << 20;

/// What the key of a cluster's witness is called.
pub fn key_name(cluster: impl Display, witness: &NodeName) -> String {
    format!("{cluster}/witness/{witness}")
}

/// What a witness says to a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// The line, with its end, to be put beneath it.
    Cosigned(String),
    /// The proof has to begin at this size, which it cosigned last.
    From(u64),
    /// It contradicts what was cosigned; in words.
    Refused(String),
}

/// A key and a memory.
pub struct Witness {
    root: PathBuf,
    key: Cosigner,
    logs: BTreeMap<String, Tree>,
    // Held, not used: the lock lives as long as the open file.
    _lock: File,
}

impl Witness {
    /// Takes over the folder of the witness `name`, or begins one.
    ///
    /// # Errors
    /// It is somebody else's or in use, or what was cosigned can no longer be told from it.
    pub fn open(root: &Path, name: &str) -> Result<Self, Error> {
        files::make_private(root)?;
        let lock = files::lock(root)?;
        let path = root.join(LOGS);
        let logs = match read(&path, LOGS_LEN_MAX)? {
            Some(bytes) => decode(&path, bytes)?,
            None if keyfile::exists(root)? => {
                let reason = "it is missing beside a key, so that what was cosigned with that key \
                              is not known; begin with a new folder and a new key";
                return Err(Error::file(path, reason));
            }
            None => {
                // Before the key, so that no key is ever without it.
                files::replace(&path, b"", PRIVATE)?;
                BTreeMap::new()
            }
        };
        let (root, key) = (root.to_owned(), keyfile::open(root, name)?);
        Ok(Self { root, key, logs, _lock: lock })
    }

    /// The public key.
    pub fn verifier(&self) -> &CosignerKey {
        self.key.verifier()
    }

    /// Cosigns `checkpoint`, the log's signature of which was checked, if `path` shows that the tree
    /// of `old` records, the one cosigned last, is its beginning. `time_s`: now, since 1970.
    ///
    /// # Errors
    /// The disk refused; nothing is cosigned.
    pub fn cosign(
        &mut self,
        checkpoint: &Checkpoint,
        old: u64,
        path: &[Hash],
        time_s: u64,
    ) -> Result<Answer, Error> {
        let (origin, tree) = (&checkpoint.origin, checkpoint.tree);
        let last = self.logs.get(origin).copied();
        if last.is_none() && self.logs.len() >= LOGS_MAX {
            return Ok(Answer::Refused(format!("{LOGS_MAX} other logs are remembered")));
        }
        let last = last.unwrap_or(Tree { size: 0, root: merkle::empty_root() });
        if let Err(answer) = judge(&last, old, path, &tree) {
            return Ok(answer);
        }
        if last != tree {
            let mut logs = self.logs.clone();
            logs.insert(origin.clone(), tree);
            files::replace(&self.root.join(LOGS), encode(&logs).as_bytes(), PRIVATE)?;
            self.logs = logs;
        }
        Ok(Answer::Cosigned(self.key.cosign(checkpoint.text()?, time_s)))
    }
}

/// Whether `new` goes on from `last`, as far as `path` from `old` on shows it.
fn judge(last: &Tree, old: u64, path: &[Hash], new: &Tree) -> Result<(), Answer> {
    let size = last.size;
    if new.size < size {
        let text = format!("it goes back from {size} records that were cosigned to {}", new.size);
        return Err(Answer::Refused(text));
    }
    let is_fork = new.size == size && new.root != last.root;
    if old != size && !is_fork {
        return Err(Answer::From(size));
    }
    if is_fork || !merkle::extends(path, last, new) {
        let text = format!("its first {size} records are not shown to be those cosigned");
        return Err(Answer::Refused(text));
    }
    Ok(())
}

fn encode(logs: &BTreeMap<String, Tree>) -> String {
    let mut text = String::new();
    for (origin, tree) in logs {
        // Writing to a string does not fail.
        let _ = writeln!(text, "{} {} {origin}", tree.size, base64::encode(&tree.root));
    }
    text
}

fn decode(path: &Path, bytes: Vec<u8>) -> Result<BTreeMap<String, Tree>, Error> {
    let malformed = || Error::file(path, "it is not what a witness has written");
    let text = String::from_utf8(bytes).map_err(|_| malformed())?;
    let line = |line: &str| {
        let (size, rest) = line.split_once(' ')?;
        let (root, origin) = rest.split_once(' ')?;
        let root = base64::decode(root)?.try_into().ok()?;
        Some((origin.to_owned(), Tree { size: size.parse().ok()?, root }))
    };
    let logs: Option<BTreeMap<String, Tree>> = text.lines().map(line).collect();
    // A file that was cut off, or mended by hand in another way, would be believed to say less.
    logs.filter(|logs| encode(logs) == text).ok_or_else(malformed)
}

#[cfg(test)]
mod tests;
