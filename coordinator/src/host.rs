//! The coordinator's own voter: hosts it beside the engine, and sees to it that the cluster has
//! agreed on what it serves.
//!
//! Whoever leads plans placements by the record of the model, also a witness, which has none. The
//! first coordinator that finds no record writes it, with the replicas that the roster wants of each
//! region that has a coordinator, and of its own. What is there already is never written again: an operator may have
//! changed it since.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

use entente_membership::audit::Sink;
use entente_membership::enrolment;
use entente_membership::raft;
use entente_membership::roster::{Roster, VoterRole};
use entente_membership::served::{Differs, SERVED_MODEL_KEY, ServedModel};
use entente_membership::service::{self, Membership, Process, Service};
use entente_membership::state::{Command, Expect, RecordKind, State};
use entente_proto::ids::Region;
use entente_tls::{Credentials, Files};
use tokio::sync::watch;

use crate::metrics::Metrics;
use crate::start::{check_followable, credentials};
use crate::{Config, Error};

/// How long one attempt to read or to propose may take before the state is looked at anew.
const ATTEMPT_MAX: Duration = Duration::from_secs(5);
/// How long the service may take to stop.
const STOP_MAX: Duration = Duration::from_secs(2);

/// A voter with what it shows.
pub(crate) struct Host {
    pub(crate) service: Service,
    pub(crate) credentials: Credentials,
    files: Files,
}

/// Starts the voter that the configuration describes, on `listener` if one is given.
///
/// # Errors
/// What is wrong with the configuration, the credentials, the disk or the port.
pub(crate) async fn start(
    config: &Config,
    listener: Option<TcpListener>,
    audit: Sink,
) -> Result<Host, Error> {
    check_followable(config)?;
    let needed =
        |section| Error::Config(format!("[{section}] is needed where cluster.voters is not empty"));
    let membership = config.membership.clone().ok_or_else(|| needed("membership"))?;
    let files = config.tls.clone().ok_or_else(|| needed("tls"))?;
    let credentials = credentials(config)?.ok_or_else(|| needed("tls"))?;
    let (roster, name) = (&config.cluster, &config.name);
    let process = Process { listener, audit, ..credentials.clone().into() };
    let service = service::start(membership, roster, name, process).await?;
    Ok(Host { service, credentials, files })
}

impl Host {
    /// Keeps the certificate valid, that of the voter and that of the links: they are the same.
    pub(crate) fn keep_fresh(&self) -> impl Future<Output = Infallible> + use<> {
        let client = self.service.handle.client().clone();
        enrolment::keep_fresh(client, self.credentials.clone(), self.files.clone())
    }
}

/// Stops the voter; what it had not finished it takes up at its next start.
pub(crate) async fn stop(Service { handle, ended }: Service) {
    handle.shutdown().await;
    if tokio::time::timeout(STOP_MAX, ended).await.is_err() {
        tracing::warn!("the membership service did not stop in time");
    }
}

/// Resolves once the service has ended, which it must not do on its own.
pub(crate) async fn ended(service: &mut Service) -> Error {
    match (&mut service.ended).await {
        Ok(Err(error)) => error.into(),
        Ok(Ok(())) => Error::Start("the membership service has ended".to_owned()),
        Err(error) => Error::Start(format!("the membership service: {error}")),
    }
}

/// Resolves once the cluster has agreed to serve this model. Without a quorum that may take long;
/// what was agreed before is served meanwhile.
///
/// # Errors
/// When the cluster has agreed on another model.
pub(crate) async fn agree(
    membership: &Membership,
    model: &ServedModel,
    config: &Config,
) -> Result<(), Error> {
    check(&membership.state().borrow(), model)?;
    loop {
        let Some(state) = membership.read(ATTEMPT_MAX).await else {
            tracing::debug!("waiting for a quorum to agree on the model");
            continue;
        };
        check(&state, model)?;
        let command = lacking(&state, model, &config.cluster, config.region);
        let Some(command) = command else { return Ok(()) };
        // Another coordinator may have been faster; the next look at the state tells.
        if let Err(error) = membership.propose(ATTEMPT_MAX, Expect::default(), command).await {
            tracing::debug!(%error, "a proposal came to nothing");
        }
    }
}

/// Refuses a cluster that serves another model, or other weights of it.
fn check(state: &State, model: &ServedModel) -> Result<(), Error> {
    match ServedModel::of(state) {
        None => Ok(()),
        Some(Ok(agreed)) => {
            let ours = model.manifest_sha256.as_ref().map(<[u8; 32]>::as_slice);
            agreed.admits(&model.digest.0, ours).map_err(|differs| match differs {
                Differs::Model => Error::OtherModel { agreed: agreed.digest, ours: model.digest },
                Differs::Weights => Error::OtherWeights,
            })
        }
        Some(Err(error)) => {
            Err(Error::Config(format!("the cluster's record of its model: {error}")))
        }
    }
}

/// The first thing that the cluster has not agreed on yet.
fn lacking(state: &State, model: &ServedModel, roster: &Roster, own: Region) -> Option<Command> {
    if ServedModel::of(state).is_none() {
        let (key, value) = (SERVED_MODEL_KEY.to_owned(), model.encode());
        return Some(Command::PutRecord { kind: RecordKind::Model, key, value, revision: Some(0) });
    }
    let coordinators = roster.voters().iter().filter(|v| v.role == VoterRole::Coordinator);
    // This coordinator may have joined later, in a region that no founder stands in.
    let regions: BTreeSet<Region> = coordinators.map(|voter| voter.region).chain([own]).collect();
    let region = regions.into_iter().find(|region| !state.replicas().contains_key(region))?;
    Some(Command::SetReplicas(region, roster.replicas()))
}

/// Shows where raft stands, for as long as the service runs.
pub(crate) async fn show(mut status: watch::Receiver<raft::Status>, metrics: Arc<Metrics>) {
    loop {
        {
            let now = status.borrow_and_update();
            metrics.cluster.raft_leader.set(now.is_leader.into());
            metrics.cluster.raft_has_leader.set(now.leader.is_some().into());
            metrics.cluster.raft_term.set(i64::try_from(now.term).unwrap_or(i64::MAX));
        }
        if status.changed().await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use entente_membership::roster::{RosterNode, RosterVoter};
    use entente_proto::ids::{LayerId, ModelDigest};
    use entente_proto::placement::ModelShape;

    fn model(digest: u8) -> ServedModel {
        let shape = ModelShape { layers: vec![(LayerId(0), 8)], expert_bytes: 10 };
        ServedModel { digest: ModelDigest([digest; 32]), shape, manifest_sha256: Some([4; 32]) }
    }

    fn fr() -> Region {
        "fr".parse().unwrap()
    }

    /// Coordinators in fr and se, a witness in de.
    fn roster() -> Roster {
        let voter = |(name, code, role): (&str, &str, VoterRole)| RosterVoter {
            name: name.parse().unwrap(),
            region: code.parse().unwrap(),
            role,
            address: format!("{name}.example:7200"),
        };
        let voters = [
            ("fr-coordinator", "fr", VoterRole::Coordinator),
            ("se-coordinator", "se", VoterRole::Coordinator),
            ("de-witness", "de", VoterRole::Witness),
        ];
        let node = |number: u16| RosterNode {
            name: format!("fr-expert-{number}").parse().unwrap(),
            region: "fr".parse().unwrap(),
            address: format!("127.0.0.1:{number}"),
        };
        let roster = Roster::new("test".to_owned(), 2, vec![node(1), node(2)]).unwrap();
        roster.with_voters(voters.map(voter).into()).unwrap()
    }

    #[test]
    fn what_a_new_cluster_lacks_is_proposed_once_and_for_regions_with_a_coordinator_only() {
        let (roster, model) = (roster(), model(1));
        let mut state = State::genesis(roster.specs()).unwrap();
        let mut proposed = Vec::new();
        while let Some(command) = lacking(&state, &model, &roster, fr()) {
            proposed.push(command.clone());
            state.apply(command).unwrap();
        }
        let region = |code: &str| code.parse().unwrap();
        assert!(matches!(proposed[0], Command::PutRecord { revision: Some(0), .. }));
        let wanted = [region("fr"), region("se")].map(|region| Command::SetReplicas(region, 2));
        assert_eq!(proposed[1..], wanted);
        // A coordinator that joins in another region brings it in.
        let nl = region("nl");
        assert_eq!(lacking(&state, &model, &roster, nl), Some(Command::SetReplicas(nl, 2)));
        assert_eq!(ServedModel::of(&state), Some(Ok(model)));
    }

    #[test]
    fn what_an_operator_has_changed_stays_and_another_model_is_refused() {
        let (roster, ours) = (roster(), model(1));
        let mut state = State::genesis(roster.specs()).unwrap();
        assert!(check(&state, &ours).is_ok(), "nothing is agreed yet");
        while let Some(command) = lacking(&state, &ours, &roster, fr()) {
            state.apply(command).unwrap();
        }
        state.apply(Command::SetReplicas("fr".parse().unwrap(), 1)).unwrap();
        assert_eq!(lacking(&state, &ours, &roster, fr()), None);
        assert!(check(&state, &ours).is_ok());
        let refused = check(&state, &model(2)).unwrap_err().to_string();
        assert!(refused.starts_with("the cluster serves the model 0101"), "{refused}");
        let other = ServedModel { manifest_sha256: Some([5; 32]), ..ours.clone() };
        let refused = check(&state, &other).unwrap_err().to_string();
        assert!(refused.contains("manifest.json"), "{refused}");
        assert!(check(&state, &ServedModel { manifest_sha256: None, ..ours }).is_ok());
    }
}
