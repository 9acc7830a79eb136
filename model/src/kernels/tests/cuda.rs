//! Every kernel for CUDA devices against the reference, and against itself: the bits of a row may
//! not depend on its company, on the tiles it is cut into, or on the call. They run on the stand-in
//! for a driver, which needs no device and shows no speed.

mod attention;
mod experts;
mod faults;
mod fp8;
mod graphs;
mod memory;
mod nccl;

use std::cell::RefCell;

use super::*;
use crate::kernels::cuda::{Buffer, Cublas, Device, Loader, Staging, Stream, Value, row_pairs};

/// Each check runs once for each format of weights that devices multiply.
macro_rules! for_each_format {
    ($($check:ident),+ $(,)?) => {
        mod in_bf16 {
            $(#[test] fn $check() { super::$check(crate::kernels::WeightFormat::Bf16); })+
        }
        mod in_fp8 {
            $(#[test] fn $check() { super::$check(crate::kernels::WeightFormat::Fp8); })+
        }
    };
}
use for_each_format;

/// A device, and the way there and back.
struct Gpu {
    device: Arc<Device>,
    stream: Stream,
    staging: RefCell<Staging>,
}

impl Gpu {
    fn new() -> Self {
        Self::with_seed(0)
    }

    /// A device that runs blocks, warps and lanes in another order for another seed.
    fn with_seed(seed: u64) -> Self {
        println!("order {seed}");
        entente_cuda_emulator::stand_in::load().set_seed(seed);
        let device = Device::open_cached(0, None).unwrap();
        let (stream, staging) = (Stream::new(&device).unwrap(), Staging::new(&device).unwrap());
        Self { device, stream, staging: RefCell::new(staging) }
    }

    fn put<T: Value>(&self, values: &[T]) -> Buffer<T> {
        let mut buffer = Buffer::new(&self.device, values.len()).unwrap();
        let fill = |to: &mut [T]| to.copy_from_slice(values);
        self.staging.borrow_mut().upload(&self.stream, buffer.view_mut(), fill).unwrap();
        buffer
    }

    fn get<T: Value>(&self, buffer: &Buffer<T>) -> Vec<T> {
        let mut staging = self.staging.borrow_mut();
        staging.download(&self.stream, buffer.view(), <[T]>::to_vec).unwrap()
    }

    /// Memory that holds what no result is.
    fn unwritten(&self, len: usize) -> Buffer<f32> {
        self.put(&vec![f32::NAN; len])
    }
}

/// Rows in bf16 as the kernels read them.
fn rows16(values: &[f32], len: usize) -> Vec<u32> {
    let row = |row: &[f32]| -> Vec<u32> {
        let mut padded = row.to_vec();
        padded.resize(2 * row_pairs(len), 0.0);
        let words = padded.as_chunks::<2>().0.iter();
        words.map(|v| u32::from_le_bytes(bf16_bytes(v).try_into().unwrap())).collect()
    };
    values.chunks_exact(len).flat_map(row).collect()
}

/// Row counts at which tiles begin to differ.
const ROWS: [usize; 12] = [1, 2, 8, 15, 16, 17, 64, 65, 127, 128, 129, 300];

/// Packs a matrix for a device, and tells which weights that leaves.
fn packed(format: WeightFormat, w: &[f32], [outputs, inputs]: [usize; 2]) -> (Matrix, Vec<f32>) {
    let bytes = bf16_bytes(w);
    let kernels = select(format, 1).unwrap();
    let packed = kernels.pack(source(&bytes, SourceDtype::Bf16, outputs, inputs)).unwrap();
    let weights = stored(format, &packed, &rounded(w));
    (packed, weights)
}

for_each_format![matmul_agrees_with_the_reference_and_each_row_is_as_alone];

fn matmul_agrees_with_the_reference_and_each_row_is_as_alone(format: WeightFormat) {
    let (gpu, mut rng) = (Gpu::new(), Rng::new(1));
    let loader = Loader::new(&gpu.device, format).unwrap();
    // Less than a pair, a chunk, a segment and a panel; whole ones; more than the stages hold; with
    // scales, several blocks in a segment, of which the last is not full.
    let shapes =
        [(1, 1), (7, 33), (64, 112), (112, 64), (33, 8), (200, 70), (640, 40), (1_100, 66)];
    for (inputs, outputs) in shapes {
        let (x, w) = (rng.values(300 * inputs), rng.values(outputs * inputs));
        let (packed, weights) = packed(format, &w, [outputs, inputs]);
        let packed = loader.place(packed).unwrap();
        let multiply = |rows: usize| {
            let x = gpu.put(&rows16(&x[..rows * inputs], inputs));
            let mut y = gpu.unwritten(rows * outputs);
            gpu.stream.matmul(&packed, x.view(), rows, y.view_mut()).unwrap();
            gpu.get(&y)
        };
        let want = multiply(300);
        let reference = reference::matmul(&rounded(&x), &weights, inputs).unwrap();
        assert_close(&want, &reference, 1e-5);
        for rows in ROWS {
            let have = multiply(rows);
            assert!(bits(&have) == bits(&want[..rows * outputs]), "{rows} rows of {inputs}");
        }
    }
}

/// What `entente bench kernels` divides by must be the same work.
#[test]
fn cublas_is_asked_for_the_same_product() {
    let (rows, inputs, outputs) = (5, 24, 9);
    let gpu = Gpu::new();
    let mut rng = Rng::new(12);
    let (x, w) = (rng.values(rows * inputs), rng.values(outputs * inputs));
    let put = |values: &[f32]| {
        gpu.put(&values.iter().map(|v| bf16::from_f32(*v).to_bits()).collect::<Vec<_>>())
    };
    let (x16, w16, mut y) = (put(&x), put(&w), put(&vec![f32::NAN; rows * outputs]));
    gpu.stream.synchronize().unwrap();
    let stream = Arc::new(Stream::new(&gpu.device).unwrap());
    let cublas = Cublas::new(&stream).unwrap();
    let shape = [rows, inputs, outputs];
    cublas.product(w16.view(), x16.view(), y.view_mut(), shape).unwrap();
    stream.synchronize().unwrap();
    let have: Vec<f32> = gpu.get(&y).iter().map(|v| bf16::from_bits(*v).to_f32()).collect();
    let want = reference::matmul(&rounded(&x), &rounded(&w), inputs).unwrap();
    assert_close(&have, &want, 1e-2);
}

#[test]
fn exact_products_agree_with_the_reference_and_each_row_is_as_alone() {
    let (gpu, mut rng) = (Gpu::new(), Rng::new(2));
    let loader = Loader::new(&gpu.device, WeightFormat::Fp8).unwrap();
    for (inputs, outputs) in [(1, 1), (7, 33), (64, 8), (301, 40)] {
        let (x, w) = (rng.values(21 * inputs), rng.values(outputs * inputs));
        let sources = [
            (SourceDtype::F32, f32_bytes(&w), w.clone()),
            (SourceDtype::Bf16, bf16_bytes(&w), rounded(&w)),
        ];
        for (dtype, bytes, w) in sources {
            let packed = loader.pack_exact(source(&bytes, dtype, outputs, inputs)).unwrap();
            let multiply = |rows: usize| {
                let x = gpu.put(&x[..rows * inputs]);
                let mut y = gpu.unwritten(rows * outputs);
                gpu.stream.matmul_exact(&packed, x.view(), rows, y.view_mut()).unwrap();
                gpu.get(&y)
            };
            let want = multiply(21);
            assert_close(&want, &reference::matmul(&x, &w, inputs).unwrap(), 1e-6);
            for rows in 1..21 {
                assert!(bits(&multiply(rows)) == bits(&want[..rows * outputs]), "{rows} rows");
            }
        }
    }
}

#[test]
fn rms_norm_agrees_with_the_reference_in_both_forms() {
    let (gpu, mut rng) = (Gpu::new(), Rng::new(3));
    for len in [1, 31, 64, 257, 1030] {
        let (x, weight) = (rng.values(5 * len), rng.values(len));
        let [device_x, device_weight] = [&x, &weight].map(|values| gpu.put(values));
        let norm = |rows: usize| {
            let mut y32 = gpu.unwritten(rows * len);
            let mut y16 = gpu.put(&vec![u32::MAX; rows * row_pairs(len)]);
            let x = device_x.slice(0..rows * len);
            let (to32, to16) = (Some(y32.view_mut()), Some(y16.view_mut()));
            gpu.stream.rms_norm(x, device_weight.view(), 1e-5, to32, to16).unwrap();
            (gpu.get(&y32), gpu.get(&y16))
        };
        let (y32, y16) = norm(5);
        assert_close(&y32, &reference::rms_norm(&x, &weight, 1e-5).unwrap(), 1e-6);
        assert_eq!(y16, rows16(&y32, len));
        assert_eq!(bits(&norm(1).0), bits(&y32[..len]));
    }
}

#[test]
fn rope_agrees_with_the_reference() {
    let (gpu, mut rng) = (Gpu::new(), Rng::new(4));
    for (rows, heads, head_dim) in [(1, 1, 2), (3, 4, 16), (9, 3, 80)] {
        let x = rng.values(rows * heads * head_dim);
        let [cos, sin] = [(); 2].map(|()| rng.values(rows * head_dim / 2));
        let mut y = gpu.put(&x);
        let [device_cos, device_sin] = [&cos, &sin].map(|angles| gpu.put(angles));
        let (view, cos_view, sin_view) = (y.view_mut(), device_cos.view(), device_sin.view());
        gpu.stream.rope(view, [heads, head_dim], cos_view, sin_view).unwrap();
        let want = reference::rope(&x, heads, head_dim, &cos, &sin).unwrap();
        assert_close(&gpu.get(&y), &want, 1e-6);
    }
}

#[test]
fn values_are_added_and_rounded_one_by_one() {
    let (gpu, mut rng) = (Gpu::new(), Rng::new(5));
    for len in [1, 33, 64, 1000] {
        let [x, delta] = [(); 2].map(|()| rng.values(3 * len));
        let mut sum = gpu.put(&x);
        gpu.stream.add(sum.view_mut(), gpu.put(&delta).view()).unwrap();
        let want: Vec<f32> = x.iter().zip(&delta).map(|(x, delta)| x + delta).collect();
        let sum_values = gpu.get(&sum);
        assert_eq!(bits(&sum_values), bits(&want));
        let mut y16 = gpu.put(&vec![u32::MAX; 3 * row_pairs(len)]);
        gpu.stream.round_rows(sum.view(), len, y16.view_mut()).unwrap();
        assert_eq!(gpu.get(&y16), rows16(&want, len));
    }
}
