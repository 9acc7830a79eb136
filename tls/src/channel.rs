//! One connection without its socket: bytes in, bytes out.
//!
//! ```text
//!   socket ──► Incoming ── open ──► plain text, record by record, opened where it was read
//!   plain text ── send ──► records ──► socket
//! ```
//!
//! The handshake is rustls', in its unbuffered form, which leaves reading and writing to the caller.
//! Once it is over the keys go to [`crate::records`], and data from there on costs one copy on its
//! way out and none on its way in. A [`Channel::plain`] passes the same bytes through as they are.
//!
//! The buffer of what was read is the caller's, so one thread can wait in a read while another
//! encrypts.

use std::borrow::Cow;
use std::io::{self, IoSlice};
use std::sync::Arc;

use rustls::client::UnbufferedClientConnection;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::server::UnbufferedServerConnection;
use rustls::unbuffered::{ConnectionState, UnbufferedStatus};
use rustls::{ClientConfig, ServerConfig};

use crate::records::{Opened, Records};
use crate::{Error, peer_certificate_sha256};

/// What is sealed before it is written. Larger frames are written in several calls, so that the
/// peer opens some of it while the rest is sealed.
pub const PIECE_BYTES: usize = 64 << 10;
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

/// Both directions of one connection.
pub struct Channel {
    state: State,
    /// Records of the handshake that are to be sent.
    owed: Vec<u8>,
    /// What the peer has shown, its own certificate first, once the handshake is over.
    peer_certificates: Option<Vec<CertificateDer<'static>>>,
}

enum State {
    Plain,
    Client(UnbufferedClientConnection),
    Server(UnbufferedServerConnection),
    /// The handshake is over.
    Open(Records),
    /// The handshake failed in its last step.
    Failed,
}

/// What one step of the handshake came to.
enum Step {
    /// There may be more.
    Again,
    Over,
    /// Nothing more without more bytes.
    Blocked,
}

impl Channel {
    /// Bytes as they are, without TLS.
    pub fn plain() -> Self {
        Self::with(State::Plain)
    }

    /// The end that dialled. The handshake starts with the first [`Channel::shake`].
    pub fn client(config: Arc<ClientConfig>) -> Result<Self, Error> {
        // The name is neither sent nor checked: the identity in the certificate is what counts.
        let name =
            ServerName::try_from("entente").map_err(|error| Error::Room(error.to_string()))?;
        let connection = UnbufferedClientConnection::new(config, name)?;
        Ok(Self::with(State::Client(connection)))
    }

    /// The end that was dialled.
    pub fn server(config: Arc<ServerConfig>) -> Result<Self, Error> {
        let connection = UnbufferedServerConnection::new(config)?;
        Ok(Self::with(State::Server(connection)))
    }

    fn with(state: State) -> Self {
        Self { state, owed: Vec::new(), peer_certificates: None }
    }

    /// The peer's certificates, its own one first; there are none before the handshake is over, and
    /// never where nothing is encrypted.
    pub fn peer_certificates(&self) -> Option<&[CertificateDer<'static>]> {
        self.peer_certificates.as_deref()
    }

    /// The fingerprint of the first of them.
    pub fn peer_certificate_sha256(&self) -> Option<[u8; 32]> {
        peer_certificate_sha256(self.peer_certificates()).ok()
    }

    /// Whether this passes bytes as they are.
    pub fn is_plain(&self) -> bool {
        matches!(self.state, State::Plain)
    }

    /// Takes the handshake as far as it gets with what was read. True once it is over. Either way
    /// what [`Channel::take_owed`] gives must be written, also after an error: it tells the peer.
    pub fn shake(&mut self, incoming: &mut Incoming) -> Result<bool, Error> {
        if matches!(self.state, State::Plain | State::Open(_)) {
            return Ok(true);
        }
        loop {
            match self.step(incoming) {
                Ok(Step::Again) => {}
                Ok(Step::Over) => return self.end_handshake().map(|()| true),
                Ok(Step::Blocked) => return Ok(false),
                Err(error) => {
                    // The alert that says why waits in the connection.
                    let _ = self.step(&mut Incoming::default());
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
        let records = match &mut self.state {
            State::Plain => {
                sink(incoming.unopened());
                incoming.discard(incoming.unopened().len());
                return Ok(true);
            }
            State::Open(records) => records,
            _ => return Err(rustls::Error::HandshakeNotComplete.into()),
        };
        loop {
            match records.open(incoming.unopened_mut())? {
                Opened::Data(plain, len) => {
                    sink(plain);
                    incoming.discard(len);
                }
                Opened::Partial => return Ok(true),
                Opened::Closed => return Ok(false),
            }
        }
    }

    /// Seals `pieces` and hands the records to `write`, about [`PIECE_BYTES`] in each call. It gets
    /// the channel too, because who cannot write must go on reading.
    pub fn send<'a>(
        &mut self,
        pieces: impl Iterator<Item = &'a [u8]>,
        mut write: impl FnMut(&mut Self, &mut [IoSlice<'_>]) -> io::Result<()>,
    ) -> io::Result<()> {
        let (mut sealed, mut sealed_bytes) = (Vec::new(), 0);
        let mut pieces = pieces.peekable();
        while let Some(piece) = pieces.next() {
            self.seal(piece, &mut sealed)?;
            sealed_bytes += piece.len();
            if sealed_bytes >= PIECE_BYTES || pieces.peek().is_none() {
                let mut slices: Vec<_> = sealed.iter().map(|bytes| IoSlice::new(bytes)).collect();
                write(self, &mut slices)?;
                sealed.clear();
                sealed_bytes = 0;
            }
        }
        Ok(())
    }

    fn seal<'a>(&mut self, plain: &'a [u8], out: &mut Vec<Cow<'a, [u8]>>) -> Result<(), Error> {
        match &mut self.state {
            State::Plain => out.push(plain.into()),
            State::Open(records) => records.seal(plain, |record| out.push(record.into()))?,
            _ => return Err(rustls::Error::HandshakeNotComplete.into()),
        }
        Ok(())
    }

    fn step(&mut self, incoming: &mut Incoming) -> Result<Step, Error> {
        let unopened = incoming.unopened_mut();
        let (discard, step) = match &mut self.state {
            State::Client(tls) => advance(tls.process_tls_records(unopened), &mut self.owed),
            State::Server(tls) => advance(tls.process_tls_records(unopened), &mut self.owed),
            _ => (0, Err(rustls::Error::HandshakeNotComplete.into())),
        };
        incoming.discard(discard);
        step
    }

    /// Takes the keys over.
    fn end_handshake(&mut self) -> Result<(), Error> {
        let records = match std::mem::replace(&mut self.state, State::Failed) {
            State::Client(tls) => {
                self.peer_certificates = tls.peer_certificates().map(<[_]>::to_vec);
                let (secrets, keys) = tls.dangerous_into_kernel_connection()?;
                Records::new(secrets, keys)?
            }
            State::Server(tls) => {
                self.peer_certificates = tls.peer_certificates().map(<[_]>::to_vec);
                let (secrets, keys) = tls.dangerous_into_kernel_connection()?;
                Records::new(secrets, keys)?
            }
            _ => return Err(rustls::Error::HandshakeNotComplete.into()),
        };
        self.state = State::Open(records);
        Ok(())
    }
}

/// Does what the handshake wants done next, and says how many bytes of what was read are used up.
fn advance<Data>(
    status: UnbufferedStatus<'_, '_, Data>,
    owed: &mut Vec<u8>,
) -> (usize, Result<Step, Error>) {
    let UnbufferedStatus { discard, state } = status;
    let step = match state {
        Err(error) => Err(error.into()),
        Ok(ConnectionState::EncodeTlsData(mut data)) => {
            encode(|into| data.encode(into).map_err(|error| error.to_string()), owed)
        }
        Ok(ConnectionState::TransmitTlsData(data)) => {
            data.done();
            Ok(Step::Again)
        }
        Ok(ConnectionState::BlockedHandshake) => Ok(Step::Blocked),
        Ok(ConnectionState::WriteTraffic(_)) => Ok(Step::Over),
        Ok(ConnectionState::PeerClosed | ConnectionState::Closed) => Err(Error::Closed),
        // Neither early data nor data with the end of the handshake: nodes greet first, and hear
        // nothing before that.
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
