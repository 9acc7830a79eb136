//! Checkpoints of the coordinators' audit logs: what each log says that it holds, kept where no
//! coordinator alone can change it.
//!
//! A checkpoint is taken only if it goes on from the one before it of the same log: the same key has
//! signed it, it is not smaller, and a proof shows that the earlier tree is its beginning. So whoever
//! rewrites a log afterwards, with its key and on its disk, contradicts what the cluster remembers.
//! A new key begins a new log; what the old one last said stays.
//!
//! Pure: the same record on the same state is taken or refused alike by every voter.

use bytes::Bytes;
use entente_audit::checkpoint::Checkpoint;
use entente_audit::merkle::{self, Hash};
use entente_audit::note::Verifier;
use entente_proto::ids::NodeName;
use entente_proto::wire;
use prost::Message;

use crate::state::codec::Malformed;
use crate::state::{RecordKind, State};

/// A record of [`RecordKind::Checkpoint`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Committed {
    /// Who signs.
    pub key: Verifier,
    /// What it signed.
    pub checkpoint: Checkpoint,
    /// That the tree of the record before is its beginning; empty in the first.
    pub path: Vec<Hash>,
}

impl Committed {
    /// The record's key: the log, and which key signs it.
    pub fn record_key(coordinator: &NodeName, key: &Verifier) -> String {
        format!("{coordinator}/{}", key.id())
    }

    /// The record's value.
    pub fn encode(&self) -> Bytes {
        self.message().encode_to_vec().into()
    }

    /// As it is on the wire.
    pub fn message(&self) -> wire::CommittedCheckpoint {
        wire::CommittedCheckpoint {
            key: self.key.to_string(),
            note: self.checkpoint.note.clone(),
            path: self.path.concat().into(),
        }
    }

    /// Reads the record's value, and checks the signature.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let message = wire::CommittedCheckpoint::decode(bytes);
        Self::read(&message.map_err(|error| malformed(error.to_string()))?)
    }

    /// Reads what came from the wire, and checks the signature.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn read(message: &wire::CommittedCheckpoint) -> Result<Self, Malformed> {
        let key: Verifier =
            message.key.parse().map_err(|error| malformed(format!("its {error}")))?;
        let checkpoint = Checkpoint::open(&message.note, &key)
            .map_err(|error| malformed(format!("its {error}")))?;
        let (path, rest) = message.path.as_chunks::<32>();
        if !rest.is_empty() || path.len() > merkle::PROOF_LEN_MAX {
            return Err(Malformed::Unknown("the proof of the checkpoint"));
        }
        Ok(Self { key, checkpoint, path: path.to_vec() })
    }

    /// What the cluster has agreed on about this log, and the revision of the record.
    pub fn of(state: &State, record_key: &str) -> Option<Result<(Self, u64), Malformed>> {
        let record = state.record(RecordKind::Checkpoint, record_key)?;
        Some(Self::decode(&record.value).map(|committed| (committed, record.revision)))
    }
}

fn malformed(reason: String) -> Malformed {
    Malformed::Prost { what: "the checkpoint", reason }
}

/// Whether `value` may follow `before` as the record of this key.
///
/// # Errors
/// Why not, in words that name the log.
pub(crate) fn check(record_key: &str, before: Option<&[u8]>, value: &[u8]) -> Result<(), String> {
    let new = Committed::decode(value).map_err(|error| format!("{record_key}: {error}"))?;
    let refuse = |reason: &str| Err(format!("the checkpoint of {record_key}: {reason}"));
    let (_, name) = new.checkpoint.origin.rsplit_once('/').unwrap_or_default();
    if record_key != format!("{name}/{}", new.key.id()) {
        return refuse("it is of another log");
    }
    let Some(before) = before else { return Ok(()) };
    let old = Committed::decode(before).map_err(|error| format!("{record_key}: {error}"))?;
    let (old_tree, tree) = (&old.checkpoint.tree, &new.checkpoint.tree);
    if old.key != new.key {
        return refuse("another key has signed it");
    }
    if tree.size < old_tree.size {
        return refuse(&format!("it goes back from {} records to {}", old_tree.size, tree.size));
    }
    if !merkle::extends(&new.path, old_tree, tree) {
        let size = old_tree.size;
        return refuse(&format!("its first {size} records are not shown to be those committed"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use entente_audit::merkle::Tree;
    use entente_audit::note::Signer;
    use entente_audit::tile::Edges;

    use super::*;
    use crate::state::{Command, RefusedCode};

    fn signer(seed: u8) -> Signer {
        Signer::from_seed("local/audit/fr-coordinator", [seed; 32]).unwrap()
    }

    fn tree(records: &[u8]) -> Tree {
        let mut edges = Edges::default();
        records.iter().for_each(|record| drop(edges.push(merkle::leaf_hash(&[*record]))));
        edges.tree()
    }

    fn put(signer: &Signer, tree: Tree, path: Vec<Hash>) -> Command {
        let checkpoint = Checkpoint::sign(signer, tree).unwrap();
        let key = Committed::record_key(&"fr-coordinator".parse().unwrap(), signer.verifier());
        let value = Committed { key: signer.verifier().clone(), checkpoint, path }.encode();
        Command::PutRecord { kind: RecordKind::Checkpoint, key, value, revision: None }
    }

    #[test]
    fn a_checkpoint_must_go_on_from_the_one_before_it() {
        let mut state = State::genesis(Vec::new()).unwrap();
        let ours = signer(1);
        // Of two records the second is what leads from the tree of one to that of two.
        let step = vec![merkle::leaf_hash(&[2])];
        state.apply(put(&ours, tree(&[1]), Vec::new())).unwrap();
        state.apply(put(&ours, tree(&[1, 2]), step.clone())).unwrap();
        let mut refused = |command| {
            let refused = state.apply(command).unwrap_err();
            assert_eq!(refused.code, RefusedCode::NotAContinuation, "{refused}");
            refused.text
        };
        let back = refused(put(&ours, tree(&[1]), Vec::new()));
        assert!(back.contains("goes back from 2 records to 1"), "{back}");
        for forked in [put(&ours, tree(&[1, 3]), Vec::new()), put(&ours, tree(&[1, 2, 3]), step)] {
            assert!(refused(forked).contains("are not shown to be those committed"));
        }
        let Command::PutRecord { kind, key, value, .. } = put(&signer(2), tree(&[1]), Vec::new())
        else {
            unreachable!()
        };
        let stolen = key.replace(&signer(2).verifier().id(), &ours.verifier().id());
        let stolen = Command::PutRecord { kind, key: stolen, value: value.clone(), revision: None };
        assert!(refused(stolen).contains("another log"));
        assert!(state.apply(Command::PutRecord { kind, key, value, revision: None }).is_ok());
    }

    #[test]
    fn what_a_log_has_said_is_not_deleted() {
        let mut state = State::genesis(Vec::new()).unwrap();
        let ours = signer(1);
        state.apply(put(&ours, tree(&[1]), Vec::new())).unwrap();
        let key = Committed::record_key(&"fr-coordinator".parse().unwrap(), ours.verifier());
        let (committed, revision) = Committed::of(&state, &key).unwrap().unwrap();
        assert_eq!((committed.checkpoint.tree, revision), (tree(&[1]), 1));
        let delete = Command::DeleteRecord { kind: RecordKind::Checkpoint, key, revision: None };
        assert_eq!(state.apply(delete).unwrap_err().code, RefusedCode::NotAContinuation);
    }
}
