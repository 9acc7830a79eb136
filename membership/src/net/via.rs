//! Where a process dials instead of where the cluster says that somebody is.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Addresses as the cluster knows them, each with the one that leads there from here: through a
/// relay, or through a network that translates addresses. What is not listed is dialled as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Via(BTreeMap<String, String>);

impl Via {
    /// What to dial to reach the process that the cluster knows under `address`.
    pub fn resolve<'a>(&'a self, address: &'a str) -> &'a str {
        self.0.get(address).map_or(address, String::as_str)
    }

    /// Whether everything is dialled as it is known.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl FromIterator<(String, String)> for Via {
    fn from_iter<T: IntoIterator<Item = (String, String)>>(pairs: T) -> Self {
        Self(pairs.into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_listed_is_dialled_as_it_is() {
        let via = Via::from_iter([("10.0.0.1:7".to_owned(), "127.0.0.1:9".to_owned())]);
        assert_eq!(via.resolve("10.0.0.1:7"), "127.0.0.1:9");
        assert_eq!(via.resolve("10.0.0.2:7"), "10.0.0.2:7");
    }
}
