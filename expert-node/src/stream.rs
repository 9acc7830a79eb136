//! The second network door: frames on a byte stream, for the transport `stream`.
//!
//! It shares the port with gRPC ([`crate::door`] tells them apart and does the handshake). Each
//! connection has one thread, which reads a frame, computes it if nobody else computes, and writes
//! the answer: a frame changes threads nowhere. Answers to frames that somebody else computes are
//! written by that thread.
//!
//! Where rows travel by NCCL ([`crate::lanes`]) only what is said about them travels here.
//!
//! Invariants:
//! - what encrypts is never locked while this side waits for bytes, so an answer never waits for a
//!   frame;
//! - a peer that does not read its answers is given up after [`WRITE_MAX`], so it cannot hold up
//!   the others for longer.

use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::Duration;

use entente_proto::frame::{Answer, Dispatch, Refusal};
use entente_proto::ids::ExchangeId;
use entente_proto::stream::{FrameReader, FrameWriter, Framed};
use entente_proto::wire;
use entente_tls::{Channel, Incoming, PIECE_BYTES};
use prost::Message;

use crate::lanes;
use crate::limits::{STREAM_CONNECTIONS_MAX, WRITE_MAX};
use crate::node::{NodeHandle, Reply};

/// How rows travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rows {
    /// In their frames.
    InFrames,
    /// By NCCL, their frames beside them.
    ByNccl,
}

/// The connections that are open, so that they can be counted and closed.
#[derive(Default)]
pub(crate) struct Connections(Mutex<Vec<Weak<Connection>>>);

impl Connections {
    /// Serves a connection on a thread of its own, if there is room for one more. Its peer is known
    /// by now; `incoming` is what it said beyond that.
    pub(crate) fn serve(
        &self,
        node: NodeHandle,
        socket: TcpStream,
        channel: Channel,
        incoming: Incoming,
        rows: Rows,
    ) -> io::Result<()> {
        socket.set_nonblocking(false)?;
        socket.set_write_timeout(Some(WRITE_MAX))?;
        let sealer = Mutex::new(Sealer { channel, frames: FrameWriter::default() });
        let (by_lane, closed) = (Mutex::default(), AtomicBool::new(false));
        let connection = Arc::new(Connection { socket, sealer, by_lane, closed });
        let mut open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        open.retain(|other| other.strong_count() > 0);
        if open.len() >= STREAM_CONNECTIONS_MAX {
            return Err(io::Error::other("too many connections"));
        }
        open.push(Arc::downgrade(&connection));
        let serve = move || {
            if let Err(error) = run(&node, &connection, incoming, rows) {
                tracing::debug!(%error, "a connection broke");
            }
            connection.close();
        };
        thread::Builder::new().name("stream".to_owned()).spawn(serve)?;
        Ok(())
    }

    /// Ends every connection.
    pub(crate) fn close(&self) {
        let open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        open.iter().filter_map(Weak::upgrade).for_each(|connection| connection.close());
    }
}

impl Drop for Connections {
    fn drop(&mut self) {
        self.close();
    }
}

pub(crate) struct Connection {
    socket: TcpStream,
    sealer: Mutex<Sealer>,
    /// Who writes answers whose rows travel by NCCL; nobody where they travel in their frames.
    by_lane: Mutex<Option<SyncSender<Framed<wire::Combine>>>>,
    closed: AtomicBool,
}

/// What encrypts and decrypts, and the buffer that frames begin in.
struct Sealer {
    channel: Channel,
    frames: FrameWriter,
}

impl Connection {
    fn sealer(&self) -> MutexGuard<'_, Sealer> {
        self.sealer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn write<M: Message>(&self, frame: &Framed<M>) -> io::Result<()> {
        let Sealer { channel, frames } = &mut *self.sealer();
        let pieces = frames.pieces(frame, PIECE_BYTES)?;
        channel.send(pieces, |_, records| write_all(&self.socket, records))
    }

    /// Writes a message whose rows, of this length, travel another way.
    pub(crate) fn write_apart<M: Message>(&self, message: &M, rows_len: usize) -> io::Result<()> {
        let Sealer { channel, frames } = &mut *self.sealer();
        let pieces = frames.apart(message, rows_len, PIECE_BYTES)?;
        channel.send(pieces, |_, records| write_all(&self.socket, records))
    }

    /// Has answers go to `lane` from now on, until the connection is closed.
    pub(crate) fn answer_by(&self, lane: SyncSender<Framed<wire::Combine>>) {
        *self.by_lane() = Some(lane);
    }

    fn by_lane(&self) -> MutexGuard<'_, Option<SyncSender<Framed<wire::Combine>>>> {
        self.by_lane.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn answer(&self, answer: Answer) {
        let answer = Framed::answer(answer);
        if let Some(lane) = &*self.by_lane() {
            if lane.try_send(answer).is_ok() {
                return;
            }
            tracing::debug!("an answer was not taken: too many wait");
        } else if let Err(error) = self.write(&answer) {
            tracing::debug!(%error, "an answer was not taken");
        } else {
            return;
        }
        // Half a frame may be out, or one is missing; what follows could not be told from it.
        self.close();
    }

    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::Release);
        // A socket that is closed already is what is wanted.
        let _ = self.socket.shutdown(Shutdown::Both);
        // Whoever waits for answers ends.
        *self.by_lane() = None;
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// How long a read may take.
    pub(crate) fn read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.socket.set_read_timeout(timeout)
    }
}

/// What has come of a connection and is no frame yet.
pub(crate) struct Inbound {
    incoming: Incoming,
    pub(crate) frames: FrameReader,
}

impl Inbound {
    /// Opens what has come, and reads more; false once nothing more will come.
    pub(crate) fn read(&mut self, connection: &Connection) -> io::Result<bool> {
        let read = (&connection.socket).read(self.incoming.space())?;
        self.incoming.advance(read);
        Ok(read > 0 && self.open(connection)?)
    }

    fn open(&mut self, connection: &Connection) -> io::Result<bool> {
        let frames = &mut self.frames;
        Ok(connection.sealer().channel.open(&mut self.incoming, |plain| frames.extend(plain))?)
    }

    /// The stream may not end within a frame.
    pub(crate) fn end(&self) -> io::Result<()> {
        if self.frames.is_between_frames() {
            Ok(())
        } else {
            Err(io::ErrorKind::UnexpectedEof.into())
        }
    }
}

fn write_all(mut socket: &TcpStream, mut records: &mut [IoSlice<'_>]) -> io::Result<()> {
    while !records.is_empty() {
        match socket.write_vectored(records) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => IoSlice::advance_slices(&mut records, written),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Serves one connection until it ends.
fn run(
    node: &NodeHandle,
    connection: &Arc<Connection>,
    incoming: Incoming,
    rows: Rows,
) -> io::Result<()> {
    connection
        .write(&Framed { message: wire::NodeInfo::from(node.info()), rows: bytes::Bytes::new() })?;
    let mut inbound = Inbound { incoming, frames: FrameReader::default() };
    // Frames may have come with the end of the handshake.
    let mut open = inbound.open(connection)?;
    if rows == Rows::ByNccl {
        return lanes::run(node, connection, inbound);
    }
    while open {
        while let Some(frame) = inbound.frames.next_frame::<wire::Dispatch>()? {
            take(node, connection, frame, NodeHandle::compute);
        }
        open = inbound.read(connection)?;
    }
    inbound.end()
}

/// Has a frame computed, on this thread or on another, and answered.
pub(crate) fn take(
    node: &NodeHandle,
    connection: &Arc<Connection>,
    frame: Framed<wire::Dispatch>,
    submit: fn(&NodeHandle, Dispatch, Reply),
) {
    let exchange = ExchangeId(frame.message.exchange_id);
    match Dispatch::try_from(frame.into_wire()) {
        Ok(frame) => {
            let connection = connection.clone();
            submit(node, frame, Box::new(move |answer| connection.answer(answer)));
        }
        Err(error) => {
            let refusal = Refusal::Invalid(error.to_string());
            node.account().refused(&refusal);
            let result = Err(refusal);
            connection.answer(Answer { exchange, fence: None, result });
        }
    }
}
