//! How often each expert was used of late, by region: what nodes report, half of it forgotten with
//! each window that passes.

use std::collections::BTreeMap;

use entente_proto::ids::Region;
use entente_proto::placement::{ExpertKey, ModelShape};
use entente_router::placement::Loads;

/// Time in which half of what was counted is forgotten.
const WINDOW_MS: u64 = 60_000;
/// Rows of an expert, on average, before the counts mean anything: their noise, one over the root
/// of this, must be less than the twentieth for which the planner begins to move experts.
const ROWS_MIN: u64 = 400;

/// The counts.
#[derive(Debug, Clone)]
pub(super) struct Measured {
    window_ms: u64,
    regions: BTreeMap<Region, Loads>,
}

impl Measured {
    pub fn new(now_ms: u64) -> Self {
        Self { window_ms: now_ms, regions: BTreeMap::new() }
    }

    /// Adds what a node computed. What is not in the model is not counted.
    pub fn add(&mut self, region: Region, shape: &ModelShape, rows: &[(ExpertKey, u64)]) {
        let is_there = |(layer, expert): ExpertKey| {
            shape.layers.iter().any(|(other, experts)| *other == layer && expert.0 < *experts)
        };
        for (expert, rows) in rows.iter().filter(|(expert, _)| is_there(*expert)) {
            let load = self.regions.entry(region).or_default().entry(*expert).or_default();
            *load = load.saturating_add(*rows);
        }
    }

    /// Forgets.
    pub fn age(&mut self, now_ms: u64) {
        if now_ms < self.window_ms.saturating_add(WINDOW_MS) {
            return;
        }
        self.window_ms = now_ms;
        for loads in self.regions.values_mut() {
            loads.values_mut().for_each(|load| *load /= 2);
            loads.retain(|_, load| *load > 0);
        }
    }

    /// The loads of a region, once they mean something.
    pub fn loads(&self, region: Region, shape: &ModelShape) -> Option<&Loads> {
        let loads = self.regions.get(&region)?;
        let rows = loads.values().fold(0, |sum: u64, load| sum.saturating_add(*load));
        (rows >= shape.expert_count().saturating_mul(ROWS_MIN)).then_some(loads)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use entente_proto::ids::{ExpertId, LayerId};

    #[test]
    fn loads_count_once_they_are_more_than_noise_and_are_forgotten_by_halves() {
        let shape = ModelShape { layers: vec![(LayerId(0), 2)], expert_bytes: 1 };
        let region = "fr".parse().unwrap();
        let [first, other] = [0, 7].map(|n| (LayerId(0), ExpertId(n)));
        let mut measured = Measured::new(0);
        measured.add(region, &shape, &[(first, 799), (other, 9_999)]);
        assert_eq!(measured.loads(region, &shape), None, "799 rows, and some of no expert");
        measured.add(region, &shape, &[(first, 801)]);
        assert_eq!(measured.loads(region, &shape), Some(&[(first, 1_600)].into()));
        measured.age(WINDOW_MS - 1);
        measured.age(WINDOW_MS);
        assert_eq!(measured.loads(region, &shape), Some(&[(first, 800)].into()));
        assert_eq!(measured.loads("se".parse().unwrap(), &shape), None);
    }
}
