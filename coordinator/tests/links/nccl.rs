//! Rows that travel by NCCL, between devices of this process that are none.

use std::sync::Arc;
use std::time::Duration;

use entente_coordinator::link::{ByNccl, Links, Peer};
use entente_coordinator::metrics::Metrics;
use entente_expert_node::{Nccl, NcclConfig, NodeHandle};
use entente_model::kernels::WeightFormat;
use entente_model::kernels::cuda::Device;
use entente_proto::identity::{Expected, Role};
use entente_proto::link::NodeInfo;
use entente_tls::{ALPN_NCCL, ALPN_STREAM};

use crate::setup::*;

/// A coordinator's end, and what is counted there.
struct Coordinator {
    links: Links,
    metrics: Arc<Metrics>,
}

/// Long enough for a machine that is busy with something else.
fn nccl(site: &str) -> Nccl {
    entente_cuda_emulator::stand_in::load();
    let config = NcclConfig { wait_max_ms: 60_000, ..NcclConfig::new(site.to_owned()) };
    Nccl::new(&config, &Device::open_cached(0, None).unwrap()).unwrap()
}

impl Coordinator {
    fn dial(site: &str, address: &str) -> Self {
        let own = credentials(&OURS, Role::Coordinator, "fr-coordinator");
        let member = Some(("fr".parse().unwrap(), name()));
        let expert =
            Expected { cluster: "test".parse().unwrap(), roles: vec![Role::Expert], member };
        let tls = |alpn| own.client(expert.clone(), &[alpn]).unwrap();
        let (name, address) = (name(), address.to_owned());
        let peer = Peer { node: NODE, name, address, tls: Some(tls(ALPN_STREAM)) };
        let metrics = Arc::new(Metrics::new());
        let (nccl, tls) = (nccl(site), tls(ALPN_NCCL));
        let mut links = Links::new().unwrap();
        links.dial_by(peer, Some(ByNccl { nccl, tls, metrics: metrics.nccl.clone() })).unwrap();
        Self { links, metrics }
    }

    /// Asks small things until `done`.
    fn ask_until(&mut self, info: &NodeInfo, done: impl Fn(&Metrics) -> bool) {
        for exchange in 1_000_000.. {
            let frame = frame(info, exchange, 1, 1);
            let want = expected(&frame, WeightFormat::F32);
            self.links.send(NODE, frame).unwrap();
            let answer = self.answer();
            assert!(answer.exchange.0 == exchange && answer.result.unwrap() == want);
            if done(&self.metrics) {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn answer(&mut self) -> entente_proto::frame::Answer {
        match event(&mut self.links) {
            entente_proto::link::LinkEvent::Answer(answer) => answer,
            other => panic!("expected an answer, got {other:?}"),
        }
    }
}

/// A link to a node at the same site, once rows travel by NCCL.
pub fn open(node: NodeHandle) -> Open {
    node.exchange_by(Ok(nccl("here")));
    let server = STREAM_TLS.serve(node, "127.0.0.1:0");
    let mut coordinator = Coordinator::dial("here", &server.address);
    let info = up(&mut coordinator.links);
    let Coordinator { links, metrics } = &mut coordinator;
    for exchange in 1_000_000.. {
        links.send(NODE, frame(&info, exchange, 1, 1)).unwrap();
        event(links);
        assert_eq!(metrics.nccl.failures.get(), 0);
        if metrics.nccl.received_bytes.get() > 0 {
            break;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Open { info, links: coordinator.links.into(), _server: Some(server) }
}

/// What was in flight is reported lost, the next connection carries its rows itself, and later rows
/// travel by NCCL again.
#[test]
fn a_node_that_ends_is_lost_at_once_and_its_lanes_are_built_again_when_it_is_back() {
    let node = load(WeightFormat::F32);
    node.exchange_by(Ok(nccl("here")));
    let server = STREAM_TLS.serve(node, "127.0.0.1:0");
    let mut coordinator = Coordinator::dial("here", &server.address);
    let info = up(&mut coordinator.links);
    coordinator.ask_until(&info, |metrics| metrics.nccl.received_bytes.get() > 0);
    let address = server.kill();
    down(&mut coordinator.links);
    assert_eq!(coordinator.metrics.nccl.links.get(), 0);

    let node = load(WeightFormat::F32);
    node.exchange_by(Ok(nccl("here")));
    let _server = STREAM_TLS.serve(node, &address);
    let info = up(&mut coordinator.links);
    let before = coordinator.metrics.nccl.received_bytes.get();
    coordinator.ask_until(&info, |metrics| metrics.nccl.received_bytes.get() > before);
    assert_eq!(coordinator.metrics.nccl.links.get(), 1);
    assert_eq!(coordinator.metrics.nccl.opened.get(), 2);
}

#[test]
fn rows_stay_on_the_network_where_the_node_has_no_nccl_or_stands_elsewhere() {
    for there in [None, Some("there")] {
        let node = load(WeightFormat::F32);
        if let Some(site) = there {
            node.exchange_by(Ok(nccl(site)));
        }
        let server = STREAM_TLS.serve(node, "127.0.0.1:0");
        let mut coordinator = Coordinator::dial("here", &server.address);
        let info = up(&mut coordinator.links);
        // It is asked twice, and says no twice.
        coordinator.ask_until(&info, |metrics| metrics.nccl.failures.get() >= 2);
        let nccl = &coordinator.metrics.nccl;
        assert_eq!((nccl.links.get(), nccl.opened.get()), (0, 0), "{there:?}");
        assert_eq!((nccl.sent_bytes.get(), nccl.received_bytes.get()), (0, 0), "{there:?}");
    }
}
