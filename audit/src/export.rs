//! A log, or a part of one, in one file for an auditor: a line that says what it is, with the
//! checkpoint, then a line for each record with its number and the proof that it is in the tree.
//!
//! The form of every line is as strict as that of a record, so that no byte can be changed unseen.
//! Whether records are missing can be told of a whole log only; of a selection it cannot, which is
//! why a reader has to say that they will take one.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io::{self, BufRead, Write};

use serde::{Deserialize, Serialize};

use crate::Error;
use crate::checkpoint::Checkpoint;
use crate::folder::Folder;
use crate::merkle::{self, Hash, Nodes};
use crate::note::Verifier;
use crate::record::{Blob, Record};
use crate::tile::RECORD_LEN_MAX;

/// What the first line calls itself.
pub const FORMAT: &str = "entente-audit-export-1";
/// Longest line in bytes.
const LINE_LEN_MAX: usize = 4 * RECORD_LEN_MAX;
/// Subtrees whose hashes are kept while proofs are made.
const CACHE_LEN_MAX: usize = 1 << 16;

/// The first line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Head {
    checkpoint: String,
    format: String,
}

/// The others.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    index: u64,
    /// The hashes of its proof, one after the other.
    path: Blob,
    record: Record,
}

/// Writes the records that `wanted` picks of the tree that `checkpoint` is about; gives their number.
///
/// # Errors
/// The log cannot be read, or the file not be written.
pub fn write(
    folder: &Folder,
    checkpoint: &Checkpoint,
    wanted: impl Fn(u64, &Record) -> bool,
    to: &mut impl Write,
) -> Result<u64, Error> {
    let out = |result: io::Result<()>| {
        result.map_err(|error| Error::note("export", format!("cannot be written: {error}")))
    };
    let head = Head { checkpoint: checkpoint.note.clone(), format: FORMAT.to_owned() };
    out(writeln!(to, "{}", canonical(&head)?))?;
    let nodes = Cached { nodes: folder, known: RefCell::default() };
    let mut written = 0;
    for entry in folder.records() {
        let (index, bytes) = entry?;
        let record = Record::decode_at(index, &bytes)?;
        if !wanted(index, &record) {
            continue;
        }
        let path = merkle::inclusion(&nodes, index, checkpoint.tree.size)?;
        let line = Line { index, path: Blob(path.concat()), record };
        out(writeln!(to, "{}", canonical(&line)?))?;
        written += 1;
    }
    Ok(written)
}

/// JSON in the same form as a record's.
fn canonical(value: &impl Serialize) -> Result<String, Error> {
    let bad = |error: serde_json::Error| Error::note("export", error.to_string());
    let mut value = serde_json::to_value(value).map_err(bad)?;
    value.sort_all_objects();
    serde_json::to_string(&value).map_err(bad)
}

/// Reads an export, record by record, each of which is checked before it is given.
pub struct Reader<R> {
    lines: R,
    checkpoint: Checkpoint,
    /// The number that the next record has at least.
    next: u64,
    selection: bool,
}

impl<R: BufRead> Reader<R> {
    /// Reads the first line. `selection`: records may be missing.
    ///
    /// # Errors
    /// It is no export, or not one of the log that `verifier` vouches for.
    pub fn open(mut lines: R, verifier: &Verifier, selection: bool) -> Result<Self, Error> {
        let text = line(&mut lines)?.ok_or_else(|| Error::note("export", "it is empty"))?;
        let head: Head = parse(&text).map_err(|reason| Error::note("export", reason))?;
        if head.format != FORMAT {
            return Err(Error::note("export", format!("it is not of the form {FORMAT}")));
        }
        let checkpoint = Checkpoint::open(&head.checkpoint, verifier)?;
        Ok(Self { lines, checkpoint, next: 0, selection })
    }

    /// The checkpoint that everything in it is proved against.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// The next record and its number, or none at the end.
    ///
    /// # Errors
    /// It was changed, or one is missing before it, or stands in another place.
    pub fn next_record(&mut self) -> Result<Option<(u64, Record)>, Error> {
        let (next, tree) = (self.next, self.checkpoint.tree);
        let wrong = |index, reason: &str| Err(Error::Record { index, reason: reason.to_owned() });
        let Some(text) = line(&mut self.lines)? else {
            let complete = self.selection || next == tree.size;
            return if complete { Ok(None) } else { wrong(next, "it is missing") };
        };
        let line: Line = match parse(&text) {
            Ok(line) => line,
            Err(reason) => return wrong(next, &reason),
        };
        match line.index {
            index if index < next => {
                return wrong(
                    next,
                    &format!("record {index} comes in its place: twice, or out of order"),
                );
            }
            index if index > next && !self.selection => return wrong(next, "it is missing"),
            _ => {}
        }
        let record =
            line.record.encode().map_err(|reason| Error::Record { index: next, reason })?;
        let (path, rest) = line.path.0.as_chunks::<32>();
        let leaf = merkle::leaf_hash(&record);
        if !rest.is_empty() || !merkle::includes(path, line.index, leaf, tree.size, &tree.root) {
            let request =
                line.record.request().map_or(String::new(), |id| format!(" (request {id})"));
            let reason = format!("it{request} is not what was signed: its proof does not hold");
            return wrong(line.index, &reason);
        }
        self.next = line.index + 1;
        Ok(Some((line.index, line.record)))
    }
}

/// A line without its end; none at the end of the file.
fn line(lines: &mut impl BufRead) -> Result<Option<String>, Error> {
    let bad = |reason: &str| Err(Error::note("export", reason.to_owned()));
    let mut text = String::new();
    match io::Read::take(lines, LINE_LEN_MAX as u64).read_line(&mut text) {
        Ok(0) => Ok(None),
        Ok(_) if text.pop() == Some('\n') => Ok(Some(text)),
        Ok(_) => bad("its last line is cut off, or too long"),
        Err(error) => bad(&error.to_string()),
    }
}

/// Reads a line that must be in its one form.
fn parse<T: Serialize + for<'de> Deserialize<'de>>(text: &str) -> Result<T, String> {
    let value: T = serde_json::from_str(text).map_err(|error| error.to_string())?;
    match canonical(&value) {
        Ok(again) if again == text => Ok(value),
        _ => Err("it is not written in the canonical way".to_owned()),
    }
}

/// Remembers hashes of subtrees, which neighbouring records' proofs have in common.
struct Cached<'a, N> {
    nodes: &'a N,
    known: RefCell<BTreeMap<(u32, u64), Hash>>,
}

impl<N: Nodes> Nodes for Cached<'_, N> {
    fn node(&self, level: u32, index: u64) -> Result<Hash, Error> {
        if let Some(hash) = self.known.borrow().get(&(level, index)) {
            return Ok(*hash);
        }
        let hash = self.nodes.node(level, index)?;
        let mut known = self.known.borrow_mut();
        if known.len() >= CACHE_LEN_MAX {
            known.clear();
        }
        known.insert((level, index), hash);
        Ok(hash)
    }
}
