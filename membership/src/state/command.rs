//! What can be wanted of the membership, what came of it, and why nothing came of it.

use std::fmt;

use bytes::Bytes;
use entente_proto::ids::{Incarnation, MembershipEpoch, NodeId, PlacementEpoch, Region};
use entente_proto::placement::Placement;

use super::node::{NodeDevice, NodeSpec, NodeState};

/// Names a disk that takes part in raft. Minted by the log, never used again: a voter that lost
/// its disk has forgotten its votes and must come back under another number.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VoterId(pub u64);

/// Names a client whose commands are applied once. Minted by the log.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId(pub u64);

/// What a record is about. The records themselves are opaque here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum RecordKind {
    /// A tenant, its policy and its keys: [`crate::tenant::Tenant`] under its name.
    Tenant,
    /// The model that is served: [`crate::served::ServedModel`] under one key.
    Model,
    /// A token by which a process joins: [`crate::token::Token`] under its id.
    Token,
    /// What the audit log of a coordinator holds: [`crate::checkpoint::Committed`].
    Checkpoint,
}

/// A change that somebody wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Starts the cluster with these nodes, which take traffic at once; the first command of all.
    /// Nodes are numbered in the order of their names, so that the order of a file does not matter.
    /// Those whose role votes become voters 1, 2, ... in the same order.
    Found(Vec<NodeSpec>),
    /// Adds a member, joining.
    AddNode(NodeSpec),
    /// A node has started: mints its incarnation. It is joining from here on.
    Register(NodeId),
    /// The same, with what the node says about itself.
    RegisterWith {
        /// The node.
        node: NodeId,
        /// Where it is reached now.
        address: String,
        /// Bytes that expert weights may take there.
        memory_bytes: Option<u64>,
        /// What its kernels are.
        kernel_class: String,
        /// What they run on, if not the processor.
        device: Option<NodeDevice>,
    },
    /// Moves a node on in its life.
    SetState(NodeId, NodeState),
    /// Says whether a node may get further replicas.
    Cordon(NodeId, bool),
    /// Replaces the placement.
    SetPlacement(Placement),
    /// How many replicas of each expert the region should have.
    SetReplicas(Region, u16),
    /// Writes a record, if it has the revision that is expected (0: there is none yet).
    PutRecord {
        /// What it is about.
        kind: RecordKind,
        /// Its name.
        key: String,
        /// Its content.
        value: Bytes,
        /// The revision that it must have now; any when absent.
        revision: Option<u64>,
    },
    /// Deletes a record, if it has the revision that is expected.
    DeleteRecord {
        /// What it is about.
        kind: RecordKind,
        /// Its name.
        key: String,
        /// The revision that it must have now; any when absent.
        revision: Option<u64>,
    },
    /// Mints the number under which the node's empty disk may join the raft group.
    MintVoter(NodeId),
    /// Mints a session. The one command that needs none; a retry mints another, which is harmless.
    OpenSession,
}

/// What must still be true when the command is applied. This is the fence: whoever decided on an
/// older state than the one that is there is refused.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Expect {
    /// The command is sent by, or on behalf of, this start of this node.
    pub incarnation: Option<(NodeId, Incarnation)>,
    /// The members that the decision was made on.
    pub membership_epoch: Option<MembershipEpoch>,
    /// The placement that the decision was made on.
    pub placement_epoch: Option<PlacementEpoch>,
}

/// One proposal, as it stands in the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// Whose it is; 0 only to open a session.
    pub session: SessionId,
    /// Rises with each new command of the session; a retry repeats it.
    pub sequence: u64,
    /// Milliseconds since 1970 on the proposer's clock.
    pub at_ms: u64,
    /// The fence.
    pub expect: Expect,
    /// What is wanted.
    pub command: Command,
}

/// What an accepted command brought about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Applied {
    /// The members, or the state of one, changed.
    Membership(MembershipEpoch),
    /// A node was added under this number.
    Added(NodeId),
    /// A node registered and got this incarnation.
    Registered(Incarnation),
    /// The placement changed.
    Placement(PlacementEpoch),
    /// A record, or the wanted replicas of a region, changed at this revision.
    Revision(u64),
    /// A voter's number was minted.
    Voter(VoterId),
    /// A session was opened.
    Session(SessionId),
}

/// What became of a request.
pub type Outcome = Result<Applied, Refused>;

/// Why a command changed nothing. The same command on the same state is always refused alike, and
/// a retry of it is told the same words.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct Refused {
    /// For programs.
    pub code: RefusedCode,
    /// For people; names the cause.
    pub text: String,
}

impl Refused {
    pub(super) fn new(code: RefusedCode, text: impl fmt::Display) -> Self {
        Self { code, text: text.to_string() }
    }
}

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $code:literal),+ $(,)?) => {
        /// Kinds of refusal. The numbers are on disk and never change their meaning.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        pub enum RefusedCode {
            $($(#[$doc])* $name = $code),+
        }

        impl TryFrom<u32> for RefusedCode {
            type Error = u32;
            fn try_from(code: u32) -> Result<Self, u32> {
                match code {
                    $($code => Ok(Self::$name),)+
                    other => Err(other),
                }
            }
        }
    };
}

codes! {
    /// A cluster is founded once, and before anything else.
    FoundedAlready = 1,
    /// Nothing happens before the cluster is founded.
    NotFounded = 2,
    /// Two members would have one name.
    NameTaken = 3,
    /// There is no such member.
    NotAMember = 4,
    /// The node's life does not go that way.
    Transition = 5,
    /// A node that the placement names cannot be removed.
    StillPlaced = 6,
    /// The placement names a node that cannot hold experts.
    NoExpertNode = 7,
    /// One of the bounds of this file would be passed.
    TooMany = 8,
    /// The sender has been started again since.
    StaleIncarnation = 9,
    /// The decision was made on other members or on another placement.
    StaleEpoch = 10,
    /// The record is not at the revision that was expected.
    StaleRevision = 11,
    /// The session is unknown: never opened, or the one that was unused for longest.
    SessionExpired = 12,
    /// The session has gone on to later commands; what became of this one is not kept.
    Superseded = 13,
    /// The command is not well formed.
    Invalid = 14,
    /// A new replica may not be put there now.
    NoReplicasThere = 15,
    /// The node's role does not vote.
    DoesNotVote = 16,
    /// The checkpoint does not go on from the one before it.
    NotAContinuation = 17,
}
