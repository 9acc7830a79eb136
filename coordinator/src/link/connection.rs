//! One connection of the transport `stream`, once it is up: owned by the engine's thread alone.
//!
//! Writing never holds the engine up for long: what the node's kernel does not take within
//! [`WRITE_WAIT`] waits in the [`Backlog`], and goes when the socket says that it takes more. So a
//! node that hangs costs the exchange one short wait, and a hedge finds the engine at work.

use std::io::{self, IoSlice, Read, Write};
use std::time::{Duration, Instant};

use entente_proto::frame::{Answer, Dispatch, ROWS_BYTES_MAX};
use entente_proto::ids::NodeName;
use entente_proto::stream::{FrameReader, FrameWriter, Framed};
use entente_proto::wire;
use entente_tls::{Channel, Incoming, PIECE_BYTES};
use mio::net::TcpStream;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::checked_answer;
use super::nccl::Lanes;

/// How long the engine waits for a kernel that takes nothing of a frame. A node that reads takes
/// the next part sooner, and is served best by an engine that stays with it until the frame is out.
const WRITE_WAIT: Duration = Duration::from_millis(5);
/// How long the backlog may stand still before the node is given up.
const STANDSTILL_MAX: Duration = Duration::from_secs(1);
/// No frame is taken while more than the largest one waits, so at most two do.
const BACKLOG_BYTES_MAX: usize = ROWS_BYTES_MAX;

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
    #[error("the node has taken nothing for {STANDSTILL_MAX:?}")]
    Stuck,
    #[error("the node ended the connection")]
    Ended,
    #[error("NCCL: {0}")]
    Nccl(String),
    #[error("the node has been started anew")]
    OtherStart,
}

/// See the module.
pub(crate) struct Connection {
    socket: TcpStream,
    channel: Channel,
    writer: FrameWriter,
    backlog: Backlog,
    inbound: Inbound,
    /// Tells it from others to the node.
    number: u64,
}

/// What has come and is no answer yet.
pub(crate) struct Inbound {
    pub(crate) incoming: Incoming,
    pub(crate) frames: FrameReader,
    /// Frames that were sent and are not answered: what a node may say is bounded by what it is asked.
    unanswered: usize,
    /// What rows travel by, if not with their frames.
    lanes: Option<Lanes>,
}

impl Inbound {
    pub(crate) fn new() -> Self {
        Self {
            incoming: Incoming::default(),
            frames: FrameReader::default(),
            unanswered: 0,
            lanes: None,
        }
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
        self.take_answers(on_answer)?;
        if open { Ok(Some(read == len)) } else { Err(Broken::Ended) }
    }

    /// Takes the answers that have come whole. One whose rows travel by a lane is reported when they
    /// are there.
    fn take_answers(&mut self, on_answer: &mut impl FnMut(Answer)) -> Result<(), Broken> {
        loop {
            let answered = match &self.lanes {
                None => match self.frames.next_frame::<wire::Combine>()? {
                    None => return Ok(()),
                    Some(frame) => Some(frame.into_wire()),
                },
                Some(lanes) => match self.frames.next_apart::<wire::Combine>()? {
                    None => return Ok(()),
                    Some((message, 0)) => Some(message),
                    Some((message, rows_len)) => {
                        lanes.fetch(message, rows_len)?;
                        None
                    }
                },
            };
            self.unanswered = self.unanswered.checked_sub(1).ok_or(Broken::Unasked)?;
            if let Some(message) = answered {
                on_answer(checked_answer(message));
            }
        }
    }
}

impl Connection {
    /// A connection whose handshake and greeting are over.
    pub(crate) fn new(
        socket: std::net::TcpStream,
        channel: Channel,
        inbound: Inbound,
        number: u64,
    ) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        let socket = TcpStream::from_std(socket);
        let writer = FrameWriter::default();
        Ok(Self { socket, channel, writer, backlog: Backlog::default(), inbound, number })
    }

    /// The same with rows that travel by lanes.
    pub(crate) fn with_lanes(mut self, lanes: Lanes) -> Self {
        self.inbound.lanes = Some(lanes);
        self
    }

    /// Tells it from others to the node.
    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    /// Whether the node owes nothing, and everything that it was sent is out.
    pub(crate) fn is_idle(&self) -> bool {
        self.inbound.unanswered == 0 && self.backlog.left().is_empty()
    }

    pub(crate) fn socket_mut(&mut self) -> &mut TcpStream {
        &mut self.socket
    }

    /// Takes a frame to write, unless too much waits already: then false. While the engine waits
    /// for the node, the node's answers are read, since it may be waiting for that itself.
    pub(crate) fn send(
        &mut self,
        frame: Dispatch,
        mut on_answer: impl FnMut(Answer),
    ) -> Result<bool, Broken> {
        self.flush()?;
        let Self { socket, channel, writer, backlog, inbound, .. } = self;
        if backlog.left().len() > BACKLOG_BYTES_MAX {
            return if backlog.stands_still() { Err(Broken::Stuck) } else { Ok(false) };
        }
        inbound.unanswered += 1;
        let frame = Framed::dispatch(frame);
        let mut broken = None;
        let by_lane = inbound.lanes.is_some();
        let write = |channel: &mut Channel, records: &mut [IoSlice<'_>]| {
            backlog.write(socket, records, || {
                inbound.read(socket, channel, &mut on_answer).map(drop).map_err(|error| {
                    broken = Some(error);
                    io::ErrorKind::Other.into()
                })
            })
        };
        let sent = match by_lane {
            false => channel.send(writer.pieces(&frame, PIECE_BYTES)?, write),
            true => {
                let head = writer.apart(&frame.message, frame.rows.len(), PIECE_BYTES)?;
                channel.send(head, write)
            }
        };
        sent.map_err(|error| broken.unwrap_or(Broken::Lost(error)))?;
        inbound.lanes.as_ref().map_or(Ok(()), |lanes| lanes.send(frame.rows))?;
        Ok(true)
    }

    /// Writes what waits, as far as the node's kernel takes it now.
    pub(crate) fn flush(&mut self) -> Result<(), Broken> {
        Ok(self.backlog.flush(&self.socket)?)
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

/// Sealed bytes that the node's kernel has not taken yet, in their order.
#[derive(Default)]
struct Backlog {
    bytes: Vec<u8>,
    /// How many of them were taken.
    start: usize,
    /// When something was taken last, or began to wait.
    progress: Option<Instant>,
}

impl Backlog {
    fn left(&self) -> &[u8] {
        &self.bytes[self.start..]
    }

    fn stands_still(&self) -> bool {
        self.progress.is_some_and(|progress| progress.elapsed() >= STANDSTILL_MAX)
    }

    /// Writes `records`, and keeps what is not taken in time. Behind others they wait at once.
    fn write(
        &mut self,
        socket: &TcpStream,
        mut records: &mut [IoSlice<'_>],
        meanwhile: impl FnMut() -> io::Result<()>,
    ) -> io::Result<()> {
        if self.bytes.is_empty() {
            write_patiently(socket, &mut records, meanwhile)?;
            if records.is_empty() {
                return Ok(());
            }
            self.progress = Some(Instant::now());
        }
        records.iter().for_each(|record| self.bytes.extend_from_slice(record));
        Ok(())
    }

    fn flush(&mut self, socket: &TcpStream) -> io::Result<()> {
        while !self.left().is_empty() {
            let left = &mut [IoSlice::new(self.left())];
            let Some(written) = write(socket, left)? else { return Ok(()) };
            self.start += written;
            self.progress = Some(Instant::now());
        }
        // This is rare, and may have been large: the memory is given back.
        *self = Self::default();
        Ok(())
    }
}

/// Writes once; `None` when the kernel takes nothing.
fn write(mut socket: &TcpStream, records: &[IoSlice<'_>]) -> io::Result<Option<usize>> {
    loop {
        match socket.write_vectored(records) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => return Ok(Some(written)),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) => return Err(error),
        }
    }
}

/// Writes `records` until they are out, or nothing was taken for [`WRITE_WAIT`]; leaves those that
/// are not. Calls `meanwhile` whenever the node has sent something while it takes nothing itself.
fn write_patiently(
    socket: &TcpStream,
    records: &mut &mut [IoSlice<'_>],
    mut meanwhile: impl FnMut() -> io::Result<()>,
) -> io::Result<()> {
    let mut progress = None;
    while !records.is_empty() {
        if let Some(written) = write(socket, records)? {
            IoSlice::advance_slices(records, written);
            progress = None;
            continue;
        }
        let waiting_since = *progress.get_or_insert_with(Instant::now);
        let Some(left) = WRITE_WAIT.checked_sub(waiting_since.elapsed()) else { break };
        if wait(socket, left)? {
            meanwhile()?;
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
