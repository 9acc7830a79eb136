//! `entente key create`.

use clap::Args;
use entente_membership::tenant::key::check_label;
use entente_membership::tenant::{Scope, Scopes};
use entente_proto::ids::TenantName;

use super::view::{KeyView, print_new};
use crate::api_key::{mint, now_ms};
use crate::exit::{Failure, Misuse};
use crate::operator::lifetime::Lifetime;
use crate::operator::{OperatorArgs, tenants};

/// The flags of `entente key create`.
#[derive(Debug, Args)]
pub struct CreateArgs {
    #[command(flatten)]
    operator: OperatorArgs,

    /// Whose key it will be.
    #[arg(long, env = "ENTENTE_TENANT", value_name = "NAME")]
    tenant: TenantName,

    /// What it may be used for, of inference and receipts; everything if absent.
    #[arg(long, env = "ENTENTE_SCOPES", value_name = "SCOPE,…", value_delimiter = ',')]
    scopes: Vec<Scope>,

    /// How long it is good; until it is revoked if absent.
    #[arg(long, env = "ENTENTE_TTL", value_name = "TIME")]
    ttl: Option<Lifetime>,

    /// A word for people.
    #[arg(long, env = "ENTENTE_LABEL", value_name = "TEXT", default_value = "")]
    label: String,
}

/// Makes a key and prints it.
pub fn run(args: CreateArgs) -> anyhow::Result<()> {
    check_label(&args.label).map_err(|error| Misuse(format!("--label: {error}")))?;
    let now_ms = now_ms();
    let scopes: Scopes = match args.scopes.is_empty() {
        true => Scope::ALL.into(),
        false => args.scopes.iter().copied().collect(),
    };
    args.operator.run(async |operator| {
        let state = operator.latest().await?;
        let found = tenants::find(&state, &args.tenant)?;
        let (mut key, secret) = mint(now_ms, scopes, args.label)?;
        key.expires_ms = args.ttl.map(|ttl| ttl.after(now_ms));
        let view = KeyView::new(&found.tenant, &key, now_ms);
        let add = operator.change_tenant(found, |tenant| {
            tenant.add(key, now_ms).map_err(|error| Failure::Refused(error.to_string()))
        });
        add.await?;
        print_new(&operator, view, secret, None)
    })
}
