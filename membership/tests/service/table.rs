//! The table of who may call what, and the protos that it is about.

use std::path::Path;

use entente_membership::access::{Denied, RULES, check};
use entente_proto::identity::{Identity, Role};

/// The paths of all calls of all services, as they are on the wire.
fn calls() -> Vec<String> {
    let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../proto"));
    let folder = std::fs::read_dir(root.join("entente/v1")).unwrap();
    let protos: Vec<_> = folder.map(|entry| entry.unwrap().path()).collect();
    let files = protox::compile(protos, [root]).unwrap();
    let calls = files.file.iter().flat_map(|file| {
        file.service.iter().flat_map(move |service| {
            let path =
                move |method: &str| format!("/{}.{}/{method}", file.package(), service.name());
            service.method.iter().map(move |method| path(method.name()))
        })
    });
    calls.collect()
}

fn caller(role: Role, region: &str) -> Identity {
    format!("spiffe://demo/region/{region}/role/{role}/node/x").parse().unwrap()
}

#[test]
fn the_table_lists_each_call_of_every_service_once_and_nothing_else() {
    let mut calls = calls();
    let mut listed: Vec<&str> = RULES.iter().map(|rule| rule.call).collect();
    calls.sort();
    listed.sort_unstable();
    assert_eq!(listed, calls);
}

#[test]
fn what_is_not_in_the_table_is_refused_to_everybody() {
    let fr = "fr".parse().unwrap();
    for role in [Role::Coordinator, Role::Expert, Role::Witness, Role::Operator] {
        for call in ["/entente.v1.Admin/Erase", "/entente.v1.Raft/Deliver/", ""] {
            assert_eq!(check(&caller(role, "fr"), fr, call), Err(Denied::Unlisted));
        }
    }
}

#[test]
fn an_expert_node_takes_frames_from_coordinators_of_its_own_region_only() {
    let (fr, stream) = ("fr".parse().unwrap(), "/entente.v1.Exchange/Stream");
    assert_eq!(check(&caller(Role::Coordinator, "fr"), fr, stream), Ok(()));
    assert_eq!(check(&caller(Role::Coordinator, "se"), fr, stream), Err(Denied::Region));
    assert_eq!(check(&caller(Role::Expert, "fr"), fr, stream), Err(Denied::Role));
}
