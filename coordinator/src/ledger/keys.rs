//! The salts of a ledger, each in a file that nobody else reads; beside them lies the key that signs
//! checkpoints ([`entente_audit::keyfile`]).
//!
//! A salt stands between a tenant's requests and the log: with salt and body anybody can tell that a
//! record is of that body, without the salt nobody can tell anything. Who has to forget a tenant
//! deletes its salt; the tree stays whole, and says no more about what was asked.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use aws_lc_rs::hmac;
use entente_audit::files::{self, PRIVATE};
use entente_audit::keyfile;
use entente_audit::record::Digest;
use entente_proto::ids::TenantName;

use super::LedgerError;

const SALTS: &str = "salts";

/// The salts of the tenants, made when they are first needed.
pub struct Salts {
    folder: PathBuf,
    known: BTreeMap<TenantName, [u8; 32]>,
}

impl Salts {
    /// Those in a ledger's folder.
    pub fn open(folder: &Path) -> Result<Self, LedgerError> {
        let folder = folder.join(SALTS);
        files::make_private(&folder)?;
        Ok(Self { folder, known: BTreeMap::new() })
    }

    /// The tenant's salt.
    pub fn of(&mut self, tenant: &TenantName) -> Result<[u8; 32], LedgerError> {
        if let Some(salt) = self.known.get(tenant) {
            return Ok(*salt);
        }
        let path = self.folder.join(tenant.as_str());
        let salt = match keyfile::secret(&path)? {
            Some(text) => unhex(text.trim()).ok_or(LedgerError::Salt { path })?,
            None => {
                let mut salt = [0; 32];
                getrandom::fill(&mut salt)
                    .map_err(|error| LedgerError::Random(error.to_string()))?;
                files::replace(&path, format!("{}\n", Digest(salt)).as_bytes(), PRIVATE)?;
                salt
            }
        };
        self.known.insert(tenant.clone(), salt);
        Ok(salt)
    }
}

/// Reads what a [`Digest`] is written as.
fn unhex(text: &str) -> Option<[u8; 32]> {
    let digit = |at: usize| u8::from_str_radix(text.get(at..at + 2)?, 16).ok();
    let bytes: Option<Vec<u8>> = (0..64).step_by(2).map(digit).collect();
    bytes.filter(|_| text.len() == 64)?.try_into().ok()
}

/// What a record says of a body: HMAC-SHA-256 of the body's SHA-256 under the tenant's salt.
pub fn salted(salt: &[u8; 32], body_sha256: &[u8; 32]) -> Digest {
    let mac = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, salt), body_sha256);
    let mut digest = [0; 32];
    digest.copy_from_slice(mac.as_ref());
    Digest(digest)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_ledger_keeps_its_salts_and_nobody_else_reads_them() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("audit");
        let (one, two) = ("one".parse().unwrap(), "two".parse().unwrap());
        let mut salts = Salts::open(&folder).unwrap();
        let salt = salts.of(&one).unwrap();
        assert_ne!(salt, salts.of(&two).unwrap());
        assert_eq!(Salts::open(&folder).unwrap().of(&one).unwrap(), salt);
        let mode = fs::metadata(folder.join("salts/one")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_ne!(salted(&salt, &[1; 32]), salted(&salts.of(&two).unwrap(), &[1; 32]));
    }
}
