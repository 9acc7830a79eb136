//! `entente token ls`.

use clap::Args;
use entente_membership::state::State;
use entente_membership::token::Token;
use entente_proto::ids::{NodeName, Region};
use serde::Serialize;

use crate::api_key::now_ms;
use crate::cluster::columns;
use crate::operator::{OperatorArgs, or_dash};

/// The flags of `entente token ls`.
#[derive(Debug, Args)]
pub struct LsArgs {
    #[command(flatten)]
    operator: OperatorArgs,
}

/// The answer as JSON has it.
#[derive(Debug, Serialize)]
struct Tokens {
    tokens: Vec<Row>,
}

#[derive(Debug, Serialize)]
struct Row {
    id: String,
    region: Region,
    role: &'static str,
    name: Option<NodeName>,
    created_ms: u64,
    expires_ms: u64,
    expired: bool,
}

/// Lists those that are committed. A token that was used is not there any more.
pub fn run(args: LsArgs) -> anyhow::Result<()> {
    args.operator.run(async |operator| {
        let state = operator.state().await?;
        let now_ms = now_ms();
        operator.print(&rows(&state, now_ms), |tokens| table(tokens, now_ms))
    })
}

fn rows(state: &State, now_ms: u64) -> Tokens {
    let row = |(id, token): (&str, Token)| Row {
        id: id.to_owned(),
        region: token.region,
        role: token.role.name(),
        expired: token.is_over(now_ms),
        name: token.name,
        created_ms: token.created_ms,
        expires_ms: token.expires_ms,
    };
    Tokens { tokens: Token::all(state).map(row).collect() }
}

fn table(tokens: &Tokens, now_ms: u64) -> String {
    let mut table = columns(["ID", "REGION", "ROLE", "NAME", "EXPIRES-IN"]);
    for row in &tokens.tokens {
        let left_s = row.expires_ms.saturating_sub(now_ms) / 1_000;
        table.add_row([
            row.id.clone(),
            row.region.to_string(),
            row.role.to_owned(),
            or_dash(row.name.as_ref()),
            if row.expired { "expired".to_owned() } else { format!("{left_s} s") },
        ]);
    }
    table.trim_fmt()
}

#[cfg(test)]
mod tests {
    use entente_membership::state::Role;
    use entente_membership::token::put;

    use super::*;

    #[test]
    fn a_token_is_listed_without_its_secret_and_says_when_it_is_over() {
        let token = |expires_ms| Token {
            secret_sha256: [7; 32],
            region: "se".parse().unwrap(),
            role: Role::ExpertNode,
            name: None,
            created_ms: 0,
            expires_ms,
        };
        let mut state = State::genesis(Vec::new()).unwrap();
        state.apply(put("aa", &token(61_000))).unwrap();
        state.apply(put("bb", &token(500))).unwrap();
        let tokens = rows(&state, 1_000);
        let text = table(&tokens, 1_000);
        let lines: Vec<Vec<&str>> = text.lines().map(|l| l.split_whitespace().collect()).collect();
        assert_eq!(lines[1], ["aa", "se", "expert-node", "-", "60", "s"]);
        assert_eq!(lines[2], ["bb", "se", "expert-node", "-", "expired"]);
        let json = serde_json::to_value(&tokens).unwrap();
        let keys: Vec<&String> = json["tokens"][0].as_object().unwrap().keys().collect();
        let documented = ["id", "region", "role", "name", "created_ms", "expires_ms", "expired"];
        assert_eq!(keys, documented);
    }
}
