//! Handshakes in memory: who is taken, who is refused, and what arrives.

use std::io::{Read, Write};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use entente_proto::identity::{Expected, Identity, Role};
use rustls::{ClientConfig, ServerConfig};

use crate::credentials::provider;
use crate::{ALPN_STREAM, Authority, Channel, Credentials, Error, Incoming, PIECE_BYTES};

const HOUR: Duration = Duration::from_secs(3_600);

fn a_minute_ago() -> SystemTime {
    SystemTime::now() - Duration::from_secs(60)
}

fn identity(role: Role, node: &str) -> Identity {
    format!("spiffe://demo/region/fr/role/{role}/node/{node}").parse().unwrap()
}

fn authority() -> Authority {
    Authority::new("demo", HOUR).unwrap()
}

fn credentials(authority: &Authority, role: Role, node: &str) -> Credentials {
    let issued = authority.issue(&identity(role, node), HOUR).unwrap();
    authority.credentials(issued).unwrap()
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
    let verifier = crate::verify::PeerVerifier::new(
        credentials.roots(),
        &Arc::new(super::credentials::provider()),
        the_node(),
    );
    other.dangerous().set_certificate_verifier(Arc::new(verifier.unwrap()));
    other
}

#[test]
fn a_node_that_is_not_the_one_that_was_dialled_is_refused() {
    let (ours, theirs) = (authority(), authority());
    let coordinator = credentials(&ours, Role::Coordinator, "fr-coordinator");
    let names = |uris: &[&str], end| {
        let uris: Vec<String> = uris.iter().map(|uri| (*uri).to_owned()).collect();
        ours.issue_names(&uris, end).unwrap()
    };
    let good = "spiffe://demo/region/fr/role/expert/node/fr-expert-1";
    let one = |from: &str, to: &str| names(&[&good.replace(from, to)], SystemTime::now() + HOUR);
    let cases = [
        ("BadSignature", theirs.issue(&good.parse().unwrap(), HOUR).unwrap()),
        ("expert fr-expert-1 of demo in fr", one("fr-expert-1", "fr-expert-2")),
        ("expert fr-expert-1 of demo in fr", one("/fr/", "/se/")),
        ("expert fr-expert-1 of demo in fr", one("role/expert", "role/coordinator")),
        ("expert fr-expert-1 of demo in fr", one("//demo", "//other")),
        ("expired", names(&[good], a_minute_ago())),
    ];
    for (reason, issued) in cases {
        let node = ours.credentials(issued).unwrap();
        let (client, server) = shake(
            coordinator.client(the_node(), &[ALPN_STREAM]).unwrap(),
            node.server(a_coordinator(), &[ALPN_STREAM]).unwrap(),
        );
        let error = client.err().expect(reason).to_string();
        assert!(error.contains(reason), "{error} does not say {reason}");
        // The node learns of it too, and does not take the connection for a good one.
        assert!(server.is_err(), "{reason}: the node was not told");
    }
}

#[test]
fn a_certificate_names_exactly_one_process() {
    let authority = authority();
    let good = "spiffe://demo/region/fr/role/expert/node/fr-expert-1".to_owned();
    let other = "https://example.com/".to_owned();
    for (uris, reason) in [
        (vec![], "has 0 URI names"),
        (vec![good.clone(), good.clone()], "has 2 URI names"),
        (vec![good, other.clone()], "has 2 URI names"),
        (vec![other], "is not spiffe://"),
    ] {
        let issued = authority.issue_names(&uris, SystemTime::now() + HOUR).unwrap();
        let error = authority.credentials(issued).err().expect(reason).to_string();
        assert!(error.contains(reason), "{error} does not say {reason}");
    }
}

#[test]
fn whoever_is_no_coordinator_of_the_cluster_is_refused_by_a_node() {
    let (ours, theirs) = (authority(), authority());
    let node = credentials(&ours, Role::Expert, "fr-expert-1");
    let server = || node.server(a_coordinator(), &[ALPN_STREAM]).unwrap();
    let coordinator = identity(Role::Coordinator, "fr-coordinator");
    let expired = ours.issue_names(&[coordinator.to_string()], a_minute_ago()).unwrap();
    let elsewhere = "spiffe://other/region/fr/role/coordinator/node/fr-coordinator";
    for (reason, issued) in [
        ("BadSignature", theirs.issue(&coordinator, HOUR).unwrap()),
        ("a coordinator of demo", ours.issue(&identity(Role::Expert, "x"), HOUR).unwrap()),
        ("a coordinator of demo", ours.issue(&identity(Role::Operator, "x"), HOUR).unwrap()),
        ("a coordinator of demo", ours.issue(&elsewhere.parse().unwrap(), HOUR).unwrap()),
        ("expired", expired),
    ] {
        let peer = ours.credentials(issued).unwrap();
        let (_, server) = shake(peer.client(the_node(), &[ALPN_STREAM]).unwrap(), server());
        let error = server.err().expect(reason).to_string();
        assert!(error.contains(reason), "{error} does not say {reason}");
    }
}

/// A client with a verifier like ours but with nothing to show, or with old versions only.
fn odd_client(versions: &[&'static rustls::SupportedProtocolVersion]) -> Arc<ClientConfig> {
    let mut config = ClientConfig::builder_with_provider(Arc::new(provider()))
        .with_protocol_versions(versions)
        .unwrap()
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    let verifier = Arc::new(Anyone);
    config.dangerous().set_certificate_verifier(verifier);
    Arc::new(config)
}

/// Believes every server.
#[derive(Debug)]
struct Anyone;

mod anyone {
    use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
    use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
    use rustls::{DigitallySignedStruct, Error, SignatureScheme};

    impl ServerCertVerifier for super::Anyone {
        fn verify_server_cert(
            &self,
            _: &CertificateDer<'_>,
            _: &[CertificateDer<'_>],
            _: &ServerName<'_>,
            _: &[u8],
            _: UnixTime,
        ) -> Result<ServerCertVerified, Error> {
            Ok(ServerCertVerified::assertion())
        }

        fn verify_tls12_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Ok(HandshakeSignatureValid::assertion())
        }

        fn verify_tls13_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Ok(HandshakeSignatureValid::assertion())
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            vec![SignatureScheme::ECDSA_NISTP256_SHA256]
        }
    }
}

#[test]
fn a_peer_without_a_certificate_is_refused() {
    let node = credentials(&authority(), Role::Expert, "fr-expert-1");
    let client = odd_client(&[&rustls::version::TLS13]);
    let (_, server) = shake(client, node.server(a_coordinator(), &[]).unwrap());
    let error = server.err().unwrap().to_string();
    assert!(error.contains("no certificates"), "{error}");
}

#[test]
fn a_peer_that_knows_tls_1_2_only_is_refused() {
    let node = credentials(&authority(), Role::Expert, "fr-expert-1");
    let client = odd_client(&[&rustls::version::TLS12]);
    let (client, server) = shake(client, node.server(a_coordinator(), &[]).unwrap());
    let error = server.err().unwrap().to_string();
    assert!(error.contains("Tls12NotOfferedOrEnabled"), "{error}");
    assert!(client.is_err());
}

#[test]
fn a_key_that_is_not_the_certificates_is_refused_at_once() {
    let authority = authority();
    let one = authority.issue(&identity(Role::Expert, "a"), HOUR).unwrap();
    let two = authority.issue(&identity(Role::Expert, "a"), HOUR).unwrap();
    let error = authority.credentials(one.with_key_of(two)).err().unwrap().to_string();
    assert!(error.contains("Inconsistent") || error.contains("match"), "{error}");
}
