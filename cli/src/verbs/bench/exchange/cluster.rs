//! A cluster whose expert nodes copy, and links to them.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use entente_coordinator::engine::cluster::committed;
use entente_coordinator::link::grpc::GrpcLink;
use entente_coordinator::link::{Links, Peer};
use entente_expert_node::inproc::InprocLink;
use entente_expert_node::{ExpertNode, NodeHandle, found, serve};
use entente_membership::roster::{Roster, RosterNode};
use entente_membership::state::{Node, State};
use entente_model::Checkpoint;
use entente_model::kernels::{self, Kernels, WeightFormat};
use entente_model::synth::{self, Shape};
use entente_proto::frame::Dtype;
use entente_proto::ids::{NodeId, NodeName};
use entente_router::view::{ClusterView, Model};
use entente_tls::{ALPN_GRPC, ALPN_STREAM};
use tokio::runtime::Runtime;

use super::Tls;
use super::copying::Copying;
use crate::cluster::plan::Transport;
use crate::verbs::bench::limits;

/// Rows of 4 KiB in bf16, as large models have.
pub const HIDDEN: usize = 2_048;
/// How long anything may take.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Nodes that share the experts of one layer of a made-up model. They end with their runtimes.
pub struct Cluster {
    /// Links to all of them.
    pub links: Links,
    /// What their coordinator believes before any link is up.
    pub view: ClusterView,
    /// What it computes with, on all cores.
    pub kernels: Arc<dyn Kernels>,
    /// What links and nodes run on, to be dropped last.
    pub runtimes: Vec<Runtime>,
}

impl Cluster {
    /// Starts `count` nodes and begins to dial them.
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
        let format = match dtype {
            Dtype::F32 => WeightFormat::F32,
            Dtype::Bf16 => WeightFormat::Bf16,
        };
        let state = found(&roster(count)?, &checkpoint, format)?;
        let near = runtime()?;
        let (mut links, mut runtimes) = (Links::new()?, Vec::new());
        for node in state.nodes() {
            let kernels = Arc::new(Copying(kernels::select(format, 1)?));
            let handle = ExpertNode::start(&node.spec.name, &state, &checkpoint, kernels, &())?;
            if transport == Transport::Inproc {
                let id = node.id;
                links.add(id, |mailbox| Box::new(InprocLink::open(id, handle, mailbox)));
                continue;
            }
            let far = runtime()?;
            let address = serve_node(&far, &node.spec.name, handle, tls)?;
            open_link(&mut links, node, transport, address, tls, &near)?;
            runtimes.push(far);
        }
        runtimes.push(near);
        let kernels = kernels::select(format, limits::threads(None))?;
        let view = view(&state, &checkpoint, kernels.as_ref())?;
        Ok(Self { links, view, kernels, runtimes })
    }
}

fn view(
    state: &State,
    checkpoint: &Checkpoint,
    kernels: &dyn Kernels,
) -> anyhow::Result<ClusterView> {
    let model = Model {
        digest: checkpoint.digest(),
        kernel_class: kernels.class().clone(),
        layers: checkpoint.architecture().moe_layers().collect(),
    };
    Ok(ClusterView::new("fr".parse()?, model, committed(state)))
}

fn runtime() -> anyhow::Result<Runtime> {
    let mut workers = tokio::runtime::Builder::new_multi_thread();
    workers.worker_threads(1).enable_all().build().context("cannot start a runtime")
}

/// The nodes by name. Where they are dialled is found out later, so their addresses say nothing.
pub fn roster(count: usize) -> anyhow::Result<Roster> {
    let node = |number: usize| {
        let (name, region) = (format!("fr-expert-{number}").parse()?, "fr".parse()?);
        anyhow::Ok(RosterNode { name, region, address: format!("127.0.0.1:{number}") })
    };
    let nodes = (1..=count).map(node).collect::<Result<_, _>>()?;
    Ok(Roster::new("bench".to_owned(), 1, nodes)?)
}

/// Serves a node on a free port and says where.
fn serve_node(
    on: &Runtime,
    name: &NodeName,
    node: NodeHandle,
    tls: Option<&Tls>,
) -> anyhow::Result<String> {
    let listener = on.block_on(tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))?;
    let address = listener.local_addr()?.to_string();
    let credentials = tls.map(|tls| tls.node(name)).transpose()?;
    on.spawn(async move {
        serve(node, listener, credentials.map(Into::into), std::future::pending()).await
    });
    Ok(address)
}

fn open_link(
    links: &mut Links,
    node: &Node,
    transport: Transport,
    address: String,
    tls: Option<&Tls>,
    runtime: &Runtime,
) -> anyhow::Result<()> {
    let alpn = if transport == Transport::Grpc { ALPN_GRPC } else { ALPN_STREAM };
    let tls = tls.map(|tls| tls.client(&[alpn])).transpose()?;
    let id: NodeId = node.id;
    let peer = Peer { node: id, name: node.spec.name.clone(), address, tls };
    if transport == Transport::Grpc {
        links.add(id, |mailbox| Box::new(GrpcLink::open(peer, mailbox, runtime.handle())));
    } else {
        links.dial(peer)?;
    }
    Ok(())
}
