//! The tree as RFC 6962 defines it, straight from the records: slow and obvious, to test against.

use super::{Hash, Nodes, empty_root, leaf_hash, node_hash};
use crate::Error;

/// `MTH(D)`.
pub fn root(records: &[Vec<u8>]) -> Hash {
    match records {
        [] => empty_root(),
        [record] => leaf_hash(record),
        _ => {
            let mut k = 1;
            while k * 2 < records.len() {
                k *= 2;
            }
            node_hash(&root(&records[..k]), &root(&records[k..]))
        }
    }
}

/// Records in memory, every subtree computed anew.
pub struct Plain<'a>(pub &'a [Vec<u8>]);

impl Nodes for Plain<'_> {
    fn node(&self, level: u32, index: u64) -> Result<Hash, Error> {
        let (lo, len) = ((index << level) as usize, 1usize << level);
        Ok(root(&self.0[lo..lo + len]))
    }
}
