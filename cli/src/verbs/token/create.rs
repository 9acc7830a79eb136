//! `entente token create`.

use std::time::Duration;

use anyhow::Context;
use clap::{Args, ValueEnum};
use entente_membership::state::codec::sha256;
use entente_membership::state::{NodeState, Role, State};
use entente_membership::token::{self, LIFE_MS_MAX, SECRET_LEN, TOKENS_MAX, Text, Token};
use entente_proto::ids::{NodeName, Region};
use serde::Serialize;

use crate::api_key::now_ms;
use crate::exit::Failure;
use crate::operator::lifetime::Lifetime;
use crate::operator::{Operator, OperatorArgs};

/// Length of an id in random bytes; two alike are refused by the log, and one in 2^64 is.
const ID_LEN: usize = 8;
/// Most coordinators that a token lists.
const ADDRESSES_MAX: usize = 9;

/// The flags of `entente token create`.
#[derive(Debug, Args)]
pub struct CreateArgs {
    #[command(flatten)]
    operator: OperatorArgs,

    /// The country in which the process will stand.
    #[arg(long, env = "ENTENTE_REGION", value_name = "CC")]
    region: Region,

    /// What it will be.
    #[arg(long, env = "ENTENTE_ROLE", value_enum)]
    role: JoinRole,

    /// How long the token is good for, such as 90s, 30m, 1h or 7d.
    #[arg(long, env = "ENTENTE_TTL", value_name = "TIME", default_value = "1h", value_parser = life)]
    ttl: Lifetime,

    /// What it will be called. Needed where a member is to get a new certificate; without it, the
    /// process says a name that no member has.
    #[arg(long, env = "ENTENTE_NAME", value_name = "NAME")]
    name: Option<NodeName>,
}

/// What can join.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum JoinRole {
    /// Serves a model, and votes.
    Coordinator,
    /// Holds experts.
    ExpertNode,
    /// Votes, and does nothing else.
    Witness,
}

impl From<JoinRole> for Role {
    fn from(role: JoinRole) -> Self {
        match role {
            JoinRole::Coordinator => Self::Coordinator,
            JoinRole::ExpertNode => Self::ExpertNode,
            JoinRole::Witness => Self::Witness,
        }
    }
}

/// The answer as JSON has it.
#[derive(Debug, Serialize)]
struct Created {
    id: String,
    /// The secret is in it; it is not shown again.
    token: String,
    region: Region,
    role: &'static str,
    name: Option<NodeName>,
    expires_ms: u64,
}

/// Makes a token and prints it: on standard output there is nothing else.
pub fn run(args: CreateArgs) -> anyhow::Result<()> {
    args.operator.run(async |operator| {
        let state = operator.state().await?;
        sweep(&operator, &state).await?;
        let text = text(&args, &operator, &state)?;
        let created_ms = now_ms();
        let expires_ms = args.ttl.after(created_ms);
        let token = Token {
            secret_sha256: sha256(&text.secret),
            region: text.region,
            role: text.role,
            name: text.name.clone(),
            created_ms,
            expires_ms,
        };
        operator.propose(token::put(&text.id, &token)).await?;
        let created = Created {
            token: text.to_string(),
            id: text.id,
            region: text.region,
            role: text.role.name(),
            name: text.name,
            expires_ms,
        };
        operator.print(&created, |created| created.token.clone())
    })
}

fn text(args: &CreateArgs, operator: &Operator, state: &State) -> anyhow::Result<Text> {
    let addresses = addresses(state, args.region);
    if addresses.is_empty() {
        return Err(Failure::Refused("no coordinator is known to join at".to_owned()).into());
    }
    let ca_sha256 = operator.cas()?.iter().map(|ca| sha256(ca)).collect();
    let id = random::<ID_LEN>()?.iter().map(|byte| format!("{byte:02x}")).collect();
    let (secret, role) = (random::<SECRET_LEN>()?, args.role.into());
    Ok(Text {
        id,
        secret,
        region: args.region,
        role,
        name: args.name.clone(),
        addresses,
        ca_sha256,
    })
}

/// Control ports of coordinators, those of the region first: they are the ones that hold its CA.
fn addresses(state: &State, region: Region) -> Vec<String> {
    let mut coordinators: Vec<_> = state
        .nodes()
        .filter(|node| node.spec.role == Role::Coordinator && node.state != NodeState::Removed)
        .collect();
    coordinators.sort_by_key(|node| node.spec.region != region);
    let addresses = coordinators.iter().map(|node| node.spec.address.clone());
    addresses.take(ADDRESSES_MAX).collect()
}

/// Tokens that are over are of no use to anybody; their number is bounded.
async fn sweep(operator: &Operator, state: &State) -> anyhow::Result<()> {
    let (over, live): (Vec<_>, Vec<_>) =
        Token::all(state).partition(|(_, token)| token.is_over(now_ms()));
    for (id, _) in over {
        let (_, revision) = Token::find(state, id)?;
        operator.propose(token::delete(id, revision)).await?;
    }
    if live.len() >= TOKENS_MAX {
        let text = format!("{TOKENS_MAX} tokens wait to be used; revoke some");
        return Err(Failure::Refused(text).into());
    }
    Ok(())
}

fn random<const LEN: usize>() -> anyhow::Result<[u8; LEN]> {
    let mut bytes = [0; LEN];
    let provider = rustls::crypto::aws_lc_rs::default_provider();
    let filled = provider.secure_random.fill(&mut bytes);
    filled.ok().context("the system gives no random numbers")?;
    Ok(bytes)
}

fn life(text: &str) -> Result<Lifetime, String> {
    let life: Lifetime = text.parse()?;
    if life.0.is_zero() || life.0 > Duration::from_millis(LIFE_MS_MAX) {
        return Err(format!("{text} is not between 1s and 7d"));
    }
    Ok(life)
}

#[cfg(test)]
mod tests {
    use entente_membership::state::NodeSpec;

    use super::*;

    #[test]
    fn a_token_lives_for_a_second_to_a_week() {
        for (text, good) in [("1s", true), ("7d", true), ("0s", false), ("8d", false), ("", false)]
        {
            assert_eq!(life(text).is_ok(), good, "{text:?}");
        }
    }

    #[test]
    fn a_token_lists_coordinators_and_those_of_its_region_first() {
        let spec = |(name, region, role): (&str, &str, Role)| NodeSpec {
            name: name.parse().unwrap(),
            region: region.parse().unwrap(),
            site: String::new(),
            role,
            address: format!("{name}:1"),
            memory_bytes: None,
            kernel_class: String::new(),
            device: None,
        };
        let members = [
            ("a-fr", "fr", Role::Coordinator),
            ("b-se", "se", Role::Coordinator),
            ("c-se", "se", Role::Witness),
            ("d-se", "se", Role::ExpertNode),
        ];
        let state = State::genesis(members.map(spec).into()).unwrap();
        assert_eq!(addresses(&state, "se".parse().unwrap()), ["b-se:1", "a-fr:1"]);
    }
}
