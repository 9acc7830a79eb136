//! Dials nodes for the transport `stream`: frames without HTTP/2 around them.
//!
//! One thread a node dials, does the handshake and the greeting, and hands the connection to the
//! engine ([`super::links`]), which alone reads and writes it from then on. So nothing that may
//! take seconds happens on the engine's thread, and nothing that takes microseconds on another.
//! Where rows may travel by NCCL the same thread makes a second connection for that, beside the one
//! that serves.
//! Why this exists beside gRPC, with figures: `docs/decisions/0010` and `0011`.

use std::cell::RefCell;
use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError};
use entente_proto::ids::Incarnation;
use entente_proto::link::{LinkEvent, LinkEvents, NodeInfo};
use entente_proto::stream::{FrameWriter, PREFACE};
use entente_proto::wire;
use entente_tls::{Channel, PIECE_BYTES};
use prost::Message;
use rustix::net::sockopt;
use rustls::ClientConfig;

use super::connection::{Broken, Connection, Inbound};
use super::links::{Arrival, Mailbox};
use super::nccl::{self, ByNccl, Place, Retry};
use super::{Peer, REDIAL_MAX, REDIAL_MIN};

/// How long dialling may take, and how long handshake and greeting.
const DIAL_MAX: Duration = Duration::from_secs(3);
/// Silence of the peer's kernel after which the connection counts as broken.
const SILENCE_MAX: Duration = Duration::from_secs(10);

/// The thread that makes connections to one node.
pub(crate) struct Dialler {
    peer: Peer,
    by_nccl: Option<ByNccl>,
    mailbox: Arc<Mailbox>,
    orders: Receiver<()>,
    /// Connections made.
    connections: u64,
}

/// A connection that is greeted, before it is anybody's.
struct Greeted {
    socket: TcpStream,
    channel: Channel,
    inbound: Inbound,
    info: NodeInfo,
}

/// Nobody wants a connection to the node any more.
struct Unwanted;

impl Dialler {
    /// Starts dialling. Each order asks for one more connection; the thread ends when no more can
    /// come.
    pub(crate) fn start(
        peer: Peer,
        by_nccl: Option<ByNccl>,
        mailbox: Arc<Mailbox>,
        orders: Receiver<()>,
    ) -> io::Result<()> {
        let name = format!("dial-{}", peer.node);
        let mut dialler = Self { peer, by_nccl, mailbox, orders, connections: 0 };
        thread::Builder::new().name(name).spawn(move || dialler.run())?;
        Ok(())
    }

    fn run(&mut self) {
        let (mut pause, mut report, mut retry) = (REDIAL_MIN, true, Retry::new());
        loop {
            match self.connect() {
                Ok((connected, start)) => {
                    // The engine tells of the loss of a connection that it was given.
                    (pause, report) = (REDIAL_MIN, false);
                    if self.mailbox.put(self.peer.node, connected)
                        && self.stand_by(start, &mut retry).is_err()
                    {
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

    /// Waits for the order to dial again. Meanwhile the connection that serves is replaced by one whose
    /// rows travel by NCCL, as soon as that can be had.
    fn stand_by(&mut self, start: Incarnation, retry: &mut Retry) -> Result<(), Unwanted> {
        let Some(by) = self.by_nccl.clone() else {
            return self.orders.recv().map_err(|_| Unwanted);
        };
        loop {
            match self.orders.recv_timeout(retry.pause()) {
                Ok(()) => return Ok(()),
                Err(RecvTimeoutError::Disconnected) => return Err(Unwanted),
                Err(RecvTimeoutError::Timeout) => {}
            }
            let failed = match self.connect_by_nccl(&by, start) {
                Ok(instead) => !self.mailbox.put(self.peer.node, instead),
                Err(reason) => {
                    by.metrics.failures.inc();
                    let node = &self.peer.name;
                    if retry.is_news() {
                        tracing::warn!(%node, %reason, "rows travel over the network");
                    } else {
                        tracing::debug!(%node, %reason, "rows travel over the network still");
                    }
                    true
                }
            };
            if failed {
                retry.failed();
                continue;
            }
            tracing::info!(node = %self.peer.name, "rows travel by NCCL");
            retry.opened();
            self.orders.recv().map_err(|_| Unwanted)?;
            by.metrics.failures.inc();
            retry.ended();
            return Ok(());
        }
    }

    fn connect(&mut self) -> Result<(Arrival, Incarnation), Broken> {
        let Greeted { socket, channel, inbound, info } = self.greeted(self.peer.tls.clone())?;
        let start = info.fence.incarnation;
        let certificate_sha256 = channel.peer_certificate_sha256().unwrap_or_default();
        let connection = Connection::new(socket, channel, inbound, self.next_number())?;
        Ok((Arrival::Connected(Box::new(connection), info, certificate_sha256), start))
    }

    fn connect_by_nccl(&mut self, by: &ByNccl, start: Incarnation) -> Result<Arrival, Broken> {
        let Greeted { socket, channel, inbound, info } = self.greeted(Some(by.tls.clone()))?;
        if info.fence.incarnation != start {
            return Err(Broken::OtherStart);
        }
        let connection = self.next_number();
        let place = Place { mailbox: self.mailbox.clone(), node: self.peer.node, connection };
        let greeting = RefCell::new((channel, inbound));
        let lanes = nccl::open(
            by,
            place,
            |request| say(&socket, &mut greeting.borrow_mut().0, request),
            || {
                let (channel, inbound) = &mut *greeting.borrow_mut();
                hear(&socket, channel, inbound, Instant::now() + DIAL_MAX)
            },
            // The connection that serves was lost: to dial comes first.
            &|| !self.orders.is_empty(),
        )?;
        let (channel, inbound) = greeting.into_inner();
        let connection = Connection::new(socket, channel, inbound, connection)?;
        Ok(Arrival::Instead(Box::new(connection.with_lanes(lanes))))
    }

    fn next_number(&mut self) -> u64 {
        self.connections += 1;
        self.connections
    }

    fn greeted(&self, tls: Option<Arc<ClientConfig>>) -> Result<Greeted, Broken> {
        let address = &self.peer.address;
        let failed = |source| Broken::Dial { address: address.clone(), source };
        let socket = dial(address).map_err(failed)?;
        let mut channel = match tls {
            Some(config) => {
                Channel::client(config).map_err(|error| Broken::Greeting(error.into()))?
            }
            None => Channel::plain(),
        };
        let mut inbound = Inbound::new();
        let info = greet(&socket, &mut channel, &mut inbound).map_err(Broken::Greeting)?;
        let info = NodeInfo::try_from(info)?;
        if info.name != self.peer.name {
            return Err(Broken::Stranger(info.name));
        }
        Ok(Greeted { socket, channel, inbound, info })
    }
}

/// Writes one message.
fn say<M: Message>(socket: &TcpStream, channel: &mut Channel, message: &M) -> io::Result<()> {
    let mut writer = FrameWriter::default();
    let pieces = writer.apart(message, 0, PIECE_BYTES)?;
    channel.send(pieces, |_, records| {
        records.iter().try_for_each(|record| (&*socket).write_all(record))
    })
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
    hear(socket, channel, inbound, deadline)
}

/// Reads one message.
fn hear<M: Message + Default>(
    socket: &TcpStream,
    channel: &mut Channel,
    inbound: &mut Inbound,
    deadline: Instant,
) -> io::Result<M> {
    loop {
        let frames = &mut inbound.frames;
        channel.open(&mut inbound.incoming, |plain| frames.extend(plain))?;
        if let Some(said) = inbound.frames.next_frame()? {
            return Ok(said.message);
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
