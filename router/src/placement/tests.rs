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

/// A random cluster of one region with sites, and loads that differ widely.
fn random_hosts(random: &mut entente_sim::Random, shape: &ModelShape) -> (Vec<Host>, Loads) {
    let count = 3 + random.place(5) as u32;
    let room = 2 * shape.expert_count() / u64::from(count) + 2 + random.place(8) as u64;
    let hosts = nodes("fr", 0..count, Some(room * shape.expert_bytes));
    let site = |mut host: Host| {
        host.site = Some(format!("site-{}", host.id.0 % 2));
        host
    };
    let hosts = hosts.iter().map(Host::from).map(site).collect();
    let loads = shape.experts().map(|expert| (expert, random.place(1_000) as u64)).collect();
    (hosts, loads)
}

fn hold(hosts: &mut [Host], placement: &Placement) {
    for host in hosts {
        host.held = placement.experts_of(host.id);
    }
}

#[test]
fn random_clusters_get_all_replicas_within_memory_and_what_is_planned_stays() {
    let (shape, round_trips) = (mixtral(), RoundTrips::default());
    let serving = ["fr".parse().unwrap()].into();
    for seed in 0..300 {
        let mut random = entente_sim::Random(seed);
        let (mut hosts, loads) = random_hosts(&mut random, &shape);
        let plan = |hosts: &[Host]| {
            Planner {
                hosts,
                shape: &shape,
                serving: &serving,
                replicas: 2,
                redundant_per_layer: 2,
                loads: Some(&loads),
                round_trips: &round_trips,
            }
            .plan()
        };
        let first = plan(&hosts).unwrap_or_else(|refused| panic!("seed {seed}: {refused}"));
        for host in &hosts {
            let bytes = first.placement.experts_of(host.id).len() as u64 * shape.expert_bytes;
            assert!(bytes <= host.memory_bytes.unwrap(), "seed {seed}: memory of {}", host.id);
        }
        for expert in shape.experts() {
            assert!(first.placement.replicas(expert).count() >= 2, "seed {seed}: {expert:?}");
        }
        hold(&mut hosts, &first.placement);
        assert_eq!(plan(&hosts).unwrap().placement, first.placement, "seed {seed}: it moves");

        let lost = hosts.swap_remove(random.place(hosts.len()));
        hosts.iter_mut().for_each(|host| host.memory_bytes = None);
        let Ok(second) = plan(&hosts) else { panic!("seed {seed}: {} is lost", lost.id) };
        let kept =
            |host: &Host| second.placement.experts_of(host.id).intersection(&host.held).count();
        let (kept, held): (usize, usize) =
            (hosts.iter().map(kept).sum(), hosts.iter().map(|host| host.held.len()).sum());
        assert!(kept * 10 >= held * 7, "seed {seed}: {kept} of {held} stay");
    }
}

#[test]
fn draining_nodes_are_emptied_and_cordoned_ones_keep_what_they_hold() {
    let shape = mixtral();
    let mut hosts: Vec<Host> = nodes("fr", 0..4, None).iter().map(Host::from).collect();
    let first = plan(&nodes("fr", 0..3, None), &shape, 2).unwrap();
    hold(&mut hosts, &first);
    hosts[0].state = HostState::Draining;
    hosts[1].state = HostState::Cordoned;
    let planner = Planner {
        hosts: &hosts,
        shape: &shape,
        serving: &["fr".parse().unwrap()].into(),
        replicas: 2,
        redundant_per_layer: 0,
        loads: None,
        round_trips: &RoundTrips::default(),
    };
    let placement = planner.plan().unwrap().placement;
    assert_eq!(placement.experts_of(NodeId(0)).len(), 0);
    assert!(placement.experts_of(NodeId(1)).is_subset(&hosts[1].held));
}

#[test]
fn a_region_that_would_be_served_from_abroad_is_refused_with_the_time_it_would_take() {
    let shape = ModelShape { layers: (0..32).map(|l| (LayerId(l), 8)).collect(), expert_bytes: 1 };
    let all = [nodes("fr", 0..1, Some(20)), nodes("se", 1..2, None)].concat();
    let hosts: Vec<Host> = all.iter().map(Host::from).collect();
    let mut round_trips = RoundTrips::default();
    round_trips.set("se".parse().unwrap(), "fr".parse().unwrap(), 30_000);
    let planner = Planner {
        hosts: &hosts,
        shape: &shape,
        serving: &["fr".parse().unwrap(), "se".parse().unwrap()].into(),
        replicas: 1,
        redundant_per_layer: 0,
        loads: None,
        round_trips: &round_trips,
    };
    assert_eq!(
        planner.plan().unwrap_err().to_string(),
        "region fr: 1 x 256 experts of 1 bytes need 256 bytes; its 1 nodes have room for 20 experts \
         (20 bytes); serving it from se would cross the border 30 times per token: \
         30 x 30 ms = 900 ms per token"
    );
}
