//! The door: takes connections, finds out who is there and what they speak, and shows them in.
//!
//! ```text
//!            ┌── TLS, ALPN "entente/1" ──► handshake ──┬──► a thread of crate::stream
//!   accept ──┤   or "entente-nccl/1"                   │
//!            ├── TLS, ALPN "h2" ─────────► handshake ──┼──► the gRPC server
//!            └── plain (loopback only): the first byte tells ┘
//! ```
//!
//! Any process of the cluster gets through the handshake; the table of
//! [`entente_membership::access`] says what it may call then, over either protocol, and a refusal is
//! audited.
//!
//! Invariants: who has not shown the certificate of a coordinator of the region costs a task, never a
//! thread; a handshake ends after [`HELLO_MAX`], and at most [`HANDSHAKES_MAX`] are under way.

use std::io::{self, Cursor};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use entente_membership::access::EXCHANGE_STREAM;
use entente_membership::guard::Guard;
use entente_membership::net::seats::{Seat, Seats, Seldom, host_of};
use entente_membership::net::{Peer, anyone, in_words};
use entente_proto::ids::Incarnation;
use entente_proto::stream::PREFACE;
use entente_tls::{ALPN_GRPC, ALPN_NCCL, ALPN_STREAM, Channel, Credentials, Incoming};
use rustls::ServerConfig;
use rustls::server::Acceptor;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf, join};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tonic::transport::server::Connected;

use crate::limits::{ACCEPT_RETRY, HANDSHAKES_MAX, HANDSHAKES_OF_HOST_MAX, HELLO_MAX};
use crate::node::NodeHandle;
use crate::stream::{Connections, Rows};

/// What shows connections in.
pub(crate) struct Door {
    pub(crate) node: NodeHandle,
    pub(crate) connections: Arc<Connections>,
    pub(crate) grpc: mpsc::Sender<io::Result<GrpcIo>>,
    /// For those who speak gRPC, by who they are.
    pub(crate) seats: Seats<String>,
    pub(crate) tls: Option<Tls>,
}

/// How each protocol is secured.
pub(crate) struct Tls {
    stream: Arc<ServerConfig>,
    grpc: Arc<ServerConfig>,
    guard: Guard,
}

impl Tls {
    pub(crate) fn new(credentials: &Credentials, guard: Guard) -> Result<Self, entente_tls::Error> {
        Ok(Self {
            stream: credentials.server(anyone(credentials), &[ALPN_STREAM, ALPN_NCCL])?,
            grpc: credentials.server(anyone(credentials), &[ALPN_GRPC])?,
            guard,
        })
    }
}

/// A connection that has said who it is and what it speaks.
enum Guest {
    Stream(TcpStream, Box<Channel>, Incoming, Rows),
    /// With who it is, where certificates say it.
    Grpc(Pin<Box<dyn Duplex>>, Option<Peer>),
}

impl Door {
    /// Takes connections for as long as it is polled.
    pub(crate) async fn open(self, listener: TcpListener) {
        let door = Arc::new(self);
        let handshakes = Seats::new(HANDSHAKES_MAX, HANDSHAKES_OF_HOST_MAX);
        let mut crowded = Seldom::default();
        loop {
            let (socket, peer) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Too many open files, most often; it passes when some are closed.
                    tracing::warn!(%error, "a connection was not taken");
                    sleep(ACCEPT_RETRY).await;
                    continue;
                }
            };
            let Some(seat) = handshakes.take(host_of(peer.ip())) else {
                // Whoever floods the port shall not flood the log too.
                if crowded.is_due() {
                    tracing::warn!(%peer, "connections are not taken: too many are being greeted");
                }
                continue;
            };
            let door = door.clone();
            tokio::spawn(async move {
                let greeted = timeout(HELLO_MAX, door.greet(socket)).await;
                drop(seat);
                let shown = match greeted {
                    Ok(Ok(guest)) => door.show_in(guest).await,
                    Ok(Err(error)) => Err(error),
                    Err(_) => Err(io::Error::other("it did not say who it is in time")),
                };
                if let Err(error) = shown {
                    door.refused(peer, &error);
                }
            });
        }
    }

    async fn greet(&self, mut socket: TcpStream) -> io::Result<Guest> {
        socket.set_nodelay(true)?;
        let Some(tls) = &self.tls else { return greet_plain(socket).await };
        let (incoming, protocol) = hear_hello(&mut socket).await?;
        match protocol {
            Protocol::Stream(rows) => {
                let mut channel = Box::new(Channel::server(tls.stream.clone())?);
                let incoming = shake(&mut socket, &mut channel, incoming).await?;
                let peer = Peer::of(channel.peer_certificates())?;
                let admitted = tls.guard.admit(Some(&peer), EXCHANGE_STREAM);
                admitted.map_err(|status| not_admitted(&status))?;
                Ok(Guest::Stream(socket, channel, incoming, rows))
            }
            Protocol::Grpc => {
                // The handshake has to see what was read already.
                let (read, write) = socket.into_split();
                let read = Cursor::new(incoming.unopened().to_vec()).chain(read);
                let secured = TlsAcceptor::from(tls.grpc.clone()).accept(join(read, write)).await;
                let secured = secured.map_err(in_words)?;
                let peer = Peer::of(secured.get_ref().1.peer_certificates())?;
                // What it calls is looked at call by call.
                Ok(Guest::Grpc(Box::pin(secured), Some(peer)))
            }
        }
    }

    async fn show_in(&self, guest: Guest) -> io::Result<()> {
        match guest {
            Guest::Stream(socket, channel, incoming, rows) => {
                let (node, socket) = (self.node.clone(), socket.into_std()?);
                self.connections.serve(node, socket, *channel, incoming, rows)
            }
            // Fails only when the server has ended.
            Guest::Grpc(io, peer) => {
                let incarnation = *self.node.incarnation().borrow();
                let name = peer.as_ref().map_or_else(String::new, |peer| peer.identity.to_string());
                let seat = self.seats.take(name);
                let seat = seat.ok_or_else(|| io::Error::other("too many connections"))?;
                let greeted = Greeted { incarnation, peer };
                let sent = self.grpc.send(Ok(GrpcIo { io, greeted, _seat: seat })).await;
                sent.map_err(|_| io::Error::other("the gRPC server has ended"))
            }
        }
    }

    fn refused(&self, peer: SocketAddr, error: &io::Error) {
        match (error.kind(), &self.tls) {
            // Peers that only look whether somebody is there are nothing to warn of.
            (io::ErrorKind::UnexpectedEof, _) => {
                tracing::debug!(%peer, %error, "a connection was not served");
            }
            // The guard has told of it.
            (io::ErrorKind::PermissionDenied, _) => {}
            (_, Some(tls)) => tls.guard.turned_away(peer, error),
            (_, None) => tracing::warn!(%peer, %error, "a connection was refused"),
        }
    }
}

fn not_admitted(status: &tonic::Status) -> io::Error {
    io::Error::new(io::ErrorKind::PermissionDenied, status.message())
}

async fn greet_plain(mut socket: TcpStream) -> io::Result<Guest> {
    let mut first = [0];
    if socket.peek(&mut first).await? == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    if first[0] != PREFACE[0] {
        return Ok(Guest::Grpc(Box::pin(socket), None));
    }
    let mut preface = [0; PREFACE.len()];
    socket.read_exact(&mut preface).await?;
    if preface != PREFACE {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "another protocol"));
    }
    // What NCCL carries is not encrypted, so it is for those who have shown a certificate.
    Ok(Guest::Stream(socket, Box::new(Channel::plain()), Incoming::default(), Rows::InFrames))
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Protocol {
    Stream(Rows),
    Grpc,
}

/// Reads until the peer has said what it wants to speak. What was read stays to be read again by
/// whoever does the handshake.
async fn hear_hello(socket: &mut TcpStream) -> io::Result<(Incoming, Protocol)> {
    let (mut incoming, mut acceptor) = (Incoming::default(), Acceptor::default());
    loop {
        let seen = incoming.unopened().len();
        read(socket, &mut incoming).await?;
        acceptor.read_tls(&mut &incoming.unopened()[seen..])?;
        let Some(accepted) = acceptor.accept().map_err(|(error, _)| no_tls(&error))? else {
            continue;
        };
        let hello = accepted.client_hello();
        let names: Vec<&[u8]> = hello.alpn().into_iter().flatten().collect();
        return match names[..] {
            [ALPN_STREAM] => Ok((incoming, Protocol::Stream(Rows::InFrames))),
            [ALPN_NCCL] => Ok((incoming, Protocol::Stream(Rows::ByNccl))),
            [ALPN_GRPC] => Ok((incoming, Protocol::Grpc)),
            _ => Err(no_tls(&"ALPN must be entente/1, entente-nccl/1 or h2")),
        };
    }
}

fn no_tls(reason: &dyn std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("TLS: {reason}"))
}

async fn read(socket: &mut TcpStream, incoming: &mut Incoming) -> io::Result<()> {
    match socket.read(incoming.space()).await? {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        len => {
            incoming.advance(len);
            Ok(())
        }
    }
}

async fn shake(
    socket: &mut TcpStream,
    channel: &mut Channel,
    mut incoming: Incoming,
) -> io::Result<Incoming> {
    loop {
        let shaken = channel.shake(&mut incoming);
        // An alert too: the peer should know why.
        socket.write_all(&channel.take_owed()).await?;
        if shaken? {
            return Ok(incoming);
        }
        read(socket, &mut incoming).await?;
    }
}

/// What the gRPC server talks through.
pub(crate) struct GrpcIo {
    io: Pin<Box<dyn Duplex>>,
    greeted: Greeted,
    /// Given back when the connection ends.
    _seat: Seat<String>,
}

/// What a handler finds in the extensions of its request.
#[derive(Debug, Clone)]
pub(crate) struct Greeted {
    /// The start of the node when the connection was shown in. What the peer learnt over it may be
    /// of a later start, never of an earlier one.
    pub(crate) incarnation: Incarnation,
    /// Who it is; absent where nobody has a certificate, on loopback.
    pub(crate) peer: Option<Peer>,
}

pub(crate) trait Duplex: AsyncRead + AsyncWrite + Send {}

impl<T: AsyncRead + AsyncWrite + Send> Duplex for T {}

impl Connected for GrpcIo {
    type ConnectInfo = Greeted;

    fn connect_info(&self) -> Greeted {
        self.greeted.clone()
    }
}

impl AsyncRead for GrpcIo {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.io.as_mut().poll_read(context, into)
    }
}

impl AsyncWrite for GrpcIo {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.io.as_mut().poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.io.as_mut().poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.io.as_mut().poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.io.as_mut().poll_shutdown(context)
    }
}
