//! `entente witness`: a voter without a model, so that the raft group can lose somebody.
//!
//! It keeps the log, votes, and leads when it is elected; it can do all that a leader does, since
//! planning needs no model. It serves nobody and holds no experts. Where it has a folder for that,
//! it cosigns the checkpoints of coordinators' audit logs.

use std::convert::Infallible;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;

use anyhow::Context;
use entente_audit::witness::{Witness, key_name};
use entente_membership::enrolment::keep_fresh;
use entente_membership::metrics;
use entente_membership::raft;
use entente_membership::roster::Roster;
use entente_membership::service::{self, Process, Service};
use entente_proto::identity::Role;
use entente_proto::ids::{NodeName, Region};
use entente_tls::Credentials;
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::role::{self, Reporter, RoleArgs, Shutdown};

/// A witness, as TOML. An unknown key is an error that names the key.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// This process's name; that in its certificate.
    pub name: NodeName,
    /// The country that it stands in; that in its certificate.
    pub region: Region,
    /// Where `/metrics` and `/livez` are answered, `host:port`; nowhere when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metrics_listen: Option<String>,
    /// Certificate, key and CAs.
    pub tls: entente_tls::Files,
    /// Its part in the raft group.
    pub membership: service::Config,
    /// The voters that founded the cluster.
    pub cluster: Roster,
    /// Where it keeps what it cosigned; without it, it cosigns nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cosign: Option<CosignConfig>,
}

/// How checkpoints of audit logs are cosigned.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CosignConfig {
    /// The folder of the key and of what was cosigned last; this process's alone.
    pub dir: PathBuf,
}

impl Config {
    /// # Errors
    /// The credentials cannot be read, or are somebody else's.
    fn credentials(&self) -> Result<Credentials, entente_tls::Error> {
        let credentials = Credentials::load(&self.tls)?;
        let member = Some((self.region, self.name.clone()));
        credentials.belong_to(&self.cluster.expect(Role::Witness, member))?;
        Ok(credentials)
    }

    /// # Errors
    /// The folder is not this witness's, or does not say what was cosigned.
    fn witness(&self) -> Result<Option<Witness>, entente_audit::Error> {
        let name = key_name(self.cluster.name(), &self.name);
        self.cosign.as_ref().map(|cosign| Witness::open(&cosign.dir, &name)).transpose()
    }
}

/// Runs until a signal, or until the supervisor lets go.
pub fn run(args: RoleArgs) -> anyhow::Result<()> {
    let [listener, _] = role::inherited_listeners()?;
    let config: Config = role::load_config(&args.config)?;
    role::run(&args, |reporter, shutdown| witness(config, listener, reporter, shutdown))
}

async fn witness(
    config: Config,
    listener: Option<std::net::TcpListener>,
    reporter: Arc<Reporter>,
    mut shutdown: Shutdown,
) -> anyhow::Result<()> {
    let credentials = config.credentials()?;
    let witness = config.witness().context("cosign.dir")?;
    let listener = match listener {
        Some(listener) => listener,
        None => std::net::TcpListener::bind(&config.membership.listen)
            .with_context(|| format!("cannot listen at {}", config.membership.listen))?,
    };
    let address = listener.local_addr()?;
    let Config { name, tls, membership, cluster, metrics_listen, .. } = config;
    let metrics = bind(metrics_listen.as_deref()).await?;
    let process = Process { listener: Some(listener), witness, ..credentials.clone().into() };
    let service = service::start(membership, &cluster, &name, process).await?;
    let Service { handle, mut ended } = service;
    let mut shown = pin!(show(metrics, handle.status(), credentials.clone()));
    let mut fresh = pin!(keep_fresh(handle.client().clone(), credentials, tls));
    let mut status = handle.status();
    let mut is_ready = false;
    loop {
        tokio::select! {
            // It follows or leads: somebody is elected.
            elected = status.wait_for(|status| status.leader.is_some()), if !is_ready => {
                // The service has ended otherwise, which the other branch tells.
                if elected.is_ok() {
                    reporter.ready(address, 0, 0);
                }
                is_ready = true;
            }
            result = &mut ended => return Ok(result??),
            never = &mut fresh => match never {},
            never = &mut shown => match never {},
            () = &mut shutdown => break,
        }
    }
    handle.shutdown().await;
    Ok(ended.await??)
}

async fn bind(at: Option<&str>) -> anyhow::Result<Option<TcpListener>> {
    let Some(at) = at else { return Ok(None) };
    let bound = TcpListener::bind(at).await;
    Ok(Some(bound.with_context(|| format!("cannot listen at {at}"))?))
}

/// Shows metrics, if it was said where.
async fn show(
    listener: Option<TcpListener>,
    status: watch::Receiver<raft::Status>,
    credentials: Credentials,
) -> Infallible {
    if let Some(listener) = listener {
        metrics::serve(listener, status, credentials).await;
    }
    std::future::pending().await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_in_a_configuration_is_named() {
        let good = r#"
            name = "witness"
            region = "de"
            tls = { ca = "ca.pem", certificate = "witness.pem", key = "witness.key" }
            membership = { listen = "127.0.0.1:7300", data_dir = "raft" }
            cluster = { name = "local", voters = [
                { name = "witness", region = "de", role = "witness", address = "127.0.0.1:7300" },
            ] }"#;
        assert_eq!(toml::from_str::<Config>(good).unwrap().membership.heartbeat_ms, 100);
        for (text, spoilt, cause) in [
            ("data_dir", "data", "unknown field `data`"),
            ("name = \"witness\"\n", "", "missing field `name`"),
            ("region = \"de\"\n", "region = \"de\"\nmodel = \"m\"\n", "unknown field `model`"),
        ] {
            let error = toml::from_str::<Config>(&good.replacen(text, spoilt, 1)).unwrap_err();
            assert!(error.to_string().contains(cause), "{error}");
        }
    }
}
