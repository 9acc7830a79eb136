//! What one coordinator knows of the cluster: who should be there, and who is.
//!
//! The membership and the placement come from what the cluster has committed; whether a node is
//! live comes from the link to it. A node counts as live only after it has said the same about
//! itself as the view does ([`ClusterView::node_up`]), so that no row leaves for a node of another
//! model, kernel class, region or epoch.
//!
//! The view permits only nodes of the **home** region: a border is never crossed by default.

use std::collections::BTreeMap;
use std::sync::Arc;

use entente_proto::ids::{
    Fence, Incarnation, KernelClass, MembershipEpoch, ModelDigest, NodeId, NodeName,
    PlacementEpoch, Region, RegionSet,
};
use entente_proto::link::NodeInfo;
use entente_proto::placement::{ExpertKey, Placement};

/// An expert node as the view knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeView {
    /// The node's name.
    pub name: NodeName,
    /// The country that it stands in.
    pub region: Region,
    /// Which start of the node is reachable now; absent while the link is down.
    pub live: Option<Incarnation>,
}

/// The cluster, seen from one coordinator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClusterView {
    /// The coordinator's own region, the only one whose nodes it uses.
    pub home: Region,
    /// Epoch of the membership that `nodes` reflects.
    pub membership_epoch: MembershipEpoch,
    /// Epoch of `placement`.
    pub placement_epoch: PlacementEpoch,
    /// The model that all must hold.
    pub model_digest: ModelDigest,
    /// The kernels that all must compute with: replicas of another class give other bits.
    pub kernel_class: KernelClass,
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
    /// Takes note that a node is reachable and is what it should be. It stays as it was otherwise.
    pub fn node_up(&mut self, id: NodeId, info: &NodeInfo) -> Result<(), Mismatch> {
        let node = self.nodes.get(&id).ok_or(Mismatch::NotAMember(id))?;
        let same = |what, have: String, want: String| {
            if have == want {
                return Ok(());
            }
            Err(Mismatch::Differs { name: node.name.clone(), what, have, want })
        };
        let fence = &info.fence;
        same("name", info.name.to_string(), node.name.to_string())?;
        same("region", info.region.to_string(), node.region.to_string())?;
        same("model digest", fence.model_digest.to_string(), self.model_digest.to_string())?;
        same("kernel class", info.kernel_class.to_string(), self.kernel_class.to_string())?;
        let (have, want) = (fence.membership_epoch, self.membership_epoch);
        same("membership epoch", have.to_string(), want.to_string())?;
        let (have, want) = (fence.placement_epoch, self.placement_epoch);
        same("placement epoch", have.to_string(), want.to_string())?;

        let lacking = self.placement.experts_of(id).difference(&info.experts).count();
        if lacking > 0 {
            let (name, held) = (node.name.clone(), info.experts.len());
            return Err(Mismatch::Lacks { name, held, lacking });
        }
        if let Some(node) = self.nodes.get_mut(&id) {
            node.live = Some(info.fence.incarnation);
        }
        Ok(())
    }

    /// Takes note that a node cannot be reached.
    pub fn node_down(&mut self, id: NodeId) {
        if let Some(node) = self.nodes.get_mut(&id) {
            node.live = None;
        }
    }

    /// What a frame to the node must carry; absent while the node is not live.
    pub fn fence(&self, id: NodeId) -> Option<Fence> {
        let incarnation = self.nodes.get(&id)?.live?;
        Some(Fence {
            membership_epoch: self.membership_epoch,
            placement_epoch: self.placement_epoch,
            incarnation,
            model_digest: self.model_digest,
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
                node.live.is_some() && node.region == self.home && policy.contains(&node.region)
            })
        })
    }

    /// The first expert that no live node holds which may see rows of this policy. While there is
    /// none, every exchange under the policy can be served.
    pub fn missing(&self, policy: &RegionSet) -> Option<ExpertKey> {
        self.placement
            .iter()
            .map(|(expert, _)| expert)
            .find(|expert| self.replicas(*expert, policy).next().is_none())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use entente_proto::ids::{ExpertId, LayerId};

    const EXPERT: ExpertKey = (LayerId(0), ExpertId(0));

    fn region(code: &str) -> Region {
        code.parse().unwrap()
    }

    /// One expert with a replica on node 0 in fr and one on node 1 in se, seen from fr.
    fn view() -> ClusterView {
        let mut placement = Placement::new();
        let mut nodes = BTreeMap::new();
        for (id, code) in [(0, "fr"), (1, "se")] {
            placement.add(EXPERT, NodeId(id));
            let name = format!("{code}-expert-1").parse().unwrap();
            nodes.insert(NodeId(id), NodeView { name, region: region(code), live: None });
        }
        ClusterView {
            home: region("fr"),
            membership_epoch: MembershipEpoch(1),
            placement_epoch: PlacementEpoch(1),
            model_digest: ModelDigest([1; 32]),
            kernel_class: KernelClass("f32/test/1".to_owned()),
            nodes,
            placement: Arc::new(placement),
        }
    }

    fn info(view: &ClusterView, id: NodeId) -> NodeInfo {
        NodeInfo {
            name: view.nodes[&id].name.clone(),
            region: view.nodes[&id].region,
            fence: Fence {
                membership_epoch: view.membership_epoch,
                placement_epoch: view.placement_epoch,
                incarnation: Incarnation(5),
                model_digest: view.model_digest,
            },
            kernel_class: view.kernel_class.clone(),
            experts: view.placement.experts_of(id),
            weights_bytes: 0,
        }
    }

    #[test]
    fn a_node_is_live_only_if_it_is_what_the_view_expects() {
        type Spoil = fn(&mut NodeInfo);
        let cases: [(&str, Spoil); 7] = [
            ("name", |i| i.name = "se-expert-1".parse().unwrap()),
            ("region", |i| i.region = "se".parse().unwrap()),
            ("model digest", |i| i.fence.model_digest = ModelDigest([2; 32])),
            ("kernel class", |i| i.kernel_class = KernelClass("bf16/test/1".to_owned())),
            ("membership epoch", |i| i.fence.membership_epoch = MembershipEpoch(2)),
            ("placement epoch", |i| i.fence.placement_epoch = PlacementEpoch(0)),
            ("lacks", |i| i.experts.clear()),
        ];
        for (what, spoil) in cases {
            let mut view = view();
            let mut info = info(&view, NodeId(0));
            spoil(&mut info);
            let error = view.node_up(NodeId(0), &info).unwrap_err().to_string();
            assert!(error.contains(what), "{error} does not name {what}");
            assert_eq!(view.fence(NodeId(0)), None);
        }
    }

    #[test]
    fn only_live_nodes_of_the_home_region_serve_and_only_where_the_policy_allows_it() {
        let mut view = view();
        let both: RegionSet = [region("fr"), region("se")].into();
        let abroad: RegionSet = [region("se")].into();
        for id in [NodeId(0), NodeId(1)] {
            let info = info(&view, id);
            view.node_up(id, &info).unwrap();
        }
        assert_eq!(view.replicas(EXPERT, &both).collect::<Vec<_>>(), [NodeId(0)]);
        assert_eq!((view.missing(&both), view.missing(&abroad)), (None, Some(EXPERT)));
        view.node_down(NodeId(0));
        assert_eq!(view.missing(&both), Some(EXPERT));
    }
}
