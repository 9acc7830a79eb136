//! Slow and obvious: the same operations on candle tensors in f32, written for reading.
//!
//! Every fast kernel is tested against these. They know nothing of packing, paging, threads or
//! batch invariance; attention takes the keys and values of one sequence as they are.

use candle_core::{D, Device, Result, Tensor};

use super::AttentionShape;

fn matrix(values: &[f32], columns: usize) -> Result<Tensor> {
    Tensor::from_slice(values, (values.len() / columns, columns), &Device::Cpu)
}

fn values(tensor: &Tensor) -> Result<Vec<f32>> {
    tensor.contiguous()?.flatten_all()?.to_vec1()
}

fn silu(x: &Tensor) -> Result<Tensor> {
    x / (x.neg()?.exp()? + 1.0)?
}

/// `x * w^T`: `x` is `[rows, in]`, `w` is `[out, in]`, the result `[rows, out]`.
///
/// # Errors
/// When the lengths do not fit, as for every function here.
pub fn matmul(x: &[f32], w: &[f32], in_features: usize) -> Result<Vec<f32>> {
    values(&matrix(x, in_features)?.matmul(&matrix(w, in_features)?.t()?)?)
}

/// `down(silu(gate(x)) * up(x))`: `gate` and `up` are `[inner, hidden]`, `down` is
/// `[hidden, inner]`, `x` and the result `[rows, hidden]`. `round` is applied to the intermediate
/// values, `[rows, inner]`, for formats that round them.
///
/// # Errors
/// When the lengths do not fit.
pub fn gated_ffn(
    x: &[f32],
    [gate, up, down]: [&[f32]; 3],
    hidden: usize,
    round: impl FnOnce(Vec<f32>) -> Vec<f32>,
) -> Result<Vec<f32>> {
    let inner = gate.len() / hidden;
    let x = matrix(x, hidden)?;
    let gate = x.matmul(&matrix(gate, hidden)?.t()?)?;
    let up = x.matmul(&matrix(up, hidden)?.t()?)?;
    let joined = round(values(&(silu(&gate)? * up)?)?);
    values(&matrix(&joined, inner)?.matmul(&matrix(down, inner)?.t()?)?)
}

/// `x / sqrt(mean(x^2) + eps) * weight`, row by row.
///
/// # Errors
/// When the lengths do not fit.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f64) -> Result<Vec<f32>> {
    let x = matrix(x, weight.len())?;
    let norm = (x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?;
    let weight = Tensor::new(weight, &Device::Cpu)?;
    values(&x.broadcast_div(&norm)?.broadcast_mul(&weight)?)
}

/// Half-split rotation of `[rows, heads, head_dim]`; `cos` and `sin` are `[rows, head_dim / 2]`.
///
/// # Errors
/// When the lengths do not fit.
pub fn rope(
    x: &[f32],
    heads: usize,
    head_dim: usize,
    cos: &[f32],
    sin: &[f32],
) -> Result<Vec<f32>> {
    let (rows, half) = (x.len() / (heads * head_dim), head_dim / 2);
    let x = Tensor::from_slice(x, (rows, heads, head_dim), &Device::Cpu)?;
    let cos = Tensor::from_slice(cos, (rows, 1, half), &Device::Cpu)?;
    let sin = Tensor::from_slice(sin, (rows, 1, half), &Device::Cpu)?;
    let (a, b) = (x.narrow(2, 0, half)?, x.narrow(2, half, half)?);
    let first = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
    let second = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
    values(&Tensor::cat(&[first, second], 2)?)
}

/// Causal attention of a whole sequence: `q` is `[positions, heads * head_dim]`, `k` and `v` are
/// `[positions, kv_heads * head_dim]`, the result is shaped like `q`.
///
/// # Errors
/// When the lengths do not fit.
pub fn attention(shape: &AttentionShape, q: &[f32], k: &[f32], v: &[f32]) -> Result<Vec<f32>> {
    let AttentionShape { heads, kv_heads, head_dim, window, scale } = *shape;
    let positions = q.len() / (heads * head_dim);
    let heads_first = |x: &[f32], heads: usize| {
        Tensor::from_slice(x, (positions, heads, head_dim), &Device::Cpu)?.transpose(0, 1)
    };
    // Each key/value head serves the query heads of its group, which follow one another.
    let repeat = |x: Tensor| {
        let grouped = (kv_heads, heads / kv_heads, positions, head_dim);
        x.unsqueeze(1)?.broadcast_as(grouped)?.reshape((heads, positions, head_dim))
    };
    let (k, v) = (repeat(heads_first(k, kv_heads)?)?, repeat(heads_first(v, kv_heads)?)?);
    let scores = heads_first(q, heads)?.contiguous()?.matmul(&k.t()?.contiguous()?)?;
    let visible = |i: usize, j: usize| j <= i && window.is_none_or(|window| i - j < window);
    let mask: Vec<f32> = (0..positions * positions)
        .map(|at| if visible(at / positions, at % positions) { 0.0 } else { f32::NEG_INFINITY })
        .collect();
    let scores = (scores * f64::from(scale))?.broadcast_add(&matrix(&mask, positions)?)?;
    let weights = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
    let weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?;
    values(&weights.matmul(&v.contiguous()?)?.transpose(0, 1)?)
}
