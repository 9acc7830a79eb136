//! A key of the public API as this program holds it: from a flag, from `cluster.json`, or just made.

use std::fmt;
use std::str::FromStr;
use std::time::SystemTime;

use anyhow::anyhow;
use entente_membership::tenant::key::Seed;
use entente_membership::tenant::{Key, Scopes, Shown};
use serde::{Deserialize, Serialize};

/// Longest key that is sent, far longer than any that is made.
const LEN_MAX: usize = 512;

/// A key. `Debug` tells which one it is and not what proves it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ApiKey(String);

impl ApiKey {
    /// What stands behind `Authorization:`.
    pub fn authorization(&self) -> String {
        format!("Bearer {}", self.0)
    }

    /// The text, for the one who is to have it.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ApiKey({})", Shown::parse(&self.0).id)
    }
}

impl FromStr for ApiKey {
    type Err = &'static str;

    /// The text is not repeated in the error.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let valid =
            (1..=LEN_MAX).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic());
        if valid { Ok(Self(text.to_owned())) } else { Err("that cannot be sent as an API key") }
    }
}

/// A new key from the system's random numbers: what the cluster is to keep, and what is shown once.
pub fn mint(created_ms: u64, scopes: Scopes, label: String) -> anyhow::Result<(Key, ApiKey)> {
    let mut seed = Seed { id: [0; 8], secret: [0; 32].into(), salt: [0; 32] };
    for bytes in [&mut seed.id[..], &mut seed.secret[..], &mut seed.salt[..]] {
        getrandom::fill(bytes).map_err(|error| anyhow!("no random numbers: {error}"))?;
    }
    let (key, secret) = Key::mint(&seed, created_ms, scopes, label);
    Ok((key, ApiKey(secret.reveal().to_owned())))
}

/// Milliseconds since 1970.
pub fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_key_is_known_to_its_record_and_its_secret_is_not_in_debug() {
        let (key, text) = mint(1, Scopes::new(), String::new()).unwrap();
        assert!(key.matches(&Shown::parse(text.reveal())));
        assert_eq!(format!("{text:?}"), format!("ApiKey({})", key.id));
        assert_ne!(mint(1, Scopes::new(), String::new()).unwrap().1, text);
    }

    #[test]
    fn what_would_not_fit_a_header_is_no_key_and_is_not_repeated() {
        for bad in ["", "a b", "a\nb", "é", &"x".repeat(LEN_MAX + 1)] {
            assert!(bad.parse::<ApiKey>().is_err(), "{bad:?}");
        }
    }
}
