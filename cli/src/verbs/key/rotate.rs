//! `entente key rotate`.

use clap::Args;
use entente_membership::tenant::KeyId;

use super::view::{KeyView, print_new};
use crate::api_key::{mint, now_ms};
use crate::exit::{Failure, Misuse};
use crate::operator::lifetime::Lifetime;
use crate::operator::{OperatorArgs, tenants};

/// The flags of `entente key rotate`.
#[derive(Debug, Args)]
pub struct RotateArgs {
    #[command(flatten)]
    operator: OperatorArgs,

    /// How long the old key is good yet, so that clients can change over.
    #[arg(long, env = "ENTENTE_GRACE", value_name = "TIME", default_value = "24h")]
    grace: Lifetime,

    /// How long the new key is good; until it is revoked if absent.
    #[arg(long, env = "ENTENTE_TTL", value_name = "TIME")]
    ttl: Option<Lifetime>,

    /// The key that is to be replaced: the part between `mk_` and the next `_`.
    id: KeyId,
}

/// Makes a successor with the same scopes and label, prints it, and gives the old key an end.
pub fn run(args: RotateArgs) -> anyhow::Result<()> {
    let now_ms = now_ms();
    args.operator.run(async |operator| {
        let state = operator.latest().await?;
        let found = tenants::find_by_key(&state, &args.id)?;
        let old = found.tenant.keys.iter().find(|key| key.id == args.id);
        let old = old.ok_or_else(|| Misuse(format!("there is no key {}", args.id)))?;
        let (mut key, secret) = mint(now_ms, old.scopes.clone(), old.label.clone())?;
        key.expires_ms = args.ttl.map(|ttl| ttl.after(now_ms));
        let view = KeyView::new(&found.tenant, &key, now_ms);
        let rotate = operator.change_tenant(found, |tenant| {
            let rotated = tenant.rotate(&args.id, key, args.grace.after(now_ms), now_ms);
            rotated.map_err(|error| Failure::Refused(error.to_string()))
        });
        let tenant = rotate.await?.tenant;
        let old = tenant.keys.iter().find(|key| key.id == args.id);
        let replaces = old.map(|old| KeyView::new(&tenant, old, now_ms));
        print_new(&operator, view, secret, replaces)
    })
}
