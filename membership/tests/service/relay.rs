//! Voters that hear nothing for a while: a relay stands before each, and can be held.

use std::time::Duration;

use entente_membership::state::Expect;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use crate::world::{LONG, World, free_address, put, value};

/// Carries bytes from one address to another while it is open, and keeps them while it is not.
pub struct Relay {
    pub address: String,
    open: watch::Sender<bool>,
}

impl Relay {
    /// On the runtime that this is called in.
    pub fn start(to: String) -> Self {
        let address = free_address();
        let (open, gate) = watch::channel(true);
        let listener = std::net::TcpListener::bind(&address).unwrap();
        listener.set_nonblocking(true).unwrap();
        tokio::spawn(async move {
            let listener = TcpListener::from_std(listener).unwrap();
            while let Ok((near, _)) = listener.accept().await {
                // Nobody is there yet, or any more; whoever dialled sees the end.
                let Ok(far) = TcpStream::connect(&to).await else { continue };
                let (near_read, near_write) = near.into_split();
                let (far_read, far_write) = far.into_split();
                tokio::spawn(carry(near_read, far_write, gate.clone()));
                tokio::spawn(carry(far_read, near_write, gate.clone()));
            }
        });
        Self { address, open }
    }

    pub fn hold(&self, held: bool) {
        self.open.send_replace(!held);
    }
}

async fn carry(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    mut gate: watch::Receiver<bool>,
) {
    let mut buffer = vec![0; 16 << 10];
    while let Ok(len) = from.read(&mut buffer).await {
        let passed = gate.wait_for(|open| *open).await.is_ok();
        if len == 0 || !passed || to.write_all(&buffer[..len]).await.is_err() {
            break;
        }
    }
    // Whoever reads there sees the end too.
    let _ = to.shutdown().await;
}

fn propose(world: &World, text: &str) {
    let client = world.operator();
    let proposed = client.propose(LONG, Expect::default(), put("key", text, None));
    world.runtime.block_on(proposed).unwrap();
}

#[test]
fn a_leader_that_hears_nothing_gives_way_and_follows_when_it_hears_again() {
    let world = World::behind_relays(3);
    propose(&world, "before");
    let deaf = world.leader();
    world.hold(deaf, true);
    let others: Vec<usize> = (0..3).filter(|i| *i != deaf).collect();
    let next = world.until("another leads", || {
        let leads = |i: &&usize| world.handle(**i).status().borrow().is_leader;
        others.iter().find(leads).copied()
    });
    propose(&world, "meanwhile");
    let seen = world.handle(deaf).state().borrow().clone();
    assert_eq!(value(&seen, "key").as_deref(), Some("before"));
    world.hold(deaf, false);
    world.everywhere("all is there again", |state| {
        value(state, "key").as_deref() == Some("meanwhile")
    });
    // Coming back it did not depose anybody: it had not become a candidate that others would hear.
    assert_eq!(world.leader(), next);
}

#[test]
fn a_follower_that_hears_nothing_does_not_disturb_the_others() {
    let world = World::behind_relays(3);
    propose(&world, "before");
    let leader = world.leader();
    let term = world.handle(leader).status().borrow().term;
    let deaf = (leader + 1) % 3;
    world.hold(deaf, true);
    // Several election timeouts.
    std::thread::sleep(Duration::from_millis(1_500));
    propose(&world, "meanwhile");
    world.hold(deaf, false);
    world.everywhere("all is there again", |state| {
        value(state, "key").as_deref() == Some("meanwhile")
    });
    assert_eq!(world.handle(leader).status().borrow().term, term, "there was an election");
}
