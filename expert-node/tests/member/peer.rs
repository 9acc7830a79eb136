//! A coordinator, as far as a node sees one: it greets, and sends frames.

use std::sync::Arc;

use entente_proto::frame::{Answer, Assignment, Dispatch, Dtype};
use entente_proto::identity::{Expected, Role};
use entente_proto::ids::{ExchangeId, ExpertId, LayerId, NodeName, RequestId};
use entente_proto::link::NodeInfo;
use entente_proto::stream::FrameReader;
use entente_proto::wire;
use entente_proto::wire::exchange_client::ExchangeClient;
use entente_tls::{ALPN_GRPC, ALPN_STREAM, Credentials};
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::Endpoint;

use crate::plane::PATIENCE;

/// Dials the node of this name with a coordinator's credentials.
pub struct Coordinator {
    pub own: Credentials,
    pub node: NodeName,
    pub address: String,
}

impl Coordinator {
    fn config(&self, alpn: &[u8]) -> Arc<ClientConfig> {
        let member = Some(("fr".parse().unwrap(), self.node.clone()));
        let cluster = self.own.identity().cluster.clone();
        let node = Expected { cluster, roles: vec![Role::Expert], member };
        self.own.client(node, &[alpn]).unwrap()
    }

    /// A gRPC connection with its stream.
    pub async fn dial(&self) -> Link {
        let (config, address) = (self.config(ALPN_GRPC), self.address.clone());
        let connector = tower::service_fn(move |_| {
            let (config, address) = (config.clone(), address.clone());
            async move { secured(config, address).await.map(TokioIo::new) }
        });
        let endpoint = Endpoint::from_static("http://node");
        let channel = endpoint.connect_with_connector(connector).await.unwrap();
        let mut client = ExchangeClient::new(channel);
        let info = client.describe(wire::DescribeRequest {}).await.unwrap().into_inner();
        let (frames, queued) = mpsc::channel(64);
        let answers = client.stream(ReceiverStream::new(queued)).await.unwrap().into_inner();
        Link { info: info.try_into().unwrap(), frames, answers }
    }

    /// A byte stream, and what the node said of itself.
    pub async fn dial_stream(&self) -> (NodeInfo, TlsStream<TcpStream>) {
        let mut socket = secured(self.config(ALPN_STREAM), self.address.clone()).await.unwrap();
        let (mut frames, mut bytes) = (FrameReader::default(), vec![0; 1 << 16]);
        loop {
            if let Some(info) = frames.next_frame::<wire::NodeInfo>().unwrap() {
                return (info.message.try_into().unwrap(), socket);
            }
            let read = socket.read(&mut bytes).await.unwrap();
            assert!(read > 0, "the node hung up before it said who it is");
            frames.extend(&bytes[..read]);
        }
    }
}

async fn secured(
    config: Arc<ClientConfig>,
    address: String,
) -> std::io::Result<TlsStream<TcpStream>> {
    let socket = TcpStream::connect(address).await?;
    let name = ServerName::try_from("entente").unwrap();
    TlsConnector::from(config).connect(name, socket).await
}

/// A connection that is up.
pub struct Link {
    pub info: NodeInfo,
    frames: mpsc::Sender<wire::Dispatch>,
    answers: Streaming<wire::Combine>,
}

impl Link {
    pub async fn ask(&mut self, frame: &Dispatch) -> Answer {
        self.frames.send(frame.clone().into()).await.unwrap();
        let answer = timeout(PATIENCE, self.answers.message()).await.expect("an answer in time");
        answer.unwrap().expect("an answer").try_into().unwrap()
    }

    /// Waits until the node ends the stream.
    pub async fn ended(&mut self) {
        let end = timeout(PATIENCE, self.answers.message()).await.expect("an end in time");
        assert!(!matches!(end, Ok(Some(_))), "an answer that nobody asked for: {end:?}");
    }
}

/// A frame of two rows through two experts of layer 0.
pub fn frame(info: &NodeInfo, experts: [u16; 2]) -> Dispatch {
    let hidden = 64;
    let values: Vec<f32> = (0..2 * hidden).map(|i| (i as f32 * 0.37).sin()).collect();
    let mut rows = Vec::new();
    Dtype::F32.encode(&values, &mut rows);
    let pairs = [(0, experts[0]), (1, experts[1]), (1, experts[0])];
    Dispatch {
        exchange: ExchangeId(1),
        fence: info.fence,
        layer: LayerId(0),
        allowed_regions: ["fr".parse().unwrap()].into(),
        deadline_ms: 20_000,
        dtype: Dtype::F32,
        hidden,
        assignments: pairs.map(|(row, e)| Assignment { row, expert: ExpertId(e) }).to_vec(),
        requests: vec![(RequestId(1), 3)],
        rows: rows.into(),
    }
}
