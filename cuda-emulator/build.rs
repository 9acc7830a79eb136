//! Compiles the kernels of the product, and those that try the engine, as C++ for this machine.
//!
//! Each kernel file becomes a source of its own: the emulator's prelude, then the file within a
//! nameless namespace, then a table of its kernels. The names are taken from what the preprocessor
//! makes of the file, so that kernels which a macro defines are found too. The files are copied
//! first: beside the copies lies the emulator's `device.cuh` in place of the real one.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::{env, fs};

const KERNELS: &str = "../model/src/kernels/cuda";

fn main() {
    // Tests load it by its path; whoever asks for libcuda.so afterwards gets it by this name.
    println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libcuda.so");
    println!("cargo::rerun-if-changed=build.rs");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    let sources = copy_sources(&out);
    let mut build = compiler(&out);
    build.file("device/state.cpp");
    let mut tables = Vec::new();
    for source in sources.iter().filter(|path| path.extension().is_some_and(|end| end == "cu")) {
        let stem = source.file_stem().and_then(|stem| stem.to_str()).expect("a name of ours");
        let names = kernel_names(&out, source);
        let path = out.join(format!("{stem}.cpp"));
        write(&path, &translation_unit(stem, source, &names));
        build.file(path);
        tables.push(stem.to_owned());
    }
    let path = out.join("tables.cpp");
    write(&path, &all_tables(&tables));
    build.file(path);
    build.compile("entente_emulated_kernels");
}

/// Copies all kernel files into one folder, with the emulator's own primitives among them.
fn copy_sources(out: &Path) -> Vec<PathBuf> {
    let folder = out.join("kernels");
    fs::create_dir_all(&folder).expect("OUT_DIR can be written");
    let mut copies = Vec::new();
    // In this order, so that our device.cuh takes the place of the product's.
    for from in [KERNELS, "kernels", "device"] {
        println!("cargo::rerun-if-changed={from}");
        for entry in fs::read_dir(from).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.extension().is_some_and(|end| end == "cu" || end == "cuh") {
                let copy = folder.join(entry.file_name());
                fs::copy(&path, &copy).expect("OUT_DIR can be written");
                copies.push(copy);
            }
        }
    }
    copies.sort();
    copies
}

/// How kernels are compiled, and seen by the preprocessor.
fn compiler(out: &Path) -> cc::Build {
    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").opt_level(2).debug(false).warnings(false);
    // Nothing here needs a C++ runtime, and so no test does.
    build.cpp_link_stdlib(None);
    build.include("device").include(out.join("kernels"));
    let flags = [
        "-fno-exceptions",
        "-fno-rtti",
        "-fno-threadsafe-statics",
        "-fvisibility=hidden",
        // Kernels read one piece of memory as words and as numbers, as nvcc permits.
        "-fno-strict-aliasing",
        // A product is rounded before it is added unless the source says fmaf.
        "-ffp-contract=off",
        // What a device faults on or leaves undefined: an address that is not aligned, an index
        // beyond an array, a sum that overflows.
        "-fsanitize=alignment,bounds,signed-integer-overflow,shift,integer-divide-by-zero",
        "-fsanitize-undefined-trap-on-error",
        "-Wno-unknown-pragmas",
    ];
    for flag in flags {
        build.flag(flag);
    }
    build
}

/// The names of a file's kernels, in order.
fn kernel_names(out: &Path, source: &Path) -> Vec<String> {
    let text = format!("#include \"{}\"\n", source.display());
    let probe = out.join("probe.cpp");
    write(&probe, &text);
    let expanded = compiler(out).file(&probe).expand();
    let expanded = String::from_utf8_lossy(&expanded);
    // Without the prelude the word is still there.
    expanded.split("__global__").skip(1).map(kernel_name).collect()
}

/// The name in what follows `__global__`: the first word before a bracket that is no attribute's.
fn kernel_name(declaration: &str) -> String {
    let mut rest = declaration;
    loop {
        let (before, after) = rest.split_once('(').expect("a kernel has parameters");
        let word = before.split_whitespace().last().unwrap_or_default();
        if word != "__launch_bounds__" {
            return word.to_owned();
        }
        let mut depth = 1;
        let closes = |character| {
            depth += i32::from(character == '(') - i32::from(character == ')');
            depth == 0
        };
        rest = &after[after.find(closes).expect("the bracket closes")..];
    }
}

fn translation_unit(stem: &str, source: &Path, names: &[String]) -> String {
    let mut text = String::from("#include \"prelude.h\"\n\nnamespace {\n");
    let _ = writeln!(text, "#include \"{}\"\n", source.display());
    let _ = writeln!(text, "constexpr Kernel kernels[] = {{");
    for name in names {
        let _ = writeln!(text, "    Entry<&{name}>::named(\"{name}\"),");
    }
    let _ = writeln!(text, "}};\n}}\n");
    let _ = writeln!(text, "extern const KernelTable table_{stem};");
    let _ = writeln!(text, "const KernelTable table_{stem} = {{kernels, {}}};", names.len());
    text
}

fn all_tables(stems: &[String]) -> String {
    let mut text = String::from("#include \"prelude.h\"\n\n");
    for stem in stems {
        let _ = writeln!(text, "extern const KernelTable table_{stem};");
    }
    let tables: String = stems.iter().map(|stem| format!("&table_{stem}, ")).collect();
    let _ = writeln!(text, "\nextern \"C\" {{");
    let _ = writeln!(
        text,
        "extern const KernelTable* const entente_emulator_tables[] = {{{tables}nullptr}};"
    );
    let _ = writeln!(text, "}}");
    text
}

fn write(path: &Path, text: &str) {
    fs::write(path, text).expect("OUT_DIR can be written");
}
