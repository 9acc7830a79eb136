//! The replicated state machine: members, their states, the placement, and records by key.
//!
//! Commands come in by two doors. [`State::apply`] takes a bare command; a static roster uses it.
//! [`State::apply_entry`] takes an entry of the log: it checks that entries come one by one, applies
//! a command once however often it was proposed ([`session`]), checks its fence, and marks the hash
//! of the state now and then so that voters can compare it.
//!
//! Time is data here: the state keeps the latest `at_ms` that it was told and decides nothing by it.

pub mod codec;
mod command;
mod encoding;
mod node;
pub mod session;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;
use entente_proto::ids::{Incarnation, MembershipEpoch, NodeId, NodeName, PlacementEpoch, Region};
use entente_proto::placement::Placement;

pub use command::{
    Applied, Command, Expect, Outcome, RecordKind, Refused, RefusedCode, Request, SessionId,
    VoterId,
};
pub use node::{Node, NodeDevice, NodeSpec, NodeState, Role};
use session::Sessions;

use crate::checkpoint;

/// Most nodes that a cluster may have had in its life, removed ones included.
pub const NODES_MAX: usize = 4_096;
/// Most disks that a cluster may have had in its raft group.
pub const VOTERS_MAX: usize = 1_024;
/// Most replicas of an expert that can be wanted in a region.
pub const REPLICAS_MAX: u16 = 16;
/// Most regions that replicas can be wanted in.
pub const REGIONS_MAX: usize = 64;
/// Most replicas in a placement.
pub const PLACED_MAX: usize = 262_144;
/// Most records.
pub const RECORDS_MAX: usize = 4_096;
/// Longest key of a record in bytes.
pub const RECORD_KEY_LEN_MAX: usize = 256;
/// Longest value of a record in bytes.
pub const RECORD_VALUE_LEN_MAX: usize = 16 << 10;
/// Longest address, site or kernel class in bytes.
pub const TEXT_LEN_MAX: usize = 260;
/// Entries between two hashes of the state.
pub const MARK_INTERVAL: u64 = 1_024;
/// Marks that are kept, so that voters which are a little apart have one in common.
const MARKS_KEPT: usize = 4;

/// A record and the revision at which it was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Its content.
    pub value: Bytes,
    /// Rises with every change of any record.
    pub revision: u64,
}

/// SHA-256 of the encoded state after one entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mark {
    /// The entry.
    pub index: u64,
    /// The hash.
    pub sha256: [u8; 32],
}

/// Everything that the cluster has agreed on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct State {
    applied_index: u64,
    clock_ms: u64,
    membership_epoch: MembershipEpoch,
    placement_epoch: PlacementEpoch,
    revision: u64,
    incarnations_minted: u64,
    voters_minted: u64,
    nodes: BTreeMap<NodeId, Node>,
    placement: Arc<Placement>,
    replicas: BTreeMap<Region, u16>,
    records: BTreeMap<(RecordKind, String), Record>,
    voters: BTreeMap<VoterId, Voter>,
    sessions: Sessions,
    marks: BTreeMap<u64, [u8; 32]>,
}

/// A disk of the raft group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Voter {
    /// The node that it belongs to.
    pub node: NodeId,
    /// Taken out of the group, for ever.
    pub retired: bool,
}

/// An entry that does not follow the last one: the caller lost or repeated one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("entry {index} was handed to a state that has applied {applied}")]
pub struct OutOfOrder {
    /// The entry.
    pub index: u64,
    /// The last one applied.
    pub applied: u64,
}

impl State {
    /// The state before the cluster is founded.
    pub fn new() -> Self {
        Self::default()
    }

    /// The state with which a raft group begins: founded with these nodes by the entry at index 1,
    /// which no log ever held.
    pub fn genesis(specs: Vec<NodeSpec>) -> Result<Self, Refused> {
        let mut state = Self { applied_index: 1, ..Self::default() };
        state.apply(Command::Found(specs))?;
        Ok(state)
    }

    /// The last entry of the log that is in it.
    pub fn applied_index(&self) -> u64 {
        self.applied_index
    }

    /// The latest time that a command carried, milliseconds since 1970.
    pub fn clock_ms(&self) -> u64 {
        self.clock_ms
    }

    /// Counts changes of the members.
    pub fn membership_epoch(&self) -> MembershipEpoch {
        self.membership_epoch
    }

    /// Counts changes of the placement.
    pub fn placement_epoch(&self) -> PlacementEpoch {
        self.placement_epoch
    }

    /// Counts changes of records and wanted replicas.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// What differs between two states that differ in more than their index.
    pub fn changes(&self) -> (MembershipEpoch, PlacementEpoch, u64) {
        (self.membership_epoch, self.placement_epoch, self.revision)
    }

    /// All members, removed ones included, in order of number.
    pub fn nodes(&self) -> impl Iterator<Item = &Node> {
        self.nodes.values()
    }

    /// The member of this name.
    pub fn node(&self, name: &NodeName) -> Option<&Node> {
        self.nodes().find(|node| node.spec.name == *name)
    }

    /// The member of this number.
    pub fn node_by_id(&self, id: NodeId) -> Option<&Node> {
        self.nodes.get(&id)
    }

    /// Which node holds which expert.
    pub fn placement(&self) -> &Arc<Placement> {
        &self.placement
    }

    /// Replicas of each expert that each region should have.
    pub fn replicas(&self) -> &BTreeMap<Region, u16> {
        &self.replicas
    }

    /// A record.
    pub fn record(&self, kind: RecordKind, key: &str) -> Option<&Record> {
        self.records.get(&(kind, key.to_owned()))
    }

    /// All records of a kind, in order of key.
    pub fn records(&self, kind: RecordKind) -> impl Iterator<Item = (&str, &Record)> {
        let of_kind = self.records.range((kind, String::new())..);
        of_kind.take_while(move |((k, _), _)| *k == kind).map(|((_, key), r)| (key.as_str(), r))
    }

    /// Every disk that has ever been in the raft group, in order of number.
    pub fn voters(&self) -> impl Iterator<Item = (VoterId, Voter)> {
        self.voters.iter().map(|(id, voter)| (*id, *voter))
    }

    /// Whether the raft group may take this voter in: minted here, and not retired.
    pub fn may_vote(&self, id: VoterId) -> bool {
        self.voters.get(&id).is_some_and(|voter| !voter.retired)
    }

    /// The latest hashes of the state, oldest first.
    pub fn marks(&self) -> impl Iterator<Item = Mark> {
        self.marks.iter().map(|(index, sha256)| Mark { index: *index, sha256: *sha256 })
    }

    /// How many incarnations were ever minted; the latest has this number.
    pub fn incarnations_minted(&self) -> u64 {
        self.incarnations_minted
    }

    /// Applies the entry at `index`: a request, or nothing for an entry that only raft needs.
    /// An index that does not follow the last one is the caller's error, not the request's.
    pub fn apply_entry(
        &mut self,
        index: u64,
        request: Option<Request>,
    ) -> Result<Option<Outcome>, OutOfOrder> {
        if index != self.applied_index + 1 {
            return Err(OutOfOrder { index, applied: self.applied_index });
        }
        self.applied_index = index;
        let outcome = request.map(|request| self.apply_once(request));
        if index.is_multiple_of(MARK_INTERVAL) {
            self.mark();
        }
        Ok(outcome)
    }

    /// Applies a request unless it was applied before.
    fn apply_once(&mut self, request: Request) -> Outcome {
        self.clock_ms = self.clock_ms.max(request.at_ms);
        let Request { session, sequence, expect, command, .. } = request;
        if command == Command::OpenSession {
            return Ok(Applied::Session(self.sessions.open(self.applied_index)));
        }
        if let Some(outcome) = self.sessions.replay(session, sequence) {
            return outcome;
        }
        let outcome = self.check(expect).and_then(|()| self.apply(command));
        self.sessions.keep(session, sequence, self.applied_index, &outcome);
        outcome
    }

    /// The fence.
    fn check(&self, expect: Expect) -> Result<(), Refused> {
        if let Some((id, incarnation)) = expect.incarnation {
            let have = self.member(id)?.incarnation.unwrap_or_default();
            if have != incarnation {
                let text = format_args!(
                    "incarnation {incarnation} of node {id} is fenced; its latest is {have}"
                );
                return Err(Refused::new(RefusedCode::StaleIncarnation, text));
            }
        }
        let epochs = [
            ("membership", expect.membership_epoch.map(|e| e.0), self.membership_epoch.0),
            ("placement", expect.placement_epoch.map(|e| e.0), self.placement_epoch.0),
        ];
        match epochs.into_iter().find(|(_, want, have)| want.is_some_and(|want| want != *have)) {
            None => Ok(()),
            Some((what, want, have)) => {
                let want = want.unwrap_or_default();
                let text = format_args!("decided on {what} epoch {want}; it is {have} now");
                Err(Refused::new(RefusedCode::StaleEpoch, text))
            }
        }
    }

    /// Applies one command. A refused one leaves the state as it was.
    pub fn apply(&mut self, command: Command) -> Outcome {
        let founded = self.membership_epoch != MembershipEpoch::default();
        match command {
            Command::Found(_) if founded => {
                Err(Refused::new(RefusedCode::FoundedAlready, "the cluster is founded already"))
            }
            Command::Found(specs) => self.found(specs),
            Command::OpenSession => Ok(Applied::Session(self.sessions.open(self.applied_index))),
            _ if !founded => {
                Err(Refused::new(RefusedCode::NotFounded, "the cluster is not founded"))
            }
            Command::AddNode(spec) => self.add(spec),
            Command::Register(id) => self.register(id, NodeSpec::clone),
            Command::RegisterWith { node, address, memory_bytes, kernel_class, device } => {
                let said = |spec: &NodeSpec| {
                    let spec = spec.clone();
                    NodeSpec { address, memory_bytes, kernel_class, device, ..spec }
                };
                self.register(node, said)
            }
            Command::SetState(id, state) => self.set_state(id, state),
            Command::Cordon(id, cordoned) => self.cordon(id, cordoned),
            Command::SetPlacement(placement) => self.set_placement(placement),
            Command::SetReplicas(region, replicas) => self.set_replicas(region, replicas),
            Command::PutRecord { kind, key, value, revision } => {
                self.put_record((kind, key), value, revision)
            }
            Command::DeleteRecord { kind, key, revision } => {
                self.delete_record((kind, key), revision)
            }
            Command::MintVoter(id) => self.mint_voter(id),
        }
    }

    fn found(&mut self, mut specs: Vec<NodeSpec>) -> Outcome {
        if specs.len() > NODES_MAX {
            return Err(too_many("nodes, removed ones included", NODES_MAX));
        }
        specs.iter().try_for_each(check_spec)?;
        specs.sort_by(|a, b| a.name.cmp(&b.name));
        if let Some(pair) = specs.windows(2).find(|pair| pair[0].name == pair[1].name) {
            return Err(name_taken(&pair[0].name));
        }
        for spec in specs {
            let votes = spec.role.votes();
            let id = self.insert(spec, NodeState::Active);
            if votes {
                self.insert_voter(id);
            }
        }
        Ok(self.membership_changed())
    }

    fn add(&mut self, spec: NodeSpec) -> Outcome {
        check_spec(&spec)?;
        if self.node(&spec.name).is_some() {
            return Err(name_taken(&spec.name));
        }
        if self.nodes.len() >= NODES_MAX {
            return Err(too_many("nodes, removed ones included", NODES_MAX));
        }
        let id = self.insert(spec, NodeState::Joining);
        self.membership_changed();
        Ok(Applied::Added(id))
    }

    /// Numbers count up: no entry is ever taken out, so the count is the next free number.
    fn insert(&mut self, spec: NodeSpec, state: NodeState) -> NodeId {
        let id = NodeId(self.nodes.len() as u32);
        let changed_at_ms = self.clock_ms;
        let node = Node { id, spec, state, cordoned: false, incarnation: None, changed_at_ms };
        self.nodes.insert(id, node);
        id
    }

    /// `said` makes of what is known of the node what it says of itself now.
    fn register(&mut self, id: NodeId, said: impl FnOnce(&NodeSpec) -> NodeSpec) -> Outcome {
        let (incarnation, now_ms) = (Incarnation(self.incarnations_minted + 1), self.clock_ms);
        let node = self.member_mut(id)?;
        let spec = said(&node.spec);
        check_spec(&spec)?;
        if node.state == NodeState::Removed {
            return Err(transition(node, NodeState::Joining));
        }
        node.spec = spec;
        node.state = NodeState::Joining;
        node.changed_at_ms = now_ms;
        node.incarnation = Some(incarnation);
        self.incarnations_minted = incarnation.0;
        self.membership_changed();
        Ok(Applied::Registered(incarnation))
    }

    fn set_state(&mut self, id: NodeId, to: NodeState) -> Outcome {
        let (replicas, now_ms) = (self.placement.experts_of(id).len(), self.clock_ms);
        let node = self.member_mut(id)?;
        if !node.state.may_become(to) {
            return Err(transition(node, to));
        }
        if to == NodeState::Removed && replicas > 0 {
            let name = &node.spec.name;
            let text =
                format_args!("node {name} has {replicas} replicas placed on it; move them first");
            return Err(Refused::new(RefusedCode::StillPlaced, text));
        }
        node.state = to;
        node.changed_at_ms = now_ms;
        Ok(self.membership_changed())
    }

    fn cordon(&mut self, id: NodeId, cordoned: bool) -> Outcome {
        self.member_mut(id)?.cordoned = cordoned;
        Ok(self.membership_changed())
    }

    /// A replica that is there may stay wherever it is; a new one needs a node that takes any.
    fn set_placement(&mut self, placement: Placement) -> Outcome {
        if placement.iter().map(|(_, nodes)| nodes.len()).sum::<usize>() > PLACED_MAX {
            return Err(too_many("replicas placed", PLACED_MAX));
        }
        for (expert, nodes) in placement.iter() {
            let held: BTreeSet<NodeId> = self.placement.replicas(expert).collect();
            for id in nodes {
                let node = self.nodes.get(id).filter(|node| {
                    node.spec.role == Role::ExpertNode && node.state != NodeState::Removed
                });
                let Some(node) = node else {
                    let text = format_args!(
                        "the placement names node {id}, which is no expert node of this cluster"
                    );
                    return Err(Refused::new(RefusedCode::NoExpertNode, text));
                };
                if !held.contains(id) && !node.takes_replicas() {
                    let (name, state, cordoned) = (&node.spec.name, node.state, node.cordoned);
                    let text = format_args!(
                        "node {name} takes no new replicas: {state:?}, cordoned: {cordoned}"
                    );
                    return Err(Refused::new(RefusedCode::NoReplicasThere, text));
                }
            }
        }
        self.placement = Arc::new(placement);
        self.placement_epoch.0 += 1;
        Ok(Applied::Placement(self.placement_epoch))
    }

    fn set_replicas(&mut self, region: Region, replicas: u16) -> Outcome {
        if replicas > REPLICAS_MAX {
            return Err(too_many("replicas wanted of an expert", REPLICAS_MAX.into()));
        }
        if self.replicas.len() >= REGIONS_MAX && !self.replicas.contains_key(&region) {
            return Err(too_many("regions", REGIONS_MAX));
        }
        self.replicas.insert(region, replicas);
        self.revision += 1;
        Ok(Applied::Revision(self.revision))
    }

    fn put_record(
        &mut self,
        key: (RecordKind, String),
        value: Bytes,
        expected: Option<u64>,
    ) -> Outcome {
        self.check_revision(&key, expected)?;
        if key.1.is_empty() || key.1.len() > RECORD_KEY_LEN_MAX {
            return Err(invalid("the key of a record", "1", RECORD_KEY_LEN_MAX, key.1.len()));
        }
        if value.len() > RECORD_VALUE_LEN_MAX {
            return Err(invalid("the value of a record", "0", RECORD_VALUE_LEN_MAX, value.len()));
        }
        if key.0 == RecordKind::Checkpoint {
            let before = self.records.get(&key).map(|record| &record.value[..]);
            checkpoint::check(&key.1, before, &value)
                .map_err(|reason| Refused::new(RefusedCode::NotAContinuation, reason))?;
        }
        if self.records.len() >= RECORDS_MAX && !self.records.contains_key(&key) {
            return Err(too_many("records", RECORDS_MAX));
        }
        self.revision += 1;
        self.records.insert(key, Record { value, revision: self.revision });
        Ok(Applied::Revision(self.revision))
    }

    fn delete_record(&mut self, key: (RecordKind, String), expected: Option<u64>) -> Outcome {
        self.check_revision(&key, expected)?;
        if key.0 == RecordKind::Checkpoint {
            let text = "what an audit log has said is not deleted";
            return Err(Refused::new(RefusedCode::NotAContinuation, text));
        }
        self.records.remove(&key);
        self.revision += 1;
        Ok(Applied::Revision(self.revision))
    }

    fn check_revision(
        &self,
        key: &(RecordKind, String),
        expected: Option<u64>,
    ) -> Result<(), Refused> {
        let have = self.records.get(key).map_or(0, |record| record.revision);
        match expected {
            Some(want) if want != have => {
                let text = format_args!("record {:?} is at revision {have}, not {want}", key.1);
                Err(Refused::new(RefusedCode::StaleRevision, text))
            }
            _ => Ok(()),
        }
    }

    fn mint_voter(&mut self, id: NodeId) -> Outcome {
        let node = self.member(id)?;
        if !node.spec.role.votes() || node.state == NodeState::Removed {
            let (name, role, state) = (&node.spec.name, node.spec.role, node.state);
            let text = format_args!("node {name} does not vote: {role:?}, {state:?}");
            return Err(Refused::new(RefusedCode::DoesNotVote, text));
        }
        if self.voters.len() >= VOTERS_MAX {
            return Err(too_many("voters, retired ones included", VOTERS_MAX));
        }
        let voter = self.insert_voter(id);
        self.membership_changed();
        Ok(Applied::Voter(voter))
    }

    fn insert_voter(&mut self, node: NodeId) -> VoterId {
        self.voters_minted += 1;
        let id = VoterId(self.voters_minted);
        self.voters.insert(id, Voter { node, retired: false });
        id
    }

    /// Raft has taken the voter out of its group. Its number is not taken in again.
    pub fn retire_voter(&mut self, id: VoterId) {
        if let Some(voter) = self.voters.get_mut(&id) {
            voter.retired = true;
            self.membership_changed();
        }
    }

    fn member(&self, id: NodeId) -> Result<&Node, Refused> {
        self.nodes.get(&id).ok_or_else(|| not_a_member(id))
    }

    fn member_mut(&mut self, id: NodeId) -> Result<&mut Node, Refused> {
        self.nodes.get_mut(&id).ok_or_else(|| not_a_member(id))
    }

    fn membership_changed(&mut self) -> Applied {
        self.membership_epoch.0 += 1;
        Applied::Membership(self.membership_epoch)
    }

    /// Hashes the state, the earlier marks included, so that a difference is never forgotten.
    fn mark(&mut self) {
        let sha256 = codec::sha256(&self.encode());
        self.marks.insert(self.applied_index, sha256);
        while self.marks.len() > MARKS_KEPT {
            self.marks.pop_first();
        }
    }
}

fn check_spec(spec: &NodeSpec) -> Result<(), Refused> {
    check_text("address", &spec.address)?;
    check_text("site", &spec.site)?;
    check_text("kernel class", &spec.kernel_class)?;
    spec.device.iter().try_for_each(|device| {
        check_text("name of its device", &device.name)?;
        check_text("UUID of its device", &device.uuid)
    })
}

fn check_text(what: &str, text: &str) -> Result<(), Refused> {
    if text.len() > TEXT_LEN_MAX {
        return Err(invalid(what, "0", TEXT_LEN_MAX, text.len()));
    }
    Ok(())
}

fn invalid(what: &str, min: &str, max: usize, len: usize) -> Refused {
    let text = format_args!("{what} has {len} bytes, allowed is {min} to {max}");
    Refused::new(RefusedCode::Invalid, text)
}

fn too_many(what: &str, max: usize) -> Refused {
    Refused::new(
        RefusedCode::TooMany,
        format_args!("the cluster would have more than {max} {what}"),
    )
}

fn name_taken(name: &NodeName) -> Refused {
    Refused::new(RefusedCode::NameTaken, format_args!("node {name} is, or was, a member already"))
}

fn not_a_member(id: NodeId) -> Refused {
    Refused::new(RefusedCode::NotAMember, format_args!("node {id} is not a member"))
}

fn transition(node: &Node, to: NodeState) -> Refused {
    let (name, from) = (&node.spec.name, node.state);
    Refused::new(
        RefusedCode::Transition,
        format_args!("node {name} is {from:?} and cannot become {to:?}"),
    )
}
