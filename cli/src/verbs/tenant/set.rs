//! `entente tenant create` and `entente tenant set`.

use std::str::FromStr;

use clap::Args;
use entente_membership::state::RecordKind;
use entente_membership::tenant::{TOKENS_PER_MINUTE_MAX, Tenant};
use entente_proto::ids::{RegionSet, TenantName};

use super::view::{TenantView, table};
use crate::api_key::now_ms;
use crate::exit::{Failure, Misuse};
use crate::operator::tenants::{self, Found};
use crate::operator::{Operator, OperatorArgs};

/// The flags of `entente tenant create`.
#[derive(Debug, Args)]
pub struct CreateArgs {
    #[command(flatten)]
    operator: OperatorArgs,

    #[command(flatten)]
    bounds: Bounds,

    /// The new tenant: 1 to 63 of a-z, 0-9 and -.
    name: TenantName,
}

/// The flags of `entente tenant set`.
#[derive(Debug, Args)]
pub struct SetArgs {
    #[command(flatten)]
    operator: OperatorArgs,

    #[command(flatten)]
    bounds: Bounds,

    /// The tenant.
    name: TenantName,
}

/// What a tenant may do. What is not said is nothing for a new tenant's regions and no limit for the
/// rest; for an old one it stays as it is.
#[derive(Debug, Args)]
struct Bounds {
    /// Regions that may see the tenant's rows, or `none`.
    #[arg(long, env = "ENTENTE_ALLOW", value_name = "REGION,…")]
    allow: Option<Allowed>,

    /// Tokens of prompts and answers in a minute at each coordinator, or `none` for no limit.
    #[arg(long, env = "ENTENTE_TOKENS_PER_MINUTE", value_name = "N")]
    tokens_per_minute: Option<Limit>,

    /// Requests at once at each coordinator, or `none` for no limit.
    #[arg(long, env = "ENTENTE_CONCURRENT", value_name = "N")]
    concurrent: Option<Limit>,
}

/// A list of regions.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Allowed(RegionSet);

impl FromStr for Allowed {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "none" {
            return Ok(Self(RegionSet::new()));
        }
        let regions = text.split(',').map(|region| region.trim().parse());
        let regions: Result<RegionSet, _> = regions.collect();
        regions.map(Self).map_err(|error| error.to_string())
    }
}

/// A number or none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Limit(Option<u64>);

impl FromStr for Limit {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "none" => Ok(Self(None)),
            _ => text.parse().map(|n| Self(Some(n))).map_err(|_| format!("{text:?} is no number")),
        }
    }
}

impl Bounds {
    fn apply(&self, tenant: &mut Tenant) -> Result<(), Misuse> {
        if let Some(Allowed(allowed)) = &self.allow {
            tenant.allowed.clone_from(allowed);
        }
        if let Some(Limit(tokens)) = self.tokens_per_minute {
            if tokens.is_some_and(|tokens| tokens > TOKENS_PER_MINUTE_MAX) {
                let text = format!("--tokens-per-minute is at most {TOKENS_PER_MINUTE_MAX}");
                return Err(Misuse(text));
            }
            tenant.tokens_per_minute = tokens;
        }
        if let Some(Limit(concurrent)) = self.concurrent {
            let most = || Misuse(format!("--concurrent is at most {}", u32::MAX));
            tenant.concurrent_max =
                concurrent.map(u32::try_from).transpose().map_err(|_| most())?;
        }
        Ok(())
    }
}

/// Makes a tenant. One of the same name that is there already is not touched.
pub fn create(args: CreateArgs) -> anyhow::Result<()> {
    let mut tenant = Tenant::new(args.name, RegionSet::new());
    args.bounds.apply(&mut tenant)?;
    args.operator.run(async |operator| {
        let state = operator.latest().await?;
        if state.record(RecordKind::Tenant, tenant.name.as_str()).is_some() {
            let name = &tenant.name;
            let text =
                format!("{name} is a tenant already; `entente tenant set {name}` changes it");
            return Err(Failure::Refused(text).into());
        }
        let created = operator.put_tenant(tenant, 0).await?;
        print(&operator, &created)
    })
}

/// Changes a tenant; what is not said stays as it is.
pub fn set(args: SetArgs) -> anyhow::Result<()> {
    args.operator.run(async |operator| {
        let state = operator.latest().await?;
        let mut found = tenants::find(&state, &args.name)?;
        args.bounds.apply(&mut found.tenant)?;
        let changed = operator.put_tenant(found.tenant, found.revision).await?;
        print(&operator, &changed)
    })
}

fn print(operator: &Operator, found: &Found) -> anyhow::Result<()> {
    operator.print(&TenantView::new(found, now_ms()), |view| table(std::slice::from_ref(view)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_said_stays_and_none_takes_a_limit_away() {
        let mut tenant = Tenant::new("a".parse().unwrap(), RegionSet::new());
        let bounds = Bounds {
            allow: Some("se, fr".parse().unwrap()),
            tokens_per_minute: Some("100".parse().unwrap()),
            concurrent: Some("3".parse().unwrap()),
        };
        bounds.apply(&mut tenant).unwrap();
        assert_eq!((tenant.tokens_per_minute, tenant.concurrent_max), (Some(100), Some(3)));
        let none = Some("none".parse().unwrap());
        let bounds = Bounds { allow: None, tokens_per_minute: none, concurrent: None };
        bounds.apply(&mut tenant).unwrap();
        assert_eq!((tenant.tokens_per_minute, tenant.concurrent_max), (None, Some(3)));
        assert_eq!(tenant.allowed.len(), 2);
        assert_eq!("none".parse(), Ok(Allowed(RegionSet::new())));
        for bad in ["", "fr,", "France"] {
            assert!(bad.parse::<Allowed>().is_err(), "{bad:?}");
        }
    }
}
