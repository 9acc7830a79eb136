//! The records of one connection, without its socket: bytes in, bytes out.
//!
//! ```text
//!   socket ──► Incoming ── open ──► plain text, record by record, decrypted where it was read
//!   plain text ── send ──► Outgoing ──► socket
//! ```
//!
//! The buffers are the caller's and are used again for every frame, so one thread can wait in a
//! read while another encrypts. A [`Channel::plain`] passes the same bytes through as they are.
//!
//! rustls' unbuffered connection is used because it decrypts in place, in reads as long as we like,
//! and writes records where they are sent from; its buffered one reads a few KiB at a time.

use std::io;
use std::sync::Arc;

use rustls::client::UnbufferedClientConnection;
use rustls::pki_types::ServerName;
use rustls::server::UnbufferedServerConnection;
use rustls::unbuffered::{ConnectionState, UnbufferedStatus};
use rustls::{ClientConfig, ServerConfig};

use crate::Error;

/// Most plain text that is sealed at once. Larger frames are written in several calls, so that the
/// peer decrypts some of it while the rest is encrypted.
pub const PIECE_BYTES: usize = 64 << 10;
/// What records add to a piece (5 + 1 + 16 bytes to each 16 KiB), and room for what is owed.
const OVERHEAD_BYTES: usize = 8 << 10;
/// Pieces that are written together.
const PIECES_MAX: usize = 2;
/// What one read may bring. A record has at most 16 KiB and some, so this always holds a whole one.
const INCOMING_BYTES: usize = 128 << 10;

/// What was read and not opened yet.
pub struct Incoming {
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Default for Incoming {
    fn default() -> Self {
        Self { buffer: vec![0; INCOMING_BYTES].into(), start: 0, end: 0 }
    }
}

impl Incoming {
    /// Where the next read goes; never empty, unless the peer's records are too long.
    pub fn space(&mut self) -> &mut [u8] {
        // What is left is part of one record at most, so little is moved.
        self.buffer.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        &mut self.buffer[self.end..]
    }

    /// Takes note that so many bytes were read.
    pub fn advance(&mut self, read: usize) {
        self.end = (self.end + read).min(self.buffer.len());
    }

    /// What was read and not opened.
    pub fn unopened(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    fn unopened_mut(&mut self) -> &mut [u8] {
        &mut self.buffer[self.start..self.end]
    }

    fn discard(&mut self, len: usize) {
        self.start = (self.start + len).min(self.end);
    }
}

/// What was sealed and is to be written.
pub struct Outgoing {
    buffer: Box<[u8]>,
    len: usize,
}

impl Default for Outgoing {
    fn default() -> Self {
        Self { buffer: vec![0; PIECES_MAX * (PIECE_BYTES + OVERHEAD_BYTES)].into(), len: 0 }
    }
}

impl Outgoing {
    /// The bytes to write.
    fn sealed(&self) -> &[u8] {
        &self.buffer[..self.len]
    }

    fn has_room(&self) -> bool {
        self.buffer.len() - self.len >= PIECE_BYTES + OVERHEAD_BYTES
    }

    fn extend(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let room = self.buffer.len() - self.len;
        let into = self.buffer[self.len..]
            .get_mut(..bytes.len())
            .ok_or_else(|| Error::Room(format!("{} bytes into {room}", bytes.len())))?;
        into.copy_from_slice(bytes);
        self.len += bytes.len();
        Ok(())
    }
}

/// Both directions of one connection.
pub struct Channel {
    state: State,
    /// Records that TLS itself wants sent, ahead of anything else.
    owed: Vec<u8>,
}

enum State {
    Plain,
    Client(UnbufferedClientConnection),
    Server(UnbufferedServerConnection),
}

/// What one step of the connection came to.
enum Step {
    /// There may be more.
    Again,
    /// Nothing more without more bytes; plain text can be sent.
    Ready,
    /// Nothing more without more bytes, and the handshake is not over.
    Blocked,
    Closed,
}

impl Channel {
    /// Bytes as they are, without TLS.
    pub fn plain() -> Self {
        Self { state: State::Plain, owed: Vec::new() }
    }

    /// The end that dialled. The handshake starts with the first [`Channel::shake`].
    pub fn client(config: Arc<ClientConfig>) -> Result<Self, Error> {
        // The name is neither sent nor checked: the identity in the certificate is what counts.
        let name =
            ServerName::try_from("entente").map_err(|error| Error::Room(error.to_string()))?;
        let connection = UnbufferedClientConnection::new(config, name)?;
        Ok(Self { state: State::Client(connection), owed: Vec::new() })
    }

    /// The end that was dialled.
    pub fn server(config: Arc<ServerConfig>) -> Result<Self, Error> {
        let connection = UnbufferedServerConnection::new(config)?;
        Ok(Self { state: State::Server(connection), owed: Vec::new() })
    }

    /// Whether this passes bytes as they are.
    pub fn is_plain(&self) -> bool {
        matches!(self.state, State::Plain)
    }

    /// Takes the handshake as far as it gets with what was read. True once it is over. Either way
    /// what [`Channel::take_owed`] gives must be written, also after an error: it tells the peer.
    pub fn shake(&mut self, incoming: &mut Incoming) -> Result<bool, Error> {
        if self.is_plain() {
            return Ok(true);
        }
        loop {
            match self.step(incoming, &mut |_| {}) {
                Ok(Step::Again) => {}
                Ok(Step::Ready) => return Ok(true),
                Ok(Step::Blocked) => return Ok(false),
                Ok(Step::Closed) => return Err(Error::Closed),
                Err(error) => {
                    // The alert that says why waits in the connection.
                    let _ = self.step(&mut Incoming::default(), &mut |_| {});
                    return Err(error);
                }
            }
        }
    }

    /// What TLS wants sent.
    pub fn take_owed(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.owed)
    }

    /// Opens every record that was read whole and hands its plain text to `sink`. False once the
    /// peer has said that nothing more will come.
    pub fn open(
        &mut self,
        incoming: &mut Incoming,
        mut sink: impl FnMut(&[u8]),
    ) -> Result<bool, Error> {
        loop {
            match self.step(incoming, &mut sink)? {
                Step::Again => {}
                Step::Ready | Step::Blocked => return Ok(true),
                Step::Closed => return Ok(false),
            }
        }
    }

    /// Seals at most [`PIECE_BYTES`] behind what `out` holds.
    fn seal(&mut self, plain: &[u8], out: &mut Outgoing) -> Result<(), Error> {
        if !self.owed.is_empty() {
            out.extend(&self.take_owed())?;
        }
        loop {
            let sealed = match &mut self.state {
                State::Plain => return out.extend(plain),
                State::Client(tls) => encrypt(tls.process_tls_records(&mut []), plain, out)?,
                State::Server(tls) => encrypt(tls.process_tls_records(&mut []), plain, out)?,
            };
            if sealed {
                return Ok(());
            }
        }
    }

    /// Seals `pieces`, each of at most [`PIECE_BYTES`], and hands the records to `write`, which gets
    /// them in few calls: one, if they fit into `out`. It gets the channel too, because who cannot
    /// write must go on reading.
    pub fn send<'a>(
        &mut self,
        pieces: impl Iterator<Item = &'a [u8]>,
        out: &mut Outgoing,
        mut write: impl FnMut(&mut Self, &[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        out.len = 0;
        for piece in pieces {
            if !out.has_room() {
                write(self, out.sealed())?;
                out.len = 0;
            }
            self.seal(piece, out)?;
        }
        write(self, out.sealed())
    }

    fn step(
        &mut self,
        incoming: &mut Incoming,
        sink: &mut impl FnMut(&[u8]),
    ) -> Result<Step, Error> {
        let unopened = incoming.unopened_mut();
        let (discard, step) = match &mut self.state {
            State::Plain => {
                sink(unopened);
                (unopened.len(), Ok(Step::Ready))
            }
            State::Client(tls) => advance(tls.process_tls_records(unopened), &mut self.owed, sink),
            State::Server(tls) => advance(tls.process_tls_records(unopened), &mut self.owed, sink),
        };
        incoming.discard(discard);
        step
    }
}

/// Does what the connection wants done next, and says how many bytes of what was read are used up.
fn advance<Data>(
    status: UnbufferedStatus<'_, '_, Data>,
    owed: &mut Vec<u8>,
    sink: &mut impl FnMut(&[u8]),
) -> (usize, Result<Step, Error>) {
    let UnbufferedStatus { mut discard, state } = status;
    let step = match state {
        Err(error) => Err(error.into()),
        Ok(ConnectionState::ReadTraffic(mut traffic)) => loop {
            match traffic.next_record() {
                Some(Ok(record)) => {
                    discard += record.discard;
                    sink(record.payload);
                }
                Some(Err(error)) => break Err(error.into()),
                None => break Ok(Step::Again),
            }
        },
        Ok(ConnectionState::EncodeTlsData(mut data)) => {
            encode(|into| data.encode(into).map_err(|error| error.to_string()), owed)
        }
        Ok(ConnectionState::TransmitTlsData(data)) => {
            data.done();
            Ok(Step::Again)
        }
        Ok(ConnectionState::BlockedHandshake) => Ok(Step::Blocked),
        Ok(ConnectionState::WriteTraffic(_)) => Ok(Step::Ready),
        Ok(ConnectionState::PeerClosed | ConnectionState::Closed) => Ok(Step::Closed),
        // Early data is never accepted.
        Ok(_) => Err(rustls::Error::HandshakeNotComplete.into()),
    };
    (discard, step)
}

/// A record of the handshake goes behind the others that are owed.
fn encode(
    write: impl FnOnce(&mut [u8]) -> Result<usize, String>,
    owed: &mut Vec<u8>,
) -> Result<Step, Error> {
    let start = owed.len();
    // Longer than any record.
    owed.resize(start + (17 << 10), 0);
    let written = write(&mut owed[start..]).map_err(Error::Room)?;
    owed.truncate(start + written);
    Ok(Step::Again)
}

/// Encrypts, unless TLS has something to say first; then that goes out and this is false.
fn encrypt<Data>(
    status: UnbufferedStatus<'_, '_, Data>,
    plain: &[u8],
    out: &mut Outgoing,
) -> Result<bool, Error> {
    let into = &mut out.buffer[out.len..];
    let (written, sealed) = match status.state? {
        ConnectionState::WriteTraffic(mut traffic) => {
            (traffic.encrypt(plain, into).map_err(|error| error.to_string()), true)
        }
        ConnectionState::EncodeTlsData(mut data) => {
            (data.encode(into).map_err(|error| error.to_string()), false)
        }
        ConnectionState::TransmitTlsData(data) => {
            data.done();
            (Ok(0), false)
        }
        ConnectionState::PeerClosed | ConnectionState::Closed => return Err(Error::Closed),
        _ => return Err(rustls::Error::HandshakeNotComplete.into()),
    };
    out.len += written.map_err(Error::Room)?;
    Ok(sealed)
}
