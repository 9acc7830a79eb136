//! Who gets a certificate, who keeps one, and how a voter comes in by itself.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use entente_membership::client::Client;
use entente_membership::enrolment::{JoinError, Joined, join, renew, renew_on_use, write_private};
use entente_membership::net::dial_to_join;
use entente_membership::service::{CaConfig, Config};
use entente_membership::state::codec::sha256;
use entente_membership::state::{self, Expect};
use entente_membership::token::{SECRET_LEN, Text, Token, put};
use entente_proto::identity::{Identity, Role};
use entente_proto::wire;
use entente_proto::wire::admin_client::AdminClient;
use entente_proto::wire::enrolment_client::EnrolmentClient;
use entente_tls::{Credentials, Files, Roots};
use tonic::Code;

use crate::world::{LONG, World, name};

const SECRET: [u8; SECRET_LEN] = [9; SECRET_LEN];

/// Three voters, of whom the second holds the CA.
fn world() -> World {
    let mut world = World::founded_with(3);
    for i in 0..3 {
        let node = format!("voter-{i}");
        let config = world.config(&world.address(i), &node);
        let ca = (i == 1).then(|| with_ca(&world, &config));
        world.start_as(i, Config { ca, ..config });
    }
    world.leader();
    world
}

fn with_ca(world: &World, config: &Config) -> CaConfig {
    let dir = config.data_dir.with_extension("ca");
    std::fs::create_dir_all(&dir).unwrap();
    write_private(&dir.join("fr.pem"), world.authority.certificate_pem()).unwrap();
    write_private(&dir.join("fr.key"), &world.authority.key_pem()).unwrap();
    CaConfig::new(dir)
}

/// Writes a token down that is good for so long.
fn token(world: &World, id: &str, life: Duration) -> Text {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap();
    let token = Token {
        secret_sha256: sha256(&SECRET),
        region: "fr".parse().unwrap(),
        role: state::Role::ExpertNode,
        name: None,
        created_ms: ms(now),
        expires_ms: ms(now + life),
    };
    let written = world.operator();
    let written = written.propose(LONG, Expect::default(), put(id, &token));
    world.runtime.block_on(written).unwrap();
    let roots = Roots::from_pem(world.authority.certificate_pem().as_bytes()).unwrap();
    Text {
        id: id.to_owned(),
        secret: SECRET,
        region: token.region,
        role: token.role,
        name: None,
        addresses: (0..2).map(|i| world.address(i)).collect(),
        ca_sha256: roots.certificates().map(|ca| sha256(ca)).collect(),
    }
}

fn joined(world: &World, token: &Text, node: &str) -> Result<Joined, JoinError> {
    world.runtime.block_on(join(token, &name(node)))
}

fn refusal(world: &World, token: &Text, node: &str) -> String {
    let error = joined(world, token, node).unwrap_err();
    assert!(matches!(error, JoinError::Refused(_)), "{error}");
    error.to_string()
}

#[test]
fn a_process_joins_by_its_token_and_nobody_joins_by_it_again() {
    let world = world();
    let token = token(&world, "t", LONG);
    // The first address is that of a coordinator without the CA.
    let joined = joined(&world, &token, "fr-expert-9").unwrap();
    let identity = "spiffe://demo/region/fr/role/expert/node/fr-expert-9";
    assert_eq!(joined.identity.to_string(), identity);
    assert_eq!(joined.roster, world.roster);
    let roots = Roots::from_pem(joined.ca_pem.as_bytes()).unwrap();
    let credentials = Credentials::new(roots, &joined.chain_pem, &joined.key_pem).unwrap();
    let client = Client::new(&credentials, vec![world.address(0)]).unwrap();
    let _inside = world.runtime.enter();
    let watched = client.watch();
    world.until("a voter takes it for a member", || watched.borrow().clone());
    assert!(refusal(&world, &token, "fr-expert-8").contains("no such token"));
}

#[test]
fn of_two_who_show_one_token_at_once_one_gets_in() {
    let world = world();
    for round in 0..5 {
        let token = Arc::new(token(&world, &format!("t{round}"), LONG));
        let one = |node: String| {
            let token = token.clone();
            world.runtime.spawn(async move { join(&token, &name(&node)).await.is_ok() })
        };
        let both = [one(format!("a{round}")), one(format!("b{round}"))];
        let in_all = both.map(|one| u8::from(world.runtime.block_on(one).unwrap()));
        assert_eq!(in_all[0] + in_all[1], 1, "round {round}");
    }
}

#[test]
fn another_secret_another_time_and_a_members_name_do_not_get_in() {
    let world = world();
    let token_ok = token(&world, "ok", LONG);
    let wrong = Text { secret: [8; SECRET_LEN], ..token_ok.clone() };
    assert!(refusal(&world, &wrong, "fr-expert-9").contains("no such token"));
    assert!(refusal(&world, &token_ok, "fr-expert-1").contains("is a member already"));
    let late = token(&world, "late", Duration::from_millis(1));
    assert!(refusal(&world, &late, "fr-expert-9").contains("expired"));
    // None of that has used it up.
    joined(&world, &token_ok, "fr-expert-9").unwrap();
}

#[test]
fn a_joiner_believes_nobody_but_a_coordinator_under_the_ca_of_its_token() {
    let world = world();
    let token = token(&world, "t", LONG);
    let other = Text { ca_sha256: vec![[1; 32]], ..token.clone() };
    let error = joined(&world, &other, "fr-expert-9").unwrap_err().to_string();
    assert!(error.contains("UnknownIssuer"), "{error}");
    // A witness does not even speak the protocol.
    let witness = Text { addresses: vec![world.address(2)], ..token.clone() };
    let error = joined(&world, &witness, "fr-expert-9").unwrap_err().to_string();
    assert!(error.contains("no coordinator could do it"), "{error}");
    joined(&world, &token, "fr-expert-9").unwrap();
}

#[test]
fn whoever_has_no_certificate_finds_one_call_and_no_other() {
    let world = world();
    let token = token(&world, "t", LONG);
    let refused = |code: Code| assert_eq!(code, Code::PermissionDenied);
    world.runtime.block_on(async {
        let channel = dial_to_join(&token.ca_sha256, &world.address(0)).await.unwrap();
        let mut admin = AdminClient::new(channel.clone());
        refused(admin.status(wire::StatusRequest {}).await.unwrap_err().code());
        let mut enrolment = EnrolmentClient::new(channel);
        refused(enrolment.renew(wire::RenewRequest::default()).await.unwrap_err().code());
        refused(enrolment.enlist(wire::EnlistRequest {}).await.unwrap_err().code());
    });
    // And a member has no token to show.
    let channel = world.dial(&world.credentials(Role::Expert, "fr-expert-1"), 0);
    let asked = async { EnrolmentClient::new(channel).join(wire::JoinRequest::default()).await };
    refused(world.runtime.block_on(asked).unwrap_err().code());
}

#[test]
fn a_member_gets_another_certificate_from_whoever_has_its_ca() {
    let world = world();
    let credentials = world.credentials(Role::Expert, "fr-expert-1");
    let before = credentials.certificate_sha256();
    let client = Client::new(&credentials, vec![world.address(0), world.address(1)]).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = |file| dir.path().join(file);
    let files = Files { ca: path("ca.pem"), certificate: path("n.pem"), key: path("n.pem") };
    write_private(&files.ca, world.authority.certificate_pem()).unwrap();
    world.runtime.block_on(renew(&client, &credentials, &files)).unwrap();
    assert_ne!(credentials.certificate_sha256(), before);
    let read = Credentials::load(&files).unwrap();
    assert_eq!(read.certificate_sha256(), credentials.certificate_sha256());
    assert_eq!(read.identity(), credentials.identity());
    // What is dialled now sees the new one, and takes it.
    let channel = world.dial(&credentials, 2);
    let expert_is_no_operator =
        async { AdminClient::new(channel).status(wire::StatusRequest {}).await };
    let refused = world.runtime.block_on(expert_is_no_operator).unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
}

#[test]
fn an_operators_certificate_is_renewed_by_the_first_of_several_uses_after_its_half() {
    let world = world();
    let identity = Identity {
        node: name("alice"),
        ..world.credentials(Role::Operator, "operator").identity().clone()
    };
    // Long enough for a busy machine, as what has expired renews nothing.
    let issued = world.authority.issue(&identity, Duration::from_secs(20)).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = |file| dir.path().join(file);
    let files = Files { ca: path("ca.pem"), certificate: path("a.pem"), key: path("a.key") };
    write_private(&files.ca, world.authority.certificate_pem()).unwrap();
    write_private(&files.certificate, &issued.certificate_pem).unwrap();
    write_private(&files.key, &issued.key_pem).unwrap();
    let used = [(); 3].map(|()| Credentials::load(&files).unwrap());
    let client = Client::new(&used[0], vec![world.address(0), world.address(1)]).unwrap();
    let use_it =
        |own: &Credentials| world.runtime.block_on(renew_on_use(&client, own, &files)).unwrap();
    assert!(!use_it(&used[0]), "there is no need yet");
    let half = used[0].half_life().duration_since(SystemTime::now()).unwrap_or_default();
    std::thread::sleep(half);
    assert_eq!(used.each_ref().map(use_it), [true, false, false]);
    let read = Credentials::load(&files).unwrap();
    assert_eq!(*read.identity(), identity);
    // The CA of this test does not last for an operator's 30 days.
    assert!(read.half_life() > used[1].expires());
}

#[test]
fn a_witness_that_joins_gets_its_vote_without_being_told_twice() {
    let mut world = World::of(3);
    world.leader();
    let joiner = world.start_joiner("voter-new");
    world.until("it votes", || {
        let status = world.handle(joiner).status().borrow().clone();
        status.group.voters.contains(&status.id).then_some(())
    });
}

#[test]
fn a_voter_whose_lost_disk_still_counts_waits_until_it_is_taken_out() {
    let mut world = World::of(3);
    let lost = (world.leader() + 1) % 3;
    world.everywhere("all voters are registered", |state| {
        state.nodes().filter(|n| n.spec.role.votes()).all(|n| n.incarnation.is_some())
    });
    world.kill(lost);
    let config = world.config(&world.address(lost), &format!("voter-{lost}"));
    std::fs::remove_dir_all(&config.data_dir).unwrap();
    world.start_as(lost, Config { join: true, ..config });
    let voter = world.roster.voters()[lost].clone();
    let role = if lost < 2 { Role::Coordinator } else { Role::Witness };
    let own = world.client(role, voter.name.as_str(), vec![world.address(world_leader(&world))]);
    let asked = own.leader(LONG, |channel| async move {
        EnrolmentClient::new(channel).enlist(wire::EnlistRequest {}).await
    });
    let refused = world.runtime.block_on(asked).unwrap_err().to_string();
    assert!(refused.contains("has lost its disk"), "{refused}");
    let change = wire::ChangeGroupRequest {
        change: Some(wire::change_group_request::Change::Remove(voter.name.to_string())),
    };
    let removed = world.operator();
    let removed = removed.leader(LONG, |channel| {
        let change = change.clone();
        async move { AdminClient::new(channel).change_group(change).await }
    });
    world.runtime.block_on(removed).unwrap();
    world.until("it votes again, under another number", || {
        let status = world.handle(lost).status().borrow().clone();
        status.group.voters.contains(&4).then_some(())
    });
}

/// Whoever leads among those who know it; a voter without a log knows nobody.
fn world_leader(world: &World) -> usize {
    world.until("somebody leads", || {
        world.ids().find(|i| world.handle(*i).status().borrow().is_leader)
    })
}
