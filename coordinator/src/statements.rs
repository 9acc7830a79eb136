//! What expert nodes say themselves that they computed, signed by them: asked for once a generation
//! has ended, of each node that its rows went to.
//!
//! ```text
//!   engine ── Closed ──► thread ── Closed ──────────────────────► whoever keeps records
//!                          │                                         ▲
//!                          └─► Unsettled ──► task ── Stated ─────────┘
//!                                             └── Settle ──► nodes
//! ```
//!
//! Invariants: every [`Closed`] is passed on, and before any statement about it; whoever keeps
//! records holds the engine up while it is behind. A statement is asked for until it comes or until
//! `ATTEMPTS_MAX` attempts have failed: a node that is gone takes its word with it, and that shows
//! in the records. Statements are passed on as they came; checking them is for whoever reads them.
//!
//! What this module does not know: how records are kept, signatures, HTTP.

mod unsettled;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender};
use entente_membership::state::State;
use entente_proto::ids::{NodeName, RequestId};
use entente_proto::wire::exchange_client::ExchangeClient;
use entente_proto::{statement, wire};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tonic::transport::Channel;

use self::unsettled::Unsettled;
use crate::Error;
use crate::engine::tally::Closed;
use crate::link::{Opener, grpc};

/// Generations that have ended and wait to be passed on; past it the engine waits.
const CLOSED_LEN_MAX: usize = 1_024;
/// How often nodes are asked: what has ended meanwhile is asked for together.
const PERIOD: Duration = Duration::from_millis(250);
/// How long a node may take to answer, dialling included.
const ANSWER_MAX: Duration = Duration::from_secs(3);
/// Attempts to get a statement; the pauses between them double, up to a minute in all.
const ATTEMPTS_MAX: u32 = 8;

/// What a node says that it has computed. A later statement about a request stands for an earlier
/// one of the same start of the node.
#[derive(Debug)]
pub struct Stated {
    /// Who was asked.
    pub node: NodeName,
    /// For which requests.
    pub requests: Vec<RequestId>,
    /// What it answered, as it came.
    pub signed: wire::SignedStatement,
}

/// Passes on what the engine tells, to which the returned sender is the way, and asks nodes for
/// their statements: by the opener, which knows how they are reached, and the states that name them.
///
/// # Errors
/// When the system refuses a thread.
pub(crate) fn start(
    closings: Option<Sender<Closed>>,
    statements: Sender<Stated>,
    (opener, states): (Opener, watch::Receiver<Arc<State>>),
) -> Result<Sender<Closed>, Error> {
    let (sender, closed) = crossbeam_channel::bounded(CLOSED_LEN_MAX);
    let unsettled = Arc::new(Mutex::new(Unsettled::default()));
    let shared = unsettled.clone();
    std::thread::Builder::new()
        .name("closings".into())
        .spawn(move || pass_on(&closed, &shared, closings.as_ref()))
        .map_err(|error| Error::Start(error.to_string()))?;
    let runtime = opener.runtime.clone();
    let asker = Asker { opener: Arc::new(opener), states, channels: BTreeMap::new() };
    runtime.spawn(asker.run(unsettled, statements));
    Ok(sender)
}

fn lock(unsettled: &Mutex<Unsettled>) -> MutexGuard<'_, Unsettled> {
    unsettled.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Ends with the engine.
fn pass_on(
    closed: &Receiver<Closed>,
    unsettled: &Mutex<Unsettled>,
    closings: Option<&Sender<Closed>>,
) {
    for closed in closed {
        let id = closed.origin.id;
        let touched: Vec<NodeName> = closed.tally.touched.keys().map(|t| t.node.clone()).collect();
        if closings.is_some_and(|closings| closings.send(closed).is_err()) {
            tracing::error!("nobody keeps records any more; one is lost");
        }
        let mut unsettled = lock(unsettled);
        touched.into_iter().for_each(|node| unsettled.add(node, id));
    }
    lock(unsettled).end();
}

/// Asks nodes for statements.
struct Asker {
    opener: Arc<Opener>,
    states: watch::Receiver<Arc<State>>,
    /// Connections that are up, with the address that each leads to.
    channels: BTreeMap<NodeName, (String, Channel)>,
}

/// What came of asking one node.
struct Asked {
    node: NodeName,
    requests: Vec<RequestId>,
    /// The answer, with the connection for the next time.
    answer: Result<(wire::SignedStatement, (String, Channel)), String>,
}

impl Asker {
    async fn run(mut self, unsettled: Arc<Mutex<Unsettled>>, statements: Sender<Stated>) {
        let mut tick = interval(PERIOD);
        tick.set_missed_tick_behavior(MissedTickBehavior::Skip);
        loop {
            tick.tick().await;
            let Some(batches) = lock(&unsettled).next() else { return };
            let mut asking: JoinSet<Asked> = JoinSet::new();
            for (node, requests) in batches {
                asking.spawn(self.ask(node, requests));
            }
            while let Some(Ok(asked)) = asking.join_next().await {
                let Asked { node, requests, answer } = asked;
                match answer {
                    Ok((signed, channel)) => {
                        self.channels.insert(node.clone(), channel);
                        lock(&unsettled).settled(&node, &requests);
                        let (statements, stated) =
                            (statements.clone(), Stated { node, requests, signed });
                        // Whoever keeps records may be behind, and this is no thread of ours.
                        let keep = move || statements.send(stated).is_ok();
                        let kept = tokio::task::spawn_blocking(keep);
                        if !matches!(kept.await, Ok(true)) {
                            return;
                        }
                    }
                    Err(reason) => {
                        self.channels.remove(&node);
                        let given_up = lock(&unsettled).failed(&node, ATTEMPTS_MAX);
                        tracing::debug!(%node, reason, given_up, "no statement");
                    }
                }
            }
        }
    }

    /// Asks one node, over the connection that there is or over a new one.
    fn ask(&self, name: NodeName, requests: Vec<RequestId>) -> impl Future<Output = Asked> + use<> {
        let (opener, state) = (self.opener.clone(), self.states.borrow().clone());
        let known = self.channels.get(&name).cloned();
        async move {
            let asked = async {
                let node = state.node(&name).ok_or("it is no member any more")?;
                let address = node.spec.address.clone();
                let channel = match known.filter(|(leads_to, _)| *leads_to == address) {
                    Some((_, channel)) => channel,
                    None => {
                        let peer = opener.grpc_peer(node).map_err(|error| error.to_string())?;
                        grpc::connect(&peer).await.map_err(|error| error.to_string())?
                    }
                };
                let request = wire::SettleRequest { requests: statement::pack(&requests) };
                let answer = ExchangeClient::new(channel.clone()).settle(request).await;
                let signed = answer.map_err(|status| status.message().to_owned())?.into_inner();
                Ok((signed, (address, channel)))
            };
            let answer = timeout(ANSWER_MAX, asked).await;
            let answer = answer.unwrap_or_else(|_| Err("it did not answer in time".to_owned()));
            Asked { node: name, requests, answer }
        }
    }
}
