//! The second network door: frames on a byte stream, for the transport `stream`.
//!
//! It shares the port with gRPC ([`crate::door`] tells them apart and does the handshake). Each
//! connection has one thread, which reads a frame, computes it if nobody else computes, and writes
//! the answer: a frame changes threads nowhere. Answers to frames that somebody else computes are
//! written by that thread.
//!
//! Invariants:
//! - what encrypts is never locked while this side waits for bytes, so an answer never waits for a
//!   frame;
//! - a peer that does not read its answers is given up after [`WRITE_MAX`], so it cannot hold up
//!   the others for longer.

use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;

use entente_proto::frame::{Answer, Dispatch, Refusal};
use entente_proto::ids::ExchangeId;
use entente_proto::stream::{FrameReader, FrameWriter, Framed};
use entente_proto::wire;
use entente_tls::{Channel, Incoming, PIECE_BYTES};
use prost::Message;

use crate::limits::{STREAM_CONNECTIONS_MAX, WRITE_MAX};
use crate::node::NodeHandle;

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
    ) -> io::Result<()> {
        socket.set_nonblocking(false)?;
        socket.set_write_timeout(Some(WRITE_MAX))?;
        let sealer = Mutex::new(Sealer { channel, frames: FrameWriter::default() });
        let connection = Arc::new(Connection { socket, sealer });
        let mut open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        open.retain(|other| other.strong_count() > 0);
        if open.len() >= STREAM_CONNECTIONS_MAX {
            return Err(io::Error::other("too many connections"));
        }
        open.push(Arc::downgrade(&connection));
        let serve = move || {
            if let Err(error) = run(&node, &connection, incoming) {
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

struct Connection {
    socket: TcpStream,
    sealer: Mutex<Sealer>,
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

    fn write<M: Message>(&self, frame: &Framed<M>) -> io::Result<()> {
        let Sealer { channel, frames } = &mut *self.sealer();
        let pieces = frames.pieces(frame, PIECE_BYTES)?;
        channel.send(pieces, |_, records| write_all(&self.socket, records))
    }

    fn answer(&self, answer: Answer) {
        if let Err(error) = self.write(&Framed::answer(answer)) {
            // Half a frame may be out; what follows could not be told from it.
            tracing::debug!(%error, "an answer was not taken");
            self.close();
        }
    }

    fn close(&self) {
        // A socket that is closed already is what is wanted.
        let _ = self.socket.shutdown(Shutdown::Both);
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
fn run(node: &NodeHandle, connection: &Arc<Connection>, mut incoming: Incoming) -> io::Result<()> {
    connection
        .write(&Framed { message: wire::NodeInfo::from(node.info()), rows: bytes::Bytes::new() })?;
    let mut frames = FrameReader::default();
    // Frames may have come with the end of the handshake.
    while connection.sealer().channel.open(&mut incoming, |plain| frames.extend(plain))? {
        while let Some(frame) = frames.next_frame::<wire::Dispatch>()? {
            take(node, connection, frame);
        }
        match (&connection.socket).read(incoming.space())? {
            0 => break,
            read => incoming.advance(read),
        }
    }
    if frames.is_between_frames() { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

fn take(node: &NodeHandle, connection: &Arc<Connection>, frame: Framed<wire::Dispatch>) {
    let exchange = ExchangeId(frame.message.exchange_id);
    match Dispatch::try_from(frame.into_wire()) {
        Ok(frame) => {
            let connection = connection.clone();
            node.compute(frame, Box::new(move |answer| connection.answer(answer)));
        }
        Err(error) => {
            let refusal = Refusal::Invalid(error.to_string());
            node.account().refused(&refusal);
            let result = Err(refusal);
            connection.answer(Answer { exchange, fence: None, result });
        }
    }
}
