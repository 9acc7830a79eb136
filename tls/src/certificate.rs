//! What one certificate says, and whether it is of the kind that it should be.
//!
//! Path validation alone leaves open what a certificate may be used for: RFC 5280 lets a leaf carry
//! any names, and one that may sign others is still a good leaf. The rules here are those of
//! X.509-SVID (SPIFFE): a process's certificate has one identity and signs handshakes, a CA's
//! certificate names the region that it speaks for and signs certificates, and none is both.
//!
//! What it does not know: who signed it, and what time it is.

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, SystemTime};

use entente_proto::identity::{Domain, Identity, InvalidDomain, InvalidIdentity};
use rustls::pki_types::CertificateDer;
use sha2::{Digest, Sha256};
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;

/// Why a certificate is not what it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unfit {
    /// Its encoding.
    #[error("the certificate cannot be read: {0}")]
    Encoding(String),
    /// None or several.
    #[error("the certificate has {0} URI names, exactly one is needed")]
    Count(usize),
    /// One that is no identity of ours.
    #[error("the certificate's URI name {0}")]
    Identity(#[from] InvalidIdentity),
    /// One that is no region of ours.
    #[error("the CA certificate's URI name {0}")]
    Domain(#[from] InvalidDomain),
    /// A leaf that is more than one, or a CA that is none.
    #[error("the certificate {0}")]
    Usage(&'static str),
    /// There is no CA for its region, or none at this time.
    #[error("no CA certificate that is valid now speaks for {0}")]
    NoAuthority(Domain),
    /// A CA of another cluster beside ours.
    #[error("CA certificates of {0} and of {1} are in one file, one cluster is needed")]
    Clusters(Domain, Domain),
}

/// From when until when a certificate may be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Validity {
    pub(crate) start: SystemTime,
    pub(crate) end: SystemTime,
}

impl Validity {
    pub(crate) fn contains(&self, now: SystemTime) -> bool {
        (self.start..=self.end).contains(&now)
    }
}

/// SHA-256 of a certificate's DER: the shortest way to name exactly this one.
pub fn fingerprint(certificate_der: &[u8]) -> [u8; 32] {
    Sha256::digest(certificate_der).into()
}

/// The one identity in a certificate whose chain nobody has looked at yet.
pub(crate) fn identity_in(certificate: &CertificateDer<'_>) -> Result<Identity, Unfit> {
    named(&parsed(certificate)?)
}

/// Who a process is by its certificate, and for how long.
pub(crate) fn leaf(certificate: &CertificateDer<'_>) -> Result<(Identity, Validity), Unfit> {
    let parsed = parsed(certificate)?;
    let identity = named(&parsed)?;
    if is_ca(&parsed)? {
        return Err(Unfit::Usage("is a CA's"));
    }
    let usage = parsed.key_usage().map_err(unreadable)?;
    let usage = usage.ok_or(Unfit::Usage("does not say what its key is used for"))?.value;
    if usage.key_cert_sign() || usage.crl_sign() {
        return Err(Unfit::Usage("may sign certificates or revocation lists"));
    }
    if !usage.digital_signature() {
        return Err(Unfit::Usage("may not sign a handshake"));
    }
    let purposes = parsed.extended_key_usage().map_err(unreadable)?;
    // Every process is dialled or may be one day, so there is one kind of leaf.
    if !purposes.is_some_and(|purposes| purposes.value.server_auth && purposes.value.client_auth) {
        return Err(Unfit::Usage("is not for both ends of a connection (extended key usage)"));
    }
    Ok((identity, validity(&parsed)?))
}

/// What a CA speaks for, and for how long.
pub(crate) fn authority(certificate: &CertificateDer<'_>) -> Result<(Domain, Validity), Unfit> {
    let parsed = parsed(certificate)?;
    let domain = named(&parsed)?;
    let usage = parsed.key_usage().map_err(unreadable)?;
    if !is_ca(&parsed)? || !usage.is_some_and(|usage| usage.value.key_cert_sign()) {
        return Err(Unfit::Usage("is not a CA's"));
    }
    Ok((domain, validity(&parsed)?))
}

fn parsed<'a>(certificate: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, Unfit> {
    let (rest, parsed) = x509_parser::parse_x509_certificate(certificate).map_err(unreadable)?;
    match rest {
        [] => Ok(parsed),
        _ => Err(Unfit::Encoding("bytes follow its end".to_owned())),
    }
}

fn unreadable(error: impl fmt::Display) -> Unfit {
    Unfit::Encoding(error.to_string())
}

/// The one URI among the names.
fn named<T>(certificate: &X509Certificate<'_>) -> Result<T, Unfit>
where
    T: FromStr,
    Unfit: From<T::Err>,
{
    let names = certificate.subject_alternative_name().map_err(unreadable)?;
    let names = names.iter().flat_map(|names| &names.value.general_names);
    let mut uris = names.filter_map(|name| match name {
        GeneralName::URI(uri) => Some(*uri),
        _ => None,
    });
    match (uris.next(), uris.count()) {
        (Some(uri), 0) => Ok(uri.parse()?),
        (first, further) => Err(Unfit::Count(usize::from(first.is_some()) + further)),
    }
}

fn is_ca(certificate: &X509Certificate<'_>) -> Result<bool, Unfit> {
    let constraints = certificate.basic_constraints().map_err(unreadable)?;
    Ok(constraints.is_some_and(|constraints| constraints.value.ca))
}

fn validity(certificate: &X509Certificate<'_>) -> Result<Validity, Unfit> {
    let time = |time: x509_parser::time::ASN1Time| {
        let seconds = u64::try_from(time.timestamp()).ok();
        let time = seconds.and_then(|s| SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(s)));
        time.ok_or_else(|| Unfit::Encoding("its times are out of range".to_owned()))
    };
    let validity = certificate.validity();
    Ok(Validity { start: time(validity.not_before)?, end: time(validity.not_after)? })
}
