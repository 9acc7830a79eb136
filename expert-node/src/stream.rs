//! The second network door: frames on a plain byte stream, for the transport `stream`.
//!
//! It shares the port with gRPC; a connection that starts with [`PREFACE`] comes here. Each has one
//! thread, which reads a frame, computes it if nobody else computes, and writes the answer: a frame
//! changes threads nowhere. Answers to frames that somebody else computes are written by that
//! thread.
//!
//! Invariant: a peer that does not read its answers is given up after [`WRITE_MAX`], so it cannot
//! hold up the others for longer.

use std::io::{self, Read};
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread;

use entente_proto::frame::{Answer, Dispatch, Refusal};
use entente_proto::ids::ExchangeId;
use entente_proto::stream::{FrameReader, FrameWriter, Framed, PREFACE};
use entente_proto::wire;

use crate::limits::{HELLO_MAX, STREAM_CONNECTIONS_MAX, WRITE_MAX};
use crate::node::NodeHandle;

/// The connections that are open, so that they can be counted and closed.
#[derive(Default)]
pub(crate) struct Connections(Mutex<Vec<Weak<TcpStream>>>);

impl Connections {
    /// Serves a connection on a thread of its own, if there is room for one more.
    pub(crate) fn serve(&self, node: NodeHandle, socket: TcpStream) -> io::Result<()> {
        let socket = Arc::new(socket);
        let mut open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        open.retain(|other| other.strong_count() > 0);
        if open.len() >= STREAM_CONNECTIONS_MAX {
            return Err(io::Error::other("too many connections"));
        }
        open.push(Arc::downgrade(&socket));
        let serve = move || {
            if let Err(error) = run(&node, &socket) {
                tracing::debug!(%error, "a connection broke");
            }
            let _ = socket.shutdown(Shutdown::Both);
        };
        thread::Builder::new().name("stream".to_owned()).spawn(serve)?;
        Ok(())
    }

    /// Ends every connection.
    pub(crate) fn close(&self) {
        let open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for socket in open.iter().filter_map(Weak::upgrade) {
            // A socket that is closed already is what is wanted.
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}

impl Drop for Connections {
    fn drop(&mut self) {
        self.close();
    }
}

/// Writes to one connection, from whichever thread has an answer.
struct Outgoing {
    socket: Arc<TcpStream>,
    frames: Mutex<FrameWriter>,
}

impl Outgoing {
    fn answer(&self, answer: Answer) {
        let mut frames = self.frames.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = frames.write(&mut &*self.socket, &Framed::answer(answer)) {
            // Half a frame may be out; what follows could not be told from it.
            tracing::debug!(%error, "an answer was not taken");
            let _ = self.socket.shutdown(Shutdown::Both);
        }
    }
}

/// Serves one connection until it ends.
fn run(node: &NodeHandle, socket: &Arc<TcpStream>) -> io::Result<()> {
    socket.set_nonblocking(false)?;
    socket.set_write_timeout(Some(WRITE_MAX))?;
    greet(node, socket)?;
    let outgoing = Arc::new(Outgoing { socket: socket.clone(), frames: Mutex::default() });
    let mut frames = FrameReader::default();
    while let Some(frame) = frames.read::<wire::Dispatch>(&mut &**socket)? {
        let exchange = ExchangeId(frame.message.exchange_id);
        let outgoing = outgoing.clone();
        match Dispatch::try_from(frame.into_wire()) {
            Ok(frame) => node.compute(frame, Box::new(move |answer| outgoing.answer(answer))),
            Err(error) => {
                let result = Err(Refusal::Invalid(error.to_string()));
                outgoing.answer(Answer { exchange, fence: None, result });
            }
        }
    }
    Ok(())
}

/// Takes the preface and says who this node is.
fn greet(node: &NodeHandle, socket: &TcpStream) -> io::Result<()> {
    socket.set_read_timeout(Some(HELLO_MAX))?;
    let mut preface = [0; PREFACE.len()];
    (&*socket).read_exact(&mut preface)?;
    if preface != PREFACE {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "another protocol"));
    }
    socket.set_read_timeout(None)?;
    let message = wire::NodeInfo::from(node.info());
    FrameWriter::default().write(&mut &*socket, &Framed { message, rows: bytes::Bytes::new() })
}
