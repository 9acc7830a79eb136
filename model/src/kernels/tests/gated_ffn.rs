//! The gated feed-forward of experts: like the reference, and the same bits in any company, in any
//! grouping, and as rows travel.

use super::*;

/// Weights of a feed-forward, as the kernels see them and as bytes.
struct Ffn {
    hidden: usize,
    inner: usize,
    weights: [Vec<f32>; 3],
}

impl Ffn {
    fn new(rng: &mut Rng, hidden: usize, inner: usize) -> Self {
        let weights = [(); 3].map(|()| rounded(&rng.values(hidden * inner)));
        Self { hidden, inner, weights }
    }

    fn pack(&self, kernels: &dyn Kernels) -> GatedFfn {
        let pack = |i: usize, out, inputs| {
            let bytes = bf16_bytes(&self.weights[i]);
            kernels.pack(source(&bytes, SourceDtype::Bf16, out, inputs)).unwrap()
        };
        GatedFfn {
            gate: pack(0, self.inner, self.hidden),
            up: pack(1, self.inner, self.hidden),
            down: pack(2, self.hidden, self.inner),
            activation: Activation::SwiGlu,
        }
    }
}

#[test]
fn gated_ffn_agrees_with_the_reference() {
    let mut rng = Rng::new(4);
    for (hidden, inner) in [(7, 33), (64, 112), (33, 7), (256, 96)] {
        let (ffn, x) = (Ffn::new(&mut rng, hidden, inner), rng.values(17 * hidden));
        let rows: Vec<(u32, u32)> = (0..17).map(|r| (r, r)).collect();
        for_every_class(&FORMATS, |format, [one, _]| {
            let packed = ffn.pack(one);
            let mut y = vec![f32::NAN; x.len()];
            one.gated_ffn(&x, &[FfnGroup { ffn: &packed, rows: &rows }], &mut y);
            let matrices = [&packed.gate, &packed.up, &packed.down].into_iter().zip(&ffn.weights);
            let weights: Vec<_> = matrices.map(|(m, w)| stored(format, m, w)).collect();
            // A value near the middle of two numbers may be rounded to the other one.
            let tolerance = match format {
                WeightFormat::F32 => 1e-5,
                WeightFormat::Bf16 | WeightFormat::Fp8 => 2e-3,
                WeightFormat::Q8 | WeightFormat::Q4 => 1e-2,
            };
            let x = seen(format, &x, hidden);
            let weights = [&weights[0][..], &weights[1], &weights[2]];
            let round = |values: Vec<f32>| seen(format, &values, inner);
            let want = reference::gated_ffn(&x, weights, hidden, round).unwrap();
            assert_close(&y, &want, tolerance);
        });
    }
}

#[test]
fn every_number_of_rows_to_512_gives_the_bits_of_a_row_alone() {
    let mut rng = Rng::new(6);
    let (hidden, inner) = (33, 16);
    let ffn = Ffn::new(&mut rng, hidden, inner);
    let x = rng.values(512 * hidden);
    for_every_class(&FORMATS, |_, both| {
        let packed = [ffn.pack(both[0])];
        let through_ffn = bits(&ffn_alone(both[0], &x, &packed, hidden)[0]);
        let mut through_gate = vec![0.0; 512 * inner];
        for (x, y) in x.chunks_exact(hidden).zip(through_gate.chunks_exact_mut(inner)) {
            both[0].matmul(x, &packed[0].gate, y);
        }
        let through_gate = bits(&through_gate);
        for (rows, kernels) in (1..=512).flat_map(|rows| both.map(|kernels| (rows, kernels))) {
            let list: Vec<(u32, u32)> = (0..rows as u32).map(|row| (row, row)).collect();
            let mut y = vec![f32::NAN; rows * hidden];
            kernels.gated_ffn(&x, &[FfnGroup { ffn: &packed[0], rows: &list }], &mut y);
            assert!(bits(&y) == through_ffn[..rows * hidden], "feed-forward, {rows} rows");
            let mut y = vec![f32::NAN; rows * inner];
            kernels.matmul(&x[..rows * hidden], &packed[0].gate, &mut y);
            assert!(bits(&y) == through_gate[..rows * inner], "matmul, {rows} rows");
        }
    });
}

/// The expected row of every (source row, expert), each computed alone.
fn ffn_alone(
    kernels: &dyn Kernels,
    x: &[f32],
    experts: &[GatedFfn],
    hidden: usize,
) -> Vec<Vec<f32>> {
    let alone = |ffn| {
        let mut all = Vec::with_capacity(x.len());
        for x in x.chunks_exact(hidden) {
            let mut y = vec![0.0; hidden];
            kernels.gated_ffn(x, &[FfnGroup { ffn, rows: &[(0, 0)] }], &mut y);
            all.extend(y);
        }
        all
    };
    experts.iter().map(alone).collect()
}

#[test]
fn gated_ffn_gives_each_row_the_same_bits_in_any_company_and_grouping() {
    let mut rng = Rng::new(5);
    let (hidden, inner, experts) = (64, 112, 3);
    let ffns = [(); 3].map(|()| Ffn::new(&mut rng, hidden, inner));
    let x = rng.values(300 * hidden);
    // The last two are more (row, expert) pairs than go through in one pass.
    let counts: Vec<usize> = row_counts().collect();
    let seeds: Vec<u64> = counts.iter().map(|_| rng.next()).collect();
    for_every_class(&FORMATS, |_, both| {
        let packed = ffns.each_ref().map(|ffn| ffn.pack(both[0]));
        let alone = ffn_alone(both[0], &x, &packed, hidden);
        for (rows, seed) in counts.iter().zip(&seeds) {
            let mut rng = Rng(*seed);
            // Every row goes through two experts; destinations in no particular order.
            let mut to: Vec<u32> = (0..2 * *rows as u32).collect();
            rng.shuffle(&mut to);
            let mut pairs: Vec<(usize, (u32, u32))> = (0..2 * rows)
                .map(|i| ((i / 2 + i % 2) % experts, ((i / 2) as u32, to[i])))
                .collect();
            rng.shuffle(&mut pairs);
            // Two groups an expert, cut anywhere.
            let cut = rng.below(pairs.len());
            let lists: Vec<(usize, Vec<(u32, u32)>)> = (0..2 * experts)
                .map(|g| {
                    let half = if g < experts { &pairs[..cut] } else { &pairs[cut..] };
                    let own = half.iter().filter(|(expert, _)| *expert == g % experts);
                    (g % experts, own.map(|(_, row)| *row).collect())
                })
                .collect();
            let groups: Vec<FfnGroup<'_>> =
                lists.iter().map(|(e, rows)| FfnGroup { ffn: &packed[*e], rows }).collect();
            for kernels in both {
                let mut y = vec![f32::NAN; 2 * rows * hidden];
                kernels.gated_ffn(&x, &groups, &mut y);
                for (expert, (from, to)) in &pairs {
                    let have = &y[*to as usize * hidden..][..hidden];
                    let want = &alone[*expert][*from as usize * hidden..][..hidden];
                    assert!(bits(have) == bits(want), "{rows} rows, seed {seed}");
                }
            }
        }
    });
}

#[test]
fn gated_ffn_leaves_other_rows_alone_and_refuses_to_write_one_twice() {
    let ffn = Ffn::new(&mut Rng::new(6), 8, 8);
    let kernels = select(WeightFormat::F32, 2).unwrap();
    let packed = ffn.pack(&*kernels);
    let mut y = vec![7.0; 3 * 8];
    kernels.gated_ffn(&[0.5; 8], &[FfnGroup { ffn: &packed, rows: &[(0, 1)] }], &mut y);
    assert_eq!([&y[..8], &y[16..]].concat(), [7.0; 16]);
    assert_ne!(y[8..16], [7.0; 8]);
    kernels.gated_ffn(&[0.5; 8], &[], &mut y);

    let twice = [(0, 1), (0, 1)];
    let groups = [FfnGroup { ffn: &packed, rows: &twice }];
    let refused = std::panic::AssertUnwindSafe(|| kernels.gated_ffn(&[0.5; 8], &groups, &mut y));
    assert!(std::panic::catch_unwind(refused).is_err());
}

#[test]
fn gated_ffn_of_encoded_rows_gives_the_bits_of_widening_computing_and_rounding() {
    let mut rng = Rng::new(11);
    for (hidden, inner) in [(7, 33), (96, 112)] {
        let (ffn, x) = (Ffn::new(&mut rng, hidden, inner), rng.values(40 * hidden));
        for_every_class(&FORMATS, |_, both| {
            let (packed, dtype) = (ffn.pack(both[0]), both[0].row_dtype());
            let (bytes, arrived) = travelled(dtype, &x);
            let encoded: Vec<&[u8]> = bytes.chunks(hidden * dtype.size()).collect();
            for rows in [1, 3, 14, 40] {
                // The first destination stays as it is.
                let pairs: Vec<(u32, u32)> = (0..rows).map(|r| (39 - r, r + 1)).collect();
                let groups = [FfnGroup { ffn: &packed, rows: &pairs }];
                let mut y = vec![0.0; (rows as usize + 1) * hidden];
                both[0].gated_ffn(&arrived, &groups, &mut y);
                let (want, _) = travelled(dtype, &y);
                for kernels in both {
                    let mut have = vec![0; want.len()];
                    kernels.gated_ffn_encoded(&encoded, &groups, &mut have).unwrap();
                    assert!(have == want, "{rows} rows of {hidden}");
                }
            }
        });
    }
}
