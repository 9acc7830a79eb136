//! Who is taken and who is refused, by either end.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use entente_proto::identity::{Identity, Role};
use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls::pki_types::PrivateKeyDer;
use rustls::pki_types::pem::PemObject;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{ClientConfig, ServerConfig};

use super::{HOUR, a_coordinator, authority, credentials, identity, shake, the_node};
use crate::credentials::provider;
use crate::roots::certificates;
use crate::{ALPN_STREAM, Authority, Credentials, Issued, Roots};

pub(super) const MINUTE: Duration = Duration::from_secs(60);

/// A certificate and its key that no CA of ours would issue.
pub(super) fn odd_issued(ca: &Authority, change: impl FnOnce(&mut CertificateParams)) -> Issued {
    let key = KeyPair::from_pem(&ca.key_pem()).unwrap();
    let issuer = Issuer::from_ca_cert_pem(ca.certificate_pem(), key).unwrap();
    let (mut params, key) = (CertificateParams::default(), KeyPair::generate().unwrap());
    params.not_before = (SystemTime::now() - 2 * MINUTE).into();
    params.not_after = (SystemTime::now() + HOUR).into();
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    change(&mut params);
    let certificate_pem = params.signed_by(&key, &issuer).unwrap().pem();
    Issued { certificate_pem, key_pem: key.serialize_pem() }
}

/// The same, shown without a look at it.
fn odd(ca: &Authority, change: impl FnOnce(&mut CertificateParams)) -> Arc<SingleCertAndKey> {
    let issued = odd_issued(ca, change);
    let chain = certificates(issued.certificate_pem.as_bytes()).unwrap();
    let key = PrivateKeyDer::from_pem_slice(issued.key_pem.as_bytes()).unwrap();
    Arc::new(CertifiedKey::from_der(chain, key, &provider()).unwrap().into())
}

pub(super) fn uris(uris: &[&str]) -> Vec<SanType> {
    uris.iter().map(|uri| SanType::URI((*uri).try_into().unwrap())).collect()
}

/// Everything that can be wrong with the certificate of the process of this identity, and what the
/// other end says of it. `ours` is the CA of fr, `se` that of Sweden, which is believed too.
fn wrong(
    ours: &Authority,
    se: &Authority,
    good: &str,
) -> Vec<(&'static str, Arc<SingleCertAndKey>)> {
    let stranger = authority();
    let named = |params: &mut CertificateParams| params.subject_alt_names = uris(&[good]);
    let but = |change: &dyn Fn(&mut CertificateParams)| {
        odd(ours, |params| {
            named(params);
            change(params);
        })
    };
    let with_names = |names: &[&str]| but(&|params| params.subject_alt_names = uris(names));
    let used_for = |usage: &[KeyUsagePurpose]| but(&|params| params.key_usages = usage.to_vec());
    let purposed = |purposes: &[ExtendedKeyUsagePurpose]| {
        but(&|params| params.extended_key_usages = purposes.to_vec())
    };
    let in_se = good.replace("/fr/", "/se/");
    use ExtendedKeyUsagePurpose::{ClientAuth, CodeSigning, ServerAuth};
    use KeyUsagePurpose::{CrlSign, DigitalSignature, KeyAgreement, KeyCertSign};
    vec![
        ("BadSignature", odd(&stranger, named)),
        ("expired", but(&|params| params.not_after = (SystemTime::now() - MINUTE).into())),
        ("not valid yet", but(&|params| params.not_before = (SystemTime::now() + MINUTE).into())),
        ("has 0 URI names", with_names(&[])),
        ("has 2 URI names", with_names(&[good, good])),
        ("has 2 URI names", with_names(&[good, "https://example.com/"])),
        ("is not spiffe://", with_names(&["https://example.com/"])),
        ("is not spiffe://", with_names(&["spiffe://demo/region/fr"])),
        (
            "valid now speaks for spiffe://demo/region/no",
            with_names(&[&good.replace("/fr/", "/no/")]),
        ),
        ("speaks for spiffe://other/region/fr", with_names(&[&good.replace("//demo", "//other")])),
        // Another region of ours, said by a CA that does not speak for it, both ways.
        ("UnknownIssuer", with_names(&[&in_se])),
        ("UnknownIssuer", odd(se, named)),
        (
            "CaUsedAsEndEntity",
            but(&|params| params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained)),
        ),
        ("may sign certificates", used_for(&[DigitalSignature, KeyCertSign])),
        ("may sign certificates", used_for(&[DigitalSignature, CrlSign])),
        ("may not sign a handshake", used_for(&[KeyAgreement])),
        ("does not say what its key is used for", used_for(&[])),
        ("extended key usage", purposed(&[])),
        ("extended key usage", purposed(&[ServerAuth])),
        ("extended key usage", purposed(&[ServerAuth, CodeSigning])),
        // rustls asks for this one itself.
        ("extended key usage", purposed(&[ClientAuth])),
    ]
}

/// The roots of two regions, and a process of the first that believes both.
fn two_regions(role: Role, node: &str) -> (Authority, Authority, Credentials) {
    let cluster = "demo".parse().unwrap();
    let (ours, se) = (authority(), Authority::new(&cluster, "se".parse().unwrap(), HOUR).unwrap());
    let roots = [ours.certificate_pem(), se.certificate_pem()].concat();
    let issued = ours.issue(&identity(role, node), HOUR).unwrap();
    let roots = Roots::from_pem(roots.as_bytes()).unwrap();
    let own = Credentials::new(roots, &issued.certificate_pem, &issued.key_pem).unwrap();
    (ours, se, own)
}

fn showing_as_server(own: &Credentials, odd: Arc<SingleCertAndKey>) -> Arc<ServerConfig> {
    let mut config = (*own.server(a_coordinator(), &[ALPN_STREAM]).unwrap()).clone();
    config.cert_resolver = odd;
    Arc::new(config)
}

fn showing_as_client(own: &Credentials, odd: Arc<SingleCertAndKey>) -> Arc<ClientConfig> {
    let mut config = (*own.client(the_node(), &[ALPN_STREAM]).unwrap()).clone();
    config.client_auth_cert_resolver = odd;
    Arc::new(config)
}

#[test]
fn a_node_whose_certificate_is_wrong_in_any_way_is_refused() {
    let (ours, se, coordinator) = two_regions(Role::Coordinator, "fr-coordinator");
    let good = identity(Role::Expert, "fr-expert-1").to_string();
    let node = credentials(&ours, Role::Expert, "fr-expert-1");
    for (reason, odd) in wrong(&ours, &se, &good) {
        let dialled = coordinator.client(the_node(), &[ALPN_STREAM]).unwrap();
        let (client, server) = shake(dialled, showing_as_server(&node, odd));
        let error = client.err().expect(reason).to_string();
        assert!(error.contains(reason), "{error} does not say {reason}");
        // The node learns of it too, and does not take the connection for a good one.
        assert!(server.is_err(), "{reason}: the node was not told");
    }
}

#[test]
fn a_coordinator_whose_certificate_is_wrong_in_any_way_is_refused() {
    let (ours, se, node) = two_regions(Role::Expert, "fr-expert-1");
    let good = identity(Role::Coordinator, "fr-coordinator").to_string();
    let coordinator = credentials(&ours, Role::Coordinator, "fr-coordinator");
    for (reason, odd) in wrong(&ours, &se, &good) {
        let asked = node.server(a_coordinator(), &[ALPN_STREAM]).unwrap();
        let (_, server) = shake(showing_as_client(&coordinator, odd), asked);
        let error = server.err().expect(reason).to_string();
        assert!(error.contains(reason), "{error} does not say {reason}");
    }
}

#[test]
fn a_node_that_is_not_the_one_that_was_dialled_is_refused() {
    let (ours, se, coordinator) = two_regions(Role::Coordinator, "fr-coordinator");
    let good = identity(Role::Expert, "fr-expert-1").to_string();
    let node = credentials(&ours, Role::Expert, "fr-expert-1");
    for (ca, from, to) in [
        (&ours, "fr-expert-1", "fr-expert-2"),
        (&ours, "role/expert", "role/coordinator"),
        (&ours, "role/expert", "role/operator"),
        (&se, "/fr/", "/se/"),
    ] {
        let odd = odd(ca, |params| params.subject_alt_names = uris(&[&good.replace(from, to)]));
        let dialled = coordinator.client(the_node(), &[ALPN_STREAM]).unwrap();
        let (client, server) = shake(dialled, showing_as_server(&node, odd));
        let error = client.err().expect(to).to_string();
        assert!(error.contains("expected was expert fr-expert-1 of demo in fr"), "{error}");
        assert!(server.is_err(), "{to}: the node was not told");
    }
}

#[test]
fn whoever_is_no_coordinator_is_refused_by_a_node() {
    let ours = authority();
    let node = credentials(&ours, Role::Expert, "fr-expert-1");
    for role in [Role::Expert, Role::Witness, Role::Operator] {
        let peer = credentials(&ours, role, "x");
        let asked = node.server(a_coordinator(), &[ALPN_STREAM]).unwrap();
        let (_, server) = shake(peer.client(the_node(), &[ALPN_STREAM]).unwrap(), asked);
        let error = server.err().unwrap().to_string();
        assert!(error.contains("a coordinator of demo"), "{error}");
    }
}

#[test]
fn a_ca_that_has_ended_speaks_for_nobody_although_the_leaf_is_good() {
    let (ca, leaf) = (authority(), identity(Role::Expert, "fr-expert-1"));
    // A leaf of ours never outlives its CA, so one that does has to be made by hand.
    let odd = odd(&ca, |params| {
        params.subject_alt_names = uris(&[&leaf.to_string()]);
        params.not_after = (SystemTime::now() + 9 * HOUR).into();
    });
    let odd = rustls::client::ResolvesClientCert::resolve(&*odd, &[], &[]).unwrap();
    let at = |time| ca.roots().unwrap().identify(&odd.cert[0], &[], time);
    assert_eq!(at(SystemTime::now()).unwrap(), leaf);
    let error = at(SystemTime::now() + 2 * HOUR).unwrap_err().to_string();
    assert!(error.contains("no CA certificate that is valid now"), "{error}");
}

#[test]
fn a_ca_issues_for_its_own_region_only_and_for_no_longer_than_it_lasts() {
    let ca = authority();
    let own = identity(Role::Expert, "fr-expert-1");
    for (from, to) in [("/fr/", "/se/"), ("//demo", "//other")] {
        let other: Identity = own.to_string().replace(from, to).parse().unwrap();
        assert!(ca.issue(&other, HOUR).is_err(), "{other} was certified");
    }
    let credentials = ca.credentials(&ca.issue(&own, 9 * HOUR).unwrap()).unwrap();
    assert!(credentials.expires() <= SystemTime::now() + HOUR);
}

#[test]
fn only_the_cas_of_regions_of_one_cluster_are_roots() {
    let (ca, other) = (authority(), "other".parse().unwrap());
    let leaf = ca.issue(&identity(Role::Expert, "a"), HOUR).unwrap().certificate_pem;
    let other = Authority::new(&other, "fr".parse().unwrap(), HOUR).unwrap();
    let both = [ca.certificate_pem(), other.certificate_pem()].concat();
    for (pem, reason) in
        [("", "no certificates"), (&leaf[..], "is not spiffe"), (&both, "one cluster")]
    {
        let error = Roots::from_pem(pem.as_bytes()).unwrap_err().to_string();
        assert!(error.contains(reason), "{error} does not say {reason}");
    }
    let regions: Vec<_> = ca.roots().unwrap().regions().collect();
    assert_eq!(regions, ["fr".parse().unwrap()]);
}

/// A client with a verifier like ours but with nothing to show, or with old versions only.
fn odd_client(versions: &[&'static rustls::SupportedProtocolVersion]) -> Arc<ClientConfig> {
    let mut config = ClientConfig::builder_with_provider(Arc::new(provider()))
        .with_protocol_versions(versions)
        .unwrap()
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    let verifier = Arc::new(Anyone);
    config.dangerous().set_certificate_verifier(verifier);
    Arc::new(config)
}

/// Believes every server.
#[derive(Debug)]
struct Anyone;

mod anyone {
    use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
    use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
    use rustls::{DigitallySignedStruct, Error, SignatureScheme};

    impl ServerCertVerifier for super::Anyone {
        fn verify_server_cert(
            &self,
            _: &CertificateDer<'_>,
            _: &[CertificateDer<'_>],
            _: &ServerName<'_>,
            _: &[u8],
            _: UnixTime,
        ) -> Result<ServerCertVerified, Error> {
            Ok(ServerCertVerified::assertion())
        }

        fn verify_tls12_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Ok(HandshakeSignatureValid::assertion())
        }

        fn verify_tls13_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Ok(HandshakeSignatureValid::assertion())
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            vec![SignatureScheme::ECDSA_NISTP256_SHA256]
        }
    }
}

#[test]
fn a_peer_without_a_certificate_is_refused() {
    let node = credentials(&authority(), Role::Expert, "fr-expert-1");
    let client = odd_client(&[&rustls::version::TLS13]);
    let (_, server) = shake(client, node.server(a_coordinator(), &[]).unwrap());
    let error = server.err().unwrap().to_string();
    assert!(error.contains("no certificates"), "{error}");
}

#[test]
fn a_peer_that_knows_tls_1_2_only_is_refused() {
    let node = credentials(&authority(), Role::Expert, "fr-expert-1");
    let client = odd_client(&[&rustls::version::TLS12]);
    let (client, server) = shake(client, node.server(a_coordinator(), &[]).unwrap());
    let error = server.err().unwrap().to_string();
    assert!(error.contains("Tls12NotOfferedOrEnabled"), "{error}");
    assert!(client.is_err());
}
