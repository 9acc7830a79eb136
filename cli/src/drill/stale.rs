//! A coordinator that has slept through changes of the cluster and does not know it.
//!
//! A process that was stopped and goes on hears within milliseconds of what it missed, so by itself
//! it gets little out that is stale. This does in its name all that it could have done: over
//! connections of its own, with that coordinator's certificate and key, and believing what was
//! committed before the first strike. None of it may count, and the same frame under today's fence
//! must, or nothing is shown.

use std::fs;
use std::ops::AddAssign;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use entente_coordinator::Config;
use entente_coordinator::link::Peer;
use entente_coordinator::link::grpc::GrpcLink;
use entente_membership::client::{Client, ClientError};
use entente_membership::state::{Command, Expect, Node, NodeState, RefusedCode, Role, State};
use entente_model::{Checkpoint, kernels};
use entente_proto::frame::{Assignment, Dispatch, Dtype, Refusal};
use entente_proto::identity::{Expected, Role as IdentityRole};
use entente_proto::ids::{ExchangeId, Fence, NodeId, NodeName, RequestId};
use entente_proto::link::{Link, LinkEvent, LinkEvents, NodeInfo};
use entente_tls::{ALPN_GRPC, Credentials};
use serde::Serialize;

use super::control::Control;

/// How far the cluster must have moved on. Nodes take what is one commit behind.
const EPOCHS_PASSED_MIN: u64 = 2;

/// Frames that are out to one node at once.
const IN_FLIGHT_MAX: usize = 64;

/// Sessions that propose at once.
const PROPOSERS: u64 = 8;

/// How long one answer of a node, and one of the voters, may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// What was sent, and what became of it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Stale {
    /// Frames that were to be sent to expert nodes.
    pub exchanges: u64,
    /// Those that a node refused for their fence.
    pub exchanges_refused: u64,
    /// Changes that were to be proposed to the leader.
    pub proposals: u64,
    /// Those that were refused for their fence.
    pub proposals_refused: u64,
    /// How often what the cluster has agreed on was something else afterwards.
    pub states_changed: u64,
}

impl AddAssign for Stale {
    fn add_assign(&mut self, more: Self) {
        self.exchanges += more.exchanges;
        self.exchanges_refused += more.exchanges_refused;
        self.proposals += more.proposals;
        self.proposals_refused += more.proposals_refused;
        self.states_changed += more.states_changed;
    }
}

/// Somebody with the credentials of one coordinator, who believes what was committed once.
pub struct Sleeper<'a> {
    control: &'a Control,
    believed: &'a State,
    config: Config,
    credentials: Credentials,
    /// Values of a row, and how they are written.
    row: (usize, Dtype),
}

impl<'a> Sleeper<'a> {
    /// Finds in `data_dir` what the coordinator `name` has to show.
    ///
    /// # Errors
    /// There is no such coordinator, or what it is configured with cannot be read.
    pub fn new(
        control: &'a Control,
        believed: &'a State,
        (data_dir, name): (&Path, &NodeName),
    ) -> anyhow::Result<Self> {
        let path = data_dir.join(format!("{name}.toml"));
        let cannot = || format!("{name} is no coordinator by {}", path.display());
        let text = fs::read_to_string(&path).with_context(cannot)?;
        let config: Config = toml::from_str(&text).with_context(cannot)?;
        let files = config.tls.as_ref().context("a coordinator without a certificate")?;
        let credentials = Credentials::load(files)?;
        let hidden = Checkpoint::open(&config.model)?.architecture().hidden;
        let row = (hidden, kernels::select(config.weights, 1)?.row_dtype());
        Ok(Self { control, believed, config, credentials, row })
    }

    /// Sends so much of both, once nothing moves any more.
    ///
    /// # Errors
    /// The cluster has not moved on, or cannot be asked.
    pub fn send(&self, exchanges: u64, proposals: u64) -> anyhow::Result<Stale> {
        let before = self.control.at_rest()?;
        let (then, now) = (self.believed.changes(), before.changes());
        ensure!(
            now.0.0 >= then.0.0 + EPOCHS_PASSED_MIN && now.1.0 >= then.1.0 + EPOCHS_PASSED_MIN,
            "nothing is stale: membership and placement epoch went from {} and {} to {} and {}",
            then.0,
            then.1,
            now.0,
            now.1
        );
        let exchanges_refused = self.exchanges(&before, exchanges)?;
        let proposals_refused = self.proposals(&before, proposals)?;
        // What is refused is an entry of the log like any other.
        let after = self.control.state_from(before.applied_index() + proposals)?;
        let states_changed = u64::from(before.agreed_sha256() != after.agreed_sha256());
        Ok(Stale { exchanges, exchanges_refused, proposals, proposals_refused, states_changed })
    }

    /// Sends frames to every node that the coordinator used; how many were refused for their fence.
    fn exchanges(&self, now: &State, count: u64) -> anyhow::Result<u64> {
        let is_used = |node: &&Node| {
            node.spec.role == Role::ExpertNode
                && node.spec.region == self.config.region
                && node.state == NodeState::Active
        };
        let nodes: Vec<&Node> = now.nodes().filter(is_used).collect();
        ensure!(!nodes.is_empty(), "no expert node in {} takes traffic", self.config.region);
        let len = nodes.len() as u64;
        let share = |at: u64| count / len + u64::from(at < count % len);
        (0..len).zip(nodes).map(|(at, node)| self.exchanges_with(node, share(at))).sum()
    }

    fn exchanges_with(&self, node: &Node, count: u64) -> anyhow::Result<u64> {
        let name = &node.spec.name;
        let (events, heard) = sync_channel(2 * IN_FLIGHT_MAX);
        let runtime = self.control.runtime();
        let link = GrpcLink::open(self.peer(node)?, Arc::new(Inbox(events)), runtime);
        let LinkEvent::Up { info, .. } = hear(&heard)? else { bail!("{name} cannot be reached") };
        let today = self.frame(&info, info.fence, 0)?;
        link.send(today)?;
        match hear(&heard)? {
            LinkEvent::Answer(answer) => {
                answer.result.with_context(|| format!("{name} computes no frame of today"))?
            }
            event => bail!("{name} did not answer a frame of today: {event:?}"),
        };
        let fence = self.believed_fence(node, &info)?;
        let (mut sent, mut answered, mut refused) = (0, 0, 0);
        while answered < count {
            while sent < count && sent - answered < IN_FLIGHT_MAX as u64 {
                sent += 1;
                link.send(self.frame(&info, fence, sent)?)?;
            }
            match hear(&heard)? {
                LinkEvent::Answer(answer) => {
                    answered += 1;
                    refused += u64::from(matches!(answer.result, Err(Refusal::StaleFence(_))));
                }
                event => bail!("the link to {name}: {event:?}"),
            }
        }
        Ok(refused)
    }

    /// The fence that the coordinator used when it knew no better.
    fn believed_fence(&self, node: &Node, info: &NodeInfo) -> anyhow::Result<Fence> {
        let believed = self.believed.node_by_id(node.id).context("the node was no member then")?;
        let (membership_epoch, placement_epoch, _) = self.believed.changes();
        let incarnation = believed.incarnation.context("the node had not registered then")?;
        Ok(Fence { membership_epoch, placement_epoch, incarnation, ..info.fence })
    }

    /// A frame of one row for one expert that the node holds.
    fn frame(&self, info: &NodeInfo, fence: Fence, number: u64) -> anyhow::Result<Dispatch> {
        let (layer, expert) = *info.experts.first().context("the node holds no expert")?;
        let (hidden, dtype) = self.row;
        Ok(Dispatch {
            exchange: ExchangeId(number),
            fence,
            layer,
            allowed_regions: [self.config.region].into(),
            deadline_ms: PATIENCE.as_millis() as u32,
            dtype,
            hidden,
            assignments: vec![Assignment { row: 0, expert }],
            requests: vec![(RequestId(0), 1)],
            rows: vec![0; hidden * dtype.size()].into(),
        })
    }

    fn peer(&self, node: &Node) -> anyhow::Result<Peer> {
        let cluster = self.credentials.identity().cluster.clone();
        let member = Some((node.spec.region, node.spec.name.clone()));
        let expected = Expected { cluster, roles: vec![IdentityRole::Expert], member };
        Ok(Peer {
            node: node.id,
            name: node.spec.name.clone(),
            address: node.spec.address.clone(),
            tls: Some(self.credentials.client(expected, &[ALPN_GRPC])?),
        })
    }

    /// Proposes changes; how many were refused for their fence.
    fn proposals(&self, now: &State, count: u64) -> anyhow::Result<u64> {
        let (next, refused) = (AtomicU64::new(0), AtomicU64::new(0));
        let changes = self.changes(now)?;
        let propose = |client: Client| {
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= count {
                    return anyhow::Ok(());
                }
                let (expect, command) = changes[number as usize % changes.len()].clone();
                let proposed = client.propose(PATIENCE, expect, command);
                match self.control.runtime().block_on(proposed) {
                    Err(ClientError::Refused(why)) if is_fenced(why.code) => {
                        refused.fetch_add(1, Ordering::Relaxed);
                    }
                    Ok(_) | Err(ClientError::Refused(_)) => {}
                    Err(error) => return Err(error.into()),
                }
            }
        };
        let client = |_| self.control.client(&self.credentials);
        let clients = (0..PROPOSERS).map(client).collect::<anyhow::Result<Vec<_>>>()?;
        thread::scope(|scope| {
            let propose = &propose;
            let running: Vec<_> =
                clients.into_iter().map(|client| scope.spawn(move || propose(client))).collect();
            running.into_iter().try_for_each(|one| one.join().expect("proposing does not panic"))
        })?;
        Ok(refused.into_inner())
    }

    /// Changes that the coordinator could have decided on when it knew no better, each with what it
    /// rests on: the members, the placement, and the start of a node that was started again since.
    fn changes(&self, now: &State) -> anyhow::Result<Vec<(Expect, Command)>> {
        let (membership_epoch, placement_epoch, _) = self.believed.changes();
        let is_later = |node: &&Node| {
            let later = now.node_by_id(node.id).and_then(|later| later.incarnation);
            node.incarnation.is_some() && later > node.incarnation
        };
        let again = self.believed.nodes().find(is_later);
        let again = again.context("no node that the coordinator knew was started again")?;
        let members = Expect { membership_epoch: Some(membership_epoch), ..Expect::default() };
        let placed = Expect { placement_epoch: Some(placement_epoch), ..Expect::default() };
        let start = again.incarnation.map(|incarnation| (again.id, incarnation));
        let start = Expect { incarnation: start, ..Expect::default() };
        let placement = self.believed.placement().as_ref().clone();
        Ok(vec![
            (members, Command::Cordon(again.id, true)),
            (placed, Command::SetPlacement(placement)),
            (start, Command::SetState(again.id, NodeState::Down)),
        ])
    }
}

fn is_fenced(code: RefusedCode) -> bool {
    matches!(code, RefusedCode::StaleEpoch | RefusedCode::StaleIncarnation)
}

/// What a link reports, for the thread that sends.
struct Inbox(SyncSender<LinkEvent>);

impl LinkEvents for Inbox {
    fn on_event(&self, _: NodeId, event: LinkEvent) {
        // There is room for twice of what can be out; whoever misses an event says so in the end.
        let _ = self.0.try_send(event);
    }
}

fn hear(heard: &Receiver<LinkEvent>) -> anyhow::Result<LinkEvent> {
    heard.recv_timeout(PATIENCE).context("a node did not answer in time")
}
