//! What becomes of a device that fails. Tests of one process share the device, so what they break
//! stays broken: each runs in a process of its own, as nextest does it.

use super::*;
use crate::kernels::cuda::{self, Event};

/// Sets what the stand-in is told by, before it is loaded.
fn tell(variable: &str, value: &str) {
    // SAFETY: the first thing that this process does, and no other thread reads the environment.
    unsafe { std::env::set_var(format!("ENTENTE_CUDA_EMULATOR_{variable}"), value) };
}

#[test]
fn a_lost_device_says_so_for_the_same_reason_to_everyone_and_nothing_panics() {
    let control = tempfile::NamedTempFile::new().unwrap();
    tell("CONTROL", control.path().to_str().unwrap());
    let gpu = Gpu::new();
    let kernels = cuda::experts(&gpu.device, WeightFormat::Bf16).unwrap();
    let bytes = bf16_bytes(&Rng::new(31).values(64 * 32));
    let matrix = |out| source(&bytes, SourceDtype::Bf16, out, 64 * 32 / out);
    let ffn = GatedFfn {
        gate: kernels.pack(matrix(64)).unwrap(),
        up: kernels.pack(matrix(64)).unwrap(),
        down: kernels.pack(matrix(32)).unwrap(),
        activation: Activation::SwiGlu,
    };
    let (before, event) = (gpu.put(&[1_u32; 7]), Event::new(&gpu.device).unwrap());
    assert_eq!(gpu.device.lost(), None);

    let (mut x, delta) = (gpu.put(&[1.0]), gpu.put(&[1.0]));
    std::fs::write(control.path(), "lost\n").unwrap();
    // Told at once or when somebody waits.
    let added = gpu.stream.add(x.view_mut(), delta.view());
    let error = added.and_then(|()| gpu.stream.synchronize()).unwrap_err();
    let DeviceError::Lost(reason) = &error else { panic!("{error}") };
    assert_eq!(gpu.device.lost(), Some(&reason[..]));
    let all = [
        Buffer::<u8>::new(&gpu.device, 1).err(),
        Stream::new(&gpu.device).err(),
        gpu.stream.synchronize().err(),
        event.record(&gpu.stream).err(),
        gpu.device.memory_free_bytes().err(),
        gpu.staging.borrow_mut().download(&gpu.stream, before.view(), <[u32]>::to_vec).err(),
        kernels.pack(matrix(64)).err(),
        ffn.gate.device_memory().unwrap().read(0, &mut [0]).err(),
        kernels
            .gated_ffn_encoded(
                &[&[0; 64]],
                &[FfnGroup { ffn: &ffn, rows: &[(0, 0)] }],
                &mut [0; 64],
            )
            .err(),
    ];
    for told in all {
        assert_eq!(told, Some(error.clone()));
    }
    // All of it can be dropped, and a process that opens the device again is told too.
    drop((ffn, kernels, before, event, gpu));
    let again = Device::open_cached(0, None).err();
    assert!(matches!(again, Some(DeviceError::Lost(_))), "{again:?}");
}

#[test]
fn a_device_that_no_code_is_made_for_is_told_apart() {
    tell("FAULTS", "wrong-architecture");
    entente_cuda_emulator::stand_in::load();
    let told = Device::open_cached(0, None).err();
    let Some(DeviceError::WrongArchitecture { have, .. }) = &told else { panic!("{told:?}") };
    assert_eq!(have, "sm_90");
}

#[test]
fn a_driver_without_devices_is_told_in_a_sentence() {
    tell("DEVICES", "0");
    entente_cuda_emulator::stand_in::load();
    let told = Device::open_cached(0, None).err();
    let text = "the CUDA driver finds no device".to_owned();
    assert_eq!(told, Some(DeviceError::Unavailable(text)));
    let survey = cuda::survey();
    assert!(survey.devices.is_empty() && survey.nvrtc.is_ok(), "{survey:?}");
}

#[test]
fn a_device_that_is_not_there_is_named() {
    drop(Gpu::new());
    let told = Device::open_cached(1, None).err().unwrap().to_string();
    assert!(told.contains("there is no cuda:1; devices that the CUDA driver shows: 1"), "{told}");
    let told = cuda::select(0, WeightFormat::Q8).err();
    assert!(matches!(told, Some(DeviceError::Unsupported(_))), "{told:?}");
}

#[test]
fn experts_that_do_not_fit_leave_those_that_do() {
    let gpu = Gpu::new();
    let kernels = cuda::experts(&gpu.device, WeightFormat::Bf16).unwrap();
    let max = kernels.device().unwrap().weights_bytes_max;
    assert!(max > 0 && max < gpu.device.memory_free_bytes().unwrap());
    let mut rng = Rng::new(32);
    let bytes = bf16_bytes(&rng.values(256 * 256));
    let square = source(&bytes, SourceDtype::Bf16, 256, 256);
    let fits = kernels.pack(square).unwrap();
    let hog = Buffer::<u8>::new(&gpu.device, gpu.device.memory_free_bytes().unwrap() as usize);
    let told = kernels.pack(square).err();
    assert!(matches!(told, Some(DeviceError::OutOfMemory { .. })), "{told:?}");
    // Rows need memory too; what was asked for can be computed once there is some.
    let ffn = GatedFfn {
        gate: fits,
        up: {
            drop(hog);
            kernels.pack(square).unwrap()
        },
        down: kernels.pack(square).unwrap(),
        activation: Activation::SwiGlu,
    };
    let hog = Buffer::<u8>::new(&gpu.device, gpu.device.memory_free_bytes().unwrap() as usize);
    let (x, rows) = (vec![1; 512], [(0, 0)]);
    let compute =
        |y: &mut [u8]| kernels.gated_ffn_encoded(&[&x], &[FfnGroup { ffn: &ffn, rows: &rows }], y);
    let told = compute(&mut [0; 512]);
    assert!(matches!(told, Err(DeviceError::OutOfMemory { .. })), "{told:?}");
    drop(hog);
    assert_eq!(compute(&mut [0; 512]), Ok(()));
}
