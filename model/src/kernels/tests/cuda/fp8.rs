//! Weights in fp8 on a device: what each code and each scale does, to the bit.

use super::*;
use crate::kernels::fp8;

/// The product of some rows with stored codes, by the kernels for few rows and by those for many.
fn products(gpu: &Gpu, source: MatrixSource<'_>, x: &[f32], rows: usize) -> [Vec<f32>; 2] {
    let loader = Loader::new(&gpu.device, WeightFormat::Fp8).unwrap();
    let (w, inputs, outputs) =
        (loader.pack(source).unwrap(), source.in_features, source.out_features);
    // Rows of zeros are added until these are many.
    [rows, 40].map(|all| {
        let mut x = x.to_vec();
        x.resize(all * inputs, 0.0);
        let (x, mut y) = (gpu.put(&rows16(&x, inputs)), gpu.unwritten(all * outputs));
        gpu.stream.matmul(&w, x.view(), all, y.view_mut()).unwrap();
        gpu.get(&y)[..rows * outputs].to_vec()
    })
}

#[test]
fn every_code_multiplies_as_the_number_that_it_stands_for() {
    let gpu = Gpu::new();
    // Each code as either input of a pair, of an even output and of an odd one. NaN is none.
    let code = |code: usize| if code % 128 == 127 { 0 } else { code as u8 };
    let codes: Vec<u8> = (0..256).flat_map(|out| [code(out), code(255 - out)]).collect();
    let source = source(&codes, SourceDtype::E4m3, 256, 2);
    // One over the least number, so that the product of that one is 1; and the bits of its sign.
    for y in products(&gpu, source, &[512.0, 0.0, 0.0, 512.0], 2) {
        for (out, pair) in codes.as_chunks::<2>().0.iter().enumerate() {
            for (row, code) in pair.iter().enumerate() {
                let (have, want) = (y[row * 256 + out], fp8::value(*code) * 512.0);
                assert!(have == want, "code {code:#x} of output {out} is {have}, not {want}");
            }
        }
    }
}

/// A product as the class makes it: each block's sum times its scale is added to those before, in
/// each of four segments of whole blocks, which are added in their order.
fn product(row: &[f32], codes: &[u8], scales: &[f32]) -> f32 {
    let segment_blocks = row.len().div_ceil(4).div_ceil(fp8::BLOCK);
    let blocks = row.chunks(fp8::BLOCK).zip(codes.chunks(fp8::BLOCK)).zip(scales);
    let mut segments = [0.0_f32; 4];
    for (b, ((row, codes), scale)) in blocks.enumerate() {
        let sum = row.iter().zip(codes).map(|(x, code)| x * fp8::value(*code)).sum();
        let segment = &mut segments[b / segment_blocks];
        *segment = scale.mul_add(sum, *segment);
    }
    ((segments[0] + segments[1]) + segments[2]) + segments[3]
}

#[test]
fn blocks_are_scaled_and_added_in_the_order_of_the_class() {
    let (gpu, mut rng) = (Gpu::new(), Rng::new(41));
    // Segments that are full, that are not, that have nothing; a last block that is not full.
    for (inputs, outputs) in [(128_usize, 3), (300, 33), (512, 70), (1_100, 40), (1_536, 8)] {
        // Whole numbers so small that a block's sum is exact in any order: only scales round.
        let code = |_| [0, 0x38, 0x40, 0xb8][rng.below(4)];
        let codes: Vec<u8> = (0..outputs * inputs).map(code).collect();
        let x: Vec<f32> = (0..3 * inputs).map(|_| rng.below(5) as f32 - 2.0).collect();
        let columns = inputs.div_ceil(fp8::BLOCK);
        let scales: Vec<f32> =
            rng.values(outputs * columns).iter().map(|s| 0.1 + s.abs()).collect();
        let (dtype, block) = (SourceDtype::F32, [1, fp8::BLOCK]);
        let bytes = f32_bytes(&scales);
        let stored = Scales { dtype, bytes: &bytes, block, columns, outputs_before: 0 };
        let source = source(&codes, SourceDtype::E4m3, outputs, inputs);
        let source = MatrixSource { scales: Some(stored), ..source };

        let weights = || codes.chunks_exact(inputs).zip(scales.chunks_exact(columns));
        let rows = x.chunks_exact(inputs);
        let want =
            rows.flat_map(|row| weights().map(|(codes, scales)| product(row, codes, scales)));
        let want: Vec<f32> = want.collect();
        for have in products(&gpu, source, &x, 3) {
            assert_eq!(bits(&have), bits(&want), "{inputs} inputs, {outputs} outputs");
        }
    }
}

#[test]
fn a_block_that_is_no_number_makes_its_outputs_none_and_no_other() {
    let (gpu, mut rng) = (Gpu::new(), Rng::new(42));
    let (outputs, inputs) = (70, 300);
    let mut w = rng.values(outputs * inputs);
    w[33 * inputs + 140] = f32::NAN;
    let bytes = f32_bytes(&w);
    let x = rounded(&rng.values(2 * inputs));
    for y in products(&gpu, source(&bytes, SourceDtype::F32, outputs, inputs), &x, 2) {
        for (at, value) in y.iter().enumerate() {
            assert_eq!(value.is_nan(), at % outputs == 33, "output {at}");
        }
    }
}
