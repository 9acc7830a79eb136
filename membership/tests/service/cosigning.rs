//! A witness cosigns what is committed of a coordinator's own log, and no second history of it.

use entente_audit::checkpoint::Checkpoint;
use entente_audit::cosign::{self, CosignerKey};
use entente_audit::merkle::{self, Hash, Tree};
use entente_audit::note::Signer;
use entente_audit::tile::Edges;
use entente_membership::checkpoint::Committed;
use entente_membership::net::Dialler;
use entente_membership::state::{Command, Expect, RecordKind};
use entente_proto::identity::Role;
use entente_proto::wire;
use entente_proto::wire::admin_client::AdminClient;
use entente_proto::wire::cosign_reply::Answer;
use entente_proto::wire::witness_client::WitnessClient;
use tonic::{Code, Status};

use crate::world::{LONG, World};

const COORDINATOR: &str = "voter-0";
const WITNESS: usize = 2;

fn signer(seed: u8) -> Signer {
    Signer::from_seed(&format!("demo/audit/{COORDINATOR}"), [seed; 32]).unwrap()
}

/// A checkpoint over one byte a record, with `path` as its proof.
fn checkpoint(signer: &Signer, records: &[u8], path: Vec<Hash>) -> Committed {
    let mut edges = Edges::default();
    records.iter().for_each(|record| drop(edges.push(merkle::leaf_hash(&[*record]))));
    let tree: Tree = edges.tree();
    let checkpoint = Checkpoint::sign(signer, tree).unwrap();
    Committed { key: signer.verifier().clone(), checkpoint, path }
}

fn commit(world: &World, committed: &Committed) {
    let key = Committed::record_key(&COORDINATOR.parse().unwrap(), &committed.key);
    let (kind, value) = (RecordKind::Checkpoint, committed.encode());
    let command = Command::PutRecord { kind, key, value, revision: None };
    let proposed = world.handle(0).propose(LONG, Expect::default(), command);
    world.runtime.block_on(proposed).unwrap();
}

/// `node` has voter `i` cosign.
fn ask(
    world: &World,
    (node, i): (&str, usize),
    asked: &Committed,
    old_size: u64,
) -> Result<wire::CosignReply, Status> {
    let dialler = Dialler::new(&world.credentials(Role::Coordinator, node), None).unwrap();
    let request = wire::CosignRequest { checkpoint: Some(asked.message()), old_size };
    world.runtime.block_on(async {
        let channel = dialler.dial(&world.address(i)).await.unwrap();
        Ok(WitnessClient::new(channel).cosign(request).await?.into_inner())
    })
}

fn refused(reply: Result<wire::CosignReply, Status>) -> String {
    match reply.unwrap().answer {
        Some(Answer::Refused(reason)) => reason,
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_is_committed_is_cosigned_for_its_own_coordinator_and_another_history_is_not() {
    let mut world = World::founded_with(3);
    let folder = tempfile::tempdir().unwrap();
    (0..WITNESS).for_each(|i| world.start(i));
    world.start_cosigning(WITNESS, folder.path());
    let (ours, to) = (signer(1), (COORDINATOR, WITNESS));
    // Of two records the second is what leads from the tree of one to that of two.
    let one = checkpoint(&ours, &[1], Vec::new());
    let two = checkpoint(&ours, &[1, 2], vec![merkle::leaf_hash(&[2])]);
    commit(&world, &one);
    let reply = ask(&world, to, &one, 0).unwrap();
    let key: CosignerKey = reply.key.parse().unwrap();
    let Some(Answer::Cosignature(line)) = reply.answer else { panic!("{:?}", reply.answer) };
    let cosigned = one.checkpoint.with_cosignature(&line, &key).unwrap();
    assert!(cosign::time_s(&cosigned.note, &key).unwrap() > 0);
    commit(&world, &two);
    let reply = ask(&world, to, &two, 0).unwrap();
    assert_eq!(reply.answer, Some(Answer::Size(1)), "the proof has to begin there");
    let reply = ask(&world, to, &two, 1).unwrap();
    assert!(matches!(reply.answer, Some(Answer::Cosignature(_))), "{:?}", reply.answer);

    // Another root than the committed one; and a log begun anew under another key, which the voters
    // take, as they know a log by its key too.
    let fork = checkpoint(&ours, &[1, 3], vec![merkle::leaf_hash(&[3])]);
    assert!(refused(ask(&world, to, &fork, 1)).contains("agreed on another root"));
    let anew = checkpoint(&signer(2), &[3], Vec::new());
    commit(&world, &anew);
    assert!(refused(ask(&world, to, &anew, 0)).contains("goes back from 2 records"));
    let status = world.runtime.block_on(async {
        let dialler = Dialler::new(&world.credentials(Role::Operator, "op"), None).unwrap();
        let channel = dialler.dial(&world.address(WITNESS)).await.unwrap();
        AdminClient::new(channel).status(wire::StatusRequest {}).await.unwrap().into_inner()
    });
    assert_eq!(status.cosign_refused, Some(2));

    let status = ask(&world, ("voter-1", WITNESS), &two, 2).unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied, "it is not its log: {status}");
    let status = ask(&world, (COORDINATOR, 1), &two, 2).unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition, "it is no witness: {status}");
}
