//! The one thread that writes: gathers what has come, makes records of it, commits them together.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::select;
use entente_audit::checkpoint::Checkpoint;
use entente_audit::folder::Folder;
use entente_audit::keyfile;
use entente_audit::log::Log;
use entente_audit::merkle;
use entente_audit::note::Signer;
use entente_audit::proof::Proof;
use entente_audit::record::{Blob, Certificate, Digest, Record, Statement};
use entente_audit::verify::Notary;
use entente_proto::ids::{RequestId, TenantName};
use tokio::sync::{oneshot, watch};

use super::keys::{self, Salts};
use super::notary::ByCertificate;
use super::requests::{Complete, Requests};
use super::{Config, Cosigned, Inputs, LedgerError, Message, More, Receipt, now_ms};
use crate::engine::tally::Closed;
use crate::statements::Stated;

/// Records that are committed together at most.
const BATCH_MAX: usize = 1_024;
/// How long records may be on disk without a checkpoint.
const CHECKPOINT_INTERVAL: Duration = Duration::from_secs(1);
/// Records after which a checkpoint is due at once.
const CHECKPOINT_RECORDS: u64 = 1_024;
/// Requests that are found by their id; older ones are found in the folder only.
const INDEX_MAX: usize = 1 << 18;
/// Records of the log that are read for that at the start.
const INDEX_READ: u64 = 1 << 16;
/// Statements that wait for the record of one of their requests.
const HELD_MAX: usize = 1_024;
/// How long they wait. Then they are written as they are, and whoever verifies is told.
const HELD_FOR: Duration = Duration::from_secs(10);

/// Somebody who waits for a receipt.
type Asked = (RequestId, TenantName, oneshot::Sender<Option<Receipt>>);

pub(super) struct Owner {
    inputs: Inputs,
    log: Log,
    signer: Signer,
    salts: Salts,
    requests: Requests,
    /// Where a request's record is.
    index: BTreeMap<RequestId, u64>,
    /// Its keys, the oldest first.
    indexed: VecDeque<RequestId>,
    certified: BTreeSet<Digest>,
    held: VecDeque<(Instant, Stated)>,
    /// Records that are not written yet.
    batch: Vec<Vec<u8>>,
    /// Which of them are of requests.
    named: Vec<(usize, RequestId)>,
    asked: Vec<Asked>,
    /// When the next checkpoint is to be signed, if there is anything to sign.
    due: Option<Instant>,
    tell: watch::Sender<Option<Arc<Checkpoint>>>,
    /// The latest checkpoint that a witness has cosigned, with all cosignatures of it.
    cosigned: Option<Arc<Checkpoint>>,
    stopping: Option<oneshot::Sender<()>>,
}

impl Owner {
    /// Takes over the folder; gives the public key of its log too.
    pub(super) fn open(
        config: &Config,
        origin: &str,
        inputs: Inputs,
        tell: watch::Sender<Option<Arc<Checkpoint>>>,
    ) -> Result<(Self, String), LedgerError> {
        let signer: Signer = keyfile::open(&config.dir, origin)?;
        let (log, torn) = Log::open(&config.dir, signer.verifier())?;
        if torn > 0 {
            tracing::warn!(torn, "bytes that were never acknowledged are cut off the audit log");
        }
        let key = signer.verifier().to_string();
        let cosigned = Folder::cosigned_note(&config.dir)?;
        let cosigned =
            cosigned.and_then(|note| Checkpoint::open(&note, signer.verifier()).ok()).map(Arc::new);
        let mut owner = Self {
            inputs,
            salts: Salts::open(&config.dir)?,
            signer,
            requests: Requests::default(),
            index: BTreeMap::new(),
            indexed: VecDeque::new(),
            certified: BTreeSet::new(),
            held: VecDeque::new(),
            batch: Vec::new(),
            named: Vec::new(),
            asked: Vec::new(),
            due: None,
            tell,
            cosigned: cosigned.filter(|cosigned| log.begins_with(&cosigned.tree)),
            log,
            stopping: None,
        };
        owner.read_index()?;
        // What was written before the last stop and not signed is signed now.
        owner.publish()?;
        Ok((owner, key))
    }

    /// Learns which of the latest requests are where.
    fn read_index(&mut self) -> Result<(), LedgerError> {
        let size = self.log.tree().size;
        for entry in self.log.records_from(size.saturating_sub(INDEX_READ)) {
            let (index, bytes) = entry?;
            match Record::decode(&bytes) {
                Ok(Record::Certificate(certificate)) => {
                    self.certified.insert(certificate.sha256);
                }
                Ok(record) => record.request().into_iter().for_each(|id| self.remember(id, index)),
                Err(reason) => tracing::error!(index, reason, "a record cannot be read"),
            }
        }
        Ok(())
    }

    fn remember(&mut self, id: RequestId, index: u64) {
        self.index.insert(id, index);
        self.indexed.push_back(id);
        while self.indexed.len() > INDEX_MAX {
            self.indexed.pop_front().and_then(|id| self.index.remove(&id));
        }
    }

    /// Runs until it is told to stop or nobody is left who could.
    pub(super) fn run(mut self) -> Result<(), LedgerError> {
        while self.stopping.is_none() && self.gather()? {
            self.release(HELD_FOR);
            self.commit()?;
            if self.due.is_some_and(|due| due <= Instant::now()) {
                self.publish()?;
            }
            self.answer()?;
        }
        self.finish()
    }

    /// Waits for something to do, and takes what else is there. False once nobody is left.
    fn gather(&mut self) -> Result<bool, LedgerError> {
        let wait = self.next_wake().saturating_duration_since(Instant::now());
        let (messages, ends) = (self.inputs.messages.clone(), self.inputs.ends.clone());
        let (others, stated) = (self.inputs.others.clone(), self.inputs.stated.clone());
        select! {
            recv(messages) -> message => match message {
                Ok(message) => self.take(message)?,
                Err(_) => return Ok(false),
            },
            recv(ends) -> end => match end {
                Ok(end) => self.closed(end)?,
                Err(_) => return Ok(false),
            },
            recv(others) -> other => match other {
                Ok(other) => self.take_other(other)?,
                Err(_) => return Ok(false),
            },
            recv(stated) -> stated => match stated {
                Ok(stated) => self.held.push_back((Instant::now(), stated)),
                Err(_) => return Ok(false),
            },
            default(wait) => {}
        }
        // Ends first: the engine waits for nobody, and a request is complete the sooner.
        while self.batch.len() < BATCH_MAX
            && let Ok(end) = ends.try_recv()
        {
            self.closed(end)?;
        }
        while self.batch.len() < BATCH_MAX
            && let Ok(message) = messages.try_recv()
        {
            self.take(message)?;
        }
        while self.batch.len() < BATCH_MAX
            && let Ok(other) = others.try_recv()
        {
            self.take_other(other)?;
        }
        Ok(true)
    }

    /// When there is something to do without anything new.
    fn next_wake(&self) -> Instant {
        let held = self.held.front().map(|(since, _)| *since + HELD_FOR);
        let idle = Instant::now() + CHECKPOINT_INTERVAL;
        [self.due, held].into_iter().flatten().fold(idle, Instant::min)
    }

    fn take(&mut self, message: Message) -> Result<(), LedgerError> {
        match message {
            Message::Opened(opened) => {
                if let Some(complete) = self.requests.opened(*opened) {
                    self.complete(complete)?;
                }
            }
            Message::Refused { mut refused, body } => {
                self.inputs.tickets.add_permits(1);
                if let (Some(tenant), Some(body)) = (&refused.tenant, body) {
                    refused.body = Some(keys::salted(&self.salts.of(tenant)?, &body));
                }
                self.write(&Record::Refused(refused));
            }
        }
        Ok(())
    }

    /// Does what a message says that is of no request that is open.
    fn take_other(&mut self, other: More) -> Result<(), LedgerError> {
        match other {
            More::Certificate(der) => self.certify(der),
            More::Admin(admin) => self.write(&Record::Admin(admin)),
            More::Find { id, tenant, reply } => self.asked.push((id, tenant, reply)),
            More::Consistency { old, new, reply } => {
                let is_there = old <= new && new <= self.log.tree().size;
                let path = is_there.then(|| merkle::consistency(&self.log, old, new).ok());
                // Who does not wait any more gets nothing.
                let _ = reply.send(path.flatten());
            }
            More::Cosigned(cosigned) => self.show(*cosigned)?,
            More::Stop { reply } => self.stopping = Some(reply),
        }
        Ok(())
    }

    /// Puts a cosignature beneath its checkpoint, beside what other witnesses have said of it.
    fn show(&mut self, new: Cosigned) -> Result<(), LedgerError> {
        let tree = new.checkpoint.tree;
        let before = self.cosigned.as_deref().filter(|before| before.tree.size >= tree.size);
        let checkpoint = before.unwrap_or(&new.checkpoint);
        if checkpoint.tree != tree || !self.log.begins_with(&tree) {
            tracing::debug!(size = tree.size, "a cosignature comes too late");
            return Ok(());
        }
        match checkpoint.with_cosignature(&new.line, &new.key) {
            Ok(cosigned) => {
                self.log.show_cosigned(&cosigned)?;
                self.cosigned = Some(Arc::new(cosigned));
            }
            Err(error) => tracing::error!(target: "audit", %error, "a cosignature is void"),
        }
        Ok(())
    }

    fn closed(&mut self, closed: Closed) -> Result<(), LedgerError> {
        let complete = self.requests.closed(closed);
        complete.map_or(Ok(()), |complete| self.complete(complete))
    }

    fn complete(&mut self, complete: Complete) -> Result<(), LedgerError> {
        self.inputs.tickets.add_permits(1);
        let salt = self.salts.of(&complete.opened.origin.tenant)?;
        let body = keys::salted(&salt, &complete.opened.body);
        self.write(&Record::Request(Box::new(complete.record(body, now_ms()))));
        Ok(())
    }

    fn certify(&mut self, der: Vec<u8>) {
        let sha256 = Digest::of(&der);
        if self.certified.insert(sha256) {
            self.write(&Record::Certificate(Certificate { sha256, der: Blob(der) }));
        }
    }

    /// Adds a record to the batch. One that is too large is an error of whoever made it so, and not
    /// of this process.
    fn write(&mut self, record: &Record) {
        match record.encode() {
            Ok(bytes) => {
                if let Some(id) = record.request() {
                    self.named.push((self.batch.len(), id));
                }
                self.batch.push(bytes);
            }
            Err(reason) => tracing::error!(reason, "a record cannot be written"),
        }
    }

    /// Writes the statements whose requests all have their records, or that have waited for `max`.
    fn release(&mut self, max: Duration) {
        let now = Instant::now();
        for _ in 0..self.held.len() {
            let Some((since, stated)) = self.held.pop_front() else { break };
            let waits = stated.requests.iter().any(|id| self.requests.is_open(*id));
            if waits && now < since + max && self.held.len() < HELD_MAX {
                self.held.push_back((since, stated));
            } else {
                self.state(stated);
            }
        }
    }

    /// Writes a statement that is what it should be: signed, and by the node that was asked. One
    /// that is not says nothing, and the node counts as silent.
    fn state(&mut self, stated: Stated) {
        let Stated { node, signed, .. } = stated;
        let der = signed.certificate.to_vec();
        let statement = Statement {
            certificate: Digest::of(&der),
            statement: Blob(signed.statement.to_vec()),
            signature: Blob(signed.signature.to_vec()),
        };
        let said = ByCertificate.stated(&der, &statement);
        let whose = ByCertificate.identity(&der);
        match said.and_then(|said| Ok((said, whose?))) {
            Ok((said, whose)) if said.node == node && whose == (node.clone(), said.region) => {
                self.certify(der);
                self.write(&Record::Statement(statement));
            }
            Ok(_) => tracing::error!(target: "audit", %node, "a statement is of somebody else"),
            Err(reason) => tracing::error!(target: "audit", %node, reason, "a statement is void"),
        }
    }

    /// Puts the batch on disk.
    fn commit(&mut self) -> Result<(), LedgerError> {
        if self.batch.is_empty() {
            return Ok(());
        }
        let first = self.log.append(&self.batch)?;
        self.batch.clear();
        for (at, id) in std::mem::take(&mut self.named) {
            self.remember(id, first + at as u64);
        }
        let now = Instant::now();
        let full = self.log.tree().size - self.log.published() >= CHECKPOINT_RECORDS;
        let soon = if full { now } else { now + CHECKPOINT_INTERVAL };
        self.due = Some(self.due.map_or(soon, |due| due.min(soon)));
        Ok(())
    }

    /// Signs what is on disk, if there is anything new.
    fn publish(&mut self) -> Result<(), LedgerError> {
        self.due = None;
        let tree = self.log.tree();
        if tree.size == 0 {
            return Ok(());
        }
        let checkpoint = if tree.size > self.log.published() {
            let checkpoint = Checkpoint::sign(&self.signer, tree)?;
            self.log.publish(&checkpoint)?;
            checkpoint
        } else {
            Checkpoint::open(&Folder::note(self.log.root())?, self.signer.verifier())?
        };
        self.tell.send_replace(Some(Arc::new(checkpoint)));
        Ok(())
    }

    /// Answers who asked for receipts; what is not signed yet is signed for them.
    fn answer(&mut self) -> Result<(), LedgerError> {
        for (id, tenant, reply) in std::mem::take(&mut self.asked) {
            let receipt = match self.index.get(&id).copied() {
                Some(index) => self.receipt(index, &tenant)?,
                None => None,
            };
            // Who does not wait any more gets nothing.
            let _ = reply.send(receipt);
        }
        Ok(())
    }

    fn receipt(&mut self, index: u64, tenant: &TenantName) -> Result<Option<Receipt>, LedgerError> {
        let bytes = self.log.record(index)?;
        let record = Record::decode(&bytes).map_err(LedgerError::Record)?;
        if record.tenant() != Some(tenant) {
            return Ok(None);
        }
        if index >= self.log.published() {
            self.publish()?;
        }
        // One that a witness vouches for says more than a later one.
        let cosigned = self.cosigned.clone().filter(|cosigned| index < cosigned.tree.size);
        let Some(checkpoint) = cosigned.or_else(|| self.tell.borrow().clone()) else {
            return Ok(None);
        };
        let path = merkle::inclusion(&self.log, index, checkpoint.tree.size)?;
        let (extra, note) = (Some(bytes.clone()), checkpoint.note.clone());
        let proof = Proof { extra, index, path, note };
        Ok(Some(Receipt { record: bytes, proof: proof.to_text(), salt: self.salts.of(tenant)? }))
    }

    /// Writes what came until now, and what did not end in time as far as it got.
    fn finish(mut self) -> Result<(), LedgerError> {
        while let Ok(message) = self.inputs.messages.try_recv() {
            self.take(message)?;
        }
        while let Ok(end) = self.inputs.ends.try_recv() {
            self.closed(end)?;
        }
        while let Ok(stated) = self.inputs.stated.try_recv() {
            self.held.push_back((Instant::now(), stated));
        }
        for complete in self.requests.give_up() {
            self.complete(complete)?;
        }
        self.release(Duration::ZERO);
        self.commit()?;
        self.publish()?;
        if let Some(reply) = self.stopping.take() {
            // Who does not wait any more is told nothing.
            let _ = reply.send(());
        }
        Ok(())
    }
}
