//! Which node holds which expert, and what a planner needs to know to decide it.
//!
//! A [`Placement`] is data that travels: computed by the router's planner, committed by the
//! membership, obeyed by expert nodes and read by coordinators. It knows nothing of regions,
//! liveness or epochs; whoever carries it says under which epoch it holds.

use std::collections::{BTreeMap, BTreeSet};

use crate::ids::{ExpertId, LayerId, NodeId, Region};

/// One expert of one layer.
pub type ExpertKey = (LayerId, ExpertId);

/// The map from each (layer, expert) to the nodes that hold a replica of it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Placement {
    replicas: BTreeMap<ExpertKey, BTreeSet<NodeId>>,
}

impl Placement {
    /// A placement without any replica.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a replica. Returns whether it is new.
    pub fn add(&mut self, expert: ExpertKey, node: NodeId) -> bool {
        self.replicas.entry(expert).or_default().insert(node)
    }

    /// Takes a replica away. Returns whether it was there.
    pub fn remove(&mut self, expert: ExpertKey, node: NodeId) -> bool {
        let Some(nodes) = self.replicas.get_mut(&expert) else { return false };
        let was_there = nodes.remove(&node);
        if nodes.is_empty() {
            self.replicas.remove(&expert);
        }
        was_there
    }

    /// The nodes that hold the expert, in ascending order.
    pub fn replicas(&self, expert: ExpertKey) -> impl Iterator<Item = NodeId> + '_ {
        self.replicas.get(&expert).into_iter().flatten().copied()
    }

    /// Every expert with its nodes, in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = (ExpertKey, &BTreeSet<NodeId>)> {
        self.replicas.iter().map(|(expert, nodes)| (*expert, nodes))
    }

    /// The experts that the node holds.
    pub fn experts_of(&self, node: NodeId) -> BTreeSet<ExpertKey> {
        self.iter().filter(|(_, nodes)| nodes.contains(&node)).map(|(expert, _)| expert).collect()
    }

    /// Every node that holds anything.
    pub fn nodes(&self) -> BTreeSet<NodeId> {
        self.replicas.values().flatten().copied().collect()
    }
}

/// An expert node as the planner sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlacementNode {
    /// The node.
    pub id: NodeId,
    /// The country that it stands in.
    pub region: Region,
    /// Bytes that expert weights may take there; not limited when absent.
    pub memory_bytes: Option<u64>,
}

/// A model as the planner sees it: how many experts there are to place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelShape {
    /// The layers that have experts, with their number.
    pub layers: Vec<(LayerId, u16)>,
    /// Bytes of weights of one expert.
    pub expert_bytes: u64,
}

impl ModelShape {
    /// Every expert of the model, in ascending order if the layers are.
    pub fn experts(&self) -> impl Iterator<Item = ExpertKey> + '_ {
        self.layers
            .iter()
            .flat_map(|(layer, experts)| (0..*experts).map(|expert| (*layer, ExpertId(expert))))
    }

    /// How many experts there are in all layers together.
    pub fn expert_count(&self) -> u64 {
        self.layers.iter().map(|(_, experts)| u64::from(*experts)).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replica_taken_away_leaves_no_empty_entry() {
        let expert = (LayerId(1), ExpertId(2));
        let mut placement = Placement::new();
        assert!(placement.add(expert, NodeId(7)));
        assert!(!placement.add(expert, NodeId(7)));
        assert_eq!(placement.experts_of(NodeId(7)), [expert].into());
        assert!(placement.remove(expert, NodeId(7)));
        assert!(!placement.remove(expert, NodeId(7)));
        assert_eq!(placement, Placement::new());
    }
}
