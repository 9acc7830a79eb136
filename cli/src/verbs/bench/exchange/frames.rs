//! Frames alone, through the link and the node and back: nobody rounds and nobody adds up.

use std::collections::BTreeMap;

use anyhow::{Context, bail};
use bytes::Bytes;
use entente_coordinator::link::Links;
use entente_proto::frame::{Assignment, Dispatch, Dtype};
use entente_proto::ids::{ExchangeId, LayerId, NodeId, RequestId};
use entente_proto::link::{LinkEvent, NodeInfo};
use tokio::runtime::Runtime;

use super::cluster::{Cluster, HIDDEN, PATIENCE};

/// Links to nodes, and the same rows for every frame.
pub struct Frames {
    links: Links,
    infos: BTreeMap<NodeId, NodeInfo>,
    rows: Bytes,
    next: u64,
    // Dropped last: links and nodes run on these.
    _runtimes: Vec<Runtime>,
}

impl Frames {
    /// Waits until all nodes are reached.
    pub fn new(cluster: Cluster) -> anyhow::Result<Self> {
        let Cluster { mut links, view, runtimes, .. } = cluster;
        let mut infos = BTreeMap::new();
        while infos.len() < view.nodes.len() {
            let Some((node, LinkEvent::Up { info, .. })) = links.next(PATIENCE) else {
                bail!("a node could not be reached");
            };
            infos.insert(node, info);
        }
        Ok(Self { links, infos, rows: Bytes::new(), next: 0, _runtimes: runtimes })
    }

    /// One frame with `bytes` of rows to each node; returns when each has answered.
    pub fn run(&mut self, bytes: usize) -> anyhow::Result<()> {
        if self.rows.len() != bytes {
            self.rows = vec![1; bytes].into();
        }
        self.next += 1;
        for (node, info) in &self.infos {
            let frame = self.frame(info)?;
            self.links.send(*node, frame)?;
        }
        for _ in 0..self.infos.len() {
            let Some((_, LinkEvent::Answer(answer))) = self.links.next(PATIENCE) else {
                bail!("a link broke");
            };
            let answered = answer.result?;
            anyhow::ensure!(answered.len() == bytes, "an answer has {} bytes", answered.len());
        }
        Ok(())
    }

    fn frame(&self, info: &NodeInfo) -> anyhow::Result<Dispatch> {
        let dtype = Dtype::F32;
        let expert = info.experts.first().context("a node holds no expert")?.1;
        let count = self.rows.len() / (HIDDEN * dtype.size());
        Ok(Dispatch {
            exchange: ExchangeId(self.next),
            fence: info.fence,
            layer: LayerId(0),
            allowed_regions: [info.region].into(),
            deadline_ms: PATIENCE.as_millis() as u32,
            dtype,
            hidden: HIDDEN,
            assignments: (0..count).map(|row| Assignment { row: row as u16, expert }).collect(),
            requests: vec![(RequestId(0), count as u32)],
            rows: self.rows.clone(),
        })
    }
}
