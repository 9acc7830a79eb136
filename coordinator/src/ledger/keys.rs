//! The secrets of a ledger, each in a file that nobody else reads: the key that signs checkpoints,
//! and a salt for each tenant.
//!
//! A salt stands between a tenant's requests and the log: with salt and body anybody can tell that a
//! record is of that body, without the salt nobody can tell anything. Who has to forget a tenant
//! deletes its salt; the tree stays whole, and says no more about what was asked.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use aws_lc_rs::hmac;
use entente_audit::note::Signer;
use entente_audit::record::Digest;
use entente_proto::ids::TenantName;

use super::LedgerError;

/// The signing key, as `entente_audit::note` writes it.
pub const KEY: &str = "key";
/// Its public half.
pub const PUBLIC_KEY: &str = "key.pub";
const SALTS: &str = "salts";
/// Longest file of a secret in bytes.
const SECRET_LEN_MAX: u64 = 1_024;

fn at<T>(path: &Path, result: io::Result<T>) -> Result<T, LedgerError> {
    result.map_err(|source| LedgerError::Io { path: path.to_owned(), source })
}

fn read(path: &Path) -> Result<Option<String>, LedgerError> {
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => at(path, other)?,
    };
    let mut text = String::new();
    at(path, file.take(SECRET_LEN_MAX).read_to_string(&mut text))?;
    Ok(Some(text))
}

/// Writes a file durably, so that it is either whole or not there.
fn write_new(path: &Path, text: &str) -> Result<(), LedgerError> {
    let part = path.with_extension("part");
    let mut options = OpenOptions::new();
    let options = options.write(true).create(true).truncate(true).mode(0o600);
    let mut file = at(&part, options.open(&part))?;
    at(&part, file.write_all(text.as_bytes()).and_then(|()| file.sync_all()))?;
    at(path, fs::rename(&part, path))?;
    let folder = path.parent().unwrap_or(path);
    at(folder, File::open(folder).and_then(|folder| folder.sync_all()))
}

/// Makes a folder that only this user enters.
fn make_private(folder: &Path) -> Result<(), LedgerError> {
    at(folder, DirBuilder::new().recursive(true).mode(0o700).create(folder))
}

/// The key of the log `origin` in `folder`: the one that is there, or a new one.
pub fn signer(folder: &Path, origin: &str) -> Result<Signer, LedgerError> {
    make_private(folder)?;
    let path = folder.join(KEY);
    let signer = match read(&path)? {
        Some(text) => Signer::from_secret(&text)?,
        None => {
            let signer = Signer::generate(origin)?;
            write_new(&path, &(signer.secret() + "\n"))?;
            signer
        }
    };
    if signer.verifier().name() != origin {
        let name = signer.verifier().name().to_owned();
        return Err(LedgerError::OtherLog { path, name, origin: origin.to_owned() });
    }
    let public = folder.join(PUBLIC_KEY);
    let text = format!("{}\n", signer.verifier());
    if read(&public)?.as_deref() != Some(text.as_str()) {
        write_new(&public, &text)?;
    }
    Ok(signer)
}

/// The salts of the tenants, made when they are first needed.
pub struct Salts {
    folder: PathBuf,
    known: BTreeMap<TenantName, [u8; 32]>,
}

impl Salts {
    /// Those in a ledger's folder.
    pub fn open(folder: &Path) -> Result<Self, LedgerError> {
        let folder = folder.join(SALTS);
        make_private(&folder)?;
        Ok(Self { folder, known: BTreeMap::new() })
    }

    /// The tenant's salt.
    pub fn of(&mut self, tenant: &TenantName) -> Result<[u8; 32], LedgerError> {
        if let Some(salt) = self.known.get(tenant) {
            return Ok(*salt);
        }
        let path = self.folder.join(tenant.as_str());
        let salt = match read(&path)? {
            Some(text) => unhex(text.trim()).ok_or(LedgerError::Salt { path })?,
            None => {
                let mut salt = [0; 32];
                getrandom::fill(&mut salt)
                    .map_err(|error| LedgerError::Random(error.to_string()))?;
                write_new(&path, &format!("{}\n", Digest(salt)))?;
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
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_ledger_keeps_its_key_and_its_salts_and_nobody_else_reads_them() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("audit");
        let key = signer(&folder, "local/audit/a").unwrap().verifier().clone();
        assert_eq!(*signer(&folder, "local/audit/a").unwrap().verifier(), key);
        assert!(signer(&folder, "local/audit/b").is_err(), "the key of another log");
        let (one, two) = ("one".parse().unwrap(), "two".parse().unwrap());
        let mut salts = Salts::open(&folder).unwrap();
        let salt = salts.of(&one).unwrap();
        assert_ne!(salt, salts.of(&two).unwrap());
        assert_eq!(Salts::open(&folder).unwrap().of(&one).unwrap(), salt);
        for file in ["key", "salts/one"] {
            let mode = fs::metadata(folder.join(file)).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{file}");
        }
        let public = fs::read_to_string(folder.join(PUBLIC_KEY)).unwrap();
        assert_eq!(public.trim(), key.to_string());
        assert_ne!(salted(&salt, &[1; 32]), salted(&salts.of(&two).unwrap(), &[1; 32]));
    }
}
