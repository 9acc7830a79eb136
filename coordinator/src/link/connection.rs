//! One connection of the transport `stream`, once it is up: owned by the engine's thread alone.

use std::io::{self, IoSlice, Read, Write};
use std::time::{Duration, Instant};

use entente_proto::frame::{Answer, Dispatch};
use entente_proto::ids::NodeName;
use entente_proto::stream::{FrameReader, FrameWriter, Framed};
use entente_proto::wire;
use entente_tls::{Channel, Incoming, PIECE_BYTES};
use mio::net::TcpStream;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::checked_answer;

/// How long the node's kernel may take nothing of a frame before the node is given up.
const WRITE_MAX: Duration = Duration::from_secs(1);

/// Why a connection is of no use, or no longer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Broken {
    #[error("cannot reach {address}: {source}")]
    Dial { address: String, source: io::Error },
    #[error("greeting: {0}")]
    Greeting(io::Error),
    #[error("the node describes itself wrongly: {0}")]
    Description(#[from] entente_proto::frame::FrameError),
    #[error("another node answered: {0}")]
    Stranger(NodeName),
    #[error("the connection broke: {0}")]
    Lost(#[from] io::Error),
    #[error("the node answered what it was not asked")]
    Unasked,
    #[error("the node ended the connection")]
    Ended,
}

/// See the module.
pub(crate) struct Connection {
    socket: TcpStream,
    channel: Channel,
    writer: FrameWriter,
    inbound: Inbound,
}

/// What has come and is no answer yet.
pub(crate) struct Inbound {
    pub(crate) incoming: Incoming,
    pub(crate) frames: FrameReader,
    /// Frames that were sent and are not answered: what a node may say is bounded by what it is asked.
    unanswered: usize,
}

impl Inbound {
    pub(crate) fn new() -> Self {
        Self { incoming: Incoming::default(), frames: FrameReader::default(), unanswered: 0 }
    }

    /// Reads once. `None` when nothing is there, else whether there may be more.
    fn read(
        &mut self,
        mut socket: &TcpStream,
        channel: &mut Channel,
        on_answer: &mut impl FnMut(Answer),
    ) -> Result<Option<bool>, Broken> {
        let space = self.incoming.space();
        let len = space.len();
        let read = match socket.read(space) {
            Ok(0) => return Err(Broken::Ended),
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(Some(true)),
            Err(error) => return Err(error.into()),
        };
        self.incoming.advance(read);
        let frames = &mut self.frames;
        let open = channel
            .open(&mut self.incoming, |plain| frames.extend(plain))
            .map_err(io::Error::from)?;
        while let Some(frame) = self.frames.next_frame::<wire::Combine>()? {
            self.unanswered = self.unanswered.checked_sub(1).ok_or(Broken::Unasked)?;
            on_answer(checked_answer(frame.into_wire()));
        }
        if open { Ok(Some(read == len)) } else { Err(Broken::Ended) }
    }
}

impl Connection {
    /// A connection whose handshake and greeting are over.
    pub(crate) fn new(
        socket: std::net::TcpStream,
        channel: Channel,
        inbound: Inbound,
    ) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        let socket = TcpStream::from_std(socket);
        Ok(Self { socket, channel, writer: FrameWriter::default(), inbound })
    }

    pub(crate) fn socket_mut(&mut self) -> &mut TcpStream {
        &mut self.socket
    }

    /// Writes a frame. While the node takes nothing its answers are read, since it may be waiting
    /// for that itself.
    pub(crate) fn send(
        &mut self,
        frame: Dispatch,
        mut on_answer: impl FnMut(Answer),
    ) -> Result<(), Broken> {
        let Self { socket, channel, writer, inbound } = self;
        inbound.unanswered += 1;
        let frame = Framed::dispatch(frame);
        let mut broken = None;
        let sent = channel.send(writer.pieces(&frame, PIECE_BYTES)?, |channel, records| {
            write_all(socket, records, || {
                inbound.read(socket, channel, &mut on_answer).map(drop).map_err(|error| {
                    broken = Some(error);
                    io::ErrorKind::Other.into()
                })
            })
        });
        sent.map_err(|error| broken.unwrap_or(Broken::Lost(error)))
    }

    /// Reads what is there and hands over the answers in it.
    pub(crate) fn receive(
        &mut self,
        ended: bool,
        mut on_answer: impl FnMut(Answer),
    ) -> Result<(), Broken> {
        // A read that did not fill its buffer took all there was, and what comes later is reported
        // anew; only an end that came with the bytes is not.
        while let Some(more) = self.inbound.read(&self.socket, &mut self.channel, &mut on_answer)? {
            if !more && !ended {
                break;
            }
        }
        Ok(())
    }
}

/// Writes all of `records`; calls `meanwhile` whenever the node has sent something while it takes
/// nothing itself.
fn write_all(
    mut socket: &TcpStream,
    mut records: &mut [IoSlice<'_>],
    mut meanwhile: impl FnMut() -> io::Result<()>,
) -> io::Result<()> {
    let mut progress = Instant::now();
    while !records.is_empty() {
        match socket.write_vectored(records) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => {
                IoSlice::advance_slices(&mut records, written);
                progress = Instant::now();
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let left = WRITE_MAX.checked_sub(progress.elapsed());
                if wait(socket, left.ok_or(io::ErrorKind::TimedOut)?)? {
                    meanwhile()?;
                }
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Waits until the socket takes or has something; whether it has.
fn wait(socket: &TcpStream, timeout: Duration) -> io::Result<bool> {
    let mut sockets = [PollFd::new(socket, PollFlags::IN | PollFlags::OUT)];
    let timeout = Timespec { tv_sec: 0, tv_nsec: timeout.subsec_nanos().into() };
    match poll(&mut sockets, Some(&timeout)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(sockets[0].revents().contains(PollFlags::IN)),
        Err(error) => Err(error.into()),
    }
}
