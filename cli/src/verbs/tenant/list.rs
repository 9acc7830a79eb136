//! `entente tenant ls`.

use clap::Args;

use super::view::{TenantView, table};
use crate::api_key::now_ms;
use crate::operator::{OperatorArgs, tenants};

/// The flags of `entente tenant ls`.
#[derive(Debug, Args)]
pub struct LsArgs {
    #[command(flatten)]
    operator: OperatorArgs,
}

/// Lists what any voter knows.
pub fn run(args: LsArgs) -> anyhow::Result<()> {
    args.operator.run(async |operator| {
        let (state, now_ms) = (operator.state().await?, now_ms());
        let all = tenants::all(&state)?;
        let views: Vec<_> = all.iter().map(|found| TenantView::new(found, now_ms)).collect();
        operator.print(&views, |views| table(views))
    })
}
