//! The engine's end of all its links, whatever carries them.
//!
//! ```text
//!   gRPC task, node in this process ── events ──► channel ─┐
//!   dial threads ── connections that are ready ──► channel ─┼─ bell ─► the engine's thread
//!   byte streams ── their sockets ─────────────────────────┴─ epoll ─► reads and decrypts them itself
//! ```
//!
//! An answer on a byte stream wakes the engine and nobody else: the thread that needs the rows is
//! the one that takes them from the socket. It owns the connection and its TLS state, so there is
//! no lock on the way out or in.
//!
//! Invariants:
//! - nothing is read from a socket except while the engine waits or writes, and no more answers are
//!   taken from a node than it was sent frames;
//! - no node holds the engine up: what a node does not take waits, up to a bound, and goes out while
//!   the engine waits;
//! - a frame is never carried over to the next connection, which may lead to another incarnation
//!   of the node: when a connection breaks, the engine hears [`LinkEvent::Down`] and decides;
//! - a connection that takes another's place gets the frames from then on; the other one stays until
//!   it owes nothing, and where either breaks both are given up;
//! - of a link that was removed or replaced nothing is heard any more, not even what it had reported
//!   before.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};
use entente_proto::frame::Dispatch;
use entente_proto::ids::NodeId;
use entente_proto::link::{Link, LinkEvent, LinkEvents, NodeInfo, NotSent};
use mio::{Events, Interest, Poll, Token};

use super::Peer;
use super::bell::Bell;
use super::connection::{Broken, Connection};
use super::nccl::ByNccl;
use super::stream::Dialler;

/// Events that wait for the engine. In flight are at most a few frames a node, so this is ample;
/// past it an event is dropped, and the exchange that misses it runs into its deadline.
const INBOX_LEN_MAX: usize = 4_096;
/// Sockets that one wait reports; others are reported by the next.
const POLLED_LEN_MAX: usize = 256;
/// The bell's token; node numbers have 32 bits.
const BELL: Token = Token(usize::MAX);
/// In the token of a connection that another one took the place of.
const RETIRING: usize = 1 << 32;

/// What comes in through the channel.
pub(crate) enum Arrival {
    Event(LinkEvent),
    /// With what the node says of itself, and the SHA-256 of the certificate that it showed.
    Connected(Box<Connection>, NodeInfo, [u8; 32]),
    /// One to the same start of the node, which takes the place of the one that there is.
    Instead(Box<Connection>),
    /// What a connection needs besides its socket has failed.
    Lost {
        connection: u64,
        reason: String,
    },
}

/// Tells the links to one node, which follow one another, apart.
type LinkNumber = u64;

/// The sink that one link is opened with.
pub struct Mailbox {
    arrivals: Sender<(NodeId, LinkNumber, Arrival)>,
    bell: Arc<Bell>,
    link: LinkNumber,
}

impl Mailbox {
    /// False when there is no room, or nobody who reads.
    pub(crate) fn put(&self, node: NodeId, arrival: Arrival) -> bool {
        let sent = self.arrivals.try_send((node, self.link, arrival));
        if let Err(TrySendError::Full(_)) = &sent {
            tracing::error!(node = node.0, "the engine's inbox is full; an event was dropped");
        }
        self.bell.ring();
        sent.is_ok()
    }
}

impl LinkEvents for Mailbox {
    fn on_event(&self, node: NodeId, event: LinkEvent) {
        self.put(node, Arrival::Event(event));
    }
}

/// How a node is reached, and by which of its links.
struct Reached {
    link: LinkNumber,
    way: Way,
}

enum Way {
    /// By a link that runs by itself and reports to the mailbox.
    Link(Box<dyn Link>),
    /// By a byte stream that the engine reads and writes.
    Stream(Stream),
}

struct Stream {
    connection: Option<Box<Connection>>,
    /// One that gets no frames any more and still owes answers.
    retiring: Option<Box<Connection>>,
    /// Tells the thread that dials to dial again; dropping it ends the thread.
    redial: Sender<()>,
}

/// See the module.
pub struct Links {
    poll: Poll,
    polled: Events,
    bell: Arc<Bell>,
    sender: Sender<(NodeId, LinkNumber, Arrival)>,
    arrivals: Receiver<(NodeId, LinkNumber, Arrival)>,
    links_opened: LinkNumber,
    nodes: BTreeMap<NodeId, Reached>,
    ready: VecDeque<(NodeId, LinkEvent)>,
}

impl Links {
    /// No links yet.
    ///
    /// # Errors
    /// When the system has no epoll instance to spare.
    pub fn new() -> io::Result<Self> {
        let poll = Poll::new()?;
        let bell = Arc::new(Bell::new(&poll, BELL)?);
        let (sender, arrivals) = bounded(INBOX_LEN_MAX);
        Ok(Self {
            poll,
            polled: Events::with_capacity(POLLED_LEN_MAX),
            bell,
            sender,
            arrivals,
            links_opened: 0,
            nodes: BTreeMap::new(),
            ready: VecDeque::new(),
        })
    }

    /// What ends [`Links::next_unless_rung`] although no link has anything to say.
    pub fn bell(&self) -> Arc<Bell> {
        self.bell.clone()
    }

    /// Adds a link that runs by itself and reports to the mailbox that it is opened with. It takes
    /// the place of the one that there was.
    pub fn add(&mut self, node: NodeId, open: impl FnOnce(Arc<Mailbox>) -> Box<dyn Link>) {
        let mailbox = self.mailbox();
        let link = mailbox.link;
        self.remove(node);
        self.nodes.insert(node, Reached { link, way: Way::Link(open(mailbox)) });
    }

    fn mailbox(&mut self) -> Arc<Mailbox> {
        self.links_opened += 1;
        let (arrivals, bell) = (self.sender.clone(), self.bell.clone());
        Arc::new(Mailbox { arrivals, bell, link: self.links_opened })
    }

    /// Gives the link to a node up. Nothing is heard of it any more; that it is gone is no event.
    pub fn remove(&mut self, node: NodeId) {
        self.nodes.remove(&node);
        self.ready.retain(|(of, _)| *of != node);
    }

    /// Adds a byte stream to `peer`, which a thread of its own starts to dial. It takes the place of
    /// the link that there was.
    ///
    /// # Errors
    /// When the system refuses a thread.
    pub fn dial(&mut self, peer: Peer) -> io::Result<()> {
        self.dial_by(peer, None)
    }

    /// The same, with rows that travel by NCCL where and while that is possible.
    ///
    /// # Errors
    /// The same.
    pub fn dial_by(&mut self, peer: Peer, by_nccl: Option<ByNccl>) -> io::Result<()> {
        let node = peer.node;
        // One order to dial at a time: the thread takes the next when it has given a connection.
        let (redial, orders) = bounded(1);
        let mailbox = self.mailbox();
        let link = mailbox.link;
        Dialler::start(peer, by_nccl, mailbox, orders)?;
        self.remove(node);
        let way = Way::Stream(Stream { connection: None, retiring: None, redial });
        self.nodes.insert(node, Reached { link, way });
        Ok(())
    }

    /// Whether any node computes while this thread does something else.
    pub fn are_asynchronous(&self) -> bool {
        self.nodes.values().any(|reached| match &reached.way {
            Way::Link(link) => link.is_asynchronous(),
            Way::Stream(_) => true,
        })
    }

    /// Sends a frame. An answer, or [`LinkEvent::Down`], follows. Blocks for some milliseconds at
    /// most, and only while the node's kernel takes nothing.
    ///
    /// # Errors
    /// When the link is down, breaks, or has too much to write already.
    pub fn send(&mut self, node: NodeId, frame: Dispatch) -> Result<(), NotSent> {
        let stream = match &mut self.nodes.get_mut(&node).ok_or(NotSent)?.way {
            Way::Link(link) => return link.send(frame),
            Way::Stream(stream) => stream,
        };
        let connection = stream.connection.as_mut().ok_or(NotSent)?;
        let ready = &mut self.ready;
        let sent = connection.send(frame, |answer| {
            ready.push_back((node, LinkEvent::Answer(answer)));
        });
        match sent {
            Ok(true) => Ok(()),
            Ok(false) => Err(NotSent),
            Err(broken) => {
                stream.lose();
                ready.push_back((node, LinkEvent::Down(broken.to_string())));
                Err(NotSent)
            }
        }
    }

    /// The next event, if there is one before the time is over.
    pub fn next(&mut self, timeout: Duration) -> Option<(NodeId, LinkEvent)> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(event) = self.look() {
                return Some(event);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            self.wait(Some(left));
            if left.is_zero() {
                return self.look();
            }
        }
    }

    /// The next event, or none when there may be something to do besides: the bell was rung, or the
    /// time is over, if there is a limit to it.
    pub fn next_unless_rung(&mut self, timeout: Option<Duration>) -> Option<(NodeId, LinkEvent)> {
        self.look().or_else(|| {
            self.wait(timeout);
            self.look()
        })
    }

    fn look(&mut self) -> Option<(NodeId, LinkEvent)> {
        while self.ready.is_empty()
            && let Ok((node, link, arrival)) = self.arrivals.try_recv()
        {
            if self.nodes.get(&node).is_none_or(|reached| reached.link != link) {
                continue;
            }
            match arrival {
                Arrival::Event(event) => self.ready.push_back((node, event)),
                Arrival::Instead(connection) => self.replace(node, connection),
                Arrival::Lost { connection, reason } => self.lost(node, connection, reason),
                Arrival::Connected(connection, info, certificate_sha256) => {
                    let up = LinkEvent::Up { info, certificate_sha256 };
                    self.connected(node, connection, up);
                }
            }
        }
        self.ready.pop_front()
    }

    fn stream(nodes: &mut BTreeMap<NodeId, Reached>, node: NodeId) -> Option<&mut Stream> {
        match &mut nodes.get_mut(&node)?.way {
            Way::Link(_) => None,
            Way::Stream(stream) => Some(stream),
        }
    }

    fn connected(&mut self, node: NodeId, mut connection: Box<Connection>, up: LinkEvent) {
        let Some(stream) = Self::stream(&mut self.nodes, node) else { return };
        let token = Token(node.0 as usize);
        let registry = self.poll.registry();
        // Edges: a socket that takes more is told only after it took nothing.
        let interest = Interest::READABLE | Interest::WRITABLE;
        let event = match registry.register(connection.socket_mut(), token, interest) {
            Ok(()) => {
                stream.connection = Some(connection);
                up
            }
            Err(error) => {
                stream.lose();
                LinkEvent::Down(Broken::Lost(error).to_string())
            }
        };
        self.ready.push_back((node, event));
    }

    /// Has a connection take the place of another, unless that is gone: then its node was, too.
    fn replace(&mut self, node: NodeId, mut connection: Box<Connection>) {
        let registry = self.poll.registry();
        let Some(stream) = Self::stream(&mut self.nodes, node) else { return };
        let Some(mut old) = stream.connection.take() else { return };
        let interest = Interest::READABLE | Interest::WRITABLE;
        let (token, retiring) = (node.0 as usize, node.0 as usize | RETIRING);
        let registered = registry
            .reregister(old.socket_mut(), Token(retiring), interest)
            .and_then(|()| registry.register(connection.socket_mut(), Token(token), interest));
        match registered {
            Ok(()) => {
                stream.connection = Some(connection);
                stream.retiring = Some(old).filter(|old| !old.is_idle());
            }
            Err(error) => {
                stream.lose();
                self.ready.push_back((node, LinkEvent::Down(Broken::Lost(error).to_string())));
            }
        }
    }

    fn lost(&mut self, node: NodeId, number: u64, reason: String) {
        let Some(stream) = Self::stream(&mut self.nodes, node) else { return };
        if stream.connection.as_ref().is_some_and(|connection| connection.number() == number) {
            stream.lose();
            self.ready.push_back((node, LinkEvent::Down(reason)));
        }
    }

    fn wait(&mut self, timeout: Option<Duration>) {
        let timeout = if self.bell.park() { timeout } else { Some(Duration::ZERO) };
        let polled = self.poll.poll(&mut self.polled, timeout);
        self.bell.unpark();
        if let Err(error) = polled
            && error.kind() != io::ErrorKind::Interrupted
        {
            tracing::error!(%error, "waiting for links failed");
        }
        for event in self.polled.iter().filter(|event| event.token() != BELL) {
            let node = NodeId(event.token().0 as u32);
            let Some(stream) = Self::stream(&mut self.nodes, node) else { continue };
            let is_retiring = event.token().0 & RETIRING != 0;
            let slot = if is_retiring { &mut stream.retiring } else { &mut stream.connection };
            let Some(connection) = slot else { continue };
            let ready = &mut self.ready;
            let received = connection.receive(event.is_read_closed(), |answer| {
                ready.push_back((node, LinkEvent::Answer(answer)));
            });
            if let Err(broken) = received.and_then(|()| connection.flush()) {
                stream.lose();
                ready.push_back((node, LinkEvent::Down(broken.to_string())));
            } else if is_retiring && connection.is_idle() {
                stream.retiring = None;
            }
        }
    }
}

impl Stream {
    /// Lets go of a connection that is of no more use.
    fn lose(&mut self) {
        (self.connection, self.retiring) = (None, None);
        // A full channel holds the same order already.
        let _ = self.redial.try_send(());
    }
}
