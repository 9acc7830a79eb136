//! Goal: what measures a GPU runs, keeps what it compiled, and says in a sentence why it cannot.
//! Method: the binary with a stand-in for the driver, whose libraries are there, missing or broken.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use entente_cuda_emulator::stand_in;
use entente_tests::cluster::{Finished, entente};
use serde_json::Value;
use tempfile::TempDir;

const DRIVER: [&str; 2] = ["libcuda.so", "libcuda.so.1"];
const COMPILER: [&str; 3] = ["libnvrtc.so", "libnvrtc.so.12", "libnvrtc.so.13"];
const CUBLAS: [&str; 3] = ["libcublas.so", "libcublas.so.12", "libcublas.so.13"];

/// A bench of small things.
const BENCH: &str = "bench kernels --device cuda:0 --shapes 64x48x4x2 --trunks 64x4x2x16x40 \
                     --positions 80 --product 32";

/// A folder of libraries, and one for what is kept.
struct Machine {
    dir: TempDir,
}

impl Machine {
    /// The stand-in's libraries, but for those that are `broken`: a file that is none keeps the
    /// machine's own, if it has any, from being found.
    fn new(broken: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let libraries = dir.path().join("lib");
        fs::create_dir(&libraries).unwrap();
        for entry in fs::read_dir(stand_in::folder()).unwrap() {
            let path = entry.unwrap().path();
            std::os::unix::fs::symlink(&path, libraries.join(path.file_name().unwrap())).unwrap();
        }
        let machine = Self { dir };
        machine.break_libraries(broken);
        machine
    }

    fn break_libraries(&self, names: &[&str]) {
        for name in names {
            let path = self.dir.path().join("lib").join(name);
            let _ = fs::remove_file(&path);
            fs::write(path, "no library").unwrap();
        }
    }

    fn run(&self, args: &[&str], environment: &[(&str, &str)]) -> Finished {
        let output = entente(args)
            .env("LD_LIBRARY_PATH", self.dir.path().join("lib"))
            .env("XDG_CACHE_HOME", self.dir.path())
            .env_remove("CACHE_DIRECTORY")
            .envs(environment.iter().copied())
            .output()
            .unwrap();
        Finished {
            status: output.status,
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// Measures small things at one row.
    fn bench(&self, environment: &[(&str, &str)]) -> Finished {
        self.bench_with(&["--rows", "1"], environment)
    }

    fn bench_with(&self, args: &[&str], environment: &[(&str, &str)]) -> Finished {
        self.run(
            &BENCH.split_whitespace().chain(args.iter().copied()).collect::<Vec<_>>(),
            environment,
        )
    }

    /// Files of compiled kernels.
    fn kept(&self) -> Vec<PathBuf> {
        let folder = self.dir.path().join("entente/kernels");
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect()
    }
}

#[track_caller]
fn assert_refused(end: &Finished, sentence: &str) {
    assert_eq!((end.code(), &end.stdout[..]), (Some(1), ""), "{end:#?}");
    assert!(end.stderr.contains(sentence) && end.stderr.lines().count() == 1, "{end:#?}");
}

/// What the bench of small things found.
fn found(end: &Finished) -> Value {
    assert_eq!(end.code(), Some(0), "{end:#?}");
    serde_json::from_str(&end.stdout).unwrap()
}

fn lines(report: &Value) -> impl Iterator<Item = &Value> {
    report["kernels"].as_array().unwrap().iter()
}

#[test]
fn every_kernel_on_a_gpu_is_measured_beside_copies_and_cublas() {
    let report = found(&Machine::new(&[]).bench_with(&["--rows", "1,70", "-o", "json"], &[]));
    assert_eq!(report["kernel_class"], "bf16/cuda-sm90/1");
    assert!(report["copy_gb_s"].as_f64().unwrap() > 0.0);
    assert!(report["product_tflop_s"].as_f64().unwrap() > 0.0);
    assert_eq!((&report["cublas"], &report["cublas_missing"]), (&"12.8".into(), &Value::Null));
    let kernels = "experts, matmul q, matmul k, matmul o, matmul head, matmul gate, attention, \
                   rms_norm, round_rows, add, rope, write_kv";
    for rows in [1, 70] {
        let own = lines(&report).filter(|line| line["rows"] == rows);
        let measured: BTreeSet<&str> = own.map(|line| line["kernel"].as_str().unwrap()).collect();
        assert_eq!(measured, kernels.split(", ").collect(), "{rows} rows");
    }
    for line in lines(&report) {
        let number = |name: &str| line[name].as_f64();
        assert!(number("kernels_us") > Some(0.0) && number("share_of_copy") > Some(0.0), "{line}");
        let multiplies = !line["multiply_tflop_s"].is_null();
        assert_eq!(number("share_of_cublas").is_some(), multiplies, "{line}");
        if line["kernel"] == "experts" {
            // Two experts a row; all four for many rows.
            assert_eq!(number("experts"), Some(if line["rows"] == 1 { 2.0 } else { 4.0 }));
            assert!(number("call_us") > Some(0.0), "{line}");
        }
    }
}

#[test]
fn weights_in_fp8_are_measured_by_the_half_of_the_bytes_that_they_take() {
    let machine = Machine::new(&[]);
    let [bf16, fp8] = ["bf16", "fp8"].map(|weights| {
        let report = found(
            &machine.bench_with(&["--rows", "1", "-o", "json"], &[("ENTENTE_WEIGHTS", weights)]),
        );
        assert_eq!(report["kernel_class"], format!("{weights}/cuda-sm90/1"));
        let weights = lines(&report).filter(|line| {
            let kernel = line["kernel"].as_str().unwrap();
            kernel == "experts" || kernel == "matmul q"
        });
        weights
            .map(|line| line["moved_gb_s"].as_f64().unwrap() * line["kernels_us"].as_f64().unwrap())
            .collect::<Vec<f64>>()
    });
    assert_eq!((bf16.len(), fp8.len()), (2, 2));
    for (fp8, bf16) in fp8.iter().zip(&bf16) {
        // And a scale for each output, which is not little where matrices are small.
        assert!((0.5..0.6).contains(&(fp8 / bf16)), "{fp8} instead of {bf16}");
    }
}

#[test]
fn without_cublas_there_are_no_shares_of_it_and_a_sentence_says_why() {
    let machine = Machine::new(&CUBLAS);
    let report = found(&machine.bench_with(&["--rows", "1", "-o", "json"], &[]));
    let missing = "cuBLAS is not installed (libcublas.so is not found)";
    assert_eq!((&report["cublas"], &report["cublas_missing"]), (&Value::Null, &missing.into()));
    assert!(report["product_tflop_s"].is_null(), "{report}");
    for line in lines(&report) {
        assert!(line["share_of_cublas"].is_null() && line["cublas_tflop_s"].is_null(), "{line}");
        assert!(line["share_of_copy"].as_f64() > Some(0.0), "{line}");
    }
    let table = machine.bench(&[]).stdout;
    assert!(table.contains(&format!("no shares of cuBLAS: {missing}")), "{table}");
}

#[test]
fn what_was_compiled_is_kept_and_used_without_the_compiler_until_it_is_damaged() {
    let machine = Machine::new(&[]);
    assert_eq!(machine.bench(&[]).code(), Some(0));
    let kept = machine.kept();
    let [file] = &kept[..] else { panic!("{kept:?}") };
    let whole = fs::read(file).unwrap();

    machine.break_libraries(&COMPILER);
    assert_eq!(machine.bench(&[]).code(), Some(0), "compiled kernels are at hand");
    damage(file);
    assert_refused(&machine.bench(&[]), "CUDA's compiler library is not installed");

    let machine = Machine::new(&[]).with_cache_of(&machine);
    assert_eq!(machine.bench(&[]).code(), Some(0), "compiled again");
    assert_eq!(machine.kept().len(), 1);
    assert_eq!(fs::read(&machine.kept()[0]).unwrap(), whole);
}

fn damage(file: &Path) {
    let mut bytes = fs::read(file).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(file, bytes).unwrap();
}

impl Machine {
    /// With the files that another one kept.
    fn with_cache_of(self, other: &Self) -> Self {
        let folder = self.dir.path().join("entente/kernels");
        fs::create_dir_all(&folder).unwrap();
        for file in other.kept() {
            fs::copy(&file, folder.join(file.file_name().unwrap())).unwrap();
        }
        self
    }
}

#[test]
fn a_machine_that_cannot_is_told_apart_in_a_sentence() {
    let machine = Machine::new(&[]);
    let faults = "ENTENTE_CUDA_EMULATOR_FAULTS";
    for (environment, sentence) in [
        (("ENTENTE_CUDA_EMULATOR_DEVICES", "0"), "the CUDA driver finds no device"),
        ((faults, "wrong-architecture"), "the device's architecture sm_90 is none"),
        ((faults, "lost"), "the device is lost: "),
        (("ENTENTE_CUDA_EMULATOR_MEMORY_BYTES", "50000"), "out of device memory: "),
    ] {
        assert_refused(&machine.bench(&[environment]), sentence);
    }
    let without = Machine::new(&[&DRIVER[..], &COMPILER, &CUBLAS].concat());
    assert_refused(&without.bench(&[]), "no CUDA driver is installed");
    let end = without.run(&["doctor", "gpu", "-o", "json"], &[]);
    assert_eq!(end.code(), Some(0), "{end:#?}");
    let found: Value = serde_json::from_str(&end.stdout).unwrap();
    for part in ["driver", "nvrtc", "cublas"] {
        assert!(found[part]["version"].is_null() && found[part]["missing"].is_string(), "{found}");
    }
    assert_eq!(found["devices"].as_array().unwrap().len(), 0);
}
