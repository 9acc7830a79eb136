//! `entente tenant show`.

use clap::Args;
use entente_proto::ids::TenantName;
use serde::Serialize;

use super::view::{TenantView, fields};
use crate::api_key::now_ms;
use crate::operator::{OperatorArgs, tenants};
use crate::verbs::key::view::{KeyView, table};

/// The flags of `entente tenant show`.
#[derive(Debug, Args)]
pub struct ShowArgs {
    #[command(flatten)]
    operator: OperatorArgs,

    /// The tenant.
    name: TenantName,
}

/// The answer as JSON has it.
#[derive(Debug, Serialize)]
struct Shown {
    #[serde(flatten)]
    tenant: TenantView,
    keys: Vec<KeyView>,
}

/// Shows what is committed about one tenant, which any voter knows.
pub fn run(args: ShowArgs) -> anyhow::Result<()> {
    args.operator.run(async |operator| {
        let (state, now_ms) = (operator.state().await?, now_ms());
        let found = tenants::find(&state, &args.name)?;
        let shown = Shown {
            tenant: TenantView::new(&found, now_ms),
            keys: KeyView::all(&found.tenant, now_ms),
        };
        operator.print(&shown, |shown| {
            format!("{}\n\n{}", fields(&shown.tenant).trim_fmt(), table(&shown.keys))
        })
    })
}
