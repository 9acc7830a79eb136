//! How keys are shown.

use std::io::{self, Write};

use entente_membership::tenant::{Key, Tenant};
use entente_proto::ids::TenantName;
use serde::Serialize;

use crate::api_key::ApiKey;
use crate::cluster::columns;
use crate::operator::{Operator, or_dash};

/// One key as JSON has it.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct KeyView {
    id: String,
    tenant: TenantName,
    /// `live`, `expired` or `revoked`.
    state: &'static str,
    scopes: Vec<&'static str>,
    label: String,
    /// Milliseconds since 1970.
    created_ms: u64,
    /// Absent: never.
    expires_ms: Option<u64>,
    /// Seconds until then; absent also when it is past.
    expires_in_s: Option<u64>,
}

impl KeyView {
    /// As of `now_ms`.
    pub fn new(tenant: &Tenant, key: &Key, now_ms: u64) -> Self {
        let state = match (key.revoked, key.is_live(now_ms)) {
            (true, _) => "revoked",
            (false, true) => "live",
            (false, false) => "expired",
        };
        let left_ms = key.expires_ms.and_then(|expires_ms| expires_ms.checked_sub(now_ms));
        Self {
            id: key.id.to_string(),
            tenant: tenant.name.clone(),
            state,
            scopes: key.scopes.iter().map(|scope| scope.as_str()).collect(),
            label: key.label.clone(),
            created_ms: key.created_ms,
            expires_ms: key.expires_ms,
            expires_in_s: left_ms.map(|left_ms| left_ms / 1_000),
        }
    }

    /// All keys of a tenant.
    pub fn all(tenant: &Tenant, now_ms: u64) -> Vec<Self> {
        tenant.keys.iter().map(|key| Self::new(tenant, key, now_ms)).collect()
    }
}

/// A line a key.
pub fn table(keys: &[KeyView]) -> String {
    let mut table = columns(["KEY", "TENANT", "STATE", "SCOPES", "EXPIRES IN", "LABEL"]);
    for key in keys {
        let expires = key.expires_in_s.filter(|_| key.state == "live");
        table.add_row([
            key.id.clone(),
            key.tenant.to_string(),
            key.state.to_owned(),
            key.scopes.join(","),
            or_dash(expires.map(span)),
            or_dash((!key.label.is_empty()).then_some(&key.label)),
        ]);
    }
    table.trim_fmt()
}

/// A length of time in its largest unit.
fn span(seconds: u64) -> String {
    match seconds {
        172_800.. => format!("{}d", seconds / 86_400),
        7_200.. => format!("{}h", seconds / 3_600),
        120.. => format!("{}m", seconds / 60),
        _ => format!("{seconds}s"),
    }
}

/// A key that was just made, as JSON has it.
#[derive(Debug, Serialize)]
struct Made {
    #[serde(flatten)]
    view: KeyView,
    /// The whole key: here and never again.
    key: ApiKey,
    /// The key that it follows.
    #[serde(skip_serializing_if = "Option::is_none")]
    replaces: Option<KeyView>,
}

/// Prints a new key: alone on standard output, so that a script can take it from there.
pub fn print_new(
    operator: &Operator,
    view: KeyView,
    key: ApiKey,
    replaces: Option<KeyView>,
) -> anyhow::Result<()> {
    let mut note = format!("key {} of {}; it is shown this once", view.id, view.tenant);
    if let Some((old, left)) = replaces.as_ref().and_then(|old| Some((old, old.expires_in_s?))) {
        note += &format!(". Key {} is good for {} yet", old.id, span(left));
    }
    operator.print(&Made { view, key, replaces }, |made| made.key.reveal().to_owned())?;
    // Whoever closed standard error has the key all the same.
    drop(writeln!(io::stderr(), "{note}"));
    Ok(())
}

#[cfg(test)]
mod tests {
    use entente_membership::tenant::{Scope, Scopes};
    use entente_proto::ids::RegionSet;

    use super::*;
    use crate::api_key::mint;

    #[test]
    fn live_expired_and_revoked_keys_are_told_apart_and_no_secret_is_shown() {
        let mut tenant = Tenant::new("a".parse().unwrap(), RegionSet::new());
        let scopes: Scopes = Scope::ALL.into();
        let (live, secret) = mint(5, scopes.clone(), "ci".to_owned()).unwrap();
        let (mut expiring, _) = mint(5, scopes.clone(), String::new()).unwrap();
        let (mut revoked, _) = mint(5, scopes, String::new()).unwrap();
        expiring.expires_ms = Some(7_500_010);
        revoked.revoked = true;
        tenant.keys = vec![live, expiring, revoked];
        let states =
            |now_ms| KeyView::all(&tenant, now_ms).iter().map(|k| k.state).collect::<Vec<_>>();
        assert_eq!(states(10), ["live", "live", "revoked"]);
        assert_eq!(states(7_500_010), ["live", "expired", "revoked"]);
        let views = KeyView::all(&tenant, 10);
        let text = table(&views);
        assert!(text.lines().nth(2).unwrap().contains("2h"), "{text}");
        let json = serde_json::to_string(&views).unwrap();
        let proof = secret.reveal().splitn(3, '_').nth(2).unwrap();
        assert!(
            !json.contains(proof) && !text.contains(proof) && json.contains("\"ci\""),
            "{json}"
        );
    }
}
