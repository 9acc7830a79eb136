//! Who is not the node, or not a coordinator, is neither used nor answered.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use entente_model::kernels::WeightFormat;
use entente_proto::identity::Role;

use super::setup::*;

/// Each check runs once over each transport with TLS.
macro_rules! over_tls {
    ($($check:ident),+ $(,)?) => {
        mod tls_grpc { $(#[test] fn $check() { super::$check(super::GRPC_TLS); })+ }
        mod tls_stream { $(#[test] fn $check() { super::$check(super::STREAM_TLS); })+ }
    };
}

over_tls! {
    a_node_of_another_ca_is_not_used,
    a_peer_that_is_no_coordinator_of_ours_is_refused,
    a_peer_in_plain_text_is_refused,
    a_peer_that_stalls_in_the_handshake_is_given_up_and_holds_up_nobody,
}

fn a_node_of_another_ca_is_not_used(network: Network) {
    let theirs = credentials(&THEIRS, Role::Expert, "fr-expert-1");
    let server = Server::start(load(WeightFormat::F32), "127.0.0.1:0", Some(theirs));
    let mut links = network.dial(&name(), &server.address, &server.runtime);
    let reason = down(&mut links);
    assert!(reason.contains("invalid peer certificate: BadSignature"), "{reason}");
}

fn a_peer_that_is_no_coordinator_of_ours_is_refused(network: Network) {
    let server = network.serve(load(WeightFormat::F32), "127.0.0.1:0");
    for own in [
        credentials(&OURS, Role::Expert, "fr-expert-1"),
        credentials(&OURS, Role::Operator, "somebody"),
    ] {
        let mut links = network.dial_as(Some(own), &name(), &server.address, &server.runtime);
        // With TLS 1.3 the client is done before the server has looked at its certificate.
        let reason = down(&mut links);
        assert!(!reason.is_empty());
    }
}

fn a_peer_in_plain_text_is_refused(network: Network) {
    let server = network.serve(load(WeightFormat::F32), "127.0.0.1:0");
    let mut links = network.dial_as(None, &name(), &server.address, &server.runtime);
    down(&mut links);
}

fn a_peer_that_stalls_in_the_handshake_is_given_up_and_holds_up_nobody(network: Network) {
    let server = network.serve(load(WeightFormat::F32), "127.0.0.1:0");
    let stall = |begin: &[u8]| {
        let mut peer = TcpStream::connect(&server.address).unwrap();
        peer.write_all(begin).unwrap();
        peer
    };
    // Nothing at all, and the beginning of a record of 512 bytes.
    let stalled = [stall(&[]), stall(&[0x16, 3, 1, 2, 0, 1])];
    let began = Instant::now();
    up(&mut network.dial(&name(), &server.address, &server.runtime));
    assert!(began.elapsed() < Duration::from_secs(2), "took {:?}", began.elapsed());
    for mut peer in stalled {
        peer.set_read_timeout(Some(PATIENCE)).unwrap();
        // Closed, one way or the other.
        let ended = peer.read(&mut [0; 64]);
        assert!(matches!(&ended, Ok(0)) || ended.is_err_and(|e| !is_timeout(&e)));
    }
    assert!(began.elapsed() < Duration::from_secs(10), "took {:?}", began.elapsed());
}

fn is_timeout(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut)
}
