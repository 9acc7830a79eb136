//! Certificates that are renewed, requested and signed with.

use std::time::{Duration, SystemTime};

use entente_proto::identity::Role;

use super::identities::{MINUTE, odd_issued, uris};
use super::{HOUR, a_coordinator, authority, carry, credentials, identity, shake, the_node};
use crate::{
    ALPN_STREAM, Authority, Channel, Credentials, Files, Incoming, Roots, SigningRequest,
    fingerprint, peer_certificate_sha256, verify_signature,
};

/// Whether the two ends get to an agreement with configurations that were made before.
fn meet(client: &Credentials, server: &Credentials) -> Result<(), String> {
    let dialled = client.client(the_node(), &[ALPN_STREAM]).unwrap();
    let asked = server.server(a_coordinator(), &[ALPN_STREAM]).unwrap();
    match shake(dialled, asked) {
        (Ok(_), Ok(_)) => Ok(()),
        (client, server) => Err(client.err().or(server.err()).unwrap().to_string()),
    }
}

#[test]
fn a_renewed_certificate_is_shown_by_configurations_that_were_made_before() {
    let ca = authority();
    let coordinator = credentials(&ca, Role::Coordinator, "fr-coordinator");
    let node = credentials(&ca, Role::Expert, "fr-expert-1");
    let (dialled, asked) = (
        coordinator.client(the_node(), &[ALPN_STREAM]).unwrap(),
        node.server(a_coordinator(), &[ALPN_STREAM]).unwrap(),
    );
    let (first, first_server) = shake(dialled.clone(), asked.clone());
    let (mut first, mut first_server) = (first.unwrap(), first_server.unwrap());
    let before = [coordinator.certificate_sha256(), node.certificate_sha256()];
    for (credentials, role, name) in
        [(&coordinator, Role::Coordinator, "fr-coordinator"), (&node, Role::Expert, "fr-expert-1")]
    {
        let renewed = ca.issue(&identity(role, name), HOUR).unwrap();
        credentials.replace(&renewed.certificate_pem, &renewed.key_pem).unwrap();
    }
    let after = [coordinator.certificate_sha256(), node.certificate_sha256()];
    assert_ne!(before, after);
    let (second, second_server) = shake(dialled, asked);
    let seen = |end: &Channel| peer_certificate_sha256(end.peer_certificates()).unwrap();
    assert_eq!([seen(&second_server.unwrap()), seen(&second.unwrap())], after);
    // Who is connected stays so.
    assert_eq!(seen(&first_server), before[0]);
    let arrived = carry(&mut first, &mut first_server, &mut Incoming::default(), b"rows");
    assert_eq!(arrived, b"rows");
}

#[test]
fn a_replacement_that_would_not_do_changes_nothing() {
    let (ca, stranger) = (authority(), authority());
    let own = identity(Role::Expert, "fr-expert-1");
    let node = credentials(&ca, Role::Expert, "fr-expert-1");
    let (before, good) = (node.certificate_sha256(), ca.issue(&own, HOUR).unwrap());
    let another = ca.issue(&identity(Role::Expert, "fr-expert-2"), HOUR).unwrap();
    let foreign = stranger.issue(&own, HOUR).unwrap();
    let over = odd_issued(&ca, |params| {
        params.subject_alt_names = uris(&[&own.to_string()]);
        params.not_after = (SystemTime::now() - MINUTE).into();
    });
    for (what, certificate, key) in [
        ("another's", &another.certificate_pem[..], &another.key_pem[..]),
        ("a stranger's", &foreign.certificate_pem, &foreign.key_pem),
        ("expired", &over.certificate_pem, &over.key_pem),
        ("with a key that is not its own", &good.certificate_pem, &another.key_pem),
        ("none", "", &good.key_pem),
        ("without a key", &good.certificate_pem, ""),
        (
            "rubbish",
            "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
            &good.key_pem,
        ),
    ] {
        assert!(node.replace(certificate, key).is_err(), "a certificate {what} was taken");
        assert_eq!(node.certificate_sha256(), before, "{what}");
    }
    assert!(node.replace_roots(stranger.roots().unwrap()).is_err());
    meet(&credentials(&ca, Role::Coordinator, "fr-coordinator"), &node).unwrap();
}

#[test]
fn a_region_goes_from_one_ca_to_the_next_without_a_moment_in_which_nobody_is_believed() {
    let (old, new) = (authority(), authority());
    let both =
        || Roots::from_pem([old.certificate_pem(), new.certificate_pem()].concat().as_bytes());
    let coordinator = credentials(&old, Role::Coordinator, "fr-coordinator");
    let node = credentials(&old, Role::Expert, "fr-expert-1");
    let renew = |credentials: &Credentials| {
        let issued = new.issue(credentials.identity(), HOUR).unwrap();
        credentials.replace(&issued.certificate_pem, &issued.key_pem).unwrap();
    };
    // First everybody believes both, then everybody is renewed, then the old one goes.
    let steps: [&dyn Fn(); 6] = [
        &|| coordinator.replace_roots(both().unwrap()).unwrap(),
        &|| node.replace_roots(both().unwrap()).unwrap(),
        &|| renew(&coordinator),
        &|| renew(&node),
        &|| coordinator.replace_roots(new.roots().unwrap()).unwrap(),
        &|| node.replace_roots(new.roots().unwrap()).unwrap(),
    ];
    for (step, act) in steps.into_iter().enumerate() {
        act();
        meet(&coordinator, &node).unwrap_or_else(|error| panic!("after step {step}: {error}"));
    }
    assert!(meet(&credentials(&old, Role::Coordinator, "fr-coordinator"), &node).is_err());
}

#[test]
fn files_are_read_again_and_a_bad_one_leaves_the_last_good_state() {
    let (dir, ca) = (tempfile::tempdir().unwrap(), authority());
    let own = identity(Role::Expert, "fr-expert-1");
    let path = |name: &str| dir.path().join(name);
    let files = Files { ca: path("ca.pem"), certificate: path("own.pem"), key: path("own.key") };
    let write = |issued: &crate::Issued| {
        std::fs::write(&files.ca, ca.certificate_pem()).unwrap();
        std::fs::write(&files.certificate, &issued.certificate_pem).unwrap();
        std::fs::write(&files.key, &issued.key_pem).unwrap();
    };
    write(&ca.issue(&own, HOUR).unwrap());
    let credentials = Credentials::load(&files).unwrap();
    let first = credentials.certificate_sha256();
    write(&ca.issue(&own, HOUR).unwrap());
    credentials.reload(&files).unwrap();
    let second = credentials.certificate_sha256();
    assert_ne!(first, second);
    std::fs::write(&files.key, "half a key").unwrap();
    let error = credentials.reload(&files).unwrap_err().to_string();
    assert!(error.contains("own.key"), "{error}");
    assert_eq!(credentials.certificate_sha256(), second);
}

#[test]
fn a_request_gives_its_key_and_nothing_else_to_the_certificate() {
    let (ca, own) = (authority(), identity(Role::Expert, "fr-expert-1"));
    let key = rcgen::KeyPair::generate().unwrap();
    // It asks to be an operator, and a CA.
    let mut params = rcgen::CertificateParams::default();
    let operator = identity(Role::Operator, "operator").to_string();
    params.subject_alt_names = vec![rcgen::SanType::URI(operator.as_str().try_into().unwrap())];
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    params.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign];
    let csr = params.serialize_request(&key).unwrap();
    let chain = ca.sign_request(csr.der(), &own, HOUR).unwrap();
    let credentials = Credentials::new(ca.roots().unwrap(), &chain, &key.serialize_pem()).unwrap();
    assert_eq!(*credentials.identity(), own);
}

#[test]
fn a_request_that_its_key_has_not_signed_is_refused() {
    let (ca, own) = (authority(), identity(Role::Expert, "fr-expert-1"));
    let request = SigningRequest::new().unwrap();
    let mut changed = request.csr_der.clone();
    *changed.last_mut().unwrap() ^= 1;
    for csr in [&changed[..], &request.csr_der[1..], b""] {
        assert!(ca.sign_request(csr, &own, HOUR).is_err());
    }
    let chain = ca.sign_request(&request.csr_der, &own, HOUR).unwrap();
    Credentials::new(ca.roots().unwrap(), &chain, &request.key_pem).unwrap();
}

#[test]
fn a_ca_is_the_same_after_it_was_written_and_read() {
    let (ca, other) = (authority(), authority());
    let again = Authority::from_pem(ca.certificate_pem(), &ca.key_pem()).unwrap();
    let issued = again.issue(&identity(Role::Expert, "fr-expert-1"), HOUR).unwrap();
    assert_eq!(again.domain(), ca.domain());
    ca.credentials(&issued).unwrap();
    assert!(Authority::from_pem(ca.certificate_pem(), &other.key_pem()).is_err());
    assert!(Authority::from_pem(&issued.certificate_pem, &issued.key_pem).is_err());
}

#[test]
fn half_of_a_life_is_over_before_its_end_and_not_before_it_begins() {
    let (ca, now) = (authority(), SystemTime::now());
    let issued = ca.issue(&identity(Role::Expert, "a"), Duration::from_secs(30)).unwrap();
    let credentials = ca.credentials(&issued).unwrap();
    let half = credentials.half_life().duration_since(now).unwrap().as_secs();
    assert!((10..=15).contains(&half), "after {half} s of 30");
}

#[test]
fn a_signature_holds_for_its_key_its_message_and_its_purpose_only() {
    let ca = authority();
    let node = credentials(&ca, Role::Expert, "fr-expert-1");
    let other = credentials(&ca, Role::Expert, "fr-expert-2");
    let signed = node.sign("a statement", b"17 rows").unwrap();
    let certificate = &signed.certificate_der;
    let check = |certificate: &[u8], context, message: &[u8], signature: &[u8]| {
        verify_signature(certificate, context, message, signature).is_ok()
    };
    assert_eq!(fingerprint(certificate), node.certificate_sha256());
    assert!(check(certificate, "a statement", b"17 rows", &signed.signature));
    assert!(!check(certificate, "a statement", b"18 rows", &signed.signature));
    assert!(!check(certificate, "a receipt", b"17 rows", &signed.signature));
    assert!(!check(certificate, "a statement", b"17 rows", &signed.signature[1..]));
    let others = other.sign("a statement", b"17 rows").unwrap();
    assert!(!check(certificate, "a statement", b"17 rows", &others.signature));
    assert!(!check(b"no certificate", "a statement", b"17 rows", &signed.signature));
}
