//! The tenant that a cluster on one machine begins with: `local`, who may use every region, so that
//! the first request needs nothing but the key that is in `cluster.json`.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, anyhow};
use entente_membership::client::Client;
use entente_membership::state::{Command, Expect, RecordKind, State};
use entente_membership::tenant::{Scope, Tenant};
use entente_proto::ids::RegionSet;
use entente_tls::Credentials;

use super::pki;
use crate::api_key::{self, ApiKey};

/// Its name.
const NAME: &str = "local";

/// How long the cluster may take to agree on it and to tell every coordinator.
const AGREE_MAX: Duration = Duration::from_secs(30);

/// Makes the tenant as an operator would, and returns once each coordinator knows it. `control` are
/// the control planes of the coordinators, `tls` the folder of certificates.
pub async fn found(tls: &Path, control: &[String], allowed: RegionSet) -> anyhow::Result<ApiKey> {
    let name = NAME.parse().expect("the word is a valid name");
    let now_ms = api_key::now_ms();
    let (key, secret) = api_key::mint(now_ms, Scope::ALL.into(), "entente up".to_owned())?;
    let mut tenant = Tenant::new(name, allowed);
    tenant.add(key, now_ms)?;
    let credentials = Credentials::load(&pki::files(tls, &pki::operator()))?;
    let client = Client::new(&credentials, control.to_vec())?;
    let (kind, key) = (RecordKind::Tenant, NAME.to_owned());
    let command = Command::PutRecord { kind, key, value: tenant.encode(), revision: Some(0) };
    let agree = client.propose(AGREE_MAX, Expect::default(), command);
    agree.await.context("the cluster did not agree on its first tenant")?;
    for address in control {
        // A client that knows nobody else asks this one.
        let mut states = Client::new(&credentials, vec![address.clone()])?.watch();
        let known = |state: &State| state.record(RecordKind::Tenant, NAME).is_some();
        let told = states.wait_for(|state| state.as_ref().is_some_and(|state| known(state)));
        let told = tokio::time::timeout(AGREE_MAX, told).await;
        told.map_err(|_| anyhow!("the coordinator at {address} did not hear of the first tenant"))?
            .context("the watch of the membership has ended")?;
    }
    Ok(secret)
}
