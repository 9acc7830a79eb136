//! The durable log: what a voter must never forget, in one redb file.
//!
//! Invariants:
//! - a batch is there entirely or not at all, and [`Store::persist`] returns only once it is there;
//! - after an error nothing more is written: what an `fsync` that failed left behind is unknown
//!   (Rebello et al., ATC 2020), so the process must stop and read the disk again;
//! - a disk that has lost something says so when it is opened, or has lost nothing that was
//!   acknowledged.
//!
//! The last one needs care. redb keeps its two latest commits and, when the latest does not verify,
//! goes back to the one before it: right after a torn write, wrong after rot, and it cannot tell
//! them apart. So each batch is committed twice: once with its content and once with a *seal*, a
//! number that changes nothing. Whichever of the two redb comes back with, the batch is in it; only
//! a batch that was never acknowledged can be the one that is missing.
//!
//! What this module does not know: raft, what an entry means, threads.

use std::path::Path;

use entente_proto::wire;
use prost::Message;
use redb::{Database, ReadableDatabase, ReadableTable, StorageBackend, TableDefinition};

use crate::log::{Batch, Durable, HardState, Inconsistent};
use crate::raft::convert;
use crate::voter::ClusterId;

/// The layout of the tables below.
const FORMAT: u32 = 2;
/// Memory that redb may use; the log itself is kept in memory elsewhere.
const CACHE_LEN: usize = 4 << 20;

const ENTRIES: TableDefinition<u64, &[u8]> = TableDefinition::new("entries");
const META: TableDefinition<&str, &[u8]> = TableDefinition::new("meta");
const SEAL: TableDefinition<(), u64> = TableDefinition::new("seal");

const IDENTITY: &str = "identity";
const HARD_STATE: &str = "hard_state";
const SNAPSHOT: &str = "snapshot";
const BASE: &str = "base";

/// Makes batches durable, in order.
pub trait Store {
    /// Returns once the batch would survive the loss of power. After an error the process must
    /// stop: nothing is known about the disk until it is opened again.
    fn persist(&mut self, batch: &Batch) -> Result<(), StoreError>;
}

/// Whose disk it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// The cluster.
    pub cluster: ClusterId,
    /// The voter's number; an empty disk gets a number of its own.
    pub voter: u64,
}

/// The disk cannot be used, or not any longer.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file system or redb says no.
    #[error("{action} the membership log: {source}")]
    Redb {
        /// What was being done.
        action: &'static str,
        /// Why it failed.
        source: redb::Error,
    },
    /// redb gave up in the middle; the file is damaged in a way that it does not expect.
    #[error("the membership log is damaged: reading it ended with {0:?}")]
    Damaged(String),
    /// There is no log; perhaps creating it was interrupted.
    #[error("there is no membership log on this disk; it was never created")]
    NotCreated,
    /// There is a log.
    #[error("there is a membership log on this disk already")]
    CreatedAlready,
    /// A newer version wrote it.
    #[error("the membership log has format {0}; this version knows {FORMAT}")]
    Format(u32),
    /// Something is missing or does not decode.
    #[error("the membership log: {record} is missing or damaged")]
    Record {
        /// What.
        record: String,
    },
    /// The parts do not fit together.
    #[error("the membership log is damaged: {0}")]
    Inconsistent(#[from] Inconsistent),
    /// An earlier batch failed.
    #[error("the membership log failed earlier; the process must stop")]
    Failed,
}

fn redb_error<E: Into<redb::Error>>(action: &'static str) -> impl FnOnce(E) -> StoreError {
    move |error| StoreError::Redb { action, source: error.into() }
}

/// The store in a redb file.
#[derive(Debug)]
pub struct RedbStore {
    database: Database,
    seal: u64,
    failed: bool,
}

impl RedbStore {
    /// Creates the log with what a voter begins with: the genesis for a founder, nothing for a
    /// learner. Creating it again after an interruption is fine; after success it is an error.
    pub fn create(path: &Path, identity: Identity, first: &Durable) -> Result<Self, StoreError> {
        let create = |builder: &mut redb::Builder| builder.create(path);
        Self::create_with(create, identity, first)
    }

    /// [`RedbStore::create`] on another disk.
    pub fn create_on(
        disk: impl StorageBackend,
        identity: Identity,
        first: &Durable,
    ) -> Result<Self, StoreError> {
        Self::create_with(|builder| builder.create_with_backend(disk), identity, first)
    }

    /// Opens the log and reads all of it.
    pub fn open(path: &Path) -> Result<(Self, Identity, Durable), StoreError> {
        if !path.exists() {
            return Err(StoreError::NotCreated);
        }
        Self::open_with(|builder| builder.open(path))
    }

    /// [`RedbStore::open`] on another disk.
    pub fn open_on(disk: impl StorageBackend) -> Result<(Self, Identity, Durable), StoreError> {
        Self::open_with(|builder| builder.create_with_backend(disk))
    }

    fn create_with(
        create: impl FnOnce(&mut redb::Builder) -> Result<Database, redb::DatabaseError>,
        identity: Identity,
        first: &Durable,
    ) -> Result<Self, StoreError> {
        let database = create(&mut builder()).map_err(redb_error("creating"))?;
        let mut store = Self { database, seal: 0, failed: false };
        let identity = wire::StoreIdentity {
            format: FORMAT,
            cluster_id: identity.cluster.0.to_vec().into(),
            voter: identity.voter,
        };
        let transaction = store.database.begin_write().map_err(redb_error("creating"))?;
        {
            let mut meta = transaction.open_table(META).map_err(redb_error("creating"))?;
            if meta.get(IDENTITY).map_err(redb_error("creating"))?.is_some() {
                return Err(StoreError::CreatedAlready);
            }
            let identity = identity.encode_to_vec();
            meta.insert(IDENTITY, &identity[..]).map_err(redb_error("creating"))?;
        }
        let batch = Batch {
            hard_state: first.hard_state,
            snapshot: Some(first.snapshot.clone()),
            clear: true,
            entries: first.entries.clone(),
            base: first.base,
        };
        write(&transaction, &batch).map_err(redb_error("creating"))?;
        transaction.commit().map_err(redb_error("creating"))?;
        store.seal()?;
        Ok(store)
    }

    fn open_with(
        open: impl FnOnce(&mut redb::Builder) -> Result<Database, redb::DatabaseError>,
    ) -> Result<(Self, Identity, Durable), StoreError> {
        // redb asserts in places what only a damaged file can make untrue.
        let attempt = std::panic::AssertUnwindSafe(|| {
            let database = open(&mut builder()).map_err(redb_error("opening"))?;
            let (seal, identity, durable) = load(&database)?;
            durable.check()?;
            Ok((Self { database, seal, failed: false }, identity, durable))
        });
        std::panic::catch_unwind(attempt).unwrap_or_else(|panic| {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()));
            Err(StoreError::Damaged(text.unwrap_or_default()))
        })
    }

    /// Makes a second commit of what is there, so that redb never goes back past it.
    fn seal(&mut self) -> Result<(), StoreError> {
        self.seal += 1;
        let transaction = self.database.begin_write().map_err(redb_error("sealing"))?;
        {
            let mut table = transaction.open_table(SEAL).map_err(redb_error("sealing"))?;
            table.insert((), self.seal).map_err(redb_error("sealing"))?;
        }
        transaction.commit().map_err(redb_error("sealing"))
    }

    fn try_persist(&mut self, batch: &Batch) -> Result<(), StoreError> {
        let transaction = self.database.begin_write().map_err(redb_error("writing"))?;
        write(&transaction, batch).map_err(redb_error("writing"))?;
        transaction.commit().map_err(redb_error("writing"))?;
        self.seal()
    }
}

impl Store for RedbStore {
    fn persist(&mut self, batch: &Batch) -> Result<(), StoreError> {
        if std::mem::replace(&mut self.failed, true) {
            return Err(StoreError::Failed);
        }
        self.try_persist(batch)?;
        self.failed = false;
        Ok(())
    }
}

fn builder() -> redb::Builder {
    let mut builder = Database::builder();
    builder.set_cache_size(CACHE_LEN).set_check_integrity_on_open(true);
    builder
}

/// Puts the batch into the transaction, as [`Durable::absorb`] puts it into memory.
fn write(transaction: &redb::WriteTransaction, batch: &Batch) -> Result<(), redb::Error> {
    let mut entries = transaction.open_table(ENTRIES)?;
    if batch.clear {
        entries.retain(|_, _| false)?;
    }
    if let Some(first) = batch.entries.first() {
        entries.retain_in(first.index.., |_, _| false)?;
    }
    for entry in &batch.entries {
        let bytes = convert::entry_to_wire(entry).encode_to_vec();
        entries.insert(entry.index, &bytes[..])?;
    }
    entries.retain_in(..=batch.base.0, |_, _| false)?;
    let mut meta = transaction.open_table(META)?;
    let HardState { term, vote, commit } = batch.hard_state;
    let hard_state = wire::RaftHardState { term, vote, commit }.encode_to_vec();
    meta.insert(HARD_STATE, &hard_state[..])?;
    let base = wire::StoreBase { index: batch.base.0, term: batch.base.1 }.encode_to_vec();
    meta.insert(BASE, &base[..])?;
    if let Some(snapshot) = &batch.snapshot {
        let bytes = convert::snapshot_to_wire(snapshot).encode_to_vec();
        meta.insert(SNAPSHOT, &bytes[..])?;
    }
    Ok(())
}

fn load(database: &Database) -> Result<(u64, Identity, Durable), StoreError> {
    let reading = || "reading";
    let transaction = database.begin_read().map_err(redb_error(reading()))?;
    let meta = match transaction.open_table(META) {
        Err(redb::TableError::TableDoesNotExist(_)) => return Err(StoreError::NotCreated),
        other => other.map_err(redb_error(reading()))?,
    };
    let identity: wire::StoreIdentity = record(&meta, IDENTITY)?;
    if identity.format != FORMAT {
        return Err(StoreError::Format(identity.format));
    }
    let cluster = identity.cluster_id[..].try_into().map_err(|_| damaged(IDENTITY))?;
    let hard: wire::RaftHardState = record(&meta, HARD_STATE)?;
    let base: wire::StoreBase = record(&meta, BASE)?;
    let snapshot: wire::RaftSnapshot = record(&meta, SNAPSHOT)?;
    let mut durable = Durable {
        hard_state: HardState { term: hard.term, vote: hard.vote, commit: hard.commit },
        snapshot: convert::snapshot_from_wire(snapshot).map_err(|_| damaged(SNAPSHOT))?,
        base: (base.index, base.term),
        entries: Vec::new(),
    };
    let entries = transaction.open_table(ENTRIES).map_err(redb_error(reading()))?;
    for item in entries.iter().map_err(redb_error(reading()))? {
        let (index, bytes) = item.map_err(redb_error(reading()))?;
        let entry = wire::RaftEntry::decode(bytes.value()).ok();
        let entry = entry.and_then(|entry| convert::entry_from_wire(entry).ok());
        let entry = entry.filter(|entry| entry.index == index.value());
        let entry = entry.ok_or_else(|| damaged(&format!("entry {}", index.value())))?;
        durable.entries.push(entry);
    }
    let seal = match transaction.open_table(SEAL) {
        Ok(table) => table.get(()).map_err(redb_error(reading()))?.map_or(0, |seal| seal.value()),
        Err(redb::TableError::TableDoesNotExist(_)) => 0,
        Err(error) => return Err(redb_error(reading())(error)),
    };
    Ok((seal, Identity { cluster: ClusterId(cluster), voter: identity.voter }, durable))
}

fn record<M: Message + Default>(
    meta: &impl ReadableTable<&'static str, &'static [u8]>,
    key: &'static str,
) -> Result<M, StoreError> {
    let bytes = meta.get(key).map_err(redb_error("reading"))?.ok_or_else(|| damaged(key))?;
    M::decode(bytes.value()).map_err(|_| damaged(key))
}

fn damaged(record: &str) -> StoreError {
    StoreError::Record { record: record.to_owned() }
}
