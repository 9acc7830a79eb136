//! Whether the process at the other end is the one that it should be.
//!
//! Servers and clients are verified by one rule, a [`Belief`]. Between members it is [`Expecting`]:
//! [`crate::Roots`] says whose the certificate is, and what is expected says whether that is right.
//! Both are asked at each handshake, so CAs that were replaced a moment ago count at once.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use entente_proto::identity::Expected;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, OtherError, PeerIncompatible,
    SignatureScheme,
};

use crate::Error;
use crate::credentials::{Inner, provider};

/// Whom an end of a connection believes.
pub(crate) trait Belief: fmt::Debug + Send + Sync {
    /// Whether the holder of this certificate, who has shown the `others` with it, is right.
    fn check(
        &self,
        certificate: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        now: SystemTime,
    ) -> Result<(), Error>;
}

/// Believes whom the latest CAs of this process say to be who is expected.
#[derive(Debug)]
pub(crate) struct Expecting {
    pub(crate) own: Arc<Inner>,
    pub(crate) expected: Expected,
}

impl Belief for Expecting {
    fn check(
        &self,
        certificate: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        now: SystemTime,
    ) -> Result<(), Error> {
        let identity = self.own.roots().identify(certificate, others, now)?;
        Ok(self.expected.check(&identity)?)
    }
}

/// Verifies servers and clients by one rule.
#[derive(Debug)]
pub(crate) struct Verifier<B> {
    belief: B,
    algorithms: WebPkiSupportedAlgorithms,
}

impl<B: Belief> Verifier<B> {
    pub(crate) fn new(belief: B) -> Self {
        Self { belief, algorithms: provider().signature_verification_algorithms }
    }

    fn identify(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), rustls::Error> {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(now.as_secs());
        match self.belief.check(certificate, intermediates, now) {
            Ok(()) => Ok(()),
            Err(Error::Tls(error)) => Err(error),
            Err(error) => Err(CertificateError::Other(OtherError(Arc::new(error))).into()),
        }
    }

    fn signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }
}

/// An error in words; what [`Verifier`] found is otherwise printed as a structure.
pub(crate) fn text(error: &rustls::Error) -> String {
    match error {
        rustls::Error::InvalidCertificate(CertificateError::Other(other)) => other.0.to_string(),
        error => error.to_string(),
    }
}

/// TLS 1.2 is never offered, so this cannot be asked.
fn too_old() -> rustls::Error {
    PeerIncompatible::Tls13RequiredForQuic.into()
}

impl<B: Belief> ServerCertVerifier for Verifier<B> {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.identify(certificate, intermediates, now)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(too_old())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

impl<B: Belief> ClientCertVerifier for Verifier<B> {
    /// None: a process has one certificate to show, whoever asks.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.identify(certificate, intermediates, now)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(too_old())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
