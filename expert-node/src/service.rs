//! The gRPC service that turns messages into frames and answers into messages, and [`serve`], which
//! runs it and the byte streams behind one [`Door`].
//!
//! Each stream is read by one task. Before it reads a frame it reserves the place of the answer in
//! the stream's outgoing channel; so an answer never waits for room, the compute thread never
//! blocks on a peer, and a peer that does not read its answers stops being read.

use std::convert::Infallible;
use std::future::Future;
use std::sync::Arc;

use entente_membership::audit::Sink;
use entente_membership::guard::Guard;
use entente_membership::net::bounded_server;
use entente_membership::net::seats::Seats;
use entente_proto::frame::{Answer, Dispatch, MESSAGE_BYTES_MAX, Refusal};
use entente_proto::ids::{ExchangeId, Incarnation};
use entente_proto::statement::{self, STATEMENT_CONTEXT};
use entente_proto::wire;
use entente_proto::wire::exchange_server::{Exchange, ExchangeServer};
use entente_tls::Credentials;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::body::Body;
use tonic::codegen::{BoxFuture, Service as GrpcService, http};
use tonic::{Request, Response, Status, Streaming};
use tower::service_fn;

use crate::Error;
use crate::door::{Door, Greeted, Tls};
use crate::lend::{Lender, Pieces};
use crate::limits::{
    ACCEPT_LEN_MAX, CLOSE_MAX, CONNECTION_WINDOW_BYTES, DRAIN_MAX, GRPC_CONNECTIONS_MAX,
    GRPC_CONNECTIONS_OF_PEER_MAX, HTTP2_FRAME_BYTES_MAX, KEEPALIVE, STREAM_FRAMES_MAX,
    STREAM_WINDOW_BYTES, STREAMS_MAX,
};
use crate::node::NodeHandle;
use crate::stream::Connections;

type Outgoing = Result<wire::Combine, Status>;

struct Service {
    node: NodeHandle,
    /// What statements are signed with; without it none are made.
    credentials: Option<Credentials>,
    lender: Lender,
    /// Turns true when streams must end.
    closing: watch::Receiver<bool>,
}

#[tonic::async_trait]
impl Exchange for Service {
    type StreamStream = ReceiverStream<Outgoing>;
    type FetchStream = Pieces;

    async fn describe(
        &self,
        _: Request<wire::DescribeRequest>,
    ) -> Result<Response<wire::NodeInfo>, Status> {
        Ok(Response::new(self.node.info().into()))
    }

    async fn stream(
        &self,
        request: Request<Streaming<wire::Dispatch>>,
    ) -> Result<Response<Self::StreamStream>, Status> {
        let mut incarnation = self.node.incarnation();
        let greeted = request.extensions().get::<Greeted>().map(|greeted| greeted.incarnation);
        if Some(*incarnation.borrow_and_update()) != greeted {
            return Err(Status::unavailable("the node has another incarnation now; dial again"));
        }
        let (answers, outgoing) = mpsc::channel(STREAM_FRAMES_MAX);
        let node = self.node.clone();
        let mut closing = self.closing.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = read_frames(node, request.into_inner(), answers) => {}
                _ = incarnation.changed() => {}
                _ = closing.wait_for(|closing| *closing) => {}
            }
        });
        Ok(Response::new(ReceiverStream::new(outgoing)))
    }

    async fn settle(
        &self,
        request: Request<wire::SettleRequest>,
    ) -> Result<Response<wire::SignedStatement>, Status> {
        let own = self.credentials.as_ref();
        let own = own.ok_or_else(|| Status::failed_precondition("the node has no certificate"))?;
        let requests = statement::requests(&request.get_ref().requests)
            .map_err(|error| Status::invalid_argument(error.to_string()))?;
        let statement = self.node.statement(&requests).encode();
        let signed = own
            .sign(STATEMENT_CONTEXT, &statement)
            .map_err(|error| Status::failed_precondition(error.to_string()))?;
        let (signature, certificate) = (signed.signature.into(), signed.certificate_der.into());
        Ok(Response::new(wire::SignedStatement { statement, signature, certificate }))
    }

    /// Weights go to nobody who has not shown a certificate; to whom else, the guard has said.
    async fn fetch(
        &self,
        request: Request<wire::FetchRequest>,
    ) -> Result<Response<Self::FetchStream>, Status> {
        let greeted = request.extensions().get::<Greeted>();
        if greeted.is_none_or(|greeted| greeted.peer.is_none()) {
            return Err(Status::unauthenticated("nobody is known there"));
        }
        Ok(Response::new(self.lender.lend(&request.into_inner())?))
    }
}

/// Reads one stream until either side ends it.
async fn read_frames(
    node: NodeHandle,
    mut frames: Streaming<wire::Dispatch>,
    answers: mpsc::Sender<Outgoing>,
) {
    while let Ok(place) = answers.clone().reserve_owned().await {
        let message = match frames.message().await {
            Ok(Some(message)) => message,
            Ok(None) => return,
            Err(status) => {
                tracing::debug!(%status, "a stream broke");
                return;
            }
        };
        let exchange = ExchangeId(message.exchange_id);
        let reply = move |answer: Answer| {
            place.send(Ok(answer.into()));
        };
        match Dispatch::try_from(message) {
            Ok(frame) => node.submit(frame, Box::new(reply)),
            Err(error) => {
                let refusal = Refusal::Invalid(error.to_string());
                node.account().refused(&refusal);
                let result = Err(refusal);
                reply(Answer { exchange, fence: None, result });
            }
        }
    }
}

/// Ends the byte streams over which peers were greeted under an earlier incarnation, each time that
/// there is another. One that was just greeted anew may be among them; its peer dials once more.
async fn greet_again(mut incarnation: watch::Receiver<Incarnation>, streams: Arc<Connections>) {
    while incarnation.changed().await.is_ok() {
        streams.close();
    }
}

/// Ends its task when it is dropped, also when whoever held it was.
pub(crate) struct AbortOnDrop(pub(crate) JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// What makes the difference between a node that serves processes of its cluster and region, and one
/// that serves whoever comes.
#[derive(Clone)]
pub struct Secured {
    /// What the node shows, and whom it believes.
    pub credentials: Credentials,
    /// Who is told of refusals.
    pub audit: Sink,
}

impl From<Credentials> for Secured {
    /// Refusals go to the log.
    fn from(credentials: Credentials) -> Self {
        Self { credentials, audit: Sink::default() }
    }
}

/// Has the exchange answer a call that the guard lets through; there is one unless the node serves in
/// plain text.
fn guarded(
    guard: Option<&Guard>,
    exchange: &mut ExchangeServer<Service>,
    request: http::Request<Body>,
) -> BoxFuture<http::Response<Body>, Infallible> {
    let peer = request.extensions().get::<Greeted>().and_then(|greeted| greeted.peer.as_ref());
    match guard.map_or(Ok(()), |guard| guard.admit(peer, request.uri().path())) {
        Ok(()) => exchange.call(request),
        Err(refused) => Box::pin(async move { Ok(refused.into_http()) }),
    }
}

/// Serves the node on `listener` until `shutdown` resolves: with credentials over TLS, to whom the
/// table lets call it; without, in plain text to whoever comes. In the end new frames are refused as
/// DRAINING, what is queued is computed and answered, and streams are ended; all of that within a
/// few seconds, whatever peers do.
pub async fn serve(
    node: NodeHandle,
    listener: TcpListener,
    secured: Option<Secured>,
    shutdown: impl Future<Output = ()>,
) -> Result<(), Error> {
    let guard =
        secured.as_ref().map(|own| Guard::new(own.credentials.identity(), own.audit.clone()));
    let tls = secured.as_ref().zip(guard.clone());
    let tls = tls.map(|(own, guard)| Tls::new(&own.credentials, guard)).transpose()?;
    let (close, closing) = watch::channel(false);
    let mut closed = closing.clone();
    let connections = Arc::new(Connections::default());
    let (grpc, incoming) = mpsc::channel(ACCEPT_LEN_MAX);
    let seats = Seats::new(GRPC_CONNECTIONS_MAX, GRPC_CONNECTIONS_OF_PEER_MAX);
    let door = Door { node: node.clone(), connections: connections.clone(), grpc, seats, tls };
    let _greeting = AbortOnDrop(tokio::spawn(greet_again(node.incarnation(), connections.clone())));
    let accepting = AbortOnDrop(tokio::spawn(door.open(listener)));
    let mut exchange = ExchangeServer::new(Service {
        lender: Lender::new(node.clone()),
        node: node.clone(),
        credentials: secured.map(|own| own.credentials),
        closing,
    })
    .max_decoding_message_size(MESSAGE_BYTES_MAX)
    .max_encoding_message_size(MESSAGE_BYTES_MAX);
    let drained = async {
        shutdown.await;
        node.drain();
        if timeout(DRAIN_MAX, node.idle()).await.is_err() {
            tracing::warn!("stopping with frames that were not computed in time");
        }
        drop(accepting);
        connections.close();
        close.send_replace(true);
    };
    let server = bounded_server()
        .max_concurrent_streams(STREAMS_MAX)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_frame_size(HTTP2_FRAME_BYTES_MAX)
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE))
        .serve_with_incoming_shutdown(
            service_fn(move |request| guarded(guard.as_ref(), &mut exchange, request)),
            ReceiverStream::new(incoming),
            drained,
        );
    let overdue = async {
        let _ = closed.wait_for(|closed| *closed).await;
        sleep(CLOSE_MAX).await;
    };
    tokio::select! {
        served = server => Ok(served?),
        () = overdue => Ok(()),
    }
}
