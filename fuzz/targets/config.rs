//! The configuration of a checkpoint, whose weights then do not fit it.
#![no_main]

use std::fs;
use std::sync::LazyLock;

use entente_fuzz::{bounded, golden, seed};
use entente_model::Checkpoint;
use libfuzzer_sys::fuzz_target;
use tempfile::TempDir;

static FOLDER: LazyLock<TempDir> = LazyLock::new(|| {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("model.safetensors"), golden("model.safetensors")).unwrap();
    folder
});

fuzz_target!(init: seed("mixtral", &golden("config.json")), |config: &[u8]| {
    fs::write(FOLDER.path().join("config.json"), config).unwrap();
    bounded(config.len(), || drop(Checkpoint::open(FOLDER.path())));
});
