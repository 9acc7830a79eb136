//! Attention over the paged cache.
//!
//! A task is one row and one key/value head with all query heads that share it. Two passes over
//! the visible blocks, in order of position: scores, 16 positions to a register, with their
//! maximum; then weights `exp(score - maximum)`, their sum, and the weighted values. What a
//! position is added to depends on the position alone (its lane is `position % 16`, values are
//! added position by position), so a row's result does not depend on which other rows are in the
//! call or how the prompt was split. Blocks outside the window are never read.

use std::ops::Range;

use super::super::kv::KvLayer;
use super::super::memory::Line;
use super::super::{AttentionRow, AttentionShape, BLOCK_LEN};
use super::Cpu;
use super::isa::{Isa, LANES, greatest, store_part, sum};

/// Multiplications below which waking a thread costs more than it brings.
const PARALLEL_MIN: usize = 1 << 16;

/// The keys that one row sees, in one head.
struct Visible<'a> {
    cache: &'a KvLayer,
    head: usize,
    blocks: &'a [u32],
    /// Visible positions.
    positions: Range<usize>,
}

impl<'a> Visible<'a> {
    fn new(
        shape: &AttentionShape,
        cache: &'a KvLayer,
        head: usize,
        row: &AttentionRow<'a>,
    ) -> Self {
        let end = row.position + 1;
        let start = shape.window.map_or(0, |window| end.saturating_sub(window));
        let blocks = &row.blocks[start / BLOCK_LEN..end.div_ceil(BLOCK_LEN)];
        Self { cache, head, blocks, positions: start..end }
    }

    /// The visible lanes of visible block `b`.
    fn lanes(&self, b: usize) -> Range<usize> {
        let first = (self.positions.start / BLOCK_LEN + b) * BLOCK_LEN;
        let start = self.positions.start.saturating_sub(first);
        start..(self.positions.end - first).min(BLOCK_LEN)
    }

    fn keys(&self, b: usize) -> &'a [Line] {
        self.cache.keys(self.blocks[b], self.head)
    }

    fn values(&self, b: usize) -> &'a [Line] {
        self.cache.values(self.blocks[b], self.head)
    }
}

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
    // The query heads of a key/value head follow one another.
    let group_len = heads / kv_heads * head_dim;
    let seen: usize = rows.iter().map(|row| row.position + 1).sum();
    let parallel = seen * heads * head_dim >= PARALLEL_MIN;
    cpu.for_chunks(parallel, out, group_len, |task, out| {
        let (row, kv_head) = (task / kv_heads, task % kv_heads);
        let visible = Visible::new(shape, cache, kv_head, &rows[row]);
        let q = &q[task * group_len..(task + 1) * group_len];
        attend_group(cpu, shape, &visible, q, out);
    });
}

/// All query heads of a group, up to four at a time, so that a key is read once for four.
fn attend_group<I: Isa>(
    cpu: &Cpu<I>,
    shape: &AttentionShape,
    visible: &Visible<'_>,
    mut q: &[f32],
    mut out: &mut [f32],
) {
    while !q.is_empty() {
        let heads = match q.len() / shape.head_dim {
            4.. => 4,
            2.. => 2,
            _ => 1,
        };
        let (q_now, q_later) = q.split_at(heads * shape.head_dim);
        let (out_now, out_later) = out.split_at_mut(q_now.len());
        let mut scores = cpu.scores.take(visible.blocks.len() * heads);
        match heads {
            4 => attend::<I, 4>(cpu.isa, shape, visible, q_now, &mut scores, out_now),
            2 => attend::<I, 2>(cpu.isa, shape, visible, q_now, &mut scores, out_now),
            _ => attend::<I, 1>(cpu.isa, shape, visible, q_now, &mut scores, out_now),
        }
        (q, out) = (q_later, out_later);
    }
}

/// `G` heads. `scores` has `G` entries for each visible block.
fn attend<I: Isa, const G: usize>(
    isa: I,
    shape: &AttentionShape,
    visible: &Visible<'_>,
    q: &[f32],
    scores: &mut [[f32; LANES]],
    out: &mut [f32],
) {
    let head_dim = shape.head_dim;
    isa.enter(
        #[inline(always)]
        || {
            let q: [&[f32]; G] = std::array::from_fn(|g| &q[g * head_dim..(g + 1) * head_dim]);
            let scores = scores.as_chunks_mut::<G>().0;
            let greatest = score::<I, G>(isa, shape.scale, visible, &q, scores);
            let scale = weigh::<I, G>(isa, greatest, scores);
            let value_lines = visible.cache.value_lines();
            let mut line = 0;
            while line < value_lines {
                // Four lines at a time keep the multipliers busy; the values are the same.
                if value_lines - line >= 4 {
                    combine::<I, G, 4>(isa, visible, scores, &scale, line, head_dim, out);
                    line += 4;
                } else {
                    combine::<I, G, 1>(isa, visible, scores, &scale, line, head_dim, out);
                    line += 1;
                }
            }
        },
    );
}

/// Writes the scores of all visible positions, minus infinity for the other lanes, and returns
/// each head's greatest.
#[inline(always)]
fn score<I: Isa, const G: usize>(
    isa: I,
    scale: f32,
    visible: &Visible<'_>,
    q: &[&[f32]; G],
    scores: &mut [[[f32; LANES]; G]],
) -> [f32; G] {
    let hidden = isa.splat(f32::NEG_INFINITY);
    let mut most = [hidden; G];
    for (b, scores) in scores.iter_mut().enumerate() {
        let dots = dot_keys(isa, visible.keys(b), q);
        for g in 0..G {
            let score = isa.mul(dots[g], isa.splat(scale));
            let score = isa.keep(visible.lanes(b), score, hidden);
            most[g] = isa.max(most[g], score);
            isa.store(score, &mut scores[g]);
        }
    }
    let mut greatest_of = [0.0; G];
    for g in 0..G {
        greatest_of[g] = greatest(isa, most[g]);
    }
    greatest_of
}

/// The 16 products of a block's keys with each head's query. Four chains a head, value `d` in
/// chain `d % 4`.
#[inline(always)]
fn dot_keys<I: Isa, const G: usize>(isa: I, keys: &[Line], q: &[&[f32]; G]) -> [I::V; G] {
    let mut chains = [[isa.splat(0.0); 4]; G];
    let (fours, rest) = keys.as_chunks::<4>();
    for (i, four) in fours.iter().enumerate() {
        for j in 0..4 {
            let key = isa.load_line(&four[j]);
            for g in 0..G {
                chains[g][j] = isa.fma(key, isa.splat(q[g][4 * i + j]), chains[g][j]);
            }
        }
    }
    for (j, line) in rest.iter().enumerate() {
        let key = isa.load_line(line);
        for g in 0..G {
            chains[g][j] = isa.fma(key, isa.splat(q[g][4 * fours.len() + j]), chains[g][j]);
        }
    }
    // A loop, not `map`: what std calls is compiled without the instructions of this context, and
    // every operation in it would become a call.
    let mut dots = [isa.splat(0.0); G];
    for g in 0..G {
        let [a, b, c, d] = chains[g];
        dots[g] = isa.add(isa.add(a, b), isa.add(c, d));
    }
    dots
}

/// Turns scores into weights `exp(score - greatest)`, which are exactly zero for lanes that are
/// not visible, and returns one over each head's sum.
#[inline(always)]
fn weigh<I: Isa, const G: usize>(
    isa: I,
    greatest: [f32; G],
    scores: &mut [[[f32; LANES]; G]],
) -> [f32; G] {
    let mut sums = [isa.splat(0.0); G];
    for scores in scores {
        for g in 0..G {
            let below = isa.sub(isa.load(&scores[g]), isa.splat(greatest[g]));
            let weight = super::elementwise::exp(isa, below);
            sums[g] = isa.add(sums[g], weight);
            isa.store(weight, &mut scores[g]);
        }
    }
    let mut scale = [0.0; G];
    for g in 0..G {
        scale[g] = 1.0 / sum(isa, sums[g]);
    }
    scale
}

/// Lines `line..line + C` of the weighted values of `G` heads.
#[inline(always)]
fn combine<I: Isa, const G: usize, const C: usize>(
    isa: I,
    visible: &Visible<'_>,
    weights: &[[[f32; LANES]; G]],
    scale: &[f32; G],
    line: usize,
    head_dim: usize,
    out: &mut [f32],
) {
    let value_lines = visible.cache.value_lines();
    let mut sums = [[isa.splat(0.0); C]; G];
    for (b, weights) in weights.iter().enumerate() {
        let values = visible.values(b);
        for slot in visible.lanes(b) {
            let values = &values[slot * value_lines + line..][..C];
            for c in 0..C {
                let value = isa.load_line(&values[c]);
                for g in 0..G {
                    sums[g][c] = isa.fma(value, isa.splat(weights[g][slot]), sums[g][c]);
                }
            }
        }
    }
    for g in 0..G {
        let head = &mut out[g * head_dim..(g + 1) * head_dim];
        for (c, out) in head.chunks_mut(LANES).skip(line).take(C).enumerate() {
            store_part(isa, isa.mul(sums[g][c], isa.splat(scale[g])), out);
        }
    }
}
