//! Packs the experts of one region onto its nodes.
//!
//! Copies are dealt out one at a time, in each layer the experts with most load per copy first, each
//! to the node with least load in that layer. When no node that may take a copy has room, copies
//! that lie already move on along a chain to one that has ([`Packing::make_room`]): an augmenting
//! path of bipartite matching, so that a packing is found whenever there is one.
//!
//! Two packings are tried. One leaves everything where it is and adds what is missing; the other
//! leaves on each node only its fair share. The first is taken unless the second is clearly better:
//! losing a node moves nothing that survived, and a node that joins gets its share.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

use entente_proto::ids::{ExpertId, LayerId, NodeId, Region};
use entente_proto::placement::ExpertKey;

use super::eplb::{max_over_mean, per_replica, replicate};
use super::{Host, HostState, Planner, RegionPlan, bytes};

/// A packing that moves what is there must be better than one that does not by more than this
/// fraction: loads are measured, and must not keep experts travelling.
const GAIN_MIN: (u128, u128) = (1, 20);
/// Times that a packing is packed again. Each gains or is the last; one mostly does.
const ROUNDS_MAX: usize = 4;

/// The experts that each host of a region holds, the hosts in ascending order.
type Held = Vec<BTreeSet<ExpertKey>>;

/// How much of what is there stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Keep {
    /// All of it, up to the copies wanted.
    All,
    /// On each node as much as makes its share of a layer's load.
    FairShare,
}

/// Packs a region, and packs again what came of it until that no longer pays: what is planned is to
/// stay as it is when it is planned anew. None when there is no packing.
pub(super) fn pack<'a>(planner: &Planner<'a>, region: Region) -> Option<Packing<'a>> {
    let hosts = planner.hosts_of(region);
    let mut held: Held = hosts.iter().map(|host| host.held.clone()).collect();
    let mut packing = better(planner, region, &held)?;
    for _ in 1..ROUNDS_MAX {
        if packing.on == held {
            break;
        }
        held.clone_from(&packing.on);
        packing = better(planner, region, &held)?;
    }
    Some(packing)
}

/// The packing that leaves everything where it is, or the balanced one where that is better.
fn better<'a>(planner: &Planner<'a>, region: Region, held: &Held) -> Option<Packing<'a>> {
    let attempt = |keep| Packing::new(planner, region, held).fill(keep);
    // Redundant copies that stay may leave no way to place all replicas; then they do not stay.
    let Some(stay) = attempt(Keep::All) else { return attempt(Keep::FairShare) };
    let Some(balance) = attempt(Keep::FairShare) else { return Some(stay) };
    let (stay_conflicts, balance_conflicts) = (stay.site_conflicts(), balance.site_conflicts());
    let (stay_load, balance_load) = (stay.busiest(), balance.busiest());
    let (gain, whole) = GAIN_MIN;
    // One after the other: a plan that gained in one at the cost of the other would be undone by
    // the next, and experts would travel for ever.
    let balance_gains = balance_conflicts < stay_conflicts
        || (balance_conflicts == stay_conflicts
            && stay_load * whole > balance_load * (whole + gain));
    Some(if balance_gains { balance } else { stay })
}

/// One expert of a layer with the copies that it shall have.
#[derive(Debug, Clone, Copy)]
struct Demand {
    expert: ExpertKey,
    copies: usize,
}

/// The nodes of a region with what was dealt to them so far.
pub(super) struct Packing<'a> {
    hosts: Vec<&'a Host>,
    /// What is there already.
    held: Held,
    /// Copies that each host still has room for.
    room: Vec<u64>,
    /// What each host was dealt.
    on: Vec<BTreeSet<ExpertKey>>,
    /// The hosts of each expert, in the order in which it was dealt to them.
    copies: BTreeMap<ExpertKey, Vec<usize>>,
    /// Load of each host in each layer.
    layer_load: BTreeMap<LayerId, Vec<u128>>,
    /// Experts that the hosts `i` and `j` share, at `i * hosts + j`.
    shared: Vec<u32>,
    /// By layer, the experts with most load per copy first.
    demands: Vec<Demand>,
    /// What one copy of an expert adds to its host.
    weight: BTreeMap<ExpertKey, u128>,
    load: BTreeMap<ExpertKey, u64>,
    replicas: usize,
    expert_bytes: u64,
}

impl<'a> Packing<'a> {
    fn new(planner: &Planner<'a>, region: Region, held: &Held) -> Self {
        let hosts = planner.hosts_of(region);
        let room: Vec<u64> = hosts.iter().map(|host| planner.room_of(host)).collect();
        let count = hosts.len();
        let mut packing = Self {
            on: vec![BTreeSet::new(); count],
            copies: BTreeMap::new(),
            layer_load: BTreeMap::new(),
            shared: vec![0; count * count],
            demands: Vec::new(),
            weight: BTreeMap::new(),
            load: BTreeMap::new(),
            replicas: planner.replicas.into(),
            expert_bytes: planner.shape.expert_bytes,
            hosts,
            held: held.clone(),
            room,
        };
        packing.demand(planner);
        packing
    }

    /// Works out how many copies each expert shall have, and what each of them adds to a host.
    fn demand(&mut self, planner: &Planner<'a>) {
        let layers = planner.shape.layers.len().max(1) as u64;
        let needed = u64::from(planner.replicas) * planner.shape.expert_count();
        let spare = self.room.iter().sum::<u64>().saturating_sub(needed) / layers;
        let hot = planner.loads.map_or(0, |_| u64::from(planner.redundant_per_layer));
        let extra = usize::try_from(spare.min(hot)).unwrap_or(usize::MAX);
        for (layer, experts) in &planner.shape.layers {
            let expert = |number| (*layer, ExpertId(number));
            // Never counted is not never used: a load of 1 keeps such experts spread as well.
            let load = |number| match planner.loads {
                Some(loads) => loads.get(&expert(number)).copied().unwrap_or(0).max(1),
                None => 1,
            };
            let loads: Vec<u64> = (0..*experts).map(load).collect();
            let mut counts = vec![self.replicas; loads.len()];
            replicate(&loads, &mut counts, extra, self.hosts.len());
            let mut demands = Vec::with_capacity(loads.len());
            for (number, (load, copies)) in loads.into_iter().zip(counts).enumerate() {
                let expert = expert(number as u16);
                self.load.insert(expert, load);
                self.weight.insert(expert, per_replica(load, copies));
                demands.push(Demand { expert, copies });
            }
            demands.sort_by_key(|demand| (Reverse(self.weight[&demand.expert]), demand.expert));
            self.demands.extend(demands);
            self.layer_load.insert(*layer, vec![0; self.hosts.len()]);
        }
    }

    /// Deals everything out; none when some replica finds no place.
    fn fill(mut self, keep: Keep) -> Option<Self> {
        let demands = std::mem::take(&mut self.demands);
        for demand in &demands {
            self.keep_held(*demand, keep);
        }
        for demand in &demands {
            while self.placed(demand.expert) < self.replicas {
                let host = match self.best(demand.expert) {
                    Some(host) => host,
                    None => self.make_room(demand.expert)?,
                };
                self.put(demand.expert, host);
            }
        }
        for demand in &demands {
            while self.placed(demand.expert) < demand.copies {
                let Some(host) = self.best(demand.expert) else { break };
                self.put(demand.expert, host);
            }
        }
        self.demands = demands;
        Some(self)
    }

    fn placed(&self, expert: ExpertKey) -> usize {
        self.copies.get(&expert).map_or(0, Vec::len)
    }

    fn is_cordoned(&self, host: usize) -> bool {
        self.hosts[host].state == HostState::Cordoned
    }

    /// Leaves copies where they are, those at different sites first.
    fn keep_held(&mut self, demand: Demand, keep: Keep) {
        let Demand { expert, copies } = demand;
        let copies = if keep == Keep::All { copies } else { self.replicas };
        while self.placed(expert) < copies {
            let loads = &self.layer_load[&expert.0];
            let hosts = self.hosts.len() as u128;
            let all: u128 = self.layer_total(expert.0);
            let may_stay = |host: &usize| {
                let fair = loads[*host] * hosts < all;
                self.held[*host].contains(&expert)
                    && !self.on[*host].contains(&expert)
                    && self.room[*host] > 0
                    && (keep == Keep::All || fair || self.is_cordoned(*host))
            };
            let key = |host: &usize| (self.conflicts(expert, *host), loads[*host], *host);
            let Some(host) = (0..self.hosts.len()).filter(may_stay).min_by_key(key) else { return };
            self.put(expert, host);
        }
    }

    /// The load of a layer that is to be dealt out.
    fn layer_total(&self, layer: LayerId) -> u128 {
        let experts = (layer, ExpertId(0))..=(layer, ExpertId(u16::MAX));
        self.load.range(experts).map(|(_, load)| per_replica(*load, 1)).sum()
    }

    /// Whether a copy of the expert lies at the host's site already.
    fn conflicts(&self, expert: ExpertKey, host: usize) -> bool {
        let site = &self.hosts[host].site;
        let taken = self.copies.get(&expert).into_iter().flatten();
        site.is_some() && taken.clone().any(|other| self.hosts[*other].site == *site)
    }

    /// The host that should get the next copy of the expert, of those with room.
    ///
    /// Another site first; then the least load in the layer, who holds it already, and who was
    /// dealt least. Of equal ones it takes the host that shares least with those that have the
    /// expert, so that the load of a lost node falls on many others and not on one twin.
    fn best(&self, expert: ExpertKey) -> Option<usize> {
        let loads = &self.layer_load[&expert.0];
        let count = self.hosts.len();
        let taken = self.copies.get(&expert).map_or(&[][..], Vec::as_slice);
        let may_take = |host: &usize| {
            let held = self.held[*host].contains(&expert);
            self.room[*host] > 0
                && !self.on[*host].contains(&expert)
                && (held || !self.is_cordoned(*host))
        };
        (0..count).filter(may_take).min_by_key(|host| {
            let shared: u32 = taken.iter().map(|other| self.shared[host * count + other]).sum();
            let held = self.held[*host].contains(&expert);
            let conflicts = self.conflicts(expert, *host);
            (conflicts, loads[*host], !held, self.on[*host].len(), shared, *host)
        })
    }

    fn put(&mut self, expert: ExpertKey, host: usize) {
        let count = self.hosts.len();
        let copies = self.copies.entry(expert).or_default();
        for other in copies.iter() {
            self.shared[host * count + other] += 1;
            self.shared[other * count + host] += 1;
        }
        copies.push(host);
        self.on[host].insert(expert);
        self.room[host] -= 1;
        if let Some(loads) = self.layer_load.get_mut(&expert.0) {
            loads[host] += self.weight[&expert];
        }
    }

    fn take(&mut self, expert: ExpertKey, host: usize) {
        let count = self.hosts.len();
        if let Some(copies) = self.copies.get_mut(&expert) {
            copies.retain(|other| *other != host);
            for other in copies.iter() {
                self.shared[host * count + other] -= 1;
                self.shared[other * count + host] -= 1;
            }
        }
        self.on[host].remove(&expert);
        self.room[host] += 1;
        if let Some(loads) = self.layer_load.get_mut(&expert.0) {
            loads[host] -= self.weight[&expert];
        }
    }

    /// Makes room for a copy of the expert on a full host by moving copies on along the shortest
    /// chain of hosts that ends at one with room. Gives the host; none when there is no chain, and
    /// with it no packing.
    fn make_room(&mut self, expert: ExpertKey) -> Option<usize> {
        let count = self.hosts.len();
        // From each host that was reached: who would hand a copy on to it, and of which expert.
        let mut reached: Vec<Option<(usize, ExpertKey)>> = vec![None; count];
        let starts = (0..count).filter(|h| !self.is_cordoned(*h) && !self.on[*h].contains(&expert));
        let mut queue: VecDeque<usize> = starts.collect();
        let is_start: BTreeSet<usize> = queue.iter().copied().collect();
        while let Some(from) = queue.pop_front() {
            for to in 0..count {
                if is_start.contains(&to) || reached[to].is_some() || self.is_cordoned(to) {
                    continue;
                }
                let Some(moved) = self.on[from].difference(&self.on[to]).next() else { continue };
                reached[to] = Some((from, *moved));
                if self.room[to] == 0 {
                    queue.push_back(to);
                    continue;
                }
                let mut at = to;
                while let Some((from, moved)) = reached[at] {
                    self.take(moved, from);
                    self.put(moved, at);
                    at = from;
                }
                return Some(at);
            }
        }
        None
    }

    /// Every copy.
    pub(super) fn copies(&self) -> impl Iterator<Item = (ExpertKey, NodeId)> + '_ {
        let node = |host: &usize| self.hosts[*host].id;
        self.copies.iter().flat_map(move |(expert, on)| on.iter().map(move |h| (*expert, node(h))))
    }

    /// Load of each host in a layer, with the copies that there are now.
    fn loads(&self, layer: LayerId) -> Vec<u128> {
        let load = |on: &BTreeSet<ExpertKey>| {
            let here = on.iter().filter(|expert| expert.0 == layer);
            here.map(|expert| per_replica(self.load[expert], self.placed(*expert))).sum()
        };
        self.on.iter().map(load).collect()
    }

    /// The busiest host of each layer, summed: what a token has to wait for.
    fn busiest(&self) -> u128 {
        let max = |layer: &LayerId| self.loads(*layer).into_iter().max().unwrap_or_default();
        self.layer_load.keys().map(max).sum()
    }

    /// See [`RegionPlan::site_conflicts`]. A copy beyond the replicas wanted need not stand apart,
    /// or giving it up would look like a gain.
    fn site_conflicts(&self) -> u64 {
        let conflicts = |hosts: &Vec<usize>| {
            let site = |host: &usize| self.hosts[*host].site.as_ref().ok_or(*host);
            let different: BTreeSet<_> = hosts.iter().map(site).collect();
            self.replicas.saturating_sub(different.len()) as u64
        };
        self.copies.values().map(conflicts).sum()
    }

    /// The figures of the finished packing.
    pub(super) fn figures(&self, bytes_there: u128) -> RegionPlan {
        let copies: u64 = self.copies.values().map(|hosts| hosts.len() as u64).sum();
        let balance = |layer: &LayerId| (*layer, max_over_mean(&self.loads(*layer)));
        RegionPlan {
            bytes_needed: bytes(copies, self.expert_bytes),
            bytes_there,
            redundant: copies - (self.copies.len() * self.replicas) as u64,
            site_conflicts: self.site_conflicts(),
            max_over_mean: self.layer_load.keys().map(balance).collect(),
        }
    }
}
