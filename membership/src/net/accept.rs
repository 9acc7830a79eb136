//! Takes connections, and shows those in whose certificate is of our cluster.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use entente_proto::identity::{Expected, Identity, Role};
use entente_tls::{ALPN_GRPC, Credentials};
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;

/// How long a peer may take to say who it is.
pub const HANDSHAKE_MAX: Duration = Duration::from_secs(3);
/// Handshakes that are under way at a time; further connections are closed.
pub const HANDSHAKES_MAX: usize = 256;
/// Connections that wait for the gRPC server to take them.
const ACCEPTED_MAX: usize = 64;
/// Pause after an error of the listener: too many open files, most often.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// Who is at the other end; what a handler finds in the extensions of its request.
#[derive(Debug, Clone)]
pub struct Peer(pub Arc<Identity>);

/// Connections of authenticated peers, for as long as the result lives.
///
/// # Errors
/// The credentials are of no use.
pub fn accept(
    listener: TcpListener,
    credentials: &Credentials,
) -> Result<ReceiverStream<io::Result<ControlIo>>, entente_tls::Error> {
    let roles = vec![Role::Coordinator, Role::Witness, Role::Expert, Role::Operator];
    let cluster = credentials.identity().cluster.clone();
    let anyone = Expected { cluster, roles, member: None };
    let config = credentials.server(anyone, &[ALPN_GRPC])?;
    let (sender, accepted) = mpsc::channel(ACCEPTED_MAX);
    tokio::spawn(async move {
        tokio::select! {
            () = listen(listener, config, sender.clone()) => {}
            () = sender.closed() => {}
        }
    });
    Ok(ReceiverStream::new(accepted))
}

async fn listen(
    listener: TcpListener,
    config: Arc<ServerConfig>,
    sender: mpsc::Sender<io::Result<ControlIo>>,
) {
    let handshakes = Arc::new(Semaphore::new(HANDSHAKES_MAX));
    loop {
        let (socket, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "a control connection was not taken");
                sleep(ACCEPT_RETRY).await;
                continue;
            }
        };
        let Ok(permit) = handshakes.clone().try_acquire_owned() else {
            tracing::warn!(%peer, "a control connection was not taken: too many handshakes");
            continue;
        };
        let (config, sender) = (config.clone(), sender.clone());
        tokio::spawn(async move {
            let greeted = timeout(HANDSHAKE_MAX, greet(socket, config)).await;
            drop(permit);
            match greeted {
                // Fails only when the gRPC server has ended.
                Ok(Ok(io)) => drop(sender.send(Ok(io)).await),
                Ok(Err(error)) if error.kind() == io::ErrorKind::UnexpectedEof => {
                    // Somebody who only looked whether anybody is there.
                    tracing::debug!(%peer, %error, "a control connection was not served");
                }
                Ok(Err(error)) => {
                    tracing::warn!(target: "audit", %peer, %error, "a control connection was refused");
                }
                Err(_) => tracing::warn!(%peer, "a peer did not say who it is in time"),
            }
        });
    }
}

async fn greet(socket: TcpStream, config: Arc<ServerConfig>) -> io::Result<ControlIo> {
    socket.set_nodelay(true)?;
    let stream = TlsAcceptor::from(config).accept(socket).await.map_err(super::in_words)?;
    let peer = entente_tls::peer_identity(stream.get_ref().1.peer_certificates())?;
    Ok(ControlIo { stream: Box::new(stream), peer: Peer(Arc::new(peer)) })
}

/// A connection of an authenticated peer.
pub struct ControlIo {
    stream: Box<TlsStream<TcpStream>>,
    peer: Peer,
}

impl Connected for ControlIo {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for ControlIo {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.stream).poll_read(context, into)
    }
}

impl AsyncWrite for ControlIo {
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
