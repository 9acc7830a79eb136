//! Makes CAs and the certificates of processes: for `entente up` and for tests.

use std::time::{Duration, SystemTime};

use entente_proto::identity::Identity;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose, SanType,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use crate::{Credentials, Error};

/// Clocks of machines differ; a certificate is valid from so long ago.
const CLOCK_SKEW: Duration = Duration::from_secs(300);

/// A CA whose key lives in this process's memory only.
pub struct Authority(CertifiedIssuer<'static, KeyPair>);

/// A certificate and its key.
pub struct Issued {
    /// The certificate, as PEM.
    pub certificate_pem: String,
    /// Its key, as PEM. Whoever has it is the process.
    pub key_pem: String,
    certificate: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
}

#[cfg(test)]
impl Issued {
    pub(crate) fn with_key_of(self, other: Self) -> Self {
        Self { key_pem: other.key_pem, key: other.key, ..self }
    }
}

impl Authority {
    /// A new CA, valid from now on for so long.
    pub fn new(cluster: &str, valid: Duration) -> Result<Self, Error> {
        let mut params = lasting(SystemTime::now() + valid);
        params.distinguished_name.push(DnType::CommonName, format!("{cluster} CA"));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        Ok(Self(CertifiedIssuer::self_signed(params, KeyPair::generate()?)?))
    }

    /// The CA's certificate, as PEM.
    pub fn certificate_pem(&self) -> String {
        self.0.pem()
    }

    /// A certificate for a process, valid from now on for so long.
    pub fn issue(&self, identity: &Identity, valid: Duration) -> Result<Issued, Error> {
        self.issue_names(&[identity.to_string()], SystemTime::now() + valid)
    }

    /// A certificate with these URI names, right or wrong.
    pub(crate) fn issue_names(&self, uris: &[String], end: SystemTime) -> Result<Issued, Error> {
        let mut params = lasting(end);
        let uri = |uri: &String| Ok(SanType::URI(uri.as_str().try_into()?));
        params.subject_alt_names = uris.iter().map(uri).collect::<Result<_, rcgen::Error>>()?;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &*self.0)?;
        Ok(Issued {
            certificate_pem: certificate.pem(),
            key_pem: key.serialize_pem(),
            certificate: certificate.der().clone(),
            key: PrivateKeyDer::Pkcs8(key.serialize_der().into()),
        })
    }

    /// What a process with this certificate would load, for tests and benches in one process.
    pub fn credentials(&self, issued: Issued) -> Result<Credentials, Error> {
        Credentials::new(vec![self.0.der().clone()], vec![issued.certificate], issued.key)
    }
}

fn lasting(end: SystemTime) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.not_before = (SystemTime::now() - CLOCK_SKEW).into();
    params.not_after = end.into();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params
}
