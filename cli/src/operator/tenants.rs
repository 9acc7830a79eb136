//! Reading and changing tenants: always by compare-and-set on what was just committed, so that of
//! two operators who change the same tenant the slower one is refused rather than the faster one
//! overwritten.

use std::sync::Arc;

use anyhow::Context;
use entente_membership::state::{Applied, Command, RecordKind, SessionId, State};
use entente_membership::tenant::{KeyId, Tenant};
use entente_proto::ids::TenantName;

use super::Operator;
use crate::exit::{Failure, Misuse};

/// A tenant and the revision of its record.
pub struct Found {
    /// The tenant.
    pub tenant: Tenant,
    /// The revision.
    pub revision: u64,
}

impl Operator {
    /// The committed state with everything in it that was committed before this call: what one
    /// command has written, the next one reads, whichever voters they speak to.
    pub async fn latest(&self) -> anyhow::Result<Arc<State>> {
        // A session is named after the entry that opened it, which comes after all before it.
        let applied = self.propose(Command::OpenSession).await?;
        let Applied::Session(SessionId(index)) = applied else {
            anyhow::bail!("a voter answered with {applied:?} when a session was opened");
        };
        let mut states = self.watch().await?;
        let reached =
            |state: &Option<Arc<State>>| state.as_ref().is_some_and(|s| s.applied_index() >= index);
        let told = tokio::time::timeout(self.call_max, states.wait_for(reached)).await;
        let text = "no voter has told what was committed last";
        let state = told.map_err(|_| Failure::Unreachable(text.to_owned()))?;
        state.context("the watch of the membership has ended")?.clone().context(text)
    }

    /// Changes a tenant, and gives it as it is from then on.
    pub async fn change_tenant(
        &self,
        found: Found,
        change: impl FnOnce(&mut Tenant) -> Result<(), Failure>,
    ) -> anyhow::Result<Found> {
        let Found { mut tenant, revision } = found;
        change(&mut tenant)?;
        self.put_tenant(tenant, revision).await
    }

    /// Writes a tenant whose record has this revision: 0 for none yet.
    pub async fn put_tenant(&self, tenant: Tenant, revision: u64) -> anyhow::Result<Found> {
        let (kind, key) = (RecordKind::Tenant, tenant.name.to_string());
        let (value, revision) = (tenant.encode(), Some(revision));
        match self.propose(Command::PutRecord { kind, key, value, revision }).await? {
            Applied::Revision(revision) => Ok(Found { tenant, revision }),
            other => anyhow::bail!("a voter answered with {other:?} when a tenant was written"),
        }
    }
}

/// Every tenant, in order of name.
pub fn all(state: &State) -> anyhow::Result<Vec<Found>> {
    let found = |read| {
        let (tenant, revision) = read?;
        Ok(Found { tenant, revision })
    };
    Tenant::all(state).map(found).collect()
}

/// The tenant of this name.
///
/// # Errors
/// There is none; the text names those that there are.
pub fn find(state: &State, name: &TenantName) -> anyhow::Result<Found> {
    match Tenant::of(state, name) {
        Some(read) => {
            let (tenant, revision) = read?;
            Ok(Found { tenant, revision })
        }
        None => {
            let names: Vec<&str> =
                state.records(RecordKind::Tenant).map(|(name, _)| name).collect();
            let text = format!("{name} is no tenant; tenants are {}", names.join(", "));
            Err(Misuse(text).into())
        }
    }
}

/// The tenant that has the key of this id.
pub fn find_by_key(state: &State, id: &KeyId) -> anyhow::Result<Found> {
    let has = |found: &Found| found.tenant.keys.iter().any(|key| key.id == *id);
    let found = all(state)?.into_iter().find(has);
    found.ok_or_else(|| Misuse(format!("no tenant has a key {id}; see `entente key ls`")).into())
}
