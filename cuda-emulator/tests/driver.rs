//! A program that asks for NVIDIA's libraries by name finds the emulator, and it behaves as a driver.

use std::slice;
use std::sync::{Arc, LazyLock};

use cudarc::driver::sys::CUresult as R;
use cudarc::driver::{CudaContext, CudaFunction, DriverError, LaunchConfig, PushKernelArg, result};
use cudarc::nvrtc::{CompileError, CompileOptions, Ptx, compile_ptx_with_opts};
use entente_cuda_emulator::stand_in::{self, Emulator};

static EMULATOR: LazyLock<Emulator> = LazyLock::new(stand_in::load);

fn open() -> Arc<CudaContext> {
    LazyLock::force(&EMULATOR);
    CudaContext::new(0).unwrap()
}

fn compile(source: &str, arch: &'static str) -> Result<Ptx, CompileError> {
    compile_ptx_with_opts(source, CompileOptions { arch: Some(arch), ..Default::default() })
}

fn function(context: &Arc<CudaContext>, name: &str) -> CudaFunction {
    let image = compile("extern \"C\" __global__ void f() {}", "sm_90").unwrap();
    context.load_module(image).unwrap().load_function(name).unwrap()
}

fn one_block(threads: u32) -> LaunchConfig {
    LaunchConfig { grid_dim: (1, 1, 1), block_dim: (threads, 1, 1), shared_mem_bytes: 0 }
}

fn code<T>(result: Result<T, DriverError>) -> Option<R> {
    result.err().map(|error| error.0)
}

#[test]
fn the_device_says_what_it_is() {
    let context = open();
    assert_eq!(CudaContext::device_count(), Ok(1));
    assert_eq!(context.name().unwrap(), "Entente emulated device");
    assert_eq!(context.compute_capability(), Ok((9, 0)));
    assert_eq!(context.total_mem(), Ok(1 << 30));
    assert_eq!(context.uuid().unwrap().bytes.map(|byte| byte as u8), *b"entente-emulate\0");
    assert_eq!(code(CudaContext::new(1)), Some(R::CUDA_ERROR_INVALID_DEVICE));
    let told = format!("{}", DriverError(R::CUDA_ERROR_OUT_OF_MEMORY));
    assert!(told.contains("out of memory"), "{told}");
}

#[test]
fn a_kernel_gets_its_arguments_and_its_place() {
    #[repr(C)]
    #[derive(Clone, Copy)]
    struct Pair {
        scale: f32,
        offset: u8,
    }
    // SAFETY: plain numbers, as the kernel's own struct has them.
    unsafe impl cudarc::driver::DeviceRepr for Pair {}

    let context = open();
    let stream = context.new_stream().unwrap();
    let function = function(&context, "emulator_arguments");
    let mut y = stream.alloc_zeros::<u32>(100).unwrap();
    let (pair, add, n) = (Pair { scale: 2.0, offset: 3 }, 1_000_i64, 99_i32);
    let shape = LaunchConfig { grid_dim: (2, 3, 2), block_dim: (2, 2, 2), shared_mem_bytes: 0 };
    let mut launch = stream.launch_builder(&function);
    // SAFETY: the arguments are the kernel's; it writes less than there is.
    unsafe { launch.arg(&mut y).arg(&pair).arg(&add).arg(&n).launch(shape) }.unwrap();
    let expected: Vec<u32> = (0..100).map(|at| if at < 96 { 2 * at + 1_003 } else { 0 }).collect();
    assert_eq!(stream.clone_dtoh(&y).unwrap(), expected);
}

#[test]
fn what_a_stream_was_asked_for_is_done_when_somebody_waits() {
    let context = open();
    let (first, second) = (context.new_stream().unwrap(), context.new_stream().unwrap());
    // SAFETY: freed below; so many bytes on each side.
    unsafe {
        let host = result::malloc_host(8, 0).unwrap().cast::<u32>();
        let device = result::malloc_sync(4).unwrap();
        *host = 1;
        let words = move |at| slice::from_raw_parts_mut(host.add(at), 1);
        result::memcpy_htod_async(device, words(0), first.cu_stream()).unwrap();
        // Too early: the copy has not begun, and takes what is there when it does.
        *host = 2;
        let event = first.record_event(None).unwrap();
        *host.add(1) = 3;
        second.wait(&event).unwrap();
        result::memcpy_dtoh_async(words(1), device, second.cu_stream()).unwrap();
        assert_eq!(*host.add(1), 3, "nobody has waited");
        // What an event stands for does not depend on whether it is still there.
        drop(event);
        second.synchronize().unwrap();
        assert_eq!(*host.add(1), 2);
        result::free_sync(device).unwrap();
        result::free_host(host.cast()).unwrap();
    }
}

#[test]
fn fresh_memory_is_poisoned_and_limited_and_comes_back() {
    let context = open();
    let stream = context.new_stream().unwrap();
    let (free, total) = context.mem_get_info().unwrap();
    // SAFETY: every word is read as it is.
    let words = unsafe { stream.alloc::<u32>(1_000) }.unwrap();
    assert_eq!(stream.clone_dtoh(&words).unwrap(), [u32::MAX; 1_000]);
    assert_eq!(context.mem_get_info().unwrap(), (free - 4_000, total));
    // SAFETY: nothing is read.
    let too_much = unsafe { stream.alloc::<u8>(free) };
    assert_eq!(code(too_much), Some(R::CUDA_ERROR_OUT_OF_MEMORY));
    drop(words);
    assert_eq!(context.mem_get_info().unwrap(), (free, total));
}

#[test]
fn copies_beyond_an_allocation_are_refused() {
    let context = open();
    let stream = context.new_stream().unwrap();
    // SAFETY: the first copy fits, the others are refused before they touch anything.
    unsafe {
        let device = result::malloc_sync(64).unwrap();
        let copy = |at, bytes: usize| {
            code(result::memcpy_htod_async(device + at, &vec![0u8; bytes], stream.cu_stream()))
        };
        assert_eq!(copy(0, 64), None);
        assert_eq!(copy(1, 64), Some(R::CUDA_ERROR_INVALID_VALUE));
        assert_eq!(copy(1 << 40, 1), Some(R::CUDA_ERROR_INVALID_VALUE));
        stream.synchronize().unwrap();
        result::free_sync(device).unwrap();
        assert_eq!(code(result::free_sync(device)), Some(R::CUDA_ERROR_INVALID_VALUE));
    }
}

#[test]
fn launches_beyond_the_limits_of_the_device_are_refused() {
    let context = open();
    let stream = context.new_stream().unwrap();
    let function = function(&context, "emulator_left_barrier");
    let y = stream.alloc_zeros::<f32>(1).unwrap();
    let launch = |shape: LaunchConfig| {
        // SAFETY: it is refused.
        code(unsafe { stream.launch_builder(&function).arg(&y).launch(shape) })
    };
    let refused = Some(R::CUDA_ERROR_INVALID_VALUE);
    assert_eq!(launch(one_block(1_025)), refused);
    assert_eq!(launch(one_block(0)), refused);
    assert_eq!(launch(LaunchConfig { grid_dim: (1, 65_536, 1), ..one_block(1) }), refused);
    let much = LaunchConfig { shared_mem_bytes: (48 << 10) + 1, ..one_block(32) };
    assert_eq!(launch(much), refused);
}

#[test]
fn images_that_are_damaged_or_for_other_devices_are_refused() {
    let context = open();
    let old = compile("void f() {}", "sm_80").unwrap();
    let load = |image: Ptx| code(context.load_module(image));
    assert_eq!(load(old.clone()), Some(R::CUDA_ERROR_NO_BINARY_FOR_GPU));
    let mut bytes = old.as_bytes().unwrap().to_vec();
    bytes[60] ^= 1;
    assert_eq!(load(Ptx::from_binary(bytes)), Some(R::CUDA_ERROR_INVALID_IMAGE));
    let module = context.load_module(compile("void f() {}", "sm_90").unwrap()).unwrap();
    assert_eq!(code(module.load_function("no_such_kernel")), Some(R::CUDA_ERROR_NOT_FOUND));
}

#[test]
fn the_compiler_refuses_what_cannot_be_compiled() {
    open();
    for source in ["#error too old", "#include \"missing.cuh\""] {
        let Err(CompileError::CompileError { log, .. }) = compile(source, "sm_90") else {
            panic!("{source} was compiled");
        };
        let log = log.to_str().unwrap();
        assert!(log.contains("(1): error") && log.contains(&source[9..12]), "{log}");
    }
    assert!(compile("void f() {}", "compute_90").is_err());
}

#[test]
fn a_seed_changes_the_order_of_a_process_that_runs() {
    let context = open();
    let stream = context.new_stream().unwrap();
    let function = function(&context, "emulator_block_sum_unsynchronised");
    let x = stream.clone_htod(&[1.0f32; 256]).unwrap();
    let mut sum = stream.alloc_zeros::<f32>(1).unwrap();
    let sums = [0, 1].map(|seed| {
        EMULATOR.set_seed(seed);
        let mut launch = stream.launch_builder(&function);
        // SAFETY: the arguments are the kernel's.
        unsafe { launch.arg(&x).arg(&mut sum).launch(one_block(256)) }.unwrap();
        stream.clone_dtoh(&sum).unwrap()[0]
    });
    // Backwards, each thread comes after those whose sums it takes.
    assert!(sums[0].is_nan() && sums[1] == 256.0, "{sums:?}");
}
