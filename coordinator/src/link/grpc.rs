//! The link over gRPC: one task for each node, that dials, watches and redials.
//!
//! ```text
//!             ┌────────────── any error: Down(reason), wait ───────────────┐
//!             ▼                                                            │
//!   dial ──► Describe ──► open the stream ──► Up(info) ──► forward frames, deliver answers
//! ```
//!
//! Each connection has its own queue of frames. When the connection breaks, the queue goes with
//! it: a frame is never carried over to the next connection, which may lead to another incarnation
//! of the node. Whoever sent it hears [`LinkEvent::Down`] and decides what to do.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use entente_membership::net::causes;
use entente_proto::frame::{Dispatch, MESSAGE_BYTES_MAX};
use entente_proto::ids::NodeName;
use entente_proto::link::{Link, LinkEvent, LinkEvents, NodeInfo, NotSent};
use entente_proto::wire;
use entente_proto::wire::exchange_client::ExchangeClient;
use entente_tls::peer_certificate_sha256;
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::{Channel, Endpoint};

use super::{Peer, REDIAL_MAX, REDIAL_MIN, checked_answer};

/// Frames that wait for the connection to take them; more are not taken.
const QUEUE_LEN_MAX: usize = 256;
/// How long a connection, and each of the two calls that open the link, may take.
const DIAL_MAX: Duration = Duration::from_secs(3);
/// Silence after which the node is asked for a sign of life, and how long it may take to give one.
const KEEPALIVE: Duration = Duration::from_secs(5);
/// HTTP/2 window of a stream: an answer of some MiB must not wait for our permission.
const STREAM_WINDOW_BYTES: u32 = 8 << 20;
/// HTTP/2 window of the connection.
const CONNECTION_WINDOW_BYTES: u32 = 16 << 20;
/// Largest piece in which HTTP/2 carries a message.
const HTTP2_FRAME_BYTES_MAX: u32 = 1 << 20;

/// The queue of the connection that is up, if one is.
type Frames = Arc<Mutex<Option<mpsc::Sender<Dispatch>>>>;

/// A link to one expert node, open until it is dropped.
pub struct GrpcLink {
    frames: Frames,
    task: JoinHandle<()>,
}

impl GrpcLink {
    /// Starts dialling `peer` on `runtime`.
    pub fn open(peer: Peer, events: Arc<dyn LinkEvents>, runtime: &tokio::runtime::Handle) -> Self {
        let frames = Frames::default();
        let dialler = Dialler { peer, events, frames: frames.clone() };
        Self { frames, task: runtime.spawn(dialler.run()) }
    }
}

impl Link for GrpcLink {
    fn send(&self, frame: Dispatch) -> Result<(), NotSent> {
        let frames = self.frames.lock().unwrap_or_else(PoisonError::into_inner);
        frames.as_ref().ok_or(NotSent)?.try_send(frame).map_err(|_| NotSent)
    }
}

impl Drop for GrpcLink {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Why a connection is of no use, or no longer.
#[derive(Debug, thiserror::Error)]
enum Broken {
    #[error("cannot reach {address}: {}", causes(.source))]
    Dial { address: String, source: tonic::transport::Error },
    #[error("no answer to {call} within {} s", DIAL_MAX.as_secs())]
    Silent { call: &'static str },
    #[error("{call}: {}", .status.message())]
    Call { call: &'static str, status: tonic::Status },
    #[error("the node describes itself wrongly: {0}")]
    Description(#[from] entente_proto::frame::FrameError),
    #[error("another node answered: {0}")]
    Stranger(NodeName),
    #[error("the node ended the stream")]
    Ended,
}

struct Dialler {
    peer: Peer,
    events: Arc<dyn LinkEvents>,
    frames: Frames,
}

impl Dialler {
    async fn run(self) {
        let mut pause = REDIAL_MIN;
        // The first failure is reported, then each loss of a link that was up.
        let mut report = true;
        loop {
            let reason = match self.connect().await {
                Ok(connection) => {
                    (pause, report) = (REDIAL_MIN, true);
                    self.forward(connection).await
                }
                Err(reason) => reason,
            };
            // Nothing enters the queue after this, and what is in it is gone.
            self.set_frames(None);
            if report {
                self.events.on_event(self.peer.node, LinkEvent::Down(reason.to_string()));
                report = false;
            } else {
                tracing::debug!(node = %self.peer.name, %reason, "redialling");
            }
            sleep(pause).await;
            pause = (pause * 2).min(REDIAL_MAX);
        }
    }

    fn set_frames(&self, frames: Option<mpsc::Sender<Dispatch>>) {
        *self.frames.lock().unwrap_or_else(PoisonError::into_inner) = frames;
    }

    /// Dials, asks the node who it is, opens the stream and announces that the link is up.
    async fn connect(&self) -> Result<Streaming<wire::Combine>, Broken> {
        let shown = Shown::default();
        let mut client = ExchangeClient::new(dial(&self.peer, &shown).await?)
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        let described = in_time("Describe", client.describe(wire::DescribeRequest {})).await?;
        let info = NodeInfo::try_from(described.into_inner())?;
        if info.name != self.peer.name {
            return Err(Broken::Stranger(info.name));
        }
        let (frames, queued) = mpsc::channel(QUEUE_LEN_MAX);
        let messages = ReceiverStream::new(queued).map(wire::Dispatch::from);
        let answers = in_time("Stream", client.stream(messages)).await?.into_inner();
        self.set_frames(Some(frames));
        let certificate_sha256 = *shown.lock().unwrap_or_else(PoisonError::into_inner);
        self.events.on_event(self.peer.node, LinkEvent::Up { info, certificate_sha256 });
        Ok(answers)
    }

    /// Delivers answers until the connection breaks; says why it did.
    async fn forward(&self, mut answers: Streaming<wire::Combine>) -> Broken {
        loop {
            match answers.message().await {
                Ok(Some(message)) => {
                    self.events
                        .on_event(self.peer.node, LinkEvent::Answer(checked_answer(message)));
                }
                Ok(None) => return Broken::Ended,
                Err(status) => return Broken::Call { call: "Stream", status },
            }
        }
    }
}

/// A connection for single calls.
pub(crate) async fn connect(peer: &Peer) -> Result<Channel, Unusable> {
    Ok(dial(peer, &Shown::default()).await?)
}

/// Why there is none.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub(crate) struct Unusable(#[from] Broken);

/// SHA-256 of the certificate that the node showed last; zeros before that, and in plain text.
type Shown = Arc<Mutex<[u8; 32]>>;

async fn dial(peer: &Peer, shown: &Shown) -> Result<Channel, Broken> {
    let address = &peer.address;
    let failed = |source| Broken::Dial { address: address.clone(), source };
    // The scheme says what gRPC is to do about TLS: nothing, the connector does it.
    let endpoint = Endpoint::from_shared(format!("http://{address}"))
        .map_err(failed)?
        .connect_timeout(DIAL_MAX)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEPALIVE)
        .keep_alive_timeout(KEEPALIVE)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_frame_size(HTTP2_FRAME_BYTES_MAX);
    let Some(config) = &peer.tls else {
        return endpoint.connect().await.map_err(failed);
    };
    let (config, address, shown) = (config.clone(), address.clone(), shown.clone());
    let connector = tower::service_fn(move |_| {
        let (secured, shown) = (secured(config.clone(), address.clone()), shown.clone());
        async move {
            let secured = secured.await?;
            let certificates = secured.inner().get_ref().1.peer_certificates();
            let certificate_sha256 = peer_certificate_sha256(certificates)?;
            *shown.lock().unwrap_or_else(PoisonError::into_inner) = certificate_sha256;
            Ok::<_, std::io::Error>(secured)
        }
    });
    endpoint.connect_with_connector(connector).await.map_err(failed)
}

/// Dials and does the handshake; together they may take as long as dialling.
async fn secured(
    config: Arc<ClientConfig>,
    address: String,
) -> std::io::Result<TokioIo<TlsStream<TcpStream>>> {
    let connected = async {
        let socket = TcpStream::connect(address).await?;
        socket.set_nodelay(true)?;
        // The name is neither sent nor checked: the identity in the certificate is what counts.
        let name = ServerName::try_from("entente").map_err(std::io::Error::other)?;
        TlsConnector::from(config).connect(name, socket).await
    };
    timeout(DIAL_MAX, connected).await?.map(TokioIo::new).map_err(in_words)
}

/// What the verifier found is otherwise printed as a structure.
fn in_words(error: std::io::Error) -> std::io::Error {
    match error.downcast::<rustls::Error>() {
        Ok(error) => std::io::Error::other(entente_tls::Error::from(error).to_string()),
        Err(error) => error,
    }
}

async fn in_time<T>(
    call: &'static str,
    response: impl Future<Output = Result<T, tonic::Status>>,
) -> Result<T, Broken> {
    match timeout(DIAL_MAX, response).await {
        Ok(Ok(response)) => Ok(response),
        Ok(Err(status)) => Err(Broken::Call { call, status }),
        Err(_) => Err(Broken::Silent { call }),
    }
}
