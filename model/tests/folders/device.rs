//! Weights that are multiplied somewhere else than in the memory of the process: a device made of a
//! budget of bytes, so that no hardware is needed.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use entente_model::kernels::{
    self, DeviceError, DeviceMemory, ExpertKernels, FfnGroup, GatedFfn, Kernels, Matrix,
    MatrixSource, WeightFormat,
};
use entente_model::{Checkpoint, load_experts, packed};
use entente_proto::frame::Dtype;
use entente_proto::ids::{ExpertId, KernelClass, LayerId};
use entente_proto::placement::ExpertKey;

use crate::folder::{Folder, golden};

const FORMAT: WeightFormat = WeightFormat::Bf16;

/// Kernels that pack on the processor and keep weights in memory of their own, as long as there is
/// room.
struct Far {
    near: Arc<dyn Kernels>,
    free_bytes: Arc<AtomicU64>,
}

impl Far {
    fn with(free_bytes: u64) -> Self {
        let near = kernels::select(FORMAT, 1).unwrap();
        Self { near, free_bytes: Arc::new(AtomicU64::new(free_bytes)) }
    }

    fn free_bytes(&self) -> u64 {
        self.free_bytes.load(Ordering::SeqCst)
    }
}

/// Gives its room back when it is dropped.
struct FarMemory(Mutex<Vec<u8>>, Arc<AtomicU64>);

impl DeviceMemory for FarMemory {
    fn bytes(&self) -> usize {
        self.0.lock().unwrap().len()
    }

    fn address(&self) -> u64 {
        0
    }

    fn read(&self, at: usize, to: &mut [u8]) -> Result<(), DeviceError> {
        to.copy_from_slice(&self.0.lock().unwrap()[at..at + to.len()]);
        Ok(())
    }
}

impl Drop for FarMemory {
    fn drop(&mut self) {
        self.1.fetch_add(self.bytes() as u64, Ordering::SeqCst);
    }
}

impl ExpertKernels for Far {
    fn class(&self) -> &KernelClass {
        self.near.class()
    }

    fn format(&self) -> WeightFormat {
        self.near.format()
    }

    fn row_dtype(&self) -> Dtype {
        self.near.row_dtype()
    }

    fn pack(&self, source: MatrixSource<'_>) -> Result<Matrix, DeviceError> {
        self.place(self.near.pack(source)?)
    }

    fn place(&self, matrix: Matrix) -> Result<Matrix, DeviceError> {
        let bytes = matrix.host_bytes().expect("not placed yet").to_vec();
        let wanted_bytes = bytes.len() as u64;
        let less = |free: u64| free.checked_sub(wanted_bytes);
        let taken = self.free_bytes.fetch_update(Ordering::SeqCst, Ordering::SeqCst, less);
        taken.map_err(|free_bytes| DeviceError::OutOfMemory { wanted_bytes, free_bytes })?;
        Ok(matrix.moved_to(Arc::new(FarMemory(Mutex::new(bytes), self.free_bytes.clone()))))
    }

    fn gated_ffn_encoded(
        &self,
        _: &[&[u8]],
        _: &[FfnGroup<'_>],
        _: &mut [u8],
    ) -> Result<(), DeviceError> {
        Err(DeviceError::Lost("it can only remember".to_owned()))
    }
}

/// The bytes of an expert; cut where no line of weights ends.
fn bytes(ffn: &GatedFfn) -> Vec<u8> {
    ffn.pieces(1_000).map(Result::unwrap).collect::<Vec<_>>().concat()
}

fn first(experts: u16) -> BTreeSet<ExpertKey> {
    (0..experts).map(|expert| (LayerId(1), ExpertId(expert))).collect()
}

/// The checkpoint as it was published with its manifest, and the packed form of the same.
fn both_forms(check: impl Fn(&Path)) {
    let near = kernels::select(FORMAT, 2).unwrap();
    let published = Folder::copy_of("mixtral");
    let checkpoint = Checkpoint::open(published.path()).unwrap();
    packed::manifest(&checkpoint, &*near, &()).unwrap().write().unwrap();
    check(published.path());
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("packed");
    let checkpoint = Checkpoint::open(&golden("mixtral")).unwrap();
    packed::import(&checkpoint, &*near, &out, &()).unwrap();
    check(&out);
}

#[test]
fn a_device_holds_the_same_bytes_as_the_process_would_and_gives_them_back() {
    both_forms(|dir| {
        let checkpoint = Checkpoint::open(dir).unwrap();
        let far = Far::with(1 << 30);
        let load = |kernels: &dyn ExpertKernels| {
            load_experts(&checkpoint, kernels, &first(3), &()).unwrap()
        };
        let (here, there) = (load(&*far.near), load(&far));
        for (key, ffn) in &there {
            assert!([&ffn.gate, &ffn.up, &ffn.down].iter().all(|m| m.device_memory().is_some()));
            assert!(ffn.gate.host_bytes().is_none());
            assert_eq!(bytes(ffn), bytes(&here[key]), "{key:?} of {}", dir.display());
            let sha256 = packed::sha256(ffn, |_| ());
            assert_eq!(checkpoint.manifest(FORMAT).unwrap().expert(*key), Some(sha256.unwrap()));
        }
        let taken: usize = there.values().map(GatedFfn::bytes).sum();
        assert_eq!(far.free_bytes(), (1 << 30) - taken as u64);
        drop(there);
        assert_eq!(far.free_bytes(), 1 << 30, "all of it is given back");
    });
}

#[test]
fn a_device_without_room_is_an_error_that_says_how_much_is_wanted_and_how_much_is_free() {
    both_forms(|dir| {
        let checkpoint = Checkpoint::open(dir).unwrap();
        let near = kernels::select(FORMAT, 1).unwrap();
        let one = load_experts(&checkpoint, &*near, &first(1), &()).unwrap();
        // Room for two experts and a little.
        let room = one.values().map(GatedFfn::bytes).sum::<usize>() as u64 * 2 + 64;
        let far = Far::with(room);
        let held = load_experts(&checkpoint, &far, &first(2), &()).unwrap();
        let error = load_experts(&checkpoint, &far, &first(3), &()).map(drop).unwrap_err();
        let error = error.to_string();
        let wanted = held[&(LayerId(1), ExpertId(0))].gate.bytes();
        assert_eq!(error, format!("out of device memory: {wanted} bytes wanted, 64 free"));
        assert_eq!(far.free_bytes(), 64, "what was held is held, nothing else is");
    });
}
