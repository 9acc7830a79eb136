//! A proof that one record is in a log, in one file that needs nothing else but the log's key:
//! c2sp.org/tlog-proof, version 1.

use crate::checkpoint::Checkpoint;
use crate::merkle::{self, Hash};
use crate::note::Verifier;
use crate::{Error, base64};

const WHAT: &str = "proof";
/// The first line of every proof.
pub(crate) const MAGIC: &str = "c2sp.org/tlog-proof@v1";

/// That a record is in a log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proof {
    /// What was put beside it, which nothing vouches for: here, the record itself.
    pub extra: Option<Vec<u8>>,
    /// The record's number in the log.
    pub index: u64,
    /// The hashes from its sibling up to the root's child.
    pub path: Vec<Hash>,
    /// The checkpoint, as it was signed.
    pub note: String,
}

impl Proof {
    /// The file.
    pub fn to_text(&self) -> String {
        let path: String =
            self.path.iter().map(|hash| format!("{}\n", base64::encode(hash))).collect();
        let extra = self.extra.as_ref().map(|extra| format!("extra {}\n", base64::encode(extra)));
        let extra = extra.unwrap_or_default();
        format!("{MAGIC}\n{extra}index {}\n{path}\n{}", self.index, self.note)
    }

    /// Reads a file.
    ///
    /// # Errors
    /// It is malformed. Whether it proves anything is for [`Self::check`].
    pub fn parse(text: &str) -> Result<Self, Error> {
        let malformed = |reason: &str| Error::note(WHAT, reason);
        let rest = text.strip_prefix(MAGIC).and_then(|rest| rest.strip_prefix('\n'));
        let rest = rest.ok_or_else(|| malformed("it does not begin as a proof does"))?;
        let (head, note) =
            rest.split_once("\n\n").ok_or_else(|| malformed("it has no checkpoint"))?;
        let mut lines = head.split('\n').peekable();
        let extra = lines.next_if(|line| line.starts_with("extra "));
        let extra = extra.map(|line| base64::decode(&line["extra ".len()..]));
        let extra = match extra {
            Some(None) => return Err(malformed("its extra data is malformed")),
            other => other.flatten(),
        };
        let number = lines.next().and_then(|line| line.strip_prefix("index ")).unwrap_or_default();
        let index: u64 = number.parse().map_err(|_| malformed("its index is malformed"))?;
        let hash = |line| base64::decode(line)?.try_into().ok();
        let path: Option<Vec<Hash>> = lines.take(merkle::PROOF_LEN_MAX + 1).map(hash).collect();
        let path = path.ok_or_else(|| malformed("one of its hashes is malformed"))?;
        if index.to_string() != number || path.len() > merkle::PROOF_LEN_MAX {
            return Err(malformed("its index is malformed, or it is too long"));
        }
        Ok(Self { extra, index, path, note: note.to_owned() })
    }

    /// Checks that `record` is in the log that `verifier` vouches for; gives the checkpoint.
    ///
    /// # Errors
    /// Which part of it does not hold.
    pub fn check(&self, record: &[u8], verifier: &Verifier) -> Result<Checkpoint, Error> {
        let checkpoint = Checkpoint::open(&self.note, verifier)?;
        let tree = &checkpoint.tree;
        let leaf = merkle::leaf_hash(record);
        if merkle::includes(&self.path, self.index, leaf, tree.size, &tree.root) {
            return Ok(checkpoint);
        }
        let reason = "its proof does not lead to the root of the checkpoint".to_owned();
        Err(Error::Record { index: self.index, reason })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::merkle::Tree;
    use crate::merkle::reference::{self, Plain};
    use crate::note::Signer;

    #[test]
    fn a_proof_survives_its_file_and_holds_for_its_record_only() {
        let signer = Signer::from_seed("example.org/log", [1; 32]).unwrap();
        let records: Vec<Vec<u8>> = (0..9).map(|n| vec![n; 3]).collect();
        let tree = Tree { size: 9, root: reference::root(&records) };
        let note = Checkpoint::sign(&signer, tree).unwrap().note;
        for index in 0..9 {
            let path = merkle::inclusion(&Plain(&records), index, 9).unwrap();
            let record = &records[index as usize];
            let bare = Proof { extra: None, index, path, note: note.clone() };
            let proof = Proof { extra: Some(record.clone()), ..bare.clone() };
            for proof in [&bare, &proof] {
                assert_eq!(Proof::parse(&proof.to_text()).unwrap(), *proof);
            }
            assert_eq!(proof.check(record, signer.verifier()).unwrap().tree, tree);
            assert!(proof.check(b"another", signer.verifier()).is_err());
        }
        for bad in ["", "c2sp.org/tlog-proof@v1\nindex 01\n\nx", "c2sp.org/tlog-proof@v2\n\n"] {
            assert!(Proof::parse(bad).is_err(), "{bad:?}");
        }
    }
}
