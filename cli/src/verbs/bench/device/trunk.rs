//! The larger part of what a coordinator computes: products with matrices, and attention.

use entente_model::kernels::cuda::{
    Buffer, KvView, Loader, attention_partial_len, attention_run_len, attention_splits, row_pairs,
};
use entente_model::kernels::{
    BLOCK_LEN, DeviceError, Matrix, MatrixSource, SourceDtype, WeightFormat,
};
use half::bf16;

use super::machine::{Machine, REPEATS, copies, median_us};
use super::shape::{Shape, Trunk};
use super::{Line, Work};
use crate::random::Random;

/// Up to so many rows are taken for those of as many sequences, more for those of one prompt.
const SEQUENCES_MAX: usize = 64;

/// Whether so many rows are the last ones of one prompt of so many positions, or each the last one of
/// a sequence of its own; none of both for a prompt of fewer positions.
fn is_prompt(rows: usize, positions: usize) -> Option<bool> {
    let prompt = rows > SEQUENCES_MAX;
    (!prompt || positions >= rows).then_some(prompt)
}

/// A matrix and its name, as often as caches do not hold it.
struct Projection {
    name: &'static str,
    cold: Vec<Matrix>,
    /// Multiplied in f32, as gates are.
    exact: bool,
}

impl Projection {
    fn new(
        loader: &Loader,
        name: &'static str,
        [out_features, in_features]: [usize; 2],
        exact: bool,
    ) -> Result<Self, DeviceError> {
        let mut random = Random::new(2);
        let mut weight = || bf16::from_f64((random.uniform() - 0.5) * 0.04).to_le_bytes();
        let bytes: Vec<u8> = (0..out_features * in_features).flat_map(|_| weight()).collect();
        let dtype = SourceDtype::Bf16;
        let pack = || {
            let source =
                MatrixSource { out_features, in_features, dtype, bytes: &bytes, scales: None };
            if exact { loader.pack_exact(source) } else { loader.pack(source) }
        };
        let mut cold = vec![pack()?];
        for _ in 1..copies(cold[0].bytes()) {
            cold.push(pack()?);
        }
        Ok(Self { name, cold, exact })
    }

    fn line(&self, machine: &Machine, rows: usize) -> anyhow::Result<Line> {
        let [outputs, inputs] = [self.cold[0].out_features(), self.cold[0].in_features()];
        let stream = &machine.stream;
        let mut y = Buffer::<f32>::new(&machine.device, rows * outputs)?;
        let mut x16 = Buffer::<u32>::new(&machine.device, rows * row_pairs(inputs))?;
        let us = median_us(|seed| {
            let x = machine.random(rows * inputs, seed, |v| v as f32)?;
            stream.round_rows(x.view(), inputs, x16.view_mut())?;
            stream.time(REPEATS, |number| {
                let w = &self.cold[number % self.cold.len()];
                match self.exact {
                    true => stream.matmul_exact(w, x.view(), rows, y.view_mut()),
                    false => stream.matmul(w, x16.view(), rows, y.view_mut()),
                }
            })
        })?;
        let work = Work {
            moved_bytes: self.cold[0].bytes() as f64,
            operations: Some((2 * rows * inputs * outputs) as f64),
            cublas_flop_s: machine.cublas_flop_s(rows, inputs, outputs)?,
        };
        let shape = format!("{outputs}x{inputs}");
        Ok(Line::new(self.name, shape, rows, us, &work, machine))
    }
}

/// Products with the matrices of a layer and of the head, at each number of rows.
pub fn products(
    machine: &Machine,
    weights: WeightFormat,
    trunk: Trunk,
    shapes: &[Shape],
    rows: &[usize],
) -> anyhow::Result<Vec<Line>> {
    let loader = Loader::new(&machine.device, weights)?;
    let (hidden, q) = (trunk.hidden, trunk.q_len());
    let mut matrices = vec![
        ("matmul q", [q, hidden], false),
        ("matmul k", [trunk.kv_len(), hidden], false),
        ("matmul o", [hidden, q], false),
        ("matmul head", [trunk.vocab, hidden], false),
    ];
    matrices.extend(shapes.iter().map(|s| ("matmul gate", [s.experts, s.hidden], true)));
    let mut lines = Vec::new();
    for (name, sides, exact) in matrices {
        let projection = Projection::new(&loader, name, sides, exact)?;
        for &rows in rows {
            lines.push(projection.line(machine, rows)?);
        }
    }
    Ok(lines)
}

/// Attention of so many rows over so many positions: of one row of each of as many sequences, or of
/// the last rows of one prompt, if it is that long.
pub fn attention(
    machine: &Machine,
    trunk: Trunk,
    rows: usize,
    positions: usize,
) -> anyhow::Result<Option<Line>> {
    let Some(prompt) = is_prompt(rows, positions) else { return Ok(None) };
    let (shape, stream) = (trunk.attention(), &machine.stream);
    let sequences = if prompt { 1 } else { rows };
    let blocks = positions.div_ceil(BLOCK_LEN);
    let value = |v: f64| bf16::from_f64(v).to_bits();
    let cache_len = sequences * blocks * trunk.kv_len() * BLOCK_LEN;
    let [keys, values] =
        [machine.random(cache_len, 3, value)?, machine.random(cache_len, 4, value)?];
    let runs = match prompt {
        false => (0..rows).map(|r| [r * blocks, positions - 1, r, 1]).collect(),
        true => prompt_runs(rows, positions, attention_run_len(&shape)),
    };
    let runs: Vec<[u32; 4]> = runs.iter().map(|run| run.map(|n| n as u32)).collect();
    let runs = machine.put(&runs)?;
    let splits = attention_splits(positions);
    let mut partial = Buffer::new(&machine.device, attention_partial_len(&shape, rows, splits))?;
    let mut out = Buffer::new(&machine.device, rows * trunk.q_len())?;
    let us = median_us(|seed| {
        let q = machine.random(rows * trunk.q_len(), seed, |v| v as f32)?;
        let tables = machine.put(&shuffled(sequences * blocks, seed))?;
        let cache = KvView {
            keys: keys.view(),
            values: values.view(),
            tables: tables.view(),
            runs: runs.view(),
        };
        stream.time(REPEATS, |_| {
            let (partial, out) = (partial.view_mut(), out.view_mut());
            stream.attention(&shape, q.view(), &cache, splits, partial, out)
        })
    })?;
    // Keys that rows see, which for a prompt are one more for each row than for the row before.
    let seen = match prompt {
        false => rows * positions,
        true => rows * (positions - rows) + rows * (rows + 1) / 2,
    };
    let work = Work {
        moved_bytes: (sequences * positions * trunk.kv_len() * 4) as f64,
        operations: Some((4 * seen * trunk.q_len()) as f64),
        cublas_flop_s: None,
    };
    let Trunk { heads, kv_heads, head_dim, .. } = trunk;
    let whose = if prompt { "one prompt" } else { "sequences" };
    let shape = format!("{heads}x{kv_heads}x{head_dim}, {whose} of {positions}");
    Ok(Some(Line::new("attention", shape, rows, us, &work, machine)))
}

/// The last `rows` rows of one prompt, as many together as are computed so.
fn prompt_runs(rows: usize, positions: usize, run_len: usize) -> Vec<[usize; 4]> {
    let run = |r: usize| [0, positions - rows + r, r, run_len.min(rows - r)];
    (0..rows).step_by(run_len).map(run).collect()
}

/// Numbers of all blocks, in no order.
fn shuffled(blocks: usize, seed: u64) -> Vec<u32> {
    let mut random = Random::new(seed);
    let mut order: Vec<u32> = (0..blocks as u32).collect();
    (1..blocks).for_each(|i| order.swap(i, random.below(i + 1)));
    order
}
