//! What one coordinator knows of the cluster: who should be there, and who is.
//!
//! Two things change it. What the cluster has committed comes in by [`ClusterView::follow`]: who
//! takes traffic, as which start, and where experts are placed. What a link sees comes in by
//! [`ClusterView::node_up`] and [`ClusterView::node_down`]. They come in any order, so the view
//! keeps both and a node is **live** only where they agree:
//!
//! > the link is up ∧ the committed state takes traffic ∧ both speak of the same incarnation
//!
//! A node is taken up only after it has said the same about itself as the view does, so that no row
//! leaves for a node of another model, kernel class or region. Its epochs need not be the view's:
//! commits reach processes at different moments, and the node itself refuses a frame that is too old.
//!
//! The view permits only nodes of the **home** region: a border is never crossed by default.

use std::collections::BTreeMap;
use std::sync::Arc;

use entente_proto::ids::{
    ExpertId, Fence, Incarnation, KernelClass, LayerId, MembershipEpoch, ModelDigest, NodeId,
    NodeName, PlacementEpoch, Region, RegionSet,
};
use entente_proto::link::NodeInfo;
use entente_proto::placement::{ExpertKey, Placement};

/// What the cluster has agreed on, as far as a coordinator needs it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Committed {
    /// Epoch of `members`.
    pub membership_epoch: MembershipEpoch,
    /// Epoch of `placement`.
    pub placement_epoch: PlacementEpoch,
    /// The expert nodes of the cluster.
    pub members: BTreeMap<NodeId, Member>,
    /// Which node holds which expert.
    pub placement: Arc<Placement>,
}

/// An expert node as the cluster has agreed on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// The node's name.
    pub name: NodeName,
    /// The country that it stands in.
    pub region: Region,
    /// Whether it takes traffic.
    pub serves: bool,
    /// Which start of the node takes it. Absent where the cluster mints none: then any does.
    pub incarnation: Option<Incarnation>,
}

/// An expert node as the view knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeView {
    /// What the cluster has agreed on.
    pub member: Member,
    /// The start of the node that the link leads to; absent while the link is down.
    pub linked: Option<Incarnation>,
}

impl NodeView {
    /// Which start of the node may be sent rows now.
    pub fn live(&self) -> Option<Incarnation> {
        let agreed = |linked: &Incarnation| self.member.incarnation.is_none_or(|i| i == *linked);
        self.linked.filter(|linked| self.member.serves && agreed(linked))
    }
}

/// What all must be alike in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Model {
    /// The model that all must hold.
    pub digest: ModelDigest,
    /// The kernels that all must compute with: replicas of another class give other bits.
    pub kernel_class: KernelClass,
    /// The layers that have experts, with their number.
    pub layers: BTreeMap<LayerId, u16>,
}

/// The cluster, seen from one coordinator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClusterView {
    /// The coordinator's own region, the only one whose nodes it uses.
    pub home: Region,
    /// The model that the coordinator serves.
    pub model: Model,
    /// Epoch of the membership that `nodes` reflects.
    pub membership_epoch: MembershipEpoch,
    /// Epoch of `placement`.
    pub placement_epoch: PlacementEpoch,
    /// The expert nodes of the cluster.
    pub nodes: BTreeMap<NodeId, NodeView>,
    /// Which node holds which expert.
    pub placement: Arc<Placement>,
}

/// Why a node that answered is not the node that the view expects.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Mismatch {
    /// The membership has no such node.
    #[error("node {0} is not a member")]
    NotAMember(NodeId),
    /// Node and view differ in one thing.
    #[error("node {name}: {what} is {have}, expected {want}")]
    Differs {
        /// The expected node.
        name: NodeName,
        /// What differs.
        what: &'static str,
        /// What the node says.
        have: String,
        /// What the view says.
        want: String,
    },
    /// The node does not hold all the experts that are placed on it.
    #[error("node {name} holds {held} experts, but lacks {lacking} of those placed on it")]
    Lacks {
        /// The node.
        name: NodeName,
        /// Experts that it holds.
        held: usize,
        /// Placed experts that it does not hold.
        lacking: usize,
    },
}

impl ClusterView {
    /// What is known before any link is up.
    pub fn new(home: Region, model: Model, committed: Committed) -> Self {
        let mut view = Self {
            home,
            model,
            membership_epoch: MembershipEpoch::default(),
            placement_epoch: PlacementEpoch::default(),
            nodes: BTreeMap::new(),
            placement: Arc::default(),
        };
        view.follow(committed);
        view
    }

    /// Takes what the cluster has committed. What links have seen stays as it is, so a node comes
    /// to life by the commit alone if its link was there first. Returns whether anything changed;
    /// epochs never fall, so what has a lower one is old and changes nothing.
    pub fn follow(&mut self, committed: Committed) -> bool {
        let Committed { membership_epoch, placement_epoch, members, placement } = committed;
        let (ours, theirs) =
            ((self.membership_epoch, self.placement_epoch), (membership_epoch, placement_epoch));
        if ours == theirs || theirs.0 < ours.0 || theirs.1 < ours.1 {
            return false;
        }
        let mut before = std::mem::take(&mut self.nodes);
        let known = |(id, member)| {
            let linked = before.remove(&id).and_then(|node: NodeView| node.linked);
            (id, NodeView { member, linked })
        };
        self.nodes = members.into_iter().map(known).collect();
        (self.membership_epoch, self.placement_epoch) = theirs;
        self.placement = placement;
        true
    }

    /// Takes note that a link leads to the node and that it is what it should be. The view stays as
    /// it was otherwise. Whether the node is used is another question: see [`NodeView::live`].
    pub fn node_up(&mut self, id: NodeId, info: &NodeInfo) -> Result<(), Mismatch> {
        let member = &self.nodes.get(&id).ok_or(Mismatch::NotAMember(id))?.member;
        let same = |what, have: String, want: String| {
            if have == want {
                return Ok(());
            }
            Err(Mismatch::Differs { name: member.name.clone(), what, have, want })
        };
        let fence = &info.fence;
        same("name", info.name.to_string(), member.name.to_string())?;
        same("region", info.region.to_string(), member.region.to_string())?;
        same("model digest", fence.model_digest.to_string(), self.model.digest.to_string())?;
        same("kernel class", info.kernel_class.to_string(), self.model.kernel_class.to_string())?;
        // Where starts are minted, whoever minted this one has seen to what the node holds, and
        // what is placed on it may have changed since. Elsewhere nobody else looks.
        let lacking = self.placement.experts_of(id).difference(&info.experts).count();
        if member.incarnation.is_none() && lacking > 0 {
            let (name, held) = (member.name.clone(), info.experts.len());
            return Err(Mismatch::Lacks { name, held, lacking });
        }
        if let Some(node) = self.nodes.get_mut(&id) {
            node.linked = Some(info.fence.incarnation);
        }
        Ok(())
    }

    /// Takes note that no link leads to the node.
    pub fn node_down(&mut self, id: NodeId) {
        if let Some(node) = self.nodes.get_mut(&id) {
            node.linked = None;
        }
    }

    /// What a frame to the node must carry, with the view's own epochs; absent while the node is
    /// not live.
    pub fn fence(&self, id: NodeId) -> Option<Fence> {
        let incarnation = self.nodes.get(&id)?.live()?;
        Some(Fence {
            membership_epoch: self.membership_epoch,
            placement_epoch: self.placement_epoch,
            incarnation,
            model_digest: self.model.digest,
        })
    }

    /// The live nodes that hold the expert and may see rows of this policy, in ascending order.
    pub fn replicas<'a>(
        &'a self,
        expert: ExpertKey,
        policy: &'a RegionSet,
    ) -> impl Iterator<Item = NodeId> + 'a {
        self.placement.replicas(expert).filter(|id| {
            self.nodes.get(id).is_some_and(|node| {
                let region = node.member.region;
                node.live().is_some() && region == self.home && policy.contains(&region)
            })
        })
    }

    /// The first expert of the model that no live node holds which may see rows of this policy: it
    /// is not placed yet, or nobody is there who has it. While there is none, every exchange under the policy can be served.
    pub fn missing(&self, policy: &RegionSet) -> Option<ExpertKey> {
        let layers = self.model.layers.iter();
        let mut experts = layers
            .flat_map(|(layer, experts)| (0..*experts).map(|expert| (*layer, ExpertId(expert))));
        experts.find(|expert| self.replicas(*expert, policy).next().is_none())
    }
}

#[cfg(test)]
mod tests;
