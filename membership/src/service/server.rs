//! The control port: the gRPC services behind the guard, and the one call of those who join.

use std::convert::Infallible;
use std::time::Duration;

use entente_audit::note::NOTE_LEN_MAX;
use entente_proto::wire::admin_server::AdminServer;
use entente_proto::wire::enrolment_server::EnrolmentServer;
use entente_proto::wire::membership_server::MembershipServer;
use entente_proto::wire::raft_server::RaftServer;
use entente_proto::wire::witness_server::WitnessServer;
use entente_tls::Credentials;
use tokio::net::TcpListener;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::{BoxFuture, Service, http};
use tower::service_fn;

use super::admin::Admin;
use super::enrolment::Enrolment;
use super::members::Members;
use super::raft_rpc::Raft;
use super::shared::Shared;
use super::witness::Witness;
use super::{Config, ServiceError};
use crate::guard::Guard;
use crate::net::{Accepted, Bounds, Peer, accept, bounded_server};
use crate::state::codec::{REQUEST_LEN_MAX, STATE_LEN_MAX};
use crate::voter::ENVELOPE_LEN_MAX;

/// Silence after which a peer is asked for a sign of life, and how long it may take to give one.
const KEEPALIVE: Duration = Duration::from_secs(2);
/// Calls of one connection that are under way.
const STREAMS_MAX: u32 = 64;
/// HTTP/2 window of a stream and of a connection: a snapshot must not wait for our permission.
const WINDOW_BYTES: u32 = 8 << 20;

/// Longest request of the service Witness: two notes' worth, as a note is the longest part of it.
const COSIGN_LEN_MAX: usize = 2 * NOTE_LEN_MAX;
/// Longest request of the service Enrolment: a CSR has some hundred bytes.
const JOIN_LEN_MAX: usize = 16 << 10;
/// How long a process that joins may be worked for.
const JOIN_MAX: Duration = Duration::from_secs(10);

/// Takes the socket that was handed over, or binds one.
pub(super) async fn listen(
    config: &Config,
    given: Option<std::net::TcpListener>,
) -> Result<TcpListener, ServiceError> {
    let listener = match given {
        Some(listener) => {
            listener.set_nonblocking(true).and_then(|()| TcpListener::from_std(listener))
        }
        None => TcpListener::bind(&config.listen).await,
    };
    listener.map_err(|error| cannot(config, &error))
}

pub(super) fn cannot(config: &Config, error: &std::io::Error) -> ServiceError {
    ServiceError::Listen { address: config.listen.clone(), reason: error.to_string() }
}

/// Serves until the service stops and the last call has ended.
pub(super) fn serve(
    shared: Shared,
    enrolment: Enrolment,
    listener: TcpListener,
    credentials: &Credentials,
    bounds: Bounds,
) -> Result<impl Future<Output = ()> + use<>, ServiceError> {
    let guard = shared.guard.clone();
    let Accepted { members: incoming, joiners } =
        accept(listener, credentials, guard.clone(), bounds)?;
    let enrolment = EnrolmentServer::new(enrolment).max_decoding_message_size(JOIN_LEN_MAX);
    let mut joined = enrolment.clone();
    let joining = service_fn(move |request| only_join(&mut joined, request));
    let raft = RaftServer::new(Raft(shared.clone())).max_decoding_message_size(ENVELOPE_LEN_MAX);
    let members = MembershipServer::new(Members::new(shared.clone()))
        .max_decoding_message_size(2 * REQUEST_LEN_MAX)
        .max_encoding_message_size(STATE_LEN_MAX + (1 << 16));
    let admin = AdminServer::new(Admin(shared.clone()));
    let witness = WitnessServer::new(Witness(shared.clone()));
    let witness = witness.max_decoding_message_size(COSIGN_LEN_MAX);
    let mut control = Control { guard, raft, members, admin, enrolment, witness };
    let control = service_fn(move |request| control.call(request));
    let server = bounded_server()
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE))
        .max_concurrent_streams(STREAMS_MAX)
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(2 * WINDOW_BYTES);
    let door = bounded_server()
        .max_concurrent_streams(1)
        .timeout(JOIN_MAX)
        .max_connection_age(JOIN_MAX)
        .max_connection_age_grace(KEEPALIVE);
    Ok(async move {
        let stopped = || {
            let shared = shared.clone();
            async move { shared.stopped().await }
        };
        let joined = door.serve_with_incoming_shutdown(joining, joiners, stopped());
        let served = server.serve_with_incoming_shutdown(control, incoming, stopped());
        if let Err(error) = tokio::try_join!(joined, served) {
            tracing::error!(%error, "the control port has ended");
        }
    })
}

type Answering = BoxFuture<http::Response<Body>, Infallible>;

fn refuse(status: Status) -> Answering {
    Box::pin(async move { Ok(status.into_http()) })
}

/// What those find who have no certificate: one call, and nothing beside it.
fn only_join(
    enrolment: &mut EnrolmentServer<Enrolment>,
    request: http::Request<Body>,
) -> Answering {
    if request.uri().path() == "/entente.v1.Enrolment/Join" {
        return enrolment.call(request);
    }
    refuse(Status::permission_denied("whoever has no certificate may join"))
}

/// The services on the control port, behind the guard.
#[derive(Clone)]
struct Control {
    guard: Guard,
    raft: RaftServer<Raft>,
    members: MembershipServer<Members>,
    admin: AdminServer<Admin>,
    enrolment: EnrolmentServer<Enrolment>,
    witness: WitnessServer<Witness>,
}

impl Control {
    fn call(&mut self, request: http::Request<Body>) -> Answering {
        let peer = request.extensions().get::<Peer>();
        if let Err(refused) = self.guard.admit(peer, request.uri().path()) {
            return refuse(refused);
        }
        match request.uri().path().split('/').nth(1) {
            Some("entente.v1.Raft") => self.raft.call(request),
            Some("entente.v1.Membership") => self.members.call(request),
            Some("entente.v1.Enrolment") => self.enrolment.call(request),
            Some("entente.v1.Admin") => self.admin.call(request),
            Some("entente.v1.Witness") => self.witness.call(request),
            // The table lists the calls of expert nodes too, which are not served here.
            _ => refuse(Status::unimplemented("it is served elsewhere")),
        }
    }
}
