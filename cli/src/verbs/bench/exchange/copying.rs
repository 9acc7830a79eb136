//! Kernels of nodes whose experts give back what they get: what is left is the way there and back.

use std::sync::Arc;

use entente_model::kernels::{
    AttentionRow, AttentionShape, FfnGroup, Kernels, KvLayer, Matrix, MatrixSource, WeightFormat,
};
use entente_proto::frame::Dtype;
use entente_proto::ids::KernelClass;

use super::cluster::HIDDEN;

/// Kernels whose experts give back what they get.
pub struct Copying(pub Arc<dyn Kernels>);

impl Kernels for Copying {
    fn class(&self) -> &KernelClass {
        self.0.class()
    }

    fn format(&self) -> WeightFormat {
        self.0.format()
    }

    fn row_dtype(&self) -> Dtype {
        self.0.row_dtype()
    }

    fn pack(&self, source: MatrixSource<'_>) -> Matrix {
        self.0.pack(source)
    }

    fn pack_f32(&self, source: MatrixSource<'_>) -> Matrix {
        self.0.pack_f32(source)
    }

    fn matmul(&self, x: &[f32], w: &Matrix, y: &mut [f32]) {
        self.0.matmul(x, w, y);
    }

    fn gated_ffn(&self, x: &[f32], groups: &[FfnGroup<'_>], y: &mut [f32]) {
        for (from, to) in groups.iter().flat_map(|group| group.rows) {
            let (from, to) = (*from as usize * HIDDEN, *to as usize * HIDDEN);
            y[to..to + HIDDEN].copy_from_slice(&x[from..from + HIDDEN]);
        }
    }

    fn add(&self, x: &mut [f32], delta: &[f32]) {
        self.0.add(x, delta);
    }

    fn gated_ffn_encoded(&self, x: &[&[u8]], groups: &[FfnGroup<'_>], y: &mut [u8]) {
        let len = HIDDEN * self.row_dtype().size();
        for (from, to) in groups.iter().flat_map(|group| group.rows) {
            y[*to as usize * len..][..len].copy_from_slice(x[*from as usize]);
        }
    }

    fn add_weighted(&self, parts: &[(f32, &[u8])], y: &mut [f32]) {
        self.0.add_weighted(parts, y);
    }

    fn rms_norm(&self, x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
        self.0.rms_norm(x, weight, eps, y);
    }

    fn rope(&self, x: &mut [f32], heads: usize, head_dim: usize, cos: &[f32], sin: &[f32]) {
        self.0.rope(x, heads, head_dim, cos, sin);
    }

    fn write_kv(&self, cache: &mut KvLayer, slots: &[usize], k: &[f32], v: &[f32]) {
        self.0.write_kv(cache, slots, k, v);
    }

    fn attention(
        &self,
        shape: &AttentionShape,
        q: &[f32],
        rows: &[AttentionRow<'_>],
        cache: &KvLayer,
        out: &mut [f32],
    ) {
        self.0.attention(shape, q, rows, cache, out);
    }
}
