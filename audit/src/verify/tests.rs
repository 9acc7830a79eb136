//! What is done to a log on disk, and that the check says so.

use std::collections::BTreeSet;
use std::fs;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use super::*;
use crate::log::Log;
use crate::merkle::Hash;
use crate::note::Signer;
use crate::record::tests::request;
use crate::record::{Blob, Node, Policy};
use crate::witness::{Answer, Witness};

fn signer() -> Signer {
    Signer::from_seed("local/audit/fr-coordinator", [7; 32]).unwrap()
}

/// Certificates are `name@region`; a statement is `name@region:request=rows,…`, signed by the word.
struct Words;

fn identity_in(text: &str) -> Result<(NodeName, Region), String> {
    let (node, region) = text.split_once('@').ok_or("no certificate")?;
    Ok((node.parse().map_err(|_| "no name")?, region.parse().map_err(|_| "no region")?))
}

impl Notary for Words {
    fn identity(&self, certificate: &[u8]) -> Result<(NodeName, Region), String> {
        identity_in(str::from_utf8(certificate).map_err(|_| "no text")?)
    }

    fn stated(&self, certificate: &[u8], statement: &Statement) -> Result<Stated, String> {
        if statement.signature.0 != certificate {
            return Err("the signature is wrong".to_owned());
        }
        let text = str::from_utf8(&statement.statement.0).map_err(|_| "no text")?;
        let (who, rows) = text.split_once(':').ok_or("no statement")?;
        let (node, region) = identity_in(who)?;
        let row = |text: &str| {
            let (id, rows) = text.split_once('=').unwrap();
            (RequestId(id.parse().unwrap()), rows.parse().unwrap())
        };
        Ok(Stated { node, region, incarnation: 1, rows: rows.split(',').map(row).collect() })
    }
}

fn log_of(root: &Path, records: &[Record], signed_at: &[usize]) {
    let mut log = Log::open(root, signer().verifier()).unwrap().0;
    let bytes: Vec<Vec<u8>> = records.iter().map(|record| record.encode().unwrap()).collect();
    let mut from = 0;
    for to in signed_at {
        log.append(&bytes[from..*to]).unwrap();
        log.publish(&Checkpoint::sign(&signer(), log.tree()).unwrap()).unwrap();
        from = *to;
    }
    log.append(&bytes[from..]).unwrap();
}

fn requests(count: u64) -> Vec<Record> {
    (0..count).map(|number| Record::Request(Box::new(request(number, "fr")))).collect()
}

fn check(root: &Path) -> Result<Verified, Error> {
    path(root, signer().verifier(), &Words, false)
}

/// The number of the record that an error names.
fn named(error: &Error) -> Option<u64> {
    match error {
        Error::Record { index, .. } => Some(*index),
        _ => None,
    }
}

#[test]
fn an_untouched_log_verifies_and_what_is_not_signed_yet_is_counted() {
    let dir = tempfile::tempdir().unwrap();
    log_of(dir.path(), &requests(700), &[10, 300, 512, 690]);
    let verified = check(dir.path()).unwrap();
    assert_eq!((verified.records, verified.unsigned), (690, 10));
    assert_eq!(verified.checkpoint.tree.size, 690);
}

/// Every file of a log of 1,000 records, each with the first record that it is about.
fn files(root: &Path) -> Vec<(String, u64)> {
    let view = Folder::new(root, 1_000);
    let first = |path: &String| Tile::parse(path).unwrap().first_record();
    view.tile_files().unwrap().into_iter().map(|path| (path.clone(), first(&path))).collect()
}

/// The record that byte `at` of a file is about.
fn record_at(root: &Path, path: &str, at: usize) -> u64 {
    let tile = Tile::parse(path).unwrap();
    match tile.kind {
        Kind::Hashes(0) => tile.first_record() + at as u64 / 32,
        Kind::Hashes(_) => at as u64 / 32 * WIDTH,
        Kind::Entries => {
            let bytes = fs::read(root.join(path)).unwrap();
            let mut end = 0;
            let records = tile::read_records(&bytes).0;
            let is_before = |record: &&&[u8]| {
                end += 2 + record.len();
                end <= at
            };
            tile.first_record() + records.iter().take_while(is_before).count() as u64
        }
    }
}

#[test]
fn no_sampled_byte_of_a_log_of_1000_records_can_be_changed_unseen_and_the_record_is_named() {
    let seed = 42;
    println!("seed {seed}");
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let dir = tempfile::tempdir().unwrap();
    log_of(dir.path(), &requests(1_000), &[100, 1_000]);
    check(dir.path()).unwrap();
    for (path, first) in files(dir.path()) {
        let file = dir.path().join(&path);
        let bytes = fs::read(&file).unwrap();
        for _ in 0..12 {
            let at = random.next_u32() as usize % bytes.len();
            let record = record_at(dir.path(), &path, at);
            let mut bad = bytes.clone();
            bad[at] ^= 1 << (random.next_u32() % 8);
            fs::write(&file, &bad).unwrap();
            let error = check(dir.path()).unwrap_err();
            match named(&error) {
                Some(named) => assert_eq!(named, record, "{path} byte {at}: {error}"),
                // An upper tile, or one of an earlier checkpoint: the text says from where on.
                None => {
                    let text = error.to_string();
                    assert!(
                        text.contains(&path) && text.contains(&format!("from {first} ")),
                        "{text}"
                    );
                }
            }
        }
        fs::write(&file, &bytes[..bytes.len() - 1]).unwrap();
        assert!(check(dir.path()).is_err(), "{path} cut off");
        fs::write(&file, [&bytes[..], b"x"].concat()).unwrap();
        assert!(check(dir.path()).is_err(), "{path} with a byte more");
        fs::write(&file, &bytes).unwrap();
    }
    check(dir.path()).unwrap();
}

/// Rewrites a bundle of a log.
fn rewrite(root: &Path, path: &str, change: impl Fn(&mut Vec<Vec<u8>>)) {
    let file = root.join(path);
    let bytes = fs::read(&file).unwrap();
    let mut records: Vec<Vec<u8>> =
        tile::read_records(&bytes).0.into_iter().map(<[u8]>::to_vec).collect();
    change(&mut records);
    let mut bundle = Vec::new();
    records.iter().for_each(|record| tile::push_record(&mut bundle, 0, record).unwrap());
    fs::write(&file, bundle).unwrap();
}

#[test]
fn dropped_swapped_and_doubled_records_are_named() {
    let dir = tempfile::tempdir().unwrap();
    log_of(dir.path(), &requests(1_000), &[1_000]);
    let path = "tile/entries/001";
    let whole = fs::read(dir.path().join(path)).unwrap();
    let tamper = |change: &dyn Fn(&mut Vec<Vec<u8>>)| {
        rewrite(dir.path(), path, change);
        let error = check(dir.path()).unwrap_err();
        fs::write(dir.path().join(path), &whole).unwrap();
        named(&error)
    };
    assert_eq!(tamper(&|records| drop(records.remove(40))), Some(511), "one is missing at the end");
    assert_eq!(tamper(&|records| records.swap(3, 9)), Some(256 + 3));
    assert_eq!(tamper(&|records| records[5] = records[4].clone()), Some(256 + 5));
    assert_eq!(tamper(&|records| records.truncate(100)), Some(256 + 100));
    fs::remove_file(dir.path().join("tile/0/002")).unwrap();
    assert!(check(dir.path()).unwrap_err().to_string().contains("tile/0/002"));
}

#[test]
fn a_log_that_was_written_anew_from_some_record_on_is_named_from_the_last_checkpoint_before_it() {
    let dir = tempfile::tempdir().unwrap();
    let mut records = requests(1_000);
    log_of(dir.path(), &records, &[200, 400, 600, 1_000]);
    // Whoever has the disk and not the key: a whole new folder, with what was signed of the old.
    let forged = tempfile::tempdir().unwrap();
    records[450] = Record::Request(Box::new(request(7_777, "fr")));
    log_of(forged.path(), &records, &[1_000]);
    for file in ["checkpoint", "checkpoints"] {
        fs::copy(dir.path().join(file), forged.path().join(file)).unwrap();
    }
    let error = check(forged.path()).unwrap_err();
    assert_eq!(named(&error), Some(400), "{error}");
    assert!(error.to_string().contains("up to record 600"), "{error}");
    // Whoever has the key too, and rolls back: an earlier checkpoint tells on it.
    let rolled = tempfile::tempdir().unwrap();
    log_of(rolled.path(), &records[..300], &[300]);
    fs::copy(dir.path().join("checkpoints"), rolled.path().join("checkpoints")).unwrap();
    assert_eq!(named(&check(rolled.path()).unwrap_err()), Some(200));
}

#[test]
fn no_byte_of_an_export_can_be_changed_and_no_line_be_missing_or_elsewhere() {
    let seed = 43;
    println!("seed {seed}");
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let dir = tempfile::tempdir().unwrap();
    log_of(dir.path(), &requests(60), &[60]);
    let note = Folder::note(dir.path()).unwrap();
    let checkpoint = Checkpoint::open(&note, signer().verifier()).unwrap();
    let mut file = Vec::new();
    let view = Folder::new(dir.path(), 60);
    assert_eq!(crate::export::write(&view, &checkpoint, |_, _| true, &mut file).unwrap(), 60);
    let check = |bytes: &[u8], selection| export(bytes, signer().verifier(), &Words, selection);
    assert_eq!(check(&file, false).unwrap().records, 60);
    let ends: Vec<usize> =
        file.iter().enumerate().filter(|(_, byte)| **byte == b'\n').map(|(at, _)| at).collect();
    for _ in 0..2_000 {
        let at = random.next_u32() as usize % file.len();
        let mut bad = file.clone();
        bad[at] ^= 1 << (random.next_u32() % 8);
        let error = check(&bad, false).expect_err(&format!("byte {at}"));
        let line = ends.partition_point(|end| *end < at) as u64;
        if line > 0
            && let Some(named) = named(&error)
        {
            let number = line - 1;
            assert!(named == number || named == number + 1, "byte {at} of {number}: {error}");
        }
    }
    let lines: Vec<&[u8]> = file.split_inclusive(|byte| *byte == b'\n').collect();
    let without = |skip: usize| {
        let kept = lines.iter().enumerate().filter(|(at, _)| *at != skip);
        kept.flat_map(|(_, line)| line.to_vec()).collect::<Vec<u8>>()
    };
    assert_eq!(named(&check(&without(18), false).unwrap_err()), Some(17));
    assert_eq!(named(&check(&without(60), false).unwrap_err()), Some(59), "the last one");
    assert_eq!(check(&without(18), true).unwrap().records, 59, "a selection says so");
    let mut swapped = lines.clone();
    swapped.swap(4, 5);
    assert_eq!(named(&check(&swapped.concat(), false).unwrap_err()), Some(3));
    assert!(check(&swapped.concat(), true).is_err());
}

fn certificate(text: &str) -> Record {
    let der = text.as_bytes().to_vec();
    Record::Certificate(Certificate { sha256: Digest::of(&der), der: Blob(der) })
}

fn statement(certificate: &str, text: &str) -> Record {
    Record::Statement(Statement {
        certificate: Digest::of(certificate.as_bytes()),
        statement: Blob(text.into()),
        signature: Blob(certificate.into()),
    })
}

/// A request whose rows went to `name@region` nodes.
fn sent_to(number: u64, nodes: &[(&str, u64)]) -> Record {
    let node = |(text, rows): &(&str, u64)| {
        let (node, region) = identity_in(text).unwrap();
        let certificate = Some(Digest::of(text.as_bytes()));
        Node { node, region, incarnation: 1, certificate, rows: *rows, kernel_class: None }
    };
    let nodes = nodes.iter().map(node).collect();
    Record::Request(Box::new(Request { nodes, ..request(number, "fr") }))
}

fn checked(records: &[Record]) -> Result<Verified, String> {
    let dir = tempfile::tempdir().unwrap();
    log_of(dir.path(), records, &[records.len()]);
    check(dir.path()).map_err(|error| error.to_string())
}

#[test]
fn a_node_that_computed_more_than_the_record_says_or_is_not_named_tells_on_it() {
    let (a, b) = ("fr-a@fr", "fr-b@fr");
    let before = [certificate(a), certificate(b), sent_to(1, &[(a, 10), (b, 5)])];
    let with = |more: &[Record]| checked(&[&before[..], more].concat());
    let said = with(&[statement(a, "fr-a@fr:2=4"), statement(a, "fr-a@fr:2=10")]).unwrap();
    let silent: Vec<&str> = said.silent.iter().map(|(_, node)| node.as_str()).collect();
    assert_eq!((said.statements, silent), (2, vec!["fr-b"]), "who said nothing is listed");
    let id = RequestId(2);
    for (more, reason) in [
        (statement(a, "fr-a@fr:2=11"), "fr-a computed 11 rows of it"),
        (statement(a, "fr-a@fr:77=1"), "it has no record"),
        (statement(a, "fr-b@fr:2=1"), "speaks for fr-b"),
        (statement("fr-c@fr", "fr-c@fr:2=1"), "is not in the log"),
    ] {
        let error = with(&[more]).unwrap_err();
        assert!(error.starts_with("record 3: ") && error.contains(reason), "{error}");
    }
    let third = [certificate("fr-c@fr"), statement("fr-c@fr", "fr-c@fr:2=1")];
    let error = with(&third).unwrap_err();
    assert!(error.contains(&format!("request {id}")) && error.contains("does not name"), "{error}");
}

#[test]
fn records_that_contradict_the_policy_or_the_certificates_are_named() {
    let abroad = Record::Request(Box::new(Request {
        allowed: BTreeSet::from(["fr".parse().unwrap()]),
        ..request(1, "se")
    }));
    let error = checked(&[abroad]).unwrap_err();
    assert!(error.contains("fr-expert-1 in se had it"), "{error}");
    let allowed = BTreeSet::from(["se".parse().unwrap()]);
    let policy = Some(Policy { id: "t@1".to_owned(), sha256: Digest([0; 32]), allowed });
    let widened = Record::Request(Box::new(Request { policy, ..request(1, "fr") }));
    assert!(checked(&[widened]).unwrap_err().contains("policy"));
    let a = "fr-a@fr";
    let renamed = Record::Request(Box::new(Request {
        nodes: vec![Node {
            node: "fr-b".parse().unwrap(),
            region: "fr".parse().unwrap(),
            incarnation: 1,
            certificate: Some(Digest::of(a.as_bytes())),
            rows: 1,
            kernel_class: None,
        }],
        ..request(1, "fr")
    }));
    for records in [[certificate(a), renamed.clone()], [renamed, certificate(a)]] {
        let error = checked(&records).unwrap_err();
        assert!(error.contains("showed the certificate of fr-a"), "{error}");
    }
    let twice = [requests(1), requests(1)].concat();
    assert!(checked(&twice).unwrap_err().contains("two records"));
    let Record::Certificate(mut other) = certificate(a) else { unreachable!() };
    other.sha256 = Digest(Hash::default());
    assert!(checked(&[Record::Certificate(other)]).is_err());
}

/// Cosigns the tree of the log's first `size` records, and shows it in its folder.
fn cosign(root: &Path, witness: &mut Witness, old: u64, size: u64) {
    let mut log = Log::open(root, signer().verifier()).unwrap().0;
    let tree = Tree { size, root: merkle::root(&log, size).unwrap() };
    let checkpoint = Checkpoint::sign(&signer(), tree).unwrap();
    let path = merkle::consistency(&log, old, size).unwrap();
    let answer = witness.cosign(&checkpoint, old, &path, 1).unwrap();
    let Answer::Cosigned(line) = answer else { panic!("{answer:?}") };
    let key = witness.verifier().clone();
    log.show_cosigned(&checkpoint.with_cosignature(&line, &key).unwrap()).unwrap();
}

#[test]
fn a_witness_vouches_for_what_it_has_seen_and_for_no_other_history() {
    let dir = tempfile::tempdir().unwrap();
    let (root, log_key) = (dir.path().join("log"), signer().verifier().clone());
    let mut witness = Witness::open(&dir.path().join("w"), "local/witness/w").unwrap();
    let stranger = Witness::open(&dir.path().join("v"), "local/witness/w").unwrap();
    log_of(&root, &requests(5), &[2, 5]);
    let check = |path: &Path, key: &CosignerKey| {
        let verified = super::path(path, &log_key, &Words, false).unwrap();
        cosigned(path, &verified, &log_key, key).map(|cosigned| (cosigned.size, cosigned.time_s))
    };
    let key = witness.verifier().clone();
    let none = check(&root, &key).unwrap_err().to_string();
    assert!(none.contains("local/witness/w+") && none.contains("has not signed it"), "{none}");
    // An earlier checkpoint than the latest, as under load; then the latest.
    cosign(&root, &mut witness, 0, 2);
    assert_eq!(check(&root, &key).unwrap(), (2, 1));
    cosign(&root, &mut witness, 2, 5);
    assert_eq!(check(&root, &key).unwrap(), (5, 1));
    assert!(check(&root, stranger.verifier()).is_err());

    let note = Folder::note(&root).unwrap();
    let checkpoint = Checkpoint::open(&note, &log_key).unwrap();
    let file = dir.path().join("export");
    let mut bytes = Vec::new();
    let view = Folder::new(&root, 5);
    crate::export::write(&view, &checkpoint, |_, _| true, &mut bytes).unwrap();
    fs::write(&file, &bytes).unwrap();
    assert_eq!(check(&file, &key).unwrap(), (5, 1));
    assert!(check(&file, stranger.verifier()).is_err());
    let without = note.lines().filter(|line| !line.contains("/witness/"));
    let without = without.map(|line| format!("{line}\n")).collect::<String>();
    let bare = Checkpoint::open(&without, &log_key).unwrap();
    let mut bytes = Vec::new();
    crate::export::write(&view, &bare, |_, _| true, &mut bytes).unwrap();
    fs::write(&file, &bytes).unwrap();
    assert!(check(&file, &key).unwrap_err().to_string().contains("has not signed it"));

    // The log's owner has written another history since, with its key, and hidden the first.
    let fork = dir.path().join("fork");
    let mut others = requests(5);
    others.swap(0, 1);
    log_of(&fork, &others, &[5]);
    fs::copy(root.join(COSIGNED), fork.join(COSIGNED)).unwrap();
    let error = check(&fork, &key).unwrap_err().to_string();
    assert!(error.contains("another history"), "{error}");
}
