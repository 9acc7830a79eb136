//! The node's end of a connection whose rows travel by NCCL.
//!
//! ```text
//!   connection's thread ── heads ── rows of each from its lane ──► compute
//!   compute ── answers ──► queue ──► a thread: head, then rows into their lane
//! ```
//!
//! Heads and what TLS protects travel as on any byte stream, so that who is there, what is asked and
//! what is refused are the same; only the bytes of rows go another way.
//!
//! Invariants:
//! - rows go into a lane in the order in which their heads are written, as one thread does both, and
//!   are taken from it in that order;
//! - what fails in a lane ends the connection, as what fails in a socket does: the coordinator asks
//!   again, over the network;
//! - nobody waits for a lane whose connection has ended.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread;

use entente_model::kernels::cuda::nccl::{Lane, Rank};
use entente_proto::stream::Framed;
use entente_proto::wire;

use crate::limits::{HELLO_MAX, QUEUE_LEN_MAX};
use crate::nccl::Nccl;
use crate::node::NodeHandle;
use crate::stream::{Connection, Inbound, take};

/// Counts what travels by NCCL.
#[derive(Debug, Default)]
pub(crate) struct NcclUse {
    connections: AtomicU64,
    rows_bytes: AtomicU64,
}

impl NcclUse {
    /// Connections now, and bytes of rows and answers since the start.
    pub(crate) fn read(&self) -> [u64; 2] {
        [&self.connections, &self.rows_bytes].map(|count| count.load(Ordering::Relaxed))
    }

    fn count(&self, rows_bytes: usize) {
        self.rows_bytes.fetch_add(rows_bytes as u64, Ordering::Relaxed);
    }
}

/// One of the connections, for as long as it serves.
struct Counted(Arc<NcclUse>);

impl Counted {
    fn new(usage: &Arc<NcclUse>) -> Self {
        usage.connections.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(usage))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Serves a connection that has been greeted, until it ends.
pub(crate) fn run(
    node: &NodeHandle,
    connection: &Arc<Connection>,
    mut inbound: Inbound,
) -> io::Result<()> {
    let (nccl, [mut rows, answers]) = agree(node, connection, &mut inbound)?;
    let usage = Counted::new(node.nccl_use());
    let (to_lane, queue) = sync_channel(QUEUE_LEN_MAX);
    connection.answer_by(to_lane);
    let answering = (nccl.clone(), Arc::clone(connection), Arc::clone(&usage.0));
    let answer_all = move || {
        let (nccl, connection, usage) = answering;
        if let Err(error) = answer(&nccl, &connection, &usage, &queue, answers) {
            tracing::warn!(%error, "answers go no more by NCCL");
        }
        connection.close();
    };
    thread::Builder::new().name("nccl-answers".to_owned()).spawn(answer_all)?;
    let given_up = || connection.is_closed();
    loop {
        while let Some((message, rows_len)) = inbound.frames.next_apart::<wire::Dispatch>()? {
            let rows = match rows_len {
                // What is no frame; it is answered as such.
                0 => Vec::new(),
                _ => rows
                    .receive(rows_len, &nccl.patience(&given_up))
                    .inspect_err(|error| tracing::warn!(%error, "rows came no more by NCCL"))
                    .map_err(io::Error::other)?,
            };
            usage.0.count(rows.len());
            let frame = Framed { message, rows: rows.into() };
            // Not on this thread: the coordinator's end waits for the next rows to be taken.
            take(node, connection, frame, NodeHandle::submit);
        }
        if !inbound.read(connection)? {
            return inbound.end();
        }
    }
}

/// Hears what the coordinator asks for, and joins it if nothing is in the way. It is told either way,
/// and that both ends have joined.
fn agree(
    node: &NodeHandle,
    connection: &Connection,
    inbound: &mut Inbound,
) -> io::Result<(Nccl, [Lane; 2])> {
    let request = hear(connection, inbound)?;
    let judged = node.nccl().and_then(|nccl| Ok((nccl, nccl.judge(&request)?)));
    let (nccl, ids) = said(connection, judged)?;
    let joined = nccl.open(ids, Rank::Second, &|| connection.is_closed());
    Ok((nccl.clone(), said(connection, joined.map_err(|error| error.to_string()))?))
}

fn hear(connection: &Connection, inbound: &mut Inbound) -> io::Result<wire::NcclRequest> {
    connection.read_timeout(Some(HELLO_MAX))?;
    loop {
        if let Some(request) = inbound.frames.next_frame()? {
            connection.read_timeout(None)?;
            return Ok(request.message);
        }
        if !inbound.read(connection)? {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
}

/// Tells the coordinator how something went.
fn said<T>(connection: &Connection, outcome: Result<T, String>) -> io::Result<T> {
    let refused = outcome.as_ref().err().cloned().unwrap_or_default();
    let message = wire::NcclReply { refused };
    connection.write(&Framed { message, rows: bytes::Bytes::new() })?;
    outcome.map_err(io::Error::other)
}

/// Writes answers until nobody has any more.
fn answer(
    nccl: &Nccl,
    connection: &Connection,
    usage: &NcclUse,
    queue: &Receiver<Framed<wire::Combine>>,
    mut lane: Lane,
) -> io::Result<()> {
    let given_up = || connection.is_closed();
    while let Ok(Framed { message, rows }) = queue.recv() {
        connection.write_apart(&message, rows.len())?;
        // A refusal has no rows.
        if !rows.is_empty() {
            lane.send(&rows, &nccl.patience(&given_up)).map_err(io::Error::other)?;
            usage.count(rows.len());
        }
    }
    Ok(())
}
