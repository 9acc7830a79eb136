//! Handshakes in memory, and what arrives after them.

mod identities;
mod replacing;

use std::io::{Read, Write};
use std::sync::Arc;
use std::time::Duration;

use entente_proto::identity::{Expected, Identity, Role};
use rustls::{ClientConfig, ServerConfig};

use crate::credentials::provider;
use crate::{ALPN_STREAM, Authority, Channel, Credentials, Error, Incoming, PIECE_BYTES};

const HOUR: Duration = Duration::from_secs(3_600);

fn identity(role: Role, node: &str) -> Identity {
    format!("spiffe://demo/region/fr/role/{role}/node/{node}").parse().unwrap()
}

fn authority() -> Authority {
    Authority::new(&"demo".parse().unwrap(), "fr".parse().unwrap(), HOUR).unwrap()
}

fn credentials(authority: &Authority, role: Role, node: &str) -> Credentials {
    let issued = authority.issue(&identity(role, node), HOUR).unwrap();
    authority.credentials(&issued).unwrap()
}

/// What a coordinator expects of the node that it dials.
fn the_node() -> Expected {
    let Identity { cluster, region, role, node } = identity(Role::Expert, "fr-expert-1");
    Expected { cluster, roles: vec![role], member: Some((region, node)) }
}

/// What a node expects of who dials it.
fn a_coordinator() -> Expected {
    let Identity { cluster, role, .. } = identity(Role::Coordinator, "fr-coordinator");
    Expected { cluster, roles: vec![role], member: None }
}

/// Gives `bytes` to the other end, however many there are.
fn give(bytes: &[u8], to: &mut Incoming) {
    to.space()[..bytes.len()].copy_from_slice(bytes);
    to.advance(bytes.len());
}

/// The handshake of two ends: each one's result, as it sees it.
fn shake(
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
) -> (Result<Channel, Error>, Result<Channel, Error>) {
    let mut ends = [Channel::client(client).unwrap(), Channel::server(server).unwrap()];
    let mut incoming = [Incoming::default(), Incoming::default()];
    let mut results = [None, None];
    // Two flights each way, and one more for an alert.
    for turn in 0..6 {
        let (this, other) = (turn % 2, 1 - turn % 2);
        if !matches!(results[this], Some(Err(_))) {
            match ends[this].shake(&mut incoming[this]) {
                Ok(false) => {}
                Ok(true) => results[this] = Some(Ok(())),
                Err(error) => results[this] = Some(Err(error)),
            }
        }
        let owed = ends[this].take_owed();
        give(&owed, &mut incoming[other]);
    }
    let [client, server] = ends;
    let [client_result, server_result] = results;
    (client_result.unwrap().map(|()| client), server_result.unwrap().map(|()| server))
}

fn good_ends() -> (Channel, Channel) {
    let authority = authority();
    let coordinator = credentials(&authority, Role::Coordinator, "fr-coordinator");
    let node = credentials(&authority, Role::Expert, "fr-expert-1");
    let (client, server) = shake(
        coordinator.client(the_node(), &[ALPN_STREAM]).unwrap(),
        node.server(a_coordinator(), &[ALPN_STREAM]).unwrap(),
    );
    (client.unwrap(), server.unwrap())
}

/// What is written for `plain`.
fn sealed(from: &mut Channel, plain: &[u8]) -> Vec<u8> {
    let mut all = Vec::new();
    let written = from.send(plain.chunks(PIECE_BYTES), |_, records| {
        records.iter().for_each(|record| all.extend_from_slice(record));
        Ok(())
    });
    written.unwrap();
    all
}

/// Sends `plain` and gives what arrives.
fn carry(from: &mut Channel, to: &mut Channel, incoming: &mut Incoming, plain: &[u8]) -> Vec<u8> {
    let mut arrived = Vec::new();
    // Cut anywhere: records need not arrive whole.
    for bytes in sealed(from, plain).chunks(10_007) {
        give(bytes, incoming);
        assert!(to.open(incoming, |plain| arrived.extend_from_slice(plain)).unwrap());
    }
    arrived
}

#[test]
fn what_is_sealed_at_one_end_is_opened_at_the_other() {
    let (mut client, mut server) = good_ends();
    let (mut near, mut far) = (Incoming::default(), Incoming::default());
    for len in [1, 16_384, 16_385, PIECE_BYTES, 1_000_003] {
        let plain: Vec<u8> = (0..len).map(|i| (i * 31 % 251) as u8).collect();
        assert!(carry(&mut client, &mut server, &mut far, &plain) == plain, "{len} bytes out");
        assert!(carry(&mut server, &mut client, &mut near, &plain) == plain, "{len} bytes back");
    }
}

#[test]
fn a_changed_byte_is_an_error() {
    let (mut client, mut server) = good_ends();
    let mut incoming = Incoming::default();
    let mut sealed = sealed(&mut client, &[7; 100]);
    *sealed.last_mut().unwrap() ^= 1;
    give(&sealed, &mut incoming);
    let error = server.open(&mut incoming, |_| panic!("it was opened")).unwrap_err();
    assert!(error.to_string().contains("decrypt"), "{error}");
}

#[test]
fn keys_are_renewed_before_they_are_worn_out() {
    let authority = authority();
    let coordinator = credentials(&authority, Role::Coordinator, "fr-coordinator");
    let node = credentials(&authority, Role::Expert, "fr-expert-1");
    // The real limit is 2^24 records; a suite that wears out after 20 takes the same path.
    let rustls::SupportedCipherSuite::Tls13(suite) = provider().cipher_suites[0] else { panic!() };
    let common = rustls::crypto::CipherSuiteCommon {
        suite: suite.common.suite,
        hash_provider: suite.common.hash_provider,
        confidentiality_limit: 20,
    };
    let short = rustls::Tls13CipherSuite { common, ..*suite };
    let short: &'static _ = Box::leak(Box::new(short));
    let mut own = provider();
    own.cipher_suites = vec![rustls::SupportedCipherSuite::Tls13(short)];
    let client = Arc::new(with_provider(&coordinator, own));
    let (client, server) = shake(client, node.server(a_coordinator(), &[]).unwrap());
    let (mut client, mut server) = (client.unwrap(), server.unwrap());
    let (mut near, mut far) = (Incoming::default(), Incoming::default());
    for i in 0..500_u32 {
        let plain = i.to_le_bytes();
        assert_eq!(carry(&mut client, &mut server, &mut far, &plain), plain);
        assert_eq!(carry(&mut server, &mut client, &mut near, &plain), plain);
    }
}

/// A connection that is rustls' own from end to end, and ours to it, after the handshake.
fn theirs_and_ours() -> (rustls::ClientConnection, Channel) {
    let authority = authority();
    let coordinator = credentials(&authority, Role::Coordinator, "fr-coordinator");
    let node = credentials(&authority, Role::Expert, "fr-expert-1");
    let config = coordinator.client(the_node(), &[ALPN_STREAM]).unwrap();
    let name = "entente".try_into().unwrap();
    let mut theirs = rustls::ClientConnection::new(config, name).unwrap();
    let mut ours = Channel::server(node.server(a_coordinator(), &[ALPN_STREAM]).unwrap()).unwrap();
    let mut incoming = Incoming::default();
    loop {
        give(&said(&mut theirs), &mut incoming);
        let over = ours.shake(&mut incoming).unwrap();
        hear(&mut theirs, &ours.take_owed());
        if over {
            return (theirs, ours);
        }
    }
}

fn said(theirs: &mut rustls::ClientConnection) -> Vec<u8> {
    let mut bytes = Vec::new();
    while theirs.wants_write() {
        theirs.write_tls(&mut bytes).unwrap();
    }
    bytes
}

fn hear(theirs: &mut rustls::ClientConnection, mut bytes: &[u8]) {
    while !bytes.is_empty() {
        theirs.read_tls(&mut bytes).unwrap();
        theirs.process_new_packets().unwrap();
    }
}

#[test]
fn a_peer_that_asks_for_new_keys_gets_them_before_more_data() {
    let (mut theirs, mut ours) = theirs_and_ours();
    let (mut incoming, mut len) = (Incoming::default(), 0);
    for turn in 0..5 {
        if turn > 0 {
            theirs.refresh_traffic_keys().unwrap();
        }
        theirs.writer().write_all(b"out").unwrap();
        give(&said(&mut theirs), &mut incoming);
        let mut arrived = Vec::new();
        assert!(ours.open(&mut incoming, |plain| arrived.extend_from_slice(plain)).unwrap());
        assert_eq!(arrived, b"out", "turn {turn}");
        let records = sealed(&mut ours, b"back");
        hear(&mut theirs, &records);
        let mut back = [0; 4];
        theirs.reader().read_exact(&mut back).unwrap();
        assert_eq!(&back, b"back", "turn {turn}");
        // One record, and one more that renews the key.
        assert_eq!(records.len() > len, turn < 2, "turn {turn}");
        len = records.len();
    }
}

#[test]
fn a_peer_that_does_nothing_but_renew_keys_is_given_up() {
    let (mut theirs, mut ours) = theirs_and_ours();
    let mut incoming = Incoming::default();
    let renewals = (0..100).take_while(|_| {
        theirs.refresh_traffic_keys().unwrap();
        give(&said(&mut theirs), &mut incoming);
        ours.open(&mut incoming, |plain| assert!(plain.is_empty())).is_ok()
    });
    assert_eq!(renewals.count(), 32);
}

#[test]
fn a_peer_that_closes_is_believed() {
    let (mut theirs, mut ours) = theirs_and_ours();
    let (mut incoming, mut arrived) = (Incoming::default(), Vec::new());
    theirs.writer().write_all(b"last").unwrap();
    theirs.send_close_notify();
    give(&said(&mut theirs), &mut incoming);
    assert!(!ours.open(&mut incoming, |plain| arrived.extend_from_slice(plain)).unwrap());
    assert_eq!(arrived, b"last");
}

#[test]
fn a_record_that_is_not_sealed_is_refused() {
    let (_, mut ours) = theirs_and_ours();
    for record in [&[21, 3, 3, 0, 2, 1, 0][..], &[20, 3, 3, 0, 1, 1], &[23, 3, 3, 0, 1, 7]] {
        let mut incoming = Incoming::default();
        give(record, &mut incoming);
        assert!(ours.open(&mut incoming, |_| panic!("it was opened")).is_err(), "{record:?}");
    }
}

/// The client configuration of `credentials`, with other cryptography.
fn with_provider(
    credentials: &Credentials,
    provider: rustls::crypto::CryptoProvider,
) -> ClientConfig {
    let config = credentials.client(the_node(), &[]).unwrap();
    let mut other = ClientConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    other.enable_secret_extraction = true;
    other.client_auth_cert_resolver = config.client_auth_cert_resolver.clone();
    other.dangerous().set_certificate_verifier(Arc::new(credentials.verifier(the_node())));
    other
}
