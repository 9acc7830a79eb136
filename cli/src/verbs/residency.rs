//! `entente residency`: explains where a request may be served.

use std::path::Path;

use anyhow::Context;
use clap::{Args, Subcommand};
use entente_coordinator::residency::{self, Decision, Endpoints};
use entente_membership::state::{Role, State};
use entente_membership::tenant::Tenant;
use entente_proto::ids::{Region, RegionSet, TenantName};
use serde::{Deserialize, Serialize};

use crate::cluster::columns;
use crate::exit::Misuse;
use crate::operator::{OperatorArgs, or_dash};

/// What can be done.
#[derive(Debug, Subcommand)]
pub enum ResidencyVerb {
    /// Say what each region's coordinator would decide on a request. Nothing is sent to any.
    Test(TestArgs),
}

/// The flags of `entente residency test`.
#[derive(Debug, Args)]
pub struct TestArgs {
    #[command(flatten)]
    operator: OperatorArgs,

    /// Whose request it is.
    #[arg(long, env = "ENTENTE_TENANT", value_name = "NAME")]
    tenant: TenantName,

    /// The request's body: JSON, or a file with it. Only its `residency` is looked at.
    #[arg(long, env = "ENTENTE_RESIDENCY_REQUEST", value_name = "FILE|JSON")]
    request: String,

    /// What the request's header x-entente-residency says, such as fr,se.
    #[arg(long, env = "ENTENTE_RESIDENCY_HEADER", value_name = "REGION,…")]
    header: Option<String>,
}

/// The part of a request that matters.
#[derive(Debug, Deserialize)]
struct Body {
    residency: Option<Vec<Region>>,
}

/// What one coordinator would decide.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Row {
    /// The region of the coordinator.
    entry: Region,
    /// Its name.
    coordinator: String,
    /// `allowed`, or the code of the error.
    decision: &'static str,
    /// Regions that would see rows.
    allowed: RegionSet,
    /// Why not, or where instead.
    reason: Option<String>,
}

/// Explains.
pub fn run(verb: ResidencyVerb) -> anyhow::Result<()> {
    let ResidencyVerb::Test(args) = verb;
    let narrowing = narrowing(&args.request, args.header.as_deref())?;
    let endpoints = args.operator.endpoints()?;
    args.operator.run(async |operator| {
        let state = operator.state().await?;
        let rows = decide(&state, &args.tenant, narrowing.as_ref(), &endpoints)?;
        operator.print(&rows, |rows| table(rows))
    })
}

/// To what the request narrows its tenant's policy.
fn narrowing(request: &str, header: Option<&str>) -> anyhow::Result<Option<RegionSet>> {
    let text = match request.trim_start().starts_with('{') {
        true => request.to_owned(),
        false => std::fs::read_to_string(Path::new(request))
            .map_err(|error| Misuse(format!("--request: cannot read {request}: {error}")))?,
    };
    let body: Body = serde_json::from_str(&text)
        .map_err(|error| Misuse(format!("--request is not a request: {error}")))?;
    let body = body.residency.map(|regions| regions.into_iter().collect());
    let header = header.map(residency::parse).transpose();
    let header = header.map_err(|error| Misuse(format!("--header: {error}")))?;
    Ok(residency::both(body, header))
}

/// What each coordinator of the cluster would decide.
fn decide(
    state: &State,
    tenant: &TenantName,
    narrowing: Option<&RegionSet>,
    endpoints: &Endpoints,
) -> anyhow::Result<Vec<Row>> {
    let known = Tenant::of(state, tenant);
    let (tenant, _) = known
        .ok_or_else(|| Misuse(format!("there is no tenant {tenant}")))?
        .context("the tenant's record cannot be read")?;
    let entries = state.nodes().filter(|node| node.spec.role == Role::Coordinator);
    let entries: Vec<(Region, String)> =
        entries.map(|node| (node.spec.region, node.spec.name.to_string())).collect();
    // Where it is not known how clients reach a region, its coordinator's name stands for that.
    let mut urls: Endpoints = entries.iter().cloned().collect();
    urls.extend(endpoints.clone());
    let row = |(entry, coordinator): (Region, String)| {
        let decided = residency::decide(&tenant.allowed, narrowing, entry, &urls);
        let (decision, allowed, reason) = match decided {
            Decision::Allowed(allowed) => ("allowed", allowed, None),
            Decision::Unsatisfiable { reason } => {
                ("residency_unsatisfiable", RegionSet::new(), Some(reason))
            }
            Decision::WrongEntry { region, url } => {
                ("wrong_entry_region", RegionSet::new(), Some(format!("ask {region}: {url}")))
            }
        };
        Row { entry, coordinator, decision, allowed, reason }
    };
    Ok(entries.into_iter().map(row).collect())
}

fn table(rows: &[Row]) -> String {
    let mut table = columns(["ENTRY", "COORDINATOR", "DECISION", "REGIONS", "REASON"]);
    for row in rows {
        table.add_row([
            row.entry.to_string(),
            row.coordinator.clone(),
            row.decision.to_owned(),
            or_dash((!row.allowed.is_empty()).then(|| residency::list(&row.allowed))),
            or_dash(row.reason.as_ref()),
        ]);
    }
    table.trim_fmt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_read_from_the_command_line_or_a_file_and_its_header_narrows_it_too() {
        let regions = |codes: &[&str]| -> RegionSet {
            codes.iter().map(|code| code.parse().unwrap()).collect()
        };
        let body = r#"{"model": "m", "residency": ["fr", "se"]}"#;
        assert_eq!(narrowing(body, None).unwrap(), Some(regions(&["fr", "se"])));
        assert_eq!(narrowing(body, Some("se, de")).unwrap(), Some(regions(&["se"])));
        assert_eq!(narrowing("{}", None).unwrap(), None);
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), body).unwrap();
        let path = file.path().to_str().unwrap();
        assert_eq!(narrowing(path, Some("fr")).unwrap(), Some(regions(&["fr"])));
        for (request, header) in [("{", None), ("no/file", None), ("{}", Some("FR"))] {
            assert!(narrowing(request, header).is_err(), "{request} {header:?}");
        }
    }
}
