//! Attention on a device: like the reference, and the same bits however a prompt is cut and laid out.

use super::*;
use crate::kernels::cuda::{
    KvView, attention_partial_len, attention_run_len, attention_splits, check_attention,
};

/// A prompt and how its positions are laid out in a cache that it shares with others.
struct Prompt {
    shape: AttentionShape,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    blocks: Vec<u32>,
    cache_len: usize,
}

impl Prompt {
    fn new(rng: &mut Rng, shape: AttentionShape, len: usize) -> Self {
        let AttentionShape { heads, kv_heads, head_dim, .. } = shape;
        let cache_blocks = len.div_ceil(BLOCK_LEN) + 3;
        let mut blocks: Vec<u32> = (0..cache_blocks as u32).collect();
        rng.shuffle(&mut blocks);
        let q = rng.values(len * heads * head_dim);
        let [k, v] = [(); 2].map(|()| rng.values(len * kv_heads * head_dim));
        let cache_len = cache_blocks * kv_heads * BLOCK_LEN * head_dim;
        Self { shape, q, k, v, blocks, cache_len }
    }

    /// [`Prompt::run_together`], each row alone.
    fn run(&self, gpu: &Gpu, chunks: &[usize]) -> Vec<f32> {
        self.run_together(gpu, chunks, 1)
    }

    /// Prefill in chunks of the given lengths, on a cache that is full of what must not be looked at,
    /// so many rows at a time.
    fn run_together(&self, gpu: &Gpu, chunks: &[usize], together: usize) -> Vec<f32> {
        let AttentionShape { heads, kv_heads, head_dim, .. } = self.shape;
        let poison = vec![bf16::NAN.to_bits(); self.cache_len];
        let [mut keys, mut values] = [(); 2].map(|()| gpu.put(&poison));
        // Before the table of this sequence is that of another.
        let tables = gpu.put(&[&[u32::MAX; 3], &self.blocks[..]].concat());
        let (mut out, mut start) = (Vec::new(), 0);
        for len in chunks {
            let end = start + len;
            let slot = |p: usize| self.blocks[p / BLOCK_LEN] * 16 + (p % BLOCK_LEN) as u32;
            let slots = gpu.put(&(start..end).map(slot).collect::<Vec<_>>());
            let kv = start * kv_heads * head_dim..end * kv_heads * head_dim;
            let [k, v] = [&self.k, &self.v].map(|kv_all| gpu.put(&kv_all[kv.clone()]));
            let cache = [keys.view_mut(), values.view_mut()];
            let shape = [kv_heads, head_dim];
            gpu.stream.write_kv(cache, slots.view(), shape, k.view(), v.view()).unwrap();

            let run = |p: usize| [3, p as u32, (p - start) as u32, together.min(end - p) as u32];
            let runs = gpu.put(&(start..end).step_by(together).map(run).collect::<Vec<_>>());
            let q = gpu.put(&self.q[start * heads * head_dim..end * heads * head_dim]);
            let splits = attention_splits(end);
            let mut partial = gpu.unwritten(attention_partial_len(&self.shape, *len, splits));
            let mut y = gpu.unwritten(q.len());
            let (keys, values) = (keys.view(), values.view());
            let view = KvView { keys, values, tables: tables.view(), runs: runs.view() };
            let (partial, to) = (partial.view_mut(), y.view_mut());
            gpu.stream.attention(&self.shape, q.view(), &view, splits, partial, to).unwrap();
            out.extend(gpu.get(&y));
            start = end;
        }
        assert_eq!(out.len(), self.q.len());
        out
    }
}

fn shape(
    (heads, kv_heads, head_dim): (usize, usize, usize),
    window: Option<usize>,
) -> AttentionShape {
    AttentionShape { heads, kv_heads, head_dim, window, scale: (head_dim as f32).powf(-0.5) }
}

#[test]
fn attention_agrees_with_the_reference_and_looks_at_nothing_else() {
    let (gpu, mut rng) = (Gpu::new(), Rng::new(7));
    for heads in [(4, 2, 16), (3, 3, 32), (8, 1, 128), (6, 2, 24), (7, 1, 80)] {
        for window in [None, Some(1), Some(5), Some(16), Some(33)] {
            let prompt = Prompt::new(&mut rng, shape(heads, window), 40);
            let (k, v) = (rounded(&prompt.k), rounded(&prompt.v));
            let want = reference::attention(&prompt.shape, &prompt.q, &k, &v).unwrap();
            assert_close(&prompt.run(&gpu, &[40]), &want, 1e-5);
        }
    }
}

#[test]
fn attention_over_several_splits_agrees_with_the_reference_in_any_chunking() {
    let (gpu, mut rng) = (Gpu::new(), Rng::new(8));
    for window in [None, Some(300)] {
        let mut prompt = Prompt::new(&mut rng, shape((4, 1, 16), window), 600);
        // Scores that differ much, so that splits have very different maxima.
        prompt.q.iter_mut().for_each(|q| *q *= 20.0);
        let (k, v) = (rounded(&prompt.k), rounded(&prompt.v));
        let want = reference::attention(&prompt.shape, &prompt.q, &k, &v).unwrap();
        let whole = prompt.run(&gpu, &[600]);
        assert_close(&whole, &want, 1e-4);
        let chunks = [&[250, 6, 1, 100, 230][..], &[1; 13]].concat();
        assert_eq!(bits(&prompt.run(&gpu, &chunks)), bits(&whole), "{window:?}");
    }
}

#[test]
fn a_row_attends_the_same_in_any_run() {
    let (gpu, mut rng) = (Gpu::new(), Rng::new(9));
    // Runs of less than a tile of queries, of one, of several, and a row of several.
    for heads in [(4, 2, 16), (40, 2, 24)] {
        for window in [None, Some(20)] {
            let prompt = Prompt::new(&mut rng, shape(heads, window), 270);
            let chunks = [249, 21];
            let alone = bits(&prompt.run(&gpu, &chunks));
            for together in [2, attention_run_len(&prompt.shape), 13] {
                let have = bits(&prompt.run_together(&gpu, &chunks, together));
                assert!(have == alone, "{heads:?}, {window:?}, {together} rows at a time");
            }
        }
    }
}

#[test]
fn a_shape_without_kernels_is_told_and_not_tried() {
    assert_eq!(check_attention(&shape((8, 2, 128), None)), Ok(()));
    for heads in [(8, 3, 128), (4, 2, 6), (4, 2, 264)] {
        let told = check_attention(&shape(heads, None));
        assert!(matches!(told, Err(DeviceError::Unsupported(_))), "{heads:?}: {told:?}");
    }
}
