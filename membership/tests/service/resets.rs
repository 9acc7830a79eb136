//! What becomes of a member that opens calls and resets them before anybody looks at them.

use std::time::Duration;

use entente_proto::identity::{Expected, Role};
use entente_tls::ALPN_GRPC;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use crate::world::{LONG, World};

/// A frame of HTTP/2 (RFC 9113, section 4.1).
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let len = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let mut frame = vec![len[1], len[2], len[3], kind, flags];
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// `POST / http`, from the static table of HPACK (RFC 7541, appendix A), and the reset that follows.
fn opened_and_reset(stream: u32) -> Vec<u8> {
    const END: u8 = 0x4 | 0x1;
    const CANCEL: [u8; 4] = [0, 0, 0, 8];
    [frame(1, END, stream, &[0x83, 0x86, 0x84]), frame(3, 0, stream, &CANCEL)].concat()
}

#[test]
fn a_member_that_resets_its_calls_by_the_thousand_is_disconnected_and_the_port_goes_on() {
    let world = World::of(3);
    let leader = world.leader();
    let credentials = world.credentials(Role::Expert, "fr-expert-1");
    let cluster = credentials.identity().cluster.clone();
    let voter = Expected { cluster, roles: vec![Role::Coordinator, Role::Witness], member: None };
    let config = credentials.client(voter, &[ALPN_GRPC]).unwrap();
    let address = world.address(leader);
    let heard = world.runtime.block_on(async {
        let socket = TcpStream::connect(address).await.unwrap();
        let name = ServerName::try_from("entente").unwrap();
        let stream = TlsConnector::from(config).connect(name, socket).await.unwrap();
        let (mut read, mut write) = tokio::io::split(stream);
        let attack = tokio::spawn(async move {
            let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
            bytes.extend(frame(4, 0, 0, &[]));
            bytes.extend((0..10_000).flat_map(|n| opened_and_reset(2 * n + 1)));
            // The other side may hang up in the middle.
            let _ = write.write_all(&bytes).await;
            tokio::time::sleep(Duration::from_millis(10)).await;
        });
        let mut heard = Vec::new();
        let ended = timeout(LONG, read.read_to_end(&mut heard)).await;
        attack.await.unwrap();
        assert!(ended.is_ok(), "the connection stays open");
        heard
    });
    // GOAWAY with ENHANCE_YOUR_CALM says why, unless the connection was reset too soon to hear it.
    let calm = heard.windows(4).any(|code| code == [0, 0, 0, 0xb]);
    assert!(calm || heard.len() < 1_000, "{} bytes came back", heard.len());
    world.dial(&world.credentials(Role::Operator, "operator"), leader);
}
