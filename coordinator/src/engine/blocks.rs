//! Hands out the blocks of the paged KV cache, and remembers what full ones hold.
//!
//! A block holds the keys and values of [`BLOCK_LEN`] consecutive positions of one sequence, in
//! every layer. A **full** block never changes again, and what it holds is a function of the tokens
//! up to its end. So it has a name, the hash of those tokens chained block by block, and a later
//! sequence that begins with the same tokens takes the block instead of computing it. That gives
//! the same bits: rows do not depend on company.
//!
//! Invariants:
//! - a block is either in use (by one or more sequences), kept for its name, or free; a kept block
//!   is given away, the longest unused first, only when no free one is left;
//! - a block that is not full has one user and no name;
//! - names are SHA-256 over everything that the contents depend on, the salt of the tenant
//!   included, so that nobody can guess or collide into another's cache.
//!
//! What it does not know: what tokens mean, who the sequences are.

use std::collections::BTreeMap;

use entente_model::kernels::BLOCK_LEN;
use sha2::{Digest, Sha256};

/// Names what a full block holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct BlockName([u8; 32]);

impl BlockName {
    /// Names the empty beginning of all sequences of one tenant.
    pub fn root(salt: &[u8]) -> Self {
        Self(Sha256::digest(salt).into())
    }

    /// Names the block of `tokens` that follows the one of this name.
    pub fn next(&self, tokens: &[u32]) -> Self {
        let mut hash = Sha256::new_with_prefix(self.0);
        for token in tokens {
            hash.update(token.to_le_bytes());
        }
        Self(hash.finalize().into())
    }
}

#[derive(Debug, Clone, Default)]
struct Block {
    users: u32,
    name: Option<BlockName>,
    /// When it was last given back; its key in `kept`.
    kept_since: u64,
}

/// See the module.
#[derive(Debug)]
pub struct Blocks {
    blocks: Vec<Block>,
    /// Nameless and unused. The most recently used first, since those are still in cache.
    free: Vec<u32>,
    /// Unused but named, by the time since when.
    kept: BTreeMap<u64, u32>,
    named: BTreeMap<BlockName, u32>,
    clock: u64,
}

impl Blocks {
    /// All of `total` blocks free.
    pub fn new(total: usize) -> Self {
        let last = u32::try_from(total).expect("block numbers are 32 bits; the config bounds them");
        Self {
            blocks: vec![Block::default(); total],
            free: (0..last).rev().collect(),
            kept: BTreeMap::new(),
            named: BTreeMap::new(),
            clock: 0,
        }
    }

    /// Blocks that `positions` positions need.
    pub fn needed(positions: usize) -> usize {
        positions.div_ceil(BLOCK_LEN)
    }

    /// Blocks in all.
    pub fn total(&self) -> usize {
        self.blocks.len()
    }

    /// Blocks that some sequence uses.
    pub fn used(&self) -> usize {
        self.total() - self.free.len() - self.kept.len()
    }

    /// Makes `table` cover `positions` positions. Takes nothing when there is not enough.
    pub fn grow(&mut self, table: &mut Vec<u32>, positions: usize) -> bool {
        let missing = Self::needed(positions).saturating_sub(table.len());
        if missing > self.free.len() + self.kept.len() {
            return false;
        }
        for _ in 0..missing {
            table.extend(self.take_unused());
        }
        true
    }

    fn take_unused(&mut self) -> Option<u32> {
        let block = self.free.pop().or_else(|| {
            let (_, block) = self.kept.pop_first()?;
            let name = self.blocks[block as usize].name.take()?;
            self.named.remove(&name);
            Some(block)
        })?;
        self.blocks[block as usize].users = 1;
        Some(block)
    }

    /// The block that holds what `name` stands for, with one more user.
    pub fn reuse(&mut self, name: &BlockName) -> Option<u32> {
        let number = *self.named.get(name)?;
        let block = &mut self.blocks[number as usize];
        if block.users == 0 {
            self.kept.remove(&block.kept_since);
        }
        block.users += 1;
        Some(number)
    }

    /// Names a block that has become full. The first block of a name keeps it.
    pub fn name(&mut self, number: u32, name: BlockName) {
        self.named.entry(name).or_insert_with(|| {
            self.blocks[number as usize].name = Some(name);
            number
        });
    }

    /// Takes back what `table` has beyond `positions` positions.
    pub fn shrink(&mut self, table: &mut Vec<u32>, positions: usize) {
        let mut surplus = table.split_off(Self::needed(positions).min(table.len()));
        self.release(&mut surplus);
    }

    /// Takes back what one sequence used.
    pub fn release(&mut self, table: &mut Vec<u32>) {
        // From the end, so that the beginning of a sequence, which others share, is kept longest.
        for number in table.drain(..).rev() {
            let block = &mut self.blocks[number as usize];
            block.users -= 1;
            if block.users > 0 {
                continue;
            }
            if block.name.is_some() {
                self.clock += 1;
                block.kept_since = self.clock;
                self.kept.insert(self.clock, number);
            } else {
                self.free.push(number);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(count: u32) -> Vec<BlockName> {
        let mut name = BlockName::root(b"tenant");
        (0..count)
            .map(|i| {
                name = name.next(&[i]);
                name
            })
            .collect()
    }

    #[test]
    fn a_named_block_is_found_again_after_its_user_left() {
        let mut blocks = Blocks::new(4);
        let (mut table, names) = (Vec::new(), names(2));
        assert!(blocks.grow(&mut table, 2 * BLOCK_LEN));
        blocks.name(table[0], names[0]);
        let first = table[0];
        blocks.release(&mut table);
        assert_eq!(blocks.used(), 0);
        assert_eq!(blocks.reuse(&names[0]), Some(first));
        assert_eq!(blocks.reuse(&names[1]), None);
        assert_eq!(blocks.used(), 1);
    }

    #[test]
    fn the_longest_unused_name_is_given_up_first_and_only_in_need() {
        let mut blocks = Blocks::new(3);
        let names = names(3);
        let mut table = Vec::new();
        assert!(blocks.grow(&mut table, 3 * BLOCK_LEN));
        for (block, name) in table.iter().zip(&names) {
            blocks.name(*block, *name);
        }
        blocks.release(&mut table);
        // The end of the sequence was given back first, so it goes first.
        assert!(blocks.grow(&mut table, BLOCK_LEN));
        assert_eq!(blocks.reuse(&names[2]), None);
        assert!(blocks.reuse(&names[0]).is_some() && blocks.reuse(&names[1]).is_some());
        assert!(!blocks.grow(&mut Vec::new(), BLOCK_LEN), "a block in use was given away");
    }

    #[test]
    fn a_block_with_two_users_is_freed_by_the_second() {
        let mut blocks = Blocks::new(1);
        let name = names(1)[0];
        let (mut one, mut two) = (Vec::new(), Vec::new());
        assert!(blocks.grow(&mut one, BLOCK_LEN));
        blocks.name(one[0], name);
        two.extend(blocks.reuse(&name));
        blocks.release(&mut one);
        assert_eq!(blocks.used(), 1);
        blocks.release(&mut two);
        assert_eq!(blocks.used(), 0);
    }

    #[test]
    fn names_depend_on_the_salt_and_on_everything_before() {
        let (a, b) = (BlockName::root(b"a"), BlockName::root(b"b"));
        assert_ne!(a.next(&[1]), b.next(&[1]));
        assert_ne!(a.next(&[1]).next(&[2]), a.next(&[3]).next(&[2]));
        assert_eq!(a.next(&[1]).next(&[2]), a.next(&[1]).next(&[2]));
    }
}
