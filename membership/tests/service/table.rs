//! The table of who may call what, and the proto that it is about.

use entente_membership::service::{ALLOWED, allowed};
use entente_proto::identity::Role;

/// The paths of all calls of a proto, as they are on the wire.
fn calls(proto: &str) -> Vec<String> {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../proto");
    let files = protox::compile([proto], [root]).unwrap();
    let file = files.file.iter().find(|file| file.name() == proto).unwrap();
    let calls = file.service.iter().flat_map(|service| {
        let path = move |method: &str| format!("/{}.{}/{method}", file.package(), service.name());
        service.method.iter().map(move |method| path(method.name()))
    });
    calls.collect()
}

#[test]
fn the_table_lists_each_call_of_the_control_plane_and_nothing_else() {
    let mut calls = calls("entente/v1/control.proto");
    calls.extend(self::calls("entente/v1/enrolment.proto"));
    let mut listed: Vec<&str> = ALLOWED.iter().map(|(call, _)| *call).collect();
    calls.sort();
    listed.sort_unstable();
    assert_eq!(listed, calls);
}

#[test]
fn what_is_not_in_the_table_is_refused_to_everybody() {
    for role in [Role::Coordinator, Role::Expert, Role::Witness, Role::Operator] {
        assert!(!allowed(role, "/entente.v1.Admin/Erase"));
        assert!(!allowed(role, "/entente.v1.Raft/Deliver/"));
        assert!(!allowed(role, ""));
    }
    assert!(!allowed(Role::Expert, "/entente.v1.Membership/Propose"));
    assert!(!allowed(Role::Operator, "/entente.v1.Raft/Deliver"));
}
