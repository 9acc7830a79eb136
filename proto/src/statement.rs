//! What a node states that it has computed, and for which requests it is asked.
//!
//! A statement is encoded once and signed as those bytes, so whoever keeps it keeps the bytes. What
//! this module does not know: keys, certificates, signatures.

use bytes::Bytes;
use prost::Message;

use crate::frame::FrameError;
use crate::ids::{Incarnation, NodeName, Region, RequestId};
use crate::wire;

/// What a signature of a statement is for: one that was made for anything else is none.
pub const STATEMENT_CONTEXT: &str = "entente statement v1";
/// Requests that one statement is about, at most.
pub const STATED_REQUESTS_MAX: usize = 1_024;

const ID_BYTES: usize = 16;

/// Rows that one start of a node has computed, as it counted them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Statement {
    /// The node.
    pub node: NodeName,
    /// The country that it stands in.
    pub region: Region,
    /// Which start of it.
    pub incarnation: Incarnation,
    /// When it said so: milliseconds since 1970 by its own clock.
    pub at_ms: u64,
    /// (row, expert) pairs computed for each request since that start: a later statement of the
    /// same request stands for an earlier one, and is not added to it.
    pub rows: Vec<(RequestId, u64)>,
}

impl Statement {
    /// The bytes to sign and to keep.
    pub fn encode(&self) -> Bytes {
        let rows = |(request, rows): &(RequestId, u64)| wire::RequestRows {
            request: Bytes::copy_from_slice(&request.0.to_le_bytes()),
            rows: *rows,
        };
        let message = wire::Statement {
            node: self.node.to_string(),
            region: self.region.to_string(),
            incarnation: self.incarnation.0,
            at_ms: self.at_ms,
            rows: self.rows.iter().map(rows).collect(),
        };
        message.encode_to_vec().into()
    }

    /// Reads what [`Statement::encode`] wrote.
    ///
    /// # Errors
    /// Names the field that is not what it should be.
    pub fn decode(bytes: &[u8]) -> Result<Self, FrameError> {
        let text = |field, reason: String| FrameError::Text { field, reason };
        let message =
            wire::Statement::decode(bytes).map_err(|e| text("statement", e.to_string()))?;
        let count = message.rows.len();
        if count > STATED_REQUESTS_MAX {
            return Err(too_many("statement.rows", count));
        }
        let rows = |rows: &wire::RequestRows| Ok((id("request", &rows.request)?, rows.rows));
        Ok(Self {
            node: message.node.parse().map_err(|e| text("node", format!("{e}")))?,
            region: message.region.parse().map_err(|e| text("region", format!("{e}")))?,
            incarnation: Incarnation(message.incarnation),
            at_ms: message.at_ms,
            rows: message.rows.iter().map(rows).collect::<Result<_, FrameError>>()?,
        })
    }
}

fn too_many(field: &'static str, count: usize) -> FrameError {
    let allowed = format!("at most {STATED_REQUESTS_MAX}");
    FrameError::Range { field, have: count as u64, allowed }
}

fn id(field: &'static str, bytes: &[u8]) -> Result<RequestId, FrameError> {
    let have = bytes.len();
    let bytes = bytes.try_into().map_err(|_| FrameError::Length { field, have, want: ID_BYTES })?;
    Ok(RequestId(u128::from_le_bytes(bytes)))
}

/// Reads the requests that a statement is asked for.
///
/// # Errors
/// When the length is that of no list of requests, or of too many.
pub fn requests(bytes: &[u8]) -> Result<Vec<RequestId>, FrameError> {
    let count = bytes.len() / ID_BYTES;
    if !bytes.len().is_multiple_of(ID_BYTES) {
        let want = (count + 1) * ID_BYTES;
        return Err(FrameError::Length { field: "requests", have: bytes.len(), want });
    }
    if count > STATED_REQUESTS_MAX {
        return Err(too_many("requests", count));
    }
    bytes.chunks_exact(ID_BYTES).map(|bytes| id("requests", bytes)).collect()
}

/// Writes requests as [`requests`] reads them.
pub fn pack(requests: &[RequestId]) -> Bytes {
    requests.iter().flat_map(|request| request.0.to_le_bytes()).collect::<Vec<u8>>().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn statement() -> Statement {
        Statement {
            node: "fr-expert-1".parse().unwrap(),
            region: "fr".parse().unwrap(),
            incarnation: Incarnation(7),
            at_ms: 1_000,
            rows: vec![(RequestId(u128::MAX), 3), (RequestId(2), 0)],
        }
    }

    #[test]
    fn a_statement_is_read_as_it_was_written() {
        assert_eq!(Statement::decode(&statement().encode()), Ok(statement()));
    }

    #[test]
    fn what_is_no_statement_is_refused_by_the_field() {
        let wire = |change: fn(&mut wire::Statement)| {
            let mut message = wire::Statement::decode(statement().encode()).unwrap();
            change(&mut message);
            Statement::decode(&message.encode_to_vec()).unwrap_err().to_string()
        };
        assert!(wire(|s| s.node = "A".to_owned()).starts_with("node: "));
        assert!(wire(|s| s.region = "france".to_owned()).starts_with("region: "));
        assert!(wire(|s| s.rows[0].request = Bytes::new()).starts_with("request has 0 bytes"));
        let many = |s: &mut wire::Statement| {
            s.rows = vec![s.rows[0].clone(); STATED_REQUESTS_MAX + 1];
        };
        assert!(wire(many).starts_with("statement.rows is 1025"));
        assert!(Statement::decode(&[0xFF]).is_err());
    }

    #[test]
    fn requests_are_asked_for_by_whole_ids_and_not_too_many_at_once() {
        let ids: Vec<RequestId> = (0..STATED_REQUESTS_MAX as u128).map(RequestId).collect();
        assert_eq!(requests(&pack(&ids)), Ok(ids.clone()));
        assert!(requests(&pack(&ids)[1..]).is_err());
        assert!(requests(&pack(&[&ids[..], &ids[..1]].concat())).is_err());
    }
}
