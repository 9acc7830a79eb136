//! EPLB, the Expert Parallelism Load Balancer: how often to copy each expert, and which device gets
//! which copy, so that the busiest device has as little more to do than the average as possible.
//!
//! The algorithm that DeepSeek published with DeepSeek-V3 (arXiv 2412.19437, section 3.4): give one
//! more replica to the expert with the highest load per replica until all slots are taken, then deal
//! the replicas out, heaviest first, each to the lightest device that has a slot left. Where the
//! experts come in groups and the groups divide evenly over the nodes, whole groups are dealt to
//! nodes first and each node is balanced by itself, so that a token's experts stay together.
//!
//! One step goes beyond the published greedy: after a deal, the heaviest pack exchanges items with
//! others for as long as that lowers it (`settle`).
//!
//! All arithmetic is on integers and ties go to the lower number, so that every process that is
//! given the same loads computes the same plan. It knows no memory, no machine that differs from
//! the next, and nothing of what is held already; the planner above it does.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Fraction bits of a replica's load: a load is divided by the number of replicas.
const FRACTION_BITS: u32 = 32;

/// Exchanges between packs at most, in units of items: an exchange lowers the heavier of two packs,
/// so this is a bound on time and is not reached in practice.
const SWAPS_PER_ITEM_MAX: usize = 16;

/// Why no plan exists.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EplbError {
    /// A number that must divide another does not, or is 0.
    #[error("{what} is {have}, which does not divide {whole} ({number})")]
    Divides {
        /// The divisor.
        what: &'static str,
        /// Its value.
        have: usize,
        /// What is divided.
        whole: &'static str,
        /// Its value.
        number: usize,
    },
    /// Every expert needs a slot.
    #[error("num_replicas is {replicas}, fewer than the {experts} experts of layer {layer}")]
    TooFewReplicas {
        /// Slots of a layer.
        replicas: usize,
        /// Experts of the layer.
        experts: usize,
        /// Which of the layers, counted from 0.
        layer: usize,
    },
}

/// What became of one layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerPlan {
    /// The expert in each slot, `[num_replicas]`; slots of one device are neighbours, and devices
    /// of one node.
    pub phy2log: Vec<usize>,
    /// The slots of each expert, `[experts][replicas of it]`, ascending.
    pub log2phy: Vec<Vec<usize>>,
    /// Replicas of each expert, `[experts]`.
    pub logcnt: Vec<usize>,
}

impl LayerPlan {
    /// Load of the busiest of `num_gpus` devices over the average of all; 1 is perfect balance.
    pub fn max_over_mean(&self, weights: &[u64], num_gpus: usize) -> f64 {
        let per_gpu = (self.phy2log.len() / num_gpus.max(1)).max(1);
        let load = |slots: &[usize]| {
            slots.iter().map(|expert| per_replica(weights[*expert], self.logcnt[*expert])).sum()
        };
        let loads: Vec<u128> = self.phy2log.chunks(per_gpu).map(load).collect();
        max_over_mean(&loads)
    }
}

/// The highest of some loads over their mean; 1 where there is no load at all.
pub(super) fn max_over_mean(loads: &[u128]) -> f64 {
    let sum: u128 = loads.iter().sum();
    let max = loads.iter().max().copied().unwrap_or_default();
    if sum == 0 { 1.0 } else { max as f64 * loads.len() as f64 / sum as f64 }
}

/// Load of one of `count` replicas, in units of 2^-32.
pub(super) fn per_replica(load: u64, count: usize) -> u128 {
    (u128::from(load) << FRACTION_BITS) / count.max(1) as u128
}

/// Plans every layer; the interface of the published `rebalance_experts`.
///
/// `weights` is `[layers][experts]`, any measure of how much each expert has to do. Each layer gets
/// `num_replicas` slots on `num_gpus` devices, which `num_nodes` machines share evenly. The experts
/// of a layer form `num_groups` groups of neighbours; groups stay on one node if they divide evenly
/// over the nodes, and are disregarded otherwise.
///
/// # Errors
/// When a number does not divide where it must, or slots are too few for one replica of each.
pub fn rebalance_experts(
    weights: &[Vec<u64>],
    num_replicas: usize,
    num_groups: usize,
    num_nodes: usize,
    num_gpus: usize,
) -> Result<Vec<LayerPlan>, EplbError> {
    divides("num_gpus", num_gpus, "num_replicas", num_replicas)?;
    divides("num_nodes", num_nodes, "num_gpus", num_gpus)?;
    let grouped = num_groups > 0 && num_groups.is_multiple_of(num_nodes);
    let (groups, nodes) = if grouped { (num_groups, num_nodes) } else { (1, 1) };
    let layer = |(number, weights): (usize, &Vec<u64>)| {
        let experts = weights.len();
        if experts > num_replicas {
            return Err(EplbError::TooFewReplicas {
                replicas: num_replicas,
                experts,
                layer: number,
            });
        }
        divides("num_groups", groups, "the number of experts", experts)?;
        Ok(plan_layer(weights, num_replicas, groups, nodes, num_gpus))
    };
    weights.iter().enumerate().map(layer).collect()
}

fn divides(
    what: &'static str,
    have: usize,
    whole: &'static str,
    number: usize,
) -> Result<(), EplbError> {
    if have > 0 && number > 0 && number.is_multiple_of(have) {
        return Ok(());
    }
    Err(EplbError::Divides { what, have, whole, number })
}

/// Groups to nodes, then replicas within each node, then replicas to the node's devices.
fn plan_layer(
    weights: &[u64],
    num_replicas: usize,
    groups: usize,
    nodes: usize,
    gpus: usize,
) -> LayerPlan {
    let group_len = weights.len() / groups;
    let group_loads: Vec<u128> = weights
        .chunks(group_len)
        .map(|group| group.iter().map(|load| per_replica(*load, 1)).sum())
        .collect();
    let mut phy2log = Vec::with_capacity(num_replicas);
    let mut logcnt = vec![0; weights.len()];
    for groups in balanced_packing(&group_loads, nodes) {
        let experts: Vec<usize> =
            groups.iter().flat_map(|group| group * group_len..(group + 1) * group_len).collect();
        let loads: Vec<u64> = experts.iter().map(|expert| weights[*expert]).collect();
        let mut counts = vec![1; experts.len()];
        replicate(&loads, &mut counts, num_replicas / nodes - experts.len(), usize::MAX);
        let mut replicas = Vec::with_capacity(num_replicas / nodes);
        for (i, expert) in experts.iter().enumerate() {
            logcnt[*expert] = counts[i];
            replicas.extend(std::iter::repeat_n(
                (*expert, per_replica(loads[i], counts[i])),
                counts[i],
            ));
        }
        let loads: Vec<u128> = replicas.iter().map(|(_, load)| *load).collect();
        for pack in balanced_packing(&loads, gpus / nodes) {
            phy2log.extend(pack.into_iter().map(|replica| replicas[replica].0));
        }
    }
    let mut log2phy = vec![Vec::new(); weights.len()];
    for (slot, expert) in phy2log.iter().enumerate() {
        log2phy[*expert].push(slot);
    }
    LayerPlan { phy2log, log2phy, logcnt }
}

/// Gives `extra` more replicas, one at a time, to the expert with the highest load per replica that
/// has fewer than `count_max`. Returns how many were given: fewer when all are at the bound.
pub(super) fn replicate(
    loads: &[u64],
    counts: &mut [usize],
    extra: usize,
    count_max: usize,
) -> usize {
    // The one with the highest load per replica is on top, of equal ones the lowest expert.
    let entry = |expert: usize, count| (per_replica(loads[expert], count), Reverse(expert));
    let mut heap: BinaryHeap<(u128, Reverse<usize>)> =
        counts.iter().enumerate().map(|(expert, count)| entry(expert, *count)).collect();
    let mut given = 0;
    while given < extra {
        let Some((_, Reverse(expert))) = heap.pop() else { break };
        if counts[expert] >= count_max {
            continue;
        }
        counts[expert] += 1;
        given += 1;
        heap.push(entry(expert, counts[expert]));
    }
    given
}

/// Deals items to `packs` packs of equally many items, heaviest first, each to the lightest pack
/// that has room; then lets packs exchange items.
fn balanced_packing(loads: &[u128], packs: usize) -> Vec<Vec<usize>> {
    let room = loads.len() / packs;
    let mut order: Vec<usize> = (0..loads.len()).collect();
    order.sort_by_key(|item| (Reverse(loads[*item]), *item));
    let mut dealt: Vec<Pack> = vec![Pack::default(); packs];
    for item in order {
        let lightest = dealt.iter_mut().filter(|pack| pack.items.len() < room);
        let pack = lightest.min_by_key(|pack| pack.load).expect("items and room are equally many");
        pack.items.push(item);
        pack.load += loads[item];
    }
    settle(&mut dealt, loads);
    dealt.into_iter().map(|pack| pack.items).collect()
}

#[derive(Debug, Clone, Default)]
struct Pack {
    items: Vec<usize>,
    load: u128,
}

/// Exchanges an item of the heaviest pack for a lighter one of another, the pair that leaves the
/// heavier of the two lightest, until no exchange lowers the heaviest pack.
fn settle(packs: &mut [Pack], loads: &[u128]) {
    for _ in 0..loads.len() * SWAPS_PER_ITEM_MAX {
        let Some(heavy) = (0..packs.len()).max_by_key(|i| (packs[*i].load, Reverse(*i))) else {
            return;
        };
        let top = packs[heavy].load;
        let mut best = (top, heavy, 0, 0);
        for other in (0..packs.len()).filter(|other| *other != heavy) {
            for (i, item) in packs[heavy].items.iter().enumerate() {
                for (j, theirs) in packs[other].items.iter().enumerate() {
                    if loads[*item] <= loads[*theirs] {
                        continue;
                    }
                    let moved = loads[*item] - loads[*theirs];
                    let after = (top - moved).max(packs[other].load + moved);
                    best = best.min((after, other, i, j));
                }
            }
        }
        let (after, other, i, j) = best;
        if after >= top {
            return;
        }
        let (item, theirs) = (packs[heavy].items[i], packs[other].items[j]);
        let moved = loads[item] - loads[theirs];
        packs[heavy].items[i] = theirs;
        packs[heavy].load -= moved;
        packs[other].items[j] = item;
        packs[other].load += moved;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hottest_expert_gets_the_replicas_up_to_the_bound() {
        let mut counts = vec![1; 3];
        assert_eq!(replicate(&[90, 40, 10], &mut counts, 3, usize::MAX), 3);
        assert_eq!(counts, [3, 2, 1], "90/1, then 45 against 40, then 40 against 30");
        let mut bounded = vec![1; 3];
        assert_eq!(replicate(&[90, 40, 10], &mut bounded, 9, 2), 3, "all are at the bound");
        assert_eq!(bounded, [2, 2, 2]);
    }

    #[test]
    fn equal_loads_go_to_the_lower_expert() {
        let mut counts = vec![1; 4];
        replicate(&[5; 4], &mut counts, 2, usize::MAX);
        assert_eq!(counts, [2, 2, 1, 1]);
    }

    #[test]
    fn exchanges_reach_what_the_greedy_deal_does_not() {
        // Greedy gives 7 + 4 + 4 = 15 and 6 + 5 + 1 = 12; 7 for 6 makes that 14 and 13.
        let loads = [7, 6, 5, 4, 4, 1];
        let packs = balanced_packing(&loads, 2);
        let sums: Vec<u128> =
            packs.iter().map(|pack| pack.iter().map(|i| loads[*i]).sum()).collect();
        assert_eq!(sums.iter().max(), Some(&14));
    }

    #[test]
    fn numbers_that_do_not_divide_are_refused() {
        let weights = [vec![1; 8]];
        let refused = |replicas, groups, nodes, gpus| {
            rebalance_experts(&weights, replicas, groups, nodes, gpus).unwrap_err().to_string()
        };
        assert!(refused(9, 1, 1, 2).contains("num_gpus is 2"));
        assert!(refused(8, 1, 3, 4).contains("num_nodes is 3"));
        assert!(refused(8, 3, 1, 2).contains("num_groups is 3"));
        assert!(refused(4, 1, 1, 2).contains("fewer than the 8 experts"));
        assert!(refused(8, 1, 1, 0).contains("num_gpus is 0"));
    }
}
