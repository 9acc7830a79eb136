//! A node that stops reading: the engine goes on, and nothing that waited is lost.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use entente_model::kernels::WeightFormat;
use entente_proto::frame::Dispatch;
use entente_proto::ids::ExchangeId;
use entente_proto::link::LinkEvent;

use super::setup::*;

/// Passes bytes between a coordinator and a node until it is told to leave them lying.
struct Relay {
    address: String,
    gate: Arc<Gate>,
}

/// What bytes pass while it is open.
#[derive(Default)]
struct Gate {
    closed: Mutex<bool>,
    changed: Condvar,
}

impl Gate {
    fn set_closed(&self, closed: bool) {
        *self.closed.lock().unwrap() = closed;
        self.changed.notify_all();
    }

    fn pass(&self) {
        drop(self.changed.wait_while(self.closed.lock().unwrap(), |closed| *closed).unwrap());
    }
}

impl Relay {
    fn to(address: &str) -> Self {
        let (address, gate) = (address.to_owned(), Arc::new(Gate::default()));
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let relay =
            Self { address: listener.local_addr().unwrap().to_string(), gate: gate.clone() };
        thread::spawn(move || {
            let (near, _) = listener.accept().unwrap();
            let far = TcpStream::connect(address).unwrap();
            for (mut from, mut to) in
                [(near.try_clone().unwrap(), far.try_clone().unwrap()), (far, near)]
            {
                let gate = gate.clone();
                thread::spawn(move || {
                    let mut bytes = vec![0; 64 << 10];
                    while let Ok(read @ 1..) = from.read(&mut bytes) {
                        gate.pass();
                        if to.write_all(&bytes[..read]).is_err() {
                            return;
                        }
                    }
                });
            }
        });
        relay
    }
}

fn a_node_that_reads_nothing_does_not_hold_the_engine_up(network: Network) {
    const FRAMES: u64 = 24;
    let server = network.serve(load(WeightFormat::F32), "127.0.0.1:0");
    let relay = Relay::to(&server.address);
    let mut links = network.dial(&name(), &relay.address, &server.runtime);
    let frame = largest(&up(&mut links), 0);
    relay.gate.set_closed(true);
    for number in 0..FRAMES {
        let began = Instant::now();
        links.send(NODE, Dispatch { exchange: ExchangeId(number), ..frame.clone() }).unwrap();
        let took = began.elapsed();
        assert!(took < Duration::from_millis(300), "frame {number} took {took:?}");
    }
    relay.gate.set_closed(false);
    // What waited goes out while the engine waits, whole and in order.
    for number in 0..FRAMES {
        match event(&mut links) {
            LinkEvent::Answer(answer) => {
                assert_eq!(answer.exchange, ExchangeId(number));
                assert!(answer.result.is_ok() && answer.check(&frame).is_ok(), "frame {number}");
            }
            other => panic!("expected an answer, got {other:?}"),
        }
    }
}

#[test]
fn a_node_that_reads_nothing_does_not_hold_the_engine_up_stream() {
    a_node_that_reads_nothing_does_not_hold_the_engine_up(STREAM);
}

#[test]
fn a_node_that_reads_nothing_does_not_hold_the_engine_up_stream_tls() {
    a_node_that_reads_nothing_does_not_hold_the_engine_up(STREAM_TLS);
}
