//! What a receipt is made of: a record, and the proof that it is in a log.
#![no_main]

use entente_audit::proof::Proof;
use entente_audit::record::{Admin, Record, Refused};
use entente_fuzz::{bounded_beyond, seed};
use entente_proto::ids::RequestId;
use libfuzzer_sys::fuzz_target;

/// A record has 64 KiB at most, and its lists are read by way of values that are longer than their
/// text. What is made of the longest fits this.
const RECORD_ALLOWANCE_BYTES: usize = 2 << 20;

const PROOF: &str = "c2sp.org/tlog-proof@v1\nindex 1\n\
    AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=\n\nexample.org/log\n2\n\
    AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=\n\n\u{2014} example.org/log AAAAAA==\n";

fn seeds() {
    let admin = Admin {
        at_ms: 1,
        caller: "spiffe://local/region/fr/role/operator/node/a".to_owned(),
        call: "/entente.v1.Admin/Drain".to_owned(),
        allowed: false,
        reason: Some("not \"now\"".to_owned()),
    };
    let refused = Refused {
        id: RequestId(7),
        tenant: "tax-office".parse().ok(),
        body: None,
        at_ms: 1,
        status: 403,
        code: "residency_unsatisfiable".to_owned(),
    };
    for (name, record) in [("admin", Record::Admin(admin)), ("refused", Record::Refused(refused))] {
        seed(name, &record.encode().expect("a short record"));
    }
    seed("proof", PROOF.as_bytes());
}

fuzz_target!(init: seeds(), |input: &[u8]| {
    bounded_beyond(input.len(), RECORD_ALLOWANCE_BYTES, || {
        if let Ok(record) = Record::decode(input) {
            assert_eq!(record.encode().as_deref(), Ok(input));
        }
        let Ok(text) = std::str::from_utf8(input) else { return };
        if let Ok(proof) = Proof::parse(text) {
            assert_eq!(Proof::parse(&proof.to_text()).ok(), Some(proof));
        }
    });
});
