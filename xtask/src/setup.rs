//! Brings a fresh Debian machine to where the checks can run. Installs only what is missing.

use std::path::PathBuf;

use crate::shell::{command, output, root, run, works};

/// A tool that cargo builds, at the version that the checks are written for.
struct Tool {
    probe: &'static str,
    package: &'static str,
}

const NEXTEST: Tool = Tool { probe: "cargo nextest --version", package: "cargo-nextest@0.9.151" };
const DENY: Tool = Tool { probe: "cargo deny --version", package: "cargo-deny@0.20.2" };

/// Makes sure that everything is there.
pub fn run_all() -> Result<(), String> {
    // The examples in the README are run as they are printed.
    if !works("curl --version") {
        debian_package("curl")?;
    }
    // The mirror of the membership is tested beside a real etcd; its client is built with protoc.
    if !works("etcd --version") {
        debian_package("etcd-server")?;
    }
    if !works("protoc --version") || !works("test -f /usr/include/google/protobuf/any.proto") {
        debian_package("protobuf-compiler libprotobuf-dev")?;
    }
    // libFuzzer is C++, and so are the kernels for GPUs as tests run them.
    if !works("c++ --version") {
        debian_package("g++")?;
    }
    for component in ["rustfmt", "clippy"] {
        if !works(&format!("cargo {} --version", component.trim_start_matches("rust"))) {
            run(&mut command(&format!("rustup component add {component}")))?;
        }
    }
    install(&NEXTEST)?;
    install(&DENY)?;
    python_clients()
}

/// The Python clients that tests drive a cluster with, in an environment of their own.
fn python_clients() -> Result<(), String> {
    python_environment("target/clients", "tests/clients/requirements.txt", "").map(drop)
}

/// A Python environment.
pub struct Python {
    /// The interpreter, from the root of the workspace.
    pub program: String,
    /// Where packages are.
    pub packages: PathBuf,
}

/// An environment in `folder` with what `wanted` lists; made anew when that file changes. `flags` go
/// to pip.
pub fn python_environment(folder: &str, wanted: &str, flags: &str) -> Result<Python, String> {
    let stamp = root().join(folder).join("requirements.txt");
    let program = format!("{folder}/bin/python");
    let wanted_text = std::fs::read_to_string(root().join(wanted))
        .map_err(|error| format!("cannot read {wanted}: {error}"))?;
    if !std::fs::read_to_string(&stamp).is_ok_and(|have| have == wanted_text) {
        if !works("python3 -m venv --help") || !works("python3 -m ensurepip --version") {
            debian_package("python3-venv")?;
        }
        run(&mut command(&format!("python3 -m venv {folder}")))?;
        run(&mut command(&format!("{program} -m pip install --quiet {flags} -r {wanted}")))?;
        std::fs::write(&stamp, wanted_text)
            .map_err(|error| format!("{}: {error}", stamp.display()))?;
    }
    let asked = "import sysconfig;print(sysconfig.get_path('purelib'))";
    let packages = output(command(&program).args(["-c", asked]))?;
    Ok(Python { program, packages: PathBuf::from(packages.trim()) })
}

fn debian_package(name: &str) -> Result<(), String> {
    let root = works("test -w /usr/bin");
    let sudo = if root { "" } else { "sudo " };
    run(&mut command(&format!("{sudo}apt-get update -qq")))?;
    run(&mut command(&format!("{sudo}apt-get install -y -qq --no-install-recommends {name}")))
}

/// Built without optimisation: these tools wait for others most of the time, and to optimise them
/// would take longer than all that they do here.
fn install(tool: &Tool) -> Result<(), String> {
    if works(tool.probe) {
        return Ok(());
    }
    let line = format!("cargo install --locked --debug --no-default-features {}", tool.package);
    run(command(&line).env("CARGO_PROFILE_DEV_DEBUG", "0"))
}
