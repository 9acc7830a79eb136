//! The engine runs kernels as a device would, and finds what a device would let pass.

use std::ffi::{CString, c_void};

use entente_cuda_emulator::engine::{Fault, Kernel, Launch, Order, run};

/// Orders of which at least one must bring out each planted mistake: both plain ones, some others.
const SEEDS: std::ops::Range<u64> = 0..8;

/// Runs a kernel of one block whose arguments are pointers.
fn launch(name: &str, threads: u32, seed: u64, pointers: &[*const c_void]) -> Result<(), Fault> {
    let kernel = Kernel::find(&CString::new(name).unwrap()).unwrap();
    let arguments: Vec<*mut c_void> =
        pointers.iter().map(|pointer| (&raw const *pointer).cast_mut().cast()).collect();
    let launch = Launch {
        kernel,
        grid: [1, 1, 1],
        block: [threads, 1, 1],
        shared_bytes: 4096,
        arguments: &arguments,
    };
    // SAFETY: each test hands over pointers to what its kernel reads and writes.
    unsafe { run(&launch, &mut Order::new(seed)) }
}

fn numbers(count: usize) -> Vec<f32> {
    (0..count).map(|at| (at * 37 % 101) as f32).collect()
}

fn block_sum(name: &str, seed: u64) -> f32 {
    let (x, mut sum) = (numbers(256), [0.0f32]);
    launch(name, 256, seed, &[x.as_ptr().cast(), sum.as_mut_ptr().cast()]).unwrap();
    sum[0]
}

#[test]
fn a_barrier_keeps_the_steps_of_a_block_apart_in_every_order() {
    let expected: f32 = numbers(256).iter().sum();
    for seed in SEEDS {
        assert_eq!(block_sum("emulator_block_sum", seed), expected, "seed {seed}");
    }
}

#[test]
fn a_missing_barrier_shows_in_some_order() {
    let expected: f32 = numbers(256).iter().sum();
    let sums = SEEDS.map(|seed| block_sum("emulator_block_sum_unsynchronised", seed));
    assert!(sums.into_iter().any(|sum| sum != expected));
}

#[test]
fn a_shuffle_gives_each_lane_the_value_it_asked_for() {
    let x = numbers(64);
    for seed in SEEDS {
        let mut y = [0.0f32; 64];
        let pointers = [x.as_ptr().cast(), y.as_mut_ptr().cast()];
        launch("emulator_shuffle", 64, seed, &pointers).unwrap();
        for (warp, values) in x.chunks(32).enumerate() {
            let expected = values.iter().sum::<f32>() + 10.0 * values[5];
            assert_eq!(y[32 * warp..][..32], [expected; 32], "seed {seed}");
        }
    }
}

#[test]
fn an_mma_is_the_product_of_its_fragments() {
    // Small whole numbers, so that every sum is exact in any order.
    let bf16 = |value: i32| ((value as f32).to_bits() >> 16) as u16;
    let small = |at: i32, factor: i32| at * factor % 17 - 8;
    let a: Vec<u16> = (0..256).map(|at| bf16(small(at, 7))).collect();
    let b: Vec<u16> = (0..128).map(|at| bf16(small(at, 5))).collect();
    let mut c: Vec<f32> = (0..128).map(|at| at as f32).collect();
    let expected: Vec<f32> = (0..128)
        .map(|at| {
            let (row, column) = (at / 8, at % 8);
            let sum: i32 = (0..16).map(|k| small(row * 16 + k, 7) * small(k * 8 + column, 5)).sum();
            (at + sum) as f32
        })
        .collect();
    let pointers = [a.as_ptr().cast(), b.as_ptr().cast(), c.as_mut_ptr().cast()];
    launch("emulator_mma", 32, 0, &pointers).unwrap();
    assert_eq!(c, expected);
}

#[test]
fn lanes_that_part_are_told_with_their_lines() {
    let mut y = [0.0f32; 64];
    for name in [
        "emulator_left_barrier",
        "emulator_left_warp",
        "emulator_diverged",
        "emulator_diverged_alike",
    ] {
        for seed in SEEDS {
            let fault = launch(name, 64, seed, &[y.as_mut_ptr().cast()]).unwrap_err();
            let text = fault.to_string();
            assert!(
                text.starts_with(&format!("kernel {name}, block [0, 0, 0]: thread [")),
                "{text}"
            );
            assert!(text.contains(" in line ") && text.contains(", but thread ["), "{text}");
        }
    }
    // And the engine goes on with what comes next.
    assert_eq!(block_sum("emulator_block_sum", 0), numbers(256).iter().sum::<f32>());
}

#[test]
fn fresh_shared_memory_is_poisoned() {
    for _ in 0..2 {
        let mut y = [0.0f32; 64];
        launch("emulator_fresh_shared", 32, 0, &[y.as_mut_ptr().cast()]).unwrap();
        assert!(y.iter().all(|value| value.is_nan()), "{y:?}");
    }
}

/// Copies 32 pieces of 16 bytes by way of shared memory, the last 3 of them missing.
fn copied(name: &str, seed: u64) -> (Vec<u128>, Vec<u128>) {
    let from: Vec<u128> = (1..=32).collect();
    let (mut to, missing) = (vec![0u128; 32], 3u64);
    let pointers =
        [from.as_ptr().cast(), to.as_mut_ptr().cast(), missing as usize as *const c_void];
    launch(name, 32, seed, &pointers).unwrap();
    let expected = from.iter().map(|value| if *value > 29 { 0 } else { *value });
    (to, expected.rev().collect())
}

#[test]
fn an_asynchronous_copy_is_there_after_the_wait_and_only_then() {
    for seed in SEEDS {
        let (to, expected) = copied("emulator_copy", seed);
        assert_eq!(to, expected, "seed {seed}");
        let (to, _) = copied("emulator_copy_unwaited", seed);
        assert_eq!(to, [u128::MAX; 32], "seed {seed}");
    }
}
