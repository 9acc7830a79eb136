//! `entente key revoke`.

use clap::Args;
use entente_membership::tenant::KeyId;

use super::view::KeyView;
use crate::api_key::now_ms;
use crate::exit::Failure;
use crate::operator::{OperatorArgs, tenants};

/// The flags of `entente key revoke`.
#[derive(Debug, Args)]
pub struct RevokeArgs {
    #[command(flatten)]
    operator: OperatorArgs,

    /// The key: the part between `mk_` and the next `_`.
    id: KeyId,
}

/// Revokes it. Nobody is asked: in a hurry that is what one wants, and a new key is made soon.
pub fn run(args: RevokeArgs) -> anyhow::Result<()> {
    let now_ms = now_ms();
    args.operator.run(async |operator| {
        let state = operator.latest().await?;
        let found = tenants::find_by_key(&state, &args.id)?;
        let revoke = operator.change_tenant(found, |tenant| {
            let revoked = tenant.revoke(&args.id, now_ms);
            revoked.map_err(|error| Failure::Refused(error.to_string()))
        });
        let tenant = revoke.await?.tenant;
        let keys = KeyView::all(&tenant, now_ms);
        operator.print(&keys, |keys| super::view::table(keys))
    })
}
