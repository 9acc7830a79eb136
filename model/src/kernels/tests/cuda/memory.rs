//! Memory of a device and the way there.

use super::*;

#[test]
fn staging_grows_and_pieces_of_memory_are_written_where_they_are() {
    let gpu = Gpu::new();
    let mut buffer = Buffer::<u32>::zeroed(&gpu.stream, 50_000).unwrap();
    let mut staging = Staging::new(&gpu.device).unwrap();
    // Far more than the staging has at first; the second copy has to wait for the first.
    for (at, len) in [(10, 3), (100, 49_000), (49_999, 1), (0, 0)] {
        let fill = |to: &mut [u32]| to.iter_mut().zip(at..).for_each(|(v, i)| *v = i as u32);
        staging.upload(&gpu.stream, buffer.slice_mut(at..at + len), fill).unwrap();
    }
    let have = staging.download(&gpu.stream, buffer.view(), <[u32]>::to_vec).unwrap();
    for (i, value) in have.into_iter().enumerate() {
        let written = (10..13).contains(&i) || (100..49_100).contains(&i) || i == 49_999;
        assert_eq!(value, if written { i as u32 } else { 0 });
    }
}

#[test]
fn memory_that_is_dropped_is_there_again() {
    // More than what a driver gives out of memory that it keeps by itself.
    const BYTES: usize = 64 << 20;
    let gpu = Gpu::new();
    let free = gpu.device.memory_free_bytes().unwrap();
    let mut buffer = Buffer::<u8>::new(&gpu.device, BYTES).unwrap();
    assert!(gpu.device.memory_free_bytes().unwrap() <= free - BYTES as u64);
    buffer.reserve(1 << 10).unwrap();
    assert_eq!(buffer.len(), BYTES, "it does not shrink");
    buffer.reserve(2 * BYTES).unwrap();
    assert!(buffer.len() >= 2 * BYTES, "and grows");
    drop(buffer);
    assert_eq!(gpu.device.memory_free_bytes().unwrap(), free);
}

#[test]
fn what_does_not_fit_is_told_with_figures_and_costs_nothing_else() {
    let gpu = Gpu::new();
    let free = gpu.device.memory_free_bytes().unwrap();
    for wanted in [free as usize + 1, usize::MAX] {
        let told = Buffer::<u8>::new(&gpu.device, wanted).err();
        let want = DeviceError::OutOfMemory { wanted_bytes: wanted as u64, free_bytes: free };
        assert_eq!(told, Some(want));
    }
    let told = Buffer::<u32>::new(&gpu.device, usize::MAX).err();
    assert!(matches!(told, Some(DeviceError::OutOfMemory { wanted_bytes: u64::MAX, .. })));
    assert_eq!(gpu.get(&gpu.put(&[1_u32, 2, 3])), [1, 2, 3]);
}
