//! Faults that a test plants reach a program which knows nothing of the emulator.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use entente_cuda_emulator::stand_in;

/// The probe of `examples/`, which finds the emulator as its driver.
fn probe(arguments: &[&str]) -> Command {
    let test = std::env::current_exe().unwrap();
    let program: PathBuf = test.parent().unwrap().parent().unwrap().join("examples/probe");
    let mut command = Command::new(program);
    command.args(arguments).env("LD_LIBRARY_PATH", stand_in::folder());
    command
}

/// What it prints, and what stands on its standard error.
fn run(command: &mut Command) -> (Vec<String>, String) {
    let output = command.output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    (text.lines().map(str::to_owned).collect(), String::from_utf8(output.stderr).unwrap())
}

#[test]
fn a_mistake_of_a_kernel_is_told_and_loses_the_device() {
    let arguments = ["launch=emulator_shuffle", "launch=emulator_left_barrier", "memory", "load"];
    let (lines, told) = run(&mut probe(&arguments));
    let lost = "CUDA_ERROR_LAUNCH_FAILED";
    assert_eq!(lines, ["ok", lost, lost, lost]);
    assert!(told.contains("kernel emulator_left_barrier, block [0, 0, 0]: thread ["), "{told}");
}

#[test]
fn memory_beyond_an_allocation_is_no_kernels() {
    let (lines, told) = run(&mut probe(&["launch=emulator_beyond", "memory"]));
    assert_eq!(lines, ["CUDA_ERROR_ILLEGAL_ADDRESS"; 2]);
    let place = "kernel emulator_beyond, block [0, 0, 0]: thread [63, 0, 0] touches address 0x";
    assert!(told.contains(place), "{told}");
}

#[test]
fn what_the_compiler_can_check_is_checked() {
    for (kernel, thread) in [("emulator_unaligned", 1), ("emulator_beyond_shared", 63)] {
        let (lines, told) = run(&mut probe(&[&format!("launch={kernel}")]));
        assert_eq!(lines, ["CUDA_ERROR_ILLEGAL_ADDRESS"]);
        let place =
            format!("kernel {kernel}, block [0, 0, 0]: thread [{thread}, 0, 0] goes beyond");
        assert!(told.contains(&place), "{told}");
    }
}

#[test]
fn a_device_can_be_lost_from_the_start() {
    let (lines, _) = run(probe(&["memory"]).env("ENTENTE_CUDA_EMULATOR_FAULTS", "lost"));
    assert_eq!(lines, ["CUDA_ERROR_ECC_UNCORRECTABLE"]);
}

#[test]
fn a_device_can_have_another_architecture() {
    let faults = "wrong-architecture";
    let (lines, _) = run(probe(&["load"]).env("ENTENTE_CUDA_EMULATOR_FAULTS", faults));
    assert_eq!(lines, ["CUDA_ERROR_NO_BINARY_FOR_GPU"]);
}

#[test]
fn a_machine_can_have_no_device_and_one_little_memory() {
    let (lines, _) = run(probe(&["memory"]).env("ENTENTE_CUDA_EMULATOR_DEVICES", "0"));
    assert_eq!(lines, ["CUDA_ERROR_NO_DEVICE"]);
    let kernel = ["launch=emulator_shuffle"];
    let (lines, _) = run(probe(&kernel).env("ENTENTE_CUDA_EMULATOR_MEMORY_BYTES", "500"));
    assert_eq!(lines, ["CUDA_ERROR_OUT_OF_MEMORY"]);
}

#[test]
fn a_control_file_takes_the_device_from_a_process_that_runs() {
    let control = tempfile::NamedTempFile::new().unwrap();
    let launch = "launch=emulator_shuffle";
    let mut child = probe(&[launch, "pause", launch, "pause", launch, "memory"])
        .env("ENTENTE_CUDA_EMULATOR_CONTROL", control.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    assert_eq!(lines.next().unwrap(), "ok");
    // A fault of another process is none of this one's.
    let mut go_on = |text: String| {
        fs::write(control.path(), text).unwrap();
        child.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
    };
    go_on("pid=1 lost\n".to_owned());
    assert_eq!([lines.next().unwrap(), lines.next().unwrap()], ["ok", "ok"]);
    go_on("slow=1\nlost\n".to_owned());
    assert_eq!(lines.next().unwrap(), "ok");
    let lost = "CUDA_ERROR_ECC_UNCORRECTABLE";
    assert_eq!([lines.next().unwrap(), lines.next().unwrap()], [lost, lost]);
    assert!(child.wait().unwrap().success());
}
