//! Has witnesses cosign what the cluster has agreed on about the ledger.
//!
//! Each witness is asked by a task of its own, whenever a checkpoint was committed, with the proof
//! that it goes on from the one that this witness cosigned last. Nothing waits for an answer, and a
//! witness that gives none holds up no other: checkpoints stay without its line, and the first one
//! that it does cosign covers all before it.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use entente_audit::checkpoint::Checkpoint;
use entente_audit::cosign::CosignerKey;
use entente_audit::note::Verifier;
use entente_audit::witness;
use entente_membership::checkpoint::Committed;
use entente_membership::net::{Dialler, Via};
use entente_membership::service::Membership;
use entente_membership::state::{NodeSpec, NodeState, Role, State};
use entente_proto::ids::NodeName;
use entente_proto::wire;
use entente_proto::wire::cosign_reply::Answer;
use entente_proto::wire::witness_client::WitnessClient;
use entente_tls::Credentials;
use tokio::time::timeout;
use tonic::transport::Channel;

use super::Ledger;
use crate::metrics::Metrics;

/// How long one attempt may take, and how long one that came to nothing waits for the next.
const ATTEMPT_MAX: Duration = Duration::from_secs(5);
/// Questions of one attempt: the first answer may say where the proof has to begin.
const QUESTIONS_MAX: usize = 2;

/// Whoever asks.
pub(crate) struct Asker {
    pub(crate) ledger: Ledger,
    pub(crate) membership: Membership,
    pub(crate) credentials: Credentials,
    pub(crate) via: Via,
    pub(crate) metrics: Arc<Metrics>,
}

/// The way to one witness.
#[derive(Default)]
struct Link {
    channel: Option<(String, Channel)>,
    /// What it cosigned last, as far as is known.
    size: u64,
}

/// Runs for as long as the membership service does.
pub(crate) async fn run(asker: Asker) {
    let asker = Arc::new(asker);
    let mut states = asker.membership.state();
    let mut asked = BTreeSet::new();
    loop {
        let witnesses: Vec<NodeName> =
            witnesses(&states.borrow_and_update()).map(|spec| spec.name.clone()).collect();
        for name in witnesses {
            // A name is never given to another member.
            if asked.insert(name.clone()) {
                tokio::spawn(attend(asker.clone(), name));
            }
        }
        if states.changed().await.is_err() {
            return;
        }
    }
}

fn witnesses(state: &State) -> impl Iterator<Item = &NodeSpec> {
    let there = state.nodes().filter(|node| node.state != NodeState::Removed);
    let specs = there.map(|node| &node.spec);
    specs.filter(|spec| spec.role == Role::Witness && !spec.address.is_empty())
}

/// Asks one witness until it is removed.
async fn attend(asker: Arc<Asker>, name: NodeName) {
    let Some(record_key) = asker.record_key() else { return };
    let mut states = asker.membership.state();
    let mut link = Link::default();
    // The revision of the record that it was asked about.
    let mut done = None;
    loop {
        let (spec, committed) = {
            let state = states.borrow_and_update();
            let spec = witnesses(&state).find(|spec| spec.name == name).cloned();
            (spec, Committed::of(&state, &record_key).and_then(Result::ok))
        };
        let Some(spec) = spec else { return };
        if let Some((committed, revision)) = committed.filter(|(_, at)| done != Some(*at)) {
            let asking = asker.ask(&spec, &mut link, &committed);
            let asked = timeout(ATTEMPT_MAX, asking).await;
            match asked.unwrap_or_else(|_| Err("it does not answer".to_owned())) {
                Ok(()) => done = Some(revision),
                Err(reason) => {
                    link.channel = None;
                    tracing::debug!(witness = %name, reason, "a checkpoint is not cosigned yet");
                }
            }
        }
        // What came to nothing is tried again, with whatever is committed then.
        if let Ok(Err(_)) = timeout(ATTEMPT_MAX, states.changed()).await {
            return;
        }
    }
}

impl Asker {
    /// Where the cluster keeps what it agreed on about this log.
    fn record_key(&self) -> Option<String> {
        let key: Verifier = self.ledger.key().parse().ok()?;
        Some(Committed::record_key(&self.credentials.identity().node, &key))
    }

    /// Has the witness cosign this checkpoint.
    async fn ask(
        &self,
        spec: &NodeSpec,
        link: &mut Link,
        committed: &Committed,
    ) -> Result<(), String> {
        let checkpoint = &committed.checkpoint;
        let size = checkpoint.tree.size;
        let mut client = WitnessClient::new(self.dial(spec, link).await?);
        for _ in 0..QUESTIONS_MAX {
            let path = match link.size <= size {
                true => self.ledger.consistency(link.size, size).await,
                // It says itself what is wrong with that.
                false => Some(Vec::new()),
            };
            let path = path.ok_or("the ledger cannot prove it now")?;
            let asked = Committed { path, ..committed.clone() };
            let request =
                wire::CosignRequest { checkpoint: Some(asked.message()), old_size: link.size };
            let reply = client.cosign(request).await;
            let reply = reply.map_err(|status| status.message().to_owned())?.into_inner();
            match reply.answer.ok_or("its answer has no meaning here")? {
                Answer::Size(have) => link.size = have,
                Answer::Cosignature(line) => {
                    link.size = size;
                    return self.keep(spec, checkpoint, &reply.key, line);
                }
                Answer::Refused(reason) => {
                    self.metrics.cluster.audit_alarms.inc();
                    tracing::error!(target: "audit", witness = %spec.name, reason,
                        "a witness does not cosign the audit log");
                    return Ok(());
                }
            }
        }
        Err("it has cosigned another one meanwhile".to_owned())
    }

    /// The witness that membership names, and nobody else.
    async fn dial(&self, spec: &NodeSpec, link: &mut Link) -> Result<Channel, String> {
        if let Some((_, channel)) = link.channel.as_ref().filter(|(at, _)| *at == spec.address) {
            return Ok(channel.clone());
        }
        let member = Some((spec.region, spec.name.clone()));
        let dialler = Dialler::new(&self.credentials, member).map_err(|error| error.to_string())?;
        let channel = dialler.through(self.via.clone()).dial(&spec.address).await;
        let channel = channel.map_err(|error| error.to_string())?;
        link.channel = Some((spec.address.clone(), channel.clone()));
        Ok(channel)
    }

    /// Hands the line to the ledger, under the key that the witness itself has named: who checks it
    /// later has that key from elsewhere.
    fn keep(
        &self,
        spec: &NodeSpec,
        checkpoint: &Checkpoint,
        key: &str,
        line: String,
    ) -> Result<(), String> {
        let key: CosignerKey = key.parse().map_err(|error| format!("its {error}"))?;
        let cluster = &self.credentials.identity().cluster;
        if key.name() != witness::key_name(cluster, &spec.name) {
            return Err(format!("its key is that of {}", key.name()));
        }
        if !self.ledger.cosigned(checkpoint.clone(), key, line) {
            return Err("the ledger is busy".to_owned());
        }
        let size = i64::try_from(checkpoint.tree.size).unwrap_or(i64::MAX);
        self.metrics.cluster.audit_cosigned.with_label_values(&[spec.name.as_str()]).set(size);
        Ok(())
    }
}
