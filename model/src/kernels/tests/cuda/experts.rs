//! Experts on a device: like the reference, the same bits in any company, and nothing but the rows
//! that were asked for.

use super::*;
use crate::kernels::cuda;

for_each_format![
    experts_agree_with_the_reference,
    every_number_of_rows_to_512_gives_the_bits_of_a_row_alone,
    rows_have_the_same_bits_in_any_company_and_grouping_and_others_are_left_alone,
    as_many_rows_as_a_frame_may_have_go_through_in_several_passes,
    the_order_in_which_a_device_runs_threads_changes_no_bit,
    a_matrix_that_was_packed_before_is_the_one_that_is_packed_on_the_way,
    weights_in_a_form_without_kernels_are_refused,
];

/// An expert and its weights as they are multiplied.
struct Expert {
    ffn: GatedFfn,
    weights: [Vec<f32>; 3],
}

impl Expert {
    fn new(rng: &mut Rng, kernels: &dyn ExpertKernels, hidden: usize, inner: usize) -> Self {
        let mut pack = |shape| {
            let (packed, weights) = packed(kernels.format(), &rng.values(hidden * inner), shape);
            (kernels.place(packed).unwrap(), weights)
        };
        let [gate, up, down] = [[inner, hidden], [inner, hidden], [hidden, inner]].map(&mut pack);
        let weights = [gate.1, up.1, down.1];
        let (gate, up, down, activation) = (gate.0, up.0, down.0, Activation::SwiGlu);
        Self { ffn: GatedFfn { gate, up, down, activation }, weights }
    }

    fn reference(&self, x: &[f32], hidden: usize) -> Vec<f32> {
        let weights = self.weights.each_ref().map(Vec::as_slice);
        reference::gated_ffn(x, weights, hidden, |h| rounded(&h)).unwrap()
    }
}

fn kernels(format: WeightFormat) -> (Gpu, Arc<dyn ExpertKernels>) {
    kernels_on(Gpu::new(), format)
}

fn kernels_on(gpu: Gpu, format: WeightFormat) -> (Gpu, Arc<dyn ExpertKernels>) {
    let kernels = cuda::experts(&gpu.device, format).unwrap();
    (gpu, kernels)
}

/// Sends rows through one expert, `from[i]` to row `to[i]` of `rows` rows of zeros.
fn compute(
    kernels: &dyn ExpertKernels,
    x: &[u8],
    hidden: usize,
    groups: &[(&Expert, &[(u32, u32)])],
    rows: usize,
) -> Vec<u8> {
    let x: Vec<&[u8]> = x.chunks_exact(2 * hidden).collect();
    let groups: Vec<FfnGroup<'_>> =
        groups.iter().map(|(expert, rows)| FfnGroup { ffn: &expert.ffn, rows }).collect();
    let mut y = vec![0; rows * 2 * hidden];
    kernels.gated_ffn_encoded(&x, &groups, &mut y).unwrap();
    y
}

fn experts_agree_with_the_reference(format: WeightFormat) {
    let ((_gpu, kernels), mut rng) = (kernels(format), Rng::new(21));
    assert_eq!(kernels.class().to_string(), format!("{}/cuda-sm90/1", format.name()));
    // Odd ones, those of golden checkpoints, and more than one block of outputs.
    for (hidden, inner) in [(7, 33), (33, 7), (64, 112), (64, 48), (128, 256), (96, 300)] {
        let expert = Expert::new(&mut rng, &*kernels, hidden, inner);
        for rows in [1, 17] {
            let x = rounded(&rng.values(rows * hidden));
            let list: Vec<(u32, u32)> = (0..rows as u32).map(|r| (r, r)).collect();
            let y = compute(&*kernels, &bf16_bytes(&x), hidden, &[(&expert, &list)], rows);
            let mut have = vec![0.0; rows * hidden];
            Dtype::Bf16.decode(&y, &mut have);
            // The result is rounded once more than the reference's.
            assert_close(&have, &expert.reference(&x, hidden), 1e-2);
        }
    }
}

fn every_number_of_rows_to_512_gives_the_bits_of_a_row_alone(format: WeightFormat) {
    let ((_gpu, kernels), mut rng) = (kernels(format), Rng::new(22));
    let (hidden, inner) = (33, 40);
    let expert = Expert::new(&mut rng, &*kernels, hidden, inner);
    let x = bf16_bytes(&rng.values(512 * hidden));
    let row = |r: usize| &x[r * 2 * hidden..][..2 * hidden];
    let alone: Vec<u8> = (0..512)
        .flat_map(|r| compute(&*kernels, row(r), hidden, &[(&expert, &[(0, 0)])], 1))
        .collect();
    for rows in 1..=512 {
        let list: Vec<(u32, u32)> = (0..rows as u32).map(|r| (r, r)).collect();
        let y = compute(&*kernels, &x, hidden, &[(&expert, &list)], rows);
        assert!(y == alone[..y.len()], "{rows} rows");
    }
}

fn rows_have_the_same_bits_in_any_company_and_grouping_and_others_are_left_alone(
    format: WeightFormat,
) {
    let ((_gpu, kernels), mut rng) = (kernels(format), Rng::new(23));
    let (hidden, experts) = (64, 3);
    // One expert is wider than the others, as a shared one is.
    let all = [112, 112, 48].map(|inner| Expert::new(&mut rng, &*kernels, hidden, inner));
    let x = bf16_bytes(&rng.values(200 * hidden));
    let alone: Vec<Vec<u8>> = all
        .iter()
        .map(|expert| {
            let list: Vec<(u32, u32)> = (0..200).map(|r| (r, r)).collect();
            compute(&*kernels, &x, hidden, &[(expert, &list)], 200)
        })
        .collect();
    for rows in [1, 5, 40, 200] {
        // Every row goes through two experts; destinations in no particular order, one of them free.
        let mut to: Vec<u32> = (0..2 * rows as u32 + 1).collect();
        rng.shuffle(&mut to);
        let pairs: Vec<(usize, (u32, u32))> =
            (0..2 * rows).map(|i| ((i / 2 + i % 2) % experts, ((i / 2) as u32, to[i]))).collect();
        let cut = rng.below(pairs.len());
        let lists: Vec<(&Expert, Vec<(u32, u32)>)> = (0..2 * experts)
            .map(|g| {
                let half = if g < experts { &pairs[..cut] } else { &pairs[cut..] };
                let own = half.iter().filter(|(expert, _)| *expert == g % experts);
                (&all[g % experts], own.map(|(_, row)| *row).collect())
            })
            .collect();
        let groups: Vec<_> = lists.iter().map(|(expert, rows)| (*expert, &rows[..])).collect();
        let y = compute(&*kernels, &x, hidden, &groups, 2 * rows + 1);
        let row = |y: &[u8], r: u32| y[r as usize * 2 * hidden..][..2 * hidden].to_vec();
        for (expert, (from, to)) in &pairs {
            assert!(row(&y, *to) == row(&alone[*expert], *from), "{rows} rows");
        }
        assert_eq!(row(&y, to[2 * rows]), vec![0; 2 * hidden], "the row that nobody wrote");
    }
}

fn as_many_rows_as_a_frame_may_have_go_through_in_several_passes(format: WeightFormat) {
    let ((_gpu, kernels), mut rng) = (kernels(format), Rng::new(26));
    let (hidden, rows, experts) = (8, 4_096, 16);
    let expert = Expert::new(&mut rng, &*kernels, hidden, 8);
    let x = bf16_bytes(&rng.values(rows * hidden));
    // One more than there may be tiles in a launch.
    let lists: Vec<Vec<(u32, u32)>> = (0..experts)
        .map(|e| (0..rows as u32).map(|row| (row, e * rows as u32 + row)).collect())
        .collect();
    let groups: Vec<_> = lists.iter().map(|list| (&expert, &list[..])).collect();
    let y = compute(&*kernels, &x, hidden, &groups, experts as usize * rows);
    let alone = compute(&*kernels, &x, hidden, &[(&expert, &lists[0])], rows);
    for (e, y) in y.chunks_exact(alone.len()).enumerate() {
        assert!(y == alone, "group {e}");
    }
}

fn the_order_in_which_a_device_runs_threads_changes_no_bit(format: WeightFormat) {
    let (hidden, inner) = (96, 300);
    let compute = |seed| {
        let ((_gpu, kernels), mut rng) = (kernels_on(Gpu::with_seed(seed), format), Rng::new(25));
        let expert = Expert::new(&mut rng, &*kernels, hidden, inner);
        let x = bf16_bytes(&rng.values(140 * hidden));
        let list: Vec<(u32, u32)> = (0..140).map(|r| (r, r)).collect();
        // A tile of few rows and two of many.
        let groups = [(&expert, &list[..9]), (&expert, &list[9..])];
        compute(&*kernels, &x, hidden, &groups, 140)
    };
    let want = compute(0);
    for seed in 1..=8 {
        assert!(compute(seed) == want, "order {seed}");
    }
}

fn a_matrix_that_was_packed_before_is_the_one_that_is_packed_on_the_way(format: WeightFormat) {
    let ((_gpu, kernels), mut rng) = (kernels(format), Rng::new(24));
    let host = select(format, 2).unwrap();
    for (out, inputs) in [(1, 1), (35, 7), (70, 96)] {
        let bytes = bf16_bytes(&rng.values(out * inputs));
        let source = source(&bytes, SourceDtype::Bf16, out, inputs);
        let packed = host.pack(source).unwrap();
        let want = packed.host_bytes().unwrap().to_vec();
        for matrix in [kernels.pack(source).unwrap(), kernels.place(packed).unwrap()] {
            let memory = matrix.device_memory().unwrap();
            let mut have = vec![0; memory.bytes()];
            memory.read(0, &mut have).unwrap();
            assert!(have == want, "{out} x {inputs}");
            memory.read(64, &mut have[..32]).unwrap();
            assert_eq!(have[..32], want[64..96]);
        }
    }
}

fn weights_in_a_form_without_kernels_are_refused(format: WeightFormat) {
    let (gpu, kernels) = kernels(format);
    let unsupported = |told: Option<DeviceError>| {
        assert!(matches!(told, Some(DeviceError::Unsupported(_))), "{told:?}");
    };
    for other in WeightFormat::ALL.into_iter().filter(|other| *other != format) {
        if !matches!(other, WeightFormat::Bf16 | WeightFormat::Fp8) {
            unsupported(cuda::experts(&gpu.device, other).err());
        }
        // What is widened for exact products has a place there.
        if other != WeightFormat::F32 {
            let (packed, _) = packed(other, &[0.5; 32 * 32], [32, 32]);
            unsupported(kernels.place(packed).err());
        }
    }
}
