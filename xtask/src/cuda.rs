//! Compiles the CUDA kernels, which needs no GPU: a kernel that no compiler takes fails here.
//!
//! Two compilers, of two versions of the toolkit: nvcc, and the run-time compiler in the way in
//! which the program itself uses it. Each for the oldest architecture that the kernels run on and
//! for the one that they are made for. What they tell of registers, shared memory and spills is
//! printed as a table, and a kernel that spills fails: its accumulators would be in memory.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use crate::setup;
use crate::shell::{command, root};

const SOURCES: &str = "model/src/kernels/cuda";

/// Where compilers and what they make are kept.
const FOLDER: &str = "target/cuda";

const ARCHITECTURES: [&str; 2] = ["sm_80", "sm_90"];

/// How the program itself has them compiled.
const OPTIONS: [&str; 2] = ["--std=c++17", "--fmad=false"];

/// What a compiler tells of one kernel.
#[derive(Debug, Default, PartialEq, Eq)]
struct Usage {
    kernel: String,
    registers: u32,
    /// Of a block; what a kernel is given at its launch is added by [`dynamic_shared_bytes`].
    shared_bytes: u32,
    spill_bytes: u32,
}

/// Compiles all kernels with all compilers for all architectures.
///
/// # Errors
/// A compiler refuses or warns, tells nothing of some kernel, or a kernel spills.
pub fn run() -> Result<(), String> {
    let tools = setup::python_environment(FOLDER, "xtask/cuda/requirements.txt", "--no-deps")?;
    println!("\n$ cargo xtask cuda");
    let (program, kernels) = program()?;
    let mut faults = Vec::new();
    for architecture in ARCHITECTURES {
        let compilers = [
            ("nvcc 13.0", nvcc(&tools, &program, architecture)),
            ("nvrtc 12.9", nvrtc(&tools, &program, architecture)),
        ];
        for (name, mut compiler) in compilers {
            let mut usages = usages(&told(&mut compiler)?);
            for usage in &mut usages {
                usage.shared_bytes += dynamic_shared_bytes(&usage.kernel)?;
            }
            println!("\n{name} for {architecture}\n{}", table(&usages));
            if usages.len() != kernels {
                let count = usages.len();
                faults.push(format!(
                    "{name} told of {count} kernels for {architecture}, not {kernels}"
                ));
            }
            let spilling = usages.iter().filter(|usage| usage.spill_bytes > 0);
            faults.extend(spilling.map(|u| format!("{} spills for {architecture}", u.kernel)));
        }
    }
    if faults.is_empty() { Ok(()) } else { Err(faults.join("\n")) }
}

/// All kernels as one program, as the program itself compiles them, and how many there are.
fn program() -> Result<(PathBuf, usize), String> {
    let read = |error| format!("{SOURCES}: {error}");
    let (mut text, mut kernels) = (String::new(), 0);
    let entries = root().join(SOURCES).read_dir().map_err(read)?;
    let mut files: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    files.retain(|file| file.extension().is_some_and(|kind| kind == "cu"));
    files.sort();
    for file in &files {
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        text += &format!("#include \"{name}\"\n");
        kernels += fs::read_to_string(file).map_err(read)?.matches("__global__").count();
    }
    let path = root().join(FOLDER).join("program.cu");
    fs::write(&path, text).map_err(|error| format!("{}: {error}", path.display()))?;
    Ok((path, kernels))
}

/// Shared memory that a block is given when the kernel is launched, by the kind of its tiles and the
/// form of its weights.
fn dynamic_shared_bytes(kernel: &str) -> Result<u32, String> {
    let path = format!("{SOURCES}/geometry.cuh");
    let text = fs::read_to_string(root().join(&path)).map_err(|e| format!("{path}: {e}"))?;
    let constant = |name: &str| {
        let value = text.split_once(&format!("constexpr int {name} = "))?.1;
        value.split(';').next()?.parse().ok()
    };
    let (form, kernel) = match kernel.strip_prefix("fp8_") {
        Some(kernel) => ("FP8_", kernel),
        None => ("", kernel),
    };
    let name = match kernel.rsplit('_').next() {
        Some("16") => format!("{form}DECODE_SHARED_BYTES"),
        Some("64" | "128") => format!("{form}PREFILL_SHARED_BYTES"),
        _ => return Ok(0),
    };
    constant(&name).ok_or_else(|| format!("{path}: no {name}"))
}

/// nvcc finds its parts beside itself and the host's preprocessor on the path.
fn nvcc(tools: &setup::Python, program: &PathBuf, architecture: &str) -> Command {
    let mut nvcc = Command::new(tools.packages.join("nvidia/cu13/bin/nvcc"));
    nvcc.args(OPTIONS).args(["--cubin", "--Werror=all-warnings", "--ptxas-options=--verbose"]);
    nvcc.arg(format!("--gpu-architecture={architecture}")).arg(format!("-I{SOURCES}"));
    nvcc.arg("--output-file").arg(program.with_extension("cubin")).arg(program);
    nvcc.current_dir(root());
    nvcc
}

fn nvrtc(tools: &setup::Python, program: &PathBuf, architecture: &str) -> Command {
    let mut nvrtc = command(&format!("{} xtask/cuda/nvrtc.py", tools.program));
    nvrtc.arg(tools.packages.join("nvidia/cuda_nvrtc/lib/libnvrtc.so.12"));
    nvrtc.arg(program).args([SOURCES, architecture]).args(OPTIONS);
    nvrtc
}

/// All that a compiler writes.
fn told(command: &mut Command) -> Result<String, String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(|error| format!("cannot run {name}: {error}"))?;
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    if output.status.success() {
        Ok(text)
    } else {
        Err(format!("{name} refuses the kernels:\n{text}"))
    }
}

/// What ptxas tells with `--verbose`, kernel by kernel.
fn usages(told: &str) -> Vec<Usage> {
    let mut usages: Vec<Usage> = Vec::new();
    for line in told.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            let kernel = rest.split('\'').next().unwrap_or_default().to_owned();
            usages.push(Usage { kernel, ..Usage::default() });
        }
        let Some(usage) = usages.last_mut() else { continue };
        for part in line.split([',', ':']) {
            let mut words = part.split_whitespace().skip_while(|word| *word == "Used");
            let number = words.next().and_then(|word| word.parse().ok());
            let Some(number) = number else { continue };
            match words.collect::<Vec<_>>()[..] {
                ["registers"] => usage.registers = number,
                ["bytes", "smem"] => usage.shared_bytes = number,
                ["bytes", "spill", "stores" | "loads"] => usage.spill_bytes += number,
                _ => {}
            }
        }
    }
    usages.sort_by(|a, b| a.kernel.cmp(&b.kernel));
    usages
}

fn table(usages: &[Usage]) -> String {
    let row = |kernel: &str, registers: &str, shared: &str, spills: &str| {
        format!("  {kernel:<20} {registers:>9} {shared:>12} {spills:>11}\n")
    };
    let mut table = row("kernel", "registers", "shared bytes", "spill bytes");
    for usage in usages {
        let [registers, shared, spills] =
            [usage.registers, usage.shared_bytes, usage.spill_bytes].map(|n| n.to_string());
        table += &row(&usage.kernel, &registers, &shared, &spills);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_ptxas_tells_is_understood() {
        let told = "\
ptxas info    : Compiling entry function 'spilling' for 'sm_80'
ptxas info    : Function properties for spilling
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 80 registers, used 1 barriers, 8 bytes cumulative stack size, 24576 bytes smem
ptxas info    : Compiling entry function 'add' for 'sm_80'
ptxas info    : Function properties for add
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, used 0 barriers, 372 bytes cmem[0]
";
        let usage = |kernel: &str, registers, shared_bytes, spill_bytes| Usage {
            kernel: kernel.to_owned(),
            registers,
            shared_bytes,
            spill_bytes,
        };
        assert_eq!(usages(told), [usage("add", 10, 0, 0), usage("spilling", 80, 24_576, 16)]);
        assert_eq!(usages("no kernel at all"), []);
    }
}
