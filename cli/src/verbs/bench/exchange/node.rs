//! Expert nodes whose kernels copy, and links to them.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use anyhow::{Context, bail};
use entente_coordinator::link::grpc::GrpcLink;
use entente_coordinator::link::stream::StreamLink;
use entente_expert_node::inproc::InprocLink;
use entente_expert_node::{ExpertNode, NodeHandle, found, serve};
use entente_membership::roster::{Roster, RosterNode};
use entente_model::Checkpoint;
use entente_model::kernels::{
    self, AttentionRow, AttentionShape, FfnGroup, Kernels, KvLayer, Matrix, MatrixSource,
    WeightFormat,
};
use entente_model::synth::{self, Shape};
use entente_proto::frame::{Assignment, Dispatch, Dtype};
use entente_proto::ids::{ExchangeId, ExpertId, KernelClass, LayerId, NodeId};
use entente_proto::link::{Link, LinkEvent, LinkEvents, NodeInfo};
use tokio::runtime::Runtime;

use crate::cluster::plan::Transport;

/// Rows of 4 KiB in bf16, as large models have.
const HIDDEN: usize = 2_048;
/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// Events that wait; there are never more than a few in flight.
const EVENTS_LEN_MAX: usize = 64;

/// What links report.
type Events = (NodeId, LinkEvent);

struct Sink(SyncSender<Events>);

impl LinkEvents for Sink {
    fn on_event(&self, node: NodeId, event: LinkEvent) {
        // The bench may be over.
        let _ = self.0.try_send((node, event));
    }
}

/// Nodes and the links to them. The nodes end with their runtimes.
pub struct Nodes {
    links: Vec<(Box<dyn Link>, NodeInfo)>,
    events: Receiver<Events>,
    next: u64,
    // Dropped last: links and nodes run on these.
    _runtimes: Vec<Runtime>,
}

impl Nodes {
    /// Starts `count` nodes and waits for the links to them. Each node holds one layer's experts of
    /// a made-up model, which its kernels ignore.
    pub fn start(count: usize, transport: Transport) -> anyhow::Result<Self> {
        let dir = tempfile::tempdir().context("cannot make a temporary folder")?;
        let shape =
            Shape { hidden: HIDDEN, inner: 2, layers: 1, heads: 16, vocab: 259, ..Shape::TINY };
        synth::write(dir.path(), &shape, 1, &|_, _| {})?;
        let checkpoint = Checkpoint::open(dir.path())?;
        let runtime = || {
            let workers =
                tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
            workers.context("cannot start a runtime")
        };
        let (sender, events) = sync_channel(EVENTS_LEN_MAX);
        let sink = Arc::new(Sink(sender));
        let near = runtime()?;
        let mut runtimes = Vec::new();
        let mut links = Vec::new();
        for number in 0..count as u32 {
            let (id, far) = (NodeId(number), runtime()?);
            let (node, name) = start_node(&checkpoint)?;
            let listener = far.block_on(tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))?;
            let address = listener.local_addr()?.to_string();
            far.spawn(serve(node.clone(), listener, std::future::pending()));
            let sink = sink.clone();
            let link: Box<dyn Link> = match transport {
                Transport::Stream => Box::new(StreamLink::open(id, name, address, sink)?),
                Transport::Grpc => Box::new(GrpcLink::open(id, name, address, sink, near.handle())),
                Transport::Inproc => Box::new(InprocLink::open(id, node, sink)),
            };
            let (_, LinkEvent::Up(info)) = events.recv_timeout(PATIENCE)? else {
                bail!("a node could not be reached");
            };
            links.push((link, info));
            runtimes.push(far);
        }
        runtimes.push(near);
        Ok(Self { links, events, next: 0, _runtimes: runtimes })
    }

    /// One frame with `bytes` of rows to each node; returns when each has answered.
    pub fn exchange(&mut self, bytes: usize) -> anyhow::Result<()> {
        let rows = bytes / (HIDDEN * Dtype::Bf16.size());
        let values = vec![1; bytes];
        let rows_bytes = bytes::Bytes::from(values);
        self.next += 1;
        for (link, info) in &self.links {
            let expert = info.experts.first().map_or(ExpertId(0), |(_, expert)| *expert);
            let assignment = |row| Assignment { row: row as u16, expert };
            let frame = Dispatch {
                exchange: ExchangeId(self.next),
                fence: info.fence,
                layer: LayerId(0),
                allowed_regions: [info.region].into(),
                deadline_ms: PATIENCE.as_millis() as u32,
                dtype: Dtype::Bf16,
                hidden: HIDDEN,
                assignments: (0..rows).map(assignment).collect(),
                rows: rows_bytes.clone(),
            };
            link.send(frame)?;
        }
        for _ in &self.links {
            let (_, LinkEvent::Answer(answer)) = self.events.recv_timeout(PATIENCE)? else {
                bail!("a link broke");
            };
            let answered = answer.result?;
            anyhow::ensure!(answered.len() == bytes, "an answer has {} bytes", answered.len());
        }
        Ok(())
    }
}

/// A node that holds every expert of the checkpoint, as the only one of its cluster.
fn start_node(
    checkpoint: &Checkpoint,
) -> anyhow::Result<(NodeHandle, entente_proto::ids::NodeName)> {
    let name: entente_proto::ids::NodeName = "fr-expert-1".parse()?;
    let region = "fr".parse()?;
    let node = RosterNode { name: name.clone(), region, address: "127.0.0.1:1".to_owned() };
    let roster = Roster::new("bench".to_owned(), 1, vec![node])?;
    let state = found(&roster, checkpoint, WeightFormat::Bf16)?;
    let kernels = Arc::new(Copying(kernels::select(WeightFormat::Bf16, 1)?));
    Ok((ExpertNode::start(&name, &state, checkpoint, kernels, &())?, name))
}

/// Kernels whose experts give back what they get.
struct Copying(Arc<dyn Kernels>);

impl Kernels for Copying {
    fn class(&self) -> &KernelClass {
        self.0.class()
    }

    fn row_dtype(&self) -> Dtype {
        self.0.row_dtype()
    }

    fn pack(&self, source: MatrixSource<'_>) -> Matrix {
        self.0.pack(source)
    }

    fn pack_f32(&self, source: MatrixSource<'_>) -> Matrix {
        self.0.pack_f32(source)
    }

    fn matmul(&self, x: &[f32], w: &Matrix, y: &mut [f32]) {
        self.0.matmul(x, w, y);
    }

    fn gated_ffn(&self, x: &[f32], groups: &[FfnGroup<'_>], y: &mut [f32]) {
        for (from, to) in groups.iter().flat_map(|group| group.rows) {
            let (from, to) = (*from as usize * HIDDEN, *to as usize * HIDDEN);
            y[to..to + HIDDEN].copy_from_slice(&x[from..from + HIDDEN]);
        }
    }

    fn gated_ffn_encoded(&self, x: &[&[u8]], groups: &[FfnGroup<'_>], y: &mut [u8]) {
        let len = HIDDEN * self.row_dtype().size();
        for (from, to) in groups.iter().flat_map(|group| group.rows) {
            y[*to as usize * len..][..len].copy_from_slice(x[*from as usize]);
        }
    }

    fn add_weighted(&self, parts: &[(f32, &[u8])], y: &mut [f32]) {
        self.0.add_weighted(parts, y);
    }

    fn rms_norm(&self, x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
        self.0.rms_norm(x, weight, eps, y);
    }

    fn rope(&self, x: &mut [f32], heads: usize, head_dim: usize, cos: &[f32], sin: &[f32]) {
        self.0.rope(x, heads, head_dim, cos, sin);
    }

    fn write_kv(&self, cache: &mut KvLayer, slots: &[usize], k: &[f32], v: &[f32]) {
        self.0.write_kv(cache, slots, k, v);
    }

    fn attention(
        &self,
        shape: &AttentionShape,
        q: &[f32],
        rows: &[AttentionRow<'_>],
        cache: &KvLayer,
        out: &mut [f32],
    ) {
        self.0.attention(shape, q, rows, cache, out);
    }
}
