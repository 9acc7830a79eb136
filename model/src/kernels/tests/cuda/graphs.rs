//! Work that was captured is the work that was issued, and what cannot be captured is told and harms
//! nothing.

use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::kernels::cuda::DenseFfn;

#[test]
fn a_graph_computes_what_its_kernels_compute_on_what_is_there_when_it_is_launched() {
    let (gpu, mut rng) = (Gpu::new(), Rng::new(41));
    let loader = Loader::new(&gpu.device, WeightFormat::Bf16).unwrap();
    let (rows, inputs, outputs) = (5, 70, 40);
    let w = rng.values(outputs * inputs);
    let w = loader.pack(source(&bf16_bytes(&w), SourceDtype::Bf16, outputs, inputs)).unwrap();
    let weight = gpu.put(&rng.values(inputs));
    let mut x = gpu.unwritten(rows * inputs);
    let mut words = gpu.put(&vec![0_u32; rows * row_pairs(inputs)]);
    let mut y = gpu.unwritten(rows * outputs);
    let mut issue = |x: &Buffer<f32>, y: &mut Buffer<f32>| {
        gpu.stream.rms_norm(x.view(), weight.view(), 1e-5, None, Some(words.view_mut()))?;
        gpu.stream.matmul(&w, words.view(), rows, y.view_mut())
    };
    let graph = gpu.stream.capture(|| issue(&x, &mut y)).unwrap();
    for _ in 0..3 {
        let values = rng.values(rows * inputs);
        let fill = |to: &mut [f32]| to.copy_from_slice(&values);
        gpu.staging.borrow_mut().upload(&gpu.stream, x.view_mut(), fill).unwrap();
        gpu.stream.launch(&graph).unwrap();
        let have = gpu.get(&y);
        issue(&x, &mut y).unwrap();
        assert_eq!(bits(&have), bits(&gpu.get(&y)));
    }
}

#[test]
fn what_cannot_be_captured_is_told_and_the_stream_goes_on() {
    let gpu = Gpu::new();
    let (mut x, delta) = (gpu.put(&[1.0_f32]), gpu.put(&[2.0_f32]));
    let (spare, mut to) = (gpu.put(&[0_u32]), gpu.put(&[0_u32]));
    type Act<'a> = Box<dyn FnOnce() -> Result<(), DeviceError> + 'a>;
    let refused: [Act<'_>; 5] = [
        Box::new(|| gpu.stream.synchronize()),
        Box::new(|| Buffer::<u8>::new(&gpu.device, 64).map(drop)),
        Box::new(|| {
            // Memory is freed once the device has done its work, which it has not begun.
            drop(spare);
            gpu.stream.synchronize()
        }),
        Box::new(|| Staging::new(&gpu.device)?.upload(&gpu.stream, to.view_mut(), |_| {})),
        Box::new(|| Err(DeviceError::Unsupported("whatever is recorded may fail".to_owned()))),
    ];
    for (at, act) in refused.into_iter().enumerate() {
        let told = gpu.stream.capture(act).err();
        assert!(matches!(told, Some(DeviceError::Unsupported(_))), "{at}: {told:?}");
        assert_eq!(gpu.device.lost(), None, "{at}");
    }
    gpu.stream.add(x.view_mut(), delta.view()).unwrap();
    assert_eq!(gpu.get(&x), [3.0]);
}

#[test]
fn others_may_take_and_free_memory_while_a_stream_is_captured() {
    let gpu = Gpu::new();
    let (mut x, delta) = (gpu.put(&[0.0_f32]), gpu.put(&[1.0_f32]));
    let ends = AtomicBool::new(false);
    let graphs = std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut buffers = 0;
            while !ends.load(Ordering::Relaxed) || buffers == 0 {
                // Freeing waits for the whole device.
                drop(Buffer::<u8>::new(&gpu.device, 64).unwrap());
                buffers += 1;
            }
        });
        let capture = |_| gpu.stream.capture(|| gpu.stream.add(x.view_mut(), delta.view()));
        let graphs: Result<Vec<_>, _> = (0..200).map(capture).collect();
        ends.store(true, Ordering::Relaxed);
        graphs.unwrap()
    });
    for graph in &graphs {
        gpu.stream.launch(graph).unwrap();
    }
    // What was launched is done although its graph is gone.
    drop(graphs);
    assert_eq!(gpu.get(&x), [200.0]);
}

#[test]
fn a_dense_layer_computes_each_part_of_a_step_that_was_made_ready() {
    [WeightFormat::Bf16, WeightFormat::Fp8].into_iter().for_each(check_parts);
}

fn check_parts(format: WeightFormat) {
    let (gpu, mut rng) = (Gpu::new(), Rng::new(42));
    let loader = Loader::new(&gpu.device, format).unwrap();
    let (hidden, inner) = (48, 72);
    let mut pack = |outputs, inputs| {
        let bytes = bf16_bytes(&rng.values(outputs * inputs));
        loader.pack(source(&bytes, SourceDtype::Bf16, outputs, inputs)).unwrap()
    };
    let mut ffn = || GatedFfn {
        gate: pack(inner, hidden),
        up: pack(inner, hidden),
        down: pack(hidden, inner),
        activation: Activation::SwiGlu,
    };
    let ffns = [ffn(), ffn()];
    let x = gpu.put(&rows16(&rng.values(40 * hidden), hidden));
    let mut dense = DenseFfn::new(&gpu.stream, 2, [40, 2], inner).unwrap();
    let mut run = |ffn: usize, parts: &[usize]| -> Vec<f32> {
        dense.cut(&gpu.stream, ffns.iter(), parts).unwrap();
        let (mut y, mut row) = (gpu.unwritten(40 * hidden), 0);
        for rows in parts {
            let own = x.slice(row * row_pairs(hidden)..(row + rows) * row_pairs(hidden));
            let to = y.slice_mut(row * hidden..(row + rows) * hidden);
            let graph = gpu.stream.capture(|| dense.run(&gpu.stream, &ffns[ffn], own, *rows, to));
            gpu.stream.launch(&graph.unwrap()).unwrap();
            row += rows;
        }
        gpu.get(&y)
    };
    let want = [0, 1].map(|ffn| run(ffn, &[40]));
    assert!(bits(&want[0]) != bits(&want[1]) && want.iter().flatten().all(|y| y.is_finite()));
    for parts in [[1, 39], [20, 20], [16, 24], [3, 37]] {
        for (ffn, want) in want.iter().enumerate() {
            assert!(bits(&run(ffn, &parts)) == bits(want), "layer {ffn} in parts of {parts:?}");
        }
    }
}
