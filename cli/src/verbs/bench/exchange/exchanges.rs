//! Whole exchanges, as the engine makes them: rows are rounded, planned, sent, and what comes back
//! is weighted and added up.

use std::sync::Arc;

use entente_coordinator::engine::Readiness;
use entente_coordinator::engine::cluster::Cluster as Nodes;
use entente_coordinator::engine::exchanger::{Exchanger, Rows};
use entente_coordinator::metrics::Metrics;
use entente_model::kernels::Kernels;
use entente_proto::ids::{ExpertId, LayerId, RequestId};
use entente_router::exchange::Owners;
use entente_router::gate::Choice;
use tokio::runtime::Runtime;

use super::cluster::{Cluster, HIDDEN, PATIENCE};

/// A coordinator's exchanger and rows to send.
pub struct Exchanges {
    exchanger: Exchanger,
    kernels: Arc<dyn Kernels>,
    /// One expert of each node, in ascending order: each row goes to every node once.
    experts: Vec<ExpertId>,
    values: Vec<f32>,
    sums: Vec<f32>,
    // Dropped last: links and nodes run on these.
    _runtimes: Vec<Runtime>,
}

impl Exchanges {
    /// Waits until all nodes are reached.
    pub fn new(cluster: Cluster) -> anyhow::Result<Self> {
        let Cluster { links, view, kernels, runtimes } = cluster;
        let first = |node| view.placement.experts_of(node).first().map(|(_, expert)| *expert);
        let mut experts: Vec<_> = view.nodes.keys().filter_map(|node| first(*node)).collect();
        experts.sort_unstable();
        let metrics = Arc::new(Metrics::new());
        let nodes = Nodes::fixed(links, view, metrics.clone());
        let mut exchanger = Exchanger::new(nodes, kernels.clone(), PATIENCE, metrics);
        let readiness = exchanger.readiness();
        while *readiness.borrow() != Readiness::Ready {
            exchanger.idle(None);
        }
        let (values, sums) = (Vec::new(), Vec::new());
        Ok(Self { exchanger, kernels, experts, values, sums, _runtimes: runtimes })
    }

    /// One exchange with `bytes` of rows to each node and back.
    pub fn run(&mut self, bytes: usize) -> anyhow::Result<()> {
        let count = bytes / (HIDDEN * size_of::<u16>());
        self.values.resize(count * HIDDEN, 1.0);
        self.sums.resize(count * HIDDEN, 0.0);
        let choice = |expert: &ExpertId| Choice { expert: *expert, weight: 0.5 };
        let of_row: Vec<Choice> = self.experts.iter().map(choice).collect();
        let mut buffer = self.exchanger.buffer(self.values.len());
        self.kernels.encode_rows(&self.values, buffer.rows());
        let rows = Rows {
            layer: LayerId(0),
            hidden: HIDDEN,
            buffer,
            choices: of_row.repeat(count),
            top_k: of_row.len(),
            first_row: 0,
            count,
        };
        let home = self.exchanger.home();
        let owners = Owners { policies: vec![[home].into()], owners: vec![(RequestId(0), 0)] };
        self.exchanger.begin_step(owners, vec![0; count]);
        let in_flight = self.exchanger.start(rows);
        let finished = self.exchanger.finish(in_flight, &mut self.sums);
        self.exchanger.end_step();
        Ok(finished?)
    }
}
