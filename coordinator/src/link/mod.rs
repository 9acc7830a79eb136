//! Links to expert nodes over a network. The seam is [`entente_proto::link`]; the link within one
//! process lives with the node that it leads to.
//!
//! Both links dial, ask the node who it is, report [`LinkEvent::Up`], and redial when they break.
//!
//! [`LinkEvent::Up`]: entente_proto::link::LinkEvent::Up

pub mod grpc;
pub mod stream;

use std::time::Duration;

use entente_proto::frame::{Answer, Refusal};
use entente_proto::ids::ExchangeId;
use entente_proto::wire;

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
