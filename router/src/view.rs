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
//! leaves for a node of another model, weight format or region. Kernel classes may differ: processors
//! and devices serve side by side. As they give other bits, the view puts them in one order, in which
//! every exchange prefers them (`docs/decisions/0019`). Its epochs need not be the view's:
//! commits reach processes at different moments, and the node itself refuses a frame that is too old.
//!
//! The view permits only nodes of the **home** region: a border is never crossed by default.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use entente_proto::ids::{
    ExpertId, Fence, Incarnation, KERNEL_CLASS_LEN_MAX, KernelClass, LayerId, MembershipEpoch,
    ModelDigest, NodeId, NodeName, PlacementEpoch, Region, RegionSet,
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
    /// The kernels that it registered with; empty where it has not told.
    pub kernel_class: KernelClass,
}

/// An expert node as the view knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeView {
    /// What the cluster has agreed on.
    pub member: Member,
    /// The start of the node that the link leads to; absent while the link is down.
    pub linked: Option<Incarnation>,
    /// The kernels that compute its rows, as was committed or as it said last; empty while neither.
    pub kernel_class: KernelClass,
    /// Where its kernel class stands in the order in which classes are preferred, 0 first; nodes of
    /// one class have one rank. Follows from the classes that there are.
    pub rank: u16,
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
    /// The kernels that the coordinator computes with. Nodes keep weights in the same format.
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
        let known = |(id, member): (NodeId, Member)| {
            let before = before.remove(&id);
            let (linked, said) =
                before.map_or_else(Default::default, |n| (n.linked, n.kernel_class));
            let told = member.kernel_class.clone();
            let kernel_class = if told == KernelClass::default() { said } else { told };
            (id, NodeView { member, linked, kernel_class, rank: 0 })
        };
        self.nodes = members.into_iter().map(known).collect();
        self.rank_classes();
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
        let formats = [&info.kernel_class, &self.model.kernel_class].map(KernelClass::format);
        same("weight format", formats[0].to_owned(), formats[1].to_owned())?;
        if info.kernel_class.0.len() > KERNEL_CLASS_LEN_MAX {
            let have = format!("{} bytes", info.kernel_class.0.len());
            return same("kernel class", have, format!("at most {KERNEL_CLASS_LEN_MAX}"));
        }
        // Where starts are minted, whoever minted this one has seen to what the node holds, and
        // what is placed on it may have changed since. Elsewhere nobody else looks.
        let lacking = self.placement.experts_of(id).difference(&info.experts).count();
        if member.incarnation.is_none() && lacking > 0 {
            let (name, held) = (member.name.clone(), info.experts.len());
            return Err(Mismatch::Lacks { name, held, lacking });
        }
        if let Some(node) = self.nodes.get_mut(&id) {
            node.linked = Some(info.fence.incarnation);
            if node.kernel_class != info.kernel_class {
                node.kernel_class = info.kernel_class.clone();
                self.rank_classes();
            }
        }
        Ok(())
    }

    /// Puts the classes of the home region in order: devices first, as they are there to be used;
    /// then the coordinator's own, and the others by name. All coordinators with one kernel class
    /// come to the same order, and nothing that nodes do or links see changes it.
    fn rank_classes(&mut self) {
        let (home, own) = (self.home, self.model.kernel_class.clone());
        let preference =
            |class: &KernelClass| (!class.is_of_device(), *class != own, class.clone());
        let told = |node: &&NodeView| {
            node.member.region == home && node.kernel_class != KernelClass::default()
        };
        let classes: BTreeSet<_> =
            self.nodes.values().filter(told).map(|node| preference(&node.kernel_class)).collect();
        for node in self.nodes.values_mut() {
            let class = preference(&node.kernel_class);
            let before = classes.iter().position(|other| *other == class);
            node.rank = before.and_then(|rank| u16::try_from(rank).ok()).unwrap_or(u16::MAX);
        }
    }

    /// Where the node's kernel class stands, see [`NodeView::rank`].
    pub fn rank(&self, id: NodeId) -> u16 {
        self.nodes.get(&id).map_or(u16::MAX, |node| node.rank)
    }

    /// The rank of the first class that an expert is placed with on nodes that may see rows of this
    /// policy, live or not: whose replicas compute it as long as there is one.
    pub fn first_rank(&self, expert: ExpertKey, policy: &RegionSet) -> u16 {
        let permitted = |node: &&NodeView| {
            node.member.region == self.home && policy.contains(&node.member.region)
        };
        let placed = self.placement.replicas(expert).filter_map(|id| self.nodes.get(&id));
        placed.filter(permitted).map(|node| node.rank).min().unwrap_or(u16::MAX)
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
