//! A witness and logs that try to have it cosign two histories.

use std::fs;

use super::*;
use crate::cosign;
use crate::merkle::reference::{self, Plain};
use crate::note::{self, Signer};

const NAME: &str = "local/witness/witness";
const NOW: u64 = 1_790_000_000;

fn signer() -> Signer {
    Signer::from_seed("local/audit/fr-coordinator", [7; 32]).unwrap()
}

/// A history of one byte a record.
fn history(bytes: &[u8]) -> Vec<Vec<u8>> {
    bytes.iter().map(|byte| vec![*byte]).collect()
}

fn checkpoint(records: &[Vec<u8>]) -> Checkpoint {
    let tree = Tree { size: records.len() as u64, root: reference::root(records) };
    Checkpoint::sign(&signer(), tree).unwrap()
}

/// Asks for a cosignature of all `records`, with the proof from the first `old` of them on.
fn ask(witness: &mut Witness, records: &[Vec<u8>], old: u64) -> Answer {
    let size = records.len() as u64;
    let path = merkle::consistency(&Plain(records), old.min(size), size).unwrap();
    witness.cosign(&checkpoint(records), old, &path, NOW).unwrap()
}

fn open(folder: &Path) -> Witness {
    Witness::open(folder, NAME).unwrap()
}

#[test]
fn a_log_that_grows_is_cosigned_at_each_size_and_the_lines_verify() {
    let dir = tempfile::tempdir().unwrap();
    let mut witness = open(dir.path());
    let key = witness.verifier().clone();
    let records = history(&[1, 2, 3, 4, 5, 6, 7]);
    for (old, new) in [(0, 1), (1, 4), (4, 4), (4, 7)] {
        let Answer::Cosigned(line) = ask(&mut witness, &records[..new], old) else {
            panic!("{old} to {new}")
        };
        let checkpoint = checkpoint(&records[..new]);
        let cosigned = checkpoint.with_cosignature(&line, &key).unwrap();
        assert_eq!(cosign::time_s(&cosigned.note, &key).unwrap(), NOW);
        let opened = Checkpoint::open(&cosigned.note, signer().verifier()).unwrap();
        assert_eq!(opened.tree, checkpoint.tree, "the log's own signature still stands");
        assert_eq!(cosigned.with_cosignature(&line, &key).unwrap(), cosigned, "one line a key");
    }
    assert_eq!(ask(&mut witness, &history(&[1, 2, 3, 4, 5, 6, 7, 8]), 4), Answer::From(7));
}

#[test]
fn a_fork_gets_no_second_cosignature_also_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let mut witness = open(dir.path());
    let ours = history(&[1, 2, 3, 4]);
    assert!(matches!(ask(&mut witness, &ours, 0), Answer::Cosigned(_)));
    let forks = [
        (history(&[1, 2, 3, 9]), "are not shown to be those cosigned"),
        (history(&[1, 2, 3, 9, 5, 6]), "are not shown to be those cosigned"),
        (history(&[1, 2, 3]), "goes back from 4 records"),
        (history(&[9]), "goes back from 4 records"),
    ];
    for restarted in [false, true] {
        if restarted {
            drop(witness);
            witness = open(dir.path());
        }
        for (fork, why) in &forks {
            let Answer::Refused(reason) = ask(&mut witness, fork, 4) else { panic!("{fork:?}") };
            assert!(reason.contains(why), "{reason}");
        }
        // Whoever claims an older beginning is asked for the proof from where it stands.
        assert_eq!(ask(&mut witness, &forks[1].0, 0), Answer::From(4));
        assert!(matches!(ask(&mut witness, &ours, 4), Answer::Cosigned(_)));
    }
    // The same origin under another key is the same log.
    let other = Signer::from_seed("local/audit/fr-coordinator", [8; 32]).unwrap();
    let tree = Tree { size: 1, root: reference::root(&history(&[9])) };
    let anew = Checkpoint::sign(&other, tree).unwrap();
    assert!(matches!(witness.cosign(&anew, 0, &[], NOW).unwrap(), Answer::Refused(_)));
}

#[test]
fn a_folder_that_does_not_tell_what_was_cosigned_is_not_used() {
    let dir = tempfile::tempdir().unwrap();
    let mut witness = open(dir.path());
    assert!(Witness::open(dir.path(), NAME).is_err(), "somebody else uses it");
    assert!(matches!(ask(&mut witness, &history(&[1, 2]), 0), Answer::Cosigned(_)));
    drop(witness);
    assert!(Witness::open(dir.path(), "local/witness/other").is_err());
    let path = dir.path().join(LOGS);
    let good = fs::read_to_string(&path).unwrap();
    for len in 1..good.len() {
        fs::write(&path, &good[..len]).unwrap();
        assert!(Witness::open(dir.path(), NAME).is_err(), "cut off at {len}");
    }
    fs::remove_file(&path).unwrap();
    let error = Witness::open(dir.path(), NAME).err().unwrap().to_string();
    assert!(error.contains("missing beside a key"), "{error}");
    fs::write(&path, &good).unwrap();
    assert_eq!(ask(&mut open(dir.path()), &history(&[1, 2, 3]), 0), Answer::From(2));
}

#[test]
fn a_cosignature_is_of_one_text_and_one_time_and_stands_for_no_other_kind() {
    let dir = tempfile::tempdir().unwrap();
    let mut witness = open(dir.path());
    let key = witness.verifier().clone();
    let records = history(&[1, 2, 3]);
    let Answer::Cosigned(line) = ask(&mut witness, &records, 0) else { panic!("refused") };
    let checkpoint = checkpoint(&records);
    let note = checkpoint.with_cosignature(&line, &key).unwrap().note;
    assert!(self::checkpoint(&history(&[1, 2])).with_cosignature(&line, &key).is_err());
    assert!(checkpoint.with_cosignature(&(line.clone() + "more\n"), &key).is_err());
    // Each byte of the line, the time's included, is vouched for.
    let at = note.len() - line.len();
    for at in at..note.len() {
        let mut bytes = note.clone().into_bytes();
        bytes[at] ^= 0x01;
        let Ok(bad) = String::from_utf8(bytes) else { continue };
        assert!(note::open(&bad, &key).is_err(), "byte {at} of {note:?}");
    }
    assert!(note::open(&checkpoint.note, &key).is_err(), "nobody has cosigned it");
    assert!(key.to_string().parse::<note::Verifier>().is_err(), "it is no log's key");
    assert!(signer().verifier().to_string().parse::<CosignerKey>().is_err());
}
