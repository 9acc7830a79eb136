//! To each other voter a task with a bounded queue, which dials, sends and redials.
//!
//! What does not fit into a queue, and what waited for a connection that did not come, is dropped:
//! raft takes a lost message for granted and a late one for nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use entente_proto::wire;
use entente_proto::wire::raft_client::RaftClient;
use entente_tls::Credentials;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::time::sleep;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

use super::shared::Directory;
use crate::net::{Dialler, Reason, Via};
use crate::state::NodeSpec;
use crate::voter::ENVELOPE_LEN_MAX;

/// Messages that wait for one voter. Raft keeps the appends on their way below half of this.
const QUEUE_LEN_MAX: usize = 512;
/// Pause before dialling again, at first and at most.
const REDIAL_MIN: Duration = Duration::from_millis(20);
const REDIAL_MAX: Duration = Duration::from_millis(250);

/// The queues, owned by the voter's thread.
pub(super) struct Peers {
    directory: Directory,
    credentials: Credentials,
    via: Via,
    runtime: Handle,
    queues: BTreeMap<u64, mpsc::Sender<wire::RaftEnvelope>>,
}

impl Peers {
    /// To be called within a runtime, which the tasks run on.
    pub(super) fn new(directory: Directory, credentials: Credentials, via: Via) -> Self {
        Self { directory, credentials, via, runtime: Handle::current(), queues: BTreeMap::new() }
    }

    pub(super) fn send(&mut self, messages: Vec<wire::RaftEnvelope>) {
        for message in messages {
            let to = message.to;
            let queue = self.queues.entry(to).or_insert_with(|| {
                let (queue, messages) = mpsc::channel(QUEUE_LEN_MAX);
                let (directory, credentials) = (self.directory.clone(), self.credentials.clone());
                let peer = Peer { id: to, directory, credentials, via: self.via.clone(), messages };
                self.runtime.spawn(peer.run());
                queue
            });
            let _ = queue.try_send(message);
        }
    }

    /// Forgets voters that have left the group; their tasks send what is queued and end.
    pub(super) fn close(&mut self, left: &BTreeSet<u64>) {
        self.queues.retain(|id, _| !left.contains(id));
    }
}

struct Peer {
    id: u64,
    directory: Directory,
    credentials: Credentials,
    via: Via,
    messages: mpsc::Receiver<wire::RaftEnvelope>,
}

impl Peer {
    async fn run(mut self) {
        let mut pause = REDIAL_MIN;
        // The first failure is reported, then each loss of a connection that was there.
        let mut report = true;
        while !self.messages.is_closed() {
            let Some(spec) = self.directory.voter(self.id) else {
                // Nobody knows where it is until the state does.
                if self.directory.state.changed().await.is_err() {
                    return;
                }
                continue;
            };
            let ended = match self.dial(&spec).await {
                Ok(channel) => {
                    (pause, report) = (REDIAL_MIN, true);
                    self.forward(channel, &spec).await
                }
                Err(reason) => reason,
            };
            if report && !self.messages.is_closed() {
                tracing::warn!(voter = self.id, name = %spec.name, reason = %ended, "cannot send to a voter");
                report = false;
            }
            while self.messages.try_recv().is_ok() {}
            sleep(pause).await;
            pause = (pause * 2).min(REDIAL_MAX);
        }
    }

    async fn dial(&self, spec: &NodeSpec) -> Result<Channel, String> {
        let member = Some((spec.region, spec.name.clone()));
        let dialler = Dialler::new(&self.credentials, member).map_err(|error| error.to_string())?;
        dialler
            .through(self.via.clone())
            .dial(&spec.address)
            .await
            .map_err(|error| error.to_string())
    }

    /// Sends until the connection breaks or the voter is elsewhere; says why.
    async fn forward(&mut self, channel: Channel, spec: &NodeSpec) -> String {
        let (into, stream) = mpsc::channel(1);
        let mut client = RaftClient::new(channel).max_encoding_message_size(ENVELOPE_LEN_MAX);
        let delivered = client.deliver(ReceiverStream::new(stream));
        let Self { id, messages, directory, .. } = self;
        let forward = async {
            while let Some(message) = messages.recv().await {
                if into.send(message).await.is_err() {
                    break;
                }
            }
        };
        let moved = async {
            while directory.voter(*id).is_none_or(|now| now.address == spec.address) {
                if directory.state.changed().await.is_err() {
                    break;
                }
            }
        };
        tokio::select! {
            ended = delivered => match ended {
                Ok(_) => "it ended the stream".to_owned(),
                Err(status) => match Reason::of(&status) {
                    Some(reason) => format!("{}: {}", reason.as_str(), status.message()),
                    None => status.message().to_owned(),
                },
            },
            () = forward => "nothing more is sent to it".to_owned(),
            () = moved => "it has moved".to_owned(),
        }
    }
}
