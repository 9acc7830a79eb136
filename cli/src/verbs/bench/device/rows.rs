//! What a coordinator does with each row between products. Small as these kernels are, few rows
//! take them as long as a launch takes.

use entente_model::kernels::cuda::{Buffer, Stream, ViewMut, row_pairs};
use entente_model::kernels::{BLOCK_LEN, DeviceError};

use super::machine::{Machine, REPEATS, median_us};
use super::shape::Trunk;
use super::{Line, Work};

/// `launch` over fresh rows of `len` values, for each of which it reads and writes `value_bytes`.
fn line(
    machine: &Machine,
    name: &'static str,
    [rows, len, value_bytes]: [usize; 3],
    mut launch: impl FnMut(&Stream, ViewMut<'_, f32>) -> Result<(), DeviceError>,
) -> anyhow::Result<Line> {
    let stream = &machine.stream;
    let us = median_us(|seed| {
        let mut x = machine.random(rows * len, seed, |v| v as f32)?;
        stream.time(REPEATS, |_| launch(stream, x.view_mut()))
    })?;
    let moved_bytes = (rows * len * value_bytes) as f64;
    let work = Work { moved_bytes, operations: None, cublas_flop_s: None };
    Ok(Line::new(name, len.to_string(), rows, us, &work, machine))
}

/// Rows of the residual stream: f32 in, bf16 or f32 out.
pub fn residual(machine: &Machine, trunk: Trunk, rows: usize) -> anyhow::Result<Vec<Line>> {
    let hidden = trunk.hidden;
    let weight = machine.random(hidden, 5, |v| v as f32)?;
    let delta = machine.random(rows * hidden, 6, |v| v as f32)?;
    let mut x16 = Buffer::<u32>::new(&machine.device, rows * row_pairs(hidden))?;
    let norm = line(machine, "rms_norm", [rows, hidden, 4 + 2], |stream, x| {
        stream.rms_norm(x.as_view(), weight.view(), 1e-5, None, Some(x16.view_mut()))
    })?;
    let round = line(machine, "round_rows", [rows, hidden, 4 + 2], |stream, x| {
        stream.round_rows(x.as_view(), hidden, x16.view_mut())
    })?;
    let add = line(machine, "add", [rows, hidden, 8 + 4], |stream, x| stream.add(x, delta.view()))?;
    Ok(vec![norm, round, add])
}

/// Queries, keys and values of each row.
pub fn heads(machine: &Machine, trunk: Trunk, rows: usize) -> anyhow::Result<Vec<Line>> {
    let Trunk { heads, kv_heads, head_dim, .. } = trunk;
    let angles = rows * (head_dim / 2);
    let cos = machine.random(angles, 7, |v| v as f32)?;
    let sin = machine.random(angles, 8, |v| v as f32)?;
    let rope = line(machine, "rope", [rows, trunk.q_len(), 4 + 4], |stream, x| {
        stream.rope(x, [heads, head_dim], cos.view(), sin.view())
    })?;

    let v = machine.random(rows * trunk.kv_len(), 9, |v| v as f32)?;
    let cache_len = rows.next_multiple_of(BLOCK_LEN) * trunk.kv_len();
    let mut keys = Buffer::<u16>::new(&machine.device, cache_len)?;
    let mut values = Buffer::<u16>::new(&machine.device, cache_len)?;
    let slots = machine.put(&(0..rows as u32).collect::<Vec<_>>())?;
    // A key and a value for each value of the rows.
    let write = line(machine, "write_kv", [rows, trunk.kv_len(), 2 * (4 + 2)], |stream, k| {
        let cache = [keys.view_mut(), values.view_mut()];
        stream.write_kv(cache, slots.view(), [kv_heads, head_dim], k.as_view(), v.view())
    })?;
    Ok(vec![rope, write])
}
