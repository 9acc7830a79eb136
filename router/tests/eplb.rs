//! Goal: expert load is spread at least as evenly as by the published EPLB.
//! Method: the reference's inputs and outputs, recorded; a tie may be broken otherwise, the load of
//! the busiest device may not be higher.
// Everything here is a test, which clippy sees in #[test] functions only.
#![allow(clippy::unwrap_used)]

use entente_router::placement::eplb::{LayerPlan, rebalance_experts};
use serde::Deserialize;

/// The recorded figures have six decimals.
const ROUNDING: f64 = 5e-7;

#[derive(Deserialize)]
struct Golden {
    cases: Vec<Case>,
}

/// One call of the reference, and what it gave for each layer.
#[derive(Deserialize)]
struct Case {
    weight: Vec<Vec<u64>>,
    replicas: usize,
    groups: usize,
    nodes: usize,
    devices: usize,
    logcnt: Vec<Vec<usize>>,
    max_over_mean: Vec<f64>,
}

impl Case {
    fn plan(&self) -> Vec<LayerPlan> {
        rebalance_experts(&self.weight, self.replicas, self.groups, self.nodes, self.devices)
            .unwrap()
    }
}

fn golden() -> Golden {
    serde_json::from_str(include_str!("data/eplb.json")).unwrap()
}

#[test]
fn the_busiest_device_has_no_more_to_do_than_with_the_reference() {
    let mut worse = Vec::new();
    for (n, case) in golden().cases.iter().enumerate() {
        for (l, (plan, theirs)) in case.plan().iter().zip(&case.max_over_mean).enumerate() {
            let ours = plan.max_over_mean(&case.weight[l], case.devices);
            println!("case {n} layer {l}: ours {ours:.6}, reference {theirs:.6}");
            if ours > theirs + ROUNDING {
                worse.push((n, l, ours, *theirs));
            }
        }
    }
    assert!(worse.is_empty(), "(case, layer, ours, reference): {worse:?}");
}

#[test]
fn the_hottest_replica_is_no_hotter_than_with_the_reference() {
    for (n, case) in golden().cases.iter().enumerate() {
        for (l, (plan, theirs)) in case.plan().iter().zip(&case.logcnt).enumerate() {
            let hottest = |counts: &[usize]| {
                let load = |(load, count): (&u64, &usize)| *load as f64 / *count as f64;
                case.weight[l].iter().zip(counts).map(load).fold(0.0, f64::max)
            };
            let (ours, theirs) = (hottest(&plan.logcnt), hottest(theirs));
            assert!(ours <= theirs, "case {n} layer {l}: {ours} is more than {theirs}");
        }
    }
}

#[test]
fn a_plan_fills_every_slot_and_its_three_tables_agree() {
    for (n, case) in golden().cases.iter().enumerate() {
        for (l, plan) in case.plan().iter().enumerate() {
            assert_eq!(plan.phy2log.len(), case.replicas, "case {n} layer {l}");
            assert_eq!(plan.logcnt.iter().sum::<usize>(), case.replicas, "case {n} layer {l}");
            for (expert, slots) in plan.log2phy.iter().enumerate() {
                assert_eq!(slots.len(), plan.logcnt[expert], "case {n} layer {l}");
                assert!(!slots.is_empty(), "case {n} layer {l}: expert {expert} has no replica");
                assert!(slots.iter().all(|slot| plan.phy2log[*slot] == expert));
            }
        }
    }
}

#[test]
fn groups_stay_on_one_node_where_they_divide_evenly() {
    for case in golden().cases.iter().filter(|case| case.groups.is_multiple_of(case.nodes)) {
        for plan in case.plan() {
            let (group_len, node_len) =
                (plan.logcnt.len() / case.groups, case.replicas / case.nodes);
            for (expert, slots) in plan.log2phy.iter().enumerate() {
                let group = expert / group_len * group_len;
                let node = plan.log2phy[group][0] / node_len;
                assert!(slots.iter().all(|slot| slot / node_len == node), "expert {expert}");
            }
        }
    }
}
