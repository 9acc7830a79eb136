//! A signing key in a folder, in a file that nobody else reads, with its public half beside it.

use std::path::Path;

use crate::files::{self, PRIVATE, read};
use crate::note::SigningKey;
use crate::{Error, at};

/// The signing key, as [`crate::note`] writes it.
pub const KEY: &str = "key";
/// Its public half.
pub const PUBLIC_KEY: &str = "key.pub";
/// Longest file of a secret in bytes.
pub const SECRET_LEN_MAX: u64 = 1_024;

/// Whether there is a key in `folder`.
///
/// # Errors
/// The file system refused.
pub fn exists(folder: &Path) -> Result<bool, Error> {
    let path = folder.join(KEY);
    at(&path, path.try_exists())
}

/// The key of `name` in `folder`: the one that is there, or a new one.
///
/// # Errors
/// It is somebody else's, or the file system refused.
pub fn open<const TYPE: u8>(folder: &Path, name: &str) -> Result<SigningKey<TYPE>, Error> {
    files::make_private(folder)?;
    let path = folder.join(KEY);
    let key = match secret(&path)? {
        Some(text) => SigningKey::from_secret(&text)?,
        None => {
            let key = SigningKey::generate(name)?;
            files::replace(&path, (key.secret() + "\n").as_bytes(), PRIVATE)?;
            key
        }
    };
    if key.verifier().name() != name {
        let reason = format!("it is the key of {}, not of {name}", key.verifier().name());
        return Err(Error::file(path, reason));
    }
    let public = folder.join(PUBLIC_KEY);
    let text = format!("{}\n", key.verifier());
    if secret(&public)?.as_deref() != Some(text.as_str()) {
        files::replace(&public, text.as_bytes(), PRIVATE)?;
    }
    Ok(key)
}

/// A short file as text; none if it is not there.
///
/// # Errors
/// It is too long or no text, or the file system refused. The error does not quote it.
pub fn secret(path: &Path) -> Result<Option<String>, Error> {
    let text = read(path, SECRET_LEN_MAX)?.map(String::from_utf8);
    text.transpose().map_err(|_| Error::file(path, "it is not text"))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::note::{Signer, TEXT_TYPE};

    #[test]
    fn a_key_stays_the_same_and_nobody_else_reads_it() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("audit");
        let made: Signer = open(&folder, "local/audit/a").unwrap();
        let again: Signer = open(&folder, "local/audit/a").unwrap();
        assert_eq!(again.verifier(), made.verifier());
        assert!(open::<TEXT_TYPE>(&folder, "local/audit/b").is_err(), "the key of another log");
        let mode = fs::metadata(folder.join(KEY)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let public = fs::read_to_string(folder.join(PUBLIC_KEY)).unwrap();
        assert_eq!(public.trim(), made.verifier().to_string());
    }
}
