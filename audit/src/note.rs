//! Signed notes (c2sp.org/signed-note) with Ed25519: a text, and lines that say who vouches for it.
//!
//! Keys are written as `golang.org/x/mod/sumdb/note` writes them, so that other programs read them.
//! A key has a type, which says what it signs: the text itself, or a cosignature of it
//! ([`crate::cosign`]). The type is part of the key here too, so that none stands for another.

use std::fmt;
use std::str::FromStr;

use aws_lc_rs::rand;
use aws_lc_rs::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};
use sha2::{Digest, Sha256};

use crate::{Error, base64, cosign};

/// Longest note that is read, in bytes.
pub const NOTE_LEN_MAX: usize = 64 << 10;
/// Most signatures that are looked at.
pub const SIGNATURES_MAX: usize = 64;
/// Longest name of a key in bytes.
const NAME_LEN_MAX: usize = 255;
/// The type byte of an Ed25519 key that signs a note's text.
pub const TEXT_TYPE: u8 = 0x01;
/// The type byte of an Ed25519 key that cosigns checkpoints (c2sp.org/tlog-cosignature).
pub const COSIGNATURE_TYPE: u8 = 0x04;
const KEY: &str = "key";
const NOTE: &str = "signed note";
const PRIVATE: &str = "PRIVATE+KEY+";
/// What a line of signatures begins with.
const MARK: &str = "— ";

/// `SHA-256(name || 0x0A || type || key)[:4]`.
fn key_id(name: &str, typed_key: &[u8]) -> [u8; 4] {
    let hash = Sha256::new().chain_update(name).chain_update([b'\n']).chain_update(typed_key);
    let hash: [u8; 32] = hash.finalize().into();
    [hash[0], hash[1], hash[2], hash[3]]
}

fn check_name(name: &str) -> Result<(), Error> {
    let bad = |c: char| c.is_whitespace() || c.is_control() || c == '+';
    if name.is_empty() || name.len() > NAME_LEN_MAX || name.contains(bad) {
        let rule = "1 to 255 bytes without spaces and +";
        return Err(Error::note(KEY, format!("{name:?} is no name of a key: {rule}")));
    }
    Ok(())
}

/// Whoever may vouch for a note, as others know them: `<name>+<id>+<base64 of type and key>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublicKey<const TYPE: u8> {
    name: String,
    id: [u8; 4],
    key: [u8; 32],
}

/// Whoever vouches for the text of a note: for a checkpoint, its log.
pub type Verifier = PublicKey<TEXT_TYPE>;

impl<const TYPE: u8> PublicKey<TYPE> {
    fn new(name: &str, key: [u8; 32]) -> Result<Self, Error> {
        check_name(name)?;
        let id = key_id(name, &[&[TYPE], &key[..]].concat());
        Ok(Self { name: name.to_owned(), id, key })
    }

    /// The key's name, which for a log's is also its origin.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The first bytes of the key's hash, as eight hexadecimal digits.
    pub fn id(&self) -> String {
        self.id.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn verifies(&self, text: &str, signature: &[u8]) -> bool {
        let key = UnparsedPublicKey::new(&ED25519, self.key);
        if TYPE != COSIGNATURE_TYPE {
            return key.verify(text.as_bytes(), signature).is_ok();
        }
        let said = cosign::parts(signature);
        said.is_some_and(|(time_s, bare)| key.verify(&cosign::message(time_s, text), bare).is_ok())
    }

    /// Whether a line of signatures is this key's.
    pub(crate) fn has_signed(&self, line: &str) -> bool {
        signature_in(line).is_some_and(|(name, blob)| name == self.name && blob[..4] == self.id)
    }
}

impl<const TYPE: u8> fmt::Display for PublicKey<TYPE> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let key = base64::encode(&[&[TYPE], &self.key[..]].concat());
        write!(f, "{}+{}+{key}", self.name, self.id())
    }
}

impl<const TYPE: u8> FromStr for PublicKey<TYPE> {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let (name, id, key) = parts(text, TYPE).ok_or_else(|| malformed(TYPE))?;
        let verifier = Self::new(name, key)?;
        // The id repeats what follows from the rest; one that does not is a slip of the hand.
        if verifier.id() == id { Ok(verifier) } else { Err(malformed(TYPE)) }
    }
}

fn malformed(key_type: u8) -> Error {
    let rule = "it is not written as NAME+ID+KEY with an Ed25519 key of type";
    Error::note(KEY, format!("{rule} {key_type}"))
}

/// Name, id and the 32 bytes of a written key of this type. Base 64 may hold a `+` too.
fn parts(text: &str, key_type: u8) -> Option<(&str, &str, [u8; 32])> {
    let mut parts = text.trim().splitn(3, '+');
    let (name, id) = (parts.next()?, parts.next()?);
    let bytes = base64::decode(parts.next()?)?;
    match bytes.split_first() {
        Some((found, key)) if *found == key_type => Some((name, id, key.try_into().ok()?)),
        _ => None,
    }
}

/// Whoever vouches for notes.
pub struct SigningKey<const TYPE: u8> {
    verifier: PublicKey<TYPE>,
    seed: [u8; 32],
    pair: Ed25519KeyPair,
}

/// Whoever writes notes: for checkpoints, the log.
pub type Signer = SigningKey<TEXT_TYPE>;

impl<const TYPE: u8> SigningKey<TYPE> {
    /// Draws a key.
    ///
    /// # Errors
    /// The name is not one, or the system has no random numbers.
    pub fn generate(name: &str) -> Result<Self, Error> {
        let mut seed = [0; 32];
        rand::fill(&mut seed).map_err(|_| Error::note(KEY, "no random numbers"))?;
        Self::from_seed(name, seed)
    }

    /// The key of this seed (RFC 8032).
    ///
    /// # Errors
    /// The name is not one.
    pub fn from_seed(name: &str, seed: [u8; 32]) -> Result<Self, Error> {
        let pair = Ed25519KeyPair::from_seed_unchecked(&seed)
            .map_err(|_| Error::note(KEY, "the seed is of no use"))?;
        let public = pair.public_key().as_ref().try_into().map_err(|_| malformed(TYPE))?;
        Ok(Self { verifier: PublicKey::new(name, public)?, seed, pair })
    }

    /// The public half.
    pub fn verifier(&self) -> &PublicKey<TYPE> {
        &self.verifier
    }

    /// The private half as text, for a file that nobody else reads.
    pub fn secret(&self) -> String {
        let key = base64::encode(&[&[TYPE], &self.seed[..]].concat());
        format!("{PRIVATE}{}+{}+{key}", self.verifier.name, self.verifier.id())
    }

    /// Reads what [`Self::secret`] wrote.
    ///
    /// # Errors
    /// It is something else. The text does not quote it.
    pub fn from_secret(text: &str) -> Result<Self, Error> {
        let text = text.trim().strip_prefix(PRIVATE);
        let parts = text.and_then(|text| parts(text, TYPE));
        let (name, id, seed) = parts.ok_or_else(|| malformed(TYPE))?;
        let signer = Self::from_seed(name, seed)?;
        if signer.verifier.id() == id { Ok(signer) } else { Err(malformed(TYPE)) }
    }

    pub(crate) fn sign_bytes(&self, bytes: &[u8]) -> Vec<u8> {
        self.pair.sign(bytes).as_ref().to_vec()
    }

    /// The line of a note, with its end, that says this signature.
    pub(crate) fn line(&self, signature: &[u8]) -> String {
        let blob = base64::encode(&[&self.verifier.id[..], signature].concat());
        format!("{MARK}{} {blob}\n", self.verifier.name)
    }
}

impl Signer {
    /// The note with this key's signature.
    ///
    /// # Errors
    /// The text cannot be that of a note.
    pub fn sign(&self, text: &str) -> Result<String, Error> {
        if !text.ends_with('\n') || has_control(text) {
            return Err(Error::note(
                NOTE,
                "a text ends in a newline and has no control characters",
            ));
        }
        Ok(format!("{text}\n{}", self.line(&self.sign_bytes(text.as_bytes()))))
    }
}

fn has_control(text: &str) -> bool {
    text.bytes().any(|byte| byte < 0x20 && byte != b'\n')
}

/// The text of a note that `verifier` vouches for.
///
/// # Errors
/// The note is malformed, or that key has not signed it.
pub fn open<'a, const TYPE: u8>(
    note: &'a str,
    verifier: &PublicKey<TYPE>,
) -> Result<&'a str, Error> {
    signature(note, verifier).map(|(text, _)| text)
}

/// The text of a note, and what `verifier` has put beneath it.
///
/// # Errors
/// As [`open`].
pub(crate) fn signature<'a, const TYPE: u8>(
    note: &'a str,
    verifier: &PublicKey<TYPE>,
) -> Result<(&'a str, Vec<u8>), Error> {
    let (text, signatures) = split(note)?;
    let mut found = None;
    for (count, line) in signatures.split('\n').enumerate() {
        let (name, mut blob) = signature_in(line)
            .ok_or_else(|| Error::note(NOTE, "a line of its signatures is malformed"))?;
        if count >= SIGNATURES_MAX {
            return Err(Error::note(NOTE, "it has too many signatures"));
        }
        if name == verifier.name && blob[..4] == verifier.id {
            let signature = blob.split_off(4);
            if !verifier.verifies(text, &signature) {
                return Err(Error::note(NOTE, format!("the signature of {name} is wrong")));
            }
            found = Some(signature);
        }
    }
    let unsigned = || Error::note(NOTE, format!("{verifier} has not signed it"));
    Ok((text, found.ok_or_else(unsigned)?))
}

/// A note's text with its last newline, and the lines of its signatures without theirs.
pub(crate) fn split(note: &str) -> Result<(&str, &str), Error> {
    if note.len() > NOTE_LEN_MAX || has_control(note) {
        return Err(Error::note(NOTE, "it is too long or has control characters"));
    }
    let (text, signatures) = note.rsplit_once("\n\n").ok_or_else(|| {
        Error::note(NOTE, "no empty line stands between its text and its signatures")
    })?;
    let cut_off = || Error::note(NOTE, "it is cut off");
    Ok((&note[..text.len() + 1], signatures.strip_suffix('\n').ok_or_else(cut_off)?))
}

/// Whose a line of signatures is, and its key's id with the signature; none if it is malformed.
fn signature_in(line: &str) -> Option<(&str, Vec<u8>)> {
    let (name, blob) = line.strip_prefix(MARK)?.split_once(' ')?;
    let blob = base64::decode(blob).filter(|blob| blob.len() > 4)?;
    Some((name, blob))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn signer() -> Signer {
        Signer::from_seed("local/audit/fr-coordinator", [7; 32]).unwrap()
    }

    #[test]
    fn a_note_is_opened_by_its_signers_key_and_by_no_other() {
        let signer = signer();
        let note = signer.sign("one\n\ntwo\n").unwrap();
        assert_eq!(open(&note, signer.verifier()).unwrap(), "one\n\ntwo\n");
        let other = Signer::from_seed("local/audit/fr-coordinator", [8; 32]).unwrap();
        assert!(open(&note, other.verifier()).is_err());
        let renamed = Signer::from_seed("local/audit/se-coordinator", [7; 32]).unwrap();
        assert!(open(&note, renamed.verifier()).is_err());
        let both = format!("{note}{}", other.sign("one\n\ntwo\n").unwrap().lines().last().unwrap());
        assert!(open(&both, signer.verifier()).is_err(), "the last line has no end");
        assert!(open(&format!("{both}\n"), signer.verifier()).is_ok(), "others may sign too");
    }

    #[test]
    fn no_byte_of_a_note_can_be_changed() {
        let signer = signer();
        let note = signer.sign("local/audit/fr-coordinator\n17\nAAAA\n").unwrap();
        for at in 0..note.len() {
            let mut bytes = note.clone().into_bytes();
            bytes[at] ^= 0x01;
            let Ok(bad) = String::from_utf8(bytes) else { continue };
            assert!(open(&bad, signer.verifier()).is_err(), "byte {at} of {note:?}");
        }
        for len in 0..note.len() {
            if note.is_char_boundary(len) {
                assert!(open(&note[..len], signer.verifier()).is_err(), "cut off at {len}");
            }
        }
    }

    #[test]
    fn keys_are_read_as_they_are_written_and_a_slip_is_noticed() {
        let signer = signer();
        let text = signer.verifier().to_string();
        assert_eq!(text.parse::<Verifier>().unwrap(), *signer.verifier());
        assert!(text.replace("fr-", "se-").parse::<Verifier>().is_err());
        assert!(text[..text.len() - 4].parse::<Verifier>().is_err());
        let again = Signer::from_secret(&signer.secret()).unwrap();
        assert_eq!(again.verifier(), signer.verifier());
        assert!(Signer::from_secret(&text).is_err());
        assert!(Signer::generate("a b").is_err() && Signer::generate("").is_err());
    }
}
