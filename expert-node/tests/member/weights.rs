//! A node whose model folder has no weights, among peers that have them, or say so.

use std::collections::BTreeSet;
use std::fs;
use std::net::TcpListener;
use std::path::Path;

use entente_expert_node::{Config, ExpertNode, serve};
use entente_membership::audit::Sink;
use entente_membership::guard::Guard;
use entente_membership::net::{Bounds, accept};
use entente_membership::roster::{Roster, RosterNode};
use entente_model::kernels::{self, PANELS_VERSION, WeightFormat};
use entente_model::{Checkpoint, load_expert, packed};
use entente_proto::identity::{Expected, Role};
use entente_proto::ids::{ExpertId, LayerId, NodeName};
use entente_proto::placement::ExpertKey;
use entente_proto::wire;
use entente_proto::wire::exchange_client::ExchangeClient;
use entente_proto::wire::exchange_server::{Exchange, ExchangeServer};
use entente_tls::{Authority, Credentials, Roots};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Server;
use tonic::{Code, Request, Response, Status, Streaming};

use crate::peer::{Coordinator, frame};
use crate::plane::{experts, pack};
use crate::{CHECKPOINT, Cluster, HOUR};

const FORMAT: WeightFormat = WeightFormat::F32;

impl Cluster {
    fn issue(&self, region: &str, role: Role, name: &str) -> Credentials {
        let identity = format!("spiffe://test/region/{region}/role/{role}/node/{name}");
        let issuer = if region == "se" { &self.foreign } else { &self.authority };
        let issued = issuer.issue(&identity.parse().unwrap(), HOUR).unwrap();
        let authorities = [&self.authority, &self.foreign].map(Authority::certificate_pem);
        let roots = Roots::from_pem(authorities.concat().as_bytes()).unwrap();
        Credentials::new(roots, &issued.certificate_pem, &issued.key_pem).unwrap()
    }

    /// A listener at which the placement will have a peer with these experts.
    fn peer(&self, name: &str, held: &BTreeSet<ExpertKey>) -> TcpListener {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap().to_string();
        self.plane.add_peer(&name.parse().unwrap(), &address, held);
        listener
    }

    /// A node with the whole model, which says the truth. Returns how a coordinator reaches it.
    fn honest_peer(&self, name: &str, held: &BTreeSet<ExpertKey>) -> Coordinator {
        let listener = self.peer(name, held);
        let address = listener.local_addr().unwrap().to_string();
        let (node, region): (NodeName, _) = (name.parse().unwrap(), "fr".parse().unwrap());
        let listed = RosterNode { name: node.clone(), region, address: address.clone() };
        let roster = Roster::new("test".to_owned(), 1, vec![listed]).unwrap();
        let (model, listen) = (CHECKPOINT.into(), address.clone());
        let mut config = Config::new(node.clone(), region, listen, model, FORMAT, roster);
        config.threads = Some(1);
        let handle = ExpertNode::load(&config, &()).unwrap();
        let own = self.issue("fr", Role::Expert, name);
        tokio::spawn(async move {
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            serve(handle, listener, Some(own.into()), std::future::pending()).await
        });
        Coordinator { own: self.own.clone(), node, address }
    }

    /// A peer that sends other weights than it is asked for.
    fn lying_peer(&self, name: &str, held: &BTreeSet<ExpertKey>) {
        let listener = self.peer(name, held);
        let own = self.issue("fr", Role::Expert, name);
        tokio::spawn(async move {
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            let guard = Guard::new(own.identity(), Sink::default());
            let incoming = accept(listener, &own, guard, Bounds::default()).unwrap().members;
            let liar = ExchangeServer::new(Liar);
            Server::builder().serve_with_incoming(liar, incoming).await
        });
    }
}

/// Sends the next expert, which has as many bytes, in place of the one that is asked for.
struct Liar;

#[tonic::async_trait]
impl Exchange for Liar {
    type StreamStream = ReceiverStream<Result<wire::Combine, Status>>;
    type FetchStream = ReceiverStream<Result<wire::FetchPiece, Status>>;

    async fn settle(
        &self,
        _: Request<wire::SettleRequest>,
    ) -> Result<Response<wire::SignedStatement>, Status> {
        Err(Status::unimplemented("it only lies"))
    }

    async fn describe(
        &self,
        _: Request<wire::DescribeRequest>,
    ) -> Result<Response<wire::NodeInfo>, Status> {
        Err(Status::unimplemented("it only lies"))
    }

    async fn stream(
        &self,
        _: Request<Streaming<wire::Dispatch>>,
    ) -> Result<Response<Self::StreamStream>, Status> {
        Err(Status::unimplemented("it only lies"))
    }

    async fn fetch(
        &self,
        request: Request<wire::FetchRequest>,
    ) -> Result<Response<Self::FetchStream>, Status> {
        let wire::FetchRequest { layer, expert, .. } = request.into_inner();
        let other = (LayerId(layer as u16), ExpertId(expert as u16 + 1));
        let bytes = bytes_of(other).into();
        let (pieces, outgoing) = tokio::sync::mpsc::channel(1);
        pieces.send(Ok(wire::FetchPiece { bytes })).await.unwrap();
        Ok(Response::new(ReceiverStream::new(outgoing)))
    }
}

fn bytes_of((layer, expert): ExpertKey) -> Vec<u8> {
    let checkpoint = Checkpoint::open(CHECKPOINT.as_ref()).unwrap();
    let kernels = kernels::select(FORMAT, 1).unwrap();
    let expert = load_expert(&checkpoint, &*kernels, layer, expert).unwrap();
    expert.pieces(64).map(Result::unwrap).collect::<Vec<_>>().concat()
}

/// Writes what a node needs that has no weights.
fn thin(dir: &Path) {
    fs::copy(Path::new(CHECKPOINT).join("config.json"), dir.join("config.json")).unwrap();
    let checkpoint = Checkpoint::open(CHECKPOINT.as_ref()).unwrap();
    let kernels = kernels::select(FORMAT, 1).unwrap();
    packed::manifest(&checkpoint, &*kernels, &()).unwrap().write_into(dir).unwrap();
}

/// A cluster whose node has no weights in its model folder.
async fn thin_cluster() -> (Cluster, tempfile::TempDir) {
    let mut cluster = Cluster::new().await;
    let model = tempfile::tempdir().unwrap();
    thin(model.path());
    cluster.config.model = model.path().to_owned();
    (cluster, model)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_without_weights_gets_them_from_the_peer_that_sends_the_right_ones() {
    let (cluster, _model) = thin_cluster().await;
    let four = experts(0, 0..4);
    cluster.lying_peer("fr-expert-2", &four);
    let honest = cluster.honest_peer("fr-expert-3", &four);
    let _node = cluster.start_serving().await;
    let mut links = [cluster.coordinator.dial().await, honest.dial().await];
    assert_eq!(links[0].info.experts, four);
    assert_eq!(links[0].info.fence.model_digest, links[1].info.fence.model_digest);
    let asked = cluster.frame(&links[0].info, [0, 3]);
    let ours = links[0].ask(&asked).await.result.unwrap();
    let asked = frame(&links[1].info, [0, 3]);
    let theirs = links[1].ask(&asked).await.result.unwrap();
    assert_eq!(ours, theirs);
}

#[tokio::test(flavor = "multi_thread")]
async fn weights_that_are_not_those_of_the_manifest_never_serve() {
    let (cluster, _model) = thin_cluster().await;
    let four = experts(0, 0..4);
    cluster.lying_peer("fr-expert-2", &four);
    cluster.plane.want(&four);
    let _node = cluster.start();
    let report = cluster.plane.reported("failures", |report| !report.failed.is_empty()).await;
    assert_eq!(report.failed.len(), 4);
    for failure in &report.failed {
        let reason = &failure.reason;
        assert!(reason.contains("fr-expert-2: it sends other weights"), "{reason}");
    }
    assert_ne!(report.held.as_deref(), Some(&pack(&four)[..]));
    assert_eq!(cluster.coordinator.dial().await.info.experts, BTreeSet::new());
}

/// Who asks, for what, and what is answered.
async fn fetch(
    own: &Credentials,
    node: &Coordinator,
    request: wire::FetchRequest,
) -> Result<Vec<u8>, Status> {
    let cluster = own.identity().cluster.clone();
    let member = Some(("fr".parse().unwrap(), node.node.clone()));
    let expected = Expected { cluster, roles: vec![Role::Expert], member };
    let dialler = entente_membership::net::Dialler::expecting(own, expected).unwrap();
    let mut client = ExchangeClient::new(dialler.dial(&node.address).await.unwrap());
    let mut pieces = client.fetch(request).await?.into_inner();
    let mut bytes = Vec::new();
    while let Some(piece) = pieces.message().await? {
        bytes.extend(piece.bytes);
    }
    Ok(bytes)
}

#[tokio::test(flavor = "multi_thread")]
async fn weights_go_to_expert_nodes_of_the_region_and_to_nobody_else() {
    let cluster = Cluster::new().await;
    let node = cluster.honest_peer("fr-expert-2", &experts(0, 0..4));
    let digest = Checkpoint::open(CHECKPOINT.as_ref()).unwrap().digest();
    let request = wire::FetchRequest {
        model_digest: digest.0.to_vec().into(),
        layer: 2,
        expert: 7,
        weights: FORMAT.name().to_owned(),
        panels_version: PANELS_VERSION,
    };
    let peer = cluster.issue("fr", Role::Expert, "fr-expert-9");
    let bytes = fetch(&peer, &node, request.clone()).await.unwrap();
    assert!(bytes == bytes_of((LayerId(2), ExpertId(7))), "other weights");

    for (region, role) in [("se", Role::Expert), ("fr", Role::Coordinator)] {
        let stranger = cluster.issue(region, role, "stranger");
        let refused = fetch(&stranger, &node, request.clone()).await.unwrap_err();
        assert_eq!(refused.code(), Code::PermissionDenied, "{region} {role}: {refused}");
    }
    type Spoil = fn(&mut wire::FetchRequest);
    let cases: [(Code, Spoil); 5] = [
        (Code::FailedPrecondition, |r| r.model_digest = vec![1; 32].into()),
        (Code::FailedPrecondition, |r| r.weights = "q8".to_owned()),
        (Code::FailedPrecondition, |r| r.panels_version += 1),
        (Code::NotFound, |r| r.expert = 8),
        (Code::NotFound, |r| r.layer = u32::MAX),
    ];
    for (code, spoil) in cases {
        let mut request = request.clone();
        spoil(&mut request);
        let refused = fetch(&peer, &node, request).await.unwrap_err();
        assert_eq!(refused.code(), code, "{refused}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expert_node_may_not_send_rows_to_another() {
    let cluster = Cluster::new().await;
    let node = cluster.honest_peer("fr-expert-2", &experts(0, 0..4));
    let own = cluster.issue("fr", Role::Expert, "fr-expert-9");
    let cluster_name = own.identity().cluster.clone();
    let expected = Expected { cluster: cluster_name, roles: vec![Role::Expert], member: None };
    let dialler = entente_membership::net::Dialler::expecting(&own, expected).unwrap();
    let mut client = ExchangeClient::new(dialler.dial(&node.address).await.unwrap());
    let refused = client.describe(wire::DescribeRequest {}).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    let refused = client.stream(tokio_stream::empty()).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_disk_has_otherwise_than_the_manifest_says_comes_from_a_peer() {
    let (cluster, model) = thin_cluster().await;
    let weights = fs::read(Path::new(CHECKPOINT).join("model.safetensors")).unwrap();
    let header = u64::from_le_bytes(weights[..8].try_into().unwrap()) as usize;
    let entries: serde_json::Value = serde_json::from_slice(&weights[8..8 + header]).unwrap();
    let spoilt = &entries["model.layers.0.block_sparse_moe.experts.2.w2.weight"];
    let end = 8 + header + spoilt["data_offsets"][1].as_u64().unwrap() as usize;
    let mut weights = weights;
    weights[end - 1] ^= 1;
    fs::write(model.path().join("model.safetensors"), weights).unwrap();
    let four = experts(0, 0..4);
    let honest = cluster.honest_peer("fr-expert-2", &four);
    let _node = cluster.start_serving().await;
    let mut links = [cluster.coordinator.dial().await, honest.dial().await];
    let asked = cluster.frame(&links[0].info, [1, 2]);
    let ours = links[0].ask(&asked).await.result.unwrap();
    let asked = frame(&links[1].info, [1, 2]);
    assert_eq!(ours, links[1].ask(&asked).await.result.unwrap());
}
