//! What all parts of the service look at.

use std::sync::Arc;
use std::time::Duration;

use entente_proto::ids::{NodeId, NodeName};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tonic::Status as GrpcStatus;

use super::owner::Owner;
use super::steward_shell::StewardHandle;
use super::witness::Cosigner;
use crate::client::Client;
use crate::guard::Guard;
use crate::net::Reason;
use crate::raft::Status;
use crate::state::{NodeSpec, NodeState, State, VoterId};
use crate::store::Identity;

/// Cheap to clone.
#[derive(Clone)]
pub(super) struct Shared {
    pub(super) owner: Owner,
    pub(super) state: watch::Receiver<Arc<State>>,
    pub(super) status: watch::Receiver<Status>,
    pub(super) client: Client,
    /// Where this process cosigns.
    pub(super) cosigner: Option<Arc<Cosigner>>,
    pub(super) steward: StewardHandle,
    pub(super) directory: Directory,
    pub(super) own: Arc<Own>,
    pub(super) guard: Guard,
    pub(super) tick: Duration,
    pub(super) election: Duration,
    pub(super) stopping: watch::Receiver<bool>,
}

/// Who this voter is.
pub(super) struct Own {
    pub(super) identity: Identity,
    pub(super) name: NodeName,
    pub(super) address: String,
}

impl Shared {
    pub(super) fn state(&self) -> Arc<State> {
        self.state.borrow().clone()
    }

    pub(super) fn status(&self) -> Status {
        self.status.borrow().clone()
    }

    /// This voter's node, once the state here knows it.
    pub(super) fn node(&self) -> Option<NodeId> {
        self.state().node(&self.own.name).map(|node| node.id)
    }

    /// Refuses with the leader's address, unless this voter leads.
    pub(super) fn expect_leader(&self) -> Result<(), GrpcStatus> {
        if self.status.borrow().is_leader { Ok(()) } else { Err(self.not_leader()) }
    }

    pub(super) fn not_leader(&self) -> GrpcStatus {
        let own = self.own.identity.voter;
        let leader = self.status.borrow().leader.filter(|leader| *leader != own);
        let spec = leader.and_then(|leader| self.directory.voter(leader));
        Reason::not_leader(spec.as_ref().map(|spec| spec.address.as_str()))
    }

    /// A state in which everything is that was committed before this call. `None`: nobody could
    /// confirm it in time.
    pub(super) async fn read(&self, deadline: Duration) -> Option<Arc<State>> {
        let confirmed = async {
            // A question that is lost on its way to the leader is never answered.
            let ask = || timeout(self.election, self.owner.read());
            while ask().await != Ok(true) {
                sleep(self.tick).await;
            }
        };
        timeout(deadline, confirmed).await.ok()?;
        Some(self.state())
    }

    /// Hands leadership over and waits until it is there; false if it is not in time.
    pub(super) async fn transfer(&self, to: u64, max: Duration) -> bool {
        if self.owner.transfer(to).await.is_err() {
            return false;
        }
        let mut status = self.status.clone();
        let there = status.wait_for(|status| status.leader == Some(to));
        matches!(timeout(max, there).await, Ok(Ok(_)))
    }

    /// Returns when the service is to stop.
    pub(super) async fn stopped(&self) {
        // An error means that nobody is left who could say so.
        let _ = self.stopping.clone().wait_for(|stopping| *stopping).await;
    }
}

/// Where voters are: as is committed, or as it was in the beginning.
#[derive(Clone)]
pub(super) struct Directory {
    pub(super) state: watch::Receiver<Arc<State>>,
    pub(super) beginning: Arc<State>,
}

impl Directory {
    pub(super) fn voter(&self, id: u64) -> Option<NodeSpec> {
        let committed = voter_spec(&self.state.borrow(), id).cloned();
        committed.or_else(|| voter_spec(&self.beginning, id).cloned())
    }
}

/// The node that a voter's number belongs to.
pub(super) fn voter_spec(state: &State, id: u64) -> Option<&NodeSpec> {
    let voter = state.voters().find(|(voter, _)| *voter == VoterId(id))?.1;
    state.node_by_id(voter.node).map(|node| &node.spec)
}

/// Where the members that vote are reached.
pub(super) fn addresses(state: &State) -> Vec<String> {
    let voters = state.nodes().filter(|node| {
        node.spec.role.votes() && node.state != NodeState::Removed && !node.spec.address.is_empty()
    });
    voters.map(|node| node.spec.address.clone()).collect()
}
