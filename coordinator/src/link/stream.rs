//! Dials nodes for the transport `stream`: frames without HTTP/2 around them.
//!
//! One thread a node dials, does the handshake and the greeting, and hands the connection to the
//! engine ([`super::links`]), which alone reads and writes it from then on. So nothing that may
//! take seconds happens on the engine's thread, and nothing that takes microseconds on another.
//! Why this exists beside gRPC, with figures: `docs/decisions/0010` and `0011`.

use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError};
use entente_proto::link::{LinkEvent, LinkEvents, NodeInfo};
use entente_proto::stream::PREFACE;
use entente_proto::wire;
use entente_tls::Channel;
use rustix::net::sockopt;

use super::connection::{Broken, Connection, Inbound};
use super::links::{Arrival, Mailbox};
use super::{Peer, REDIAL_MAX, REDIAL_MIN};

/// How long dialling may take, and how long handshake and greeting.
const DIAL_MAX: Duration = Duration::from_secs(3);
/// Silence of the peer's kernel after which the connection counts as broken.
const SILENCE_MAX: Duration = Duration::from_secs(10);

/// The thread that makes connections to one node.
pub(crate) struct Dialler {
    peer: Peer,
    mailbox: Arc<Mailbox>,
    orders: Receiver<()>,
}

impl Dialler {
    /// Starts dialling. Each order asks for one more connection; the thread ends when no more can
    /// come.
    pub(crate) fn start(peer: Peer, mailbox: Arc<Mailbox>, orders: Receiver<()>) -> io::Result<()> {
        let name = format!("dial-{}", peer.node);
        let dialler = Self { peer, mailbox, orders };
        thread::Builder::new().name(name).spawn(move || dialler.run())?;
        Ok(())
    }

    fn run(&self) {
        let (mut pause, mut report) = (REDIAL_MIN, true);
        loop {
            match self.connect() {
                Ok(connected) => {
                    // The engine tells of the loss of a connection that it was given.
                    (pause, report) = (REDIAL_MIN, false);
                    if self.mailbox.put(self.peer.node, connected) && self.orders.recv().is_err() {
                        return;
                    }
                }
                // Only the first of many failures is news.
                Err(reason) if report => {
                    report = false;
                    self.mailbox.on_event(self.peer.node, LinkEvent::Down(reason.to_string()));
                }
                Err(reason) => tracing::debug!(node = %self.peer.name, %reason, "redialling"),
            }
            if self.orders.recv_timeout(pause) == Err(RecvTimeoutError::Disconnected) {
                return;
            }
            pause = (pause * 2).min(REDIAL_MAX);
        }
    }

    fn connect(&self) -> Result<Arrival, Broken> {
        let address = &self.peer.address;
        let failed = |source| Broken::Dial { address: address.clone(), source };
        let socket = dial(address).map_err(failed)?;
        let mut channel = match &self.peer.tls {
            Some(config) => {
                Channel::client(config.clone()).map_err(|error| Broken::Greeting(error.into()))?
            }
            None => Channel::plain(),
        };
        let mut inbound = Inbound::new();
        let info = greet(&socket, &mut channel, &mut inbound).map_err(Broken::Greeting)?;
        let info = NodeInfo::try_from(info)?;
        if info.name != self.peer.name {
            return Err(Broken::Stranger(info.name));
        }
        let certificate_sha256 = channel.peer_certificate_sha256().unwrap_or_default();
        let connection = Connection::new(socket, channel, inbound)?;
        Ok(Arrival::Connected(Box::new(connection), info, certificate_sha256))
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
    socket.set_write_timeout(Some(DIAL_MAX))?;
    sockopt::set_tcp_user_timeout(&socket, SILENCE_MAX.as_millis() as u32)?;
    sockopt::set_tcp_keepidle(&socket, SILENCE_MAX / 2)?;
    sockopt::set_tcp_keepintvl(&socket, SILENCE_MAX / 5)?;
    sockopt::set_socket_keepalive(&socket, true)?;
    Ok(socket)
}

/// Does the handshake, or without TLS says which protocol this is, and hears who the node is. All
/// of it within [`DIAL_MAX`], however slowly the peer speaks.
fn greet(
    socket: &TcpStream,
    channel: &mut Channel,
    inbound: &mut Inbound,
) -> io::Result<wire::NodeInfo> {
    let deadline = Instant::now() + DIAL_MAX;
    if channel.is_plain() {
        (&*socket).write_all(&PREFACE)?;
    }
    loop {
        let shaken = channel.shake(&mut inbound.incoming);
        // An alert too: the node should know why.
        (&*socket).write_all(&channel.take_owed())?;
        if shaken? {
            break;
        }
        read(socket, inbound, deadline)?;
    }
    loop {
        let frames = &mut inbound.frames;
        channel.open(&mut inbound.incoming, |plain| frames.extend(plain))?;
        if let Some(info) = inbound.frames.next_frame::<wire::NodeInfo>()? {
            return Ok(info.message);
        }
        read(socket, inbound, deadline)?;
    }
}

fn read(mut socket: &TcpStream, inbound: &mut Inbound, deadline: Instant) -> io::Result<()> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(io::ErrorKind::TimedOut.into());
    }
    socket.set_read_timeout(Some(left))?;
    match socket.read(inbound.incoming.space()) {
        Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
        Ok(read) => {
            inbound.incoming.advance(read);
            Ok(())
        }
        // How a read that took too long ends.
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            Err(io::ErrorKind::TimedOut.into())
        }
        Err(error) => Err(error),
    }
}
