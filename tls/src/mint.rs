//! Makes CAs and the certificates of processes, and signs what processes ask to have signed.
//!
//! A CA speaks for one region of one cluster, and whatever it is asked for, it issues nothing that
//! is of another, nothing that signs others, and nothing that lasts longer than itself.

use std::time::{Duration, SystemTime};

use entente_proto::identity::{Domain, Identity};
use entente_proto::ids::{NodeName, Region};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, CertifiedIssuer, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PublicKeyData, SanType,
};
use rustls::pki_types::{CertificateDer, CertificateSigningRequestDer};

use crate::certificate::{self, Unfit};
use crate::roots::certificates;
use crate::{Credentials, Error, Roots};

/// Clocks of machines differ; a certificate is valid from so long ago, or from a tenth of its life
/// ago if that is less, so that half of a short life is not over before it begins.
const CLOCK_SKEW_MAX: Duration = Duration::from_secs(300);

/// A CA with its key.
pub struct Authority {
    domain: Domain,
    issuer: Issuer<'static, KeyPair>,
    certificate_pem: String,
    end: SystemTime,
}

/// A certificate and its key.
#[derive(Clone)]
pub struct Issued {
    /// The certificate, as PEM.
    pub certificate_pem: String,
    /// Its key, as PEM. Whoever has it is the process.
    pub key_pem: String,
}

/// A key that was made here, and the request to have it certified.
pub struct SigningRequest {
    /// The request (PKCS #10), as DER. It holds the public key, and names nobody.
    pub csr_der: Vec<u8>,
    /// The key, as PEM. It never leaves the process.
    pub key_pem: String,
}

impl SigningRequest {
    /// A new key.
    ///
    /// # Errors
    /// There is no randomness to be had.
    pub fn new() -> Result<Self, Error> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        let csr_der = params.serialize_request(&key)?.der().to_vec();
        Ok(Self { csr_der, key_pem: key.serialize_pem() })
    }
}

impl Authority {
    /// A new CA of a region, valid from now on for so long.
    ///
    /// # Errors
    /// There is no randomness to be had.
    pub fn new(cluster: &NodeName, region: Region, valid: Duration) -> Result<Self, Error> {
        let domain = Domain { cluster: cluster.clone(), region };
        let mut params = lasting(valid, SystemTime::now() + valid);
        params.distinguished_name.push(DnType::CommonName, format!("{cluster} {region} CA"));
        params.subject_alt_names = vec![uri(&domain.to_string())?];
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let made = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
        Self::from_pem(&made.pem(), &made.key().serialize_pem())
    }

    /// The CA of a certificate and a key, as PEM.
    ///
    /// # Errors
    /// One of them cannot be read, they do not belong together, or it is no CA of a region.
    pub fn from_pem(certificate_pem: &str, key_pem: &str) -> Result<Self, Error> {
        let certificates = certificates(certificate_pem.as_bytes())?;
        let [certificate] = &certificates[..] else {
            return Err(Unfit::Usage("of a CA must be the only one in its file").into());
        };
        let (domain, validity) = certificate::authority(certificate)?;
        let key = KeyPair::from_pem(key_pem)?;
        if !certifies(certificate, &key)? {
            return Err(
                rustls::Error::InconsistentKeys(rustls::InconsistentKeys::KeyMismatch).into()
            );
        }
        Ok(Self {
            domain,
            issuer: Issuer::from_ca_cert_der(certificate, key)?,
            certificate_pem: certificate_pem.to_owned(),
            end: validity.end,
        })
    }

    /// What it speaks for.
    pub fn domain(&self) -> &Domain {
        &self.domain
    }

    /// The CA's certificate, as PEM.
    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// The CA's key, as PEM. Whoever has it can be any process of the region.
    pub fn key_pem(&self) -> String {
        self.issuer.key().serialize_pem()
    }

    /// A certificate and a key for a process, valid from now on for so long.
    ///
    /// # Errors
    /// The process is of another region or cluster.
    pub fn issue(&self, identity: &Identity, valid: Duration) -> Result<Issued, Error> {
        let key = KeyPair::generate()?;
        let certificate_pem = self.certify(&key, identity, valid)?;
        Ok(Issued { certificate_pem, key_pem: key.serialize_pem() })
    }

    /// A certificate for the public key in a request (PKCS #10, DER), valid from now on for so long.
    /// Nothing but the key is taken from the request: who it is for is the caller's to know. The
    /// result is the chain to show, as PEM.
    ///
    /// # Errors
    /// The request cannot be read, was not made by who has the key, or the process is of another
    /// region or cluster.
    pub fn sign_request(
        &self,
        csr_der: &[u8],
        identity: &Identity,
        valid: Duration,
    ) -> Result<String, Error> {
        let request = CertificateSigningRequestDer::from(csr_der);
        let request = CertificateSigningRequestParams::from_der(&request)?;
        self.certify(&request.public_key, identity, valid)
    }

    fn certify(
        &self,
        key: &impl PublicKeyData,
        identity: &Identity,
        valid: Duration,
    ) -> Result<String, Error> {
        if identity.domain() != self.domain {
            return Err(Unfit::NoAuthority(identity.domain()).into());
        }
        let mut params = lasting(valid, self.end.min(SystemTime::now() + valid));
        params.subject_alt_names = vec![uri(&identity.to_string())?];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        Ok(params.signed_by(key, &self.issuer)?.pem())
    }

    /// What believes this CA alone.
    ///
    /// # Errors
    /// None that can be: the certificate was read before.
    pub fn roots(&self) -> Result<Roots, Error> {
        Roots::from_pem(self.certificate_pem.as_bytes())
    }

    /// What a process with this certificate would load if there were only its region.
    ///
    /// # Errors
    /// The certificate is not this CA's.
    pub fn credentials(&self, issued: &Issued) -> Result<Credentials, Error> {
        Credentials::new(self.roots()?, &issued.certificate_pem, &issued.key_pem)
    }
}

fn certifies(certificate: &CertificateDer<'_>, key: &KeyPair) -> Result<bool, Error> {
    let parsed = rustls::server::ParsedCertificate::try_from(certificate)?;
    Ok(*parsed.subject_public_key_info() == *key.subject_public_key_info())
}

fn uri(uri: &str) -> Result<SanType, Error> {
    Ok(SanType::URI(uri.try_into()?))
}

fn lasting(valid: Duration, end: SystemTime) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.not_before = (SystemTime::now() - CLOCK_SKEW_MAX.min(valid / 10)).into();
    params.not_after = end.into();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params
}
