//! `entente token revoke`.

use clap::Args;
use entente_membership::token::{self, Token};
use serde::Serialize;

use crate::exit::Misuse;
use crate::operator::OperatorArgs;

/// The flags of `entente token revoke`.
#[derive(Debug, Args)]
pub struct RevokeArgs {
    #[command(flatten)]
    operator: OperatorArgs,

    /// The token's id, as `entente token ls` lists it.
    id: String,
}

/// The answer as JSON has it.
#[derive(Debug, Serialize)]
struct Revoked {
    id: String,
    state: &'static str,
}

/// Takes a token back. One that is used at the same moment is either used or revoked.
pub fn run(args: RevokeArgs) -> anyhow::Result<()> {
    args.operator.run(async |operator| {
        let state = operator.state().await?;
        let found = Token::find(&state, &args.id);
        let (_, revision) = found.map_err(|_| {
            Misuse(format!("{} is no token that could be used; see entente token ls", args.id))
        })?;
        operator.propose(token::delete(&args.id, revision)).await?;
        operator.print(&Revoked { id: args.id.clone(), state: "revoked" }, |revoked| {
            format!("{} is revoked", revoked.id)
        })
    })
}
