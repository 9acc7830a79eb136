//! A part of attention: a few queries over the positions of one split, and how parts are joined.
//!
//! What a query becomes is defined here, operation by operation, and by its own positions alone:
//! - a score is one chain of multiply-adds over the head's values, ascending;
//! - of each split, the greatest score, the weights `exp(score - greatest)`, their sum by lane
//!   (`position % 16`), and the weighted values, one chain over the positions, ascending;
//! - splits are joined in order of position, both sides scaled to the greater of their maxima
//!   (online softmax, Milakov and Gimelshein 2018; flash attention, Dao et al. 2022).
//!
//! How many queries go through together, and how many key blocks at a time, changes which
//! registers hold a chain and nothing else. Positions that a query may not see get the weight zero,
//! and their values are not added, not even times zero.

use std::array::{from_mut, from_ref};
use std::ops::Range;

use super::super::super::BLOCK_LEN;
use super::super::super::kv::KvLayer;
use super::super::super::memory::Line;
use super::super::elementwise::exp;
use super::super::isa::{Isa, LANES, greatest, store_part, sum};

/// Blocks of a split. Part of the definition of a row's value: long enough that joining costs
/// little, short enough that a long context is work for many threads and that a split's keys and
/// values stay in the second-level cache.
pub const SPLIT_BLOCKS: usize = 16;
/// Positions of a split.
pub const SPLIT_LEN: usize = SPLIT_BLOCKS * BLOCK_LEN;

/// 16 lanes in memory.
pub type Vector = [f32; LANES];

/// Vectors of a query's state before its weighted values: the greatest score, in every lane, and
/// the sums of weights by lane.
pub const STATE_HEAD: usize = 2;

/// How pairs of vectors are kept in lines of a cache.
pub trait Stored {
    /// Lines of a pair.
    const LINES: usize;

    /// Reads the pair that begins with the first line.
    fn pair<I: Isa>(isa: I, lines: &[Line]) -> [I::V; 2];
}

/// Keys and values in f32.
pub struct F32;

/// Keys and values in bf16, widened exactly.
pub struct Bf16;

impl Stored for F32 {
    const LINES: usize = 2;

    #[inline(always)]
    fn pair<I: Isa>(isa: I, lines: &[Line]) -> [I::V; 2] {
        [isa.load_line(&lines[0]), isa.load_line(&lines[1])]
    }
}

impl Stored for Bf16 {
    const LINES: usize = 1;

    #[inline(always)]
    fn pair<I: Isa>(isa: I, lines: &[Line]) -> [I::V; 2] {
        isa.widen(&lines[0])
    }
}

/// The blocks of one split that some query of a call sees, in one head.
pub struct Split<'a> {
    /// Where they are.
    pub cache: &'a KvLayer,
    /// Key and value head.
    pub head: usize,
    /// At most [`SPLIT_BLOCKS`].
    pub blocks: &'a [u32],
}

/// Most queries of a group.
pub const GROUP_MAX: usize = 8;

/// Cuts queries into groups that go through a part together, as large as registers allow.
pub fn groups<I: Isa>(queries: usize) -> impl Iterator<Item = Range<usize>> {
    let most = if is_wide::<I>() { GROUP_MAX } else { 2 };
    let mut first = 0;
    std::iter::from_fn(move || {
        let left = (queries - first).min(most);
        let count = [GROUP_MAX, 4, 2, 1].into_iter().find(|count| *count <= left)?;
        first += count;
        Some(first - count..first)
    })
}

/// Whether there are 32 registers of 16 lanes, of which 16 can be chains, rather than 16 or less of
/// 8 or less.
#[inline(always)]
fn is_wide<I: Isa>() -> bool {
    I::TILE_ROWS >= 8
}

/// Writes the state of each query of a group after this split alone. `q` is
/// `[head_dim / 2][seen.len()][2]`, scaled; `seen` is what each query sees, in positions from the
/// first of `split.blocks`; the state of one that sees nothing is not to be used. `states` is `[seen.len()][STATE_HEAD + 2 * value_pairs]`.
pub fn part<I: Isa, S: Stored>(
    isa: I,
    split: &Split<'_>,
    q: &[f32],
    seen: &[Range<usize>],
    states: &mut [Vector],
) {
    match (is_wide::<I>(), seen.len()) {
        (true, 8) => part_of::<I, S, 8, 2>(isa, split, q, seen, states),
        (true, 4) => part_of::<I, S, 4, 4>(isa, split, q, seen, states),
        (true, 2) => part_of::<I, S, 2, 4>(isa, split, q, seen, states),
        (true, 1) => part_of::<I, S, 1, 4>(isa, split, q, seen, states),
        (false, 2) => part_of::<I, S, 2, 2>(isa, split, q, seen, states),
        (false, 1) => part_of::<I, S, 1, 2>(isa, split, q, seen, states),
        (_, queries) => unreachable!("nobody makes groups of {queries}"),
    }
}

/// `M` queries, `N` key blocks at a time.
fn part_of<I: Isa, S: Stored, const M: usize, const N: usize>(
    isa: I,
    split: &Split<'_>,
    q: &[f32],
    seen: &[Range<usize>],
    states: &mut [Vector],
) {
    let (q, pairs_of_queries) = q.as_chunks::<2>().0.as_chunks::<M>();
    assert!(pairs_of_queries.is_empty() && seen.len() == M, "queries of whole groups");
    let vectors = STATE_HEAD + 2 * split.cache.value_pairs();
    assert_eq!(states.len(), M * vectors, "a state for each query");
    isa.enter(
        #[inline(always)]
        || {
            let mut weights = [[[0.0; LANES]; M]; SPLIT_BLOCKS];
            let weights = &mut weights[..split.blocks.len()];
            score::<I, S, M, N>(isa, split, q, weights);
            for (m, state) in states.chunks_exact_mut(vectors).enumerate() {
                weigh(isa, &seen[m], weights, m, state);
            }
            // Between these positions every query sees everything.
            let start = seen.iter().fold(0_usize, |most, seen| most.max(seen.start));
            let end = seen.iter().fold(usize::MAX, |least, seen| least.min(seen.end)).max(start);
            for (m, seen) in seen.iter().enumerate() {
                let own = seen.start..seen.end.min(start);
                add_values::<I, S, M, 1, 2>(isa, split, weights, m, own, states);
            }
            if N > 2 {
                add_values::<I, S, M, M, 2>(isa, split, weights, 0, start..end, states);
            } else {
                add_values::<I, S, M, M, 1>(isa, split, weights, 0, start..end, states);
            }
            for (m, seen) in seen.iter().enumerate() {
                let own = seen.start.max(end)..seen.end;
                add_values::<I, S, M, 1, 2>(isa, split, weights, m, own, states);
            }
        },
    );
}

/// The products of all keys with each query.
#[inline(always)]
fn score<I: Isa, S: Stored, const M: usize, const N: usize>(
    isa: I,
    split: &Split<'_>,
    q: &[[[f32; 2]; M]],
    scores: &mut [[Vector; M]],
) {
    let (blocks, rest) = split.blocks.as_chunks::<N>();
    let (scores, scores_rest) = scores.as_chunks_mut::<N>();
    for (blocks, scores) in blocks.iter().zip(scores) {
        dot_keys::<I, S, M, N>(isa, split, blocks, q, scores);
    }
    for (block, scores) in rest.iter().zip(scores_rest) {
        dot_keys::<I, S, M, 1>(isa, split, from_ref(block), q, from_mut(scores));
    }
}

#[inline(always)]
fn dot_keys<I: Isa, S: Stored, const M: usize, const N: usize>(
    isa: I,
    split: &Split<'_>,
    blocks: &[u32; N],
    q: &[[[f32; 2]; M]],
    scores: &mut [[Vector; M]; N],
) {
    let mut keys: [&[Line]; N] = [&[]; N];
    for n in 0..N {
        keys[n] = &split.cache.keys(blocks[n], split.head)[..q.len() * S::LINES];
    }
    let mut sums = [[isa.splat(0.0); M]; N];
    for (i, q) in q.iter().enumerate() {
        let mut pairs = [[isa.splat(0.0); 2]; N];
        for n in 0..N {
            pairs[n] = S::pair(isa, &keys[n][i * S::LINES..][..S::LINES]);
        }
        for half in 0..2 {
            for m in 0..M {
                let x = isa.splat(q[m][half]);
                for n in 0..N {
                    sums[n][m] = isa.fma(pairs[n][half], x, sums[n][m]);
                }
            }
        }
    }
    for n in 0..N {
        for m in 0..M {
            isa.store(sums[n][m], &mut scores[n][m]);
        }
    }
}

/// Turns the scores of query `m` into weights, exactly zero for what it does not see, and begins
/// its state: maximum, sums, no values yet.
#[inline(always)]
fn weigh<I: Isa, const M: usize>(
    isa: I,
    seen: &Range<usize>,
    scores: &mut [[Vector; M]],
    m: usize,
    state: &mut [Vector],
) {
    let hidden = isa.splat(f32::NEG_INFINITY);
    let mut most = hidden;
    for (b, scores) in scores.iter_mut().enumerate() {
        let mut score = isa.load(&scores[m]);
        let lanes = lanes(seen, b);
        if lanes != (0..BLOCK_LEN) {
            score = isa.keep(lanes, score, hidden);
            isa.store(score, &mut scores[m]);
        }
        most = isa.max(most, score);
    }
    let most = isa.splat(greatest(isa, most));
    let mut sums = isa.splat(0.0);
    for scores in scores {
        let weight = exp(isa, isa.sub(isa.load(&scores[m]), most));
        sums = isa.add(sums, weight);
        isa.store(weight, &mut scores[m]);
    }
    isa.store(most, &mut state[0]);
    isa.store(sums, &mut state[1]);
    state[STATE_HEAD..].fill([0.0; LANES]);
}

/// The positions of block `b` that are in `range`, from the block's first.
#[inline(always)]
fn lanes(range: &Range<usize>, b: usize) -> Range<usize> {
    let lane = |position: usize| position.saturating_sub(b * BLOCK_LEN).min(BLOCK_LEN);
    lane(range.start)..lane(range.end)
}

/// Adds the weighted values at `range` to the states of queries `first..first + K`, up to `C` pairs
/// of vectors at a time.
#[inline(always)]
fn add_values<I: Isa, S: Stored, const M: usize, const K: usize, const C: usize>(
    isa: I,
    split: &Split<'_>,
    weights: &[[Vector; M]],
    first: usize,
    range: Range<usize>,
    states: &mut [Vector],
) {
    if range.is_empty() {
        return;
    }
    let pairs = split.cache.value_pairs();
    let vectors = STATE_HEAD + 2 * pairs;
    let states = &mut states[first * vectors..(first + K) * vectors];
    let mut pair = 0;
    while pair < pairs {
        if pairs - pair >= C {
            add_pairs::<I, S, M, K, C>(isa, split, weights, first, &range, pair, states);
            pair += C;
        } else {
            add_pairs::<I, S, M, K, 1>(isa, split, weights, first, &range, pair, states);
            pair += 1;
        }
    }
}

#[inline(always)]
fn add_pairs<I: Isa, S: Stored, const M: usize, const K: usize, const C: usize>(
    isa: I,
    split: &Split<'_>,
    weights: &[[Vector; M]],
    first: usize,
    range: &Range<usize>,
    pair: usize,
    states: &mut [Vector],
) {
    let pairs = split.cache.value_pairs();
    let vectors = STATE_HEAD + 2 * pairs;
    let at = |k: usize, c: usize, half: usize| k * vectors + STATE_HEAD + 2 * (pair + c) + half;
    let mut sums = [[[isa.splat(0.0); 2]; C]; K];
    for k in 0..K {
        for c in 0..C {
            sums[k][c] = [isa.load(&states[at(k, c, 0)]), isa.load(&states[at(k, c, 1)])];
        }
    }
    for b in range.start / BLOCK_LEN..range.end.div_ceil(BLOCK_LEN) {
        let values = split.cache.values(split.blocks[b], split.head);
        let weights = &weights[b][first..].as_chunks::<K>().0[0];
        for slot in lanes(range, b) {
            let lines = &values[(slot * pairs + pair) * S::LINES..][..C * S::LINES];
            for c in 0..C {
                let value = S::pair(isa, &lines[c * S::LINES..][..S::LINES]);
                for k in 0..K {
                    let weight = isa.splat(weights[k][slot]);
                    sums[k][c][0] = isa.fma(value[0], weight, sums[k][c][0]);
                    sums[k][c][1] = isa.fma(value[1], weight, sums[k][c][1]);
                }
            }
        }
    }
    for k in 0..K {
        for c in 0..C {
            isa.store(sums[k][c][0], &mut states[at(k, c, 0)]);
            isa.store(sums[k][c][1], &mut states[at(k, c, 1)]);
        }
    }
}

/// A state before any split: joined with one, it gives that one.
pub fn clear(state: &mut [Vector]) {
    state.fill([0.0; LANES]);
    state[0] = [f32::NEG_INFINITY; LANES];
}

/// Joins a query's state with that of its next split.
pub fn join<I: Isa>(isa: I, state: &mut [Vector], next: &[Vector]) {
    isa.enter(
        #[inline(always)]
        || {
            let (mine, theirs) = (isa.load(&state[0]), isa.load(&next[0]));
            let most = isa.max(mine, theirs);
            let (mine, theirs) = (exp(isa, isa.sub(mine, most)), exp(isa, isa.sub(theirs, most)));
            isa.store(most, &mut state[0]);
            for (state, next) in state[1..].iter_mut().zip(&next[1..]) {
                let scaled = isa.mul(isa.load(state), mine);
                isa.store(isa.fma(isa.load(next), theirs, scaled), state);
            }
        },
    );
}

/// The result of a query whose splits have all been joined: its weighted values over its sum.
pub fn finish<I: Isa>(isa: I, state: &[Vector], out: &mut [f32]) {
    isa.enter(
        #[inline(always)]
        || {
            let scale = isa.splat(1.0 / sum(isa, isa.load(&state[1])));
            for (values, out) in state[STATE_HEAD..].iter().zip(out.chunks_mut(LANES)) {
                store_part(isa, isa.mul(isa.load(values), scale), out);
            }
        },
    );
}
