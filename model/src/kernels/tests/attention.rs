//! Attention over the paged cache: like the reference, and the same bits however a prompt is cut,
//! laid out in blocks, spread over threads and kept in memory.

use super::*;

/// A prompt and how its positions are laid out in a cache that it shares with others.
struct Prompt {
    shape: AttentionShape,
    dtype: KvDtype,
    len: usize,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    blocks: Vec<u32>,
    cache_blocks: usize,
}

impl Prompt {
    /// `len` positions in blocks that are scattered over a cache with others between them.
    fn new(rng: &mut Rng, shape: AttentionShape, dtype: KvDtype, len: usize) -> Self {
        let AttentionShape { heads, kv_heads, head_dim, .. } = shape;
        let cache_blocks = len.div_ceil(BLOCK_LEN) + 5;
        let mut blocks: Vec<u32> = (0..cache_blocks as u32).collect();
        rng.shuffle(&mut blocks);
        blocks.truncate(len.div_ceil(BLOCK_LEN));
        let q = rng.values(len * heads * head_dim);
        let [k, v] = [(); 2].map(|()| rng.values(len * kv_heads * head_dim));
        Self { shape, dtype, len, q, k, v, blocks, cache_blocks }
    }

    /// A cache in which every slot holds what attention must not look at.
    fn cache(&self, kernels: &dyn Kernels) -> KvLayer {
        let AttentionShape { kv_heads, head_dim, .. } = self.shape;
        let mut cache = KvLayer::new(kv_heads, head_dim, self.cache_blocks, self.dtype);
        let slots: Vec<usize> = (0..self.cache_blocks * BLOCK_LEN).collect();
        let poison = vec![f32::NAN; slots.len() * kv_heads * head_dim];
        kernels.write_kv(&mut cache, &slots, &poison, &poison);
        cache
    }

    /// The blocks as rows at `positions` may see them: others do not exist.
    fn visible_blocks(&self, positions: std::ops::Range<usize>) -> Vec<u32> {
        let seen = |window| (positions.start + 1).saturating_sub(window);
        let first = self.shape.window.map_or(0, seen);
        let visible = first / BLOCK_LEN..positions.end.div_ceil(BLOCK_LEN);
        let blocks = self.blocks.iter().enumerate();
        blocks.map(|(i, b)| if visible.contains(&i) { *b } else { u32::MAX }).collect()
    }

    /// Prefill in chunks of the given lengths.
    fn run(&self, kernels: &dyn Kernels, chunks: &[usize]) -> Vec<f32> {
        let AttentionShape { heads, kv_heads, head_dim, .. } = self.shape;
        let mut cache = self.cache(kernels);
        let mut out = vec![f32::NAN; self.q.len()];
        let mut start = 0;
        for len in chunks {
            let end = start + len;
            let slot = |p: usize| self.blocks[p / BLOCK_LEN] as usize * BLOCK_LEN + p % BLOCK_LEN;
            let slots: Vec<usize> = (start..end).map(slot).collect();
            let kv = start * kv_heads * head_dim..end * kv_heads * head_dim;
            kernels.write_kv(&mut cache, &slots, &self.k[kv.clone()], &self.v[kv]);
            let blocks = &self.visible_blocks(start..end);
            let rows: Vec<AttentionRow<'_>> =
                (start..end).map(|position| AttentionRow { blocks, position }).collect();
            let q = start * heads * head_dim..end * heads * head_dim;
            let out = &mut out[q.clone()];
            kernels.attention(&self.shape, &self.q[q], &rows, &cache, out);
            start = end;
        }
        assert_eq!(start, self.len);
        out
    }
}

fn attention_shape(
    (heads, kv_heads, head_dim): (usize, usize, usize),
    window: Option<usize>,
) -> AttentionShape {
    let scale = (head_dim as f32).powf(-0.5);
    AttentionShape { heads, kv_heads, head_dim, window, scale }
}

/// Every size of a group of heads, heads that are no whole registers, and windows that begin
/// within, at and beyond the borders of blocks and splits.
fn attention_shapes() -> Vec<AttentionShape> {
    let windows = [None, Some(1), Some(5), Some(16), Some(33), Some(257), Some(1000)];
    [(4, 2, 16), (3, 3, 32), (8, 1, 128), (6, 2, 24), (7, 1, 80), (2, 1, 6), (8, 2, 64)]
        .into_iter()
        .flat_map(|heads| windows.map(|window| attention_shape(heads, window)))
        .collect()
}

const KV_DTYPES: [KvDtype; 2] = [KvDtype::F32, KvDtype::Bf16];

#[test]
fn attention_agrees_with_the_reference_and_looks_at_nothing_else() {
    let mut rng = Rng::new(7);
    for shape in attention_shapes() {
        for dtype in KV_DTYPES {
            let prompt = Prompt::new(&mut rng, shape, dtype, 75);
            let [k, v] = [&prompt.k, &prompt.v].map(|kv| match dtype {
                KvDtype::F32 => kv.clone(),
                KvDtype::Bf16 => rounded(kv),
            });
            let want = reference::attention(&shape, &prompt.q, &k, &v).unwrap();
            for_every_class(&[WeightFormat::F32], |_, [one, _]| {
                assert_close(&prompt.run(one, &[75]), &want, 1e-5);
            });
        }
    }
}

#[test]
fn attention_over_several_splits_agrees_with_the_reference() {
    let mut rng = Rng::new(15);
    for window in [None, Some(300), Some(512)] {
        let shape = attention_shape((4, 1, 64), window);
        let mut prompt = Prompt::new(&mut rng, shape, KvDtype::F32, 800);
        // Scores that differ much, so that splits have very different maxima.
        prompt.q.iter_mut().for_each(|q| *q *= 20.0);
        let want = reference::attention(&shape, &prompt.q, &prompt.k, &prompt.v).unwrap();
        for_every_class(&[WeightFormat::F32], |_, [one, _]| {
            assert_close(&prompt.run(one, &[800]), &want, 1e-4);
        });
    }
}

#[test]
fn attention_gives_each_row_the_same_bits_in_any_chunking() {
    let mut rng = Rng::new(8);
    for (i, shape) in attention_shapes().into_iter().enumerate() {
        let prompt = Prompt::new(&mut rng, shape, KV_DTYPES[i % 2], 300);
        let mut chunkings = vec![vec![300], vec![1, 299], vec![1; 300], vec![16; 18], vec![64; 4]];
        chunkings[3].push(12);
        chunkings[4].push(44);
        let mut random = Vec::new();
        while random.iter().sum::<usize>() < 300 {
            random.push((1 + rng.below(64)).min(300 - random.iter().sum::<usize>()));
        }
        chunkings.push(random);
        for_every_class(&[WeightFormat::F32], |_, both| {
            let alone = bits(&prompt.run(both[0], &[1; 300]));
            for chunks in &chunkings {
                for kernels in both {
                    assert!(bits(&prompt.run(kernels, chunks)) == alone, "{shape:?} {chunks:?}");
                }
            }
        });
    }
}

#[test]
fn attention_over_several_splits_gives_the_same_bits_on_any_number_of_threads() {
    let mut rng = Rng::new(16);
    for window in [None, Some(300)] {
        for dtype in KV_DTYPES {
            let prompt = Prompt::new(&mut rng, attention_shape((8, 2, 64), window), dtype, 1100);
            for class in cpu::every_class(WeightFormat::F32) {
                println!("class {class}");
                // The last rows alone, as decoding does, and as the tail of a prompt.
                let chunks = [vec![1100], [&[1090][..], &[1; 10]].concat(), vec![600, 480, 20]];
                let want = bits(&prompt.run(&*select_class(&class, 1).unwrap(), &chunks[0]));
                for threads in [1, 2, 3, 7] {
                    let kernels = select_class(&class, threads).unwrap();
                    for chunks in &chunks {
                        let have = bits(&prompt.run(&*kernels, chunks));
                        assert!(have == want, "{window:?} {dtype:?} {threads} {chunks:?}");
                    }
                }
            }
        }
    }
}

#[test]
fn keys_and_values_that_bf16_can_hold_give_the_same_bits_in_both_dtypes() {
    let mut rng = Rng::new(17);
    for shape in attention_shapes() {
        let mut prompt = Prompt::new(&mut rng, shape, KvDtype::F32, 290);
        (prompt.k, prompt.v) = (rounded(&prompt.k), rounded(&prompt.v));
        for_every_class(&[WeightFormat::F32], |_, [one, _]| {
            prompt.dtype = KvDtype::F32;
            let want = bits(&prompt.run(one, &[290]));
            prompt.dtype = KvDtype::Bf16;
            assert!(bits(&prompt.run(one, &[290])) == want, "{shape:?}");
        });
    }
}

#[test]
fn a_cache_in_bf16_takes_half_of_what_one_in_f32_does() {
    let [wide, narrow] = KV_DTYPES.map(|dtype| KvLayer::block_bytes(4, 64, dtype));
    assert_eq!((wide, narrow), (4 * 64 * BLOCK_LEN * 2 * 4, wide / 2));
    let cache = KvLayer::new(4, 64, 1024, KvDtype::Bf16);
    assert_eq!(cache.bytes(), 1024 * narrow);
}

#[test]
fn attention_of_sequences_side_by_side_equals_each_alone() {
    let mut rng = Rng::new(9);
    let shape = AttentionShape { heads: 4, kv_heads: 2, head_dim: 16, window: None, scale: 0.25 };
    let [mut a, mut b] = [(); 2].map(|()| Prompt::new(&mut rng, shape, KvDtype::Bf16, 40));
    (a.blocks, b.blocks) = (vec![3, 0, 5], vec![1, 4, 2]);
    for_every_class(&FORMATS, |_, both| {
        let alone = [&a, &b].map(|p| bits(&p.run(both[0], &[40])[36 * 64..]));
        for kernels in both {
            let mut cache = a.cache(kernels);
            for p in [&a, &b] {
                let slot = |i: usize| p.blocks[i / BLOCK_LEN] as usize * BLOCK_LEN + i % BLOCK_LEN;
                let slots: Vec<usize> = (0..40).map(slot).collect();
                kernels.write_kv(&mut cache, &slots, &p.k, &p.v);
            }
            // Positions 36 to 39 of one after those of the other.
            let rows = [&b, &a].map(|p| {
                let row = |position| AttentionRow { blocks: &p.blocks, position };
                (36..40).map(row).collect::<Vec<_>>()
            });
            let q = [&b.q[36 * 64..], &a.q[36 * 64..]].concat();
            let mut out = vec![0.0; q.len()];
            kernels.attention(&shape, &q, &rows.concat(), &cache, &mut out);
            assert_eq!([bits(&out[4 * 64..]), bits(&out[..4 * 64])], alone);
        }
    });
}
