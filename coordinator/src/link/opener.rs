//! Opens the link to one node: which transport carries it, where it is dialled, and whose
//! certificate is expected there. What is known of the node comes from the committed state.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use entente_expert_node::inproc::InprocLink;
use entente_expert_node::{Nccl, NodeHandle};
use entente_membership::net::Via;
use entente_membership::roster::Roster;
use entente_membership::state::Node;
use entente_proto::identity::Role;
use entente_proto::ids::NodeId;
use entente_tls::{ALPN_GRPC, ALPN_NCCL, ALPN_STREAM, Credentials};
use tokio::runtime::Handle;

use super::grpc::GrpcLink;
use super::nccl::{ByNccl, NcclMetrics};
use super::{Links, Peer};
use crate::Error;
use crate::config::Transport;

/// See the module.
#[derive(Clone)]
pub struct Opener {
    /// How nodes of other processes are reached.
    pub transport: Transport,
    /// Whose certificates are expected.
    pub roster: Roster,
    /// Where nodes are dialled, if not where the cluster says that they are.
    pub via: Via,
    /// What this process shows; without it nothing but loopback is dialled.
    pub credentials: Option<Credentials>,
    /// The nodes of this process.
    pub local: BTreeMap<NodeId, NodeHandle>,
    /// Where links over gRPC run.
    pub runtime: Handle,
    /// What rows may travel by besides the network, and what is counted of that.
    pub nccl: Option<(Nccl, NcclMetrics)>,
}

impl Opener {
    /// Opens a link to the node, in place of the one that there was.
    ///
    /// # Errors
    /// When the node may not be reached in plain text, or the system refuses a thread.
    pub fn open(&self, node: &Node, links: &mut Links) -> Result<(), Error> {
        let id = node.id;
        if let Some(local) = self.local.get(&id).cloned() {
            links.add(id, |mailbox| Box::new(InprocLink::open(id, local, mailbox)));
        } else if self.transport == Transport::Grpc {
            let peer = self.peer(node, ALPN_GRPC)?;
            links.add(id, |mailbox| Box::new(GrpcLink::open(peer, mailbox, &self.runtime)));
        } else {
            let peer = self.peer(node, ALPN_STREAM)?;
            let by_nccl = self.by_nccl(node)?;
            links.dial_by(peer, by_nccl).map_err(|error| Error::Start(error.to_string()))?;
        }
        Ok(())
    }

    /// NCCL is for those who have shown certificates of one region, as nothing that it carries is
    /// encrypted. Which site they stand at they tell each other.
    fn by_nccl(&self, node: &Node) -> Result<Option<ByNccl>, Error> {
        let (Some((nccl, metrics)), Some(own)) = (&self.nccl, &self.credentials) else {
            return Ok(None);
        };
        let tls = self.peer(node, ALPN_NCCL)?.tls;
        let tls = tls.filter(|_| own.identity().region == node.spec.region);
        Ok(tls.map(|tls| ByNccl { nccl: nccl.clone(), tls, metrics: metrics.clone() }))
    }

    /// Whether nodes are processes that have a key to sign with.
    pub(crate) fn can_hear_statements(&self) -> bool {
        self.credentials.is_some() && self.transport != Transport::Inproc
    }

    /// Whom to call over gRPC, whatever carries frames.
    ///
    /// # Errors
    /// As [`Opener::open`].
    pub(crate) fn grpc_peer(&self, node: &Node) -> Result<Peer, Error> {
        self.peer(node, ALPN_GRPC)
    }

    /// Whom to dial, and whose certificate to expect there.
    fn peer(&self, node: &Node, alpn: &[u8]) -> Result<Peer, Error> {
        let spec = &node.spec;
        let member = Some((spec.region, spec.name.clone()));
        let tls = match &self.credentials {
            Some(own) => Some(own.client(self.roster.expect(Role::Expert, member), &[alpn])?),
            None if is_loopback(&spec.address) => None,
            None => {
                return Err(Error::Config(format!(
                    "cluster.nodes: {} of {} is not a loopback address, so the section [tls] is \
                     needed",
                    spec.address, spec.name
                )));
            }
        };
        Ok(Peer {
            node: node.id,
            name: spec.name.clone(),
            address: self.via.resolve(&spec.address).to_owned(),
            tls,
        })
    }
}

fn is_loopback(address: &str) -> bool {
    address.parse().is_ok_and(|address: SocketAddr| address.ip().is_loopback())
}
