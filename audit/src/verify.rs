//! Checks a log, or an export of one, without asking anybody: that every record is what was signed,
//! and that the records do not contradict each other.
//!
//! What is checked of records beyond their bytes:
//! - rows of a request went to regions only that it and its tenant's policy allow, the coordinator's
//!   own included;
//! - a certificate is what its fingerprint says, and of the node and region that records say;
//! - whatever a node signed that it computed for a request, the request's record says was sent to
//!   it, and no less. A node that signed nothing (killed, cut off) is listed, and fails nothing.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use entente_proto::ids::{NodeName, Region, RequestId};

use crate::checkpoint::Checkpoint;
use crate::cosign::{self, CosignerKey};
use crate::export::Reader;
use crate::files::read;
use crate::folder::{CHECKPOINTS, COSIGNED, Folder};
use crate::merkle::{self, Tree};
use crate::note::Verifier;
use crate::proof::{self, Proof};
use crate::record::{Certificate, Digest, Record, Request, Statement};
use crate::tile::{self, Edges, Kind, Tile, Tiles, WIDTH};
use crate::{Error, at};

/// Longest file of checkpoints that is looked at, in bytes.
const CHECKPOINTS_LEN_MAX: u64 = 1 << 30;

/// Reads certificates and what nodes sign with them, which this crate cannot.
pub trait Notary {
    /// Whose a certificate is.
    fn identity(&self, certificate: &[u8]) -> Result<(NodeName, Region), String>;
    /// What a statement says, if the certificate's key has signed it.
    fn stated(&self, certificate: &[u8], statement: &Statement) -> Result<Stated, String>;
}

/// What a node says that it computed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stated {
    /// Which node.
    pub node: NodeName,
    /// Where it says that it stands.
    pub region: Region,
    /// Which start of it speaks.
    pub incarnation: u64,
    /// Rows by request, counted since that start: a later statement stands for an earlier one.
    pub rows: Vec<(RequestId, u64)>,
}

/// What was found of a log that holds what it says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verified {
    /// The checkpoint that everything was checked against.
    pub checkpoint: Checkpoint,
    /// Records that were checked.
    pub records: u64,
    /// Records of the folder that are under no checkpoint yet.
    pub unsigned: u64,
    /// Nodes that signed nothing about a request whose rows they were sent.
    pub silent: Vec<(RequestId, NodeName)>,
    /// Statements of nodes that were checked.
    pub statements: u64,
}

/// Checks a log's folder, an export, or a proof, whichever `path` is.
///
/// # Errors
/// The first thing that is wrong; the text names the record.
pub fn path(
    path: &Path,
    verifier: &Verifier,
    notary: &dyn Notary,
    selection: bool,
) -> Result<Verified, Error> {
    if path.is_dir() {
        return folder(path, verifier, notary);
    }
    let mut start = [0; proof::MAGIC.len()];
    let len = at(path, File::open(path).and_then(|mut file| file.read(&mut start)))?;
    if start[..len] == *proof::MAGIC.as_bytes() {
        return one(path, verifier, notary);
    }
    export(BufReader::new(at(path, File::open(path))?), verifier, notary, selection)
}

/// Who else has seen a log grow, and how far.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cosigned {
    /// The name of the key.
    pub name: String,
    /// Records under the checkpoint that it cosigned; of a folder these may be fewer than all.
    pub size: u64,
    /// When it did, seconds since 1970 by its own clock.
    pub time_s: u64,
}

/// Checks that `key` has cosigned what was verified of `path`: its checkpoint, or, for a folder whose
/// latest checkpoint is too young for that, the latest one that anybody has cosigned.
///
/// # Errors
/// It has not, or it has cosigned another history.
pub fn cosigned(
    path: &Path,
    verified: &Verified,
    verifier: &Verifier,
    key: &CosignerKey,
) -> Result<Cosigned, Error> {
    let tree = &verified.checkpoint.tree;
    let by = |size, time_s| Cosigned { name: key.name().to_owned(), size, time_s };
    let error = match cosign::time_s(&verified.checkpoint.note, key) {
        Ok(time_s) => return Ok(by(tree.size, time_s)),
        Err(error) => error,
    };
    let note = if path.is_dir() { Folder::cosigned_note(path)? } else { None };
    let Some(note) = note else { return Err(error) };
    let earlier = Checkpoint::open(&note, verifier)?;
    let time_s = cosign::time_s(&earlier.note, key)?;
    let size = earlier.tree.size;
    if size > tree.size || merkle::root(&Folder::new(path, tree.size), size)? != earlier.tree.root {
        let reason = "it is of another history than the log: forked or rolled back";
        return Err(Error::file(path.join(COSIGNED), reason));
    }
    Ok(by(size, time_s))
}

/// Checks a proof that has its record beside it.
fn one(path: &Path, verifier: &Verifier, notary: &dyn Notary) -> Result<Verified, Error> {
    let bytes = read(path, 1 << 20)?.unwrap_or_default();
    let text = String::from_utf8(bytes).map_err(|_| Error::file(path, "it is not text"))?;
    let proof = Proof::parse(&text)?;
    let record = proof.extra.as_deref();
    let record = record.ok_or_else(|| Error::file(path, "it has no record beside it"))?;
    let checkpoint = proof.check(record, verifier)?;
    let mut checker = Checker::new(notary, true);
    checker.check(proof.index, &Record::decode_at(proof.index, record)?)?;
    Ok(checker.end(checkpoint, 0))
}

/// Checks an export. `selection`: it need not be all of the log.
///
/// # Errors
/// As [`path`].
pub fn export(
    file: impl std::io::BufRead,
    verifier: &Verifier,
    notary: &dyn Notary,
    selection: bool,
) -> Result<Verified, Error> {
    let mut reader = Reader::open(file, verifier, selection)?;
    let mut checker = Checker::new(notary, selection);
    while let Some((index, record)) = reader.next_record()? {
        checker.check(index, &record)?;
    }
    Ok(checker.end(reader.checkpoint().clone(), 0))
}

/// Checks a log's folder: every record, every tile, and that they lead to the checkpoint.
///
/// # Errors
/// As [`path`].
pub fn folder(root: &Path, verifier: &Verifier, notary: &dyn Notary) -> Result<Verified, Error> {
    let checkpoint = Checkpoint::open(&Folder::note(root)?, verifier)?;
    let view = Folder::new(root, checkpoint.tree.size);
    let mut checker = Checker::new(notary, false);
    let tree = records(&view, &mut checker)?;
    signed(root, &view, verifier, &checkpoint, tree)?;
    other_tiles(&view)?;
    let unsigned = view.unsigned()?.len() as u64;
    Ok(checker.end(checkpoint, unsigned))
}

/// Reads all records and compares the tiles with what they make; gives the tree.
fn records(view: &Folder, checker: &mut Checker) -> Result<Tree, Error> {
    let mut edges = Edges::default();
    for index in 0..view.size().div_ceil(WIDTH) {
        let bundle = view.bundle(index)?;
        let hashes = view.hashes(0, index)?;
        for (at, bytes) in bundle.iter().enumerate() {
            let number = index * WIDTH + at as u64;
            let leaf = merkle::leaf_hash(bytes);
            if hashes.get(at) != Some(&leaf) {
                return Err(changed(number, bytes));
            }
            checker.check(number, &Record::decode_at(number, bytes)?)?;
            for (tile, hashes) in edges.push(leaf) {
                compare(view, tile, &tile::write_hashes(&hashes))?;
            }
        }
    }
    for tile in Tile::partial(view.size()) {
        if let Kind::Hashes(level) = tile.kind {
            compare(view, tile, &tile::write_hashes(edges.level(level)))?;
        }
    }
    Ok(edges.tree())
}

fn changed(index: u64, bytes: &[u8]) -> Error {
    let request = Record::decode(bytes).ok().and_then(|record| record.request());
    let request = request.map_or(String::new(), |id| format!(" (request {id})"));
    let tile = Tile::full(Kind::Hashes(0), index / WIDTH).path();
    let reason =
        format!("it{request} is not what its hash in {tile} says: one of them was changed");
    Error::Record { index, reason }
}

/// Compares a hash tile on disk with what the records make it.
fn compare(view: &Folder, tile: Tile, wanted: &[u8]) -> Result<(), Error> {
    let (path, bytes) = view.file(tile.kind, tile.index)?;
    // A partial tile may have become a full one meanwhile.
    let lens = [wanted.len(), 32 * WIDTH as usize];
    if bytes.get(..wanted.len()) == Some(wanted) && lens.contains(&bytes.len()) {
        return Ok(());
    }
    Err(Error::file(
        path,
        format!("it is not what the records from {} on make", tile.first_record()),
    ))
}

/// Compares the tree with the latest checkpoint, and with all earlier ones that are kept: where they
/// part is where the log was forked.
fn signed(
    root: &Path,
    view: &Folder,
    verifier: &Verifier,
    latest: &Checkpoint,
    tree: Tree,
) -> Result<(), Error> {
    let mut sound = 0;
    let kept = read(&root.join(CHECKPOINTS), CHECKPOINTS_LEN_MAX)?.unwrap_or_default();
    let kept = String::from_utf8_lossy(&kept).into_owned();
    let notes = kept.lines().filter_map(|line| serde_json::from_str::<String>(line).ok());
    let earlier = notes.filter_map(|note| Checkpoint::open(&note, verifier).ok());
    for checkpoint in earlier.chain([latest.clone()]) {
        let size = checkpoint.tree.size;
        // One that is beyond the latest was signed and then hidden.
        let same = size <= tree.size && merkle::root(view, size)? == checkpoint.tree.root;
        if !same {
            let reason = format!(
                "from it on, up to record {size}, the log is not what was signed: forked or rolled back"
            );
            return Err(Error::Record { index: sound, reason });
        }
        sound = size;
    }
    Ok(())
}

/// Checks the files that the tree as it is now does not need: partial tiles of earlier checkpoints.
fn other_tiles(view: &Folder) -> Result<(), Error> {
    for path in view.tile_files()? {
        // A file that was about to be written when the power failed.
        if path.ends_with(".part") {
            continue;
        }
        let tile = Tile::parse(&path);
        let tile = tile.ok_or_else(|| Error::file(&path, "no log has such a file"))?;
        let level = match tile.kind {
            Kind::Hashes(level) => level,
            Kind::Entries => 0,
        };
        let count = view.size().checked_shr(tile::HEIGHT * level).unwrap_or(0);
        let ends = tile.index.saturating_mul(WIDTH).saturating_add(tile.width);
        if ends > count {
            // It is about records that are not under the checkpoint yet.
            continue;
        }
        let (_, wanted) = view.file(tile.kind, tile.index)?;
        let wanted = match tile.kind {
            Kind::Hashes(_) => wanted[..32 * tile.width as usize].to_vec(),
            Kind::Entries => {
                let records = tile::read_records(&wanted).0;
                let len =
                    records[..tile.width as usize].iter().map(|record| 2 + record.len()).sum();
                wanted[..len].to_vec()
            }
        };
        if view.raw(&path)? != wanted {
            let first = tile.first_record();
            return Err(Error::file(
                path,
                format!("it is not what the records from {first} on make"),
            ));
        }
    }
    Ok(())
}

/// What must be known of earlier records to check later ones.
struct Checker<'a> {
    notary: &'a dyn Notary,
    /// Whether records may be missing.
    selection: bool,
    records: u64,
    statements: u64,
    /// Certificates, and whose they are.
    certificates: BTreeMap<Digest, (Vec<u8>, NodeName, Region)>,
    /// Whose records said they are before they were in the log, and which request's record did.
    claimed: BTreeMap<Digest, (NodeName, Region, RequestId)>,
    requests: BTreeMap<RequestId, Sent>,
}

/// What a request's record says.
struct Sent {
    omitted: bool,
    /// By start of a node, whichever certificates it showed meanwhile.
    nodes: BTreeMap<(NodeName, u64), Rows>,
}

/// What one start of a node had of a request.
#[derive(Default)]
struct Rows {
    sent: u64,
    computed: Option<u64>,
    /// It has a certificate, and so could sign.
    signs: bool,
}

impl<'a> Checker<'a> {
    fn new(notary: &'a dyn Notary, selection: bool) -> Self {
        let (certificates, claimed) = (BTreeMap::new(), BTreeMap::new());
        let requests = BTreeMap::new();
        Self { notary, selection, records: 0, statements: 0, certificates, claimed, requests }
    }

    fn check(&mut self, index: u64, record: &Record) -> Result<(), Error> {
        self.records += 1;
        let checked = match record {
            Record::Request(request) => self.request(request),
            Record::Certificate(certificate) => self.certificate(certificate),
            Record::Statement(statement) => self.statement(statement),
            Record::Refused(_) | Record::Admin(_) => Ok(()),
        };
        checked.map_err(|reason| Error::Record { index, reason })
    }

    fn request(&mut self, request: &Request) -> Result<(), String> {
        let wrong = |reason: String| Err(format!("request {}: {reason}", request.id));
        if let Some(policy) = &request.policy
            && let Some(region) = request.allowed.difference(&policy.allowed).next()
        {
            return wrong(format!("it was allowed {region}, which its tenant's policy is not"));
        }
        let (node, region) = (&request.coordinator.node, request.coordinator.region);
        let places = request.nodes.iter().map(|node| (&node.node, node.region));
        for (node, region) in places.chain([(node, region)]) {
            if !request.allowed.contains(&region) {
                return wrong(format!("{node} in {region} had it, where it was not allowed"));
            }
        }
        let mut nodes = BTreeMap::new();
        for node in &request.nodes {
            let rows: &mut Rows = nodes.entry((node.node.clone(), node.incarnation)).or_default();
            rows.sent = rows.sent.saturating_add(node.rows);
            rows.signs = node.certificate.is_some();
            let Some(fingerprint) = node.certificate else { continue };
            // A node's certificate comes with its first statement, which is after its first request.
            let known =
                self.certificates.get(&fingerprint).map(|(_, name, region)| (name, *region));
            let claimed = self.claimed.get(&fingerprint).map(|(name, region, _)| (name, *region));
            if let Some((name, region)) = known.or(claimed)
                && (name, region) != (&node.node, node.region)
            {
                let (as_node, as_region) = (&node.node, node.region);
                return wrong(format!(
                    "{as_node} in {as_region} showed the certificate of {name} in {region}"
                ));
            }
            let claim = (node.node.clone(), node.region, request.id);
            self.claimed.entry(fingerprint).or_insert(claim);
        }
        let sent = Sent { omitted: request.nodes_omitted > 0, nodes };
        if self.requests.insert(request.id, sent).is_some() {
            return wrong("there are two records of it".to_owned());
        }
        Ok(())
    }

    fn certificate(&mut self, certificate: &Certificate) -> Result<(), String> {
        let der = &certificate.der.0;
        if Digest::of(der) != certificate.sha256 {
            return Err(format!("the certificate is not {}", certificate.sha256));
        }
        let (node, region) = self.notary.identity(der)?;
        if let Some((as_node, as_region, id)) = self.claimed.get(&certificate.sha256)
            && (as_node, *as_region) != (&node, region)
        {
            return Err(format!(
                "request {id}: {as_node} in {as_region} showed the certificate of {node} in {region}"
            ));
        }
        self.certificates.insert(certificate.sha256, (der.clone(), node, region));
        Ok(())
    }

    fn statement(&mut self, statement: &Statement) -> Result<(), String> {
        let Some((der, node, region)) = self.certificates.get(&statement.certificate) else {
            let text = format!("the certificate {} is not in the log", statement.certificate);
            return if self.selection { Ok(()) } else { Err(text) };
        };
        let stated = self.notary.stated(der, statement)?;
        if (&stated.node, stated.region) != (node, *region) {
            return Err(format!(
                "{node} in {region} speaks for {} in {}",
                stated.node, stated.region
            ));
        }
        self.statements += 1;
        for (id, rows) in stated.rows {
            let Some(sent) = self.requests.get_mut(&id) else {
                let text =
                    format!("request {id}: {node} computed rows of it, and it has no record");
                if self.selection {
                    continue;
                }
                return Err(text);
            };
            match sent.nodes.get_mut(&(node.clone(), stated.incarnation)) {
                Some(Rows { sent, .. }) if rows > *sent => {
                    return Err(format!(
                        "request {id}: {node} computed {rows} rows of it, and its record says that \
                         {sent} were sent there"
                    ));
                }
                Some(known) => known.computed = Some(known.computed.unwrap_or(0).max(rows)),
                None if sent.omitted || rows == 0 => {}
                None => {
                    return Err(format!(
                        "request {id}: {node} computed {rows} rows of it, and its record does not \
                         name that node"
                    ));
                }
            }
        }
        Ok(())
    }

    fn end(self, checkpoint: Checkpoint, unsigned: u64) -> Verified {
        let silent = |(id, sent): (RequestId, Sent)| {
            let quiet = |rows: &Rows| rows.signs && rows.sent > 0 && rows.computed.is_none();
            let quiet = sent.nodes.into_iter().filter(move |(_, rows)| quiet(rows));
            quiet.map(move |((node, _), _)| (id, node))
        };
        Verified {
            checkpoint,
            records: self.records,
            unsigned,
            silent: self.requests.into_iter().flat_map(silent).collect(),
            statements: self.statements,
        }
    }
}

#[cfg(test)]
mod tests;
