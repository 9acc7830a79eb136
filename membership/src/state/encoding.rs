//! A state as bytes: a list of messages, one for each thing in it.
//!
//! Invariants:
//! - a state has exactly one encoding, and [`State::decode`] accepts no other: it encodes what it
//!   read and compares. So equal bytes, equal hashes and equal states are one and the same;
//! - whoever reads a state holds one element of the list at a time. As fields of one message they
//!   would be collected first, and an empty one takes two bytes there and dozens in memory.

use bytes::Bytes;
use entente_proto::ids::{MembershipEpoch, NodeId, PlacementEpoch};
use entente_proto::list;
use entente_proto::wire::{self, state_item::Item};
use prost::Message;

use super::codec::{
    self, Malformed, STATE_LEN_MAX, kind_in, kind_out, node_in, node_out, outcome_in, outcome_out,
    place, placement_out, sha256, u16_of, undecoded,
};
use super::session::Session;
use super::{Record, SessionId, State, Voter, VoterId};

impl State {
    /// The state as bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.items().for_each(|item| list::push(&mut bytes, &wire::StateItem { item: Some(item) }));
        bytes
    }

    /// SHA-256 of what was agreed on about the cluster: of the state without what only tells how it
    /// came about, which a request that is refused changes too (the entries applied and their hashes,
    /// the clock, the sessions), and without what audit logs say of themselves, which is committed
    /// whenever they have grown.
    pub fn agreed_sha256(&self) -> [u8; 32] {
        let mut bytes = Vec::new();
        for item in self.items() {
            let item = match item {
                Item::Head(head) => Item::Head(wire::StateHead {
                    applied_index: 0,
                    clock_ms: 0,
                    revision: 0,
                    ..head
                }),
                Item::Session(_) | Item::Mark(_) => continue,
                Item::Record(record) if record.kind() == wire::RecordKind::Checkpoint => continue,
                other => other,
            };
            list::push(&mut bytes, &wire::StateItem { item: Some(item) });
        }
        sha256(&bytes)
    }

    /// Everything in it, in the one order.
    fn items(&self) -> impl Iterator<Item = Item> {
        let nodes = self.nodes.values().map(node_out).map(Item::Node);
        let placed = placement_out(&self.placement).into_iter().map(Item::Placed);
        let replicas = self.replicas.iter().map(|(region, replicas)| {
            let (region, replicas) = (region.to_string(), (*replicas).into());
            Item::Replicas(wire::SetReplicas { region, replicas })
        });
        let records = self.records.iter().map(|((kind, key), record)| {
            Item::Record(wire::Record {
                kind: kind_out(*kind),
                key: key.clone(),
                value: record.value.clone(),
                revision: record.revision,
            })
        });
        let voters = self.voters().map(|(id, voter)| {
            let (voter, node, retired) = (id.0, voter.node.0, voter.retired);
            Item::Voter(wire::VoterRecord { voter, node, retired })
        });
        let sessions = self.sessions.0.iter().map(session_out).map(Item::Session);
        let marks = self.marks().map(|mark| {
            let sha256 = Bytes::copy_from_slice(&mark.sha256);
            Item::Mark(wire::HashMark { index: mark.index, sha256 })
        });
        let head = std::iter::once(Item::Head(self.head()));
        head.chain(nodes)
            .chain(placed)
            .chain(replicas)
            .chain(records)
            .chain(voters)
            .chain(sessions)
            .chain(marks)
    }

    fn head(&self) -> wire::StateHead {
        wire::StateHead {
            applied_index: self.applied_index,
            clock_ms: self.clock_ms,
            membership_epoch: self.membership_epoch.0,
            placement_epoch: self.placement_epoch.0,
            revision: self.revision,
            incarnations_minted: self.incarnations_minted,
            voters_minted: self.voters_minted,
        }
    }

    /// Reads a state that [`State::encode`] wrote.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        const WHAT: &str = "a state";
        if bytes.len() > STATE_LEN_MAX {
            return Err(Malformed::TooLong { what: WHAT, len: bytes.len(), max: STATE_LEN_MAX });
        }
        let mut state = Self::default();
        for item in list::each::<wire::StateItem, _>(bytes) {
            let item = item.map_err(|error| undecoded(WHAT, &error))?;
            state.take(item.item.ok_or(Malformed::Unknown("an element of a state"))?)?;
        }
        if state.encode() == bytes { Ok(state) } else { Err(Malformed::NotCanonical) }
    }

    fn take(&mut self, item: Item) -> Result<(), Malformed> {
        match item {
            Item::Head(head) => self.take_head(&head),
            Item::Node(node) => drop(self.nodes.insert(NodeId(node.id), node_in(node)?)),
            Item::Placed(expert) => place(std::sync::Arc::make_mut(&mut self.placement), expert)?,
            Item::Replicas(wanted) => {
                let replicas = u16_of("the number of replicas", wanted.replicas)?;
                self.replicas.insert(wanted.region.parse()?, replicas);
            }
            Item::Record(record) => {
                let kept = Record { value: record.value, revision: record.revision };
                self.records.insert((kind_in(record.kind)?, record.key), kept);
            }
            Item::Voter(voter) => {
                let kept = Voter { node: NodeId(voter.node), retired: voter.retired };
                self.voters.insert(VoterId(voter.voter), kept);
            }
            Item::Session(session) => {
                let kept = Session {
                    sequence: session.sequence,
                    outcome: session.outcome.map(outcome_in).transpose()?,
                    used_at_index: session.used_at_index,
                };
                self.sessions.0.insert(SessionId(session.id), kept);
            }
            Item::Mark(mark) => {
                let sha256 = mark.sha256.as_ref().try_into();
                self.marks.insert(mark.index, sha256.map_err(|_| Malformed::Unknown("a mark"))?);
            }
        }
        Ok(())
    }

    fn take_head(&mut self, head: &wire::StateHead) {
        self.applied_index = head.applied_index;
        self.clock_ms = head.clock_ms;
        self.membership_epoch = MembershipEpoch(head.membership_epoch);
        self.placement_epoch = PlacementEpoch(head.placement_epoch);
        self.revision = head.revision;
        self.incarnations_minted = head.incarnations_minted;
        self.voters_minted = head.voters_minted;
    }

    /// The state with its digest beside it: what a snapshot consists of.
    pub fn seal(&self) -> Bytes {
        self.sealed().encode_to_vec().into()
    }

    /// The same as a message.
    pub fn sealed(&self) -> wire::SealedState {
        let state = self.encode();
        let sha256 = Bytes::copy_from_slice(&sha256(&state));
        wire::SealedState { sha256, state: state.into() }
    }

    /// Reads a snapshot; nothing of it is believed before its digest is.
    pub fn unseal(bytes: &[u8]) -> Result<Self, Malformed> {
        Self::open(codec::decode("a snapshot", bytes, STATE_LEN_MAX + 64)?)
    }

    /// Reads what [`State::sealed`] gave.
    pub fn open(sealed: wire::SealedState) -> Result<Self, Malformed> {
        if sealed.sha256 != sha256(&sealed.state)[..] {
            return Err(Malformed::Digest);
        }
        Self::decode(&sealed.state)
    }
}

fn session_out((id, session): (&SessionId, &Session)) -> wire::Session {
    wire::Session {
        id: id.0,
        sequence: session.sequence,
        outcome: session.outcome.as_ref().map(outcome_out),
        used_at_index: session.used_at_index,
    }
}
