//! Links to expert nodes over a network. The seam is [`entente_proto::link`]; the link within one
//! process lives with the node that it leads to.
//!
//! Both kinds dial, ask the node who it is, report [`LinkEvent::Up`], and redial when they break.
//! [`Links`] is the engine's end of them all. Between GPUs of one site [`nccl`] carries the rows of a
//! byte stream.
//!
//! [`LinkEvent::Up`]: entente_proto::link::LinkEvent::Up

mod bell;
mod connection;
pub mod grpc;
mod links;
pub mod nccl;
mod opener;
mod stream;

use std::sync::Arc;
use std::time::Duration;

use entente_proto::frame::{Answer, Refusal};
use entente_proto::ids::{ExchangeId, NodeId, NodeName};
use entente_proto::wire;
use rustls::ClientConfig;

pub use self::bell::Bell;
pub use self::links::{Links, Mailbox};
pub use self::nccl::{ByNccl, NcclMetrics};
pub use self::opener::Opener;

/// The node at the other end of a link.
#[derive(Clone)]
pub struct Peer {
    /// Its number.
    pub node: NodeId,
    /// The name that it must give; another node is not used.
    pub name: NodeName,
    /// Where it is dialled, `host:port`.
    pub address: String,
    /// How the connection is secured, and whose certificate is expected; plain text without.
    pub tls: Option<Arc<ClientConfig>>,
}

/// First pause before dialling again; doubles up to [`REDIAL_MAX`].
const REDIAL_MIN: Duration = Duration::from_millis(50);
/// Longest pause before dialling again.
const REDIAL_MAX: Duration = Duration::from_secs(1);

/// A malformed answer counts as a refusal of the frame that it names: the exchange asks another
/// replica instead of waiting for rows that will not come.
fn checked_answer(message: wire::Combine) -> Answer {
    let exchange = ExchangeId(message.exchange_id);
    Answer::try_from(message).unwrap_or_else(|error| Answer {
        exchange,
        fence: None,
        result: Err(Refusal::Invalid(format!("malformed answer: {error}"))),
    })
}
