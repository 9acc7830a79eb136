//! Why a call was refused, where a program has to know: the metadata beside a gRPC status.

use tonic::metadata::MetadataValue;
use tonic::{Code, Status};

/// The metadata that carries a [`Reason`].
pub const REASON_KEY: &str = "entente-reason";
/// The metadata that carries the leader's address.
pub const LEADER_KEY: &str = "entente-leader";

/// What the caller can do something about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// Only the leader answers this.
    NotLeader,
    /// The caller has been started again since, or was found dead: it must register anew.
    Fenced,
    /// It may have been done or not; the same call repeated finds out.
    UnknownOutcome,
    /// The voter is of another cluster.
    OtherCluster,
    /// The cluster serves another model.
    OtherModel,
    /// An expert would be left without a replica.
    Unsafe,
    /// The CA that is needed is somebody else's.
    NoAuthority,
}

impl Reason {
    const ALL: [Self; 7] = [
        Self::NotLeader,
        Self::Fenced,
        Self::UnknownOutcome,
        Self::OtherCluster,
        Self::OtherModel,
        Self::Unsafe,
        Self::NoAuthority,
    ];

    /// As it is written.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NotLeader => "not-leader",
            Self::Fenced => "fenced",
            Self::UnknownOutcome => "unknown-outcome",
            Self::OtherCluster => "other-cluster",
            Self::OtherModel => "other-model",
            Self::Unsafe => "unsafe",
            Self::NoAuthority => "no-authority",
        }
    }

    /// The reason that a status carries, if it does.
    pub fn of(status: &Status) -> Option<Self> {
        let text = status.metadata().get(REASON_KEY)?;
        Self::ALL.into_iter().find(|reason| text == reason.as_str())
    }

    /// A status that carries it.
    pub fn status(self, text: impl Into<String>) -> Status {
        // What is unknown is worth a repetition, the rest is not.
        let code = match self {
            Self::UnknownOutcome => Code::Unavailable,
            _ => Code::FailedPrecondition,
        };
        let mut status = Status::new(code, text);
        status.metadata_mut().insert(REASON_KEY, MetadataValue::from_static(self.as_str()));
        status
    }

    /// [`Reason::NotLeader`], with the leader's address where it is known.
    pub fn not_leader(leader: Option<&str>) -> Status {
        let mut status = Self::NotLeader.status(match leader {
            Some(address) => format!("not the leader; try {address}"),
            None => "not the leader, and none is known; try again later".to_owned(),
        });
        if let Some(address) = leader.and_then(|address| address.parse().ok()) {
            status.metadata_mut().insert(LEADER_KEY, address);
        }
        status
    }

    /// The leader that a status names.
    pub fn leader_in(status: &Status) -> Option<&str> {
        status.metadata().get(LEADER_KEY)?.to_str().ok()
    }
}
