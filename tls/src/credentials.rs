//! A process's own certificate and key, the CAs that it believes, and the configurations that
//! follow from them.
//!
//! Certificates live for a day, processes for months: both parts can be replaced, and every
//! configuration that was made before looks at the latest when a connection is made. Connections
//! that are there already go on. A replacement that would not do is refused, and the last good one
//! stays.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use arc_swap::ArcSwap;
use entente_proto::identity::{Expected, Identity};
use rustls::client::{ResolvesClientCert, Resumption};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::PrivateKeyDer;
use rustls::pki_types::pem::PemObject;
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{CipherSuite, ClientConfig, ServerConfig, SignatureScheme};
use serde::{Deserialize, Serialize};

use crate::Error;
use crate::certificate::{self, Unfit, Validity, fingerprint};
use crate::roots::{Roots, certificates};
use crate::signature::{SCHEMES, Signed, covered};
use crate::verify::{Expecting, Verifier};

/// The section `[tls]` of a configuration: paths of PEM files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Files {
    /// The CAs of all regions of the cluster.
    pub ca: PathBuf,
    /// This process's certificate, and those between it and a CA, if there are any.
    pub certificate: PathBuf,
    /// The certificate's private key.
    pub key: PathBuf,
}

/// What a process shows, and whom it believes. Cheap to clone; all clones are replaced together.
#[derive(Clone, Debug)]
pub struct Credentials(Arc<Inner>);

pub(crate) struct Inner {
    /// Stays what it is: a process does not become another one.
    identity: Identity,
    latest: ArcSwap<Latest>,
    /// Held while one half is replaced, so that the other is not an older one.
    replacing: Mutex<()>,
}

#[derive(Clone)]
struct Latest {
    roots: Arc<Roots>,
    own: Arc<CertifiedKey>,
    validity: Validity,
}

impl Credentials {
    /// Reads the files and checks that each holds what it should.
    ///
    /// # Errors
    /// Names the file.
    pub fn load(files: &Files) -> Result<Self, Error> {
        let (identity, latest) = read(files)?;
        Ok(Self::of(identity, latest))
    }

    /// The same from what the files hold.
    ///
    /// # Errors
    /// The key is not the certificate's, or no CA of its region says that it is good now.
    pub fn new(roots: Roots, chain_pem: &str, key_pem: &str) -> Result<Self, Error> {
        let (identity, latest) = checked(Arc::new(roots), chain_pem.as_bytes(), key_pem)?;
        Ok(Self::of(identity, latest))
    }

    fn of(identity: Identity, latest: Latest) -> Self {
        let (latest, replacing) = (ArcSwap::from_pointee(latest), Mutex::new(()));
        Self(Arc::new(Inner { identity, latest, replacing }))
    }

    /// Who this process is.
    pub fn identity(&self) -> &Identity {
        &self.0.identity
    }

    /// When the certificate ends.
    pub fn expires(&self) -> SystemTime {
        self.0.latest.load().validity.end
    }

    /// When half of the certificate's life is over.
    pub fn half_life(&self) -> SystemTime {
        let Validity { start, end } = self.0.latest.load().validity;
        start + end.duration_since(start).unwrap_or_default() / 2
    }

    /// The certificate's fingerprint.
    pub fn certificate_sha256(&self) -> [u8; 32] {
        fingerprint(&self.0.latest.load().own.cert[0])
    }

    /// The CAs that are believed.
    pub fn roots(&self) -> Arc<Roots> {
        self.0.roots()
    }

    pub(crate) fn inner(&self) -> Arc<Inner> {
        self.0.clone()
    }

    /// Checks that these are the credentials of the process that is meant.
    pub fn belong_to(&self, process: &Expected) -> Result<(), Error> {
        Ok(process.check(self.identity())?)
    }

    /// Shows another certificate of the same identity from now on.
    ///
    /// # Errors
    /// It is not good, or another's; nothing has changed then.
    pub fn replace(&self, chain_pem: &str, key_pem: &str) -> Result<(), Error> {
        self.0.change(|latest| checked(latest.roots.clone(), chain_pem.as_bytes(), key_pem))
    }

    /// Believes these CAs from now on.
    ///
    /// # Errors
    /// They do not speak for this process's own certificate; nothing has changed then.
    pub fn replace_roots(&self, roots: Roots) -> Result<(), Error> {
        self.0.change(|latest| {
            let latest = Latest { roots: Arc::new(roots), ..latest.clone() };
            Ok((latest.identify()?, latest))
        })
    }

    /// Reads all files again.
    ///
    /// # Errors
    /// As [`Credentials::load`] and [`Credentials::replace`]; nothing has changed then.
    pub fn reload(&self, files: &Files) -> Result<(), Error> {
        self.0.change(|_| read(files))
    }

    /// Signs a message with the certificate's key. `context` names the purpose, and whoever verifies
    /// must name the same.
    ///
    /// # Errors
    /// The key is of a kind that cannot.
    pub fn sign(&self, context: &'static str, message: &[u8]) -> Result<Signed, Error> {
        let latest = self.0.latest.load();
        let signer = latest.own.key.choose_scheme(&SCHEMES);
        let signer = signer.ok_or(Unfit::Usage("has a key that signs nothing of ours"))?;
        let signature = signer.sign(&covered(context, message))?;
        Ok(Signed { signature, certificate_der: latest.own.cert[0].to_vec() })
    }

    /// For dialling a peer that must be `expected`.
    pub fn client(&self, expected: Expected, alpn: &[&[u8]]) -> Result<Arc<ClientConfig>, Error> {
        let verifier = Arc::new(self.verifier(expected));
        let mut config = ClientConfig::builder_with_provider(Arc::new(provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_client_cert_resolver(self.0.clone());
        config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
        config.resumption = Resumption::disabled();
        // Once the handshake is over our own records need the keys.
        config.enable_secret_extraction = true;
        config.enable_sni = false;
        Ok(Arc::new(config))
    }

    /// For being dialled by peers that must be `expected`.
    pub fn server(&self, expected: Expected, alpn: &[&[u8]]) -> Result<Arc<ServerConfig>, Error> {
        let verifier = Arc::new(self.verifier(expected));
        let mut config = ServerConfig::builder_with_provider(Arc::new(provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(verifier)
            .with_cert_resolver(self.0.clone());
        config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        config.enable_secret_extraction = true;
        Ok(Arc::new(config))
    }

    pub(crate) fn verifier(&self, expected: Expected) -> Verifier<Expecting> {
        Verifier::new(Expecting { own: self.0.clone(), expected })
    }
}

impl Inner {
    pub(crate) fn identity(&self) -> &Identity {
        &self.identity
    }

    pub(crate) fn roots(&self) -> Arc<Roots> {
        self.latest.load().roots.clone()
    }

    /// Puts in what `make` makes of the latest, if that is of the same identity.
    fn change(
        &self,
        make: impl FnOnce(&Latest) -> Result<(Identity, Latest), Error>,
    ) -> Result<(), Error> {
        let _replacing = self.replacing.lock().unwrap_or_else(PoisonError::into_inner);
        let (identity, latest) = make(&self.latest.load())?;
        let Identity { cluster, region, role, node } = self.identity.clone();
        Expected { cluster, roles: vec![role], member: Some((region, node)) }.check(&identity)?;
        self.latest.store(Arc::new(latest));
        Ok(())
    }
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Credentials({})", self.identity)
    }
}

impl ResolvesClientCert for Inner {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.latest.load().own.clone())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

impl ResolvesServerCert for Inner {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.latest.load().own.clone())
    }
}

impl Latest {
    /// Whose certificate ours is, in the eyes of others who believe the same CAs.
    fn identify(&self) -> Result<Identity, Error> {
        let (own, intermediates) =
            self.own.cert.split_first().ok_or(rustls::Error::NoCertificatesPresented)?;
        self.roots.identify(own, intermediates, SystemTime::now())
    }
}

fn read(files: &Files) -> Result<(Identity, Latest), Error> {
    let roots = Roots::load(&files.ca)?;
    let text = |file: &PathBuf| std::fs::read(file).map_err(|error| unusable(file, &error));
    let (chain, key) = (text(&files.certificate)?, text(&files.key)?);
    let key = String::from_utf8(key).map_err(|_| unusable(&files.key, &"it is not PEM"))?;
    PrivateKeyDer::from_pem_slice(key.as_bytes()).map_err(|error| unusable(&files.key, &error))?;
    checked(Arc::new(roots), &chain, &key).map_err(|error| unusable(&files.certificate, &error))
}

/// What everybody will find wrong is better found now than at the first connection.
fn checked(
    roots: Arc<Roots>,
    chain_pem: &[u8],
    key_pem: &str,
) -> Result<(Identity, Latest), Error> {
    let chain = certificates(chain_pem)?;
    let own = chain.first().ok_or(rustls::Error::NoCertificatesPresented)?;
    let (_, validity) = certificate::leaf(own)?;
    let key = PrivateKeyDer::from_pem_slice(key_pem.as_bytes())
        .map_err(|error| Unfit::Encoding(error.to_string()))?;
    let own = Arc::new(CertifiedKey::from_der(chain, key, &provider())?);
    let latest = Latest { roots, own, validity };
    Ok((latest.identify()?, latest))
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

pub(crate) fn unusable(file: &Path, reason: &dyn fmt::Display) -> Error {
    Error::File { file: file.to_owned(), reason: reason.to_string() }
}
