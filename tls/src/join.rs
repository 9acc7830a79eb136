//! The one connection on which an end shows no certificate: the one by which it gets its first.
//!
//! The server shows the certificates of its region's CAs beside its own. The joiner knows the
//! SHA-256 of a CA from its token, believes the CA that has it, and by that CA whoever is a
//! coordinator of its region. What the joiner may do is decided by the token, not here.

use std::sync::Arc;
use std::time::SystemTime;

use entente_proto::identity::Role;
use rustls::client::Resumption;
use rustls::pki_types::CertificateDer;
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{CertificateError, ClientConfig, ServerConfig};

use crate::credentials::{Inner, provider};
use crate::verify::{Belief, Verifier};
use crate::{Credentials, Error, Roots, fingerprint};

/// The ALPN name of a connection by which a process joins.
pub const ALPN_JOIN: &[u8] = b"entente-join";

impl Credentials {
    /// For being dialled by processes that have no certificate yet.
    ///
    /// # Errors
    /// None that can be: the cryptography is the same as everywhere.
    pub fn join_server(&self) -> Result<Arc<ServerConfig>, Error> {
        let mut config = ServerConfig::builder_with_provider(Arc::new(provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(WithCas(self.inner())));
        config.alpn_protocols = vec![ALPN_JOIN.to_vec()];
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(Arc::new(config))
    }
}

/// For dialling a coordinator that is known by the SHA-256 of its CA's certificate.
///
/// # Errors
/// None that can be: the cryptography is the same as everywhere.
pub fn join_client(ca_sha256: Vec<[u8; 32]>) -> Result<Arc<ClientConfig>, Error> {
    let mut config = ClientConfig::builder_with_provider(Arc::new(provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Verifier::new(Pinned(ca_sha256))))
        .with_no_client_auth();
    config.alpn_protocols = vec![ALPN_JOIN.to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_sni = false;
    Ok(Arc::new(config))
}

/// Shows the CAs of the own region too: a joiner has none of them.
#[derive(Debug)]
struct WithCas(Arc<Inner>);

impl ResolvesServerCert for WithCas {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let own = ResolvesServerCert::resolve(&*self.0, hello)?;
        let mut chain = own.cert.clone();
        chain.extend(self.0.roots().of_region(self.0.identity().region).cloned());
        Some(Arc::new(CertifiedKey::new(chain, own.key.clone())))
    }
}

/// Believes coordinators under the CAs that a token names.
#[derive(Debug)]
struct Pinned(Vec<[u8; 32]>);

impl Belief for Pinned {
    fn check(
        &self,
        certificate: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        now: SystemTime,
    ) -> Result<(), Error> {
        let named = others.iter().filter(|other| self.0.contains(&fingerprint(other)));
        let named: Vec<_> = named.map(|ca| ca.clone().into_owned()).collect();
        if named.is_empty() {
            return Err(rustls::Error::from(CertificateError::UnknownIssuer).into());
        }
        let identity = Roots::new(named)?.identify(certificate, others, now)?;
        match identity.role {
            Role::Coordinator => Ok(()),
            _ => Err(Error::NoCoordinator(Box::new(identity))),
        }
    }
}
