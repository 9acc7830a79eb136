//! What a process asks to get a certificate, to keep one, and to get into the raft group.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use entente_proto::identity::Identity;
use entente_proto::ids::NodeName;
use entente_proto::wire;
use entente_proto::wire::enrolment_server;
use entente_tls::Credentials;
use tonic::{Request, Response, Status, async_trait};

use super::authorities::Authorities;
use super::enlist;
use super::shared::{Shared, addresses};
use crate::client::ClientError;
use crate::guard::{Guard, caller};
use crate::net::Stranger;
use crate::roster::Roster;
use crate::state::codec::spec_out;
use crate::state::{Expect, NodeState, Refused, RefusedCode};
use crate::token::{self, Claim, Token, TokenRefused};

const JOIN: &str = "/entente.v1.Enrolment/Join";
const RENEW: &str = "/entente.v1.Enrolment/Renew";
const ENLIST: &str = "/entente.v1.Enrolment/Enlist";
/// How long it may take until this voter knows what was committed before it was asked.
const READ_MAX: Duration = Duration::from_secs(2);
/// How long it may take to use a token up.
const PROPOSE_MAX: Duration = Duration::from_secs(3);

#[derive(Clone)]
pub(super) struct Enrolment(Arc<Parts>);

pub(super) struct Parts {
    pub(super) shared: Shared,
    pub(super) authorities: Authorities,
    pub(super) credentials: Credentials,
    pub(super) roster: Roster,
}

impl Enrolment {
    pub(super) fn new(parts: Parts) -> Self {
        Self(Arc::new(parts))
    }
}

#[async_trait]
impl enrolment_server::Enrolment for Enrolment {
    /// The one call for which nobody has to say who they are: the token says who they become.
    async fn join(
        &self,
        request: Request<wire::JoinRequest>,
    ) -> Result<Response<wire::JoinReply>, Status> {
        let Parts { shared, authorities, credentials, .. } = &*self.0;
        let from = request.extensions().get::<Stranger>().map(ToString::to_string);
        let from = from.unwrap_or_default();
        let said = request.into_inner();
        let name: NodeName = said.name.parse().map_err(|_| Status::invalid_argument("no name"))?;
        // A token that was made a moment ago may not be here yet, and one that was used may be.
        let late = || Status::unavailable("this voter does not know what is committed");
        let state = shared.read(READ_MAX).await.ok_or_else(late)?;
        let claim = Claim { secret: &said.secret, name: &name };
        let cluster = &credentials.identity().cluster;
        let admitted = Token::find(&state, &said.token_id).and_then(|(token, revision)| {
            Ok((token.admits(claim, now_ms(), cluster, &state)?, revision))
        });
        let (identity, revision) =
            admitted.map_err(|error| not_admitted(&shared.guard, &from, &said.token_id, &error))?;
        // It is signed before the token is used up, as a request that is none must not cost the
        // token, and leaves this process after.
        let chain_pem = authorities.certify(&said.csr, &identity)?;
        self.use_up(&said.token_id, revision).await?;
        tracing::info!(target: "audit", %identity, token = said.token_id, from, "joined");
        Ok(Response::new(self.joined(chain_pem)))
    }

    async fn renew(
        &self,
        request: Request<wire::RenewRequest>,
    ) -> Result<Response<wire::IssuedCertificate>, Status> {
        let caller = caller(&request)?;
        let Parts { shared, authorities, .. } = &*self.0;
        // Whoever was taken out for good keeps its certificate for the rest of its life, not longer.
        let state = shared.state();
        if state.node(&caller.node).is_some_and(|node| node.state == NodeState::Removed) {
            let reason = "it was taken out of the cluster";
            return Err(shared.guard.refuse(&caller, RENEW, reason));
        }
        let chain_pem = authorities.certify(&request.into_inner().csr, &caller)?;
        tracing::info!(target: "audit", %caller, "renewed");
        Ok(Response::new(wire::IssuedCertificate { chain_pem }))
    }

    async fn enlist(
        &self,
        request: Request<wire::EnlistRequest>,
    ) -> Result<Response<wire::EnlistReply>, Status> {
        let caller: Arc<Identity> = caller(&request)?;
        let shared = &self.0.shared;
        if shared.state().node(&caller.node).is_some_and(|node| !node.spec.is(&caller)) {
            return Err(shared.guard.refuse(&caller, ENLIST, "somebody else has that name"));
        }
        let votes = enlist::one_step(shared, &caller.node).await?;
        Ok(Response::new(wire::EnlistReply { votes }))
    }
}

impl Enrolment {
    /// Of all who have read the token at this revision, one gets through here.
    async fn use_up(&self, id: &str, revision: u64) -> Result<(), Status> {
        let delete = token::delete(id, revision);
        let used = self.0.shared.client.propose(PROPOSE_MAX, Expect::default(), delete).await;
        match used {
            Ok(_) => Ok(()),
            Err(ClientError::Refused(Refused { code: RefusedCode::StaleRevision, .. })) => {
                Err(Status::permission_denied(TokenRefused::Invalid.to_string()))
            }
            Err(error @ ClientError::Unknown(_)) => {
                Err(Status::aborted(format!("the token may be used up; make another: {error}")))
            }
            Err(error) => Err(Status::unavailable(error.to_string())),
        }
    }

    fn joined(&self, chain_pem: String) -> wire::JoinReply {
        let Parts { shared, credentials, roster, .. } = &*self.0;
        let cas = credentials.roots();
        let der = |ca: &rustls::pki_types::CertificateDer<'_>| Bytes::copy_from_slice(ca);
        wire::JoinReply {
            certificate: Some(wire::IssuedCertificate { chain_pem }),
            cas: cas.certificates().map(der).collect(),
            founding: Some(wire::Founding {
                cluster: roster.name().to_owned(),
                replicas: roster.replicas().into(),
                members: roster.specs().iter().map(spec_out).collect(),
            }),
            voters: addresses(&shared.state()),
        }
    }
}

/// Leaves a trace, and tells the joiner no more than helps an honest one.
fn not_admitted(guard: &Guard, from: &str, token: &str, error: &TokenRefused) -> Status {
    guard.note_stranger(JOIN, &format!("{from} with token {token:?}: {error}"));
    Status::permission_denied(error.to_string())
}

fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
