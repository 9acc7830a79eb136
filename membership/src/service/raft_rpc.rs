//! Messages of the other voters.

use entente_proto::identity::Identity;
use entente_proto::wire;
use entente_proto::wire::raft_server;
use tonic::{Request, Response, Status, Streaming, async_trait};

use super::shared::{Shared, voter_spec};
use crate::guard::caller;
use crate::net::Reason;

const CALL: &str = "/entente.v1.Raft/Deliver";

pub(super) struct Raft(pub(super) Shared);

#[async_trait]
impl raft_server::Raft for Raft {
    async fn deliver(
        &self,
        request: Request<Streaming<wire::RaftEnvelope>>,
    ) -> Result<Response<wire::RaftDelivered>, Status> {
        let caller = caller(&request)?;
        let mut messages = request.into_inner();
        loop {
            let message = tokio::select! {
                message = messages.message() => message?,
                () = self.0.stopped() => return Err(Status::unavailable("the voter stops")),
            };
            let Some(envelope) = message else { break };
            self.check(&caller, &envelope)?;
            self.0.owner.deliver(envelope);
        }
        Ok(Response::new(wire::RaftDelivered {}))
    }
}

impl Raft {
    /// A voter speaks for itself only, and of our cluster.
    fn check(&self, caller: &Identity, envelope: &wire::RaftEnvelope) -> Result<(), Status> {
        if envelope.cluster_id != self.0.own.identity.cluster.0[..] {
            let text = "the cluster was founded with other voters or nodes than this one";
            self.0.guard.note_refused(caller, CALL, text);
            return Err(Reason::OtherCluster.status(text));
        }
        let state = self.0.state();
        match voter_spec(&state, envelope.from) {
            Some(spec) if !spec.is(caller) => {
                let reason = format!("voter {} is {} of {}", envelope.from, spec.name, spec.region);
                Err(self.0.guard.refuse(caller, CALL, &reason))
            }
            // A voter that is behind does not know all of them yet.
            _ => Ok(()),
        }
    }
}
