//! `entente key ls`.

use clap::Args;
use entente_proto::ids::TenantName;

use super::view::{KeyView, table};
use crate::api_key::now_ms;
use crate::operator::{OperatorArgs, tenants};

/// The flags of `entente key ls`.
#[derive(Debug, Args)]
pub struct LsArgs {
    #[command(flatten)]
    operator: OperatorArgs,

    /// Only this tenant's.
    #[arg(long, env = "ENTENTE_TENANT", value_name = "NAME")]
    tenant: Option<TenantName>,
}

/// Lists what any voter knows.
pub fn run(args: LsArgs) -> anyhow::Result<()> {
    args.operator.run(async |operator| {
        let (state, now_ms) = (operator.state().await?, now_ms());
        let found = match &args.tenant {
            Some(name) => vec![tenants::find(&state, name)?],
            None => tenants::all(&state)?,
        };
        let keys = found.iter().flat_map(|found| KeyView::all(&found.tenant, now_ms));
        operator.print(&keys.collect::<Vec<_>>(), |keys| table(keys))
    })
}
