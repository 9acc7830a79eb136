//! Which node holds which expert: a pure function of the nodes, the model and the replicas wanted,
//! so that every process that is given the same cluster computes the same placement.
//!
//! Each region gets a **complete** set of experts, `replicas` copies of each on as many different
//! nodes of that region: a request must never depend on another country. Within a region the
//! experts of every layer are spread evenly over the nodes, as far as their memory allows. What
//! does not fit is refused with the arithmetic.
//!
//! It does not know how often an expert is chosen; balancing by load builds on this later.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use entente_proto::ids::{NodeId, Region};
use entente_proto::placement::ExpertKey;
pub use entente_proto::placement::{ModelShape, Placement, PlacementNode};

/// Why experts cannot be placed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlacementRefused {
    /// No copies were asked for.
    #[error("replicas is 0; each expert needs at least 1 replica")]
    NoReplicas,
    /// Replicas of one expert would have to share a node.
    #[error("region {region}: {replicas} replicas need {replicas} nodes, it has {nodes}")]
    TooFewNodes {
        /// The region.
        region: Region,
        /// Replicas wanted of each expert.
        replicas: u16,
        /// Expert nodes of the region.
        nodes: usize,
    },
    /// The nodes of a region are too small.
    #[error(
        "region {region}: {replicas} x {experts} experts of {expert_bytes} bytes need {} bytes; \
         its {nodes} nodes have room for {room} experts ({} bytes)",
        bytes(u64::from(*.replicas) * .experts, *.expert_bytes),
        bytes(*.room, *.expert_bytes)
    )]
    TooLittleMemory {
        /// The region.
        region: Region,
        /// Replicas wanted of each expert.
        replicas: u16,
        /// Experts of the model.
        experts: u64,
        /// Bytes of one expert.
        expert_bytes: u64,
        /// Expert nodes of the region.
        nodes: usize,
        /// Replicas that fit into them, no node holding an expert twice.
        room: u64,
    },
}

fn bytes(experts: u64, expert_bytes: u64) -> u128 {
    u128::from(experts) * u128::from(expert_bytes)
}

/// Places `replicas` copies of every expert in every region that has nodes.
///
/// Deterministic; the order of `nodes` does not matter. Without memory limits no node of a region
/// holds two experts more than another.
pub fn plan(
    nodes: &[PlacementNode],
    shape: &ModelShape,
    replicas: u16,
) -> Result<Placement, PlacementRefused> {
    if replicas == 0 {
        return Err(PlacementRefused::NoReplicas);
    }
    let mut regions: BTreeMap<Region, Vec<&PlacementNode>> = BTreeMap::new();
    for node in nodes {
        regions.entry(node.region).or_default().push(node);
    }
    let mut placement = Placement::new();
    for (region, nodes) in regions {
        let mut spread = Spread::new(shares(region, &nodes, shape, replicas)?);
        for expert in shape.experts() {
            spread.place(expert, replicas, &mut placement);
        }
    }
    Ok(placement)
}

/// How many replicas each node of a region gets: as even as memory allows.
///
/// Water-filling: the nodes with least room take what they can of an equal share, the others
/// divide the rest. No share exceeds the number of experts, and all add up to `replicas x experts`;
/// that is what makes [`Spread::place`] always find enough different nodes.
fn shares(
    region: Region,
    nodes: &[&PlacementNode],
    shape: &ModelShape,
    replicas: u16,
) -> Result<Vec<(NodeId, u64)>, PlacementRefused> {
    if nodes.len() < usize::from(replicas) {
        return Err(PlacementRefused::TooFewNodes { region, replicas, nodes: nodes.len() });
    }
    let experts = shape.expert_count();
    let room_of = |node: &PlacementNode| {
        let fits = node.memory_bytes.map(|bytes| bytes / shape.expert_bytes.max(1));
        fits.unwrap_or(experts).min(experts)
    };
    let mut rooms: Vec<(u64, NodeId)> = nodes.iter().map(|n| (room_of(n), n.id)).collect();
    rooms.sort_unstable();
    let room: u64 = rooms.iter().map(|(room, _)| room).sum();
    let mut left = u64::from(replicas) * experts;
    if room < left {
        let (expert_bytes, nodes) = (shape.expert_bytes, nodes.len());
        return Err(PlacementRefused::TooLittleMemory {
            region,
            replicas,
            experts,
            expert_bytes,
            nodes,
            room,
        });
    }
    let count = rooms.len() as u64;
    let mut shares = Vec::with_capacity(rooms.len());
    for (i, (room, node)) in rooms.into_iter().enumerate() {
        let share = (left / (count - i as u64)).min(room);
        left -= share;
        shares.push((node, share));
    }
    Ok(shares)
}

/// Deals the experts of the model out to the nodes of one region.
struct Spread {
    /// Each node with the replicas that it will still get.
    left: Vec<(NodeId, u64)>,
    /// How many experts the nodes `i` and `j` share, at `i * nodes + j`.
    shared: Vec<u32>,
}

impl Spread {
    fn new(mut shares: Vec<(NodeId, u64)>) -> Self {
        shares.sort_unstable();
        Self { shared: vec![0; shares.len() * shares.len()], left: shares }
    }

    /// Puts one expert on the nodes with most replicas left to get; that order always works out.
    /// Of equal ones it takes those that share least with the nodes taken already, so that the
    /// load of a lost node falls on many others and not on one twin.
    fn place(&mut self, expert: ExpertKey, replicas: u16, placement: &mut Placement) {
        let count = self.left.len();
        let mut taken: Vec<usize> = Vec::with_capacity(replicas.into());
        for _ in 0..replicas {
            let shared = |i: usize| taken.iter().map(|j| self.shared[i * count + j]).sum::<u32>();
            let best = (0..count)
                .filter(|i| !taken.contains(i))
                .min_by_key(|i| (Reverse(self.left[*i].1), shared(*i)))
                .expect("a region has at least as many nodes as replicas");
            for other in &taken {
                self.shared[best * count + other] += 1;
                self.shared[other * count + best] += 1;
            }
            let (node, left) = &mut self.left[best];
            *left -= 1;
            placement.add(expert, *node);
            taken.push(best);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use entente_proto::ids::{ExpertId, LayerId};

    fn nodes(code: &str, ids: std::ops::Range<u32>, memory: Option<u64>) -> Vec<PlacementNode> {
        let region = code.parse().unwrap();
        ids.map(|id| PlacementNode { id: NodeId(id), region, memory_bytes: memory }).collect()
    }

    fn mixtral() -> ModelShape {
        ModelShape { layers: (0..4).map(|l| (LayerId(l), 8)).collect(), expert_bytes: 100 }
    }

    #[test]
    fn each_region_gets_a_complete_and_even_set_whatever_its_size() {
        let shape = mixtral();
        for (fr, se, replicas) in [(1, 1, 1), (2, 2, 1), (4, 2, 2), (3, 5, 3), (7, 2, 2)] {
            let all = [nodes("fr", 0..fr, None), nodes("se", 100..100 + se, None)].concat();
            let placement = plan(&all, &shape, replicas).unwrap();
            for ids in [0..fr, 100..100 + se] {
                let here = |id: &NodeId| ids.contains(&id.0);
                for expert in shape.experts() {
                    let copies = placement.replicas(expert).filter(here).count();
                    assert_eq!(copies, usize::from(replicas), "{expert:?} of {ids:?}");
                }
                let held = ids.clone().map(|id| placement.experts_of(NodeId(id)).len());
                let (min, max) = (held.clone().min().unwrap(), held.max().unwrap());
                assert!(max - min <= 1, "{ids:?} hold from {min} to {max}");
            }
        }
    }

    #[test]
    fn the_order_of_the_nodes_does_not_matter() {
        let forward = nodes("fr", 0..5, None);
        let backward: Vec<_> = forward.iter().rev().cloned().collect();
        assert_eq!(plan(&forward, &mixtral(), 2), plan(&backward, &mixtral(), 2));
    }

    #[test]
    fn a_lost_node_leaves_its_load_to_all_others() {
        let placement = plan(&nodes("fr", 0..4, None), &mixtral(), 2).unwrap();
        for lost in 0..4 {
            let experts = placement.experts_of(NodeId(lost));
            let heirs = experts.iter().flat_map(|e| placement.replicas(*e)).collect::<Vec<_>>();
            for other in (0..4).filter(|id| *id != lost) {
                let inherits = heirs.iter().filter(|id| id.0 == other).count();
                assert!((4..=7).contains(&inherits), "{other} inherits {inherits} from {lost}");
            }
        }
    }

    #[test]
    fn small_nodes_get_what_fits_and_the_large_one_gets_the_rest() {
        let mut all = nodes("fr", 0..3, Some(850));
        all[1].memory_bytes = None;
        // 32 experts twice: nodes 0 and 2 take 8 each, node 1 would need 48, more than there are.
        assert!(plan(&all, &mixtral(), 2).is_err());
        let placement = plan(&all, &mixtral(), 1).unwrap();
        let held = [0, 1, 2].map(|id| placement.experts_of(NodeId(id)).len());
        assert_eq!(held, [8, 16, 8]);
    }

    #[test]
    fn what_does_not_fit_is_refused_with_the_arithmetic() {
        let refused = |nodes: &[PlacementNode], replicas| {
            plan(nodes, &mixtral(), replicas).unwrap_err().to_string()
        };
        assert_eq!(
            refused(&nodes("fr", 0..2, Some(1_000)), 1),
            "region fr: 1 x 32 experts of 100 bytes need 3200 bytes; \
             its 2 nodes have room for 20 experts (2000 bytes)"
        );
        assert_eq!(
            refused(&nodes("se", 0..1, None), 2),
            "region se: 2 replicas need 2 nodes, it has 1"
        );
        assert!(refused(&nodes("se", 0..1, None), 0).contains("replicas is 0"));
    }

    #[test]
    fn experts_are_placed_by_layer_and_number() {
        let placement = plan(&nodes("fr", 0..2, None), &mixtral(), 1).unwrap();
        let first: Vec<_> = placement.replicas((LayerId(3), ExpertId(7))).collect();
        assert_eq!(first.len(), 1);
        assert_eq!(placement.replicas((LayerId(4), ExpertId(0))).count(), 0);
    }
}
