//! Certificates that are right, and one for each way to be wrong.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use entente_proto::identity::Identity;
use entente_tls::Authority;
use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls::SignatureScheme;
use rustls::client::ResolvesClientCert;
use rustls::pki_types::PrivateKeyDer;
use rustls::sign::CertifiedKey;

use crate::cluster::Cluster;

/// What a process shows.
#[derive(Debug, Clone, Copy)]
pub enum Shown {
    /// What its region's CA has signed.
    Good,
    Nothing,
    OfAnotherAuthority,
    Expired,
    WithoutName,
    WithTwoNames,
    /// Its own region's CA has not signed it, another one that is believed has.
    OfAnotherRegion,
    ThatSignsOthers,
}

impl Shown {
    pub const BAD: [Self; 7] = [
        Self::Nothing,
        Self::OfAnotherAuthority,
        Self::Expired,
        Self::WithoutName,
        Self::WithTwoNames,
        Self::OfAnotherRegion,
        Self::ThatSignsOthers,
    ];

    pub fn of(self, cluster: &Cluster, process: &Identity) -> Arc<dyn ResolvesClientCert> {
        let own = &cluster.authorities[process.region.as_str()];
        let name = process.to_string();
        let key = match self {
            Self::Good => key(own, &[&name], |_| {}),
            Self::Nothing => return Arc::new(Presented(None)),
            Self::OfAnotherAuthority => key(&cluster.stranger, &[&name], |_| {}),
            Self::Expired => key(own, &[&name], |params| {
                params.not_after = (SystemTime::now() - Duration::from_secs(60)).into();
            }),
            Self::WithoutName => key(own, &[], |_| {}),
            Self::WithTwoNames => key(own, &[&name, "https://example.com/"], |_| {}),
            Self::OfAnotherRegion => key(&cluster.authorities["se"], &[&name], |_| {}),
            Self::ThatSignsOthers => key(own, &[&name], |params| {
                params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
                params.key_usages.push(KeyUsagePurpose::KeyCertSign);
            }),
        };
        Arc::new(Presented(Some(Arc::new(key))))
    }
}

/// Shows it to whoever asks, and does not look at it.
#[derive(Debug)]
struct Presented(Option<Arc<CertifiedKey>>);

impl ResolvesClientCert for Presented {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.0.clone()
    }

    fn has_certs(&self) -> bool {
        self.0.is_some()
    }
}

fn key(
    authority: &Authority,
    names: &[&str],
    change: impl FnOnce(&mut CertificateParams),
) -> CertifiedKey {
    let authority_key = KeyPair::from_pem(&authority.key_pem()).unwrap();
    let issuer = Issuer::from_ca_cert_pem(authority.certificate_pem(), authority_key).unwrap();
    let mut params = CertificateParams::default();
    params.not_before = (SystemTime::now() - Duration::from_secs(120)).into();
    params.not_after = (SystemTime::now() + Duration::from_secs(3_600)).into();
    params.subject_alt_names =
        names.iter().map(|name| SanType::URI((*name).try_into().unwrap())).collect();
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    change(&mut params);
    let key = KeyPair::generate().unwrap();
    let certificate = params.signed_by(&key, &issuer).unwrap().der().clone();
    let key = PrivateKeyDer::Pkcs8(key.serialize_der().into());
    let provider = rustls::crypto::aws_lc_rs::default_provider();
    CertifiedKey::from_der(vec![certificate], key, &provider).unwrap()
}
