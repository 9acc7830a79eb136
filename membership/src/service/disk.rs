//! What a voter starts from: its disk, the founding of its cluster, or nothing but a number.

use std::path::{Path, PathBuf};
use std::time::Duration;

use entente_proto::identity;
use entente_proto::ids::NodeName;
use entente_proto::wire;
use entente_proto::wire::membership_client::MembershipClient;
use entente_tls::Credentials;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::{Config, ServiceError};
use crate::client::{Client, ClientError};
use crate::log::Durable;
use crate::net::Dialler;
use crate::roster::Roster;
use crate::state::codec::STATE_LEN_MAX;
use crate::state::{
    Applied, Command, Expect, NodeSpec, Refused, RefusedCode, Role, State, VoterId,
};
use crate::store::{Identity, RedbStore, StoreError};
use crate::voter::{ClusterId, genesis};

/// The file in the data directory.
const FILE: &str = "membership.redb";
/// How long another voter may take to say what it knows.
const ASK_MAX: Duration = Duration::from_millis(500);
/// How long one attempt to join may take; it is repeated.
const JOIN_MAX: Duration = Duration::from_secs(10);

/// Who starts.
pub(super) struct Own<'a> {
    pub(super) name: &'a NodeName,
    pub(super) credentials: &'a Credentials,
    pub(super) address: &'a str,
}

/// What it starts from.
pub(super) struct Disk {
    pub(super) store: RedbStore,
    pub(super) identity: Identity,
    pub(super) durable: Durable,
    /// Where voters are as long as nothing better is known.
    pub(super) beginning: State,
}

pub(super) async fn open(
    config: &Config,
    roster: &Roster,
    own: &Own<'_>,
    client: &Client,
) -> Result<Disk, ServiceError> {
    own.check(roster)?;
    let beginning = State::genesis(roster.specs()).map_err(ServiceError::Genesis)?;
    let (cluster, founding) = genesis(roster.specs()).map_err(ServiceError::Genesis)?;
    let file = prepare(&config.data_dir)?;
    // Short as they are, these block; nothing else runs yet that would mind.
    let (store, identity, durable, beginning) = match RedbStore::open(&file) {
        Ok((store, identity, durable)) => (store, identity, durable, beginning),
        Err(StoreError::NotCreated) if config.join => {
            let (voter, known) = join(own, client).await?;
            let identity = Identity { cluster, voter: voter.0 };
            let nothing = Durable::default();
            (RedbStore::create(&file, identity, &nothing)?, identity, nothing, known)
        }
        Err(StoreError::NotCreated) => {
            let identity = Identity { cluster, voter: founder(&beginning, own.name)?.0 };
            expect_first_start(config, roster, own).await?;
            (RedbStore::create(&file, identity, &founding)?, identity, founding, beginning)
        }
        Err(error) => return Err(error.into()),
    };
    let disk = Disk { store, identity, durable, beginning };
    disk.check(own.name, cluster)?;
    Ok(disk)
}

fn prepare(data_dir: &Path) -> Result<PathBuf, ServiceError> {
    std::fs::create_dir_all(data_dir)
        .map_err(|error| ServiceError::Disk(format!("{}: {error}", data_dir.display())))?;
    Ok(data_dir.join(FILE))
}

impl Own<'_> {
    fn check(&self, roster: &Roster) -> Result<(), ServiceError> {
        let identity = self.credentials.identity();
        let roles = [identity::Role::Coordinator, identity::Role::Witness];
        let member = Some((identity.region, self.name.clone()));
        let mut expected = roster.expect(identity::Role::Coordinator, member);
        expected.roles = roles.to_vec();
        Ok(self.credentials.belong_to(&expected)?)
    }

    fn spec(&self) -> NodeSpec {
        let identity = self.credentials.identity();
        NodeSpec {
            name: self.name.clone(),
            region: identity.region,
            site: String::new(),
            role: match identity.role {
                identity::Role::Witness => Role::Witness,
                _ => Role::Coordinator,
            },
            address: self.address.to_owned(),
            memory_bytes: None,
            kernel_class: String::new(),
            device: None,
        }
    }
}

impl Disk {
    /// A disk that was put into another machine would vote twice.
    fn check(&self, name: &NodeName, cluster: ClusterId) -> Result<(), ServiceError> {
        if self.identity.cluster != cluster {
            tracing::warn!(
                "cluster.voters or cluster.nodes is not what the cluster was founded with"
            );
        }
        let snapshot = &self.durable.snapshot;
        if snapshot.index == 0 {
            return Ok(());
        }
        let unreadable = |error| ServiceError::Disk(format!("its snapshot: {error}"));
        let state = State::unseal(&snapshot.data).map_err(unreadable)?;
        let owner = super::shared::voter_spec(&state, self.identity.voter);
        match owner {
            Some(spec) if spec.name != *name => Err(ServiceError::Disk(format!(
                "it holds the log of voter {}, which is {}, not {name}",
                self.identity.voter, spec.name
            ))),
            _ => Ok(()),
        }
    }
}

fn founder(genesis: &State, name: &NodeName) -> Result<VoterId, ServiceError> {
    let node = genesis.node(name).map(|node| node.id);
    let voter = genesis.voters().find(|(_, voter)| Some(voter.node) == node);
    voter.map(|(id, _)| id).ok_or_else(|| {
        let text = format!(
            "there is no log in it, and {name} is none of cluster.voters; \
             with membership.join = true it asks to join"
        );
        ServiceError::Disk(text)
    })
}

/// A founder without a log has never voted, or has lost its disk. In the second case it must not
/// begin again under its number, as it would vote again where it has voted. The others know: it has
/// registered. Where none of them can be asked there is nothing to go by but the disk.
async fn expect_first_start(
    config: &Config,
    roster: &Roster,
    own: &Own<'_>,
) -> Result<(), ServiceError> {
    let dialler = Dialler::new(own.credentials, None)?.through(config.via.clone());
    let mut asked = JoinSet::new();
    for voter in roster.voters().iter().filter(|voter| voter.name != *own.name) {
        let (dialler, address) = (dialler.clone(), voter.address.clone());
        asked.spawn(timeout(ASK_MAX, async move { latest_state(&dialler, &address).await }));
    }
    while let Some(answer) = asked.join_next().await {
        let Ok(Ok(Some(state))) = answer else { continue };
        if state.node(own.name).is_some_and(|node| node.incarnation.is_some()) {
            return Err(ServiceError::Disk(format!(
                "there is no log in it, but {} has been in the cluster before; if its disk is \
                 lost, remove it from the raft group and start it with membership.join = true",
                own.name
            )));
        }
    }
    Ok(())
}

async fn latest_state(dialler: &Dialler, address: &str) -> Option<State> {
    let mut client = MembershipClient::new(dialler.dial(address).await.ok()?)
        .max_decoding_message_size(STATE_LEN_MAX + (1 << 16));
    let updates = client.watch(wire::WatchRequest { after_index: 0 }).await.ok()?;
    let update = updates.into_inner().message().await.ok()??;
    State::open(update.state?).ok()
}

/// Becomes a member, and gets a number for the empty disk. The number is minted anew each time that
/// there is no log: a disk that was lost has forgotten its votes.
async fn join(own: &Own<'_>, client: &Client) -> Result<(VoterId, State), ServiceError> {
    let mut states = client.watch();
    loop {
        match try_join(own, client).await {
            Ok(voter) => {
                // The watch has begun long before; at its first state the leader is among those known.
                let state = states.wait_for(Option::is_some).await;
                let state = state.ok().and_then(|state| state.clone());
                let state = state.ok_or(ServiceError::Ended("watch"))?;
                return Ok((voter, State::clone(&state)));
            }
            Err(ClientError::Deadline(reason) | ClientError::Unknown(reason)) => {
                tracing::warn!(%reason, "not joined yet");
            }
            Err(error) => return Err(ServiceError::Refused(error)),
        }
    }
}

async fn try_join(own: &Own<'_>, client: &Client) -> Result<VoterId, ClientError> {
    let mut states = client.watch();
    let name = own.name;
    let add = Command::AddNode(own.spec());
    let node = match client.propose(JOIN_MAX, Expect::default(), add).await {
        Ok(Applied::Added(node)) => node,
        Err(ClientError::Refused(Refused { code: RefusedCode::NameTaken, .. })) => {
            let known = states
                .wait_for(|state| state.as_ref().is_some_and(|state| state.node(name).is_some()));
            let known = timeout(JOIN_MAX, known).await;
            let known = known.ok().and_then(Result::ok).and_then(|state| state.clone());
            let node = known.and_then(|state| state.node(name).map(|node| node.id));
            node.ok_or_else(|| ClientError::Deadline("no state that knows this node".to_owned()))?
        }
        Ok(_) => return Err(ClientError::Unknown("another outcome than a node's number".into())),
        Err(error) => return Err(error),
    };
    let mint = Command::MintVoter(node);
    match client.propose(JOIN_MAX, Expect::default(), mint).await? {
        Applied::Voter(voter) => Ok(voter),
        _ => Err(ClientError::Unknown("another outcome than a voter's number".into())),
    }
}
