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
    stage: Mutex<Stage>,
}

struct Stage {
    facts: Arc<Facts>,
    /// Whether the certificate that they name was handed to the log.
    certified: bool,
}

impl Books {
    /// The ledger, with what its records say of this process. Whose certificate it is now is asked
    /// of `credentials`, which may be renewed.
    pub fn new(ledger: Ledger, facts: Facts, credentials: Option<Credentials>) -> Self {
        let stage = Mutex::new(Stage { facts: Arc::new(facts), certified: false });
        Self { ledger, credentials, stage }
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
        let mut stage = self.stage.lock().unwrap_or_else(PoisonError::into_inner);
        let shown = self.credentials.as_ref().map(|own| Digest(own.certificate_sha256()));
        if stage.facts.coordinator.certificate != shown {
            let mut renewed = Facts::clone(&stage.facts);
            renewed.coordinator.certificate = shown;
            *stage = Stage { facts: Arc::new(renewed), certified: false };
        }
        // Where it had to be dropped, the next request tries again.
        stage.certified = stage.certified || self.certify();
        stage.facts.clone()
    }

    /// Puts this process's certificate into the log, where it has one.
    fn certify(&self) -> bool {
        let Some(credentials) = &self.credentials else { return true };
        let signed = credentials.sign(CONTEXT, self.ledger.key().as_bytes());
        let kept = signed.is_ok_and(|signed| self.ledger.certify(signed.certificate_der));
        if !kept {
            tracing::warn!("this process's certificate is not in the audit log yet");
        }
        kept
    }
}
