//! What the API needs of the ledger: to take up requests, each with what is true of this process at
//! that moment, and to find receipts.

use std::sync::{Arc, Mutex, PoisonError};

use entente_audit::record::Digest;
use entente_tls::Credentials;

use super::requests::Facts;
use super::{Attempt, Ledger};

/// Signed for no other reason than to have the certificate with the signature.
const CONTEXT: &str = "entente audit key v1";

/// The ledger of a coordinator that serves.
pub struct Books {
    ledger: Ledger,
    credentials: Option<Credentials>,
    facts: Mutex<Arc<Facts>>,
}

impl Books {
    /// The ledger, with what its records say of this process. Whose certificate it is now is asked
    /// of `credentials`, which may be renewed.
    pub fn new(ledger: Ledger, facts: Facts, credentials: Option<Credentials>) -> Self {
        Self { ledger, credentials, facts: Mutex::new(Arc::new(facts)) }
    }

    /// The ledger.
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// Takes up a request; none if no record of it could be made.
    pub fn begin(&self) -> Option<Attempt> {
        self.ledger.begin(self.facts())
    }

    fn facts(&self) -> Arc<Facts> {
        let mut facts = self.facts.lock().unwrap_or_else(PoisonError::into_inner);
        let shown = self.credentials.as_ref().map(|own| Digest(own.certificate_sha256()));
        if facts.coordinator.certificate != shown {
            let mut renewed = Facts::clone(&facts);
            renewed.coordinator.certificate = shown;
            *facts = Arc::new(renewed);
            self.certify();
        }
        facts.clone()
    }

    /// Puts this process's certificate into the log.
    fn certify(&self) {
        let Some(credentials) = &self.credentials else { return };
        let signed = credentials.sign(CONTEXT, self.ledger.key().as_bytes());
        let kept = signed.is_ok_and(|signed| self.ledger.certify(signed.certificate_der));
        if !kept {
            tracing::warn!("this process's certificate is not in the audit log yet");
        }
    }
}
