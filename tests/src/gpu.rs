//! GPUs that are none: the environment in which the binary finds an emulated CUDA driver.
//!
//! Every process that opens a device has an emulated machine of its own, whose kernels run on the
//! processor. Faults are planted in one process at a time, while it runs, by a file.
//!
//! Where tests run on the machine's own device, processes find that one, and the tests that plant
//! faults or count its bytes are left out ([`stand_in::on_device`]).

use std::fs;
use std::path::Path;

use entente_cuda_emulator::stand_in;
use tempfile::TempDir;

/// An environment with emulated GPUs.
#[derive(Debug)]
pub struct Gpus {
    variables: Vec<(String, String)>,
    // Compiled kernels, which are no use to a real device, and the file of faults.
    dir: TempDir,
}

impl Gpus {
    /// Machines with so many devices of so much memory, with these faults from the beginning.
    pub fn new(devices: usize, memory_bytes: u64, faults: &str) -> Self {
        Self::in_folder(&stand_in::folder(), devices, memory_bytes, faults)
    }

    /// The same on which nobody has installed NCCL.
    pub fn without_nccl(devices: usize, memory_bytes: u64) -> Self {
        Self::in_folder(&stand_in::folder_without_nccl(), devices, memory_bytes, "")
    }

    fn in_folder(folder: &Path, devices: usize, memory_bytes: u64, faults: &str) -> Self {
        let dir = tempfile::Builder::new().prefix("entente-gpus-").tempdir().unwrap();
        let text = |path: &Path| path.to_str().unwrap().to_owned();
        let emulator = |name: &str, value: String| (format!("ENTENTE_CUDA_EMULATOR_{name}"), value);
        let mut variables = vec![("CACHE_DIRECTORY".to_owned(), text(dir.path()))];
        if !stand_in::on_device() {
            variables.extend([
                ("LD_LIBRARY_PATH".to_owned(), text(folder)),
                emulator("DEVICES", devices.to_string()),
                emulator("MEMORY_BYTES", memory_bytes.to_string()),
                emulator("FAULTS", faults.to_owned()),
                emulator("CONTROL", text(&dir.path().join("faults"))),
            ]);
        }
        Self { variables, dir }
    }

    /// What `--device` calls the device of this number. A real machine may have but one, which all
    /// share then.
    pub fn device(&self, number: usize) -> String {
        let number = if stand_in::on_device() { 0 } else { number };
        format!("cuda:{number}")
    }

    /// The variables that make a process find them.
    pub fn variables(&self) -> &[(String, String)] {
        &self.variables
    }

    /// Plants a fault in a process, from its next kernel on.
    pub fn break_in(&self, pid: u64, fault: &str) {
        let file = self.dir.path().join("faults");
        // In one step: processes read it at any moment.
        let next = self.dir.path().join("faults.next");
        fs::write(&next, format!("pid={pid} {fault}\n")).unwrap();
        fs::rename(next, file).unwrap();
    }
}
