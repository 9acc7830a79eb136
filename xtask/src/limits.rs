//! `docs/limits.md`: every bound of the program, as the sources have it.
//!
//! A bound is a constant with `MAX` in its name that is not in a test, and its doc comment says what
//! it bounds. The page has an introduction that people write; what follows the mark is put together
//! here, so that the two cannot disagree: `tidy` compares, `cargo xtask limits` writes.

use std::fmt::Write;
use std::fs;
use std::path::Path;

use crate::shell::{command, output, root};

/// The page.
const PAGE: &str = "docs/limits.md";

/// Ends what people write.
const MARK: &str = "<!-- From here on the sources speak: `cargo xtask limits` writes it. -->\n";

/// Folders whose constants bound the product: its crates.
const CRATES: [&str; 9] =
    ["audit", "cli", "coordinator", "expert-node", "membership", "model", "proto", "router", "tls"];

/// One bound.
struct Limit {
    name: String,
    value: String,
    meaning: String,
}

/// Writes the part of the page that follows from the sources.
///
/// # Errors
/// The page cannot be read or written, or lacks its mark.
pub fn write() -> Result<(), String> {
    let page = page()?;
    let path = root().join(PAGE);
    fs::write(path, wanted(&page)?).map_err(|error| format!("{PAGE}: {error}"))
}

/// Whether the page says what the sources say.
///
/// # Errors
/// It does not, and how to mend that.
pub fn check() -> Result<(), String> {
    let page = page()?;
    if wanted(&page)? == page {
        return Ok(());
    }
    Err(format!("{PAGE} and the sources do not agree; `cargo xtask limits` writes it anew"))
}

fn page() -> Result<String, String> {
    fs::read_to_string(root().join(PAGE)).map_err(|error| format!("{PAGE}: {error}"))
}

fn wanted(page: &str) -> Result<String, String> {
    let (people, _) = page.split_once(MARK).ok_or(format!("{PAGE} has no line {MARK}"))?;
    Ok(format!("{people}{MARK}{}", tables()?))
}

/// A table for each file that has a bound.
fn tables() -> Result<String, String> {
    let list = output(&mut command("git ls-files --cached --others --exclude-standard"))?;
    let mut names: Vec<&str> = list.lines().filter(|name| has_bounds(name)).collect();
    names.sort_unstable();
    let mut text = String::new();
    for name in names {
        // A file that was deleted and not yet committed is still listed.
        let Ok(source) = fs::read_to_string(root().join(name)) else { continue };
        let limits = limits(&source);
        if limits.is_empty() {
            continue;
        }
        let _ = write!(text, "\n### {name}\n\n| bound | value | of what |\n|---|---|---|\n");
        for Limit { name, value, meaning } in limits {
            let _ = writeln!(text, "| `{name}` | `{value}` | {meaning} |");
        }
    }
    Ok(text)
}

fn has_bounds(name: &str) -> bool {
    let path = Path::new(name);
    let mut parts = path.iter().filter_map(|part| part.to_str());
    let is_product = parts.next().is_some_and(|first| CRATES.contains(&first));
    let is_source = parts.next() == Some("src");
    let is_test = name.ends_with("tests.rs") || name.contains("/tests/");
    is_product && is_source && !is_test && name.ends_with(".rs")
}

/// The bounds of one file, in its order.
fn limits(source: &str) -> Vec<Limit> {
    // The unit tests of a file stand at its end.
    let lines: Vec<&str> = source.lines().take_while(|line| *line != "mod tests {").collect();
    let limit = |(at, line): (usize, &&str)| {
        let (_, rest) = line
            .trim_start()
            .split_once("const ")
            .filter(|(before, _)| before.is_empty() || before.starts_with("pub"))?;
        let (name, _) = rest.split_once(':')?;
        if !name.split('_').any(|word| word == "MAX") {
            return None;
        }
        // rustfmt breaks what is too long for a line; the value goes on to the semicolon.
        let mut whole = String::new();
        for line in &lines[at..] {
            whole.push_str(line.trim());
            whole.push(' ');
            if line.ends_with(';') {
                break;
            }
        }
        let value = whole.split_once("= ")?.1.trim_end().trim_end_matches(';').replace('|', "\\|");
        Some(Limit { name: name.to_owned(), value, meaning: meaning(&lines[..at]) })
    };
    lines.iter().enumerate().filter_map(limit).collect()
}

/// The first sentence of the doc comment that ends these lines. Constants may share one.
fn meaning(lines: &[&str]) -> String {
    let has_none = |line: &&&str| line.starts_with("#[") || line.contains("const ");
    let above = lines.iter().rev().skip_while(has_none);
    let docs = above.map_while(|line| line.trim_start().strip_prefix("///"));
    let mut docs: Vec<&str> = docs.map(str::trim).collect();
    docs.reverse();
    let text = docs.join(" ");
    let sentence = text.find(". ").map_or(text.as_str(), |end| &text[..=end]);
    // Links of rustdoc lead nowhere from here.
    sentence.replace("[`", "`").replace("`]", "`").replace('|', "\\|")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_are_found_with_their_value_and_the_first_sentence_about_them() {
        let source = "
/// Bytes of a [`Frame`] at most. More is refused.
#[rustfmt::skip]
pub(crate) const FRAME_BYTES_MAX: usize =
    1 << 20;
const MAXIMAL: u8 = 1;
    /// Pause | rest.
    const PAUSE_MAX_US: u64 = 7;
mod tests {
const OTHER_MAX: u8 = 1;
";
        let found: Vec<_> =
            limits(source).into_iter().map(|l| [l.name, l.value, l.meaning]).collect();
        assert_eq!(found[0], ["FRAME_BYTES_MAX", "1 << 20", "Bytes of a `Frame` at most."]);
        assert_eq!(found[1], ["PAUSE_MAX_US", "7", "Pause \\| rest."]);
        assert_eq!(found.len(), 2);
    }
}
