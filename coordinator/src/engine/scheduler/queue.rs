//! Who comes next among those that wait: tenants take turns by the rows that they have had, and the
//! sequences of one tenant go in the order in which they came. Pure.
//!
//! This is start-time fair queueing (Goyal, Vin, Cheng, 1997) with rows as the unit. Each tenant has a
//! lane with a virtual time, which grows by the rows that are computed for it; the lane that is least
//! far goes next. Virtual time itself is that of the lane that went last. A lane that was away comes
//! back at that time: it is owed nothing for not having asked, and pays off what it had too much.
//!
//! Invariants:
//! - whoever comes to an empty lane that owes nothing is behind one sequence of each other tenant at
//!   most, however many wait;
//! - a tenant alone waits for nobody, and owes nothing afterwards;
//! - putting in, taking out and charging cost O(log tenants), amortised.
//!
//! What it does not know: what a row costs, blocks, which sequences run.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use entente_proto::ids::TenantName;

/// Lanes in which nobody waits and that are ahead of the others: more are forgotten, the least ahead
/// first.
const IDLE_MAX: usize = 1_024;

#[derive(Debug)]
struct Lane<T> {
    waiting: VecDeque<T>,
    /// Where it stands in virtual time, in rows; also its place in one of the two orders.
    time: u64,
    /// Rows that were computed for it and are not in `time` yet. Keeping them apart makes a charge
    /// cheap: the lane is moved only when its turn seems to have come.
    owed: u64,
}

/// Waiting things by tenant. See the module.
#[derive(Debug)]
pub struct Queue<T> {
    lanes: BTreeMap<TenantName, Lane<T>>,
    /// Lanes in which somebody waits, by time.
    order: BTreeSet<(u64, TenantName)>,
    /// The other lanes, by time.
    idle: BTreeSet<(u64, TenantName)>,
    now: u64,
    len: usize,
}

impl<T> Default for Queue<T> {
    fn default() -> Self {
        let (lanes, order, idle) = (BTreeMap::new(), BTreeSet::new(), BTreeSet::new());
        Self { lanes, order, idle, now: 0, len: 0 }
    }
}

impl<T> Queue<T> {
    /// How many wait.
    pub fn len(&self) -> usize {
        self.len
    }

    /// How many of one tenant's wait.
    pub fn len_of(&self, tenant: &TenantName) -> usize {
        self.lanes.get(tenant).map_or(0, |lane| lane.waiting.len())
    }

    /// Puts one at the end of its tenant's lane.
    pub fn push(&mut self, tenant: &TenantName, item: T) {
        self.len += 1;
        let now = self.now;
        let lane = self.lane(tenant);
        lane.waiting.push_back(item);
        if lane.waiting.len() == 1 {
            // What it owes still counts: it is paid when its turn seems to have come.
            let (from, to) = (lane.time, lane.time.max(now));
            lane.time = to;
            self.idle.remove(&(from, tenant.clone()));
            self.order.insert((to, tenant.clone()));
        }
    }

    /// The one whose turn it is.
    pub fn front_mut(&mut self) -> Option<&mut T> {
        let tenant = self.next_lane()?;
        self.lanes.get_mut(&tenant)?.waiting.front_mut()
    }

    /// Takes out the one whose turn it is.
    pub fn pop(&mut self) -> Option<T> {
        let tenant = self.next_lane()?;
        let lane = self.lanes.get_mut(&tenant)?;
        let item = lane.waiting.pop_front()?;
        self.now = lane.time;
        self.len -= 1;
        if lane.waiting.is_empty() {
            self.rest(&tenant);
        }
        self.forget_the_caught_up();
        Some(item)
    }

    /// Takes out all that `is_it`; they have had no turn.
    pub fn remove(&mut self, is_it: impl Fn(&T) -> bool) {
        let mut emptied = Vec::new();
        for (tenant, lane) in &mut self.lanes {
            let before = lane.waiting.len();
            lane.waiting.retain(|item| !is_it(item));
            self.len -= before - lane.waiting.len();
            if before > 0 && lane.waiting.is_empty() {
                emptied.push(tenant.clone());
            }
        }
        emptied.iter().for_each(|tenant| self.rest(tenant));
    }

    /// Rows are computed for a tenant, also for its sequences that wait no more. They count where
    /// there is another tenant to take turns with.
    pub fn charge(&mut self, tenant: &TenantName, rows: usize) {
        let is_alone = self.lanes.len() <= 1 && self.lanes.keys().all(|other| other == tenant);
        if !is_alone {
            let lane = self.lane(tenant);
            lane.owed = lane.owed.saturating_add(rows as u64);
        }
    }

    /// Nothing runs and nothing waits: nobody can be ahead of anybody.
    pub fn reset(&mut self) {
        if self.len == 0 {
            *self = Self::default();
        }
    }

    /// The tenant's lane; a new one begins now and idle.
    fn lane(&mut self, tenant: &TenantName) -> &mut Lane<T> {
        if !self.lanes.contains_key(tenant) {
            if self.idle.len() >= IDLE_MAX
                && let Some((_, least)) = self.idle.pop_first()
            {
                self.lanes.remove(&least);
            }
            self.idle.insert((self.now, tenant.clone()));
        }
        let (waiting, time) = (VecDeque::new(), self.now);
        self.lanes.entry(tenant.clone()).or_insert(Lane { waiting, time, owed: 0 })
    }

    /// The tenant whose lane is least far once its debts are counted.
    fn next_lane(&mut self) -> Option<TenantName> {
        loop {
            let (time, tenant) = self.order.first()?.clone();
            let lane = self.lanes.get_mut(&tenant)?;
            if lane.owed == 0 {
                return Some(tenant);
            }
            lane.time = time.saturating_add(std::mem::take(&mut lane.owed));
            let settled = lane.time;
            self.order.pop_first();
            self.order.insert((settled, tenant));
        }
    }

    /// Nobody waits in this lane any more.
    fn rest(&mut self, tenant: &TenantName) {
        if let Some(lane) = self.lanes.get(tenant) {
            self.order.remove(&(lane.time, tenant.clone()));
            self.idle.insert((lane.time, tenant.clone()));
        }
    }

    /// Drops idle lanes that are no longer ahead of anybody.
    fn forget_the_caught_up(&mut self) {
        while let Some((time, tenant)) = self.idle.first().cloned()
            && time <= self.now
        {
            self.idle.pop_first();
            let Some(lane) = self.lanes.get_mut(&tenant) else { continue };
            match std::mem::take(&mut lane.owed) {
                0 => drop(self.lanes.remove(&tenant)),
                owed => {
                    lane.time = time.saturating_add(owed);
                    self.idle.insert((lane.time, tenant));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(number: usize) -> TenantName {
        format!("t{number}").parse().unwrap()
    }

    /// Takes one out and charges its tenant for it.
    fn serve(queue: &mut Queue<(usize, usize)>) -> Option<usize> {
        let (tenant, rows) = queue.pop()?;
        queue.charge(&name(tenant), rows);
        Some(tenant)
    }

    #[test]
    fn a_newcomer_is_behind_one_of_a_thousand_at_most() {
        for (greedy, newcomer) in [(0, 1), (1, 0)] {
            let mut queue = Queue::default();
            (0..1_000).for_each(|_| queue.push(&name(greedy), (greedy, 50)));
            (0..10).for_each(|_| assert!(serve(&mut queue).is_some()));
            queue.push(&name(newcomer), (newcomer, 5_000));
            let turns = (0..).take_while(|_| serve(&mut queue) != Some(newcomer)).count();
            assert!(turns <= 1, "{turns} turns before t{newcomer}");
            // Its rows were many: as many are the other's now.
            queue.push(&name(newcomer), (newcomer, 1));
            let turns = (0..).take_while(|_| serve(&mut queue) != Some(newcomer)).count();
            assert!((99..=101).contains(&turns), "{turns} turns of 50 for one of 5,000");
        }
    }

    #[test]
    fn in_one_lane_the_first_to_come_is_the_first_to_go() {
        let mut queue = Queue::default();
        (0..5).for_each(|rows| queue.push(&name(0), (0, rows)));
        queue.remove(|(_, rows)| *rows == 2);
        assert_eq!(queue.front_mut(), Some(&mut (0, 0)));
        let order: Vec<usize> = std::iter::from_fn(|| queue.pop()).map(|(_, rows)| rows).collect();
        assert_eq!((order, queue.len()), (vec![0, 1, 3, 4], 0));
    }

    #[test]
    fn tenants_that_always_wait_get_the_same_rows_whatever_their_sequences_are_like() {
        for seed in 1..=40_u64 {
            let mut draw = seed;
            let mut random = |below: u64| {
                draw = draw.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(seed | 1);
                usize::try_from((draw >> 33) % below).unwrap()
            };
            let tenants = 2 + random(5);
            let sizes: Vec<u64> = (0..tenants).map(|_| 1 + random(300) as u64).collect();
            let mut queue = Queue::default();
            let mut rows = vec![0; tenants];
            for tenant in (0..tenants).cycle().take(2 * tenants) {
                queue.push(&name(tenant), (tenant, 1 + random(sizes[tenant])));
            }
            for _ in 0..5_000 {
                let (tenant, size) = queue.pop().unwrap();
                queue.charge(&name(tenant), size);
                rows[tenant] += size;
                queue.push(&name(tenant), (tenant, 1 + random(sizes[tenant])));
            }
            let (least, most) = (rows.iter().min().unwrap(), rows.iter().max().unwrap());
            let largest = *sizes.iter().max().unwrap() as usize;
            assert!(most - least <= 2 * largest, "seed {seed}: {rows:?}, sizes up to {sizes:?}");
        }
    }

    #[test]
    fn whoever_was_away_is_owed_nothing_and_still_pays_what_it_had_too_much() {
        let mut queue = Queue::default();
        (0..300).for_each(|_| queue.push(&name(0), (0, 10)));
        queue.push(&name(1), (1, 500));
        while serve(&mut queue) != Some(1) {}
        // It is 500 ahead; coming back at once does not help it.
        queue.push(&name(1), (1, 10));
        let turns = (0..).take_while(|_| serve(&mut queue) != Some(1)).count();
        assert!((49..=51).contains(&turns), "{turns}");
        // And after a long time away it has one turn, not all that it did not ask for.
        (0..100).for_each(|_| assert!(serve(&mut queue).is_some()));
        (0..10).for_each(|_| queue.push(&name(1), (1, 10)));
        let served: Vec<usize> = (0..10).filter_map(|_| serve(&mut queue)).collect();
        let its = served.iter().filter(|tenant| **tenant == 1).count();
        assert!((4..=6).contains(&its), "{served:?}");
    }

    #[test]
    fn lanes_do_not_pile_up() {
        let mut queue = Queue::default();
        queue.push(&name(0), (0, 1));
        for number in 1..4 * IDLE_MAX {
            queue.charge(&name(number), number);
        }
        assert_eq!((queue.lanes.len(), queue.idle.len()), (1 + IDLE_MAX, IDLE_MAX));
        queue.push(&name(1), (1, 1));
        for _ in 0..10 {
            let tenant = serve(&mut queue).unwrap();
            queue.charge(&name(tenant), 10_000_000);
            queue.push(&name(tenant), (tenant, 1));
        }
        assert_eq!(queue.lanes.len(), 2, "the others have been caught up with");
        assert_eq!(queue.order.len(), 2);
        (0..2).for_each(|_| assert!(queue.pop().is_some()));
        queue.reset();
        assert!(queue.lanes.is_empty() && queue.idle.is_empty());
    }
}
