//! The mirror beside a real etcd: what a platform system that watches it sees.

#![allow(clippy::unwrap_used)]

mod etcd;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use entente_membership::mirror::{QUEUE_LEN_MAX, keys, run};
use entente_membership::roster::{Roster, RosterNode, RosterVoter, VoterRole};
use entente_membership::service::{self, Membership, Process};
use entente_membership::state::{self, NodeSpec, NodeState, Role, State};
use entente_proto::identity::Identity;
use entente_proto::ids::{ExpertId, LayerId, NodeId};
use entente_proto::placement::Placement;
use entente_tls::Authority;
use etcd::Etcd;
use etcd_client::{Event, EventType};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;

const PATIENCE: Duration = Duration::from_secs(30);
const ROOT: &str = "/entente/test/";

/// A leader's mirror.
struct Leader {
    states: mpsc::Sender<Arc<State>>,
    leads: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Leader {
    fn of(etcd: &Etcd) -> Self {
        let (states, queue) = mpsc::channel(QUEUE_LEN_MAX);
        let (leads, led) = watch::channel(true);
        let task = tokio::spawn(run(etcd.config(), "test".to_owned(), led, queue));
        Self { states, leads, task }
    }

    async fn show(&self, state: &State) {
        self.states.send(Arc::new(state.clone())).await.unwrap();
    }

    /// Ends once everything that was sent has been shown.
    async fn end(self) {
        drop(self.states);
        timeout(PATIENCE, self.task).await.unwrap().unwrap();
        drop(self.leads);
    }
}

/// A history in which each state differs from the one before it.
fn history() -> Vec<State> {
    let spec = |name: &str, region: &str| NodeSpec {
        name: name.parse().unwrap(),
        region: region.parse().unwrap(),
        site: String::new(),
        role: Role::ExpertNode,
        address: format!("{name}:7000"),
        memory_bytes: None,
        kernel_class: String::new(),
        device: None,
    };
    let mut state = State::genesis(vec![spec("fr-1", "fr"), spec("se-1", "se")]).unwrap();
    let mut history = vec![state.clone()];
    let placement = |nodes: &[u32]| {
        let mut placement = Placement::new();
        for (expert, node) in (0..200).zip(nodes.iter().cycle()) {
            placement.add((LayerId(expert % 150), ExpertId(expert / 150)), NodeId(*node));
        }
        placement
    };
    let commands = [
        state::Command::SetPlacement(placement(&[0])),
        state::Command::AddNode(spec("fr-2", "fr")),
        state::Command::Register(NodeId(2)),
        state::Command::SetState(NodeId(2), NodeState::Active),
        state::Command::SetPlacement(placement(&[0, 2])),
        state::Command::Cordon(NodeId(0), true),
        state::Command::SetState(NodeId(2), NodeState::Down),
    ];
    for (sequence, command) in (1..).zip(commands) {
        let request = state::Request {
            session: state::SessionId(2),
            sequence,
            at_ms: 0,
            expect: state::Expect::default(),
            command,
        };
        if sequence == 1 {
            let open = state::Request { command: state::Command::OpenSession, ..request.clone() };
            state.apply_entry(2, Some(open)).unwrap();
        }
        let outcome = state.apply_entry(state.applied_index() + 1, Some(request)).unwrap();
        outcome.unwrap().unwrap();
        history.push(state.clone());
    }
    history
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watcher_sees_every_committed_change_in_order() {
    let etcd = Etcd::start().await;
    let mut watcher = etcd.watch(ROOT).await;
    let history = history();
    let leader = Leader::of(&etcd);
    for state in &history {
        leader.show(state).await;
    }
    leader.end().await;
    // What a watcher that applies every event has, each time that the epochs are written.
    let mut seen: BTreeMap<String, String> = BTreeMap::new();
    let mut events = VecDeque::new();
    for state in &history {
        let wanted = keys(ROOT, state);
        let epochs = wanted.get_key_value(&format!("{ROOT}epochs")).unwrap();
        while seen.get_key_value(epochs.0) != Some(epochs) {
            while events.is_empty() {
                // Several revisions may come in one message.
                let answer = timeout(PATIENCE, watcher.message()).await.unwrap().unwrap().unwrap();
                events.extend(answer.events().iter().cloned());
            }
            apply(&events.pop_front().unwrap(), &mut seen);
        }
        assert_eq!(seen, wanted);
    }
}

fn apply(event: &Event, seen: &mut BTreeMap<String, String>) {
    let pair = event.kv().unwrap();
    let (key, value) = (pair.key_str().unwrap(), pair.value_str().unwrap());
    match event.event_type() {
        EventType::Put => seen.insert(key.to_owned(), value.to_owned()),
        EventType::Delete => seen.remove(key),
    };
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_was_replaced_overwrites_nothing() {
    let etcd = Etcd::start().await;
    let history = history();
    let (old, new) = (Leader::of(&etcd), Leader::of(&etcd));
    old.show(&history[1]).await;
    old.end().await;
    let late = Leader::of(&etcd);
    late.show(&history[1]).await;
    new.show(history.last().unwrap()).await;
    new.end().await;
    // It still believes that it leads, and has read etcd before.
    late.show(&history[3]).await;
    late.end().await;
    assert_eq!(etcd.all(ROOT).await, keys(ROOT, history.last().unwrap()));
}

#[tokio::test(flavor = "multi_thread")]
async fn who_does_not_lead_writes_nothing() {
    let etcd = Etcd::start().await;
    let follower = Leader::of(&etcd);
    follower.leads.send_replace(false);
    follower.show(&history()[0]).await;
    follower.end().await;
    assert_eq!(etcd.all(ROOT).await, BTreeMap::new());
}

/// A voter that leads alone, and mirrors what it commits.
async fn voter(etcd: &Etcd, dir: &std::path::Path) -> Membership {
    let identity: Identity = "spiffe://test/region/fr/role/coordinator/node/fr-1".parse().unwrap();
    let hour = Duration::from_secs(3_600);
    let authority = Authority::new(&identity.cluster, identity.region, hour).unwrap();
    let issued = authority.issue(&identity, hour).unwrap();
    let credentials = authority.credentials(&issued).unwrap();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let founder = RosterVoter {
        name: identity.node.clone(),
        region: identity.region,
        role: VoterRole::Coordinator,
        address: address.clone(),
    };
    let mut file = service::Config::new(address, dir.to_owned());
    file.etcd = Some(etcd.config());
    let node = RosterNode {
        name: "fr-2".parse().unwrap(),
        region: identity.region,
        address: "127.0.0.1:1".to_owned(),
    };
    let roster = Roster::new("test".to_owned(), 1, vec![node]).unwrap();
    let roster = roster.with_voters(vec![founder]).unwrap();
    let process = Process { listener: Some(listener), ..credentials.into() };
    let started = service::start(file, &roster, &identity.node, process).await;
    started.unwrap().handle
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_voter_commits_is_shown_each_change_once_and_in_order() {
    let (etcd, dir) = (Etcd::start().await, tempfile::tempdir().unwrap());
    let membership = voter(&etcd, dir.path()).await;
    let node = membership.state().borrow().node(&"fr-2".parse().unwrap()).unwrap().id;
    for cordoned in [true, false, true, false, true] {
        let command = state::Command::Cordon(node, cordoned);
        membership.propose(PATIENCE, state::Expect::default(), command).await.unwrap();
    }
    let last = membership.read(PATIENCE).await.unwrap();
    let (mut watcher, mut epochs) = (etcd.watch(ROOT).await, Vec::new());
    while epochs.last() != Some(&last.membership_epoch().0) {
        let answer = timeout(PATIENCE, watcher.message()).await.unwrap().unwrap().unwrap();
        for pair in answer.events().iter().filter_map(Event::kv) {
            if pair.key_str().unwrap().ends_with("/epochs") {
                let value: serde_json::Value = serde_json::from_slice(pair.value()).unwrap();
                epochs.push(value["membership"].as_u64().unwrap());
            }
        }
    }
    epochs.dedup();
    // The first may be late: what was committed before there was a leader to show it.
    assert!(epochs.windows(2).all(|pair| pair[1] == pair[0] + 1), "{epochs:?}");
    assert!(epochs.len() > 5, "{epochs:?}");
}
