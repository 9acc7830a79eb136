//! The Merkle tree of RFC 6962, section 2.1, with SHA-256: its root, and proofs that a record is in
//! it or that one tree is the beginning of another.
//!
//! The functions that make proofs are the RFC's recursive definitions over whatever knows the
//! hashes of complete subtrees ([`Nodes`]); those that check them take nothing but hashes. Neither
//! knows where a tree is kept.

use sha2::{Digest, Sha256};

use crate::Error;

#[cfg(test)]
pub(crate) mod reference;
#[cfg(test)]
mod tests;

/// A hash of the tree.
pub type Hash = [u8; 32];

/// Most hashes in a proof: the height of a tree of `u64::MAX` records, twice over for consistency.
pub const PROOF_LEN_MAX: usize = 130;

/// The hash of a record: prefixed, so that no record can be taken for an inner node.
pub fn leaf_hash(record: &[u8]) -> Hash {
    Sha256::new().chain_update([0x00]).chain_update(record).finalize().into()
}

/// The hash of an inner node.
pub fn node_hash(left: &Hash, right: &Hash) -> Hash {
    Sha256::new().chain_update([0x01]).chain_update(left).chain_update(right).finalize().into()
}

/// The root of a tree without records.
pub fn empty_root() -> Hash {
    Sha256::digest([]).into()
}

/// The root over the hashes of one level, of which there is at least one.
pub fn over(hashes: &[Hash]) -> Hash {
    match hashes {
        [hash] => *hash,
        _ => {
            let (left, right) = hashes.split_at(split(hashes.len() as u64) as usize);
            node_hash(&over(left), &over(right))
        }
    }
}

/// Knows the hashes of complete subtrees.
pub trait Nodes {
    /// The hash over the `2^level` records from `index × 2^level` on.
    fn node(&self, level: u32, index: u64) -> Result<Hash, Error>;
}

/// `MTH(D[lo:hi])`: the root over these records, of which there is at least one.
fn range(nodes: &impl Nodes, lo: u64, hi: u64) -> Result<Hash, Error> {
    let len = hi - lo;
    if len.is_power_of_two() && lo.is_multiple_of(len) {
        let level = len.trailing_zeros();
        return nodes.node(level, lo >> level);
    }
    let middle = lo + split(len);
    Ok(node_hash(&range(nodes, lo, middle)?, &range(nodes, middle, hi)?))
}

/// The largest power of two below `len`, which is at least 2.
fn split(len: u64) -> u64 {
    1 << (63 - (len - 1).leading_zeros())
}

/// The root of the tree of the first `size` records.
pub fn root(nodes: &impl Nodes, size: u64) -> Result<Hash, Error> {
    if size == 0 { Ok(empty_root()) } else { range(nodes, 0, size) }
}

/// `PATH(index, D[size])`: the hashes that lead from a record to the root, the lowest first.
pub fn inclusion(nodes: &impl Nodes, index: u64, size: u64) -> Result<Vec<Hash>, Error> {
    if index >= size {
        return Err(Error::NotInTree { size, what: format!("record {index}") });
    }
    let (mut path, mut lo, mut hi) = (Vec::new(), 0, size);
    while hi - lo > 1 {
        let middle = lo + split(hi - lo);
        if index < middle {
            path.push(range(nodes, middle, hi)?);
            hi = middle;
        } else {
            path.push(range(nodes, lo, middle)?);
            lo = middle;
        }
    }
    path.reverse();
    Ok(path)
}

/// `PROOF(old, D[size])`: the hashes that show the tree of `old` records to be the beginning of that
/// of `size`.
pub fn consistency(nodes: &impl Nodes, old: u64, size: u64) -> Result<Vec<Hash>, Error> {
    if old > size {
        return Err(Error::NotInTree { size, what: format!("beginning of {old} records") });
    }
    let (mut path, mut lo, mut hi) = (Vec::new(), 0, size);
    // Every tree begins with the empty one, and with itself.
    while old != 0 && old != hi {
        let middle = lo + split(hi - lo);
        if old <= middle {
            path.push(range(nodes, middle, hi)?);
            hi = middle;
        } else {
            path.push(range(nodes, lo, middle)?);
            lo = middle;
        }
    }
    if lo > 0 {
        path.push(range(nodes, lo, hi)?);
    }
    path.reverse();
    Ok(path)
}

/// Whether `path` leads from the record's hash at `index` to `root` (RFC 9162, section 2.1.3.2).
pub fn includes(path: &[Hash], index: u64, leaf: Hash, size: u64, root: &Hash) -> bool {
    if index >= size || path.len() > PROOF_LEN_MAX {
        return false;
    }
    let (mut at, mut last, mut hash) = (index, size - 1, leaf);
    for sibling in path {
        if last == 0 {
            return false;
        }
        if at & 1 == 1 || at == last {
            hash = node_hash(sibling, &hash);
            while at & 1 == 0 && at != 0 {
                (at, last) = (at >> 1, last >> 1);
            }
        } else {
            hash = node_hash(&hash, sibling);
        }
        (at, last) = (at >> 1, last >> 1);
    }
    last == 0 && hash == *root
}

/// A tree by its size and root.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tree {
    /// Records in it.
    pub size: u64,
    /// The hash over them.
    pub root: Hash,
}

/// Whether `path` shows that `old` is the beginning of `new` (RFC 9162, section 2.1.4.2).
pub fn extends(path: &[Hash], old: &Tree, new: &Tree) -> bool {
    if old.size > new.size || path.len() > PROOF_LEN_MAX {
        return false;
    }
    if old.size == new.size {
        return path.is_empty() && old.root == new.root;
    }
    if old.size == 0 {
        return path.is_empty() && old.root == empty_root();
    }
    // A complete subtree is its own proof.
    let whole = old.size.is_power_of_two().then_some(&old.root);
    let mut hashes = whole.into_iter().chain(path);
    let Some(first) = hashes.next() else { return false };
    let (mut at, mut last) = (old.size - 1, new.size - 1);
    while at & 1 == 1 {
        (at, last) = (at >> 1, last >> 1);
    }
    let (mut old_root, mut new_root) = (*first, *first);
    for sibling in hashes {
        if last == 0 {
            return false;
        }
        if at & 1 == 1 || at == last {
            (old_root, new_root) = (node_hash(sibling, &old_root), node_hash(sibling, &new_root));
            while at & 1 == 0 && at != 0 {
                (at, last) = (at >> 1, last >> 1);
            }
        } else {
            new_root = node_hash(&new_root, sibling);
        }
        (at, last) = (at >> 1, last >> 1);
    }
    last == 0 && old_root == old.root && new_root == new.root
}
