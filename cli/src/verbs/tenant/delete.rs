//! `entente tenant delete`.

use clap::Args;
use entente_membership::state::{Command, RecordKind};
use entente_proto::ids::TenantName;
use serde::Serialize;

use crate::operator::{OperatorArgs, confirm, tenants};

/// The flags of `entente tenant delete`.
#[derive(Debug, Args)]
pub struct DeleteArgs {
    #[command(flatten)]
    operator: OperatorArgs,

    /// Do not ask: the tenant's keys cannot be had back.
    #[arg(long, env = "ENTENTE_YES")]
    yes: bool,

    /// The tenant.
    name: TenantName,
}

/// The answer as JSON has it.
#[derive(Debug, Serialize)]
struct Deleted {
    name: TenantName,
    /// Keys that went with it.
    keys: usize,
}

/// Deletes the tenant that was looked at, and not one that was made since.
pub fn run(args: DeleteArgs) -> anyhow::Result<()> {
    args.operator.run(async |operator| {
        let state = operator.latest().await?;
        let found = tenants::find(&state, &args.name)?;
        confirm(args.yes, &format!("deleting {} and its keys", args.name))?;
        let (kind, key) = (RecordKind::Tenant, args.name.to_string());
        operator
            .propose(Command::DeleteRecord { kind, key, revision: Some(found.revision) })
            .await?;
        let deleted = Deleted { name: args.name.clone(), keys: found.tenant.keys.len() };
        operator.print(&deleted, |deleted| {
            format!("{} is deleted, and {} keys with it", deleted.name, deleted.keys)
        })
    })
}
