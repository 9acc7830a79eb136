//! Cosignatures (c2sp.org/tlog-cosignature, `cosignature/v1` with Ed25519): a line beneath a
//! checkpoint by which somebody who is not the log says that at this moment it was the largest tree
//! of that log that they had seen, and that it goes on from all that they saw before.
//!
//! What is signed is the checkpoint's text behind two lines of its own, so that a cosignature can
//! never be taken for a log's signature, nor the other way round. Who may give one, and when, is for
//! [`crate::witness`].

use crate::Error;
use crate::note::{self, COSIGNATURE_TYPE, PublicKey, SigningKey};

/// The public key of somebody who cosigns.
pub type CosignerKey = PublicKey<COSIGNATURE_TYPE>;
/// Somebody who cosigns.
pub type Cosigner = SigningKey<COSIGNATURE_TYPE>;

/// Bytes of an Ed25519 signature.
const SIGNATURE_BYTES: usize = 64;

/// What is signed, for a checkpoint's text.
pub(crate) fn message(time_s: u64, text: &str) -> Vec<u8> {
    format!("cosignature/v1\ntime {time_s}\n{text}").into_bytes()
}

/// The time of a `timestamped_signature`, and the bare signature.
pub(crate) fn parts(signature: &[u8]) -> Option<(u64, &[u8])> {
    let (time, bare) = signature.split_first_chunk()?;
    let time_s = u64::from_be_bytes(*time);
    (i64::try_from(time_s).is_ok() && bare.len() == SIGNATURE_BYTES).then_some((time_s, bare))
}

impl Cosigner {
    /// The line, with its end, that this key puts beneath a checkpoint's `text` at `time_s`, seconds
    /// since 1970.
    pub(crate) fn cosign(&self, text: &str, time_s: u64) -> String {
        let bare = self.sign_bytes(&message(time_s, text));
        self.line(&[&time_s.to_be_bytes(), &bare[..]].concat())
    }
}

/// When `key` cosigned a checkpoint, seconds since 1970 by its clock.
///
/// # Errors
/// The note is malformed, or that key has not cosigned it.
pub fn time_s(note: &str, key: &CosignerKey) -> Result<u64, Error> {
    let (_, signature) = note::signature(note, key)?;
    // What verified has both parts.
    Ok(parts(&signature).map_or(0, |(time_s, _)| time_s))
}
