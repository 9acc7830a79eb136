//! A coordinator that hosts its own voter: what it agrees on with the cluster, what it shows, and
//! how it serves through the loss of expert nodes.

// Everything here is a test, which clippy sees in #[test] functions only.
#![allow(clippy::unwrap_used)]

mod keys;
mod setup;

use entente_coordinator::Config;
use entente_coordinator::Error;
use entente_coordinator::config::Transport;
use entente_membership::roster::{Roster, RosterNode};
use entente_membership::served::ServedModel;
use entente_membership::state::{NodeState, State};
use entente_model::Checkpoint;

use setup::*;

/// What the first coordinator writes down.
fn agreed(state: &State) -> bool {
    ServedModel::of(state).is_some() && !state.replicas().is_empty()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_coordinator_writes_down_the_model_and_the_wanted_replicas() {
    let lonely = Lonely::new(2);
    let running = lonely.run("mixtral");
    let state = lonely.committed(agreed).await;
    let digest = Checkpoint::open(&checkpoint("mixtral")).unwrap().digest();
    let model = ServedModel::of(&state).unwrap().unwrap();
    assert_eq!(model.digest, digest);
    assert_eq!(state.replicas(), &[("fr".parse().unwrap(), 2)].into());

    let metrics = running.get("/metrics").await;
    assert!(metrics.contains("\nentente_raft_leader 1\n"), "{metrics}");
    let readyz = running.get("/readyz").await;
    assert!(readyz.starts_with("HTTP/1.1 503") && readyz.contains("expert"), "{readyz}");
    running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_coordinator_with_another_model_than_the_clusters_ends_and_says_so() {
    let lonely = Lonely::new(2);
    let first = lonely.run("mixtral");
    lonely.committed(agreed).await;
    first.stop().await.unwrap();

    let other = lonely.run("mistral-swa");
    let error = tokio::time::timeout(PATIENCE, other.ended).await.unwrap().unwrap().unwrap_err();
    assert!(matches!(error, Error::OtherModel { .. }), "{error}");

    let again = lonely.run("mixtral");
    lonely.committed(agreed).await;
    again.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_voter_lacks_in_its_configuration_is_named() {
    type Spoil = fn(&mut Config);
    let cases: [(&str, Spoil); 4] = [
        ("[membership] is needed", |config| config.membership = None),
        ("[tls] is needed", |config| config.tls = None),
        ("transport: inproc is for", |config| config.transport = Transport::Inproc),
        ("[membership] needs cluster.voters", |config| {
            let (name, region) = ("fr-expert-1".parse().unwrap(), "fr".parse().unwrap());
            let node = RosterNode { name, region, address: "127.0.0.1:1".to_owned() };
            config.cluster = Roster::new("test".to_owned(), 1, vec![node]).unwrap();
        }),
    ];
    for (cause, spoil) in cases {
        let lonely = Lonely::new(2);
        let mut config = lonely.config("mixtral");
        spoil(&mut config);
        let run =
            entente_coordinator::run(config, None, None, |_, _| {}, |_| {}, std::future::pending());
        let error = tokio::time::timeout(PATIENCE, run).await.unwrap().unwrap_err().to_string();
        assert!(error.contains(cause), "{error} does not say {cause}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn experts_of_a_lost_node_are_restored_elsewhere_and_no_request_fails() {
    const REQUESTS: u64 = 6;
    let lonely = Lonely::new(1);
    let coordinator = lonely.run("mixtral");
    let lost = lonely.join("fr-expert-1");
    coordinator.ready().await;
    let (first, second) = ("fr-expert-1".parse().unwrap(), "fr-expert-2".parse().unwrap());
    let _stays = lonely.join("fr-expert-2");
    let is = |state: &State, name, wanted| state.node(name).is_some_and(|n| n.state == wanted);
    lonely.committed(|state| is(state, &second, NodeState::Active)).await;
    let mut undisturbed = Vec::new();
    for number in 0..REQUESTS {
        undisturbed.push(coordinator.complete(number).await);
    }

    let all = futures::future::join_all((0..REQUESTS).map(|number| coordinator.complete(number)));
    let loss = async {
        coordinator.generating().await;
        tokio::task::spawn_blocking(|| drop(lost)).await.unwrap();
    };
    let (disturbed, ()) = tokio::join!(all, loss);
    assert_eq!(disturbed, undisturbed);
    let holds = |state: &State, name| {
        state.node(name).is_some_and(|node| state.placement().nodes().contains(&node.id))
    };
    let state = lonely.committed(|state| !holds(state, &first)).await;
    assert!(is(&state, &first, NodeState::Down) && holds(&state, &second));

    // It joins again, as another start.
    let _back = lonely.join("fr-expert-1");
    lonely.committed(|state| is(state, &first, NodeState::Active)).await;
    assert_eq!(coordinator.complete(0).await, undisturbed[0]);
    coordinator.stop().await.unwrap();
}
