//! Requests as bytes, and what they and states have in common: prost messages, checked on the way in.

use bytes::Bytes;
use entente_proto::ids::{
    ExpertId, Incarnation, InvalidId, LayerId, MembershipEpoch, NodeId, PlacementEpoch,
};
use entente_proto::list;
use entente_proto::placement::Placement;
use entente_proto::wire::{self, membership_outcome, membership_request};
use prost::{DecodeError, Message};
use sha2::{Digest, Sha256};

use super::{
    Applied, Command, Expect, Node, NodeDevice, NodeSpec, NodeState, Outcome, RecordKind, Refused,
    RefusedCode, Request, Role, SessionId, VoterId,
};

/// Longest encoded request in bytes; a placement of 65,536 replicas fits.
pub const REQUEST_LEN_MAX: usize = 2 << 20;
/// Longest encoded state in bytes.
pub const STATE_LEN_MAX: usize = 128 << 20;

/// Why bytes are not a request or a state.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// Longer than anything that is written.
    #[error("{what} has {len} bytes, allowed is {max}")]
    TooLong {
        /// What it should be.
        what: &'static str,
        /// Its length.
        len: usize,
        /// The bound.
        max: usize,
    },
    /// Not the message.
    #[error("{what} cannot be decoded: {reason}")]
    Prost {
        /// What it should be.
        what: &'static str,
        /// What prost says.
        reason: String,
    },
    /// A field is missing or has no meaning here; perhaps a newer version wrote it.
    #[error("{0} is missing or unknown")]
    Unknown(&'static str),
    /// A name or a region is none.
    #[error(transparent)]
    Id(#[from] InvalidId),
    /// The bytes are not those whose digest is beside them.
    #[error("the state does not have the SHA-256 that is beside it")]
    Digest,
    /// The state is not encoded in the one way.
    #[error("the state is not in its canonical encoding")]
    NotCanonical,
}

/// The digest of `bytes`.
pub fn sha256(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

pub(super) fn decode<M: Message + Default>(
    what: &'static str,
    bytes: &[u8],
    max: usize,
) -> Result<M, Malformed> {
    if bytes.len() > max {
        return Err(Malformed::TooLong { what, len: bytes.len(), max });
    }
    M::decode(bytes).map_err(|error| undecoded(what, &error))
}

pub(super) fn undecoded(what: &'static str, error: &DecodeError) -> Malformed {
    Malformed::Prost { what, reason: error.to_string() }
}

pub(super) fn u16_of(what: &'static str, number: u32) -> Result<u16, Malformed> {
    u16::try_from(number).map_err(|_| Malformed::Unknown(what))
}

impl Request {
    /// The request as it stands in the log.
    pub fn encode(&self) -> Bytes {
        self.to_wire().encode_to_vec().into()
    }

    /// The request as a client sends it.
    pub fn to_wire(&self) -> wire::MembershipRequest {
        let expect = self.expect;
        wire::MembershipRequest {
            session: self.session.0,
            sequence: self.sequence,
            at_ms: self.at_ms,
            expect: (expect != Expect::default()).then(|| wire::Expectation {
                node: expect.incarnation.map(|(node, _)| node.0),
                incarnation: expect.incarnation.map_or(0, |(_, incarnation)| incarnation.0),
                membership_epoch: expect.membership_epoch.map(|epoch| epoch.0),
                placement_epoch: expect.placement_epoch.map(|epoch| epoch.0),
            }),
            command: Some(command_out(&self.command)),
        }
    }

    /// Reads an entry of the log.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        Self::from_wire(decode("a request", bytes, REQUEST_LEN_MAX)?)
    }

    /// Reads what a client sent.
    pub fn from_wire(message: wire::MembershipRequest) -> Result<Self, Malformed> {
        let expect = message.expect.unwrap_or_default();
        Ok(Self {
            session: SessionId(message.session),
            sequence: message.sequence,
            at_ms: message.at_ms,
            expect: Expect {
                incarnation: expect
                    .node
                    .map(|node| (NodeId(node), Incarnation(expect.incarnation))),
                membership_epoch: expect.membership_epoch.map(MembershipEpoch),
                placement_epoch: expect.placement_epoch.map(PlacementEpoch),
            },
            command: command_in(message.command.ok_or(Malformed::Unknown("the command"))?)?,
        })
    }
}

fn command_out(command: &Command) -> membership_request::Command {
    use membership_request::Command as Out;
    match command.clone() {
        Command::Found(specs) => {
            Out::Found(wire::Found { nodes: specs.iter().map(spec_out).collect() })
        }
        Command::AddNode(spec) => Out::AddNode(spec_out(&spec)),
        Command::Register(node) => {
            Out::Register(wire::Register { node: node.0, ..Default::default() })
        }
        Command::RegisterWith { node, address, memory_bytes, kernel_class, device } => {
            let (node, device) = (node.0, device.map(device_out));
            Out::Register(wire::Register { node, address, memory_bytes, kernel_class, device })
        }
        Command::SetState(node, state) => {
            Out::SetLife(wire::SetLife { node: node.0, life: life_out(state) })
        }
        Command::Cordon(node, cordoned) => Out::Cordon(wire::Cordon { node: node.0, cordoned }),
        Command::SetPlacement(placement) => {
            let mut experts = Vec::new();
            placement_out(&placement).iter().for_each(|expert| list::push(&mut experts, expert));
            Out::SetPlacement(wire::SetPlacement { experts: experts.into() })
        }
        Command::SetReplicas(region, replicas) => Out::SetReplicas(wire::SetReplicas {
            region: region.to_string(),
            replicas: replicas.into(),
        }),
        Command::PutRecord { kind, key, value, revision } => {
            Out::PutRecord(wire::PutRecord { kind: kind_out(kind), key, value, revision })
        }
        Command::DeleteRecord { kind, key, revision } => {
            Out::DeleteRecord(wire::DeleteRecord { kind: kind_out(kind), key, revision })
        }
        Command::MintVoter(node) => Out::MintVoter(node.0),
        Command::OpenSession => Out::OpenSession(wire::OpenSession {}),
    }
}

fn command_in(command: membership_request::Command) -> Result<Command, Malformed> {
    use membership_request::Command as In;
    Ok(match command {
        In::Found(found) => {
            Command::Found(found.nodes.into_iter().map(spec_in).collect::<Result<_, _>>()?)
        }
        In::AddNode(spec) => Command::AddNode(spec_in(spec)?),
        // A node that says where it is reached says all; a roster's says nothing.
        In::Register(said) if said.address.is_empty() => Command::Register(NodeId(said.node)),
        In::Register(said) => Command::RegisterWith {
            node: NodeId(said.node),
            address: said.address,
            memory_bytes: said.memory_bytes,
            kernel_class: said.kernel_class,
            device: said.device.map(device_in),
        },
        In::SetLife(set) => Command::SetState(NodeId(set.node), life_in(set.life)?),
        In::Cordon(cordon) => Command::Cordon(NodeId(cordon.node), cordon.cordoned),
        In::SetPlacement(set) => Command::SetPlacement(placement_in(set.experts)?),
        In::SetReplicas(set) => Command::SetReplicas(
            set.region.parse()?,
            u16_of("the number of replicas", set.replicas)?,
        ),
        In::PutRecord(put) => Command::PutRecord {
            kind: kind_in(put.kind)?,
            key: put.key,
            value: put.value,
            revision: put.revision,
        },
        In::DeleteRecord(delete) => Command::DeleteRecord {
            kind: kind_in(delete.kind)?,
            key: delete.key,
            revision: delete.revision,
        },
        In::MintVoter(node) => Command::MintVoter(NodeId(node)),
        In::OpenSession(_) => Command::OpenSession,
    })
}

pub(crate) fn role_out(role: Role) -> wire::NodeRole {
    match role {
        Role::Coordinator => wire::NodeRole::Coordinator,
        Role::ExpertNode => wire::NodeRole::ExpertNode,
        Role::Witness => wire::NodeRole::Witness,
    }
}

pub(crate) fn role_in(role: wire::NodeRole) -> Result<Role, Malformed> {
    match role {
        wire::NodeRole::Coordinator => Ok(Role::Coordinator),
        wire::NodeRole::ExpertNode => Ok(Role::ExpertNode),
        wire::NodeRole::Witness => Ok(Role::Witness),
        wire::NodeRole::Unspecified => Err(Malformed::Unknown("the role of a node")),
    }
}

pub(crate) fn spec_out(spec: &NodeSpec) -> wire::NodeSpec {
    wire::NodeSpec {
        name: spec.name.to_string(),
        region: spec.region.to_string(),
        site: spec.site.clone(),
        role: role_out(spec.role).into(),
        address: spec.address.clone(),
        memory_bytes: spec.memory_bytes,
        kernel_class: spec.kernel_class.clone(),
        device: spec.device.clone().map(device_out),
    }
}

pub(crate) fn device_out(device: NodeDevice) -> wire::NodeDevice {
    let NodeDevice { name, uuid, memory_bytes, bandwidth_bytes_s } = device;
    wire::NodeDevice { name, uuid, memory_bytes, bandwidth_bytes_s }
}

pub(crate) fn device_in(device: wire::NodeDevice) -> NodeDevice {
    let wire::NodeDevice { name, uuid, memory_bytes, bandwidth_bytes_s } = device;
    NodeDevice { name, uuid, memory_bytes, bandwidth_bytes_s }
}

pub(crate) fn spec_in(spec: wire::NodeSpec) -> Result<NodeSpec, Malformed> {
    let role = role_in(spec.role())?;
    Ok(NodeSpec {
        name: spec.name.parse()?,
        region: spec.region.parse()?,
        site: spec.site,
        role,
        address: spec.address,
        memory_bytes: spec.memory_bytes,
        kernel_class: spec.kernel_class,
        device: spec.device.map(device_in),
    })
}

fn life_out(state: NodeState) -> i32 {
    let life = match state {
        NodeState::Joining => wire::NodeLife::Joining,
        NodeState::Active => wire::NodeLife::Active,
        NodeState::Draining => wire::NodeLife::Draining,
        NodeState::Down => wire::NodeLife::Down,
        NodeState::Removed => wire::NodeLife::Removed,
    };
    life.into()
}

fn life_in(life: i32) -> Result<NodeState, Malformed> {
    match wire::NodeLife::try_from(life) {
        Ok(wire::NodeLife::Joining) => Ok(NodeState::Joining),
        Ok(wire::NodeLife::Active) => Ok(NodeState::Active),
        Ok(wire::NodeLife::Draining) => Ok(NodeState::Draining),
        Ok(wire::NodeLife::Down) => Ok(NodeState::Down),
        Ok(wire::NodeLife::Removed) => Ok(NodeState::Removed),
        _ => Err(Malformed::Unknown("the state of a node")),
    }
}

pub(super) fn kind_out(kind: RecordKind) -> i32 {
    match kind {
        RecordKind::Tenant => wire::RecordKind::Tenant.into(),
        RecordKind::Model => wire::RecordKind::Model.into(),
        RecordKind::Token => wire::RecordKind::Token.into(),
        RecordKind::Checkpoint => wire::RecordKind::Checkpoint.into(),
    }
}

pub(super) fn kind_in(kind: i32) -> Result<RecordKind, Malformed> {
    match wire::RecordKind::try_from(kind) {
        Ok(wire::RecordKind::Tenant) => Ok(RecordKind::Tenant),
        Ok(wire::RecordKind::Model) => Ok(RecordKind::Model),
        Ok(wire::RecordKind::Token) => Ok(RecordKind::Token),
        Ok(wire::RecordKind::Checkpoint) => Ok(RecordKind::Checkpoint),
        _ => Err(Malformed::Unknown("the kind of a record")),
    }
}

pub(crate) fn placement_out(placement: &Placement) -> Vec<wire::ExpertReplicas> {
    let one = |((layer, expert), nodes): ((LayerId, ExpertId), _)| {
        let nodes: &std::collections::BTreeSet<NodeId> = nodes;
        wire::ExpertReplicas {
            layer: layer.0.into(),
            expert: expert.0.into(),
            nodes: nodes.iter().map(|node| node.0).collect(),
        }
    };
    placement.iter().map(one).collect()
}

fn placement_in(experts: Bytes) -> Result<Placement, Malformed> {
    let mut placement = Placement::new();
    for expert in list::each(experts) {
        place(&mut placement, expert.map_err(|error| undecoded("a placement", &error))?)?;
    }
    Ok(placement)
}

pub(super) fn place(
    placement: &mut Placement,
    entry: wire::ExpertReplicas,
) -> Result<(), Malformed> {
    let layer = LayerId(u16_of("a layer", entry.layer)?);
    let expert = ExpertId(u16_of("an expert", entry.expert)?);
    for node in entry.nodes {
        placement.add((layer, expert), NodeId(node));
    }
    Ok(())
}

pub(crate) fn outcome_out(outcome: &Outcome) -> wire::MembershipOutcome {
    use membership_outcome::Outcome as Out;
    let outcome = match outcome {
        Ok(Applied::Membership(epoch)) => Out::MembershipEpoch(epoch.0),
        Ok(Applied::Added(node)) => Out::Added(node.0),
        Ok(Applied::Registered(incarnation)) => Out::Incarnation(incarnation.0),
        Ok(Applied::Placement(epoch)) => Out::PlacementEpoch(epoch.0),
        Ok(Applied::Revision(revision)) => Out::Revision(*revision),
        Ok(Applied::Voter(voter)) => Out::Voter(voter.0),
        Ok(Applied::Session(session)) => Out::Session(session.0),
        Err(refused) => {
            Out::Refusal(wire::Refusal { code: refused.code as u32, text: refused.text.clone() })
        }
    };
    wire::MembershipOutcome { outcome: Some(outcome) }
}

pub(crate) fn outcome_in(outcome: wire::MembershipOutcome) -> Result<Outcome, Malformed> {
    use membership_outcome::Outcome as In;
    Ok(Ok(match outcome.outcome.ok_or(Malformed::Unknown("an outcome"))? {
        In::MembershipEpoch(epoch) => Applied::Membership(MembershipEpoch(epoch)),
        In::Added(node) => Applied::Added(NodeId(node)),
        In::Incarnation(incarnation) => Applied::Registered(Incarnation(incarnation)),
        In::PlacementEpoch(epoch) => Applied::Placement(PlacementEpoch(epoch)),
        In::Revision(revision) => Applied::Revision(revision),
        In::Voter(voter) => Applied::Voter(VoterId(voter)),
        In::Session(session) => Applied::Session(SessionId(session)),
        In::Refusal(refusal) => {
            let code = RefusedCode::try_from(refusal.code);
            let code = code.map_err(|_| Malformed::Unknown("the code of a refusal"))?;
            return Ok(Err(Refused { code, text: refusal.text }));
        }
    }))
}

pub(crate) fn node_out(node: &Node) -> wire::MemberNode {
    wire::MemberNode {
        id: node.id.0,
        spec: Some(spec_out(&node.spec)),
        life: life_out(node.state),
        cordoned: node.cordoned,
        incarnation: node.incarnation.map(|incarnation| incarnation.0),
        changed_at_ms: node.changed_at_ms,
    }
}

pub(super) fn node_in(node: wire::MemberNode) -> Result<Node, Malformed> {
    Ok(Node {
        id: NodeId(node.id),
        spec: spec_in(node.spec.ok_or(Malformed::Unknown("the description of a node"))?)?,
        state: life_in(node.life)?,
        cordoned: node.cordoned,
        incarnation: node.incarnation.map(Incarnation),
        changed_at_ms: node.changed_at_ms,
    })
}
