//! The latest committed state, for processes that are no voters.

use std::sync::Arc;
use std::time::Duration;

use entente_proto::wire;
use entente_proto::wire::membership_client::MembershipClient;
use tokio::sync::watch;
use tokio::time::sleep;
use tonic::transport::Channel;
use tonic::{Status, Streaming};

use super::Client;
use crate::state::State;
use crate::state::codec::STATE_LEN_MAX;

/// How long one round of asking for a stream may take before the next one begins.
const ASK_MAX: Duration = Duration::from_secs(5);
/// Pause before the next voter is asked.
const PAUSE: Duration = Duration::from_millis(20);

impl Client {
    /// Keeps the latest committed state, for as long as somebody holds the result. It resumes from
    /// the index that it has, at whichever voter answers, and never goes back. Without a quorum it
    /// stays as it is. `None` until some voter has answered.
    pub fn watch(&self) -> watch::Receiver<Option<Arc<State>>> {
        let (sender, receiver) = watch::channel(None);
        let client = self.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = client.follow(&sender) => {}
                () = sender.closed() => {}
            }
        });
        receiver
    }

    async fn follow(&self, latest: &watch::Sender<Option<Arc<State>>>) {
        loop {
            let after_index = index(latest);
            let opened = self.any(ASK_MAX, |channel| open(channel, after_index)).await;
            let ended = match opened {
                Ok(updates) => self.take(updates, latest).await,
                Err(error) => error.to_string(),
            };
            tracing::debug!(%ended, "watching the membership elsewhere");
            self.addresses().pass_over();
            sleep(PAUSE).await;
        }
    }

    /// Takes states until the stream ends; says why it did.
    async fn take(
        &self,
        mut updates: Streaming<wire::WatchUpdate>,
        latest: &watch::Sender<Option<Arc<State>>>,
    ) -> String {
        loop {
            let update = match updates.message().await {
                Ok(Some(update)) => update,
                Ok(None) => return "the voter ended the stream".to_owned(),
                Err(status) => return status.message().to_owned(),
            };
            let state = match update.state.map(State::open) {
                Some(Ok(state)) => state,
                Some(Err(error)) => return error.to_string(),
                None => continue,
            };
            // A voter that is behind has nothing to tell.
            if state.applied_index() > index(latest) {
                self.addresses().learn_from(&state);
                latest.send_replace(Some(Arc::new(state)));
            }
        }
    }
}

fn index(latest: &watch::Sender<Option<Arc<State>>>) -> u64 {
    latest.borrow().as_ref().map_or(0, |state| state.applied_index())
}

async fn open(channel: Channel, after_index: u64) -> Result<Streaming<wire::WatchUpdate>, Status> {
    let mut client =
        MembershipClient::new(channel).max_decoding_message_size(STATE_LEN_MAX + (1 << 16));
    Ok(client.watch(wire::WatchRequest { after_index }).await?.into_inner())
}
