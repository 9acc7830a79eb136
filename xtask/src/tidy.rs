//! The house rules that no compiler knows.
//!
//! The sources are formatted by rustfmt, so their layout can be trusted: a function ends at the
//! first line that is a closing brace at the column where the function began. That makes a few
//! string comparisons as good as a parser here.

use std::fs;
use std::path::{Path, PathBuf};

use crate::limits;
use crate::shell::{command, output, root};

/// Lines of a function at most, its signature included.
const FUNCTION_LINES_MAX: usize = 70;

/// Lines of a file at most, its tests not counted.
const FILE_LINES_MAX: usize = 600;

/// Words that mark unfinished work; in two parts, so that this list does not find itself.
const LEFT_OVERS: [(&str, &str); 6] =
    [("TO", "DO"), ("FIX", "ME"), ("XX", "X"), ("todo", "!("), ("dbg", "!("), ("#[ign", "ore")];

/// First folders of paths that exist on somebody's machine only.
const MACHINE_FOLDERS: [&str; 5] = ["home", "root", "tmp", "work", "Users"];

/// Kinds of files that people write and read.
const TEXT_FILES: [&str; 10] =
    ["rs", "cu", "cuh", "md", "toml", "proto", "py", "yml", "yaml", "sh"];

/// Checks every source file that git knows or would add.
///
/// # Errors
/// One line for each broken rule, with file and line.
pub fn run() -> Result<(), String> {
    println!("\n$ cargo xtask tidy");
    let list = output(&mut command("git ls-files --cached --others --exclude-standard"))?;
    let mut faults = Vec::new();
    let mut count = 0;
    for name in list.lines() {
        let path = PathBuf::from(name);
        let kind = path.extension().and_then(|kind| kind.to_str()).unwrap_or_default();
        // A file that was deleted and not yet committed is still listed.
        let Ok(text) = fs::read_to_string(root().join(&path)) else { continue };
        if TEXT_FILES.contains(&kind) {
            count += 1;
            faults.extend(check(&path, &text));
        }
    }
    faults.extend(limits::check().err());
    if faults.is_empty() {
        println!("# {count} files are tidy");
        return Ok(());
    }
    Err(format!("{}\n{} untidy places", faults.join("\n"), faults.len()))
}

fn check(path: &Path, text: &str) -> Vec<String> {
    let mut faults = left_overs(text);
    if path.extension().is_some_and(|kind| kind == "rs") {
        let is_test = path.components().any(|part| part.as_os_str() == "tests")
            || path.file_name().is_some_and(|name| name == "tests.rs");
        if !text.starts_with("//!") {
            faults.push((1, "the file does not begin with an essay (//!)".to_owned()));
        }
        // A test is often a long table of cases, which splitting would not make clearer.
        if !is_test {
            faults.extend(long_code(text));
        }
    }
    faults.sort();
    faults.into_iter().map(|(line, fault)| format!("{}:{line}: {fault}", path.display())).collect()
}

fn left_overs(text: &str) -> Vec<(usize, String)> {
    let mut words: Vec<String> =
        LEFT_OVERS.iter().map(|(start, end)| format!("{start}{end}")).collect();
    for folder in MACHINE_FOLDERS {
        // Only where a path begins: after white space, a quote or a bracket.
        words.extend([" ", "\"", "'", "(", "`", "="].map(|before| format!("{before}/{folder}/")));
    }
    let mut faults = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let found = words.iter().filter(|word| line.contains(word.as_str()));
        faults.extend(found.map(|word| (number + 1, format!("{word:?} must not be here"))));
    }
    faults
}

fn long_code(text: &str) -> Vec<(usize, String)> {
    // The unit tests of a file stand at its end.
    let lines: Vec<&str> = text.lines().take_while(|line| *line != "mod tests {").collect();
    let mut faults = Vec::new();
    if lines.len() > FILE_LINES_MAX {
        let fault = format!("{} lines without tests, at most {FILE_LINES_MAX}", lines.len());
        faults.push((FILE_LINES_MAX, fault));
    }
    for (start, line) in lines.iter().enumerate().filter(|(_, line)| begins_function(line)) {
        let indent = &line[..line.len() - line.trim_start().len()];
        let end = format!("{indent}}}");
        let rest = &lines[start..];
        // A declaration without a body ends in a semicolon before any brace closes.
        let body = rest.iter().position(|line| line.ends_with('{') || line.ends_with(';'));
        let has_body = body.is_some_and(|at| rest[at].ends_with('{'));
        let Some(length) = rest.iter().position(|line| *line == end).filter(|_| has_body) else {
            continue;
        };
        if length + 1 > FUNCTION_LINES_MAX {
            let fault = format!("a function of {} lines, at most {FUNCTION_LINES_MAX}", length + 1);
            faults.push((start + 1, fault));
        }
    }
    faults
}

/// Whether a line begins a function, after any of the words that may stand before `fn`.
fn begins_function(line: &str) -> bool {
    let line = line.trim_start();
    let before = ["pub", "pub(crate)", "pub(super)", "const", "async", "unsafe", "extern", "\"C\""];
    line.split(' ').find(|word| !before.contains(word)) == Some("fn")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn function(lines: usize) -> String {
        let body = "    let a = 1;\n".repeat(lines - 2);
        format!("//! Essay.\n\npub(crate) async fn long() {{\n{body}}}\n")
    }

    fn check_text(text: &str) -> Vec<String> {
        check(Path::new("src/a.rs"), text)
    }

    #[test]
    fn a_function_has_at_most_70_lines() {
        assert_eq!(check_text(&function(70)), [""; 0]);
        let faults = check_text(&function(71));
        assert_eq!(faults, ["src/a.rs:3: a function of 71 lines, at most 70"]);
    }

    #[test]
    fn tests_do_not_count_for_the_length_of_a_file() {
        let code = format!("//! Essay.\n{}", "const A: u8 = 1;\n".repeat(599));
        let tests = format!("mod tests {{\n{}}}\n", "    // a\n".repeat(700));
        assert_eq!(check_text(&format!("{code}{tests}")), [""; 0]);
        assert_eq!(check_text(&format!("{code}{code}")).len(), 1);
        assert_eq!(check(Path::new("tests/a.rs"), &format!("{code}{code}")), [""; 0]);
    }

    #[test]
    fn every_source_file_begins_with_an_essay() {
        assert_eq!(check_text("fn main() {}\n").len(), 1);
        assert_eq!(check(Path::new("README.md"), "# Title\n"), [""; 0]);
    }

    #[test]
    fn unfinished_work_and_paths_of_a_machine_are_found() {
        for (start, end) in LEFT_OVERS {
            assert_eq!(check_text(&format!("//! Essay.\n// {start}{end}\n")).len(), 1, "{start}");
        }
        for folder in MACHINE_FOLDERS {
            assert_eq!(check_text(&format!("//! Essay.\n// see /{folder}/a\n")).len(), 1);
        }
        assert_eq!(check_text("//! Essay.\n// see https://a.example/home/a\n"), [""; 0]);
    }
}
