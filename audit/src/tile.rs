//! How a tree is cut into files: c2sp.org/tlog-tiles.
//!
//! A hash tile of level L holds up to 256 hashes, each over `256^L` records; a bundle holds up to
//! 256 records, each after its length. Full ones never change. Pure: names and bytes, no disk.

use std::sync::Arc;

use crate::Error;
use crate::merkle::{self, Hash, Nodes, Tree};

/// Hashes of a full tile, and records of a full bundle.
pub const WIDTH: u64 = 256;
/// Levels of the tree that one level of tiles spans.
pub const HEIGHT: u32 = 8;
/// Longest record in bytes: its length is written in 16 bits.
pub const RECORD_LEN_MAX: usize = u16::MAX as usize;
/// Longest bundle in bytes.
pub const BUNDLE_LEN_MAX: u64 = WIDTH * (2 + RECORD_LEN_MAX as u64);

/// What a file holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Hashes, each over `256^level` records.
    Hashes(u32),
    /// Records.
    Entries,
}

/// One file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Tile {
    /// What it holds.
    pub kind: Kind,
    /// Its number within its kind.
    pub index: u64,
    /// How many things it holds: 256 when it is full.
    pub width: u64,
}

impl Tile {
    /// A full one.
    pub fn full(kind: Kind, index: u64) -> Self {
        Self { kind, index, width: WIDTH }
    }

    /// The tiles and bundles that a tree of `size` records ends with and that are not full.
    pub fn partial(size: u64) -> Vec<Self> {
        let mut tiles = Vec::new();
        let mut count = size;
        for level in 0.. {
            let (index, width) = (count / WIDTH, count % WIDTH);
            if width > 0 {
                tiles.push(Self { kind: Kind::Hashes(level), index, width });
                if level == 0 {
                    tiles.push(Self { kind: Kind::Entries, index, width });
                }
            }
            count = index;
            if count == 0 {
                break;
            }
        }
        tiles
    }

    /// Its path within the log's folder.
    pub fn path(&self) -> String {
        let kind = match self.kind {
            Kind::Hashes(level) => level.to_string(),
            Kind::Entries => "entries".to_owned(),
        };
        let mut path = format!("{:03}", self.index % 1_000);
        let mut rest = self.index / 1_000;
        while rest > 0 {
            path = format!("x{:03}/{path}", rest % 1_000);
            rest /= 1_000;
        }
        let suffix = if self.width == WIDTH { String::new() } else { format!(".p/{}", self.width) };
        format!("tile/{kind}/{path}{suffix}")
    }

    /// Reads a path; only the one way to write it is taken.
    pub fn parse(path: &str) -> Option<Self> {
        let (kind, rest) = path.strip_prefix("tile/")?.split_once('/')?;
        let kind = match kind {
            "entries" => Kind::Entries,
            level => Kind::Hashes(level.parse().ok().filter(|level| *level < 64)?),
        };
        let (number, width) = match rest.split_once(".p/") {
            Some((number, width)) => (number, width.parse().ok()?),
            None => (rest, WIDTH),
        };
        let mut index = 0u64;
        for part in number.split('/') {
            let digits: u64 = part.strip_prefix('x').unwrap_or(part).parse().ok()?;
            index = index.checked_mul(1_000)?.checked_add(digits)?;
        }
        let tile = Self { kind, index, width };
        ((1..=WIDTH).contains(&width) && tile.path() == path).then_some(tile)
    }

    /// The first record that it is about.
    pub fn first_record(&self) -> u64 {
        let shift = match self.kind {
            Kind::Hashes(level) => HEIGHT * (level + 1),
            Kind::Entries => HEIGHT,
        };
        self.index.checked_shl(shift).unwrap_or(u64::MAX)
    }
}

/// The hashes of a tree that are in no full tile yet: all that is needed to go on with it.
#[derive(Debug, Clone, Default)]
pub struct Edges {
    size: u64,
    levels: Vec<Vec<Hash>>,
}

impl Edges {
    /// Of a tree of `size` records whose last, partial tiles hold these hashes, the lowest first.
    pub fn of(size: u64, levels: Vec<Vec<Hash>>) -> Self {
        Self { size, levels }
    }

    /// Adds a record by its hash; gives the tiles that are full now, the lowest first.
    pub fn push(&mut self, leaf: Hash) -> Vec<(Tile, Vec<Hash>)> {
        let (mut full, mut hash) = (Vec::new(), leaf);
        self.size += 1;
        for level in 0.. {
            if self.levels.len() <= level {
                self.levels.push(Vec::new());
            }
            self.levels[level].push(hash);
            if (self.levels[level].len() as u64) < WIDTH {
                break;
            }
            let hashes = std::mem::take(&mut self.levels[level]);
            hash = merkle::over(&hashes);
            let index = (self.size >> (HEIGHT * (level as u32 + 1))) - 1;
            full.push((Tile::full(Kind::Hashes(level as u32), index), hashes));
        }
        full
    }

    /// Size and root.
    pub fn tree(&self) -> Tree {
        let mut rest = None;
        for level in &self.levels {
            // What is below a level hangs on as its last, incomplete subtree.
            let hashes: Vec<Hash> = level.iter().copied().chain(rest).collect();
            rest = (!hashes.is_empty()).then(|| merkle::over(&hashes));
        }
        Tree { size: self.size, root: rest.unwrap_or_else(merkle::empty_root) }
    }

    /// Records in it.
    pub fn tree_size(&self) -> u64 {
        self.size
    }

    /// The hashes of the tile at the end of a level, which may be none.
    pub fn level(&self, level: u32) -> &[Hash] {
        self.levels.get(level as usize).map_or(&[], Vec::as_slice)
    }
}

/// Whatever has the hash tiles of a tree.
pub trait Tiles {
    /// The hashes of tile `index` of `level`, as many as there are.
    fn hashes(&self, level: u32, index: u64) -> Result<Arc<Vec<Hash>>, Error>;
}

impl<T: Tiles> Nodes for T {
    fn node(&self, level: u32, index: u64) -> Result<Hash, Error> {
        let (tile_level, rest) = (level / HEIGHT, level % HEIGHT);
        let first = index << rest;
        let hashes = self.hashes(tile_level, first / WIDTH)?;
        let from = (first % WIDTH) as usize;
        let wanted = hashes.get(from..from + (1 << rest));
        wanted.map(merkle::over).ok_or_else(|| {
            let tile = Tile::full(Kind::Hashes(tile_level), first / WIDTH);
            Error::file(tile.path(), format!("it has {} hashes, too few", hashes.len()))
        })
    }
}

/// The bytes of a hash tile.
pub fn write_hashes(hashes: &[Hash]) -> Vec<u8> {
    hashes.concat()
}

/// The hashes of a tile; none if its length is not that of whole hashes.
pub fn read_hashes(bytes: &[u8]) -> Option<Vec<Hash>> {
    let (hashes, rest) = bytes.as_chunks::<32>();
    rest.is_empty().then(|| hashes.to_vec())
}

/// Appends a record to the bytes of a bundle.
///
/// # Errors
/// The record is too long.
pub fn push_record(bundle: &mut Vec<u8>, index: u64, record: &[u8]) -> Result<(), Error> {
    let len = u16::try_from(record.len()).map_err(|_| Error::Record {
        index,
        reason: format!("it has {} bytes, at most {RECORD_LEN_MAX}", record.len()),
    })?;
    bundle.extend(len.to_be_bytes());
    bundle.extend(record);
    Ok(())
}

/// The records at the beginning of a bundle, and how many bytes of it they are: fewer than all if
/// the last one is cut off.
pub fn read_records(bundle: &[u8]) -> (Vec<&[u8]>, usize) {
    let (mut records, mut at) = (Vec::new(), 0);
    while let Some(len) = bundle.get(at..at + 2) {
        let len = usize::from(u16::from_be_bytes([len[0], len[1]]));
        let Some(record) = bundle.get(at + 2..at + 2 + len) else { break };
        records.push(record);
        at += 2 + len;
    }
    (records, at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_those_of_the_specification_and_are_read_in_no_other_way() {
        let tile = |kind, index, width| Tile { kind, index, width };
        let cases = [
            (tile(Kind::Hashes(0), 1_234_067, 256), "tile/0/x001/x234/067"),
            (tile(Kind::Hashes(2), 0, 1), "tile/2/000.p/1"),
            (tile(Kind::Entries, 273, 112), "tile/entries/273.p/112"),
        ];
        for (tile, path) in cases {
            assert_eq!(tile.path(), path);
            assert_eq!(Tile::parse(path), Some(tile));
        }
        let bad = [
            "tile/0/67",
            "tile/00/067",
            "tile/0/x000/067",
            "tile/0/067.p/0",
            "tile/0/067.p/256",
            "tile/0/067.p/007",
            "tile/64/000",
            "tile/entries/",
            "tile/data/000",
            "000",
        ];
        for path in bad {
            assert_eq!(Tile::parse(path), None, "{path}");
        }
    }

    #[test]
    fn a_tree_of_70000_records_ends_with_the_tiles_that_the_specification_counts() {
        let paths: Vec<String> = Tile::partial(70_000).iter().map(Tile::path).collect();
        let wanted =
            ["tile/0/273.p/112", "tile/entries/273.p/112", "tile/1/001.p/17", "tile/2/000.p/1"];
        assert_eq!(paths, wanted);
        assert_eq!(
            Tile::partial(256).iter().map(Tile::path).collect::<Vec<_>>(),
            ["tile/1/000.p/1"]
        );
        assert!(Tile::partial(0).is_empty());
    }

    #[test]
    fn a_bundle_gives_back_its_records_and_says_where_a_torn_one_begins() {
        let mut bundle = Vec::new();
        for record in [b"one".as_slice(), b"", b"three"] {
            push_record(&mut bundle, 0, record).unwrap();
        }
        let (records, len) = read_records(&bundle);
        assert_eq!((records, len), (vec![b"one".as_slice(), b"", b"three"], bundle.len()));
        let (records, len) = read_records(&bundle[..bundle.len() - 1]);
        assert_eq!((records.len(), len), (2, 7));
        assert!(push_record(&mut bundle, 7, &vec![0; 65_536]).is_err());
    }
}
