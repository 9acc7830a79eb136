//! The log on disks that crash, tear writes, flip bits, fail and fill up.
//!
//! After every fault the log opens with what was acknowledged, perhaps with the batch that was
//! under way, or refuses to open and says why. It never opens with anything else.

#![allow(clippy::unwrap_used)]

use std::io;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use entente_membership::log::{Batch, Durable, Entry, EntryKind, Group, HardState, Snapshot};
use entente_membership::store::{Identity, RedbStore, Store, StoreError};
use entente_membership::voter::ClusterId;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

const IDENTITY: Identity = Identity { cluster: ClusterId([7; 16]), voter: 3 };

/// What happens at the operation whose turn it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// Power is lost: nothing more gets through.
    Crash,
    /// The operation fails once, with this error number; a write gets half through.
    Errno(i32),
}

#[derive(Debug)]
enum Write {
    Bytes(u64, Vec<u8>),
    Len(u64),
}

#[derive(Debug, Default)]
struct Platter {
    /// What survives.
    synced: Vec<u8>,
    /// What is read.
    cached: Vec<u8>,
    /// What lies between the two.
    pending: Vec<Write>,
    operations: usize,
    /// What is found if power is lost after the last batch, before the log is closed.
    unclosed: Vec<u8>,
    fault: Option<(usize, Fault)>,
    dead: bool,
}

/// A disk in memory that is told when to fail.
#[derive(Debug, Clone, Default)]
struct Disk(Arc<Mutex<Platter>>);

impl Disk {
    fn holding(image: Vec<u8>) -> Self {
        let platter = Platter { synced: image.clone(), cached: image, ..Platter::default() };
        Self(Arc::new(Mutex::new(platter)))
    }

    fn fail_at(&self, operation: usize, fault: Fault) {
        self.0.lock().unwrap().fault = Some((operation, fault));
    }

    fn operations(&self) -> usize {
        self.0.lock().unwrap().operations
    }

    fn image(&self) -> Vec<u8> {
        self.0.lock().unwrap().cached.clone()
    }

    /// What is found after power comes back: what was synced, and of what was not, some writes
    /// whole, some torn, some not at all, in any order of arrival.
    fn after_power_loss(&self, random: &mut ChaCha8Rng) -> Vec<u8> {
        let platter = self.0.lock().unwrap();
        let mut image = platter.synced.clone();
        let likelihood = random.next_u32() % 5;
        for write in &platter.pending {
            let kept = random.next_u32() % 4 < likelihood;
            match write {
                Write::Len(len) if kept => image.resize(*len as usize, 0),
                Write::Bytes(offset, bytes) if kept => {
                    let torn = random.next_u32().is_multiple_of(4);
                    let len =
                        if torn { random.next_u32() as usize % bytes.len() } else { bytes.len() };
                    put(&mut image, *offset, &bytes[..len]);
                }
                _ => {}
            }
        }
        image
    }
}

fn put(image: &mut Vec<u8>, offset: u64, bytes: &[u8]) {
    let (from, to) = (offset as usize, offset as usize + bytes.len());
    if image.len() < to {
        image.resize(to, 0);
    }
    image[from..to].copy_from_slice(bytes);
}

impl Platter {
    fn turn(&mut self) -> io::Result<()> {
        if self.dead {
            return Err(io::Error::other("no power"));
        }
        let operation = self.operations;
        self.operations += 1;
        match self.fault {
            Some((at, Fault::Crash)) if at == operation => {
                self.dead = true;
                Err(io::Error::other("no power"))
            }
            Some((at, Fault::Errno(number))) if at == operation => {
                Err(io::Error::from_raw_os_error(number))
            }
            _ => Ok(()),
        }
    }
}

impl redb::StorageBackend for Disk {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.lock().unwrap().cached.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let platter = self.0.lock().unwrap();
        let from = offset as usize;
        let bytes = platter.cached.get(from..from + out.len());
        out.copy_from_slice(bytes.ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))?);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut platter = self.0.lock().unwrap();
        platter.turn()?;
        platter.cached.resize(len as usize, 0);
        platter.pending.push(Write::Len(len));
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut platter = self.0.lock().unwrap();
        // After a failed sync the kernel forgets what it could not write, and says so once.
        if let Err(error) = platter.turn() {
            if !platter.dead {
                platter.pending.clear();
            }
            return Err(error);
        }
        platter.synced = platter.cached.clone();
        platter.pending.clear();
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut platter = self.0.lock().unwrap();
        let turn = platter.turn();
        let written = if turn.is_ok() { data } else { &data[..data.len() / 2] };
        put(&mut platter.cached, offset, written);
        platter.pending.push(Write::Bytes(offset, written.to_vec()));
        turn
    }
}

/// A log's life: appends, a conflict, a compaction, the leader's snapshot.
fn batches() -> Vec<Batch> {
    let entry = |index, term, len| Entry {
        index,
        term,
        kind: EntryKind::Normal,
        data: Bytes::from(vec![index as u8; len]),
    };
    let batch = |commit, term, entries| Batch {
        hard_state: HardState { term, vote: term % 3, commit },
        snapshot: None,
        clear: false,
        entries,
        base: (0, 0),
    };
    let snapshot = |index, term| Snapshot {
        index,
        term,
        group: Group { voters: [1, 2, 3].into(), ..Group::default() },
        data: Bytes::from(vec![index as u8; 9_000]),
    };
    vec![
        batch(0, 1, vec![]),
        batch(0, 1, vec![entry(1, 1, 10), entry(2, 1, 5_000), entry(3, 1, 10)]),
        batch(1, 2, vec![entry(2, 2, 100)]),
        batch(2, 2, (3..20).map(|index| entry(index, 2, 300)).collect()),
        Batch { snapshot: Some(snapshot(15, 2)), base: (10, 2), ..batch(19, 2, vec![]) },
        Batch { base: (10, 2), ..batch(19, 3, vec![entry(20, 3, 40)]) },
        Batch {
            snapshot: Some(snapshot(50, 4)),
            clear: true,
            base: (50, 4),
            ..batch(50, 4, vec![])
        },
        Batch { base: (50, 4), ..batch(50, 5, vec![entry(51, 5, 40)]) },
    ]
}

/// What the disk should hold after each number of batches.
fn states() -> Vec<Durable> {
    let mut states = vec![Durable::default()];
    for batch in batches() {
        let mut next = states.last().unwrap().clone();
        next.absorb(&batch);
        next.check().unwrap();
        states.push(next);
    }
    states
}

/// Writes batches until one fails. Returns how many were acknowledged, or nothing if not even the
/// log could be created.
fn live(disk: &Disk) -> Option<usize> {
    let mut store = RedbStore::create_on(disk.clone(), IDENTITY, &Durable::default()).ok()?;
    let mut acknowledged = 0;
    for batch in batches() {
        match store.persist(&batch) {
            Ok(()) => acknowledged += 1,
            Err(_) => {
                assert!(matches!(store.persist(&batch), Err(StoreError::Failed)));
                break;
            }
        }
    }
    let synced = disk.0.lock().unwrap().synced.clone();
    disk.0.lock().unwrap().unclosed = synced;
    Some(acknowledged)
}

/// The log that is on the image is one of those that may be there.
fn expect(image: Vec<u8>, acknowledged: Option<usize>, may_refuse: bool, case: &str) {
    let states = states();
    match (RedbStore::open_on(Disk::holding(image)), acknowledged) {
        (Ok((_, identity, durable)), acknowledged) => {
            assert_eq!(identity, IDENTITY, "{case}");
            let acknowledged = acknowledged.unwrap_or(0);
            let next = (acknowledged + 1).min(states.len() - 1);
            let fits = durable == states[acknowledged] || durable == states[next];
            assert!(fits, "{case}: after {acknowledged} batches the log held {durable:?}");
        }
        (Err(StoreError::NotCreated), None) => {}
        (Err(_), None) => {}
        (Err(error), Some(_)) => assert!(may_refuse, "{case}: {error}"),
    }
}

fn operations_of_a_life() -> usize {
    let disk = Disk::default();
    assert_eq!(live(&disk), Some(batches().len()));
    disk.operations()
}

#[test]
fn a_log_holds_what_was_put_into_it() {
    let disk = Disk::default();
    live(&disk).unwrap();
    let (_, identity, durable) = RedbStore::open_on(Disk::holding(disk.image())).unwrap();
    assert_eq!((identity, Some(&durable)), (IDENTITY, states().last()));
}

#[test]
fn a_log_is_created_once_and_not_found_before() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("log");
    assert!(matches!(RedbStore::open(&path), Err(StoreError::NotCreated)));
    let mut store = RedbStore::create(&path, IDENTITY, &Durable::default()).unwrap();
    store.persist(&batches()[1]).unwrap();
    drop(store);
    let again = RedbStore::create(&path, IDENTITY, &Durable::default());
    assert!(matches!(again, Err(StoreError::CreatedAlready)));
    let (_, _, durable) = RedbStore::open(&path).unwrap();
    assert_eq!(durable.entries.len(), 3);
}

#[test]
fn a_crash_at_any_operation_loses_nothing_acknowledged() {
    let operations = operations_of_a_life();
    let mut random = ChaCha8Rng::seed_from_u64(1);
    for operation in 0..operations {
        let disk = Disk::default();
        disk.fail_at(operation, Fault::Crash);
        let acknowledged = live(&disk);
        for attempt in 0..8 {
            let image = disk.after_power_loss(&mut random);
            let case = format!("crash at operation {operation} of {operations}, seed 1/{attempt}");
            expect(image, acknowledged, false, &case);
        }
    }
}

#[test]
fn a_failing_or_full_disk_stops_the_log_and_loses_nothing_acknowledged() {
    let mut random = ChaCha8Rng::seed_from_u64(2);
    const EIO: i32 = 5;
    const ENOSPC: i32 = 28;
    for errno in [EIO, ENOSPC] {
        for operation in 0..operations_of_a_life() {
            let disk = Disk::default();
            disk.fail_at(operation, Fault::Errno(errno));
            let acknowledged = live(&disk);
            let case = format!("error {errno} at operation {operation}, seed 2");
            expect(disk.after_power_loss(&mut random), acknowledged, true, &case);
            expect(disk.image(), acknowledged, true, &case);
        }
    }
}

#[test]
fn a_flipped_bit_is_found_or_makes_no_difference() {
    let disk = Disk::default();
    let acknowledged = live(&disk);
    let unclosed = disk.0.lock().unwrap().unclosed.clone();
    let images = [("closed", disk.image()), ("not closed", unclosed)];
    let mut random = ChaCha8Rng::seed_from_u64(3);
    // A panic inside redb is one way of refusing; its text is in the error.
    std::panic::set_hook(Box::new(|_| {}));
    for (name, image) in images {
        let used: Vec<usize> = (0..image.len()).filter(|at| *at < 512 || image[*at] != 0).collect();
        let stride = used.len() / 1_500 + 1;
        let header = (0..512usize).flat_map(|at| (0..8).map(move |bit| (at, bit)));
        let rest = used.iter().step_by(stride).map(|at| (*at, random.next_u32() % 8));
        for (at, bit) in header.chain(rest.collect::<Vec<_>>()) {
            let mut spoilt = image.clone();
            spoilt[at] ^= 1 << bit;
            let case = format!("{name}, bit {bit} of byte {at}");
            expect(spoilt, acknowledged, true, &case);
        }
    }
}
