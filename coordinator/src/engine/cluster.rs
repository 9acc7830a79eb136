//! The cluster as the engine works with it: the view, and the links that make nodes reachable.
//! Both follow the committed state while the engine serves.
//!
//! ```text
//!   raft, or a file ── State ──► watch ── bell ─┐
//!                                               ├─► view (who is live, what is where) ─► exchanges
//!   links ── up, down ──────────────────────────┘        │
//!     ▲                                                  │
//!     └── opened, opened anew, given up ─────────────────┘
//! ```
//!
//! A node of the home region has a link from when it joins until it is down or removed: the link is
//! up by the time that the node takes traffic. It is opened anew when the node is elsewhere, and
//! when it has been started anew unless the link leads to that start already. So a node that comes
//! back is dialled when its commit arrives and not after a pause.
//!
//! What it does not know: exchanges, who decides what is committed, how.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use entente_membership::state::{Node, NodeState, Role, State};
use entente_proto::frame::Dispatch;
use entente_proto::ids::{Incarnation, KernelClass, NodeId, Region};
use entente_proto::link::{LinkEvent, NodeInfo, NotSent};
use entente_router::view::{ClusterView, Committed, Member, Model};
use prometheus::IntCounter;
use tokio::sync::watch;

use super::tally::Touched;
use crate::Error;
use crate::link::{Bell, Links, Opener};
use crate::metrics::Metrics;

/// Whether requests could be served now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Readiness {
    /// Every expert has a live replica.
    Ready,
    /// Something is missing; the text says what.
    Waiting(String),
}

/// See the module.
pub struct Cluster {
    links: Links,
    view: ClusterView,
    /// Where changes come from; absent where there are none.
    source: Option<Source>,
    /// What each link was opened to.
    targets: BTreeMap<NodeId, Target>,
    /// The nodes that are up.
    peers: BTreeMap<NodeId, Peer>,
    changes: u64,
    readiness: watch::Sender<Readiness>,
    metrics: Arc<Metrics>,
}

/// A node that is up, for whoever counts what is sent to it.
pub struct Peer {
    /// Which start of which node it is, and what it showed.
    pub touched: Arc<Touched>,
    /// Rows sent to nodes of its region.
    pub rows: IntCounter,
}

/// What was committed last, and what it takes to reach the nodes that it names.
struct Source {
    states: watch::Receiver<Arc<State>>,
    opener: Opener,
}

/// What makes a link worth opening anew when it changes.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Target {
    address: String,
    incarnation: Option<Incarnation>,
    serves: bool,
}

impl Target {
    fn of(node: &Node) -> Self {
        let address = node.spec.address.clone();
        Self { address, incarnation: node.incarnation, serves: serves(node) }
    }
}

fn serves(node: &Node) -> bool {
    matches!(node.state, NodeState::Active | NodeState::Draining)
}

/// The router's form of the state.
pub fn committed(state: &State) -> Committed {
    let member = |node: &Node| {
        let (name, region) = (node.spec.name.clone(), node.spec.region);
        let (serves, incarnation) = (serves(node), node.incarnation);
        let kernel_class = KernelClass(node.spec.kernel_class.clone());
        (node.id, Member { name, region, serves, incarnation, kernel_class })
    };
    let is_member =
        |node: &&Node| node.spec.role == Role::ExpertNode && node.state != NodeState::Removed;
    Committed {
        membership_epoch: state.membership_epoch(),
        placement_epoch: state.placement_epoch(),
        members: state.nodes().filter(is_member).map(member).collect(),
        placement: state.placement().clone(),
    }
}

impl Cluster {
    /// Opens the links that the state calls for. From here on a change of `states` rings the bell.
    ///
    /// # Errors
    /// When a link cannot be opened.
    pub fn open(
        opener: Opener,
        (home, model): (Region, Model),
        mut states: watch::Receiver<Arc<State>>,
        metrics: Arc<Metrics>,
    ) -> Result<Self, Error> {
        let links = Links::new().map_err(|error| Error::Start(error.to_string()))?;
        ring_on_change(states.clone(), links.bell(), &opener.runtime);
        let state = states.borrow_and_update().clone();
        let view = ClusterView::new(home, model, committed(&state));
        let mut cluster = Self::fixed(links, view, metrics);
        for node in cluster.reachable(&state) {
            cluster.link(node, &opener)?;
        }
        cluster.source = Some(Source { states, opener });
        Ok(cluster)
    }

    /// A cluster in which nothing is ever committed, over links that are open.
    pub fn fixed(links: Links, view: ClusterView, metrics: Arc<Metrics>) -> Self {
        let waiting = Readiness::Waiting("expert nodes are being connected".into());
        let cluster = Self {
            links,
            source: None,
            targets: BTreeMap::new(),
            peers: BTreeMap::new(),
            view,
            changes: 0,
            readiness: watch::Sender::new(waiting),
            metrics,
        };
        cluster.publish();
        cluster
    }

    /// Who is there, and what is where.
    pub fn view(&self) -> &ClusterView {
        &self.view
    }

    /// The node at the other end of a link that is up.
    pub fn peer(&self, node: NodeId) -> Option<&Peer> {
        self.peers.get(&node)
    }

    /// Counts the times that something became possible which was not: a node came up, or the
    /// cluster committed something.
    pub fn changes(&self) -> u64 {
        self.changes
    }

    /// What ends [`Cluster::next`] early.
    pub fn bell(&self) -> Arc<Bell> {
        self.links.bell()
    }

    /// Whether every expert has a live replica that this coordinator may use.
    pub fn readiness(&self) -> watch::Receiver<Readiness> {
        self.readiness.subscribe()
    }

    /// Says that nothing can be served any more, and why, whatever the nodes do.
    pub fn withdraw(&self, why: String) {
        self.readiness.send_replace(Readiness::Waiting(why));
    }

    /// Whether nodes compute while this thread does something else.
    pub fn overlaps(&self) -> bool {
        self.links.are_asynchronous()
    }

    /// See [`Links::send`].
    ///
    /// # Errors
    /// When the link did not take the frame.
    pub fn send(&mut self, node: NodeId, frame: Dispatch) -> Result<(), NotSent> {
        self.links.send(node, frame)
    }

    /// The next event of a link; none when the time is over or the bell was rung.
    pub fn next(&mut self, timeout: Option<Duration>) -> Option<(NodeId, LinkEvent)> {
        self.links.next_unless_rung(timeout)
    }

    /// The next event of a link that is there already.
    pub fn next_at_once(&mut self) -> Option<(NodeId, LinkEvent)> {
        self.links.next(Duration::ZERO)
    }

    /// Takes note that a node says it is there, and what it showed. Whether it is used from now on.
    pub fn node_up(&mut self, node: NodeId, info: &NodeInfo, certificate_sha256: [u8; 32]) -> bool {
        if let Err(mismatch) = self.view.node_up(node, info) {
            tracing::error!(node = %info.name, %mismatch, "expert node is not usable");
            return false;
        }
        let touched = Arc::new(Touched {
            node: info.name.clone(),
            region: info.region,
            incarnation: info.fence.incarnation,
            certificate_sha256,
            kernel_class: info.kernel_class.clone(),
        });
        let rows = self.metrics.expert_rows.with_label_values(&[info.region.as_str()]);
        self.peers.insert(node, Peer { touched, rows });
        let live = self.view.fence(node).is_some();
        tracing::info!(node = %info.name, kernel_class = %info.kernel_class, live, "expert node is up");
        self.changes += u64::from(live);
        self.publish();
        live
    }

    /// Takes note that the link to a node broke.
    pub fn node_down(&mut self, node: NodeId, reason: &str) {
        tracing::warn!(node = node.0, reason, "expert node is down");
        self.peers.remove(&node);
        self.view.node_down(node);
        self.publish();
    }

    /// Follows the state that was committed last, unless it has already: then none. Gives the nodes
    /// whose links were given up for it.
    pub fn follow(&mut self) -> Option<Vec<NodeId>> {
        let mut source = self.source.take_if(|s| s.states.has_changed().unwrap_or(false))?;
        let state = source.states.borrow_and_update().clone();
        let news = self.view.follow(committed(&state));
        let given_up = news.then(|| self.relink(&state, &source.opener));
        self.source = Some(source);
        let given_up = given_up?;
        self.changes += 1;
        self.publish();
        Some(given_up)
    }

    /// The nodes that are to have a link.
    fn reachable<'a>(&self, state: &'a State) -> Vec<&'a Node> {
        let is_reachable = |node: &&Node| {
            node.spec.role == Role::ExpertNode
                && node.spec.region == self.view.home
                && !node.spec.address.is_empty()
                && !matches!(node.state, NodeState::Down | NodeState::Removed)
        };
        state.nodes().filter(is_reachable).collect()
    }

    /// Opens links and gives links up, so that they are those that the state calls for.
    fn relink(&mut self, state: &State, opener: &Opener) -> Vec<NodeId> {
        let wanted = self.reachable(state);
        let stays = |id: &NodeId| wanted.iter().any(|node| node.id == *id && self.is_linked(node));
        let given_up: Vec<NodeId> = self.targets.keys().copied().filter(|id| !stays(id)).collect();
        for id in &given_up {
            self.links.remove(*id);
            self.view.node_down(*id);
            self.targets.remove(id);
            self.peers.remove(id);
        }
        for node in wanted {
            if let Some(target) = self.targets.get_mut(&node.id) {
                *target = Target::of(node);
            } else if let Err(error) = self.link(node, opener) {
                tracing::error!(node = %node.spec.name, %error, "expert node cannot be linked to");
            }
        }
        given_up
    }

    /// Whether the node has a link that will do as it is.
    fn is_linked(&self, node: &Node) -> bool {
        let Some(have) = self.targets.get(&node.id) else { return false };
        let want = Target::of(node);
        let linked = self.view.nodes.get(&node.id).and_then(|node| node.linked);
        let leads_there =
            linked.is_some() && (want.incarnation.is_none() || linked == want.incarnation);
        *have == want || (have.address == want.address && leads_there)
    }

    fn link(&mut self, node: &Node, opener: &Opener) -> Result<(), Error> {
        opener.open(node, &mut self.links)?;
        self.targets.insert(node.id, Target::of(node));
        Ok(())
    }

    /// Tells who wants to know what can be served now.
    fn publish(&self) {
        self.metrics.cluster.membership_epoch.set(self.view.membership_epoch.0 as i64);
        self.metrics.cluster.placement_epoch.set(self.view.placement_epoch.0 as i64);
        // Every request that is served is allowed at home, and no other region is used.
        let now = match self.view.missing(&[self.view.home].into()) {
            None => Readiness::Ready,
            Some((layer, _)) => {
                Readiness::Waiting(format!("an expert of layer {layer} has no live replica"))
            }
        };
        self.readiness.send_if_modified(|shown| {
            let changed = *shown != now;
            *shown = now;
            changed
        });
    }
}

/// Rings the bell for each new state. Ends when there can be no more.
fn ring_on_change(
    mut states: watch::Receiver<Arc<State>>,
    bell: Arc<Bell>,
    runtime: &tokio::runtime::Handle,
) {
    runtime.spawn(async move {
        while states.changed().await.is_ok() {
            bell.ring();
        }
    });
}
