//! What the membership's log holds: proposals, snapshots, and the messages that carry them.
#![no_main]

use bytes::Bytes;
use entente_fuzz::{bounded, seed};
use entente_membership::raft::convert::{entry_from_wire, entry_to_wire, snapshot_from_wire};
use entente_membership::state::{Command, Expect, RecordKind, Request, SessionId, State};
use entente_proto::wire;
use libfuzzer_sys::fuzz_target;
use prost::Message;

fn seeds() {
    let mut state = State::genesis(Vec::new()).expect("an empty cluster can be founded");
    let key = "model".to_owned();
    let value = Bytes::from_static(b"what it is");
    let command = Command::PutRecord { kind: RecordKind::Model, key, value, revision: Some(0) };
    let (session, expect) = (SessionId(1), Expect::default());
    let request = Request { session, sequence: 1, at_ms: 1, expect, command };
    let data = request.encode();
    seed("request", &data);
    // Whether it is applied does not matter: both are good states.
    let _ = state.apply(request.command);
    seed("state", &state.encode());
    seed("snapshot", &state.seal());
    let entry = wire::RaftEntry { term: 1, index: 2, data, ..Default::default() };
    seed("entry", &entry.encode_to_vec());
}

fuzz_target!(init: seeds(), |input: &[u8]| bounded(input.len(), || {
    if let Ok(request) = Request::decode(input) {
        assert_eq!(Request::decode(&request.encode()).as_ref(), Ok(&request));
    }
    if let Ok(state) = State::decode(input) {
        assert_eq!(State::unseal(&state.seal()).as_ref(), Ok(&state));
    }
    let _ = State::unseal(input);
    let bytes = Bytes::copy_from_slice(input);
    if let Ok(Ok(entry)) = wire::RaftEntry::decode(bytes.clone()).map(entry_from_wire) {
        assert_eq!(entry_from_wire(entry_to_wire(&entry)), Ok(entry));
    }
    let _ = wire::RaftSnapshot::decode(bytes.clone()).map(snapshot_from_wire);
    let _ = wire::RaftEnvelope::decode(bytes);
}));
