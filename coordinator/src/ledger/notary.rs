//! Reads certificates and nodes' statements for whoever verifies a log.
//!
//! It says whose a certificate is and whether its key has signed, not whether a CA has issued it:
//! certificates of a log are older than those of today, and CAs may have been replaced since. Who
//! wants to know compares them with the CAs that the cluster had.

use entente_audit::record::Statement;
use entente_audit::verify::{Notary, Stated};
use entente_proto::ids::{NodeName, Region};
use entente_proto::statement::{self, STATEMENT_CONTEXT};
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
