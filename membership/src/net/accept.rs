//! Takes connections, and shows those in whose certificate is of our cluster.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use entente_proto::identity::{Expected, Identity, Role};
use entente_tls::{ALPN_GRPC, ALPN_JOIN, Credentials};
use rustls::ServerConfig;
use rustls::pki_types::CertificateDer;
use rustls::server::Acceptor;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};
use tokio_rustls::server::TlsStream;
use tokio_rustls::{LazyConfigAcceptor, StartHandshake};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;

use super::seats::{Seat, Seats, Seldom, host_of};
use crate::guard::Guard;

/// How long a peer may take to say who it is.
pub const HANDSHAKE_MAX: Duration = Duration::from_secs(3);
/// Handshakes that are under way at a time unless the configuration says otherwise; further
/// connections are closed.
pub const HANDSHAKES_MAX: usize = 256;
/// Those of one host among them, likewise: behind an address that is translated stand many.
pub const HANDSHAKES_OF_HOST_MAX: usize = 128;
/// Connections of members and operators at a time, likewise.
pub const CONNECTIONS_MAX: usize = 8_192;
/// Those of one identity among them: a coordinator has a few, an operator one for each verb.
pub const CONNECTIONS_OF_IDENTITY_MAX: usize = 64;
/// Connections that wait for the gRPC server to take them.
const ACCEPTED_MAX: usize = 64;
/// Connections of processes that join: each is there for one call.
const JOINERS_MAX: usize = 16;
/// Those of one host among them.
const JOINERS_OF_HOST_MAX: usize = 8;
/// Pause after an error of the listener: too many open files, most often.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// How many may come at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// Handshakes that are under way.
    pub handshakes_max: usize,
    /// Those of one host among them.
    pub handshakes_of_host_max: usize,
    /// Connections of members and operators.
    pub connections_max: usize,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            handshakes_max: HANDSHAKES_MAX,
            handshakes_of_host_max: HANDSHAKES_OF_HOST_MAX,
            connections_max: CONNECTIONS_MAX,
        }
    }
}

/// Who is at the other end; what a handler finds in the extensions of its request.
#[derive(Debug, Clone)]
pub struct Peer {
    /// Who it is.
    pub identity: Arc<Identity>,
    /// The fingerprint of the certificate that says so.
    pub certificate_sha256: [u8; 32],
}

impl Peer {
    /// Who is at the other end of a finished handshake.
    ///
    /// # Errors
    /// There is no certificate; that cannot be where both ends are authenticated.
    pub fn of(certificates: Option<&[CertificateDer<'_>]>) -> Result<Self, entente_tls::Error> {
        Ok(Self {
            identity: Arc::new(entente_tls::peer_identity(certificates)?),
            certificate_sha256: entente_tls::peer_certificate_sha256(certificates)?,
        })
    }
}

/// Any process of the cluster; what it may do is the table's to say.
pub fn anyone(credentials: &Credentials) -> Expected {
    let roles = vec![Role::Coordinator, Role::Witness, Role::Expert, Role::Operator];
    Expected { cluster: credentials.identity().cluster.clone(), roles, member: None }
}

/// Somebody who has shown no certificate, and may join at most; in the extensions likewise.
#[derive(Debug, Clone, Copy)]
pub struct Stranger(SocketAddr);

impl fmt::Display for Stranger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Connections by who is at the other end.
pub struct Accepted {
    /// Of members and operators.
    pub members: ReceiverStream<io::Result<ControlIo<Peer>>>,
    /// Of those who have no certificate; none come where nobody can join.
    pub joiners: ReceiverStream<io::Result<ControlIo<Stranger>>>,
}

/// Connections, for as long as the members' part of the result lives. Processes without a certificate
/// are let as far as a coordinator's: it can issue one.
///
/// # Errors
/// The credentials are of no use.
pub fn accept(
    listener: TcpListener,
    credentials: &Credentials,
    guard: Guard,
    bounds: Bounds,
) -> Result<Accepted, entente_tls::Error> {
    let joins =
        (credentials.identity().role == Role::Coordinator).then(|| credentials.join_server());
    let (members, accepted) = mpsc::channel(ACCEPTED_MAX);
    let (joiners, joining) = mpsc::channel(JOINERS_MAX);
    let door = Door {
        member: credentials.server(anyone(credentials), &[ALPN_GRPC])?,
        joiner: joins.transpose()?,
        members: members.clone(),
        joiners,
        member_seats: Seats::new(bounds.connections_max, CONNECTIONS_OF_IDENTITY_MAX),
        joiner_seats: Seats::new(JOINERS_MAX, JOINERS_OF_HOST_MAX),
    };
    let handshakes = Seats::new(bounds.handshakes_max, bounds.handshakes_of_host_max);
    tokio::spawn(async move {
        tokio::select! {
            () = listen(listener, door, guard, handshakes) => {}
            () = members.closed() => {}
        }
    });
    let (members, joiners) = (ReceiverStream::new(accepted), ReceiverStream::new(joining));
    Ok(Accepted { members, joiners })
}

/// What is needed to let somebody in. Cheap to clone.
#[derive(Clone)]
struct Door {
    member: Arc<ServerConfig>,
    joiner: Option<Arc<ServerConfig>>,
    members: mpsc::Sender<io::Result<ControlIo<Peer>>>,
    joiners: mpsc::Sender<io::Result<ControlIo<Stranger>>>,
    /// By identity.
    member_seats: Seats<String>,
    /// By host, for those who have shown nothing.
    joiner_seats: Seats<String>,
}

async fn listen(listener: TcpListener, door: Door, guard: Guard, handshakes: Seats<IpAddr>) {
    let mut crowded = Seldom::default();
    loop {
        let (socket, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "a control connection was not taken");
                sleep(ACCEPT_RETRY).await;
                continue;
            }
        };
        let Some(seat) = handshakes.take(host_of(peer.ip())) else {
            // Whoever floods the port shall not flood the log too.
            if crowded.is_due() {
                tracing::warn!(%peer, "control connections are not taken: too many handshakes");
            }
            continue;
        };
        let (door, guard) = (door.clone(), guard.clone());
        tokio::spawn(async move {
            let greeted = timeout(HANDSHAKE_MAX, door.greet(socket, peer)).await;
            drop(seat);
            match greeted {
                Ok(Ok(guest)) => door.show_in(guest).await,
                Ok(Err(error)) if error.kind() == io::ErrorKind::UnexpectedEof => {
                    // Somebody who only looked whether anybody is there.
                    tracing::debug!(%peer, %error, "a control connection was not served");
                }
                Ok(Err(error)) => guard.turned_away(peer, &error),
                Err(_) => tracing::warn!(%peer, "a peer did not say who it is in time"),
            }
        });
    }
}

/// Somebody whose handshake is over.
enum Guest {
    Member(ControlIo<Peer>),
    Joiner(ControlIo<Stranger>),
}

impl Door {
    /// The name of the protocol decides which certificates are asked for.
    async fn greet(&self, socket: TcpStream, address: SocketAddr) -> io::Result<Guest> {
        socket.set_nodelay(true)?;
        let hello = LazyConfigAcceptor::new(Acceptor::default(), socket).await;
        let hello = hello.map_err(super::in_words)?;
        let wants_to_join =
            hello.client_hello().alpn().into_iter().flatten().any(|n| n == ALPN_JOIN);
        match self.joiner.as_ref().filter(|_| wants_to_join) {
            Some(config) => {
                let seat = self.joiner_seats.take(host_of(address.ip()).to_string());
                let seat = seat.ok_or_else(|| io::Error::other("too many processes join"))?;
                let stream = shake(hello, config).await?;
                Ok(Guest::Joiner(ControlIo { stream, peer: Stranger(address), _seat: seat }))
            }
            None => {
                let stream = shake(hello, &self.member).await?;
                let peer = Peer::of(stream.get_ref().1.peer_certificates())?;
                let seat = self.member_seats.take(peer.identity.to_string());
                let seat = seat.ok_or_else(|| {
                    let identity = &peer.identity;
                    io::Error::other(format!("{identity} has too many connections, or all have"))
                })?;
                Ok(Guest::Member(ControlIo { stream, peer, _seat: seat }))
            }
        }
    }

    /// Fails only when the gRPC server has ended.
    async fn show_in(&self, guest: Guest) {
        match guest {
            Guest::Member(io) => drop(self.members.send(Ok(io)).await),
            Guest::Joiner(io) => drop(self.joiners.send(Ok(io)).await),
        }
    }
}

async fn shake(
    hello: StartHandshake<TcpStream>,
    config: &Arc<ServerConfig>,
) -> io::Result<Box<TlsStream<TcpStream>>> {
    Ok(Box::new(hello.into_stream(config.clone()).await.map_err(super::in_words)?))
}

/// A connection of somebody, whose handshake is over.
pub struct ControlIo<P> {
    stream: Box<TlsStream<TcpStream>>,
    peer: P,
    /// Given back when the connection ends.
    _seat: Seat<String>,
}

impl<P: Clone + Send + Sync + 'static> Connected for ControlIo<P> {
    type ConnectInfo = P;

    fn connect_info(&self) -> P {
        self.peer.clone()
    }
}

impl<P: Unpin> AsyncRead for ControlIo<P> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.stream).poll_read(context, into)
    }
}

impl<P: Unpin> AsyncWrite for ControlIo<P> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut *self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut *self.stream).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.stream).poll_shutdown(context)
    }
}
