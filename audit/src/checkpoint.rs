//! Checkpoints (c2sp.org/tlog-checkpoint): what a log says, under its signature, that it holds.

use std::fmt::Display;

use entente_proto::ids::NodeName;

use crate::cosign::{self, CosignerKey};
use crate::merkle::{self, Hash, Tree};
use crate::note::{self, Signer, Verifier};
use crate::{Error, base64};

const WHAT: &str = "checkpoint";

/// The origin of a coordinator's log, which is also its key's name.
pub fn origin(cluster: impl Display, coordinator: &NodeName) -> String {
    format!("{cluster}/audit/{coordinator}")
}

/// A checkpoint whose signature was made or checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoint {
    /// The log.
    pub origin: String,
    /// What it holds.
    pub tree: Tree,
    /// The whole note, with all its signatures.
    pub note: String,
}

impl Checkpoint {
    /// Signs that the log of `signer`'s name holds `tree`.
    ///
    /// # Errors
    /// None, as the text of a checkpoint is always that of a note.
    pub fn sign(signer: &Signer, tree: Tree) -> Result<Self, Error> {
        let origin = signer.verifier().name().to_owned();
        let text = format!("{origin}\n{}\n{}\n", tree.size, base64::encode(&tree.root));
        Ok(Self { note: signer.sign(&text)?, origin, tree })
    }

    /// Reads a checkpoint that `verifier` vouches for, of the log of its name.
    ///
    /// # Errors
    /// It is malformed, of another log, or not signed by that key.
    pub fn open(note: &str, verifier: &Verifier) -> Result<Self, Error> {
        let text = note::open(note, verifier)?;
        let (origin, tree) = parse(text)?;
        if origin != verifier.name() {
            let reason = format!("it is of the log {origin}, not of {}", verifier.name());
            return Err(Error::note(WHAT, reason));
        }
        Ok(Self { origin, tree, note: note.to_owned() })
    }

    /// What is signed of it.
    ///
    /// # Errors
    /// None for one that was made or opened here.
    pub fn text(&self) -> Result<&str, Error> {
        note::split(&self.note).map(|(text, _)| text)
    }

    /// The same checkpoint with a line by which `key` cosigns it, instead of an earlier one of that
    /// key.
    ///
    /// # Errors
    /// The line is not that.
    pub fn with_cosignature(&self, line: &str, key: &CosignerKey) -> Result<Self, Error> {
        let (text, signatures) = note::split(&self.note)?;
        let others = signatures.split('\n').filter(|line| !key.has_signed(line));
        let others: String = others.map(|line| format!("{line}\n")).collect();
        let cosigned = Self { note: format!("{text}\n{others}{line}"), ..self.clone() };
        cosign::time_s(&cosigned.note, key)?;
        Ok(cosigned)
    }
}

/// Origin, size and root; further lines are extensions, which say nothing to us.
fn parse(text: &str) -> Result<(String, Tree), Error> {
    let malformed = |what: &str| Error::note(WHAT, format!("its {what} is malformed"));
    let mut lines = text.split('\n');
    let origin = lines.next().filter(|origin| !origin.is_empty());
    let origin = origin.ok_or_else(|| malformed("origin"))?.to_owned();
    let size_text = lines.next().unwrap_or_default();
    let size: u64 = size_text.parse().map_err(|_| malformed("size"))?;
    if size.to_string() != size_text {
        return Err(malformed("size"));
    }
    let root: Option<Hash> =
        lines.next().and_then(base64::decode).and_then(|root| root.try_into().ok());
    let root = root.ok_or_else(|| malformed("root"))?;
    if size == 0 && root != merkle::empty_root() {
        return Err(malformed("root"));
    }
    Ok((origin, Tree { size, root }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checkpoint_is_read_back_and_must_be_of_the_keys_own_log() {
        let signer = Signer::from_seed("example.org/log", [1; 32]).unwrap();
        let tree = Tree { size: 20_852_163, root: [9; 32] };
        let checkpoint = Checkpoint::sign(&signer, tree).unwrap();
        assert_eq!(Checkpoint::open(&checkpoint.note, signer.verifier()).unwrap(), checkpoint);
        let root = base64::encode(&tree.root);
        let bad = [
            format!("another.org/log\n5\n{root}\n"),
            format!("example.org/log\n05\n{root}\n"),
            format!("example.org/log\n-5\n{root}\n"),
            "example.org/log\n5\nAAAA\n".to_owned(),
            format!("example.org/log\n0\n{root}\n"),
            "example.org/log\n5\n".to_owned(),
        ];
        for text in bad {
            let note = signer.sign(&text).unwrap();
            assert!(Checkpoint::open(&note, signer.verifier()).is_err(), "{text:?}");
        }
        let extended = signer.sign(&format!("example.org/log\n5\n{root}\nmore\n")).unwrap();
        assert_eq!(Checkpoint::open(&extended, signer.verifier()).unwrap().tree.size, 5);
    }
}
