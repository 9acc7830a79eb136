//! What a supervised process tells `entente up`: one JSON object a line on its standard output.
//!
//! Invariant: a role that is started without `--supervised` prints none of these, so that its
//! standard output stays empty under another supervisor.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// One line from a supervised process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "status", rename_all = "snake_case")]
pub enum Status {
    /// Weights are being read.
    Loading {
        /// How much of `total` is done.
        done: u64,
        /// All there is to do; the unit is the same as that of `done`.
        total: u64,
    },
    /// The process answers at its address.
    Ready {
        /// Where it listens.
        address: SocketAddr,
        /// (layer, expert) pairs that it holds.
        experts: usize,
        /// Bytes of weights that it keeps in memory.
        weights_bytes: u64,
    },
}

#[cfg(test)]
mod tests {
    use super::Status;

    #[test]
    fn lines_are_as_documented() {
        let loading = r#"{"status":"loading","done":1,"total":4}"#;
        let status = Status::Loading { done: 1, total: 4 };
        assert_eq!(serde_json::to_string(&status).unwrap(), loading);
        let ready = r#"{"status":"ready","address":"127.0.0.1:9","experts":32,"weights_bytes":7}"#;
        let status: Status = serde_json::from_str(ready).unwrap();
        assert_eq!(serde_json::to_string(&status).unwrap(), ready);
    }
}
