//! What an exchange costs apart from the experts: gating, planning frames, taking answers.
//!
//! Rows of 1,024 bf16 values through the top 2 of 8 experts on 4 nodes, as for the mid checkpoint.
//! `cargo bench -p entente-router --bench exchange`. Throughput counts rows.

// The macros of criterion make functions without documentation.
#![allow(missing_docs)]

use std::hint::black_box;
use std::sync::Arc;

use bytes::Bytes;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use entente_proto::frame::{Answer, Dtype};
use entente_proto::ids::{
    Incarnation, KernelClass, LayerId, MembershipEpoch, ModelDigest, NodeId, PlacementEpoch,
    Region, RequestId,
};
use entente_proto::placement::{ModelShape, PlacementNode};
use entente_router::exchange::{Command, Job, Owners};
use entente_router::exchanges::Exchanges;
use entente_router::gate::{self, Choice, GateSpec};
use entente_router::placement;
use entente_router::view::{ClusterView, Member, Model, NodeView};

const HIDDEN: usize = 1_024;
const NODES: u32 = 4;
const GATE: GateSpec = GateSpec { experts: 8, top_k: 2, renormalise: true };
const LAYER: LayerId = LayerId(0);
/// Decoding alone, decoding together, prefill.
const ROWS: [usize; 3] = [1, 32, 512];

/// The kernels of everybody here.
fn class() -> KernelClass {
    KernelClass("f32/test/1".to_owned())
}

fn view() -> ClusterView {
    let home: Region = "fr".parse().expect("a region");
    let nodes: Vec<PlacementNode> = (0..NODES)
        .map(|id| PlacementNode { id: NodeId(id), region: home, memory_bytes: None })
        .collect();
    let shape = ModelShape { layers: vec![(LAYER, GATE.experts as u16)], expert_bytes: 1 };
    let placement = placement::plan(&nodes, &shape, 1).expect("room for all");
    let live = |node: &PlacementNode| {
        let name = format!("fr-expert-{}", node.id).parse().expect("a name");
        let member =
            Member { name, region: home, serves: true, incarnation: None, kernel_class: class() };
        (node.id, NodeView { member, linked: Some(Incarnation(1)), kernel_class: class(), rank: 0 })
    };
    ClusterView {
        home,
        model: Model {
            digest: ModelDigest([1; 32]),
            kernel_class: class(),
            layers: [(LAYER, GATE.experts as u16)].into(),
        },
        membership_epoch: MembershipEpoch(1),
        placement_epoch: PlacementEpoch(1),
        nodes: nodes.iter().map(live).collect(),
        placement: Arc::new(placement),
    }
}

fn logits(rows: usize) -> Vec<f32> {
    (0..rows * GATE.experts).map(|i| ((i * 7_919) % 2_003) as f32 / 500.0).collect()
}

fn choices(rows: usize) -> Vec<Choice> {
    let mut choices = Vec::new();
    gate::choose(&GATE, &logits(rows), &mut choices);
    choices
}

fn gating(c: &mut Criterion) {
    let mut group = c.benchmark_group("gate");
    for rows in ROWS {
        let (logits, mut choices) = (logits(rows), Vec::new());
        group.throughput(Throughput::Elements(rows as u64));
        group.bench_function(BenchmarkId::from_parameter(rows), |b| {
            b.iter(|| {
                choices.clear();
                gate::choose(&GATE, black_box(&logits), &mut choices);
            });
        });
    }
}

/// From the rows of a layer to the weighted parts that are to be added up.
fn exchange(c: &mut Criterion) {
    let (view, mut exchanges) = (view(), Exchanges::new());
    let mut group = c.benchmark_group("exchange");
    for rows in ROWS {
        let (bytes, choices) = (Bytes::from(vec![0; rows * HIDDEN * 2]), choices(rows));
        // Each row is another request's, which is the most work.
        let owners = Arc::new(Owners {
            policies: vec![[view.home].into()],
            owners: (0..rows).map(|row| (RequestId(row as u128), 0)).collect(),
        });
        group.throughput(Throughput::Elements(rows as u64));
        group.bench_function(BenchmarkId::from_parameter(rows), |b| {
            b.iter(|| {
                let job = Job {
                    layer: LAYER,
                    hidden: HIDDEN,
                    dtype: Dtype::Bf16,
                    rows: bytes.clone(),
                    choices: choices.clone(),
                    top_k: GATE.top_k,
                    owners: owners.clone(),
                    owner_of_row: (0..rows).map(|row| row as u16).collect(),
                    stranded_max_us: 1_000_000,
                    deadline_us: 1_000_000,
                };
                let (ticket, commands) = exchanges.start(job, &view, 0);
                for Command::Send { node, frame, .. } in commands {
                    // Nodes that answer with as many zeros as are expected, out of memory that
                    // is there already.
                    let result = Ok(bytes_of(&bytes, frame.answer_len()));
                    let (exchange, fence) = (frame.exchange, Some(frame.fence));
                    exchanges.on_answer(&view, node, Answer { exchange, fence, result }, 100);
                }
                let done = exchanges.take(ticket).expect("it is in flight");
                assert_eq!(black_box(done.parts()).len(), rows * GATE.top_k);
            });
        });
    }
}

/// `len` bytes; those of the rows where they suffice.
fn bytes_of(rows: &Bytes, len: usize) -> Bytes {
    if len <= rows.len() { rows.slice(..len) } else { Bytes::from(vec![0; len]) }
}

criterion_group!(benches, gating, exchange);
criterion_main!(benches);
