//! Plain HTTP/1.1 for whoever comes: the public API, and what a process tells its operator.
//!
//! Nothing is known of a peer here, so everything that it can make this process keep has a bound:
//! connections, in all and of one host; the head of a request, in bytes, headers and time; and how
//! long an answer may wait to be taken. A connection without a request for [`HEAD_WAIT_MAX`] ends.
//!
//! HTTP/2 is not spoken, so there are no streams that could be opened and reset by the thousand. A
//! proxy that ends TLS for the public may well speak it on its other side.
//!
//! Whoever is refused is counted by the reason ([`Refusals`]): to write a line for each would be what
//! a flood is after.
//!
//! What it does not know: paths, bodies, who may do what.

use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
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

/// Connections at once unless the configuration says otherwise; further ones are told to come back.
pub const CONNECTIONS_MAX: usize = 4_096;
/// Connections of one host at once, likewise. A proxy is one host.
pub const CONNECTIONS_OF_HOST_MAX: usize = 2_048;
/// Bytes of a request's head, and of what is read or written at once.
pub const HEAD_BYTES_MAX: usize = 16 << 10;
/// Headers of a request.
pub const HEADERS_MAX: usize = 64;
/// How long a peer may take from when it may send a request until its head is there, likewise.
pub const HEAD_WAIT_MAX: Duration = Duration::from_secs(30);
/// How long a peer may take nothing of an answer that is ready.
pub const UNTAKEN_MAX: Duration = Duration::from_secs(30);
/// Pause after a connection could not be accepted: too many open files, most often.
const ACCEPT_RETRY: Duration = Duration::from_millis(50);

/// What somebody is told for whom there is no room.
const FULL: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\nconnection: close\r\n\
                      content-length: 0\r\n\r\n";

/// What peers may take of a listener.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// Connections at once.
    pub connections_max: usize,
    /// Those of one host among them.
    pub connections_of_host_max: usize,
    /// How long the head of a request may take, and how long a connection may wait for the next one.
    pub head_wait_max: Duration,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            connections_max: CONNECTIONS_MAX,
            connections_of_host_max: CONNECTIONS_OF_HOST_MAX,
            head_wait_max: HEAD_WAIT_MAX,
        }
    }
}

/// Connections that were not taken or given up, since the process started.
#[derive(Debug, Default)]
pub struct Refusals {
    full: AtomicU64,
    host_full: AtomicU64,
    head_late: AtomicU64,
    head_invalid: AtomicU64,
}

impl Refusals {
    /// Their numbers by reason: there was no room left, or none for that host; no head of a request
    /// came in time, which is also how a connection ends that is not used any more; or what came is
    /// no head that is taken.
    pub fn read(&self) -> [(&'static str, u64); 4] {
        let value = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        [
            ("full", value(&self.full)),
            ("host_full", value(&self.host_full)),
            ("head_late", value(&self.head_late)),
            ("head_invalid", value(&self.head_invalid)),
        ]
    }

    /// Counts a connection that ended by an error, unless the peer has just left.
    fn ended(&self, error: &hyper::Error) {
        if error.is_timeout() {
            add(&self.head_late);
        } else if error.is_parse() {
            add(&self.head_invalid);
        }
    }
}

fn add(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// Serves until `shutdown` resolves, and then lets running requests finish. Dropping it ends all
/// connections.
pub async fn serve<S, B>(
    listener: TcpListener,
    service: S,
    bounds: Bounds,
    refusals: Arc<Refusals>,
    shutdown: impl Future<Output = ()>,
) where
    S: Service<Request<Incoming>, Response = Response<B>, Error = Infallible>,
    S: Clone + Send + 'static,
    S::Future: Send,
    B: Body<Data: Send, Error: Into<Box<dyn std::error::Error + Send + Sync>>> + Send + 'static,
{
    let seats = Seats::new(bounds.connections_max, bounds.connections_of_host_max);
    let graceful = GracefulShutdown::new();
    let mut connections = JoinSet::new();
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(bounds.head_wait_max)
        .max_headers(HEADERS_MAX)
        .max_buf_size(HEAD_BYTES_MAX);
    tokio::pin!(shutdown);
    loop {
        let (socket, seat) = tokio::select! {
            seated = seated(&listener, &seats, &refusals) => seated,
            () = &mut shutdown => break,
        };
        let service = service.clone();
        let answer = service_fn(move |request| service.clone().oneshot(request));
        let connection = graceful.watch(http.serve_connection(TokioIo::new(socket), answer));
        let refusals = refusals.clone();
        connections.spawn(async move {
            if let Err(error) = connection.await {
                refusals.ended(&error);
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
async fn seated(
    listener: &TcpListener,
    seats: &Seats<IpAddr>,
    refusals: &Refusals,
) -> (TcpStream, Seat<IpAddr>) {
    loop {
        match listener.accept().await {
            Ok((socket, peer)) => {
                if let Some(seat) = seat(&socket, peer, seats, refusals) {
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

fn seat(
    socket: &TcpStream,
    peer: SocketAddr,
    seats: &Seats<IpAddr>,
    refusals: &Refusals,
) -> Option<Seat<IpAddr>> {
    let Some(seat) = seats.take(host_of(peer.ip())) else {
        add(if seats.are_full() { &refusals.full } else { &refusals.host_full });
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

#[cfg(test)]
mod tests {
    use std::future::pending;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    async fn empty(_: Request<Incoming>) -> Result<Response<String>, Infallible> {
        Ok(Response::new(String::new()))
    }

    /// What somebody is told who says `said`, and the reason that is counted for it.
    async fn refused(bounds: Bounds, said: &[u8]) -> (String, &'static str) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let refusals = Arc::new(Refusals::default());
        let service = tower::service_fn(empty);
        let server = tokio::spawn(serve(listener, service, bounds, refusals.clone(), pending()));
        let mut socket = TcpStream::connect(address).await.unwrap();
        // Whoever is refused at once may not be able to say or hear anything.
        let _ = socket.write_all(said).await;
        let mut told = Vec::new();
        let _ = socket.read_to_end(&mut told).await;
        let reason = loop {
            let counted = refusals.read().into_iter().find(|(_, count)| *count == 1);
            match counted {
                Some((reason, _)) => break reason,
                None => sleep(Duration::from_millis(5)).await,
            }
        };
        server.abort();
        (String::from_utf8(told).unwrap(), reason)
    }

    #[tokio::test]
    async fn whoever_is_refused_is_counted_by_the_reason() {
        let usual = Bounds::default();
        let full = Bounds { connections_max: 0, ..usual };
        assert_eq!(refused(full, b"").await.1, "full");
        let host_full = Bounds { connections_of_host_max: 0, ..usual };
        assert_eq!(refused(host_full, b"").await.1, "host_full");
        let hasty = Bounds { head_wait_max: Duration::from_millis(50), ..usual };
        assert_eq!(refused(hasty, b"GET / HTTP/1.1\r\n").await.1, "head_late");
        let (told, reason) = refused(usual, b"no head\r\n\r\n").await;
        assert!(told.starts_with("HTTP/1.1 400 ") && reason == "head_invalid", "{told} {reason}");
    }
}
