//! Every kernel class of this processor against the reference, and each against itself: the bits of
//! a row may not depend on its company, the number of threads, or how the work was cut.

mod attention;
mod cuda;
mod gated_ffn;

use half::bf16;

use super::*;

/// Numbers that look random, the same ones for the same seed.
struct Rng(u64);

impl Rng {
    fn new(seed: u64) -> Self {
        println!("seed {seed}");
        Self(seed)
    }

    /// splitmix64 (Steele, Lea and Flood 2014).
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// `n` values between -1 and 1.
    fn values(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0).collect()
    }

    fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }
}

/// Calls `check` with the kernels of every class, on one thread and on two.
fn for_every_class(
    formats: &[WeightFormat],
    mut check: impl FnMut(WeightFormat, [&dyn Kernels; 2]),
) {
    for &format in formats {
        for class in cpu::every_class(format) {
            println!("class {class}");
            let [one, two] = [1, 2].map(|threads| select_class(&class, threads).unwrap());
            check(format, [&*one, &*two]);
        }
    }
}

const FORMATS: [WeightFormat; 5] = WeightFormat::ALL;

fn rounded(values: &[f32]) -> Vec<f32> {
    values.iter().map(|v| bf16::from_f32(*v).to_f32()).collect()
}

/// What the kernels of a format see of input rows of `len` values.
fn seen(format: WeightFormat, values: &[f32], len: usize) -> Vec<f32> {
    match format {
        WeightFormat::F32 => values.to_vec(),
        WeightFormat::Bf16 | WeightFormat::Fp8 => rounded(values),
        WeightFormat::Q8 | WeightFormat::Q4 => {
            values.chunks_exact(len).flat_map(quantise::activations).collect()
        }
    }
}

/// What the kernels of a format see of the weights `w`.
fn stored(format: WeightFormat, packed: &Matrix, w: &[f32]) -> Vec<f32> {
    match format {
        WeightFormat::F32 | WeightFormat::Bf16 => seen(format, w, packed.in_features()),
        WeightFormat::Fp8 | WeightFormat::Q8 | WeightFormat::Q4 => {
            let row = |out| (0..packed.in_features()).map(move |i| packed.quantised(out, i));
            (0..packed.out_features()).flat_map(row).collect()
        }
    }
}

fn f32_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn bf16_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect()
}

fn source(bytes: &[u8], dtype: SourceDtype, out: usize, inputs: usize) -> MatrixSource<'_> {
    MatrixSource { out_features: out, in_features: inputs, dtype, bytes, scales: None }
}

#[track_caller]
fn assert_close(have: &[f32], want: &[f32], tolerance: f32) {
    assert_eq!(have.len(), want.len());
    let scale = want.iter().fold(1.0_f32, |max, v| max.max(v.abs()));
    for (i, (have, want)) in have.iter().zip(want).enumerate() {
        let error = (have - want).abs();
        assert!(error <= tolerance * scale, "value {i} is {have}, not {want} (scale {scale})");
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// Row counts at which tiles, threads and passes begin to differ.
fn row_counts() -> impl Iterator<Item = usize> {
    (1..=64).chain([100, 128, 257, 300])
}

#[test]
fn matmul_agrees_with_the_reference() {
    let mut rng = Rng::new(1);
    for (inputs, outputs) in [(1, 1), (7, 33), (64, 112), (112, 64), (33, 8), (1024, 40)] {
        let (x, w) = (rng.values(13 * inputs), rng.values(outputs * inputs));
        let sources = [
            (SourceDtype::F32, f32_bytes(&w), w.clone()),
            (SourceDtype::Bf16, bf16_bytes(&w), rounded(&w)),
            (
                SourceDtype::F16,
                w.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect(),
                w.iter().map(|v| half::f16::from_f32(*v).to_f32()).collect(),
            ),
        ];
        for (dtype, bytes, w) in &sources {
            for_every_class(&FORMATS, |format, [one, _]| {
                let packed = one.pack(source(bytes, *dtype, outputs, inputs)).unwrap();
                let mut y = vec![f32::NAN; 13 * outputs];
                one.matmul(&x, &packed, &mut y);
                let (x, w) = (seen(format, &x, inputs), stored(format, &packed, w));
                assert_close(&y, &reference::matmul(&x, &w, inputs).unwrap(), 1e-5);
            });
        }
    }
}

/// Approximately normal values: sums of uniform ones.
fn normal(rng: &mut Rng, n: usize) -> Vec<f32> {
    (0..n).map(|_| rng.values(12).iter().sum::<f32>() / 2.0).collect()
}

#[test]
fn quantised_products_are_near_the_exact_ones() {
    let mut rng = Rng::new(12);
    let (inputs, outputs, rows) = (1024, 64, 32);
    let (x, w) = (normal(&mut rng, rows * inputs), normal(&mut rng, outputs * inputs));
    let want = reference::matmul(&x, &w, inputs).unwrap();
    let norm = |v: &[f32]| v.iter().map(|v| v * v).sum::<f32>().sqrt();
    // Root mean square of the error over that of the product: of normal values in blocks of 32,
    // q8 keeps 0.5 % and int8 activations 0.6 %; fp8 keeps 2.6 %, its four significant bits.
    let bounds = [(WeightFormat::Q8, 0.009), (WeightFormat::Fp8, 0.03), (WeightFormat::Q4, 0.077)];
    for (format, bound) in bounds {
        let kernels = select(format, 1).unwrap();
        let w = kernels.pack(source(&f32_bytes(&w), SourceDtype::F32, outputs, inputs)).unwrap();
        let mut y = vec![0.0; want.len()];
        kernels.matmul(&x, &w, &mut y);
        let errors: Vec<f32> = y.iter().zip(&want).map(|(y, want)| y - want).collect();
        let error = norm(&errors) / norm(&want);
        println!("{format:?}: {error}");
        assert!(error < bound && error > bound / 2.0, "{format:?}: {error}");
    }
}

#[test]
fn quantised_products_are_the_same_bits_on_every_processor() {
    let mut rng = Rng::new(13);
    for (inputs, outputs) in [(1, 1), (45, 33), (65, 31), (1000, 70)] {
        let (x, w) = (rng.values(14 * inputs), normal(&mut rng, outputs * inputs));
        let bytes = f32_bytes(&w);
        for format in [WeightFormat::Q8, WeightFormat::Q4] {
            let mut all: Vec<Vec<u32>> = Vec::new();
            for_every_class(&[format], |_, both| {
                for kernels in both {
                    let w =
                        kernels.pack(source(&bytes, SourceDtype::F32, outputs, inputs)).unwrap();
                    let mut y = vec![f32::NAN; 14 * outputs];
                    kernels.matmul(&x, &w, &mut y);
                    all.push(bits(&y));
                }
            });
            assert!(all.iter().all(|y| *y == all[0]), "{format:?} {inputs} x {outputs}");
        }
    }
}

/// Where the sum of a block is exact, whatever the order, a product of fp8 is what the definition says:
/// block by block, scaled and added in one rounding. So every class gives these bits.
#[test]
fn fp8_products_of_exact_block_sums_are_the_scaled_sums_in_order() {
    let mut rng = Rng::new(15);
    // Below, at and beyond the borders of blocks, pairs and panels.
    for (inputs, outputs) in [(1_usize, 1), (127, 33), (128, 32), (129, 31), (700, 70)] {
        let blocks = inputs.div_ceil(128);
        // Multiples of 2^-9 below 1/32, subnormal ones among them, and small whole numbers.
        let codes: Vec<u8> =
            (0..outputs * inputs).map(|_| (rng.below(24) + 128 * rng.below(2)) as u8).collect();
        let scales = rng.values(outputs * blocks);
        let x: Vec<f32> = (0..9 * inputs).map(|_| rng.below(9) as f32 - 4.0).collect();
        let bytes = f32_bytes(&scales);
        let scales_of = Scales {
            dtype: SourceDtype::F32,
            bytes: &bytes,
            block: [1, 128],
            columns: blocks,
            outputs_before: 0,
        };
        let source = MatrixSource {
            scales: Some(scales_of),
            ..source(&codes, SourceDtype::E4m3, outputs, inputs)
        };
        let mut want = Vec::with_capacity(9 * outputs);
        for x in x.chunks_exact(inputs) {
            for out in 0..outputs {
                let codes = codes[out * inputs..][..inputs].chunks(128);
                let of_blocks = codes.zip(x.chunks(128)).zip(&scales[out * blocks..]);
                want.push(of_blocks.fold(0.0_f32, |sum, ((codes, x), scale)| {
                    let block: f32 = codes.iter().zip(x).map(|(c, x)| fp8::value(*c) * x).sum();
                    block.mul_add(*scale, sum)
                }));
            }
        }
        for_every_class(&[WeightFormat::Fp8], |_, both| {
            for kernels in both {
                let packed = kernels.pack(source).unwrap();
                let mut y = vec![f32::NAN; want.len()];
                kernels.matmul(&x, &packed, &mut y);
                assert_eq!(bits(&y), bits(&want), "{outputs} x {inputs}");
            }
        });
    }
}

#[test]
fn several_products_in_one_call_are_those_of_each_alone() {
    let mut rng = Rng::new(14);
    let (inputs, x) = (100, rng.values(17 * 100));
    let weights = [70, 1, 33].map(|outputs| rng.values(outputs * inputs));
    for_every_class(&FORMATS, |_, both| {
        // Checkpoints may store matrices of one layer in different element types.
        let matrices = weights.each_ref().map(|w| match w.len() / inputs {
            1 => both[0].pack(source(&bf16_bytes(w), SourceDtype::Bf16, 1, inputs)).unwrap(),
            outputs => {
                both[0].pack(source(&f32_bytes(w), SourceDtype::F32, outputs, inputs)).unwrap()
            }
        });
        let rows = || matrices.each_ref().map(|w| vec![f32::NAN; 17 * w.out_features()]);
        let mut alone = rows();
        for (w, y) in matrices.iter().zip(&mut alone) {
            both[0].matmul(&x, w, y);
        }
        for kernels in both {
            let mut together = rows();
            let mut products: Vec<(&Matrix, &mut [f32])> =
                matrices.iter().zip(&mut together).map(|(w, y)| (w, &mut y[..])).collect();
            kernels.matmul_many(&x, &mut products);
            assert_eq!(together.each_ref().map(|y| bits(y)), alone.each_ref().map(|y| bits(y)));
        }
    });
}

#[test]
fn a_matrix_packed_for_f32_never_has_its_inputs_rounded() {
    let mut rng = Rng::new(2);
    let (x, w) = (rng.values(5 * 96), rng.values(8 * 96));
    for (dtype, bytes, w) in [
        (SourceDtype::F32, f32_bytes(&w), w.clone()),
        (SourceDtype::Bf16, bf16_bytes(&w), rounded(&w)),
    ] {
        let want = reference::matmul(&x, &w, 96).unwrap();
        for_every_class(&FORMATS, |_, [one, _]| {
            let mut y = vec![0.0; want.len()];
            one.matmul(&x, &one.pack_f32(source(&bytes, dtype, 8, 96)), &mut y);
            assert_close(&y, &want, 1e-6);
        });
    }
}

#[test]
fn matmul_gives_each_row_the_same_bits_in_any_company() {
    let mut rng = Rng::new(3);
    for (inputs, outputs, dtype) in [
        (7, 33, SourceDtype::F32),
        (70, 112, SourceDtype::Bf16),
        (257, 545, SourceDtype::Bf16),
        (128, 1056, SourceDtype::F32),
    ] {
        let (x, w) = (rng.values(300 * inputs), rng.values(outputs * inputs));
        let bytes = if dtype == SourceDtype::F32 { f32_bytes(&w) } else { bf16_bytes(&w) };
        for_every_class(&FORMATS, |_, both| {
            let w = both[0].pack(source(&bytes, dtype, outputs, inputs)).unwrap();
            let mut alone = vec![0.0; 300 * outputs];
            for (x, y) in x.chunks_exact(inputs).zip(alone.chunks_exact_mut(outputs)) {
                both[0].matmul(x, &w, y);
            }
            for rows in row_counts() {
                // Another part of the rows each time, so that rows change their tile.
                let first = (rows * 7) % (301 - rows);
                let want = bits(&alone[first * outputs..(first + rows) * outputs]);
                for kernels in both {
                    let mut y = vec![f32::NAN; rows * outputs];
                    kernels.matmul(&x[first * inputs..(first + rows) * inputs], &w, &mut y);
                    assert!(bits(&y) == want, "{rows} rows from {first}");
                }
            }
        });
    }
}

/// `values` as they travel, and what they are there.
fn travelled(dtype: Dtype, values: &[f32]) -> (Vec<u8>, Vec<f32>) {
    let (mut bytes, mut arrived) = (Vec::new(), vec![0.0; values.len()]);
    dtype.encode(values, &mut bytes);
    dtype.decode(&bytes, &mut arrived);
    (bytes, arrived)
}

#[test]
fn rows_are_encoded_and_added_up_as_one_by_one() {
    let mut rng = Rng::new(12);
    // Around registers, pieces, and the size from which threads share the work.
    for (rows, len) in [(1, 1), (3, 17), (2, 1_031), (40, 1_024)] {
        let parts = 2;
        let (x, weights) = (rng.values(rows * parts * len), rng.values(rows * parts));
        for_every_class(&FORMATS, |_, both| {
            let dtype = both[0].row_dtype();
            let (bytes, arrived) = travelled(dtype, &x);
            let mut want = vec![0.25_f32; rows * len];
            for (i, part) in arrived.chunks(len).enumerate() {
                for (sum, value) in want[i / parts * len..].iter_mut().zip(part) {
                    *sum += weights[i] * value;
                }
            }
            let encoded: Vec<(f32, &[u8])> =
                weights.iter().copied().zip(bytes.chunks(len * dtype.size())).collect();
            for kernels in both {
                let (mut sent, mut sums) = (vec![0; bytes.len()], vec![0.25; rows * len]);
                kernels.encode_rows(&x, &mut sent);
                assert!(sent == bytes, "{rows} rows of {len}");
                kernels.add_weighted(&encoded, &mut sums);
                assert_eq!(bits(&sums), bits(&want), "{rows} rows of {len}");
            }
        });
    }
}

#[test]
fn a_residual_is_added_value_by_value() {
    let mut rng = Rng::new(18);
    for len in [1, 100, 70_001] {
        let (x, delta) = (rng.values(len), rng.values(len));
        let want: Vec<f32> = x.iter().zip(&delta).map(|(x, delta)| x + delta).collect();
        for_every_class(&[WeightFormat::F32], |_, both| {
            for kernels in both {
                let mut x = x.clone();
                kernels.add(&mut x, &delta);
                assert_eq!(bits(&x), bits(&want));
            }
        });
    }
}

#[test]
fn rms_norm_agrees_with_the_reference_and_is_the_same_in_any_company() {
    let mut rng = Rng::new(10);
    for len in [1, 7, 16, 64, 100, 2048] {
        let (x, weight) = (rng.values(33 * len), rng.values(len));
        let want = reference::rms_norm(&x, &weight, 1e-5).unwrap();
        for_every_class(&[WeightFormat::F32], |_, both| {
            let mut alone = vec![0.0; x.len()];
            for (x, y) in x.chunks_exact(len).zip(alone.chunks_exact_mut(len)) {
                both[0].rms_norm(x, &weight, 1e-5, y);
            }
            assert_close(&alone, &want, 1e-6);
            for kernels in both {
                let mut y = vec![0.0; x.len()];
                kernels.rms_norm(&x, &weight, 1e-5, &mut y);
                assert_eq!(bits(&y), bits(&alone));
            }
        });
    }
}

#[test]
fn rope_agrees_with_the_reference_and_is_the_same_in_any_company() {
    let mut rng = Rng::new(11);
    for (heads, head_dim) in [(4, 16), (1, 6), (3, 80), (16, 128)] {
        let (row_len, half) = (heads * head_dim, head_dim / 2);
        let x = rng.values(21 * row_len);
        let angles = rng.values(21 * half);
        let cos: Vec<f32> = angles.iter().map(|a| (a * 9.0).cos()).collect();
        let sin: Vec<f32> = angles.iter().map(|a| (a * 9.0).sin()).collect();
        let want = reference::rope(&x, heads, head_dim, &cos, &sin).unwrap();
        for_every_class(&[WeightFormat::F32], |_, both| {
            let mut alone = x.clone();
            for (r, row) in alone.chunks_exact_mut(row_len).enumerate() {
                let angles = r * half..(r + 1) * half;
                both[0].rope(row, heads, head_dim, &cos[angles.clone()], &sin[angles]);
            }
            assert_close(&alone, &want, 1e-6);
            for kernels in both {
                let mut all = x.clone();
                kernels.rope(&mut all, heads, head_dim, &cos, &sin);
                assert_eq!(bits(&all), bits(&alone));
            }
        });
    }
}

#[test]
fn a_class_can_be_asked_for_by_the_name_it_gives() {
    for format in FORMATS {
        let best = select(format, 1).unwrap();
        let classes = cpu::every_class(format);
        assert_eq!(classes.first(), Some(best.class()));
        for class in classes {
            assert_eq!(select_class(&class, 1).unwrap().class(), &class);
        }
    }
    let unknown = KernelClass("f32/abacus/1".to_owned());
    let error = select_class(&unknown, 1).err().unwrap().to_string();
    assert!(error.contains("f32/abacus/1") && error.contains("bf16/portable/"), "{error}");
}
