//! Placements of small clusters by hand, and of random ones against what must always hold.

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
