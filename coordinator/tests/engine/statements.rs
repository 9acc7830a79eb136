//! What nodes state that they computed is what the engine says that it sent them, signed with the
//! key of the certificate that the record names.

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::path::Path;
use std::time::Duration;

use entente_coordinator::config::EngineConfig;
use entente_coordinator::statements::Stated;
use entente_proto::ids::{NodeName, RequestId};
use entente_proto::statement::{STATEMENT_CONTEXT, Statement};
use entente_tls::{Authority, Files, Issued, verify_signature};
use sha2::{Digest, Sha256};

use crate::setup::*;

const HOUR: Duration = Duration::from_secs(3_600);

fn write(dir: &Path, authority: &Authority, issued: &Issued) -> Files {
    let file = |name: &str, pem: &str| {
        let path = dir.join(name);
        std::fs::write(&path, pem).unwrap();
        path
    };
    Files {
        ca: file("ca.pem", authority.certificate_pem()),
        certificate: file("own.pem", &issued.certificate_pem),
        key: file("own.key", &issued.key_pem),
    }
}

/// Rows by request and node, with the certificate that goes with the node.
type Rows = BTreeMap<(RequestId, NodeName), (u64, [u8; 32])>;

crate::over_networks! {
    nodes_state_what_they_were_sent_and_sign_it_with_the_key_of_the_certificate_on_record,
}

fn nodes_state_what_they_were_sent_and_sign_it_with_the_key_of_the_certificate_on_record(
    transport: Transport,
) {
    let authority = Authority::new(&"test".parse().unwrap(), "fr".parse().unwrap(), HOUR).unwrap();
    let issue = |role: &str, name: &str| {
        let identity = format!("spiffe://test/region/fr/role/{role}/node/{name}");
        authority.issue(&identity.parse().unwrap(), HOUR).unwrap()
    };
    let listeners: Vec<TcpListener> = (0..2).map(|_| listener()).collect();
    let roster = roster(&listeners, 1);
    let state = found(&roster);
    let dir = tempfile::tempdir().unwrap();
    let start = |(number, listener)| {
        let own = authority.credentials(&issue("expert", name(number).as_str())).unwrap();
        Node::start_as(Some(own), &state, number, listener)
    };
    let _nodes: Vec<Node> = listeners.into_iter().enumerate().map(start).collect();
    let mut config = config(&roster, transport, EngineConfig::default());
    config.tls = Some(write(dir.path(), &authority, &issue("coordinator", "fr-coordinator")));
    let engine = Engine::start(&config);
    assert!(engine.answers() == reference());

    let (mut sent, mut stated) = (Rows::new(), Rows::new());
    for _ in 0..REQUESTS {
        let closed = engine.next_closed();
        for (touched, rows) in closed.tally.touched {
            sent.insert((closed.origin.id, touched.node), (rows, touched.certificate_sha256));
        }
    }
    while stated.len() < sent.len() {
        let Stated { node, requests, signed } =
            engine.stated.recv_timeout(PATIENCE).expect("a statement");
        let der = &signed.certificate;
        verify_signature(der, STATEMENT_CONTEXT, &signed.statement, &signed.signature)
            .expect("it is the certificate's signature");
        let certificate_sha256 = Sha256::digest(der).into();
        let statement = Statement::decode(&signed.statement).unwrap();
        assert_eq!((&statement.node, statement.region.as_str()), (&node, "fr"));
        assert!(statement.rows.iter().map(|(request, _)| *request).eq(requests));
        for (request, rows) in statement.rows {
            stated.insert((request, node.clone()), (rows, certificate_sha256));
        }
    }
    // Nothing was hedged or sent again, or the two could differ.
    let metrics = &engine.started.api.metrics;
    assert_eq!((metrics.retried_rows.get(), metrics.hedged_rows.get()), (0, 0));
    assert_eq!(sent.len(), 2 * REQUESTS as usize, "both nodes saw each request");
    assert_eq!(stated, sent);
}
