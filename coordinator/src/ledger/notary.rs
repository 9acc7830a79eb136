//! Reads certificates and nodes' statements for whoever verifies a log.
//!
//! [`ByCertificate`] says whose a certificate is and whether its key has signed, not whether a CA has
//! issued it: certificates of a log are older than those of today, and CAs may have been replaced
//! since. Who has the CAs that the cluster had asks [`ByAuthority`].

use entente_audit::record::Statement;
use entente_audit::verify::{Notary, Stated};
use entente_proto::ids::{NodeName, Region};
use entente_proto::statement::{self, STATEMENT_CONTEXT};
use entente_tls::Roots;
use rustls::pki_types::CertificateDer;

/// By the certificates of this cluster's kind.
#[derive(Debug, Clone, Copy, Default)]
pub struct ByCertificate;

impl Notary for ByCertificate {
    fn identity(&self, certificate: &[u8]) -> Result<(NodeName, Region), String> {
        let certificate = CertificateDer::from(certificate);
        let identity = entente_tls::peer_identity(Some(&[certificate]));
        let identity = identity.map_err(|error| error.to_string())?;
        Ok((identity.node, identity.region))
    }

    fn stated(&self, certificate: &[u8], statement: &Statement) -> Result<Stated, String> {
        let (said, signature) = (&statement.statement.0, &statement.signature.0);
        entente_tls::verify_signature(certificate, STATEMENT_CONTEXT, said, signature)
            .map_err(|error| format!("the statement: {error}"))?;
        let said = statement::Statement::decode(said)
            .map_err(|error| format!("the statement: {error}"))?;
        let statement::Statement { node, region, incarnation, rows, .. } = said;
        Ok(Stated { node, region, incarnation: incarnation.0, rows })
    }
}

/// The same, of certificates that one of these CAs has issued. Each is looked at as it was when it
/// began to be valid: that certificates and CAs end does not change what was signed before.
#[derive(Debug, Clone)]
pub struct ByAuthority(pub Roots);

impl Notary for ByAuthority {
    fn identity(&self, certificate: &[u8]) -> Result<(NodeName, Region), String> {
        let identity = self.0.identify_issued(&CertificateDer::from(certificate));
        let identity = identity.map_err(|error| format!("the certificate: {error}"))?;
        Ok((identity.node, identity.region))
    }

    fn stated(&self, certificate: &[u8], statement: &Statement) -> Result<Stated, String> {
        ByCertificate.stated(certificate, statement)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use entente_tls::Authority;

    use super::*;

    const LIFE: Duration = Duration::from_secs(60);

    #[test]
    fn a_certificate_counts_by_the_ca_of_its_region_that_issued_it_and_by_no_other() {
        let (cluster, fr) = ("local".parse().unwrap(), "fr".parse().unwrap());
        let authority = || Authority::new(&cluster, fr, LIFE).unwrap();
        let (ours, other) = (authority(), authority());
        let name = "spiffe://local/region/fr/role/expert/node/fr-expert-1".parse().unwrap();
        let certificate = |authority: &Authority| {
            let issued = authority.issue(&name, LIFE).unwrap();
            authority.credentials(&issued).unwrap().sign("a test", b"").unwrap().certificate_der
        };
        let notary = ByAuthority(ours.roots().unwrap());
        let known = Ok(("fr-expert-1".parse().unwrap(), fr));
        assert_eq!(notary.identity(&certificate(&ours)), known);
        let foreign = certificate(&other);
        assert_eq!(ByCertificate.identity(&foreign), known);
        let refused = notary.identity(&foreign).unwrap_err();
        assert!(refused.starts_with("the certificate: "), "{refused}");
    }
}
