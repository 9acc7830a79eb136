//! Connections to and from a control port: gRPC over TLS 1.3, both ends authenticated.
//!
//! ```text
//!   Dialler::dial ──► TLS, ALPN h2, the peer votes in our cluster ──► a tonic Channel
//!   accept        ──► TLS, ALPN h2, any role of our cluster ──► tonic, with who it is as Peer
//!                 └─► TLS, ALPN entente-join, no certificate ──► tonic, one call and no other
//! ```
//!
//! Invariants:
//! - there is no plain control port, not even on loopback: what is said here changes the cluster;
//! - who it is follows from the certificate alone; what it may do is decided elsewhere, by a table;
//! - whoever has no certificate gets to one call, on one of a few connections;
//! - a handshake ends after [`HANDSHAKE_MAX`], and at most [`HANDSHAKES_MAX`] are under way
//!   unless the configuration says otherwise.
//!
//! What it does not know: which calls there are, where voters are.

mod accept;
pub mod http;
mod reason;
pub mod seats;
mod via;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use entente_proto::identity::{Expected, Role};
use entente_proto::ids::{NodeName, Region};
use entente_tls::{ALPN_GRPC, Credentials};
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::transport::{Channel, Endpoint, Server};

pub use accept::{
    Accepted, Bounds, ControlIo, HANDSHAKE_MAX, HANDSHAKES_MAX, Peer, Stranger, accept, anyone,
};
pub use reason::{LEADER_KEY, REASON_KEY, Reason};
pub use via::Via;

/// How long it may take until a connection is there.
pub const DIAL_MAX: Duration = Duration::from_secs(1);
/// Silence after which the peer is asked for a sign of life.
const KEEPALIVE: Duration = Duration::from_secs(1);
/// How long it may take to give one. A machine that is busy is not one that is cut off.
const KEEPALIVE_MAX: Duration = Duration::from_secs(2);
/// HTTP/2 window of a stream: a state of some MiB must not wait for our permission.
const STREAM_WINDOW_BYTES: u32 = 8 << 20;
/// HTTP/2 window of the connection.
const CONNECTION_WINDOW_BYTES: u32 = 16 << 20;

/// Streams that a peer has opened and reset before anybody looked at them; more end the connection
/// ("rapid reset", CVE-2023-44487).
pub const RESET_STREAMS_MAX: usize = 20;
/// Streams that were reset for an error of the peer's; more end the connection (CVE-2025-8671).
pub const FAULTY_STREAMS_MAX: usize = 64;
/// Bytes of the headers of a call.
pub const CALL_HEADERS_BYTES_MAX: u32 = 16 << 10;

/// A gRPC server that bounds what every peer can do to it, whatever it serves.
pub fn bounded_server() -> Server {
    Server::builder()
        .http2_max_pending_accept_reset_streams(Some(RESET_STREAMS_MAX))
        .http2_max_local_error_reset_streams(Some(FAULTY_STREAMS_MAX))
        .http2_max_header_list_size(CALL_HEADERS_BYTES_MAX)
}

/// There is no connection.
#[derive(Debug, thiserror::Error)]
#[error("cannot reach {address}: {reason}")]
pub struct Unreachable {
    /// What was dialled.
    pub address: String,
    /// Why.
    pub reason: String,
}

/// Dials control ports. Cheap to clone.
#[derive(Clone)]
pub struct Dialler {
    config: Arc<ClientConfig>,
    /// The address under which we ourselves are known, and where that really is.
    own: Option<(String, SocketAddr)>,
    via: Via,
}

impl Dialler {
    /// Dials voters of the cluster of these credentials: any of them, or exactly this one.
    ///
    /// # Errors
    /// The credentials are of no use.
    pub fn new(
        credentials: &Credentials,
        member: Option<(Region, NodeName)>,
    ) -> Result<Self, entente_tls::Error> {
        let cluster = credentials.identity().cluster.clone();
        let voter = Expected { cluster, roles: vec![Role::Coordinator, Role::Witness], member };
        Self::expecting(credentials, voter)
    }

    /// Dials whoever is as expected.
    ///
    /// # Errors
    /// The credentials are of no use.
    pub fn expecting(
        credentials: &Credentials,
        expected: Expected,
    ) -> Result<Self, entente_tls::Error> {
        let config = credentials.client(expected, &[ALPN_GRPC])?;
        Ok(Self { config, own: None, via: Via::default() })
    }

    /// A voter reaches itself where it listens, whatever lies before the address that others use.
    pub fn knowing_itself(self, address: String, listens: SocketAddr) -> Self {
        Self { own: Some((address, listens)), ..self }
    }

    /// Others are dialled where this says.
    pub fn through(self, via: Via) -> Self {
        Self { via, ..self }
    }

    /// Connects to `host:port`.
    ///
    /// # Errors
    /// Nobody is there, or it is not who it should be; the text says which.
    pub async fn dial(&self, address: &str) -> Result<Channel, Unreachable> {
        let to = match &self.own {
            Some((own, listens)) if own == address => listens.to_string(),
            _ => self.via.resolve(address).to_owned(),
        };
        connect(self.config.clone(), address, to).await
    }
}

/// Dials a coordinator that is known by its CA alone, to join. See [`entente_tls::join_client`].
///
/// # Errors
/// As [`Dialler::dial`].
pub async fn dial_to_join(ca_sha256: &[[u8; 32]], address: &str) -> Result<Channel, Unreachable> {
    let unreachable = |reason| Unreachable { address: address.to_owned(), reason };
    let config = entente_tls::join_client(ca_sha256.to_vec());
    let config = config.map_err(|error| unreachable(error.to_string()))?;
    connect(config, address, address.to_owned()).await
}

/// Connects to what is known as `address`, at `to`.
async fn connect(
    config: Arc<ClientConfig>,
    address: &str,
    to: String,
) -> Result<Channel, Unreachable> {
    let unreachable = |reason| Unreachable { address: address.to_owned(), reason };
    // The scheme says what gRPC is to do about TLS: nothing, the connector does it.
    let endpoint = Endpoint::from_shared(format!("http://{address}"))
        .map_err(|error| unreachable(causes(&error)))?
        .connect_timeout(DIAL_MAX)
        .http2_keep_alive_interval(KEEPALIVE)
        .keep_alive_timeout(KEEPALIVE_MAX)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES);
    let connector = tower::service_fn(move |_| secured(config.clone(), to.clone()));
    let connected = timeout(DIAL_MAX, endpoint.connect_with_connector(connector)).await;
    match connected {
        Ok(Ok(channel)) => Ok(channel),
        Ok(Err(error)) => Err(unreachable(causes(&error))),
        Err(_) => Err(unreachable(format!("no answer within {} s", DIAL_MAX.as_secs()))),
    }
}

async fn secured(
    config: Arc<ClientConfig>,
    address: String,
) -> io::Result<TokioIo<TlsStream<TcpStream>>> {
    let socket = TcpStream::connect(address).await?;
    socket.set_nodelay(true)?;
    // The name is neither sent nor checked: the identity in the certificate is what counts.
    let name = ServerName::try_from("entente").map_err(io::Error::other)?;
    let connected = TlsConnector::from(config).connect(name, socket).await;
    connected.map(TokioIo::new).map_err(in_words)
}

/// An error of a handshake as a text; what the verifier found is otherwise printed as a structure.
pub fn in_words(error: io::Error) -> io::Error {
    match error.downcast::<rustls::Error>() {
        Ok(error) => io::Error::other(entente_tls::Error::from(error).to_string()),
        Err(error) => error,
    }
}

/// An error with all that it was caused by: on its own tonic's says only "transport error".
pub fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let further = error.to_string();
        // Some errors say what they were caused by, and are then asked again.
        if !text.ends_with(&further) {
            text = format!("{text}: {further}");
        }
        cause = error.source();
    }
    text
}
