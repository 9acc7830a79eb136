//! How tenants are shown.

use comfy_table::Table;
use entente_proto::ids::{RegionSet, TenantName};
use serde::Serialize;

use crate::cluster::columns;
use crate::operator::or_dash;
use crate::operator::tenants::Found;

/// One tenant as JSON has it.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct TenantView {
    pub name: TenantName,
    /// The regions that may see its rows.
    allowed: RegionSet,
    /// Absent: not limited.
    tokens_per_minute: Option<u64>,
    /// Absent: not limited.
    concurrent_max: Option<u32>,
    policy: PolicyView,
    live_keys: usize,
}

/// The policy as receipts name it.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct PolicyView {
    id: String,
    sha256: String,
}

impl TenantView {
    /// As of `now_ms`.
    pub fn new(found: &Found, now_ms: u64) -> Self {
        let tenant = &found.tenant;
        let policy = tenant.policy(found.revision);
        let sha256 = policy.sha256.iter().map(|byte| format!("{byte:02x}")).collect();
        Self {
            name: tenant.name.clone(),
            allowed: tenant.allowed.clone(),
            tokens_per_minute: tenant.tokens_per_minute,
            concurrent_max: tenant.concurrent_max,
            policy: PolicyView { id: policy.id, sha256 },
            live_keys: tenant.live(now_ms).count(),
        }
    }

    /// The regions in one cell.
    fn regions(&self) -> String {
        let regions: Vec<&str> = self.allowed.iter().map(|region| region.as_str()).collect();
        or_dash((!regions.is_empty()).then(|| regions.join(",")))
    }
}

/// A line a tenant.
pub fn table(tenants: &[TenantView]) -> String {
    let mut table =
        columns(["TENANT", "ALLOWED", "TOKENS/MIN", "CONCURRENT", "LIVE KEYS", "POLICY"]);
    for tenant in tenants {
        table.add_row([
            tenant.name.to_string(),
            tenant.regions(),
            or_dash(tenant.tokens_per_minute),
            or_dash(tenant.concurrent_max),
            tenant.live_keys.to_string(),
            tenant.policy.id.clone(),
        ]);
    }
    table.trim_fmt()
}

/// One tenant, a line a field.
pub fn fields(tenant: &TenantView) -> Table {
    let mut table = columns(["FIELD", "VALUE"]);
    table.add_row(["name", tenant.name.as_str()]);
    table.add_row(["allowed", &tenant.regions()]);
    table.add_row(["tokens_per_minute", &or_dash(tenant.tokens_per_minute)]);
    table.add_row(["concurrent_max", &or_dash(tenant.concurrent_max)]);
    table.add_row(["policy", &tenant.policy.id]);
    table.add_row(["policy_sha256", &tenant.policy.sha256]);
    table
}
