//! Who may call what: one table for every service of the program.
//!
//! A call is allowed if the table lists it for the caller's role and the caller stands in the right
//! region; whatever is not listed is refused. The control port and the expert nodes' port ask this
//! table, and nothing else decides. Handlers check further what a table cannot say: that a message's
//! sender and a heartbeat's node are the caller.
//!
//! To add a call: one line in [`RULES`]. Tests read all protos and fail on a call that is not
//! listed, and on a line without a call.

use entente_proto::identity::{Identity, Role};
use entente_proto::ids::Region;

use Role::{Coordinator, Expert, Operator, Witness};

/// A byte stream of frames is this call without HTTP/2 around it, and is allowed by the same line.
pub const EXCHANGE_STREAM: &str = "/entente.v1.Exchange/Stream";

/// Where the caller must stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum From {
    /// Anywhere in the cluster.
    AnyRegion,
    /// In the region of the process that is called: rows do not cross a border.
    OwnRegion,
}

/// One line of the table.
#[derive(Debug, Clone, Copy)]
pub struct Rule {
    /// The call's path, as it is on the wire.
    pub call: &'static str,
    /// Who may make it.
    pub roles: &'static [Role],
    /// From where.
    pub from: From,
}

/// The table.
pub const RULES: &[Rule] = &[
    rule("/entente.v1.Raft/Deliver", &[Coordinator, Witness], From::AnyRegion),
    rule("/entente.v1.Membership/Register", &[Expert], From::AnyRegion),
    rule("/entente.v1.Membership/Heartbeat", &[Expert], From::AnyRegion),
    rule(
        "/entente.v1.Membership/Watch",
        &[Coordinator, Witness, Expert, Operator],
        From::AnyRegion,
    ),
    rule("/entente.v1.Membership/Propose", &[Coordinator, Witness, Operator], From::AnyRegion),
    // For those who have no certificate yet, on connections of their own; no member has a token.
    rule("/entente.v1.Enrolment/Join", &[], From::AnyRegion),
    rule("/entente.v1.Enrolment/Renew", &[Coordinator, Witness, Expert, Operator], From::AnyRegion),
    rule("/entente.v1.Enrolment/Enlist", &[Coordinator, Witness], From::AnyRegion),
    // A coordinator has its own log cosigned; the handler compares the names.
    rule("/entente.v1.Witness/Cosign", &[Coordinator], From::AnyRegion),
    rule("/entente.v1.Admin/Status", &[Operator], From::AnyRegion),
    rule("/entente.v1.Admin/ChangeGroup", &[Operator], From::AnyRegion),
    rule("/entente.v1.Admin/TransferLeader", &[Operator], From::AnyRegion),
    rule("/entente.v1.Admin/TakeSnapshot", &[Operator], From::AnyRegion),
    rule("/entente.v1.Admin/Nodes", &[Operator], From::AnyRegion),
    rule("/entente.v1.Admin/OkToStop", &[Operator], From::AnyRegion),
    rule("/entente.v1.Admin/Drain", &[Operator], From::AnyRegion),
    rule("/entente.v1.Admin/Plan", &[Operator], From::AnyRegion),
    rule("/entente.v1.Admin/Rebalance", &[Operator], From::AnyRegion),
    rule("/entente.v1.Exchange/Describe", &[Coordinator], From::OwnRegion),
    rule(EXCHANGE_STREAM, &[Coordinator], From::OwnRegion),
    rule("/entente.v1.Exchange/Settle", &[Coordinator], From::OwnRegion),
    // Weights stay in their region.
    rule("/entente.v1.Exchange/Fetch", &[Expert], From::OwnRegion),
];

const fn rule(call: &'static str, roles: &'static [Role], from: From) -> Rule {
    Rule { call, roles, from }
}

/// Why a call is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    /// Nobody may make it.
    #[error("there is no such call")]
    Unlisted,
    /// Others may.
    #[error("the call is not for its role")]
    Role,
    /// Its like may, elsewhere.
    #[error("the call is not for its region")]
    Region,
}

/// Whether `caller` may make a call to a process of `region`.
///
/// # Errors
/// Says which part of the table is against it.
pub fn check(caller: &Identity, region: Region, call: &str) -> Result<(), Denied> {
    let rule = RULES.iter().find(|rule| rule.call == call).ok_or(Denied::Unlisted)?;
    if !rule.roles.contains(&caller.role) {
        return Err(Denied::Role);
    }
    match rule.from {
        From::OwnRegion if caller.region != region => Err(Denied::Region),
        _ => Ok(()),
    }
}
