//! Somebody else's programs read what this one writes: notes, checkpoints, tiles and proofs are
//! checked by the crates `signed_note` and `tlog_tiles`, which share no code with this crate.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use data_encoding::BASE64;
use entente_audit::checkpoint::Checkpoint;
use entente_audit::log::Log;
use entente_audit::merkle;
use entente_audit::note::Signer;
use entente_audit::record::{Admin, Record};
use entente_audit::witness::{Answer, Witness};
use signed_note::{Note, StandardSigner, StandardVerifier, VerifierList};
use tlog_tiles::{
    Checkpoint as TheirCheckpoint, Hash, HashReader, Tile, TileHashReader, TileReader, tlog,
};

const ORIGIN: &str = "local/audit/fr-coordinator";

/// The static files of a log.
struct Site(PathBuf);

impl TileReader for Site {
    fn height(&self) -> u8 {
        8
    }

    fn read_tiles(&self, tiles: &[Tile]) -> Result<Vec<Vec<u8>>, tlog::Error> {
        let read = |tile: &Tile| {
            // Their paths name the height too, which tlog-tiles fixes at 8.
            let path = tile.path();
            let path = path.strip_prefix("tile/8/").map_or(path.clone(), |p| format!("tile/{p}"));
            let bytes = std::fs::read(self.0.join(&path));
            bytes.map_err(|error| tlog::Error::InvalidInput(format!("{path}: {error}")))
        };
        tiles.iter().map(read).collect()
    }

    fn save_tiles(&self, _: &[Tile], _: &[Vec<u8>]) {}
}

fn record(number: u64) -> Vec<u8> {
    let (caller, call) = ("spiffe://local/x".to_owned(), "/entente.v1.Admin/Drain".to_owned());
    Record::Admin(Admin { at_ms: number, caller, call, allowed: true, reason: None })
        .encode()
        .unwrap()
}

/// A log of `sizes.last()` records with a checkpoint at each size.
fn log(root: &Path, signer: &Signer, sizes: &[u64]) -> (Log, Vec<Checkpoint>) {
    let mut log = Log::open(root, signer.verifier()).unwrap().0;
    let mut checkpoints = Vec::new();
    for size in sizes {
        let more: Vec<Vec<u8>> = (log.tree().size..*size).map(record).collect();
        log.append(&more).unwrap();
        checkpoints.push(Checkpoint::sign(signer, log.tree()).unwrap());
        log.publish(checkpoints.last().unwrap()).unwrap();
    }
    (log, checkpoints)
}

fn theirs(note: &[u8], key: &str) -> TheirCheckpoint {
    let note = Note::from_bytes(note).unwrap();
    let verifier = StandardVerifier::new(key).unwrap();
    let (verified, _) = note.verify(&VerifierList::new(vec![Box::new(verifier)])).unwrap();
    assert_eq!(verified.len(), 1);
    TheirCheckpoint::from_bytes(note.text()).unwrap()
}

#[test]
fn a_checkpoint_and_the_tiles_on_disk_are_what_another_implementation_makes_of_the_records() {
    let dir = tempfile::tempdir().unwrap();
    let signer = Signer::generate(ORIGIN).unwrap();
    let (log, _) = log(dir.path(), &signer, &[3, 300, 1_000]);
    let note = std::fs::read(dir.path().join("checkpoint")).unwrap();
    let checkpoint = theirs(&note, &signer.verifier().to_string());
    assert_eq!((checkpoint.origin(), checkpoint.size()), (ORIGIN, 1_000));
    // Their reader checks every tile that it reads against the root of the checkpoint.
    let site = Site(dir.path().to_owned());
    let reader = TileHashReader::new(1_000, *checkpoint.hash(), &site);
    for index in [0, 255, 256, 700, 767, 768, 999] {
        let stored = reader.read_hashes(&[tlog::stored_hash_index(0, index)]).unwrap();
        assert_eq!(stored[0], tlog::record_hash(&record(index)), "record {index}");
        let ours: Vec<Hash> =
            merkle::inclusion(&log, index, 1_000).unwrap().into_iter().map(Hash).collect();
        tlog::check_record(&ours, 1_000, *checkpoint.hash(), index, stored[0]).unwrap();
        assert_eq!(ours, tlog::prove_record(1_000, index, &reader).unwrap(), "record {index}");
    }
}

#[test]
fn another_implementation_is_shown_that_a_later_checkpoint_goes_on_from_an_earlier_one() {
    let dir = tempfile::tempdir().unwrap();
    let signer = Signer::generate(ORIGIN).unwrap();
    let sizes = [1, 2, 77, 256, 400];
    let (log, checkpoints) = log(dir.path(), &signer, &sizes);
    let key = signer.verifier().to_string();
    for (at, old) in checkpoints.iter().enumerate() {
        for new in &checkpoints[at..] {
            let path = merkle::consistency(&log, old.tree.size, new.tree.size).unwrap();
            let path: Vec<Hash> = path.into_iter().map(Hash).collect();
            let (old, new) = (theirs(old.note.as_bytes(), &key), theirs(new.note.as_bytes(), &key));
            tlog::check_tree(&path, new.size(), *new.hash(), old.size(), *old.hash()).unwrap();
        }
    }
}

/// Checks cosignatures with nothing of this crate, as the text of c2sp.org/tlog-cosignature says:
/// `signed_note` knows notes and names of keys, but not this kind of signature.
struct TheirCosigner {
    name: String,
    id: u32,
    key: ed25519_dalek::VerifyingKey,
}

impl TheirCosigner {
    fn new(vkey: &str) -> Self {
        let mut parts = vkey.splitn(3, '+');
        let (name, id) = (parts.next().unwrap(), parts.next().unwrap());
        let typed = BASE64.decode(parts.next().unwrap().as_bytes()).unwrap();
        let key_id = signed_note::key_id(name, &typed);
        assert_eq!((typed[0], format!("{key_id:08x}").as_str()), (0x04, id));
        let key = ed25519_dalek::VerifyingKey::from_bytes(typed[1..].try_into().unwrap());
        Self { name: name.to_owned(), id: key_id, key: key.unwrap() }
    }
}

impl signed_note::Verifier for TheirCosigner {
    fn name(&self) -> &str {
        &self.name
    }

    fn key_id(&self) -> u32 {
        self.id
    }

    fn verify(&self, msg: &[u8], sig: &[u8]) -> bool {
        assert_eq!(sig.len(), 8 + 64);
        let time = u64::from_be_bytes(sig[..8].try_into().unwrap());
        let mut signed = format!("cosignature/v1\ntime {time}\n").into_bytes();
        signed.extend_from_slice(msg);
        let signature = ed25519_dalek::Signature::from_slice(&sig[8..]).unwrap();
        self.key.verify_strict(&signed, &signature).is_ok()
    }
}

#[test]
fn a_cosigned_checkpoint_on_disk_is_what_another_implementation_takes_for_one() {
    let dir = tempfile::tempdir().unwrap();
    let signer = Signer::generate(ORIGIN).unwrap();
    let (mut log, checkpoints) = log(&dir.path().join("log"), &signer, &[2, 300]);
    let mut witness = Witness::open(&dir.path().join("witness"), "local/witness/witness").unwrap();
    let key = witness.verifier().clone();
    let mut old = 0;
    for checkpoint in &checkpoints {
        let path = merkle::consistency(&log, old, checkpoint.tree.size).unwrap();
        let answer = witness.cosign(checkpoint, old, &path, 1_679_315_147).unwrap();
        let Answer::Cosigned(line) = answer else { panic!("{answer:?}") };
        log.show_cosigned(&checkpoint.with_cosignature(&line, &key).unwrap()).unwrap();
        old = checkpoint.tree.size;
    }
    let note = std::fs::read(dir.path().join("log/checkpoint")).unwrap();
    let log_key = StandardVerifier::new(&signer.verifier().to_string()).unwrap();
    let cosigner = TheirCosigner::new(&key.to_string());
    let all = VerifierList::new(vec![Box::new(log_key), Box::new(cosigner)]);
    let parsed = Note::from_bytes(&note).unwrap();
    let (verified, others) = parsed.verify(&all).unwrap();
    assert_eq!((verified.len(), others.len()), (2, 0));
    assert_eq!(TheirCheckpoint::from_bytes(parsed.text()).unwrap().size(), 300);
    // It is not a signature of the text alone.
    let bare = ed25519_dalek::Signature::from_slice(&verified[1].signature()[8..]).unwrap();
    let cosigner = TheirCosigner::new(&key.to_string());
    assert!(cosigner.key.verify_strict(parsed.text(), &bare).is_err());
}

#[test]
fn notes_and_keys_of_another_implementation_are_read_here() {
    let signer = Signer::generate(ORIGIN).unwrap();
    let theirs = StandardSigner::new(&signer.secret()).unwrap();
    let text = format!("{ORIGIN}\n7\n{}\n", "q".repeat(42) + "o=");
    let mut note = Note::new(text.as_bytes(), &[]).unwrap();
    note.add_sigs(&[&theirs]).unwrap();
    let note = String::from_utf8(note.to_bytes()).unwrap();
    assert_eq!(Checkpoint::open(&note, signer.verifier()).unwrap().tree.size, 7);
    assert_eq!(note, signer.sign(&text).unwrap(), "Ed25519 gives one signature");
}
