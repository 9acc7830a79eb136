//! The link over a plain byte stream: frames without HTTP/2 around them.
//!
//! One thread a link dials, reads answers and redials; frames are written by whoever sends them.
//! Nothing else touches a frame, so the way from the engine to the node's kernels and back has one
//! change of threads in it, the one that wakes the engine. Why it exists beside gRPC, with figures:
//! `docs/decisions/0010`.
//!
//! As with gRPC, a frame is never carried over to the next connection, which may lead to another
//! incarnation of the node.

use std::io::{self, Write};
use std::net::{Shutdown, TcpStream, ToSocketAddrs};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use entente_proto::frame::{Dispatch, FrameError};
use entente_proto::ids::{NodeId, NodeName};
use entente_proto::link::{Link, LinkEvent, LinkEvents, NodeInfo, NotSent};
use entente_proto::stream::{FrameReader, FrameWriter, Framed, PREFACE};
use entente_proto::wire;
use rustix::net::sockopt;

use super::{REDIAL_MAX, REDIAL_MIN, checked_answer};

/// How long dialling, and each step of greeting, may take.
const DIAL_MAX: Duration = Duration::from_secs(3);
/// How long writing one frame may take before the node is given up.
const WRITE_MAX: Duration = Duration::from_secs(1);
/// Silence of the peer's kernel after which the connection counts as broken.
const SILENCE_MAX: Duration = Duration::from_secs(10);

/// A link to one expert node, open until it is dropped.
pub struct StreamLink(Arc<Shared>);

struct Shared {
    node: NodeId,
    expected_name: NodeName,
    address: String,
    events: Arc<dyn LinkEvents>,
    state: Mutex<State>,
    closed: Condvar,
}

#[derive(Default)]
struct State {
    /// The connection that is up, if one is.
    outgoing: Option<Outgoing>,
    closed: bool,
}

struct Outgoing {
    socket: Arc<TcpStream>,
    frames: FrameWriter,
}

/// Why a connection is of no use, or no longer.
#[derive(Debug, thiserror::Error)]
enum Broken {
    #[error("cannot reach {address}: {source}")]
    Dial { address: String, source: io::Error },
    #[error("greeting: {0}")]
    Greeting(io::Error),
    #[error("the node describes itself wrongly: {0}")]
    Description(#[from] FrameError),
    #[error("another node answered: {0}")]
    Stranger(NodeName),
    #[error("the connection broke: {0}")]
    Lost(io::Error),
    #[error("the node ended the connection")]
    Ended,
}

impl StreamLink {
    /// Starts dialling `address` (`host:port`) on a thread of its own. A node that gives another
    /// name than `expected_name` is not used.
    ///
    /// # Errors
    /// When the system refuses a thread.
    pub fn open(
        node: NodeId,
        expected_name: NodeName,
        address: String,
        events: Arc<dyn LinkEvents>,
    ) -> io::Result<Self> {
        let (state, closed) = (Mutex::default(), Condvar::new());
        let shared = Arc::new(Shared { node, expected_name, address, events, state, closed });
        let of_thread = shared.clone();
        thread::Builder::new().name(format!("link-{node}")).spawn(move || of_thread.run())?;
        Ok(Self(shared))
    }
}

impl Link for StreamLink {
    /// Blocks for at most a second, and only while the node's kernel takes nothing.
    fn send(&self, frame: Dispatch) -> Result<(), NotSent> {
        let mut state = self.0.state();
        let Outgoing { socket, frames } = state.outgoing.as_mut().ok_or(NotSent)?;
        if frames.write(&mut &**socket, &Framed::dispatch(frame)).is_ok() {
            return Ok(());
        }
        // Half a frame may be out. The reading thread sees the end and reports it.
        let _ = socket.shutdown(Shutdown::Both);
        state.outgoing = None;
        Err(NotSent)
    }
}

impl Drop for StreamLink {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.closed = true;
        if let Some(outgoing) = &state.outgoing {
            let _ = outgoing.socket.shutdown(Shutdown::Both);
        }
        self.0.closed.notify_all();
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        let mut pause = REDIAL_MIN;
        // The first failure is reported, then each loss of a link that was up.
        let mut report = true;
        while !self.state().closed {
            let reason = match self.connect() {
                Ok((socket, frames, info)) => {
                    (pause, report) = (REDIAL_MIN, true);
                    self.deliver(&socket, frames, info)
                }
                Err(reason) => reason,
            };
            // Nothing is sent after this, and what was sent will not be answered.
            self.state().outgoing = None;
            if report {
                self.events.on_event(self.node, LinkEvent::Down(reason.to_string()));
                report = false;
            } else {
                tracing::debug!(node = %self.expected_name, %reason, "redialling");
            }
            self.wait(pause);
            pause = (pause * 2).min(REDIAL_MAX);
        }
    }

    /// Waits before dialling again, or until the link is closed.
    fn wait(&self, pause: Duration) {
        let open = |state: &mut State| !state.closed;
        let _ = self.closed.wait_timeout_while(self.state(), pause, open);
    }

    fn connect(&self) -> Result<(Arc<TcpStream>, FrameReader, NodeInfo), Broken> {
        let failed = |source| Broken::Dial { address: self.address.clone(), source };
        let socket = dial(&self.address).map_err(failed)?;
        let (frames, info) = greet(&socket).map_err(Broken::Greeting)?;
        let info = NodeInfo::try_from(info)?;
        if info.name != self.expected_name {
            return Err(Broken::Stranger(info.name));
        }
        Ok((Arc::new(socket), frames, info))
    }

    /// Announces the link and delivers answers until it breaks; says why it did.
    fn deliver(&self, socket: &Arc<TcpStream>, mut frames: FrameReader, info: NodeInfo) -> Broken {
        let outgoing = Outgoing { socket: socket.clone(), frames: FrameWriter::default() };
        self.state().outgoing = Some(outgoing);
        self.events.on_event(self.node, LinkEvent::Up(info));
        loop {
            match frames.read::<wire::Combine>(&mut &**socket) {
                Ok(Some(frame)) => {
                    let answer = checked_answer(frame.into_wire());
                    self.events.on_event(self.node, LinkEvent::Answer(answer));
                }
                Ok(None) => return Broken::Ended,
                Err(error) => return Broken::Lost(error),
            }
        }
    }
}

fn dial(address: &str) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in address.to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, DIAL_MAX) {
            Ok(socket) => return configure(socket),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// Small frames leave at once, and a peer that is gone without a word is noticed.
fn configure(socket: TcpStream) -> io::Result<TcpStream> {
    socket.set_nodelay(true)?;
    socket.set_write_timeout(Some(WRITE_MAX))?;
    sockopt::set_tcp_user_timeout(&socket, SILENCE_MAX.as_millis() as u32)?;
    sockopt::set_tcp_keepidle(&socket, SILENCE_MAX / 2)?;
    sockopt::set_tcp_keepintvl(&socket, SILENCE_MAX / 5)?;
    sockopt::set_socket_keepalive(&socket, true)?;
    Ok(socket)
}

/// Says which protocol this is and hears who the node is.
fn greet(socket: &TcpStream) -> io::Result<(FrameReader, wire::NodeInfo)> {
    (&*socket).write_all(&PREFACE)?;
    socket.set_read_timeout(Some(DIAL_MAX))?;
    let mut frames = FrameReader::default();
    let info = frames.read::<wire::NodeInfo>(&mut &*socket)?.ok_or(io::ErrorKind::UnexpectedEof)?;
    socket.set_read_timeout(None)?;
    Ok((frames, info.message))
}
