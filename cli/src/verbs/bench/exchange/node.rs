//! Expert nodes whose kernels copy, and links to them.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use bytes::{Bytes, BytesMut};
use entente_coordinator::link::grpc::GrpcLink;
use entente_coordinator::link::{Links, Peer};
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
use entente_proto::link::{LinkEvent, NodeInfo};
use entente_tls::{ALPN_GRPC, ALPN_STREAM};
use tokio::runtime::Runtime;

use super::Tls;
use crate::cluster::plan::Transport;

/// Rows of 4 KiB in bf16, as large models have.
const HIDDEN: usize = 2_048;
/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// Every node's name: each is the only one of its cluster.
pub const NAME: &str = "fr-expert-1";

/// Nodes and the links to them. The nodes end with their runtimes.
pub struct Nodes {
    links: Links,
    infos: BTreeMap<NodeId, NodeInfo>,
    dtype: Dtype,
    buffers: Buffers,
    next: u64,
    // Dropped last: links and nodes run on these.
    _runtimes: Vec<Runtime>,
}

/// What a coordinator keeps from one exchange to the next.
#[derive(Default)]
struct Buffers {
    values: Vec<f32>,
    encoded: BytesMut,
    /// The same rows for each frame that nobody rounds.
    rows: Bytes,
    answer: Vec<f32>,
}

impl Nodes {
    /// Starts `count` nodes and waits for the links to them. Each node holds one layer's experts of
    /// a made-up model, which its kernels ignore.
    pub fn start(
        count: usize,
        transport: Transport,
        tls: Option<&Tls>,
        dtype: Dtype,
    ) -> anyhow::Result<Self> {
        let dir = tempfile::tempdir().context("cannot make a temporary folder")?;
        let shape =
            Shape { hidden: HIDDEN, inner: 2, layers: 1, heads: 16, vocab: 259, ..Shape::TINY };
        synth::write(dir.path(), &shape, 1, &|_, _| {})?;
        let checkpoint = Checkpoint::open(dir.path())?;
        let near = runtime()?;
        let (mut links, mut infos, mut runtimes) = (Links::new()?, BTreeMap::new(), Vec::new());
        for number in 0..count as u32 {
            let (node, far) = (NodeId(number), runtime()?);
            let handle = start_node(&checkpoint, dtype)?;
            if transport == Transport::Inproc {
                let link = InprocLink::open(node, handle, links.mailbox());
                links.add(node, Box::new(link));
            } else {
                let address = serve_node(&far, handle, tls)?;
                open_link(&mut links, node, transport, address, tls, &near)?;
            }
            let Some((_, LinkEvent::Up(info))) = links.next(PATIENCE) else {
                bail!("a node could not be reached");
            };
            infos.insert(node, info);
            runtimes.push(far);
        }
        runtimes.push(near);
        Ok(Self { links, infos, dtype, buffers: Buffers::default(), next: 0, _runtimes: runtimes })
    }

    /// One frame with `bytes` of rows to each node; returns when each has answered.
    pub fn frames(&mut self, bytes: usize) -> anyhow::Result<()> {
        if self.buffers.rows.len() != bytes {
            self.buffers.rows = vec![1; bytes].into();
        }
        self.next += 1;
        let frame = self.frame(self.buffers.rows.clone());
        self.send_all(|_| Ok(frame.clone()))?;
        self.receive_all(bytes, |_, _| {})
    }

    /// The same with what a coordinator does besides: it rounds the rows to each node, widens what
    /// comes back and adds it up.
    pub fn exchange(&mut self, bytes: usize) -> anyhow::Result<()> {
        let count = bytes / self.dtype.size();
        self.buffers.values.resize(count, 1.0);
        self.buffers.answer.resize(count, 0.0);
        self.next += 1;
        let mut sums = std::mem::take(&mut self.buffers.values);
        let template = self.frame(Bytes::new());
        let assignments = self.assignments(bytes);
        let dtype = self.dtype;
        self.send_all(|buffers| {
            buffers.encoded.resize(bytes, 0);
            dtype.encode_into(&sums, &mut buffers.encoded);
            let rows = buffers.encoded.split().freeze();
            Ok(Dispatch { rows, assignments: assignments.clone(), ..template.clone() })
        })?;
        let done = self.receive_all(bytes, |buffers, rows| {
            dtype.decode(rows, &mut buffers.answer);
            sums.iter_mut().zip(&buffers.answer).for_each(|(sum, value)| *sum += 0.5 * value);
        });
        sums.fill(1.0);
        self.buffers.values = sums;
        done
    }

    fn assignments(&self, bytes: usize) -> Vec<Assignment> {
        let rows = bytes / (HIDDEN * self.dtype.size());
        let expert = self.infos.values().next().and_then(|info| info.experts.first());
        let expert = expert.map_or(ExpertId(0), |(_, expert)| *expert);
        (0..rows).map(|row| Assignment { row: row as u16, expert }).collect()
    }

    /// A frame to no node in particular: [`Nodes::send_all`] gives it its fence.
    fn frame(&self, rows: Bytes) -> Dispatch {
        let fence = self.infos[&NodeId(0)].fence;
        Dispatch {
            exchange: ExchangeId(self.next),
            fence,
            layer: LayerId(0),
            allowed_regions: self.infos.values().map(|info| info.region).collect(),
            deadline_ms: PATIENCE.as_millis() as u32,
            dtype: self.dtype,
            hidden: HIDDEN,
            assignments: self.assignments(rows.len()),
            rows,
        }
    }

    fn send_all(
        &mut self,
        mut frame: impl FnMut(&mut Buffers) -> anyhow::Result<Dispatch>,
    ) -> anyhow::Result<()> {
        for (node, info) in &self.infos {
            let frame = Dispatch { fence: info.fence, ..frame(&mut self.buffers)? };
            self.links.send(*node, frame)?;
        }
        Ok(())
    }

    fn receive_all(
        &mut self,
        bytes: usize,
        mut on_rows: impl FnMut(&mut Buffers, &[u8]),
    ) -> anyhow::Result<()> {
        for _ in 0..self.infos.len() {
            let Some((_, LinkEvent::Answer(answer))) = self.links.next(PATIENCE) else {
                bail!("a link broke");
            };
            let answered = answer.result?;
            anyhow::ensure!(answered.len() == bytes, "an answer has {} bytes", answered.len());
            on_rows(&mut self.buffers, &answered);
        }
        Ok(())
    }
}

fn runtime() -> anyhow::Result<Runtime> {
    let mut workers = tokio::runtime::Builder::new_multi_thread();
    workers.worker_threads(1).enable_all().build().context("cannot start a runtime")
}

/// The cluster of each node.
pub fn roster() -> anyhow::Result<Roster> {
    let (name, region) = (NAME.parse()?, "fr".parse()?);
    let node = RosterNode { name, region, address: "127.0.0.1:1".to_owned() };
    Ok(Roster::new("bench".to_owned(), 1, vec![node])?)
}

/// A node that holds every expert of the checkpoint.
fn start_node(checkpoint: &Checkpoint, dtype: Dtype) -> anyhow::Result<NodeHandle> {
    let format = match dtype {
        Dtype::F32 => WeightFormat::F32,
        Dtype::Bf16 => WeightFormat::Bf16,
    };
    let state = found(&roster()?, checkpoint, format)?;
    let kernels = Arc::new(Copying(kernels::select(format, 1)?));
    Ok(ExpertNode::start(&NAME.parse()?, &state, checkpoint, kernels, &())?)
}

/// Serves a node on a free port and says where.
fn serve_node(on: &Runtime, node: NodeHandle, tls: Option<&Tls>) -> anyhow::Result<String> {
    let listener = on.block_on(tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))?;
    let address = listener.local_addr()?.to_string();
    let credentials = tls.map(|tls| tls.node.clone());
    on.spawn(
        async move { serve(node, listener, credentials.as_ref(), std::future::pending()).await },
    );
    Ok(address)
}

fn open_link(
    links: &mut Links,
    node: NodeId,
    transport: Transport,
    address: String,
    tls: Option<&Tls>,
    runtime: &Runtime,
) -> anyhow::Result<()> {
    let alpn = if transport == Transport::Grpc { ALPN_GRPC } else { ALPN_STREAM };
    let tls = tls.map(|tls| tls.client(&[alpn])).transpose()?;
    let peer = Peer { node, name: NAME.parse()?, address, tls };
    if transport == Transport::Grpc {
        let link = GrpcLink::open(peer, links.mailbox(), runtime.handle());
        links.add(node, Box::new(link));
    } else {
        links.dial(peer)?;
    }
    Ok(())
}

/// Kernels whose experts give back what they get.
struct Copying(Arc<dyn Kernels>);

impl Kernels for Copying {
    fn class(&self) -> &KernelClass {
        self.0.class()
    }

    fn format(&self) -> WeightFormat {
        self.0.format()
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

    fn add(&self, x: &mut [f32], delta: &[f32]) {
        self.0.add(x, delta);
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
