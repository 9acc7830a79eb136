//! The two calls to the leader, and the stream that one of them opens.

use std::future::pending;
use std::time::Duration;

use entente_membership::client::{Client, ClientError};
use entente_proto::ids::{Incarnation, NodeId};
use entente_proto::wire;
use entente_proto::wire::membership_client::MembershipClient;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

/// How long one call may take; it asks several voters, and more than once.
const CALL_MAX: Duration = Duration::from_secs(5);
/// Reports that the leader has not taken yet; past it the stream is given up.
const REPORTS_MAX: usize = 16;

/// What a call brought.
pub(super) enum Answer {
    Registered(NodeId, Incarnation),
    Connected(Box<Stream>),
}

/// A stream to the leader.
pub(super) struct Stream {
    reports: mpsc::Sender<wire::HeartbeatReport>,
    orders: Streaming<wire::HeartbeatOrders>,
    clogged: bool,
}

impl Stream {
    /// Sends a report. A stream that takes no more has nothing further to say but that it ended: a
    /// report that was left out would be missed by those after it.
    pub(super) fn report(&mut self, report: wire::HeartbeatReport) {
        self.clogged = self.reports.try_send(report).is_err();
    }
}

pub(super) async fn register(
    client: Client,
    request: wire::RegisterRequest,
) -> Result<Answer, ClientError> {
    let call = |channel| {
        let request = request.clone();
        async move { MembershipClient::new(channel).register(request).await }
    };
    let reply = client.leader(CALL_MAX, call).await?.into_inner();
    Ok(Answer::Registered(NodeId(reply.node), Incarnation(reply.incarnation)))
}

/// The first report goes out with the call: the leader may look at it before it answers.
pub(super) async fn connect(
    client: Client,
    first: wire::HeartbeatReport,
) -> Result<Answer, ClientError> {
    let call = |channel| {
        let first = first.clone();
        async move {
            let (reports, sent) = mpsc::channel(REPORTS_MAX);
            // There is room: the channel is new.
            let _ = reports.try_send(first);
            let orders =
                MembershipClient::new(channel).heartbeat(ReceiverStream::new(sent)).await?;
            Ok(Box::new(Stream { reports, orders: orders.into_inner(), clogged: false }))
        }
    };
    Ok(Answer::Connected(client.leader(CALL_MAX, call).await?))
}

/// Waits for what the leader says next, for ever if there is no stream.
pub(super) async fn next_orders(
    stream: &mut Option<Box<Stream>>,
) -> Result<wire::HeartbeatOrders, Status> {
    let Some(stream) = stream else { return pending().await };
    if stream.clogged {
        return Err(Status::unavailable("the leader takes no reports"));
    }
    let orders = stream.orders.message().await?;
    orders.ok_or_else(|| Status::unavailable("the leader ended the stream"))
}
