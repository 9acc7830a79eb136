//! The header of a safetensors file, in a folder that is otherwise a good checkpoint.
#![no_main]

use std::fs::{self, File};
use std::io::Write;
use std::sync::LazyLock;

use entente_fuzz::{bounded, golden, seed};
use entente_model::Checkpoint;
use libfuzzer_sys::fuzz_target;
use tempfile::TempDir;

/// The header of the checkpoint, and how many bytes of tensors are behind it.
static GOOD: LazyLock<(Vec<u8>, u64)> = LazyLock::new(|| {
    let mut file = golden("model.safetensors");
    let header_len = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let data_bytes = file.len() - 8 - header_len;
    file.truncate(8 + header_len);
    (file.split_off(8), data_bytes as u64)
});

static FOLDER: LazyLock<TempDir> = LazyLock::new(|| {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("config.json"), golden("config.json")).unwrap();
    folder
});

fuzz_target!(init: seed("mixtral", &GOOD.0), |header: &[u8]| {
    let path = FOLDER.path().join("model.safetensors");
    let mut file = File::create(path).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header).unwrap();
    // A hole: nothing is written, and zeros are read.
    file.set_len(8 + header.len() as u64 + GOOD.1).unwrap();
    drop(file);
    // What is made of the configuration does not depend on the input.
    bounded(header.len(), || drop(Checkpoint::open(FOLDER.path())));
});
