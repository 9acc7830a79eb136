//! Appending to a log, and what is left of it when the power fails.

use std::collections::BTreeSet;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use super::*;
use crate::merkle::reference;
use crate::note::Signer;
use crate::record::tests::request;

fn signer() -> Signer {
    Signer::from_seed("local/audit/fr-coordinator", [7; 32]).unwrap()
}

fn records(from: u64, to: u64) -> Vec<Vec<u8>> {
    let record = |number| Record::Request(Box::new(request(number, "fr"))).encode().unwrap();
    (from..to).map(record).collect()
}

fn open(root: &Path) -> Log {
    Log::open(root, signer().verifier()).unwrap().0
}

fn sign(log: &mut Log) -> Checkpoint {
    let checkpoint = Checkpoint::sign(&signer(), log.tree()).unwrap();
    log.publish(&checkpoint).unwrap();
    checkpoint
}

#[test]
fn a_log_on_disk_is_the_tree_of_the_definition_however_it_was_written_and_reopened() {
    let seed = 11;
    println!("seed {seed}");
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let dir = tempfile::tempdir().unwrap();
    let all = records(0, 900);
    let (mut log, mut at) = (open(dir.path()), 0);
    while at < all.len() {
        let to = (at + 1 + random.next_u32() as usize % 300).min(all.len());
        assert_eq!(log.append(&all[at..to]).unwrap(), at as u64);
        at = to;
        assert_eq!(log.tree(), Tree { size: at as u64, root: reference::root(&all[..at]) });
        if random.next_u32().is_multiple_of(2) {
            sign(&mut log);
        }
        if random.next_u32().is_multiple_of(2) {
            drop(log);
            log = open(dir.path());
            assert_eq!(log.tree().root, reference::root(&all[..at]), "after {at}");
        }
    }
    for index in [0, 255, 256, 511, 767, 768, 899] {
        assert_eq!(log.record(index).unwrap(), all[index as usize]);
        let path = merkle::inclusion(&log, index, 900).unwrap();
        let leaf = merkle::leaf_hash(&all[index as usize]);
        assert!(merkle::includes(&path, index, leaf, 900, &log.tree().root));
    }
    assert!(log.record(900).is_err());
    for old in [0, 1, 255, 256, 257, 700, 900] {
        let path = merkle::consistency(&log, old, 900).unwrap();
        let root = reference::root(&all[..old as usize]);
        assert!(merkle::extends(&path, &Tree { size: old, root }, &log.tree()), "{old}");
    }
}

#[test]
fn two_levels_of_tiles_give_the_same_proofs_as_the_definition() {
    // Small leaves: what is tested is the shape, not the records.
    let all: Vec<Vec<u8>> = (0..66_000u32).map(|number| number.to_le_bytes().to_vec()).collect();
    let mut edges = Edges::default();
    let mut full = BTreeSet::new();
    for record in &all {
        full.extend(edges.push(merkle::leaf_hash(record)).into_iter().map(|(tile, _)| tile));
    }
    assert_eq!(edges.tree().root, reference::root(&all));
    let level_1: Vec<u64> =
        full.iter().filter(|tile| tile.kind == Kind::Hashes(1)).map(|tile| tile.index).collect();
    assert_eq!((level_1, edges.level(2).len(), edges.level(1).len()), (vec![0], 1, 1));
}

#[test]
fn what_a_loss_of_power_tore_is_cut_off_wherever_it_tore() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = open(dir.path());
    log.append(&records(0, 3)).unwrap();
    sign(&mut log);
    let whole = fs::read(dir.path().join(OPEN)).unwrap();
    log.append(&records(3, 5)).unwrap();
    drop(log);
    let longer = fs::read(dir.path().join(OPEN)).unwrap();
    let per_record = (longer.len() - whole.len()) / 2;
    for len in (whole.len()..longer.len()).step_by(61) {
        fs::write(dir.path().join(OPEN), &longer[..len]).unwrap();
        let (log, torn) = Log::open(dir.path(), signer().verifier()).unwrap();
        let kept = (len - whole.len()) / per_record;
        assert_eq!(log.tree().root, reference::root(&records(0, 3 + kept as u64)), "{len}");
        assert_eq!(torn as usize, (len - whole.len()) % per_record);
    }
    // A page that never reached the disk reads as zeros.
    let mut holed = longer.clone();
    holed[whole.len() + 20..].fill(0);
    fs::write(dir.path().join(OPEN), &holed).unwrap();
    assert_eq!(open(dir.path()).tree().size, 3);
}

#[test]
fn a_log_that_lost_what_was_signed_or_leads_elsewhere_is_not_written_to() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = open(dir.path());
    log.append(&records(0, 300)).unwrap();
    sign(&mut log);
    drop(log);
    let path = dir.path().join(OPEN);
    let whole = fs::read(&path).unwrap();
    fs::write(&path, &whole[..whole.len() / 2]).unwrap();
    let error = Log::open(dir.path(), signer().verifier()).err().unwrap().to_string();
    assert!(error.contains("300 records were signed"), "{error}");
    let mut other = Vec::new();
    for record in records(1_000, 1_044) {
        tile::push_record(&mut other, 0, &record).unwrap();
    }
    fs::write(&path, &other).unwrap();
    let error = Log::open(dir.path(), signer().verifier()).err().unwrap().to_string();
    assert!(error.contains("do not lead to the root"), "{error}");
    fs::write(&path, &whole).unwrap();
    assert_eq!(open(dir.path()).tree().size, 300);
    let stranger = Signer::from_seed("local/audit/fr-coordinator", [9; 32]).unwrap();
    assert!(Log::open(dir.path(), stranger.verifier()).is_err(), "a key that signed nothing here");
}

#[test]
fn a_crash_between_the_last_tile_and_the_bundle_is_made_good() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = open(dir.path());
    log.append(&records(0, 256)).unwrap();
    drop(log);
    // As if the tile had been written and the rename had not happened.
    let bundle = dir.path().join(Tile::full(Kind::Entries, 0).path());
    fs::rename(&bundle, dir.path().join(OPEN)).unwrap();
    let mut log = open(dir.path());
    assert!(bundle.exists());
    assert_eq!(log.append(&records(256, 257)).unwrap(), 256);
    assert_eq!(log.tree().root, reference::root(&records(0, 257)));
}

#[test]
fn a_log_has_one_writer_and_a_checkpoint_never_goes_back() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = open(dir.path());
    let error = Log::open(dir.path(), signer().verifier()).err().unwrap().to_string();
    assert!(error.contains("another process"), "{error}");
    log.append(&records(0, 2)).unwrap();
    let old = sign(&mut log);
    log.append(&records(2, 3)).unwrap();
    let forked = Tree { size: 3, root: [1; 32] };
    assert!(log.publish(&Checkpoint::sign(&signer(), forked).unwrap()).is_err());
    sign(&mut log);
    assert!(log.publish(&old).is_err());
}
