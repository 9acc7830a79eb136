//! Running other programs, from the root of the workspace, with their output in plain sight.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

/// The root of the workspace.
pub fn root() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().map_or_else(|| manifest.to_owned(), Path::to_owned)
}

/// A program to run with arguments, written as one line without quotes.
pub fn command(line: &str) -> Command {
    let mut words = line.split_whitespace();
    let mut command = Command::new(words.next().unwrap_or_default());
    command.args(words).current_dir(root());
    command
}

/// Runs a command and shows how long it took.
///
/// # Errors
/// When it cannot be started or does not succeed; the text is the command.
pub fn run(command: &mut Command) -> Result<(), String> {
    let line = describe(command);
    println!("\n$ {line}");
    let start = Instant::now();
    let status = command.status().map_err(|error| format!("cannot run {line}: {error}"))?;
    println!("# {:.0} s", start.elapsed().as_secs_f64());
    if status.success() { Ok(()) } else { Err(format!("failed ({status}): {line}")) }
}

/// Turns this process into the command, whose output and exit status are then the last ones.
/// Returns only when that fails, with the reason.
pub fn become_command(command: &mut Command) -> String {
    let line = describe(command);
    println!("\n$ {line}");
    format!("cannot run {line}: {}", command.exec())
}

/// What a command writes to standard output.
pub fn output(command: &mut Command) -> Result<String, String> {
    let line = describe(command);
    let output = command.output().map_err(|error| format!("cannot run {line}: {error}"))?;
    if !output.status.success() {
        let told = String::from_utf8_lossy(&output.stderr);
        return Err(format!("failed ({}): {line}\n{told}", output.status));
    }
    String::from_utf8(output.stdout).map_err(|error| format!("{line}: {error}"))
}

/// Whether a program is there and runs.
pub fn works(line: &str) -> bool {
    command(line).output().is_ok_and(|output| output.status.success())
}

fn describe(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}
