//! Plain HTTP/1.1 for whoever comes: the public API, and what a process tells its operator.
//!
//! Nothing is known of a peer here, so everything that it can make this process keep has a bound:
//! connections, in all and of one host; the head of a request, in bytes, headers and time; and how
//! long an answer may wait to be taken. A connection without a request for [`HEAD_WAIT_MAX`] ends.
//!
//! HTTP/2 is not spoken, so there are no streams that could be opened and reset by the thousand. A
//! proxy that ends TLS for the public may well speak it on its other side.
//!
//! What it does not know: paths, bodies, who may do what.

use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use hyper::body::{Body, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use rustix::net::sockopt;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::sleep;
use tower::{Service, ServiceExt};

use super::seats::{Seat, Seats, host_of};

/// Connections at once; further ones are told to come back.
pub const CONNECTIONS_MAX: usize = 4_096;
/// Connections of one host at once. A proxy is one host.
pub const CONNECTIONS_OF_HOST_MAX: usize = 2_048;
/// Bytes of a request's head, and of what is read or written at once.
pub const HEAD_BYTES_MAX: usize = 16 << 10;
/// Headers of a request.
pub const HEADERS_MAX: usize = 64;
/// How long a peer may take from when it may send a request until its head is there.
pub const HEAD_WAIT_MAX: Duration = Duration::from_secs(30);
/// How long a peer may take nothing of an answer that is ready.
pub const UNTAKEN_MAX: Duration = Duration::from_secs(30);
/// Pause after a connection could not be accepted: too many open files, most often.
const ACCEPT_RETRY: Duration = Duration::from_millis(50);

/// What somebody is told for whom there is no room.
const FULL: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\nconnection: close\r\n\
                      content-length: 0\r\n\r\n";

/// Serves until `shutdown` resolves, and then lets running requests finish. Dropping it ends all
/// connections.
pub async fn serve<S, B>(listener: TcpListener, service: S, shutdown: impl Future<Output = ()>)
where
    S: Service<Request<Incoming>, Response = Response<B>, Error = Infallible>,
    S: Clone + Send + 'static,
    S::Future: Send,
    B: Body<Data: Send, Error: Into<Box<dyn std::error::Error + Send + Sync>>> + Send + 'static,
{
    let seats = Seats::new(CONNECTIONS_MAX, CONNECTIONS_OF_HOST_MAX);
    let graceful = GracefulShutdown::new();
    let mut connections = JoinSet::new();
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(HEAD_WAIT_MAX)
        .max_headers(HEADERS_MAX)
        .max_buf_size(HEAD_BYTES_MAX);
    tokio::pin!(shutdown);
    loop {
        let (socket, seat) = tokio::select! {
            seated = seated(&listener, &seats) => seated,
            () = &mut shutdown => break,
        };
        let service = service.clone();
        let answer = service_fn(move |request| service.clone().oneshot(request));
        let connection = graceful.watch(http.serve_connection(TokioIo::new(socket), answer));
        connections.spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a connection broke");
            }
            drop(seat);
        });
        while connections.try_join_next().is_some() {}
    }
    drop(listener);
    graceful.shutdown().await;
}

/// The next connection for which there is room.
async fn seated(listener: &TcpListener, seats: &Seats<IpAddr>) -> (TcpStream, Seat<IpAddr>) {
    loop {
        match listener.accept().await {
            Ok((socket, peer)) => {
                if let Some(seat) = seat(&socket, peer, seats) {
                    return (socket, seat);
                }
            }
            Err(error) => {
                tracing::warn!(%error, "a connection was not taken");
                sleep(ACCEPT_RETRY).await;
            }
        }
    }
}

fn seat(socket: &TcpStream, peer: SocketAddr, seats: &Seats<IpAddr>) -> Option<Seat<IpAddr>> {
    let Some(seat) = seats.take(host_of(peer.ip())) else {
        tracing::debug!(%peer, "there is no room for a connection");
        // It fits into any new socket; who does not get it hears that the connection is closed.
        let _ = socket.try_write(FULL);
        return None;
    };
    if let Err(error) = configure(socket) {
        tracing::debug!(%peer, %error, "a connection was lost at once");
        return None;
    }
    Some(seat)
}

/// Tokens are small and wanted at once; a peer that takes none of them is given up.
fn configure(socket: &TcpStream) -> io::Result<()> {
    socket.set_nodelay(true)?;
    sockopt::set_tcp_user_timeout(socket, UNTAKEN_MAX.as_millis() as u32)?;
    Ok(())
}
