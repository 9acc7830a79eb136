//! Lanes between two devices of this process, and what ends them. On a machine with one real device
//! those of two ranks cannot be: NCCL takes a device once.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use super::*;
use crate::kernels::cuda::Event;
use crate::kernels::cuda::nccl::{
    Communicator, LANES_MAX, Lane, NcclError, Patience, Rank, UniqueId,
};

const PATIENT: Patience<'static> =
    Patience { wait_max: Duration::from_secs(60), given_up: &|| false };

/// For what never comes.
const IMPATIENT: Patience<'static> =
    Patience { wait_max: Duration::from_millis(100), given_up: &|| false };

fn lanes(gpu: &Gpu) -> [Lane; 2] {
    let (id, device) = (UniqueId::new().unwrap(), &gpu.device);
    let open = |rank| Lane::open(device, id, rank, &PATIENT).unwrap();
    thread::scope(|scope| {
        let second = scope.spawn(move || open(Rank::Second));
        [open(Rank::First), second.join().unwrap()]
    })
}

fn bytes(len: usize, seed: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 31 + i / 253 + seed) as u8).collect()
}

/// The same communicator again under a new id, as after a failure.
#[test]
fn a_communicator_of_one_rank_exchanges_with_itself_and_can_be_made_again() {
    let gpu = Gpu::new();
    for round in 0..3 {
        let id = UniqueId::new().unwrap();
        let mut alone = Communicator::join(&gpu.device, id, Rank::Alone, &PATIENT).unwrap();
        let sent = bytes(3_000_000, round);
        let (from, mut to) = (gpu.put(&sent), gpu.put(&vec![0_u8; sent.len()]));
        let both = (Some(from.view()), Some(to.view_mut()));
        alone.exchange(&gpu.stream, both.0, both.1, &PATIENT).unwrap();
        let done = Event::new(&gpu.device).unwrap();
        done.record(&gpu.stream).unwrap();
        alone.wait(&done, &PATIENT).unwrap();
        assert!(gpu.get(&to) == sent, "round {round}");
    }
}

#[test]
fn rows_arrive_as_they_were_sent_whatever_their_number() {
    let gpu = Gpu::new();
    let [mut there, mut here] = lanes(&gpu);
    // Nothing, less than a piece, a piece to the byte, one more, several.
    let lens = [0, 1, 8_192, (4 << 20) - 16, (4 << 20) - 15, 9 << 20];
    thread::scope(|scope| {
        scope.spawn(move || {
            for len in lens {
                there.send(&bytes(len, len), &PATIENT).unwrap();
            }
        });
        for len in lens {
            assert!(here.receive(len, &PATIENT).unwrap() == bytes(len, len), "{len} bytes");
        }
    });
}

#[test]
fn rows_that_are_not_the_ones_expected_are_refused() {
    let gpu = Gpu::new();
    let [mut there, mut here] = lanes(&gpu);
    thread::scope(|scope| {
        scope.spawn(move || {
            there.send(&bytes(100, 1), &PATIENT).unwrap();
            there.send(&bytes(200, 2), &PATIENT).unwrap();
        });
        here.receive(100, &PATIENT).unwrap();
        // As if a set of rows had been lost on the way.
        here.skip();
        let error = here.receive(200, &PATIENT).unwrap_err().to_string();
        assert_eq!(
            error,
            "NCCL brought number 1 of 200 bytes where number 2 of 200 bytes was expected"
        );
    });
}

#[test]
fn a_peer_that_is_gone_is_an_error_and_leaves_the_device_as_it_was() {
    let gpu = Gpu::new();
    let free = gpu.device.memory_free_bytes().unwrap();
    let [there, mut here] = lanes(&gpu);
    drop(there);
    let error = here.receive(100, &PATIENT).unwrap_err();
    let NcclError::Failed { function, text } = &error else { panic!("{error}") };
    assert_eq!(*function, "ncclCommGetAsyncError", "{text}");
    drop(here);
    assert_eq!(gpu.device.memory_free_bytes().unwrap(), free);
    // What the device was asked for in vain holds up nobody.
    assert_eq!(gpu.get(&gpu.put(&[1_u32, 2, 3])), [1, 2, 3]);
    let [mut there, mut here] = lanes(&gpu);
    there.send(&[7; 10], &PATIENT).unwrap();
    assert_eq!(here.receive(10, &PATIENT).unwrap(), [7; 10]);
}

#[test]
fn nobody_waits_for_a_peer_longer_than_told() {
    let gpu = Gpu::new();
    let id = UniqueId::new().unwrap();
    let error = Lane::open(&gpu.device, id, Rank::First, &IMPATIENT).err().unwrap();
    assert_eq!(error, NcclError::Overdue(IMPATIENT.wait_max));
    let [_there, mut here] = lanes(&gpu);
    let error = here.receive(5, &IMPATIENT).unwrap_err();
    assert_eq!(error, NcclError::Overdue(IMPATIENT.wait_max));
    let [_there, mut here] = lanes(&gpu);
    let asked = AtomicBool::new(false);
    let given_up = || asked.swap(true, Ordering::Relaxed);
    let patience = Patience { given_up: &given_up, ..PATIENT };
    assert_eq!(here.receive(5, &patience).unwrap_err(), NcclError::GivenUp);
}

#[test]
fn a_device_has_so_many_lanes_and_no_more() {
    let gpu = Gpu::new();
    let mut all: Vec<_> = (0..LANES_MAX / 2).map(|_| lanes(&gpu)).collect();
    let open = || Lane::open(&gpu.device, UniqueId::new().unwrap(), Rank::First, &IMPATIENT);
    assert_eq!(open().err(), Some(NcclError::Crowded));
    all.pop();
    assert_eq!(open().err(), Some(NcclError::Overdue(IMPATIENT.wait_max)));
}
