//! Attention over the paged cache: which rows go together, and who computes what.
//!
//! Rows of one sequence at consecutive positions of one block form a **tile**, which walks its keys
//! once for all its rows and all query heads of a key/value head. Keys are walked in **splits** of a
//! fixed length at absolute positions; what a row becomes is defined split by split in [`part`], so
//! it depends on neither the tile nor the thread. Where tiles are many, as in a prompt, a task takes
//! a tile and joins its splits as it goes; where they are few, as when one sequence decodes, a task
//! is one split of a tile (flash decoding, Dao et al. 2023), and the states are joined afterwards in
//! the same order. Blocks outside of the window are never read.

mod part;

use std::ops::Range;

use super::super::kv::{KvDtype, KvLayer};
use super::super::pool::Scatter;
use super::super::{AttentionRow, AttentionShape, BLOCK_LEN};
use super::Cpu;
use super::isa::{Isa, LANES};
use super::scratch::Buffer;
use part::{Bf16, F32, SPLIT_BLOCKS, SPLIT_LEN, STATE_HEAD, Split, Stored, Vector};

/// Multiplications below which waking a thread costs more than it brings.
const PARALLEL_MIN: usize = 1 << 16;

/// Tasks for each thread from which on splits of a tile need no tasks of their own.
const TASKS_PER_THREAD: usize = 4;

/// Most vectors of states that wait to be joined: 16 MiB.
const STATES_MAX: usize = 1 << 18;

/// See [`super::super::Kernels::attention`].
pub fn attention<I: Isa>(
    cpu: &Cpu<I>,
    shape: &AttentionShape,
    q: &[f32],
    rows: &[AttentionRow<'_>],
    cache: &KvLayer,
    out: &mut [f32],
) {
    let AttentionShape { heads, kv_heads, head_dim, .. } = *shape;
    assert!(cache.fits(shape) && heads % kv_heads == 0, "a cache of the same shape");
    assert_eq!(q.len(), rows.len() * heads * head_dim, "queries");
    assert_eq!(out.len(), q.len(), "results");
    let seen: usize = rows.iter().map(|row| row.position + 1).sum();
    let call = Call {
        cpu,
        shape,
        q,
        cache,
        tiles: tiles(shape, rows),
        parallel: seen * heads * head_dim >= PARALLEL_MIN,
        out: Scatter::new(out),
    };
    match cache.dtype() {
        KvDtype::F32 => call.run::<F32>(),
        KvDtype::Bf16 => call.run::<Bf16>(),
    }
}

/// Rows of one sequence at consecutive positions of one block.
struct Tile<'a> {
    /// The first row's place in the call.
    first: usize,
    /// The first row's position.
    position: usize,
    rows: usize,
    /// Blocks of the sequence.
    blocks: &'a [u32],
    /// Splits of which the rows see something.
    splits: Range<usize>,
}

fn tiles<'a>(shape: &AttentionShape, rows: &[AttentionRow<'a>]) -> Vec<Tile<'a>> {
    let mut first = 0;
    // Rows of one sequence bring the same table.
    let together = |a: &AttentionRow<'_>, b: &AttentionRow<'_>| {
        let same = std::ptr::eq(a.blocks, b.blocks) && b.position == a.position + 1;
        same && !b.position.is_multiple_of(BLOCK_LEN)
    };
    let tile = |rows: &[AttentionRow<'a>]| {
        let AttentionRow { blocks, position } = rows[0];
        let last = position + rows.len() - 1;
        let splits = seen_by(shape, position).start / SPLIT_LEN..last / SPLIT_LEN + 1;
        let tile = Tile { first, position, rows: rows.len(), blocks, splits };
        first += rows.len();
        tile
    };
    rows.chunk_by(together).map(tile).collect()
}

/// The positions that a row sees.
fn seen_by(shape: &AttentionShape, position: usize) -> Range<usize> {
    let end = position + 1;
    shape.window.map_or(0, |window| end.saturating_sub(window))..end
}

/// One call of the kernel.
struct Call<'a, I> {
    cpu: &'a Cpu<I>,
    shape: &'a AttentionShape,
    q: &'a [f32],
    cache: &'a KvLayer,
    tiles: Vec<Tile<'a>>,
    parallel: bool,
    out: Scatter<'a, f32>,
}

impl<I: Isa> Call<'_, I> {
    fn run<S: Stored>(&self) {
        let tasks = self.tiles.len() * self.shape.kv_heads;
        let states = |tile: &Tile<'_>| tile.splits.len() * tile.rows * self.row_vectors();
        let waiting: usize = self.tiles.iter().map(states).sum();
        let few = tasks < TASKS_PER_THREAD * self.cpu.pool.threads() && waiting <= STATES_MAX;
        let cuttable = self.tiles.iter().any(|tile| tile.splits.len() > 1);
        if self.parallel && few && cuttable && self.cpu.pool.threads() > 1 {
            self.by_splits::<S>(waiting);
        } else {
            // Neighbouring tasks read the same head's keys.
            self.cpu.run(self.parallel, tasks, |task| {
                let tile = &self.tiles[task % self.tiles.len()];
                self.whole::<S>(tile, task / self.tiles.len());
            });
        }
    }

    /// Vectors of one query's state.
    fn vectors(&self) -> usize {
        STATE_HEAD + 2 * self.cache.value_pairs()
    }

    /// Vectors of the states of all queries of a row.
    fn row_vectors(&self) -> usize {
        self.shape.heads * self.vectors()
    }

    /// Queries of a tile in one key/value head.
    fn queries(&self, tile: &Tile<'_>) -> usize {
        tile.rows * self.shape.heads / self.shape.kv_heads
    }

    /// One head of a tile, from the first split to the last.
    fn whole<S: Stored>(&self, tile: &Tile<'_>, head: usize) {
        let len = self.queries(tile) * self.vectors();
        let mut buffer = self.cpu.vectors.take(2 * len);
        let (states, next) = buffer.split_at_mut(len);
        let q = self.pack(tile, head);
        states.chunks_exact_mut(self.vectors()).for_each(part::clear);
        for split in tile.splits.clone() {
            self.part::<S>(tile, head, split, &q, next);
            self.join(tile, split, states, next);
        }
        self.finish(tile, head, states);
    }

    /// Splits as tasks of their own. `waiting` is the number of vectors of all states.
    fn by_splits<S: Stored>(&self, waiting: usize) {
        let kv_heads = self.shape.kv_heads;
        let (mut parts, mut starts, mut at) = (Vec::new(), Vec::new(), 0);
        for (t, tile) in self.tiles.iter().enumerate() {
            for head in 0..kv_heads {
                starts.push(at);
                for split in tile.splits.clone() {
                    parts.push((t, head, split, at));
                    at += self.queries(tile) * self.vectors();
                }
            }
        }
        debug_assert_eq!(at, waiting, "states of all splits");
        let mut states = self.cpu.vectors.take(waiting);
        let places = Scatter::new(&mut states);
        self.cpu.run(true, parts.len(), |i| {
            let (t, head, split, at) = parts[i];
            let tile = &self.tiles[t];
            // SAFETY: each split of a tile and head has a place of its own.
            let states = unsafe { places.slice(at, self.queries(tile) * self.vectors()) };
            self.part::<S>(tile, head, split, &self.pack(tile, head), states);
        });
        self.cpu.run(waiting >= PARALLEL_MIN, starts.len(), |i| {
            let (tile, head) = (&self.tiles[i / kv_heads], i % kv_heads);
            let len = self.queries(tile) * self.vectors();
            let mut joined = self.cpu.vectors.take(len);
            joined.chunks_exact_mut(self.vectors()).for_each(part::clear);
            for (n, split) in tile.splits.clone().enumerate() {
                // SAFETY: nobody else reads or writes this tile and head any more.
                let next = unsafe { places.slice(starts[i] + n * len, len) };
                self.join(tile, split, &mut joined, next);
            }
            self.finish(tile, head, &joined);
        });
    }

    /// The queries of one head of a tile, scaled, as [`part::part`] wants each group of them; the
    /// last vector may be longer than they are.
    fn pack(&self, tile: &Tile<'_>, head: usize) -> Buffer<'_, Vector> {
        let AttentionShape { heads, kv_heads, head_dim, scale, .. } = *self.shape;
        let (shared, queries) = (heads / kv_heads, self.queries(tile));
        let mut packed = self.cpu.vectors.take((queries * head_dim).div_ceil(LANES));
        for group in part::groups::<I>(queries) {
            let out = &mut packed.as_flattened_mut()[group.start * head_dim..group.end * head_dim];
            for (m, query) in group.clone().enumerate() {
                let (row, g) = (query / shared, query % shared);
                let at = ((tile.first + row) * heads + head * shared + g) * head_dim;
                let pairs = self.q[at..at + head_dim].as_chunks::<2>().0;
                let places = out.as_chunks_mut::<2>().0.iter_mut().skip(m).step_by(group.len());
                for (place, pair) in places.zip(pairs) {
                    *place = pair.map(|x| x * scale);
                }
            }
        }
        packed
    }

    /// What row `row` of a tile sees of a split, from the split's first position.
    fn seen(&self, tile: &Tile<'_>, row: usize, split: usize) -> Range<usize> {
        let seen = seen_by(self.shape, tile.position + row);
        let within = |p: usize| p.saturating_sub(split * SPLIT_LEN).min(SPLIT_LEN);
        within(seen.start)..within(seen.end)
    }

    /// States of all queries of one head of a tile after one split alone.
    fn part<S: Stored>(
        &self,
        tile: &Tile<'_>,
        head: usize,
        split: usize,
        q: &[Vector],
        states: &mut [Vector],
    ) {
        let (head_dim, vectors) = (self.shape.head_dim, self.vectors());
        let (shared, queries) = (self.shape.heads / self.shape.kv_heads, self.queries(tile));
        // The first row's window begins first, and the last row's end is the last.
        let skipped = self.seen(tile, 0, split).start / BLOCK_LEN;
        let end = self.seen(tile, tile.rows - 1, split).end.div_ceil(BLOCK_LEN);
        let blocks = &tile.blocks[split * SPLIT_BLOCKS..][skipped..end];
        let keys = Split { cache: self.cache, head, blocks };
        for group in part::groups::<I>(queries) {
            let q = &q.as_flattened()[group.start * head_dim..group.end * head_dim];
            let states = &mut states[group.start * vectors..group.end * vectors];
            let mut seen = [const { 0..0 }; part::GROUP_MAX];
            for (seen, query) in seen.iter_mut().zip(group.clone()) {
                let own = self.seen(tile, query / shared, split);
                let from_blocks = |p: usize| p.saturating_sub(skipped * BLOCK_LEN);
                *seen = from_blocks(own.start)..from_blocks(own.end);
            }
            part::part::<I, S>(self.cpu.isa, &keys, q, &seen[..group.len()], states);
        }
    }

    /// Joins the states of all queries with those of the next split, if they see something of it.
    fn join(&self, tile: &Tile<'_>, split: usize, states: &mut [Vector], next: &[Vector]) {
        let shared = self.shape.heads / self.shape.kv_heads;
        let states = states.chunks_exact_mut(self.vectors());
        for (i, (state, next)) in states.zip(next.chunks_exact(self.vectors())).enumerate() {
            if !self.seen(tile, i / shared, split).is_empty() {
                part::join(self.cpu.isa, state, next);
            }
        }
    }

    /// Writes the results of one head of a tile.
    fn finish(&self, tile: &Tile<'_>, head: usize, states: &[Vector]) {
        let AttentionShape { heads, kv_heads, head_dim, .. } = *self.shape;
        let shared = heads / kv_heads;
        for (i, state) in states.chunks_exact(self.vectors()).enumerate() {
            let at = ((tile.first + i / shared) * heads + head * shared + i % shared) * head_dim;
            // SAFETY: each row and head belongs to one tile, and this task has that tile and head.
            let out = unsafe { self.out.slice(at, head_dim) };
            part::finish(self.cpu.isa, state, out);
        }
    }
}
