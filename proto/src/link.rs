//! The one door from a coordinator to an expert node, whatever carries the bytes.
//!
//! A link is told what to send and reports what happened; it decides nothing. It never blocks the
//! caller: the engine thread hands over a frame and goes on. What comes back goes to the one
//! [`LinkEvents`] sink that the link was opened with, in any order.

use std::collections::BTreeSet;

use crate::frame::{Answer, Dispatch};
use crate::ids::{ExpertId, Fence, KernelClass, LayerId, NodeId, NodeName, Region};

/// What a node says of itself when a link to it comes up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeInfo {
    /// The node's own name; must be the name that was dialled.
    pub name: NodeName,
    /// The country that the node stands in.
    pub region: Region,
    /// Fence that the node expects on frames.
    pub fence: Fence,
    /// The kernels that compute its rows.
    pub kernel_class: KernelClass,
    /// The experts that it holds.
    pub experts: BTreeSet<(LayerId, ExpertId)>,
    /// Bytes of weights that it keeps in memory.
    pub weights_bytes: u64,
}

/// Something that a link saw.
#[derive(Debug)]
pub enum LinkEvent {
    /// The node answered the call that describes it; frames may be sent.
    Up {
        /// What it says of itself.
        info: NodeInfo,
        /// SHA-256 of the certificate that it showed, in DER; zeros where none is shown.
        certificate_sha256: [u8; 32],
    },
    /// An answer to some dispatch, possibly one that nobody waits for any more.
    Answer(Answer),
    /// The link broke: no answer to anything in flight will come. The link redials by itself.
    Down(String),
}

/// Takes what links report. Called from the link's own thread or task; must not block.
pub trait LinkEvents: Send + Sync {
    /// Takes one event of the link to `node`.
    fn on_event(&self, node: NodeId, event: LinkEvent);
}

/// The frame was not taken: the link is down or its queue is full.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the link is down or its queue is full")]
pub struct NotSent;

/// A way to one expert node.
pub trait Link: Send + Sync {
    /// Queues a frame for sending, without blocking. An answer, or [`LinkEvent::Down`], follows.
    fn send(&self, frame: Dispatch) -> Result<(), NotSent>;

    /// Whether the node computes while the caller goes on. Otherwise [`Link::send`] returns when
    /// the answer is there, and there is nothing to be gained from having several frames out.
    fn is_asynchronous(&self) -> bool {
        true
    }
}
