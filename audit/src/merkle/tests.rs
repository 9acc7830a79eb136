//! The tree beside the slow one that the RFC describes.

use super::reference::Plain;
use super::*;

fn records(len: usize) -> Vec<Vec<u8>> {
    (0..len).map(|number| format!("record {number}").into_bytes()).collect()
}

fn hex(hash: &Hash) -> String {
    hash.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn roots_are_those_of_the_rfcs_own_test_tree() {
    // The eight leaves of the test vectors of Certificate Transparency's reference implementation.
    let leaves: [&[u8]; 8] = [
        &[],
        &[0x00],
        &[0x10],
        &[0x20, 0x21],
        &[0x30, 0x31],
        &[0x40, 0x41, 0x42, 0x43],
        &[0x50, 0x51, 0x52, 0x53, 0x54, 0x55, 0x56, 0x57],
        &[
            0x60, 0x61, 0x62, 0x63, 0x64, 0x65, 0x66, 0x67, 0x68, 0x69, 0x6a, 0x6b, 0x6c, 0x6d,
            0x6e, 0x6f,
        ],
    ];
    let leaves: Vec<Vec<u8>> = leaves.iter().map(|leaf| leaf.to_vec()).collect();
    let empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
    assert_eq!(hex(&root(&Plain(&leaves), 0).unwrap()), empty);
    let one = "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d";
    assert_eq!(hex(&root(&Plain(&leaves), 1).unwrap()), one);
    let eight = "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328";
    assert_eq!(hex(&root(&Plain(&leaves), 8).unwrap()), eight);
}

#[test]
fn every_record_of_every_small_tree_is_proved_and_no_other_is() {
    let records = records(34);
    let nodes = Plain(&records);
    for size in 1..=records.len() {
        let root = reference::root(&records[..size]);
        for (index, record) in records.iter().enumerate().take(size) {
            let path = inclusion(&nodes, index as u64, size as u64).unwrap();
            let check = |at: usize, leaf: &[u8]| {
                includes(&path, at as u64, leaf_hash(leaf), size as u64, &root)
            };
            assert!(check(index, record), "{index} of {size}");
            assert!(!check(index, b"another"), "{index} of {size} proves another record");
            let other = (index + 1) % size;
            assert!(other == index || !check(other, record), "{index} of {size} moved");
            for at in 0..path.len() {
                let mut bad = path.clone();
                bad[at][5] ^= 1;
                let leaf = leaf_hash(record);
                assert!(!includes(&bad, index as u64, leaf, size as u64, &root));
            }
            let longer = [path.clone(), vec![root]].concat();
            let leaf = leaf_hash(record);
            assert!(!includes(&longer, index as u64, leaf, size as u64, &root));
        }
        assert!(inclusion(&nodes, size as u64, size as u64).is_err());
    }
}

#[test]
fn every_small_tree_is_shown_to_begin_every_larger_one_and_a_forked_one_is_not() {
    let records = records(34);
    let nodes = Plain(&records);
    let tree = |size: usize| Tree { size: size as u64, root: reference::root(&records[..size]) };
    for new in 0..=records.len() {
        for old in 0..=new {
            let path = consistency(&nodes, old as u64, new as u64).unwrap();
            let (old, new) = (tree(old), tree(new));
            assert!(extends(&path, &old, &new), "{} of {}", old.size, new.size);
            let forked = Tree { root: leaf_hash(b"fork"), ..old };
            assert!(!extends(&path, &forked, &new), "a fork at {} of {}", old.size, new.size);
            let forked = Tree { root: leaf_hash(b"fork"), ..new };
            assert!(old.size == 0 || !extends(&path, &old, &forked));
            for at in 0..path.len() {
                let mut bad = path.clone();
                bad[at][31] ^= 0x80;
                assert!(!extends(&bad, &old, &new));
            }
            if old.size < new.size {
                assert!(!extends(&path, &new, &old), "a tree never shrinks");
            }
        }
    }
}
