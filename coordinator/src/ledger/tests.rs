//! The ledger with its thread and a folder.

use std::path::Path;

use entente_audit::checkpoint::Checkpoint;
use entente_audit::cosign;
use entente_audit::folder::Folder;
use entente_audit::merkle;
use entente_audit::note::Verifier;
use entente_audit::proof::Proof;
use entente_audit::record::{Coordinator, Digest, Record};
use entente_audit::verify;
use entente_audit::witness::{Answer, Witness};
use entente_proto::ids::{Incarnation, KernelClass};
use entente_proto::statement::STATEMENT_CONTEXT;
use entente_proto::wire;
use entente_tls::Authority;

use super::*;
use crate::engine::origin::Origin;
use crate::engine::output::Finish;
use crate::engine::tally::{How, Tally};

const ORIGIN: &str = "local/audit/fr-coordinator";
const STOP_MAX: Duration = Duration::from_secs(10);
const LIFE: Duration = Duration::from_secs(60);

fn started(dir: &Path) -> Started {
    start(&Config { dir: dir.to_owned() }, ORIGIN).unwrap()
}

fn facts() -> Arc<Facts> {
    let (node, region) = ("fr-coordinator".parse().unwrap(), "fr".parse().unwrap());
    let coordinator = Coordinator { node, region, certificate: None };
    Arc::new(Facts { coordinator, model: Digest([1; 32]), kernel_class: "f32".to_owned() })
}

fn origin(tenant: &str) -> Arc<Origin> {
    let region = "fr".parse().unwrap();
    Arc::new(Origin { tenant: tenant.parse().unwrap(), ..Origin::anonymous(region) })
}

fn closed(origin: &Arc<Origin>) -> Closed {
    let how = How::Finished(Finish::Length);
    let took = Duration::from_millis(1);
    Closed { origin: origin.clone(), tally: Tally::default(), how, took }
}

/// A request of one generation, from its beginning to its end.
fn serve(ledger: &Ledger, origin: &Arc<Origin>) {
    let attempt = ledger.begin(facts()).unwrap();
    attempt.body(b"{}");
    attempt.admitted(origin, None);
    attempt.submitted();
    ledger.closings().send(closed(origin)).unwrap();
}

fn records(dir: &Path) -> Vec<Record> {
    let note = Folder::note(dir).unwrap();
    let key = std::fs::read_to_string(dir.join(entente_audit::keyfile::PUBLIC_KEY)).unwrap();
    let key: Verifier = key.trim().parse().unwrap();
    let size = Checkpoint::open(&note, &key).unwrap().tree.size;
    let view = Folder::new(dir, size);
    view.records().map(|entry| Record::decode(&entry.unwrap().1).unwrap()).collect()
}

async fn found(ledger: &Ledger, id: RequestId, tenant: &TenantName) -> Option<Receipt> {
    // What the engine said may still be on its way.
    for _ in 0..500 {
        if let Some(receipt) = ledger.find(id, tenant.clone()).await {
            return Some(receipt);
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    None
}

#[tokio::test]
async fn a_receipt_proves_its_record_to_its_tenant_and_is_nobody_elses() {
    let dir = tempfile::tempdir().unwrap();
    let Started { ledger, .. } = started(dir.path());
    let (ours, theirs) = (origin("one"), origin("two"));
    serve(&ledger, &ours);
    serve(&ledger, &theirs);
    let receipt = found(&ledger, ours.id, &ours.tenant).await.unwrap();
    found(&ledger, theirs.id, &theirs.tenant).await.unwrap();
    assert_eq!(ledger.find(theirs.id, ours.tenant.clone()).await, None);
    let key: Verifier = ledger.key().parse().unwrap();
    let proof = Proof::parse(&receipt.proof).unwrap();
    proof.check(&receipt.record, &key).unwrap();
    let Ok(Record::Request(record)) = Record::decode(&receipt.record) else { panic!("no request") };
    assert_eq!((record.id, record.decision.as_str()), (ours.id, "served"));
    use sha2::Digest as _;
    let hash: [u8; 32] = sha2::Sha256::digest(b"{}").into();
    assert_eq!(record.body, keys::salted(&receipt.salt, &hash), "who has body and salt can tell");
    ledger.stop(STOP_MAX).await;
}

#[tokio::test]
async fn every_way_in_which_a_request_can_end_leaves_one_record() {
    let dir = tempfile::tempdir().unwrap();
    let Started { ledger, .. } = started(dir.path());
    // Without a key; with one, and refused; admitted, and not taken by the engine; client gone.
    let attempt = ledger.begin(facts()).unwrap();
    attempt.refused(401, "invalid_api_key");
    drop(attempt);
    let attempt = ledger.begin(facts()).unwrap();
    attempt.of(&"one".parse().unwrap());
    attempt.body(b"{}");
    attempt.refused(403, "residency_unsatisfiable");
    drop(attempt);
    let attempt = ledger.begin(facts()).unwrap();
    attempt.admitted(&origin("two"), None);
    attempt.refused(503, "server_busy");
    drop(attempt);
    drop(ledger.begin(facts()).unwrap());
    // One that the process does not wait for.
    let late = origin("late");
    let attempt = ledger.begin(facts()).unwrap();
    attempt.admitted(&late, None);
    attempt.submitted();
    drop(attempt);
    ledger.stop(STOP_MAX).await;
    let said: Vec<(u64, String, bool, bool)> = records(dir.path())
        .into_iter()
        .map(|record| match record {
            Record::Refused(r) => (r.status, r.code, r.tenant.is_some(), r.body.is_some()),
            Record::Request(r) => (200, r.decision, true, true),
            other => panic!("{other:?}"),
        })
        .collect();
    let said: Vec<(u64, &str, bool, bool)> =
        said.iter().map(|(status, code, a, b)| (*status, code.as_str(), *a, *b)).collect();
    let wanted = [
        (401, "invalid_api_key", false, false),
        (403, "residency_unsatisfiable", true, true),
        (503, "server_busy", true, false),
        (499, "client_gone", false, false),
        (200, "cut off", true, true),
    ];
    assert_eq!(said, wanted);
}

#[tokio::test]
async fn a_ledger_goes_on_where_it_was_and_shows_that_it_does() {
    let dir = tempfile::tempdir().unwrap();
    let Started { ledger, ended } = started(dir.path());
    let first = origin("one");
    serve(&ledger, &first);
    found(&ledger, first.id, &first.tenant).await.unwrap();
    ledger.stop(STOP_MAX).await;
    drop(ledger);
    ended.await.unwrap().unwrap();
    let Started { ledger, .. } = started(dir.path());
    let old = ledger.checkpoint().borrow().clone().unwrap();
    assert!(found(&ledger, first.id, &first.tenant).await.is_some(), "found after a restart");
    for _ in 0..300 {
        serve(&ledger, &origin("one"));
    }
    let mut checkpoints = ledger.checkpoint();
    let is_later = |now: &Option<Arc<Checkpoint>>| now.as_ref().is_some_and(|c| c.tree.size == 301);
    let new = checkpoints.wait_for(is_later).await.unwrap().clone().unwrap();
    let path = ledger.consistency(old.tree.size, new.tree.size).await.unwrap();
    assert!(merkle::extends(&path, &old.tree, &new.tree));
    assert_eq!(ledger.consistency(new.tree.size, 1_000).await, None);
    ledger.stop(STOP_MAX).await;
}

/// A statement of `fr-expert-1` about a request, as it is handed over.
fn stated(asked: &str, request: RequestId, rows: u64) -> Stated {
    let authority = Authority::new(&"local".parse().unwrap(), "fr".parse().unwrap(), LIFE).unwrap();
    let uri = "spiffe://local/region/fr/role/expert/node/fr-expert-1";
    let issued = authority.issue(&uri.parse().unwrap(), LIFE).unwrap();
    let own = authority.credentials(&issued).unwrap();
    let said = entente_proto::statement::Statement {
        node: "fr-expert-1".parse().unwrap(),
        region: "fr".parse().unwrap(),
        incarnation: Incarnation(1),
        at_ms: 1,
        rows: vec![(request, rows)],
    };
    let statement = said.encode();
    let signed = own.sign(STATEMENT_CONTEXT, &statement).unwrap();
    let signed = wire::SignedStatement {
        statement,
        signature: signed.signature.into(),
        certificate: signed.certificate_der.into(),
    };
    Stated { node: asked.parse().unwrap(), requests: vec![request], signed }
}

fn kinds(dir: &Path) -> Vec<&'static str> {
    let kind = |record: &Record| match record {
        Record::Request(_) => "request",
        Record::Certificate(_) => "certificate",
        Record::Statement(_) => "statement",
        Record::Admin(_) => "admin",
        Record::Refused(_) => "refused",
    };
    records(dir).iter().map(kind).collect()
}

#[tokio::test]
async fn a_statement_is_written_after_the_records_of_its_requests_with_its_certificate_before_it() {
    let dir = tempfile::tempdir().unwrap();
    let Started { ledger, .. } = started(dir.path());
    let request = origin("one");
    let attempt = ledger.begin(facts()).unwrap();
    attempt.admitted(&request, None);
    attempt.submitted();
    drop(attempt);
    ledger.statements().send(stated("fr-expert-1", request.id, 3)).unwrap();
    // What is signed by another than who was asked says nothing.
    ledger.statements().send(stated("fr-expert-2", request.id, 3)).unwrap();
    // Both are taken before the request ends.
    assert_eq!(ledger.find(request.id, request.tenant.clone()).await, None);
    let touched = crate::engine::tally::Touched {
        node: "fr-expert-1".parse().unwrap(),
        region: "fr".parse().unwrap(),
        incarnation: Incarnation(1),
        certificate_sha256: [5; 32],
        kernel_class: KernelClass::default(),
    };
    let mut end = closed(&request);
    end.tally.touched.insert(touched, 3);
    ledger.closings().send(end).unwrap();
    ledger.stop(STOP_MAX).await;
    assert_eq!(kinds(dir.path()), ["request", "certificate", "statement"]);
    let key: Verifier = ledger.key().parse().unwrap();
    let verified = verify::folder(dir.path(), &key, &notary::ByCertificate).unwrap();
    assert_eq!((verified.statements, verified.silent.len()), (1, 0));
}

#[tokio::test]
async fn a_node_that_says_that_it_computed_more_than_the_record_says_makes_the_log_fail() {
    let dir = tempfile::tempdir().unwrap();
    let Started { ledger, .. } = started(dir.path());
    let request = origin("one");
    serve(&ledger, &request);
    found(&ledger, request.id, &request.tenant).await.unwrap();
    ledger.statements().send(stated("fr-expert-1", request.id, 3)).unwrap();
    ledger.stop(STOP_MAX).await;
    let key: Verifier = ledger.key().parse().unwrap();
    let error = verify::folder(dir.path(), &key, &notary::ByCertificate).unwrap_err().to_string();
    assert!(error.contains(&format!("request {}: fr-expert-1 computed 3", request.id)), "{error}");
}

#[tokio::test]
async fn what_the_control_plane_refuses_or_obeys_is_recorded() {
    let dir = tempfile::tempdir().unwrap();
    let Started { ledger, .. } = started(dir.path());
    ledger.sink().refused(None, "connection", "no certificate");
    let operator = "spiffe://local/region/fr/role/operator/node/anna".parse().unwrap();
    ledger.sink().obeyed(&operator, "/entente.v1.Admin/Drain", "fr-expert-1");
    ledger.stop(STOP_MAX).await;
    let said: Vec<(String, bool)> = records(dir.path())
        .into_iter()
        .map(|record| match record {
            Record::Admin(admin) => (admin.caller, admin.allowed),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(said, [("unknown".to_owned(), false), (operator.to_string(), true)]);
}

#[tokio::test]
async fn requests_are_refused_rather_than_begun_without_a_record() {
    let dir = tempfile::tempdir().unwrap();
    let Started { ledger, ended } = started(dir.path());
    let held: Vec<Attempt> = (0..OPEN_MAX).map(|_| ledger.begin(facts()).unwrap()).collect();
    assert!(ledger.begin(facts()).is_none());
    drop(held);
    ledger.stop(STOP_MAX).await;
    ended.await.unwrap().unwrap();
    assert_eq!(records(dir.path()).len(), OPEN_MAX);
}

#[tokio::test]
async fn a_cosignature_stays_beneath_its_checkpoint_and_in_receipts_and_a_void_one_is_not_shown() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("log");
    let mut witness = Witness::open(&dir.path().join("witness"), "local/witness/w").unwrap();
    let key = witness.verifier().clone();
    let cosigned_at = |note: &str| cosign::time_s(note, &key).ok();
    let (first, second) = (origin("one"), origin("one"));
    let time_in = async |ledger: &Ledger, of: &Arc<Origin>| {
        let receipt = found(ledger, of.id, &of.tenant).await.unwrap();
        cosigned_at(&Proof::parse(&receipt.proof).unwrap().note)
    };
    let Started { ledger, ended } = started(&folder);
    serve(&ledger, &first);
    assert_eq!(time_in(&ledger, &first).await, None);
    let checkpoint = Checkpoint::clone(ledger.checkpoint().borrow().as_ref().unwrap());
    let Answer::Cosigned(line) = witness.cosign(&checkpoint, 0, &[], 7).unwrap() else {
        panic!("the first checkpoint of a log contradicts nothing")
    };
    let void = line.replace("local/witness/w ", "local/witness/v ");
    assert!(ledger.cosigned(checkpoint.clone(), key.clone(), void));
    assert_eq!(time_in(&ledger, &first).await, None);
    assert!(ledger.cosigned(checkpoint, key.clone(), line));
    assert_eq!(time_in(&ledger, &first).await, Some(7));
    assert_eq!(cosigned_at(&Folder::note(&folder).unwrap()), Some(7));
    // A later checkpoint takes nothing from it, nor does a restart.
    serve(&ledger, &second);
    assert_eq!(time_in(&ledger, &second).await, None);
    assert_eq!(cosigned_at(&Folder::note(&folder).unwrap()), None);
    assert_eq!(cosigned_at(&Folder::cosigned_note(&folder).unwrap().unwrap()), Some(7));
    ledger.stop(STOP_MAX).await;
    ended.await.unwrap().unwrap();
    let Started { ledger, .. } = started(&folder);
    assert_eq!(time_in(&ledger, &first).await, Some(7));
    ledger.stop(STOP_MAX).await;
}
