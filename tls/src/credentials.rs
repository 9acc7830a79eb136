//! A process's own certificate and key, the CAs that it believes, and the configurations that
//! follow from them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use entente_proto::identity::{Expected, Identity};
use rustls::client::Resumption;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::NoServerSessionStorage;
use rustls::{CipherSuite, ClientConfig, RootCertStore, ServerConfig};
use serde::{Deserialize, Serialize};

use crate::Error;
use crate::verify::{PeerVerifier, identity_in};

/// The section `[tls]` of a configuration: paths of PEM files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Files {
    /// The CAs of the cluster.
    pub ca: PathBuf,
    /// This process's certificate, and those between it and a CA, if there are any.
    pub certificate: PathBuf,
    /// The certificate's private key.
    pub key: PathBuf,
}

/// What a process shows, and whom it believes. Cheap to clone.
#[derive(Clone)]
pub struct Credentials(Arc<Inner>);

struct Inner {
    identity: Identity,
    roots: Arc<RootCertStore>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    provider: Arc<CryptoProvider>,
}

impl Credentials {
    /// Reads the files and checks that each holds what it should.
    ///
    /// # Errors
    /// Names the file.
    pub fn load(files: &Files) -> Result<Self, Error> {
        let roots = certificates(&files.ca)?;
        let chain = certificates(&files.certificate)?;
        let key = PrivateKeyDer::from_pem_file(&files.key)
            .map_err(|error| unusable(&files.key, &error))?;
        Self::new(roots, chain, key).map_err(|error| unusable(&files.certificate, &error))
    }

    /// The same from what the files hold.
    pub fn new(
        cas: Vec<CertificateDer<'static>>,
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
    ) -> Result<Self, Error> {
        let mut roots = RootCertStore::empty();
        cas.into_iter().try_for_each(|ca| roots.add(ca))?;
        let own = chain.first().ok_or(rustls::Error::NoCertificatesPresented)?;
        let (identity, roots) = (identity_in(own)?, Arc::new(roots));
        let credentials =
            Self(Arc::new(Inner { identity, roots, chain, key, provider: Arc::new(provider()) }));
        // Finds a key that is not the certificate's now rather than at the first connection.
        let anyone = Expected {
            cluster: credentials.identity().cluster.clone(),
            roles: vec![credentials.identity().role],
            member: None,
        };
        credentials.server(anyone, &[])?;
        Ok(credentials)
    }

    /// Who this process is.
    pub fn identity(&self) -> &Identity {
        &self.0.identity
    }

    #[cfg(test)]
    pub(crate) fn roots(&self) -> Arc<RootCertStore> {
        self.0.roots.clone()
    }

    /// Checks that these are the credentials of the process that is meant.
    pub fn belong_to(&self, process: &Expected) -> Result<(), Error> {
        Ok(process.check(self.identity())?)
    }

    /// For dialling a peer that must be `expected`.
    pub fn client(&self, expected: Expected, alpn: &[&[u8]]) -> Result<Arc<ClientConfig>, Error> {
        let own = &self.0;
        let verifier = Arc::new(PeerVerifier::new(own.roots.clone(), &own.provider, expected)?);
        let mut config = ClientConfig::builder_with_provider(own.provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_client_auth_cert(own.chain.clone(), own.key.clone_key())?;
        config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
        config.resumption = Resumption::disabled();
        // Once the handshake is over our own records need the keys.
        config.enable_secret_extraction = true;
        config.enable_sni = false;
        Ok(Arc::new(config))
    }

    /// For being dialled by peers that must be `expected`.
    pub fn server(&self, expected: Expected, alpn: &[&[u8]]) -> Result<Arc<ServerConfig>, Error> {
        let own = &self.0;
        let verifier = Arc::new(PeerVerifier::new(own.roots.clone(), &own.provider, expected)?);
        let mut config = ServerConfig::builder_with_provider(own.provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(verifier)
            .with_single_cert(own.chain.clone(), own.key.clone_key())?;
        config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        config.enable_secret_extraction = true;
        Ok(Arc::new(config))
    }
}

/// The cryptography, AES-128-GCM first: half of an exchange's bytes are encrypted by a processor
/// that has instructions for it, and 128 bits are not what anybody breaks.
pub(crate) fn provider() -> CryptoProvider {
    let mut provider = rustls::crypto::aws_lc_rs::default_provider();
    provider.cipher_suites.sort_by_key(|suite| match suite.suite() {
        CipherSuite::TLS13_AES_128_GCM_SHA256 => 0,
        CipherSuite::TLS13_AES_256_GCM_SHA384 => 1,
        _ => 2,
    });
    provider
}

fn certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>, Error> {
    let certificates = CertificateDer::pem_file_iter(file)
        .and_then(|pem| pem.collect::<Result<Vec<_>, _>>())
        .map_err(|error| unusable(file, &error))?;
    if certificates.is_empty() {
        return Err(unusable(file, &"no certificate is in it"));
    }
    Ok(certificates)
}

fn unusable(file: &Path, reason: &dyn std::fmt::Display) -> Error {
    Error::File { file: file.to_owned(), reason: reason.to_string() }
}
