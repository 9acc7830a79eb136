//! Statements that a process signs with the key of its certificate, to be shown to others later.
//!
//! A signature is over `entente signature\0`, a context, another NUL and the message. So one that
//! was made for one purpose is worth nothing for another, and none can be taken for the signature
//! of a TLS handshake, which begins with spaces (RFC 8446, section 4.4.3).

use rustls::SignatureScheme;
use rustls::pki_types::CertificateDer;

use crate::Error;
use crate::credentials::provider;

/// In order of preference; which of them it is follows from the key.
pub(crate) const SCHEMES: [SignatureScheme; 4] = [
    SignatureScheme::ECDSA_NISTP256_SHA256,
    SignatureScheme::ECDSA_NISTP384_SHA384,
    SignatureScheme::ED25519,
    SignatureScheme::RSA_PSS_SHA256,
];

/// A signature, and the certificate whose key made it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signed {
    /// The signature's bytes, in the form that the key's algorithm has in TLS 1.3.
    pub signature: Vec<u8>,
    /// The certificate, as DER.
    pub certificate_der: Vec<u8>,
}

/// What is signed for a message.
pub(crate) fn covered(context: &str, message: &[u8]) -> Vec<u8> {
    [b"entente signature\0", context.as_bytes(), b"\0", message].concat()
}

/// Checks that the key of a certificate has signed a message for this purpose. Whose certificate it
/// is, and whether it was valid, is [`crate::Roots::identify`]'s to say.
///
/// # Errors
/// The certificate cannot be read, or the signature is not its key's.
pub fn verify_signature(
    certificate_der: &[u8],
    context: &str,
    message: &[u8],
    signature: &[u8],
) -> Result<(), Error> {
    let certificate = CertificateDer::from(certificate_der);
    let parsed = webpki::EndEntityCert::try_from(&certificate).map_err(|_| bad_encoding())?;
    let known = provider().signature_verification_algorithms;
    let known = known.mapping.iter().filter(|(scheme, _)| SCHEMES.contains(scheme));
    let covered = covered(context, message);
    // An algorithm that does not suit the key is an error as a wrong signature is.
    let mut algorithms = known.flat_map(|(_, algorithms)| algorithms.iter());
    let good = algorithms.any(|one| parsed.verify_signature(*one, &covered, signature).is_ok());
    if good { Ok(()) } else { Err(bad_signature()) }
}

fn bad_encoding() -> Error {
    rustls::Error::InvalidCertificate(rustls::CertificateError::BadEncoding).into()
}

fn bad_signature() -> Error {
    rustls::Error::InvalidCertificate(rustls::CertificateError::BadSignature).into()
}
